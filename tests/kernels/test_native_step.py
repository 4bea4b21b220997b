"""The parts of a decoding step, level by level, against PyTorch."""

from ctypes import byref

import pytest
import torch
import torch.nn.functional as F

from manyhands.config import RouterConfig
from manyhands.kernels import native
from manyhands.kernels.native import NativeError, library, step, views
from manyhands.kernels.native.library import VERIFIED, CAttention, CStep
from manyhands.layers.attention import attend
from manyhands.moe.router import Router
from manyhands.quant import pack_linear
from manyhands.runtime.claims.route import pointing_into, router_of

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = [library.level_code(x) for x in native.levels() if x in VERIFIED] if native.available() else []


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [1, 15, 16, 33, 70, 2048])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_norm(level: int, width: int, dtype: str, weight_dtype: str) -> None:
    dtype, weight_dtype = getattr(torch, dtype), getattr(torch, weight_dtype)
    x, weight = draw(3, 7, width).to(dtype), draw(width, seed=1).to(weight_dtype)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5).to(x.dtype)
    y = step.rms_norm(x, step.norm_of(weight, 1e-5), level, 2)
    assert y.shape == x.shape and y.dtype == x.dtype
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    strided = draw(7, 2 * width)[:, ::2] if width > 1 else x[0].float()
    torch.testing.assert_close(
        step.rms_norm(strided, step.norm_of(weight, 1e-5), level),
        F.rms_norm(strided.double(), (width,), weight.double(), 1e-5).float(),
        atol=1e-6,
        rtol=1e-5,
    )


ROUTERS = [
    {},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"score": "sigmoid", "bias": True, "n_group": 4, "topk_group": 2, "logit_bias": True},
    {"n_group": 2, "topk_group": 1, "group_score": "max"},
    {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    {"num_experts": 64, "score": "sigmoid", "bias": True, "n_group": 8, "topk_group": 3, "group_score": "max"},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 1, "norm_top1": True},
    {"num_experts": 256, "num_experts_per_tok": 8, "score": "sigmoid", "bias": True, "n_group": 8, "topk_group": 4},
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("fields", ROUTERS)
def test_route(level: int, tokens: int, fields: dict) -> None:
    router = Router(RouterConfig(**{"num_experts": 16, "num_experts_per_tok": 3, **fields}), 48).eval()
    for tensor in router.state_dict().values():
        tensor.copy_(draw(*tensor.shape, seed=3))
    x = draw(tokens, 48)
    expected = router(x)
    logits, scores, ids, weights = step.route(router_of(router, 48), x, level, 2)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, expected.scores, atol=1e-6, rtol=1e-5)
    assert torch.equal(ids, expected.expert_ids)
    torch.testing.assert_close(weights, expected.weights, atol=1e-6, rtol=1e-5)


def test_route_breaks_ties_and_survives_nan_as_the_operators_do() -> None:
    router = Router(RouterConfig(num_experts=8, num_experts_per_tok=3, n_group=2, topk_group=2), 16).eval()
    torch.nn.init.zeros_(router.weight)
    x = torch.stack((torch.zeros(16), torch.full((16,), float("nan"))))
    expected = router(x)
    _, _, ids, weights = step.route(router_of(router, 16), x)
    assert torch.equal(ids, expected.expert_ids)
    assert weights[1].isnan().all() and len(set(ids[1].tolist())) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_linears_share_their_input(level: int, count: int, dtype: str) -> None:
    formats = [("int8", 32), ("int4", 32), ("int4", 64), ("bf16", 32), ("float32", 32), ("int8", 32)]
    layers = [
        pack_linear(draw(20 + 17 * i, 70, seed=i), draw(20 + 17 * i, seed=9) if i % 2 else None, *how)
        for i, how in enumerate(formats)
    ]
    x = draw(2, count, 70, seed=5).to(getattr(torch, dtype))
    structs = [views.linear(layer.record, layer.layout) for layer in layers]
    for y, layer in zip(step.linears(x, structs, level, 2), layers, strict=True):
        one = native.linear(x, layer, level=library.LEVELS[level], threads=1)
        assert torch.equal(y, one)


CASES = [  # B, S, H, G, width of keys, of values, length
    (1, 1, 4, 4, 32, 32, 1),
    (1, 1, 6, 2, 16, 16, 300),
    (2, 1, 8, 1, 48, 32, 513),
    (1, 3, 5, 5, 64, 64, 256),
    (3, 8, 4, 2, 16, 80, 257),
    (1, 1, 9, 1, 576, 512, 2500),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extras", ["plain", "padding and window", "sinks and cap"])
def test_attend(level: int, case: tuple[int, ...], dtype: str, extras: str) -> None:
    B, S, H, G, dk, dv, L = case
    k, v = (draw(B, G, L + 5, d, seed=d).to(getattr(torch, dtype)) for d in (dk, dv))
    q, scale, first = draw(B * S, H, dk, seed=1), 0.2, L - S
    start = window = sinks = cap = None
    keys, queries = torch.arange(L), torch.arange(first, L)[:, None]
    allowed = (keys <= queries).expand(B, 1, S, L)
    if extras == "padding and window":
        window, start = 300, (torch.arange(B) * 7 + 3).clamp(max=first)
        allowed = allowed & (keys > queries - window) & (keys >= start[:, None, None, None])
    elif extras != "plain":
        sinks, cap = draw(H, seed=6), 2.0
    rows = step.rectangle(B, S, first, start)
    y = step.attend(q, step.cache_of(k, v), rows, scale, window, sinks, cap, level, 2)
    k, v = (t[:, :, :L].double().repeat_interleave(H // G, 1) for t in (k, v))
    none = torch.full((H,), float("-inf"), dtype=torch.float64)
    q64 = q.double().view(B, S, H, dk).transpose(1, 2)
    expected = attend(q64, k, v, allowed, scale, cap, none if sinks is None else sinks).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(y, expected.float(), atol=2e-6, rtol=2e-5)
    held = cached(k, v, dtype, G, H)
    assert torch.equal(y, step.attend(q, step.cache_of(*held), rows, scale, window, sinks, cap, level, 1))


def cached(k: torch.Tensor, v: torch.Tensor, dtype: str, G: int, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers elsewhere, with no room to spare and [B, L, G, width] in memory."""
    parts = (t[:, :: H // G].to(getattr(torch, dtype)) for t in (k, v))
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts)
    return k, v


def test_not_a_number_is_not_hidden() -> None:
    k, v = draw(1, 1, 8, 16), draw(1, 1, 8, 16)
    k[0, 0, 3, 2] = float("nan")
    assert step.attend(draw(1, 1, 16), step.cache_of(k, v), step.rectangle(1, 1, 7), 1.0).isnan().all()


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    k = draw(1, 2, 8, 16)
    one, two = step.rectangle(1, 1, 7), step.rectangle(1, 2, 7)
    with pytest.raises(NativeError, match="no room for 9 positions"):
        step.attend(draw(2, 2, 16), step.cache_of(k, k), two, 1.0)
    with pytest.raises(NativeError, match="3 heads are not a multiple of 2 groups"):
        step.attend(draw(1, 3, 16), step.cache_of(k, k), one, 1.0)  # 3 heads, 2 groups
    with pytest.raises(NativeError, match="multiples of 16"):
        step.attend(draw(1, 2, 8), step.cache_of(k[..., :8], k[..., :8]), one, 1.0)
    rotation = step.Rotation(draw(1, 8), draw(1, 8), False)
    with pytest.raises(NativeError, match="no room for 9 positions"):
        behind = step.rectangle(1, 1, 8)
        step.rope_and_cache(draw(1, 64), draw(1, 32), draw(1, 32), behind, rotation, step.cache_of(k, k))
    with pytest.raises(NativeError, match="7 is not the code of a place of norms"), monkeypatch.context() as changed:
        changed.setitem(step.NORMS, "none", 7)
        step.rope_and_cache(draw(1, 64), draw(1, 32), draw(1, 32), one, rotation, step.cache_of(k, k))
    with pytest.raises(NativeError, match="k is"):
        step.rope_and_cache(draw(1, 64), draw(1, 48), draw(1, 32), one, rotation, step.cache_of(k, k))
    with pytest.raises(NativeError, match="x is"):
        step.rms_norm(draw(2, 16), step.norm_of(draw(8), 1e-5))
    with pytest.raises(NativeError, match="x is \\[1, 8\\], not \\[1, 24\\]"):
        step.route(pointing_into(Router(RouterConfig(num_experts=4), 24)), draw(1, 8))
    x = views.rows(draw(1, 16))
    with pytest.raises(NativeError, match="step 99"):
        library.call("mh_steps", (CStep * 1)(CStep(99)), 1, views.run(-1, 0))
    with pytest.raises(NativeError, match="y is missing"):
        library.call("mh_steps", byref(add(x, None)), 1, views.run(-1, 0))
    with pytest.raises(NativeError, match="q is missing"):
        cache = byref(step.cache_of(k, k))
        library.call("mh_attend", byref(CAttention()), byref(one.struct()), None, cache, None, views.run(-1, 0))


def add(x: object, y: object) -> CStep:
    s = CStep(6)
    s.a[0] = step.addressof(x)  # type: ignore[arg-type]
    return s
