"""Rotary embedding: frequencies against transformers, rotation against complex numbers, gradient."""

import pytest
import torch

from manyhands.config import RopeConfig
from manyhands.errors import ConfigError
from manyhands.layers.rope import apply_rope, inverse_frequencies, rope_tables, yarn_mscale

CPU = torch.device("cpu")

YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 4096},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.2},
    {"factor": 8.0, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
    {"factor": 32.0, "original_max_position_embeddings": 2048, "beta_fast": 64.0, "beta_slow": 2.0},
    {"factor": 1.0, "original_max_position_embeddings": 1024},
    {"factor": 2.0, "original_max_position_embeddings": 64, "mscale": 2.0},
]


def theirs(rope_type: str, dim: int, theta: float, fields: dict) -> tuple[torch.Tensor, float]:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": rope_type, "rope_theta": theta, **fields}
    config = transformers.LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=131072,
        rope_parameters=parameters,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope_type](config, CPU)


@pytest.mark.parametrize("fields", YARN)
@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (128, 1e6), (32, 500.0)])
def test_yarn_is_that_of_transformers(fields: dict, dim: int, theta: float) -> None:
    expected, expected_factor = theirs("yarn", dim, theta, fields)
    frequencies, factor = inverse_frequencies(RopeConfig(rope_type="yarn", rope_theta=theta, **fields), dim, CPU)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_yarn_configs_do_interpolate() -> None:
    plain, _ = inverse_frequencies(RopeConfig(), 64, CPU)
    yarn, _ = inverse_frequencies(RopeConfig(rope_type="yarn", **YARN[0]), 64, CPU)
    assert yarn[0] == plain[0] and yarn[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-6)
    assert ((yarn < plain) & (yarn > plain / 4)).any(), "a ramp lies between"


def test_linear_is_that_of_transformers() -> None:
    expected, factor = theirs("linear", 64, 10000.0, {"factor": 4.0})
    frequencies, ours = inverse_frequencies(RopeConfig(rope_type="linear", factor=4.0), 64, CPU)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == ours == 1.0


def test_linear_at_twice_the_position_is_plain() -> None:
    plain = rope_tables(RopeConfig(), 16, torch.arange(10)[None])
    scaled = rope_tables(RopeConfig(rope_type="linear", factor=2.0), 16, 2 * torch.arange(10)[None])
    torch.testing.assert_close(plain, scaled)


def test_mscale() -> None:
    assert yarn_mscale(40.0) == pytest.approx(1.3689, abs=1e-4) and yarn_mscale(1.0, 3.0) == yarn_mscale(0.5) == 1.0


@pytest.mark.parametrize("interleave", [False, True])
def test_rotation_is_a_complex_product(interleave: bool) -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    y = apply_rope(x, rope_tables(RopeConfig(), 8, positions), interleave)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    angles = positions[:, None, :, None].double() * 10000.0 ** (-torch.arange(0, 8, 2) / 8.0).double()
    expected = torch.complex(a.double(), b.double()) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(y.double(), torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleave", [False, True])
def test_products_depend_on_distance_only(interleave: bool) -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def dot(m: int, n: int) -> float:
        tables = [rope_tables(RopeConfig(), 16, torch.tensor([[p]])) for p in (m, n)]
        return float((apply_rope(q, tables[0], interleave) * apply_rope(k, tables[1], interleave)).sum())

    assert dot(9, 4) == pytest.approx(dot(105, 100), abs=1e-4) and abs(dot(9, 4) - dot(9, 5)) > 1e-3


@pytest.mark.parametrize("interleave", [False, True])
def test_gradient(interleave: bool) -> None:
    """Tables in float64: then finite differences are exact enough."""
    tables = tuple(t.double() for t in rope_tables(RopeConfig(), 8, torch.arange(3)[None]))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_rope(t, tables, interleave), (x,))


def test_dtype_is_kept_and_the_input_untouched() -> None:
    tables = rope_tables(RopeConfig(), 8, torch.arange(4)[None])
    x = torch.randn(1, 2, 4, 8).bfloat16()
    before = x.clone()
    y = apply_rope(x, tables, False)
    assert y.dtype == torch.bfloat16 and tables[0].dtype == torch.float32 and torch.equal(x, before)
    torch.testing.assert_close(y, apply_rope(x.float(), tables, False).bfloat16())


def test_far_positions_keep_their_precision() -> None:
    """Angles are float32 products of an exact position: at 100 000 the error stays below a hundredth of a radian."""
    cos, sin = rope_tables(RopeConfig(), 64, torch.tensor([[100_000]]))
    exact = 100_000 * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    error = torch.hypot(cos.double()[0, 0, 0] - exact.cos(), sin.double()[0, 0, 0] - exact.sin())
    assert error.max() < 2e-2


LONG = RopeConfig(
    rope_type="longrope", rope_theta=500.0, original_max_position_embeddings=8, factor=4.0, long_mscale=1.5,
    short_factor=(1.0, 2.0, 4.0), long_factor=(2.0, 8.0, 32.0),
)  # fmt: skip


def test_longrope_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "longrope", **LONG.model_dump(include={"rope_theta", "factor", "short_factor"})}
    parameters |= {"long_factor": [2.0, 8.0, 32.0], "short_factor": [1.0, 2.0, 4.0]}
    config = LlamaConfig(head_dim=6, rope_parameters=parameters | {"original_max_position_embeddings": 8})
    for length, long in ((8, False), (9, True)):
        expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, CPU, seq_len=length)
        frequencies, ours = inverse_frequencies(LONG, 6, CPU, long)
        torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
        assert ours == pytest.approx(1.5 if long else factor)


def test_longrope_goes_by_the_whole_length_of_each_sequence() -> None:
    places = torch.arange(9)[None].expand(2, 9)
    cos, sin = rope_tables(LONG, 6, places, torch.tensor([[8], [9]]))
    for row, long in ((0, False), (1, True)):
        frequencies, scale = inverse_frequencies(LONG, 6, CPU, long)
        angles = torch.arange(9.0)[:, None] * frequencies
        torch.testing.assert_close(cos[row, 0], angles.cos() * scale)
        torch.testing.assert_close(sin[row, 0], angles.sin() * scale)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"long_factor": None}, "rope_type = 'longrope' needs long_factor"),
        ({"rope_type": "yarn"}, "short_factor has no meaning with rope_type = 'yarn'"),
        ({"original_max_position_embeddings": None}, "needs original_max_position_embeddings"),
        ({"original_max_position_embeddings": 1}, "needs original_max_position_embeddings >= 2"),
        ({"short_factor": (1.0, 0.0, 1.0)}, "short_factor"),
    ],
)
def test_longrope_that_is_not_whole(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RopeConfig(**(LONG.model_dump() | fields))
