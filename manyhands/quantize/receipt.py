"""The receipt of quantising: what was packed, what was not and why, the bytes on both sides, and what changed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.packed import Record, is_packable
from manyhands.checkpoint.receipt import describe, describe_source, stored_sha256
from manyhands.checkpoint.source import Source
from manyhands.config.shapes import tensor_shapes
from manyhands.quantize.calibrate import MIN_TOKENS
from manyhands.quantize.figures import Figures
from manyhands.version import __version__

ASKED_AGREEMENT = 0.99

REASONS = {
    "router": "float32: a rounded router chooses other experts",
    "norm": "a norm is small",
    "embedding": "the embedding is looked up, not multiplied",
    "tied": "the embedding is looked up; the head is tied to it",
    "kv_b_proj": "MLA's decoding multiplies with parts of it, head by head",
    "other": "small",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens to measure on, and perhaps some to calibrate with."""

    ids: Tensor
    """[B, S + 1] int64."""
    text: str | None
    """What text they are; None: random ids, which say nothing about perplexity."""
    calibration_rows: int = 0
    """The first so many rows are for calibration, and nothing is measured on them."""

    @property
    def measured(self) -> Tensor:
        """[B - calibration_rows, S + 1]"""
        return self.ids[self.calibration_rows :]


def receipt_of(
    source: Source,
    records: Mapping[str, Record],
    figures: Figures,
    sample: Sample | None,
    dtype_of: Callable[[str], torch.dtype],
    not_measured: str | None = None,
) -> dict[str, Any]:
    """Everything but the target's files. Without a sample `not_measured` says why there is none."""
    layers, calibration, perplexity = list(figures.agreement.values()), None, None
    if sample is None:
        sample = Sample(torch.zeros(0, 1, dtype=torch.long), None)
    if sample.calibration_rows:
        calibration = {
            "text": sample.text,
            "tokens": sample.ids[: sample.calibration_rows, 1:].numel(),
            "tokens_per_expert": {str(layer): counts for layer, counts in figures.tokens_per_expert.items()},
            "fewer_than": MIN_TOKENS,
            "weighed_by_all_tokens": {str(layer): few for layer, few in figures.too_few.items() if few},
        }
    if sample.text is not None and figures.nats is not None:
        before, after = (math.exp(min(nats, 700.0)) for nats in figures.nats)
        perplexity = {"before": before, "after": after, "change": after / before - 1, "text": sample.text}
    return {
        "manyhands": __version__,
        "source": describe_source(source),
        **tensors_of_the_receipt(source, records, figures.relative_error, dtype_of),
        "calibration": calibration,
        "routing_agreement": {
            "asked": ASKED_AGREEMENT,
            "overall": sum(layers) / len(layers) if layers else None,
            "layers": {str(layer): share for layer, share in figures.agreement.items()},
            "tokens": sample.measured[:, 1:].numel(),
            "on": "nothing" if not_measured else sample.text or "random token ids",
        },
        "perplexity": perplexity,
        "not_measured": not_measured,
    }


def class_of(name: str) -> str:
    """experts, linear, router, norm, embedding or other, for one of our tensors."""
    module, _, leaf = name.rpartition(".")
    if ".mlp.experts." in name:
        return "experts"
    if ".router." in name:
        return "router"
    if module.endswith("norm") and leaf == "weight":
        return "norm"
    if name == "embed_tokens.weight":
        return "embedding"
    weight = f"{module}.weight"
    return "linear" if leaf in ("weight", "bias") and (is_packable(weight) or "kv_b_proj" in name) else "other"


def tensors_of_the_receipt(
    source: Source,
    records: Mapping[str, Record],
    relative_error: Mapping[str, float],
    dtype_of: Callable[[str], torch.dtype],
) -> dict[str, Any]:
    """`source_tensors`, `packed_tensors`, `not_quantised` and `classes`."""
    shapes = tensor_shapes(source.config)
    inside = {ours: record for record in records.values() for ours in record.sections}
    fates: dict[str, Any] = {}
    classes: dict[str, dict[str, Any]] = {}
    not_quantised: dict[str, str] = {}
    for ours, pieces in source.pieces.items():
        record = inside.get(ours)
        tied = source.config.tie_word_embeddings
        how = f"packed as {_format(record)}" if record is not None else "kept as it is"
        if record is None:
            not_quantised[ours] = _reason(ours, tied)
        kind = classes.setdefault(class_of(ours), {"format": set(), "weights": 0, "bytes_before": 0, "bytes_after": 0})
        kind["weights"] += torch.Size(shapes[ours]).numel()
        kind["format"].add(_format(record) if record is not None else str(dtype_of(ours)).removeprefix("torch."))
        if record is None:
            kind["bytes_after"] += torch.Size(shapes[ours]).numel() * dtype_of(ours).itemsize
        for piece in pieces:
            logical = source.logical[piece.theirs]
            for part in logical.parts:
                if part not in fates:
                    kind["bytes_before"] += source.files.stored[part].size
                    fates[part] = _describe(source, part) | {
                        "became": [],
                        "how": how if logical.decode is None else f"decoded to {logical.header.dtype}, {how}",
                    }
                name = ours if record is None else record.name
                if name not in fates[part]["became"]:
                    fates[part]["became"].append(name)
    for name in (*source.kept, *source.dropped):
        why = "not computed with" if name in source.kept else "recomputed, or stored twice"
        for part in source.logical[name].parts:
            fates[part] = _describe(source, part) | {"became": [], "how": f"left out: {why}"}
    for record in records.values():
        classes[class_of(next(iter(record.sections)))]["bytes_after"] += torch.Size(record.shape).numel()
    for kind in classes.values():
        kind["format"] = " and ".join(sorted(kind["format"]))
        kind["bits_per_weight"] = round(8 * kind["bytes_after"] / kind["weights"], 3)
    packed_tensors = {
        record.name: {
            "holds": list(record.sections),
            "format": _format(record),
            "shape": list(record.shape),
            "relative_error": {ours: relative_error[ours] for ours in record.sections if ours in relative_error},
        }
        for record in records.values()
    }
    return {
        "source_tensors": fates,
        "packed_tensors": packed_tensors,
        "not_quantised": not_quantised,
        "classes": classes,
    }


def _describe(source: Source, part: str) -> dict[str, Any]:
    stored = source.files.stored[part]
    return describe(stored.header, stored_sha256(source.files, part)) | {"file": stored.file}


def _format(record: Record) -> str:
    group = record.layout.group_size
    return record.layout.format + (f" in groups of {group}" if group else "")


def _reason(ours: str, tied: bool) -> str:
    kind = class_of(ours)
    if kind == "embedding" and tied:
        return REASONS["tied"]
    return REASONS["kv_b_proj"] if "kv_b_proj" in ours else REASONS.get(kind, REASONS["other"])
