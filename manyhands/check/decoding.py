"""Decoding through what generation runs: the engine, its cache, its fused steps, packed weights.

Whatever tokens come out are given to the oracle as one sequence, without a cache; the states, logits and routing of
every forward pass must be the oracle's at those places.

B sequences, S tokens of one forward pass, L of all of them, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.check import cases
from manyhands.check.attentions import ATTENTIONS
from manyhands.check.compare import TOLERANCES, Tolerance, close
from manyhands.check.model import DTYPES, Routings, routing_rows
from manyhands.check.oracle import decode, float64_copy
from manyhands.check.oracle_records import unpacked
from manyhands.check.report import Row, Situation
from manyhands.check.routers import ROUTERS
from manyhands.checkpoint.packed import hold_records, records_of
from manyhands.config import ModelConfig, MoEConfig, PackedConfig, Packing, SamplingConfig
from manyhands.generate.engine import generate
from manyhands.generate.prefix import Prefix
from manyhands.models import Decoder, Hidden
from manyhands.moe import Experts, Routing
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear

INT4, INT8 = Packing(format="int4", group_size=32), Packing(format="int8")
FORMATS: dict[str, PackedConfig | None] = {
    "plain": None,
    "int4 experts": PackedConfig(experts=INT4),
    "int8 experts": PackedConfig(experts=INT8),
    "int8 linear": PackedConfig(linear=INT8),
    "int4 experts, int8 linear": PackedConfig(experts=INT4, linear=INT8),
    "float32 records": PackedConfig(experts=Packing(format="float32"), linear=Packing(format="float32")),
}
"""How the weights are stored."""
ROUNDED = Tolerance(error=1e-1, floor=5e-2, by_norm=True, cosine=0.99, slack=1e-1)
"""Integer weights: every product of few rows rounds its input to 8 bits (0.6 %, `parts.py`), some eight times a layer
along the longest path, and what one layer got wrong the next one's router and softmax see: √(3·8) · 0.6 % = 3 %,
tripled. The parts by themselves are held closer."""
ROWS = (1, 3, 8, 9)
"""Sequences at a time: fused, and more than is fused."""
TURNS = (6, 3, 8, 12)
"""New tokens of each turn of one conversation, so that a cache is continued by a few and by many."""
NEW_TOKENS = 5


class Recorder(Decoder):
    """A decoder that remembers what the engine asked it and what it said."""

    def forget(self) -> None:
        """Start again."""
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.states: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.routings: list[dict[int, Routing]] = []

    def hidden(self, ids_BS: Tensor, mask_BS: Tensor | None = None, *args: Any, **kwargs: Any) -> Hidden:
        """`Decoder.hidden`, remembered."""
        hidden = super().hidden(ids_BS, mask_BS, *args, **kwargs)
        mask = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        self.asked.append((ids_BS, mask))
        self.states.append(hidden.states)
        self.routings.append(hidden.routings)
        return hidden

    def head(self, states: Tensor) -> Tensor:
        """`Decoder.head`, remembered."""
        logits = super().head(states)
        self.logits.append(logits)
        return logits


def small_models() -> dict[str, ModelConfig]:
    """Every router and every kind of attention, paired as they come, in models of two layers."""
    routers = {n: r for n, r in ROUTERS.items() if r.causal_safe}
    attentions = list(ATTENTIONS.items())
    found = {}
    for i in range(max(len(routers), len(attentions))):
        name, router = list(routers.items())[i % len(routers)]
        kind, model = attentions[i % len(attentions)]
        moe = MoEConfig(
            router=router,
            moe_intermediate_size=32,
            hidden_act=("swiglu", "geglu", "swiglu_oai", "geglu_tanh", "gelu", "relu")[i % 6],
            expert_bias=i % 3 == 1,
            n_shared_experts=i % 2,
            shared_expert_gate=i % 4 == 1,
            first_k_dense_replace=1,
        )
        changes: dict[str, Any] = {
            "num_hidden_layers": 2,
            "vocab_size": 97,
            "intermediate_size": 32,
            "max_position_embeddings": 256,
        }
        changes |= {"moe": moe, "tie_word_embeddings": i % 2 == 0, "output_norms": i % 5 == 2}
        changes |= {"residual_multiplier": 0.5 if i % 5 == 3 else 1.0}
        found[f"{name}; {kind}"] = model.model_copy(update=changes)
    return found


def build(config: ModelConfig, packed: PackedConfig | None, dtype: torch.dtype, seed: int) -> Recorder:
    """A model in evaluation, its weights rounded to `dtype` and packed."""
    model = Recorder(config)
    cases.fill(model, "random", torch.Generator().manual_seed(seed))
    model.to(dtype).eval()
    return pack(model, packed)


@torch.no_grad()
def pack(model: Recorder, packed: PackedConfig | None) -> Recorder:
    """Put records in the places of weights."""
    if packed is None:
        return model
    modules = dict(model.named_modules())
    records = {record.name: record for record in records_of(model.config, packed)}
    hold_records(model, records, "auto")
    for record in records.values():
        old, new = modules[record.module], model.get_submodule(record.module)
        how = packed.experts if isinstance(new, RecordExperts) else packed.linear
        assert how is not None
        if isinstance(new, RecordExperts):
            assert isinstance(old, Experts)
            new.records = pack_experts(old.weights(), how.format, how.group_size).records
        else:
            new.record = pack_linear(old.weight, old.bias, how.format, how.group_size).record
    return model


class DecodingCheck:
    """One model in one format and dtype; `rows` generates with it."""

    def __init__(
        self,
        scope: str,
        config: ModelConfig,
        format: str,
        dtype: str,
        seed: int,
        model: Recorder | None = None,
        packed: PackedConfig | None = None,
    ) -> None:
        """`model` None: random weights, packed as `format` says. One that is given is packed as `packed` says."""
        self.scope, self.format, self.dtype, self.seed, self.config = scope, format, dtype, seed, config
        self.given, self.packed = model, FORMATS[format] if model is None else packed
        if self.packed is not None and config.moe is None:
            self.packed = self.packed.model_copy(update={"experts": None})

    def rows(self, batches: Sequence[int] = ROWS) -> Iterator[tuple[list[Row], Routings]]:
        """Several sequences at once, padded on the left and ending at different lengths; then one conversation."""
        self.model = self.given or build(self.config, self.packed, DTYPES[self.dtype], self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        for B in batches:
            longest = 7 + B % 3
            limit = longest + NEW_TOKENS - 1  # the longest prompt's answer ends first
            self.model.config = self.config.model_copy(update={"max_position_embeddings": limit})
            prompts = [self._tokens(max(1, longest - (b * 2) % 6), generator) for b in range(B)]
            self.model.forget()
            for _ in generate(self.model, prompts, self._sampling(NEW_TOKENS)):
                pass
            yield self._compare(f"generate, {B} rows")
        self.model.config = self.config.model_copy(update={"max_position_embeddings": 256})
        prefix, text = Prefix(), []
        self.model.forget()
        for more in TURNS:
            text += self._tokens(more, generator)
            for step in generate(self.model, [text], self._sampling(2), prefix=prefix):
                text += [token for token in step.token_ids if token is not None]
        yield self._compare("chat, 1 row")
        if self.given is None and self.packed is None:  # in place: nothing prepared from the old weights may be left
            cases.fill(self.model, "random", generator)
            self.model.forget()
            for _ in generate(self.model, [self._tokens(5, generator)] * 2, self._sampling(3)):
                pass
            yield self._compare("generate, 2 rows, new weights")

    def _tokens(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(self.config.vocab_size, (count,), generator=generator).tolist()

    def _sampling(self, new: int) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=new, temperature=1.0, seed=self.seed)

    def _compare(self, mode: str) -> tuple[list[Row], Routings]:
        model, at = self.model, Situation(self.scope, "padding", self.format, self.dtype, mode)
        ids, mask = (torch.cat([asked[i] for asked in model.asked], 1) for i in (0, 1))
        B = len(ids)
        joined = {layer: _joined([r[layer] for r in model.routings], B) for layer in model.routings[0]}
        p = {n: t.detach() for n, t in float64_copy(model).items()} | unpacked(model)
        tolerance = self._tolerance()
        with torch.no_grad():
            oracle = decode(
                self.config, p, ids.clone(), mask.clone(), training=False, seeds=[self.seed], tested=[joined],
                slack=tolerance.slack,
            )  # fmt: skip
        states: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] = ({}, {})
        logits: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] = ({}, {})
        start = 0
        for n, (asked, _) in enumerate(model.asked):
            end, real = start + asked.shape[1], mask[:, start : start + asked.shape[1]]
            name = f"{'prefill' if not n else f'step {n}'} of {real.shape[1]} tokens"
            states[0][name], states[1][name] = model.states[n][real], oracle.states[:, start:end][real]
            last = real[:, -1]
            logits[0][name], logits[1][name] = model.logits[n][last], oracle.logits[:, end - 1][last]
            start = end
        rows = [
            close(at, "decoding: states", *states, tolerance=tolerance),
            close(at, "decoding: logits", *logits, tolerance=tolerance),
        ]
        if joined:
            prefix = "layers.{layer}.mlp.router."
            rows += routing_rows(at, [joined], oracle.routings, prefix, "decoding: ", tolerance)
        return rows, ([joined], oracle.routings)

    def _tolerance(self) -> Tolerance:
        if self.packed is not None and any(
            p is not None and p.format in ("int8", "int4") for p in (self.packed.experts, self.packed.linear)
        ):
            return ROUNDED
        return TOLERANCES[self.dtype]


def _joined(steps: list[Routing], B: int) -> Routing:
    """The routings of successive forward passes, T = B·S each, as one of T = B·L."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(r, name).unflatten(0, (B, -1)) for r in steps], 1).flatten(0, 1).clone()

    return Routing(*(joined(name) for name in ("expert_ids", "weights", "scores", "logits", "kept", "token_mask")))
