"""A model read part by part: a claim writes each part's native calls, or it becomes a call of the module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manyhands.models import Decoder
from manyhands.models.decoder import Block
from manyhands.runtime import segments
from manyhands.runtime.builder import Builder, Unfit
from manyhands.runtime.claims import attend, feed_forward, mixture, norm
from manyhands.runtime.covered import MODEL
from manyhands.runtime.head import Head
from manyhands.runtime.program import Part, Program
from manyhands.runtime.snapshot import Snapshot, heard


@torch.inference_mode(False)  # a program may be used outside of the mode it was made in
def prepare(model: Decoder, capacity: int = 1, editable: bool = False) -> Program:
    """The program for steps of at most `capacity` tokens. It never fails: see `Program.native`.

    `editable`: routing may be given to its steps, at the cost of a stop in each sparse layer.
    """
    reader = _Reader(model, capacity, editable)
    for layer, block in enumerate(model.layers):
        reader.block(block, layer)
    reader.norm("norm", model.norm, "x", "states", None)
    reader.builder.flush()
    head = Head(model, reader.builder)
    reader.parts.append(Part("head", None, head.why))
    last = model.embed_tokens if model.lm_head is None else model.lm_head
    if head.why is not None:
        reader.called.append(last)
    snapshot = Snapshot((model.layers, model.norm, last), reader.called)
    return Program(model, reader.builder, snapshot, reader.parts, head)


class _Reader:
    """Walks the model in the order in which it computes."""

    def __init__(self, model: Decoder, capacity: int, editable: bool) -> None:
        self.builder = Builder(capacity, model.config, editable)
        self.builder.buffer("x", model.config.hidden_size)
        self.parts: list[Part] = []
        self.called: list[nn.Module] = []

    def block(self, block: Any, layer: int) -> None:
        """A decoder layer: its parts, or where it is of another class or listened to, the whole."""
        b = self.builder
        if type(block) is not Block or heard(block, below=False) or not MODEL.covers(b.config):
            why = "its class or config has no claim, or somebody listens to it"
            self._call("block", block, layer, why, "x", "x", segments.call_block(layer))
            return
        self.norm("input_layernorm", block.input_layernorm, "x", "normed", layer)
        attention = block.self_attn
        through = segments.call_attention(layer)
        self._part("self_attn", attention, layer, lambda: attend.emit(b, attention, layer), "normed", "y", through)
        if block.attention_output_norm is not None:
            self.norm("attention_output_norm", block.attention_output_norm, "y", "y", layer)
        b.add(block.residual_multiplier)
        self.norm("post_attention_layernorm", block.post_attention_layernorm, "x", "normed", layer)
        mlp, sparse = block.mlp, b.config.is_sparse(layer)
        through = segments.call_mlp(layer)
        emit = (lambda: mixture.emit(b, mlp, layer)) if sparse else (lambda: feed_forward.emit(b, mlp, "y"))
        self._part("mlp", mlp, layer, emit, "normed", "y", through)
        if block.mlp_output_norm is not None:
            self.norm("mlp_output_norm", block.mlp_output_norm, "y", "y", layer)
        b.add(block.residual_multiplier)

    def norm(self, name: str, module: nn.Module, source: str, to: str, layer: int | None) -> None:
        """A norm from one buffer into another."""
        emit = lambda: norm.emit(self.builder, module, source, to)  # noqa: E731
        self._part(name, module, layer, emit, source, to, segments.call_plain)

    def _part(
        self,
        name: str,
        module: nn.Module,
        layer: int | None,
        emit: Callable[[], None],
        source: str,
        to: str,
        through: Callable[[Any, torch.Tensor, segments.Moment], torch.Tensor],
    ) -> None:
        """By its claim, where nobody listens; else as a module."""
        mark = self.builder.mark()
        try:
            if heard(module):
                raise Unfit("somebody listens (a hook, or a forward of its own)")
            emit()
            self.parts.append(Part(name, layer, None))
        except Unfit as why:
            self.builder.reset(mark)
            if name == "mlp" and layer is not None:
                self.builder.routings.pop(layer, None)
                self.builder.biases.pop(layer, None)
            self._call(name, module, layer, str(why), source, to, through)

    def _call(
        self,
        name: str,
        module: nn.Module,
        layer: int | None,
        why: str,
        source: str,
        to: str,
        through: Callable[[Any, torch.Tensor, segments.Moment], torch.Tensor],
    ) -> None:
        b = self.builder
        b.module(segments.Call(module, b.tensor(source, b.D), b.tensor(to, b.D), through))
        self.parts.append(Part(name, layer, why))
        self.called.append(module)
