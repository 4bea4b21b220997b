"""Whether a layer of a model fits into memory, with what running and packing it takes: from the headers alone.

T tokens of the sample, D model width.
"""

from manyhands import format
from manyhands.checkpoint.assemble import stored_dtype
from manyhands.checkpoint.packed import records_of
from manyhands.checkpoint.room import SPARE
from manyhands.checkpoint.source import Source
from manyhands.config import PackedConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.plan.host import free_memory
from manyhands.quantize.receipt import Sample

WIDE = 16
"""Bytes for each weight of the largest matrix: what was rounded, unpacked, beside the original in float32."""
STATES = 40
"""Bytes for each number of a state [T, D]: both models' states, and what a layer makes of them."""


def why_not_measured(source: Source, packed: PackedConfig, sample: Sample, measure: bool | None) -> str | None:
    """A sentence if nothing is to be run; None if the layers are.

    Raises `UserError` for a calibration that cannot be: not asked to be run, or too large for the memory.
    """
    if measure:
        return None
    if measure is False:
        if sample.calibration_rows:
            raise UserError("calibration runs the model layer by layer: leave out --no-measure, or --data")
        return "not measured, as asked: packed expert by expert"
    need, free = layer_bytes(source, packed, sample), free_memory()
    if free is None or need <= free * (1 - SPARE):
        return None
    sizes = f"a layer takes {format.show(need, 'B')} of memory to run, and {format.show(free, 'B')} is free"
    if sample.calibration_rows:
        raise UserError(f"{source.path}: {sizes}, so it cannot be calibrated here; without --data it is packed")
    return f"{sizes}: packed expert by expert, without comparing routing and perplexity"


def layer_bytes(source: Source, packed: PackedConfig, sample: Sample) -> int:
    """What the largest layer, or the head, takes while it is read, run, packed and run again: an estimate."""
    shapes = tensor_shapes(source.config)
    stored: dict[str, int] = {}
    widest: dict[str, int] = {}
    written: dict[str, int] = {}

    def layer(name: str) -> str:
        return ".".join(name.split(".")[:2])  # layers.3, lm_head.weight

    for name, shape in shapes.items():
        numbers = 1
        for n in shape:
            numbers *= n
        at = layer(name)
        stored[at] = stored.get(at, 0) + numbers * stored_dtype(source, name).itemsize
        one = numbers // shape[0] if len(shape) == 3 else numbers
        widest[at] = max(widest.get(at, 0), one if len(shape) > 1 else 0)
    for record in records_of(source.decoder("packing"), packed):
        at = layer(record.module) if record.num_experts is not None else layer(next(iter(record.sections)))
        written[at] = written.get(at, 0) + record.layout.record_bytes * (record.num_experts or 1)
    states = STATES * sample.ids.numel() * source.config.hidden_size
    embedding = stored.pop("embed_tokens.weight")
    if source.config.tie_word_embeddings:
        stored["embed_tokens.weight"] = embedding
    return states + max(stored[at] + WIDE * widest[at] + written.get(at, 0) for at in stored)
