"""A model that memory cannot hold is refused before its weights are read; what fits is not."""

import pytest
import torch

from manyhands.checkpoint import room
from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.model import load, load_model
from manyhands.checkpoint.room import CPU, check_room, room_for
from manyhands.checkpoint.safetensors.files import TensorFiles
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing
from manyhands.errors import UserError
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

from .hostile import make

PACKED = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source") / "mixtral", family="mixtral")


@pytest.fixture(scope="module")
def packed(mixtral, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "packed"
    quantize(open_source(mixtral), target, PACKED, Sample(torch.zeros(1, 9, dtype=torch.long), None))
    return target


def memory(monkeypatch, free=2.0**50, usable=2.0**50):
    monkeypatch.setattr(room, "free_memory", lambda: free)
    monkeypatch.setattr(room, "usable_memory", lambda: usable)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"decode": True}])
@pytest.mark.parametrize("kind", ["mixtral", "packed"])
def test_the_sum_is_the_loaded_model(kind, options, request):
    directory = request.getfixturevalue(kind)
    source = open_source(directory)
    expected = room_for(source, options.get("dtype"), options.get("decode", False))
    state = load_model(directory, **options).state_dict()
    kept_float32 = sum(t.nbytes for name, t in state.items() if ".router." in name and options.get("dtype"))
    assert expected.copied + expected.mapped == sum(t.nbytes for t in state.values()) + kept_float32
    assert bool(expected.mapped) == ((kind == "packed" and not options.get("decode")) or "dtype" not in options)


def test_too_little_free_is_refused_before_anything_is_read(mixtral, monkeypatch):
    need = room_for(open_source(mixtral))
    memory(monkeypatch, free=need.copied / (1 - room.SPARE) + 1)
    load_model(mixtral)
    memory(monkeypatch, free=need.copied / (1 - room.SPARE) - 1)

    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "tensor", read)
    with pytest.raises(UserError, match=rf"{mixtral}: its weights take .*B is free\. `manyhands quantize .*--memory"):
        load_model(mixtral)
    with pytest.raises(UserError, match="is free"):
        load(mixtral)


def test_mapped_weights_are_bounded_by_what_the_process_may_have(packed, monkeypatch):
    need = room_for(open_source(packed))
    assert need.mapped > 10 * need.copied
    memory(monkeypatch, free=float(need.copied) + 4096, usable=float(need.copied + need.mapped))
    load_model(packed)
    memory(monkeypatch, usable=need.copied + need.mapped - 1.0)
    with pytest.raises(UserError, match=r"this process may have .* With --memory SIZE"):
        load_model(packed)
    with pytest.raises(UserError, match="unpacked"):
        check_room(open_source(packed), decode=True, dtype=torch.float64)


def test_no_refusal_where_nothing_is_known_or_another_device_holds_it(mixtral, monkeypatch):
    memory(monkeypatch, free=None)
    load_model(mixtral)
    memory(monkeypatch, free=1.0, usable=1.0)
    check_room(open_source(mixtral), device=torch.device("cuda"))
    with pytest.raises(UserError):
        check_room(open_source(mixtral), device=CPU)


def test_convert_says_so_before_it_writes(mixtral, tmp_path, monkeypatch):
    memory(monkeypatch, free=1.0)
    with pytest.raises(UserError, match=r"is free\. --no-agreement"):
        convert(mixtral, tmp_path / "target")
    convert(mixtral, tmp_path / "target", agreement=False)  # tensor by tensor
