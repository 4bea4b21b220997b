"""What Python declares of the native library is what was compiled; another library is refused when it is loaded."""

from collections.abc import Callable, Iterator
from ctypes import byref, c_double, c_int64, c_void_p
from itertools import product

import pytest

from manyhands.config.packing import FORMATS, TRAITS
from manyhands.errors import ConfigError
from manyhands.kernels import native
from manyhands.kernels.native import library, structs
from manyhands.quant.record import Matrix

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type, list], None]]:
    """Declares one structure with other fields, as if the library were loaded for the first time."""

    def declare(struct: type, fields: list) -> None:
        other = type(struct.__name__, (structs.Structure,), {"_fields_": fields})
        monkeypatch.setattr(structs, "STRUCTURES", tuple(other if s is struct else s for s in structs.STRUCTURES))
        library._here.cache_clear()

    yield declare
    monkeypatch.undo()
    library._here.cache_clear()


def test_the_library_says_what_is_declared() -> None:
    assert library.library().mh_layout().decode() == structs.layout()


NORM = [("weight", c_void_p), ("dtype", c_int64), ("width", c_int64), ("eps", c_double)]


@pytest.mark.parametrize(("fields", "said"), [
    ([*NORM[:3], ("eps", c_int64)], "mh_norm: eps double at 24 in the library, eps int64 at 24 here"),
    ([*NORM, ("more", c_int64)], "mh_norm: 32 bytes in the library, 40 bytes here"),
    (NORM[:3], "mh_norm: 32 bytes in the library, 24 bytes here"),
    ([NORM[0], NORM[2], NORM[1], NORM[3]], "mh_norm: dtype int64 at 8 in the library, width int64 at 8 here"),
])  # fmt: skip
def test_a_structure_that_is_not_the_same_is_refused(declared, fields: list, said: str) -> None:
    declared(structs.CNorm, fields)
    assert native.missing() == f"the library was built from other sources ({said}): install again"
    assert not native.available()
    with pytest.raises(ConfigError, match="kernels are not here: the library was built from"):
        library.library()


def test_other_codes_and_arguments_are_refused(declared, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = library.library().mh_layout().decode()
    monkeypatch.setattr(structs, "LEVELS", ("portable", "avx2", "avx512", "amx", "avx512_bf16"))
    assert structs.difference(theirs) == "levels: avx512_bf16 in the library, amx here"
    monkeypatch.setattr(structs, "CALLS", {**structs.CALLS, "mh_steps": [c_void_p, c_double, c_void_p]})
    assert structs.difference(theirs) == "mh_steps: mh_step* in the library, pointer here"
    assert structs.difference("") == "mh_matrix: nothing in the library, 64 bytes here"


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_in_a_record_are_the_library_s(format: str) -> None:
    for (N, K), parts, group in product([(1, 1), (16, 64), (17, 65), (40, 130), (300, 7)], (1, 2), (32, 64)):
        matrix = Matrix(N, K, parts, format, group if TRAITS[format].grouped else 0)
        struct = structs.CMatrix(N, K, parts, structs.FORMAT_CODES[format], matrix.group_size)
        sizes = (c_int64 * 3)()
        assert library.library().mh_matrix_bytes(byref(struct), sizes) == 0
        assert list(sizes) == [matrix.weight_bytes, matrix.scale_bytes, matrix.bias_bytes]
