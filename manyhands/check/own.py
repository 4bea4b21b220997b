"""A checkpoint's own weights: are they finite, and does what they give, generating, agree with the oracle.

A small model is taken whole, packed records and all. Of a large one single experts are taken whole, and slices of
everything else (`own_read.py`); the report says which. T tokens, E experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from manyhands.check import own_read
from manyhands.check.compare import close, exact
from manyhands.check.decoding import DecodingCheck
from manyhands.check.encoder_decoder import EncoderDecoderCheck
from manyhands.check.model import DTYPES, Routings
from manyhands.check.oracle import activation
from manyhands.check.oracle_records import tensors
from manyhands.check.parts import tolerance_of
from manyhands.check.recurrent import RecurrentCheck
from manyhands.check.report import CheckReport, Row, Situation
from manyhands.check.shrink import shrink
from manyhands.checkpoint.model import from_source
from manyhands.checkpoint.packed import hold_records
from manyhands.checkpoint.source import Source
from manyhands.config import EncoderDecoderConfig, RecurrentConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.kernels import ExpertWeights, run_experts
from manyhands.models import Decoder, EncoderDecoder, Recurrent
from manyhands.moe import Routing
from manyhands.moe.packed import RecordExperts
from manyhands.quant import PackedExperts, PackedLinear

WHOLE_VALUES = 1 << 25
"""A model of no more numbers is taken whole: 270 MB in float64."""
EXPERT_VALUES = 1 << 26
"""An expert of no more is taken whole (DeepSeek-V3's has 44 million)."""
ROWS = (3, 17)


def own_rows(source: Source, report: CheckReport, seed: int) -> Iterator[tuple[list[Row], Routings]]:
    """All of it; what was read goes into `report.read`."""
    if source.ignored:
        report.read.append(f"config.json without {', '.join(source.ignored)}, as asked")
    yield [_finite(source, report)], ([], [])
    yield list(_records(source, report)), ([], [])
    if isinstance(source.config, EncoderDecoderConfig):
        yield from _encoder_decoder(source, source.config, report, seed)
        return
    if isinstance(source.config, RecurrentConfig):
        yield from _recurrent(source, source.config, report, seed)
        return
    if own_read.values(source) <= WHOLE_VALUES:
        yield from _whole(source, report, seed)
        return
    yield from _sliced(source, report, seed)
    yield list(_experts(source, report, seed)), ([], [])


def _encoder_decoder(
    source: Source, config: EncoderDecoderConfig, report: CheckReport, seed: int
) -> Iterator[tuple[list[Row], Routings]]:
    """A small one whole, in float32: trained with and, where its experts are never full, decoding."""
    if own_read.values(source) > WHOLE_VALUES:
        report.skipped.append("what these weights give: of an encoder-decoder only a small one is taken whole")
        return
    model = EncoderDecoder(config)
    model.load_state_dict(from_source(source, torch.float32).state_dict())
    report.read.append("all of its weights, with both stacks")
    yield from EncoderDecoderCheck(config, "padding", seed, model).rows("auto", "float32")


def _recurrent(
    source: Source, config: RecurrentConfig, report: CheckReport, seed: int
) -> Iterator[tuple[list[Row], Routings]]:
    """A small one whole, in float32: trained with, without dropout, and step by step."""
    if own_read.values(source) > WHOLE_VALUES:
        report.skipped.append("what these weights give: of a recurrent model only a small one is taken whole")
        return
    model = Recurrent(config.model_copy(update={"dropout": 0.0}))
    model.load_state_dict(from_source(source, torch.float32).state_dict())
    report.read.append("all of its weights")
    yield from RecurrentCheck(model.config, "padding", seed, model).rows("auto", "float32")


def _finite(source: Source, report: CheckReport) -> Row:
    failing, read, bytes_read = [], 0, 0
    for name, fine, size in own_read.finite(source):
        read, bytes_read = read + 1, bytes_read + size
        if not fine:
            failing.append(name)
    total = sum(stored.size for stored in source.files.stored.values())
    share = 100.0 * bytes_read / max(total, 1)
    report.read.append(
        f"looked for NaN and infinity in {read} of {len(source.logical)} tensors, {share:.3g} % of the bytes"
    )
    at = Situation("checkpoint", "own weights", "stored", "–", "read")
    return Row(at, "weights are finite", (failing or ["all"])[0], float(len(failing)), 0.0, 1.0, tuple(failing))


def _records(source: Source, report: CheckReport) -> Iterator[Row]:
    """Packed records read twice: of every module, and of the first, middle and last expert."""
    at, read = Situation("checkpoint", "own weights", "packed", "float32", "read"), 0
    theirs: dict[str, Tensor] = {}
    mine: dict[str, Tensor] = {}
    for name, record in list(source.records.items())[:64]:
        stored = source.files.tensor(name)
        numbers = [None] if record.num_experts is None else sorted(set(own_read.spread(3, record.num_experts)))
        for e in numbers:
            one = stored if e is None else stored[e]
            size = sum(m.parts * m.outputs * m.inputs for m in record.layout.matrices)
            if size > own_read.PIECE_VALUES:
                continue
            found = tensors(one, record.layout)
            label, read = f"{name}" if e is None else f"{name}[{e}]", read + 1
            if e is None:
                unpacked = dict(zip(("weight", "bias"), PackedLinear(one, record.layout).dequantize(), strict=True))
            else:
                up, down, up_bias, down_bias = PackedExperts(one[None], record.layout).dequantize()
                unpacked = {"up": up[0], "down": down[0]}
                if up_bias is not None and down_bias is not None:
                    unpacked |= {"up_bias": up_bias[0], "down_bias": down_bias[0]}
            for part, value in found.items():
                mine[f"{label} {part}"] = value.float()
                theirs[f"{label} {part}"] = unpacked[part]  # type: ignore[assignment]
        source.files.release(name)
    if mine:
        report.read.append(f"{read} packed records read twice, byte by byte")
        yield exact(at, "packed records", theirs, mine)


def _whole(source: Source, report: CheckReport, seed: int) -> Iterator[tuple[list[Row], Routings]]:
    loaded = from_source(source)
    with torch.device("meta"):
        model = Decoder(source.decoder("check"))
        hold_records(model, source.records, "auto")
    state = {name: t.clone() for name, t in loaded.state_dict().items()}
    model.load_state_dict(state, assign=True)
    report.read.append(f"generated with all {own_read.values(source):,} weights")
    yield from _generate(source, model.requires_grad_(False).eval(), seed)


def _sliced(source: Source, report: CheckReport, seed: int) -> Iterator[tuple[list[Row], Routings]]:
    state, said = own_read.slices(source)
    with torch.device("meta"):
        model = Decoder(shrink(source.decoder("check")))
    dtype = own_read.stored_dtype(source)
    kept = {name for name in state if ".router." in name}
    model.load_state_dict({n: t if n in kept else t.to(dtype) for n, t in state.items()}, assign=True)
    report.read.append(f"generated with {said}")
    yield from _generate(source, model.requires_grad_(False).eval(), seed)


def _generate(source: Source, model: Decoder, seed: int) -> Iterator[tuple[list[Row], Routings]]:
    stored = next((n for n, d in DTYPES.items() if d == own_read.stored_dtype(source)), None)
    if source.config.moe is not None and not source.config.moe.router.causal_safe:
        return
    for dtype in ["float32"] if stored in (None, "float32") else [stored, "float32"]:
        model.to(DTYPES[dtype])
        check = DecodingCheck("checkpoint", model.config, "plain", dtype, seed, model=model, packed=source.packed)
        yield from check.rows((3,))


def _experts(source: Source, report: CheckReport, seed: int) -> Iterator[Row]:
    """The first expert of the first sparse layer and the last of the last, whole, by every backend."""
    config = source.config
    if config.moe is None:
        return
    shapes, layers = tensor_shapes(config), config.sparse_layers
    for layer, e in dict.fromkeys(((layers[0], 0), (layers[-1], config.moe.router.num_experts - 1))):
        prefix = f"layers.{layer}.mlp.experts."
        names = [name for name in shapes if name.startswith(prefix)]
        if sum(torch.Size(shapes[name][1:]).numel() for name in names) > EXPERT_VALUES:
            report.skipped.append(f"whole experts of layer {layer}: too large")
            continue
        one = {name.removeprefix(prefix): own_read.expert(source, name, e, shapes[name][1:]) for name in names}
        up = next(name for name in one if name.endswith("up_proj"))
        report.read.append(f"expert {e} of layer {layer}, whole")
        for T in ROWS:
            yield from _expert(source, prefix, e, one, up, T, seed)


def _expert(source: Source, prefix: str, e: int, one: dict[str, Tensor], up: str, T: int, seed: int) -> Iterator[Row]:
    moe = source.config.moe
    assert moe is not None
    x = torch.randn(T, source.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    p = {name: t.double() for name, t in one.items()}
    h = x.double() @ p[up].T
    h = activation(h + p[f"{up}_bias"] if f"{up}_bias" in p else h, moe.hidden_act)
    right = h @ p["down_proj"].T + p.get("down_proj_bias", torch.zeros(()).double())
    ids, weights = torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
    kept, name = torch.ones_like(ids, dtype=torch.bool), f"{prefix}[{e}]"
    record = next((r for r in source.records.values() if f"{r.module}." == prefix), None)
    if record is not None:
        packed = RecordExperts(record.layout, 1)
        packed.records = source.files.tensor(record.name)[e : e + 1]
        blank = torch.zeros(T, 1)
        y = packed(x, Routing(ids, weights, blank, blank, kept, kept[:, 0]))
        at = Situation("checkpoint", "own weights", record.layout.format, "float32", f"decode, {T} rows")
        yield close(
            at, "whole experts", {name: y}, {name: right}, tolerance=tolerance_of(record.layout.format, "float32")
        )
        return
    biases = [one[name][None] if name in one else None for name in (f"{up}_bias", "down_proj_bias")]
    stacked = ExpertWeights(one[up][None], one["down_proj"][None], biases[0], biases[1], moe.hidden_act)
    y = run_experts("auto", x, ids, weights, kept, stacked)
    at = Situation("checkpoint", "own weights", "auto", "float32", f"decode, {T} rows")
    yield close(at, "whole experts", {name: y}, {name: right})
