"""`manyhands upcycle`: a dense checkpoint written as a mixture of experts, layer by layer, exact or refused.

Before the new directory appears both models are run from their files on sample tokens, in float64, one layer of each in
memory at a time: how far their logits differ stands in the receipt, and a mixture that was to be exact and is not is
not written.

E experts, K experts per token, T tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.convert import Progress
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE
from manyhands.checkpoint.source import Source, open_source
from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.errors import CheckFailed
from manyhands.families import nearest
from manyhands.tune.by_layer import ByLayer, check_layer_fits
from manyhands.tune.copies import Upcycling, upcycled_config, upcycled_tensors
from manyhands.tune.write import plan, write

SAMPLE = (2, 48)
"""Sequences and tokens that both models are run on: random ids."""
TOLERANCE = 1e-5
"""Of the logits, as a multiple of the largest (of 1, if they are smaller)."""


@torch.no_grad()
def upcycle(
    source: Source,
    target: str | Path,
    asked: Upcycling,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a dense checkpoint (`open_checkpoint(path)`) as a mixture in family `to` (None: the nearest) and return the
    receipt. `dtype` None: as stored.

    Raises `UserError` for a model that is a mixture already, for numbers that do not go together and for a target that
    may not be written, `ConfigError` for what the family cannot say, `CheckFailed` if the mixture was to be exact and
    its logits are not those of the dense model, `StorageError` if the disk refuses.
    """
    dense = source.decoder("upcycling")
    config = upcycled_config(dense, asked)
    check_layer_fits(source, asked.num_experts * 2.0, 0, "fewer --experts take less")
    changes = upcycled_tensors(source, asked, dtype)
    conversion = plan(source, config, changes, to or nearest(config).model_type, dtype)
    written = conversion.dtype

    def finish(partial: Path) -> dict[str, Any]:
        found = agreement(source, open_source(partial), written)
        if asked.exact and found["largest_logit_difference"] > found["allowed"]:
            raise CheckFailed(
                "the mixture does not compute what the dense model does: logits differ by "
                f"{found['largest_logit_difference']:.2g}, and {found['allowed']:.2g} is allowed"
                f"{_why(asked, written)}; nothing was written"
            )
        return {"upcycled": described(asked), "agreement": found}

    return write(
        target,
        conversion,
        changes,
        "copied into experts" if asked.exact else "copied into experts, changed",
        finish,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def described(asked: Upcycling) -> dict[str, Any]:
    """Of the receipt: what was asked for, and what to know of the router."""
    G = asked.granularity
    zero = (
        "zero but for rounding: all copies say the same and a token's weights sum to 1. Experts part with the first "
        "step, which other tokens give each of them; until then the balance loss moves the router"
    )
    return {
        "experts": asked.num_experts,
        "experts_per_token": asked.top_k,
        "granularity": G,
        "copies": asked.num_experts // G,
        "drop": asked.drop,
        "noise": asked.noise,
        "seed": asked.seed,
        "exact": asked.exact,
        "router": {
            "weights": f"N(0, {INITIALIZER_RANGE}²)" + ("" if G == 1 else f", a row for each {G} experts of a copy"),
            "renormalised": True,
            "gradient_at_step_0": zero if asked.exact and G == 1 else "not zero: the experts differ",
        },
    }


def agreement(dense: Source, sparse: Source, written: torch.dtype) -> dict[str, Any]:
    """Both models on the same sample tokens, in float64, one layer of each in memory.

    The dense model's weights are rounded to `written`, the dtype of the mixture's.
    """
    rows, length = SAMPLE
    length = min(length, dense.decoder("upcycling").max_position_embeddings)
    ids = torch.randint(0, dense.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"dtype": torch.float64, "implementation": "eager"}
    models = ByLayer(dense, length, weights=written, **how), ByLayer(sparse, length, **how)
    x, y = (model.embed(ids) for model in models)
    for (_, one), (_, other) in zip(*(model.blocks() for model in models), strict=True):
        x, y = models[0].run(one, x, ids)[0], models[1].run(other, y, ids)[0]
    largest = worst = total = square = 0.0
    for of_x, of_y in zip(x, y, strict=True):  # not the logits of all at once
        a, b = models[0].logits(of_x), models[1].logits(of_y)
        largest, worst = max(largest, float(a.abs().max())), max(worst, float((a - b).abs().max()))
        total, square = total + float((a - b).abs().mean()) / rows, square + float(a.var()) / rows
    return {
        "tokens": ids.numel(),
        "on": "random token ids",
        "largest_logit": largest,
        "logits_std": square**0.5,
        "largest_logit_difference": worst,
        "mean_logit_difference": total,
        "allowed": TOLERANCE * max(1.0, largest),
    }


def _why(asked: Upcycling, written: torch.dtype) -> str:
    G = asked.granularity
    if G & (G - 1) and written != torch.float32:
        return f". {G} times a weight is not exact in {str(written).removeprefix('torch.')}: give --dtype float32"
    return ""
