"""Decoding through what generation runs: the engine, its cache, its fused steps, packed weights.

Whatever tokens come out are given to the oracle as one sequence, without a cache; the states, logits and routing of
every forward pass must be the oracle's at those places.

B sequences of at most L tokens, T tokens of one forward pass, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.check import cases
from manyhands.check.attentions import ATTENTIONS
from manyhands.check.compare import TOLERANCES, Tolerance, close
from manyhands.check.model import DTYPES, Routings, routing_rows
from manyhands.check.oracle import decode, float64_copy
from manyhands.check.oracle_attention import Params
from manyhands.check.oracle_records import unpacked
from manyhands.check.report import Row, Situation
from manyhands.check.routers import ROUTERS, layer_config
from manyhands.checkpoint.packed import hold_records, records_of
from manyhands.config import ModelConfig, MoEConfig, PackedConfig, Packing, SamplingConfig
from manyhands.config.packing import TRAITS
from manyhands.engine.batch import Batch
from manyhands.engine.blocks import BLOCK_SIZE
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.engine.runner import Forward, Runner, joined
from manyhands.layers.cache import Cache
from manyhands.models import Decoder
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
ROWS = (1, 3, 9)
"""Sequences at a time."""
CHUNKED, CHUNK = 3, 4
"""With so many sequences a step has at most so many tokens: prompts run in chunks, beside those that decode."""
TURNS = (6, 3, 8, 12)
"""New tokens of each turn of one conversation, so that a cache is continued by a few and by many."""
FOUND = (1, 4)
"""Tokens of two prompts behind what they share: the second finds a block of the first in the cache."""
NEW_TOKENS = 5


class Recorder(Runner):
    """The engine's runner, which remembers what it was asked and what it said."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.forget()

    def forget(self) -> None:
        """Start again."""
        self.caches: list[Cache] = []  # one for each sequence, in the order in which they came
        self.passes: list[Pass] = []

    def run(self, batch: Batch, states: bool = True) -> Forward:
        """`Runner.run`, remembered."""
        self.caches += [row.cache for row in batch.rows if not any(row.cache is cache for cache in self.caches)]
        found = [next(b for b, cache in enumerate(self.caches) if cache is row.cache) for row in batch.rows]
        rows = [(b, row.position, row.ids) for b, row in zip(found, batch.rows, strict=True)]
        forward = super().run(batch, states=True)
        assert forward.states is not None
        self.passes.append(Pass(rows, [rows[r] for r in batch.drawing], forward.states, forward))
        return forward


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of T tokens."""

    rows: list[tuple[int, int, list[int]]]
    """Which sequence, its position, its tokens."""
    drawing: list[tuple[int, int, list[int]]]
    states: Tensor
    """[T, D]"""
    forward: Forward

    @property
    def name(self) -> str:
        """How many tokens of each."""
        counts = [len(ids) for _, _, ids in self.rows]
        return f"{counts[0] if len(set(counts)) == 1 else ' + '.join(map(str, counts))} tokens"


def small_models() -> dict[str, ModelConfig]:
    """Every router and every kind of attention, paired as they come, in models of two layers."""
    routers = {n: r for n, r in ROUTERS.items() if r.causal_safe}
    attentions = [(name, model) for name, model in ATTENTIONS.items() if model.longest_continued >= 64]
    found = {}
    for i in range(max(len(routers), len(attentions))):
        name, router = list(routers.items())[i % len(routers)]
        kind, model = attentions[i % len(attentions)]
        moe = MoEConfig(
            router=router,
            unchosen=layer_config(name).unchosen,
            weigh=layer_config(name).weigh,
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
        changes |= {"norm": "layer_norm" if i % 3 == 1 else "rms_norm", "lm_head_bias": i % 4 == 1}
        changes |= {"residual_multiplier": 0.5 if i % 5 == 3 else 1.0}
        found[f"{name}; {kind}"] = model.model_copy(update=changes)
    return found


def build(config: ModelConfig, packed: PackedConfig | None, dtype: torch.dtype, seed: int) -> Decoder:
    """A model in evaluation, its weights rounded to `dtype` and packed."""
    model = Decoder(config)
    cases.fill(model, "random", torch.Generator().manual_seed(seed))
    model.to(dtype).eval()
    return pack(model, packed)


@torch.no_grad()
def pack(model: Decoder, packed: PackedConfig | None) -> Decoder:
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
        model: Decoder | None = None,
        packed: PackedConfig | None = None,
    ) -> None:
        """`model` None: random weights, packed as `format` says. One that is given is packed as `packed` says."""
        self.scope, self.format, self.dtype, self.seed, self.config = scope, format, dtype, seed, config
        if config.rope.rope_type == "longrope":  # whose original length may be less than what is generated here
            longer = max(256, config.rope.original_max_position_embeddings or 0)
            rope = config.rope.model_copy(update={"original_max_position_embeddings": longer})
            self.config = config.model_copy(update={"rope": rope})
        self.given, self.packed = model, FORMATS[format] if model is None else packed
        if self.packed is not None and config.moe is None:
            self.packed = self.packed.model_copy(update={"experts": None})

    def rows(self, batches: Sequence[int] = ROWS) -> Iterator[tuple[list[Row], Routings]]:
        """Several sequences at once, of different lengths and ending at different times; then one conversation."""
        self.model = self.given or build(self.config, self.packed, DTYPES[self.dtype], self.seed)
        self.recorder = Recorder(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        for B in batches:
            longest = 7 + B % 3
            limit = longest + NEW_TOKENS - 1  # the longest prompt's answer ends first
            self.model.config = self.config.model_copy(update={"max_position_embeddings": limit})
            prompts = [self._tokens(max(1, longest - (b * 2) % 6), generator) for b in range(B)]
            chunk = CHUNK if B == CHUNKED else None
            self.recorder.forget()
            self._generate(self._engine(B, chunk), prompts, NEW_TOKENS)
            yield self._compare(f"generate, {B} rows{f' in steps of {chunk} tokens' if chunk else ''}")
        self.model.config = self.config.model_copy(update={"max_position_embeddings": 256})
        engine, prefix, text = self._engine(1), Prefix(), []
        self.recorder.forget()
        for more in TURNS:
            text += self._tokens(more, generator)
            text += self._generate(engine, [text], 2, prefix)
        yield self._compare("chat, 1 row")
        engine, shared = self._engine(1, paged=True), self._tokens(BLOCK_SIZE + 3, generator)
        self.recorder.forget()
        for more in FOUND:
            self._generate(engine, [shared + self._tokens(more, generator)], 2)
        yield self._compare("prefix cache, 2 rows")
        if self.given is None and self.packed is None:  # in place: nothing prepared from the old weights may be left
            cases.fill(self.model, "random", generator)
            self.recorder.forget()
            self._generate(self._engine(2), [self._tokens(5, generator)] * 2, 3)
            yield self._compare("generate, 2 rows, new weights")

    def _tokens(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(self.config.vocab_size, (count,), generator=generator).tolist()

    def _engine(self, sequences: int, chunk: int | None = None, paged: bool | None = None) -> Engine:
        engine = Engine(self.model, max_sequences=sequences, max_batch_tokens=chunk, paged=paged)
        engine.runner = self.recorder
        return engine

    def _generate(self, engine: Engine, prompts: list[list[int]], new: int, prefix: Prefix | None = None) -> list[int]:
        """What the first prompt was continued with, each with a seed of its own."""
        first, *_ = [
            engine.add(ids, SamplingConfig(max_new_tokens=new, seed=self.seed + b), prefix=prefix)
            for b, ids in enumerate(prompts)
        ]
        while engine.busy:
            engine.step()
        return first.token_ids

    def _compare(self, mode: str) -> tuple[list[Row], Routings]:
        at = Situation(self.scope, "ragged", self.format, self.dtype, mode)
        p = {n: t.detach() for n, t in float64_copy(self.model).items()} | unpacked(self.model)
        tolerance = self._tolerance()
        texts = self._texts()
        with torch.no_grad():
            oracles = [
                decode(
                    *self._described(p, b, len(ids)),
                    torch.tensor([ids]),
                    torch.ones(1, len(ids), dtype=torch.bool),
                    training=False,
                    seeds=[self.seed],
                    tested=[routing],
                    slack=tolerance.slack,
                )
                for b, (ids, routing) in enumerate(texts)
            ]
        states: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] = ({}, {})
        logits: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] = ({}, {})
        for n, ran in enumerate(self.recorder.passes):
            name = f"{f'step {n}' if n else 'prefill'} of {ran.name}"
            states[0][name] = ran.states
            states[1][name] = torch.cat([oracles[b].states[0, first : first + len(ids)] for b, first, ids in ran.rows])
            last = [oracles[b].logits[0, first + len(ids) - 1] for b, first, ids in ran.drawing]
            if last:  # none in a step of chunks alone
                logits[0][name], logits[1][name] = ran.forward.logits, torch.stack(last)
        rows = [
            close(at, "decoding: states", *states, tolerance=tolerance),
            close(at, "decoding: logits", *logits, tolerance=tolerance),
        ]
        tested, expected = [routing for _, routing in texts], [oracle.routings[0] for oracle in oracles]
        if expected[0]:
            prefix = "layers.{layer}.mlp.router."
            rows += routing_rows(at, tested, expected, prefix, "decoding: ", tolerance)
        return rows, (tested, expected)

    def _described(self, p: Params, sequence: int, length: int) -> tuple[ModelConfig, Params]:
        """What the oracle decodes the sequence's `length` tokens with."""
        return self.config, p

    def _texts(self) -> list[tuple[list[int], dict[int, Routing]]]:
        """Each sequence's tokens that ran, and their routing."""
        ids: list[list[int]] = [[] for _ in self.recorder.caches]
        passes: list[list[dict[int, Routing]]] = [[] for _ in ids]
        for ran in self.recorder.passes:
            start = 0
            for b, first, row in ran.rows:
                if first and not ids[b]:  # found in the cache: the first sequence computed it
                    ids[b] += ids[0][:first]
                    passes[b].append({n: routing.rows(slice(first)) for n, routing in joined(passes[0]).items()})
                assert first == len(ids[b])
                ids[b] += row
                passes[b].append(ran.forward.routed.rows(slice(start, start + len(row))))
                start += len(row)
        return list(zip(ids, map(joined, passes), strict=True))

    def _tolerance(self) -> Tolerance:
        if self.packed is not None and any(
            p is not None and TRAITS[p.format].scale is not None for p in (self.packed.experts, self.packed.linear)
        ):
            return ROUNDED
        return TOLERANCES[self.dtype]
