"""The receipt of pruning: which experts stayed and why, what that cost, and the curve with its controls."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manyhands.checkpoint.sidecars import tokenizer_of
from manyhands.checkpoint.source import Source
from manyhands.config import ModelConfig
from manyhands.errors import UserError
from manyhands.quantize.receipt import Sample
from manyhands.trace.recording import Trace
from manyhands.tune.curve import Arm
from manyhands.tune.keep import Group, fewer

if TYPE_CHECKING:
    from manyhands.tune.prune import Pruning

SHARES = (0.75, 0.5, 0.25)
"""Of the experts that a curve looks at, beside all of them and those that are kept."""
RANDOM_DRAWS = 3


def controls(config: ModelConfig, chosen: Arm) -> list[Arm]:
    """Every other arm of a curve: the same measure at other shares, and at each share random experts and the wrong
    ones; where experts are merged, also the same ones without merging. Shares that leave too few are left out."""
    assert config.moe is not None
    router, by, seed = config.moe.router, chosen.by, chosen.seed
    counts = {round(share * router.num_experts / router.n_group) * router.n_group for share in SHARES}
    arms: list[Arm] = []
    for N in sorted({*counts, chosen.num_experts} - {router.num_experts}, reverse=True):
        try:
            fewer(config, N)
        except UserError:
            continue
        if chosen.num_experts != N:
            arms.append(Arm(N, "chosen", by, seed, chosen.merge))
        if chosen.merge is not None:
            arms.append(Arm(N, "not merged", by, seed))
        arms += [Arm(N, "random", by, seed + draw) for draw in range(RANDOM_DRAWS)]
        if by != "random":
            arms.append(Arm(N, "reversed", by, seed))
    return arms


def figures(nats: float, tokens: int, size: int | None) -> dict[str, Any]:
    """Of a mean cross entropy: perplexity, and bits per byte of the text where its bytes are known."""
    bits = None if not size else nats * tokens / math.log(2) / size
    return {"loss": nats, "perplexity": math.exp(min(nats, 700.0)), "bits_per_byte": bits}


def bytes_of(source: Source, targets: Tensor) -> int | None:
    """Of the text behind these tokens, in UTF-8; None without a tokenizer."""
    tokenizer, _ = tokenizer_of(source.path)
    if tokenizer is None:
        return None
    lengths = tokenizer.byte_lengths()
    ids = targets.flatten().numpy()
    return int(lengths[ids[ids < len(lengths)]].sum())


def points(arms: list[Arm], config: ModelConfig, whole: float, tokens: int, size: int | None) -> list[dict[str, Any]]:
    """The curve: a point for each number of experts and way to choose them, the whole model first."""
    assert config.moe is not None
    E = config.moe.router.num_experts
    found = [{"experts": E, "share": 1.0, "how": "all", **figures(whole, tokens, size)}]
    by_kind: dict[tuple[int, str], list[Arm]] = {}
    for arm in arms:
        by_kind.setdefault((arm.num_experts, arm.how), []).append(arm)
    for N, how in sorted(by_kind, key=lambda kind: -kind[0]):
        of_kind = by_kind[N, how]
        nats = sum(arm.nats for arm in of_kind) / len(of_kind)
        by, merge = of_kind[0].by, of_kind[0].merge
        name = {"chosen": by, "not merged": by, "reversed": f"{by}, reversed"}.get(how, how)
        name += f", merged by {merge}" if merge else ""
        draws = {"draws": [arm.nats for arm in of_kind]} if len(of_kind) > 1 else {}
        found.append({"experts": N, "share": N / E, "how": name, **figures(nats, tokens, size), **draws})
    return found


def described(
    config: ModelConfig,
    asked: "Pruning",
    groups: Mapping[int, list[Group]],
    sample: Sample | None,
    trace: Trace | None,
) -> dict[str, Any]:
    """Of the receipt: what was asked for, and which experts of each layer stayed."""
    assert config.moe is not None
    scored = None
    if trace is not None:
        scored = {"trace": str(trace.path), "tokens": len(trace)}
    elif sample is not None and sample.calibration_rows and (asked.by != "random" or asked.merge):
        scored = {"text": sample.text, "tokens": sample.ids[: sample.calibration_rows, 1:].numel()}
    layers: dict[str, Any] = {}
    for layer, of_layer in groups.items():
        layers[str(layer)] = {"kept": [group[0].expert for group in of_layer]}
        if any(len(group) > 1 for group in of_layer):
            shares = {str(g[0].expert): {str(m.expert): round(m.share, 6) for m in g} for g in of_layer if len(g) > 1}
            layers[str(layer)]["merged"] = shares
    return {
        "experts": config.moe.router.num_experts,
        "kept": asked.num_experts,
        "by": asked.by,
        "merge": asked.merge,
        "seed": asked.seed,
        "scored_on": scored,
        "layers": layers,
    }
