"""The packed tensors of a checkpoint, one layer at a time: read, run, pack, run again as packed, let go.

B sequences, S tokens each, T = B·S, E experts, K experts per token, D model width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.checkpoint.assemble import our_tensor, stored_dtype
from manyhands.checkpoint.packed import Record, hold_records, records_of
from manyhands.checkpoint.source import Source
from manyhands.config import PackedConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.families.manyhands import MANYHANDS
from manyhands.kernels import ExpertWeights
from manyhands.layers.cross_entropy import cross_entropy
from manyhands.layers.norm import norm_of
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models.decoder import Block, find_positions
from manyhands.moe import Routing
from manyhands.quant import PackedLinear, pack_experts, pack_linear
from manyhands.quantize.calibrate import Seen, mean_square, watching
from manyhands.quantize.figures import Figures, agreement, expert_error, relative, rounding_error
from manyhands.quantize.receipt import Sample

CPU = torch.device("cpu")
Progress = Callable[[str, int, int], None]
"""(tensor just packed, how many are, of how many)."""


def kept_dtype(source: Source, name: str) -> torch.dtype:
    """Of a tensor that is not packed: as it is stored, but for the router, which is float32."""
    return torch.float32 if name.endswith(MANYHANDS.saved_float32) else stored_dtype(source, name)


class Quantizer:
    """Gives the packed checkpoint's tensors in the order in which they are written."""

    def __init__(self, source: Source, packed: PackedConfig, sample: Sample, progress: Progress | None) -> None:
        self.source, self.config, self.sample, self.progress = source, source.decoder("packing"), sample, progress
        self.records = {record.name: record for record in records_of(self.config, packed)}
        self.shapes = tensor_shapes(source.config)
        self.figures = Figures()
        self.ids_BS, self.targets_T = sample.ids[:, :-1], sample.measured[:, 1:].flatten()
        low, high = int(sample.ids.min()), int(sample.ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"the sample holds token id {wrong}; the model has vocab_size = {self.config.vocab_size}")
        S = self.ids_BS.shape[1]
        self.positions = find_positions(self.config, S, S, None, CPU)
        self._ready: dict[str, Tensor] = {}
        self._next_layer = 0
        self._packed_count = 0
        x = F.embedding(self.ids_BS, self._ours("embed_tokens.weight")).float() * self.config.embedding_multiplier
        c = sample.calibration_rows
        self._calibrating, self._states = x[:c], (x[c:], x[c:])
        """Of the original on the calibration rows; of both models on the measured ones: [B, S, D] float32."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor that is not packed: as it is stored, but for the router, which is float32."""
        return kept_dtype(self.source, name)

    def value(self, name: str) -> Tensor:
        """A tensor of the new file. Records are asked for in the order of the model."""
        record = self.records.get(name)
        if record is None:
            return self._ours(name, self.dtype_of(name))
        if record.module == "lm_head":
            self._all_layers()
            return self._pack_head(record)
        while name not in self._ready:
            self._one_layer()
        return self._ready.pop(name)

    def finish(self) -> None:
        """What is left to measure when everything is written."""
        self._all_layers()
        if self.figures.nats is None:
            head = self._ours("embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
            bias = self._head_bias()

            def logits(x: Tensor) -> Tensor:
                return F.linear(x, head.to(x.dtype), None if bias is None else bias.to(x.dtype))

            self._compare(logits, logits)

    def _head_bias(self) -> Tensor | None:
        return self._ours("lm_head.bias") if self.config.lm_head_bias else None

    def _ours(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return our_tensor(self.source, name, self.shapes[name], dtype, CPU)

    def _all_layers(self) -> None:
        while self._next_layer < self.config.num_hidden_layers:
            self._one_layer()

    def _one_layer(self) -> None:
        """Run, pack and run again; `_ready` then has the layer's records."""
        layer, prefix = self._next_layer, f"layers.{self._next_layer}."
        self._next_layer += 1
        with torch.device("meta"):
            block = Block(self.config, layer, "auto")
        names = [name for name in self.shapes if name.startswith(prefix)]
        state = {name.removeprefix(prefix): self._ours(name, self._kept_dtype(name)) for name in names}
        block.load_state_dict(state, assign=True)
        block.eval()
        before, after = self._states
        seen, c = None, self.sample.calibration_rows
        if c:
            with watching(block) as seen:
                self._calibrating, _ = self._run(block, self._calibrating, self.ids_BS[:c])
        before, routing = self._run(block, before, self.ids_BS[c:])
        if routing is not None and seen is not None:
            self.figures.tokens_per_expert[layer], self.figures.too_few[layer] = seen.tokens_per_expert, seen.too_few
        local = {}
        for record in self.records.values():
            if record.name.startswith(prefix):
                self._ready[record.name] = self._pack(record, state, prefix, seen)
                local[record.name] = replace(record, module=record.module.removeprefix(prefix))
        hold_records(block, local, "auto")
        held = {name.removeprefix(prefix): self._ready[name] for name in local}
        block.load_state_dict(held, strict=False, assign=True)  # the rest of the block stays as it is
        after, routing_after = self._run(block, after, self.ids_BS[c:])
        if routing is not None and routing_after is not None:
            self.figures.agreement[layer] = agreement(routing, routing_after)
        self._states = (before, after)
        for name in names:
            for piece in self.source.pieces[name]:
                self.source.release(piece.theirs)

    def _kept_dtype(self, name: str) -> torch.dtype | None:
        """As the loaded model has it."""
        return torch.float32 if name.endswith(MANYHANDS.saved_float32) else None

    def _run(self, block: Block, x: Tensor, ids_BS: Tensor) -> tuple[Tensor, Routing | None]:
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        x, routing, _ = block(x, self.positions, None, real_BS, ids_BS, False)
        return x, routing

    def _pack(self, record: Record, state: dict[str, Tensor], prefix: str, seen: Seen | None) -> Tensor:
        layout, ours = record.layout, {s: n for n, s in record.sections.items()}
        weights = {section: state[name.removeprefix(prefix)] for section, name in ours.items()}
        try:
            if record.num_experts is None:
                inputs = None if seen is None else seen.linear[record.module.removeprefix(prefix)]
                return self._pack_linear(record, weights, inputs)
            assert layout.activation is not None
            up_bias, down_bias = weights.get("up_bias"), weights.get("down_bias")
            stacked = ExpertWeights(weights["up"], weights["down"], up_bias, down_bias, layout.activation)
            importance = None
            if seen is not None and seen.up is not None and seen.down is not None:
                importance = (seen.up, seen.down)
            packed = pack_experts(stacked, layout.format, layout.group_size or 32, importance)
        except ConfigError as error:
            bad = (ours[section] for section, w in weights.items() if not bool(torch.isfinite(w).all()))
            name = next(bad, next(iter(record.sections)))
            raise CheckpointError(f"{self.source.path}: {name}: {error}") from None
        squares = torch.zeros(2, 2, dtype=torch.float64)
        for e in range(packed.num_experts):
            squares += expert_error(packed, e, stacked.up[e], stacked.down[e])
        self.figures.relative_error[ours["up"]] = relative(squares[0])
        self.figures.relative_error[ours["down"]] = relative(squares[1])
        self._report(record.name)
        return packed.records

    def _pack_linear(self, record: Record, weights: dict[str, Tensor], inputs: Tensor | None) -> Tensor:
        layout = record.layout
        packed = pack_linear(weights["weight"], weights.get("bias"), layout.format, layout.group_size or 32, inputs)
        section = packed.section("weight")
        assert section is not None
        (matrix,) = layout.matrices
        error = relative(rounding_error(weights["weight"], section, packed.section("scales"), matrix))
        self.figures.relative_error[next(iter(record.sections))] = error
        self._report(record.name)
        return packed.record

    def _pack_head(self, record: Record) -> Tensor:
        weights = {"weight": self._ours("lm_head.weight")}
        if (bias := self._head_bias()) is not None:
            weights["bias"] = bias
        inputs = mean_square(self._final(self._calibrating)) if self.sample.calibration_rows else None
        try:
            held = PackedLinear(self._pack_linear(record, weights, inputs), record.layout)
        except ConfigError as error:
            raise CheckpointError(f"{self.source.path}: lm_head.weight: {error}") from None
        module = RecordLinear(record.layout)
        module.record = held.record
        self._compare(lambda x: F.linear(x, *(t.to(x.dtype) for t in weights.values())), module)
        return held.record

    def _final(self, x_BSD: Tensor) -> Tensor:
        norm = norm_of(self.config.norm, self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({name: self._ours(f"norm.{name}") for name, _ in norm.named_parameters()}, assign=True)
        states: Tensor = norm(x_BSD).flatten(0, 1)
        return states * self.config.output_multiplier

    def _compare(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        """Both models' cross entropy on the sample."""
        found, mask_T = [], torch.ones_like(self.targets_T, dtype=torch.bool)
        for head, states in zip((before, after), self._states, strict=True):
            loss = cross_entropy(head, self._final(states), self.targets_T, mask_T, self.config.vocab_size)
            found.append(float(loss))
        self.figures.nats = (found[0], found[1])

    def _report(self, name: str) -> None:
        self._packed_count += 1
        if self.progress is not None:
            self.progress(name, self._packed_count, len(self.records))
