"""The sizes at which something else runs: many tokens, the large top-k, blocks of rows, the loss head's second chunk.

T tokens, D width, F expert width, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from manyhands.check.compare import close
from manyhands.check.model import DTYPES
from manyhands.check.oracle import activation
from manyhands.check.report import Row, Situation
from manyhands.check.routers import ROUTERS, RouterCheck, RouterRows
from manyhands.kernels import ExpertWeights, run_experts
from manyhands.layers.cross_entropy import CHUNK_VALUES, cross_entropy, linear_cross_entropy

COUNTS = (1, 8, 16, 17, 32, 33, 48, 49)
FEW = 5
"""Tokens, for routers to which it matters who else is there. The gradient of one or three alone may be next to nothing:
where p is nearly 1, p·(1 − p) cancels."""
MANY = 5000
"""More scores than are sorted whole, more rows than a block of them."""
LARGE = (
    ("sigmoid, bias, groups (DeepSeek-V3)", "tied"),
    ("softmax top-2, renormalised (Mixtral)", "random"),
    ("softmax top-2, renormalised (Mixtral)", "one_expert"),
)
SmallJob = tuple[str, str, str, Callable[[], Iterator[RouterRows]]]


def layer_jobs(seed: int, backends: list[str], dtypes: list[str]) -> Iterator[SmallJob]:
    """(what, backend, dtype, rows): whole layers, forward and backward, at token counts around every threshold."""
    sizes = [(LARGE[1][0], "random", (1, T), dtypes) for T in COUNTS]
    sizes += [(name, case, (4, MANY // 4), dtypes[:1]) for name, case in LARGE]
    together = [name for name, router in ROUTERS.items() if not router.causal_safe]
    sizes += [(name, "random", (1, FEW), dtypes[:1]) for name in together]
    for name, case, shape, of in sizes:
        for backend in backends:
            check = RouterCheck(name, case, seed, shape)
            for dtype in of:
                what = f"{shape[0] * shape[1]} tokens, {case}"
                yield what, backend, dtype, lambda c=check, b=backend, d=dtype: c.rows(b, d)  # type: ignore[misc]
    if "native" in backends and "bfloat16" in dtypes:  # many rows have a kernel of their own in this dtype
        check = RouterCheck(LARGE[1][0], "random", seed, (4, MANY // 4))
        yield f"{MANY} tokens, random", "native", "bfloat16", lambda: check.rows("native", "bfloat16")


def loss_head(seed: int, dtype: str) -> Iterator[Row]:
    """Loss and gradients where the logits take two chunks, the second one short; and the same without gradients."""
    V, D = 2048, 16
    T = CHUNK_VALUES // V + 37
    at = Situation("loss head", "padding", "chunks", dtype, f"train, {T} tokens")
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(T, D, generator=generator).to(DTYPES[dtype]).requires_grad_()
    head = (torch.randn(V, D, generator=generator) * D**-0.5).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    mask = torch.rand(T, generator=generator) < 0.9
    loss = linear_cross_entropy(states, head, targets, mask)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = cross_entropy(lambda x: nn.functional.linear(x.float(), head), states, targets, mask, V)

    x, w = (t.detach().double().requires_grad_() for t in (states, head))
    logits = x @ w.T
    right = ((logits.exp().sum(-1).log() - logits.gather(1, targets[:, None])[:, 0]) * mask).sum() / mask.sum()
    right.backward()
    yield close(at, "loss", {"loss head, chunk by chunk": loss, "without gradients": plain},
                {"loss head, chunk by chunk": right, "without gradients": right})  # fmt: skip
    chunk = CHUNK_VALUES // V
    found = {"head": head.grad, "states of chunk 1": states.grad[:chunk], "states of chunk 2": states.grad[chunk:]}  # type: ignore[index]
    wanted = {"head": w.grad, "states of chunk 1": x.grad[:chunk], "states of chunk 2": x.grad[chunk:]}  # type: ignore[index]
    yield close(at, "loss head gradients", found, wanted)


def wide_expert(seed: int, backend: str) -> Iterator[Row]:
    """One expert of so many rows that its gradient is summed in several groups of them."""
    T, D, F = 1200, 512, 704
    at = Situation("sizes", "one expert", backend, "float32", f"train, {T} rows")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(float(shape[-1]) ** -0.5)

    x, up, down = (t.requires_grad_() for t in (draw(T, D) * D**0.5, draw(1, 2 * F, D), draw(1, D, F)))
    weights, probe = torch.rand(T, 1, generator=generator).requires_grad_(), draw(T, D)
    ids = torch.zeros(T, 1, dtype=torch.int64)
    stacked = ExpertWeights(up, down, None, None, "swiglu")
    y = run_experts(backend, x, ids, weights, torch.ones_like(ids, dtype=torch.bool), stacked)
    (y * probe).sum().backward()  # type: ignore[no-untyped-call]
    leaves = {"x": x, "gate_up_proj": up, "down_proj": down, "weights": weights}
    copies = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    hidden = activation(copies["x"] @ copies["gate_up_proj"][0].T, "swiglu")
    right = copies["weights"] * (hidden @ copies["down_proj"][0].T)
    (right * probe.double()).sum().backward()
    yield close(at, "wide expert", {"y": y}, {"y": right})
    found = {name: t.grad for name, t in leaves.items()}
    yield close(at, "wide expert gradients", found, {name: t.grad for name, t in copies.items()})
