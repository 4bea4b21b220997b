"""Experts on disk: a small packed model decoded from a file, under budgets too small for it, beside itself in memory.

In memory it is held against the oracle as ever; from the file every pass must give the same bits.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.check.compare import exact
from manyhands.check.decoding import FORMATS, DecodingCheck, Pass, build
from manyhands.check.model import DTYPES, Routings
from manyhands.check.report import Row, Situation
from manyhands.checkpoint.model import LoadedModel, from_source, only_decoder
from manyhands.checkpoint.packed import write_packed
from manyhands.checkpoint.source import open_source
from manyhands.checkpoint.stored import expert_layers, hold_stored
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, PackedConfig, RouterConfig
from manyhands.models import Decoder
from manyhands.store.policies import Decision, Policy, policy
from manyhands.store.store import Store

E, K = 6, 2
MODEL = ModelConfig(
    hidden_size=48,
    num_hidden_layers=2,
    vocab_size=97,
    intermediate_size=32,
    max_position_embeddings=256,
    attention=AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_norm="head"),
    moe=MoEConfig(
        moe_intermediate_size=32, n_shared_experts=1, router=RouterConfig(num_experts=E, num_experts_per_tok=K)
    ),
)
PACKED = (("int4 experts, int8 linear", "float32"), ("int8 experts", "bfloat16"))
"""(format, dtype)"""
BATCHES = (1, 3, 9)


class Slots(NamedTuple):
    """A budget."""

    policy: str
    staged: int
    """For records that do not stay; with fewer than E, a pass has few tokens."""
    kept: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.policy}, {self.kept} of {E * MODEL.num_hidden_layers} experts stay, {self.staged} staged"


BUDGETS = (Slots("lfu", K, 0), Slots("lfu", E, 3), Slots("lru", 3, 3), Slots("lru", E, 8), Slots("pinned", E, 5))
COUNTS = [[5, 0, 4, 0, 3, 0]] * MODEL.num_hidden_layers
"""What `pinned` is told: three experts of one layer and two of the other stay."""
PLACES = ("found in memory", "read to stay", "read and not kept", "evicted")
"""What may become of an expert that a layer wants, or of another for its sake."""


class InMemory(DecodingCheck):
    """Held against the oracle, its passes kept."""

    def __init__(self, format: str, dtype: str, seed: int, model: Decoder) -> None:
        super().__init__("experts on disk", MODEL, format, dtype, seed, model, FORMATS[format])
        self.passes: dict[str, list[Pass]] = {}

    def _compare(self, mode: str) -> tuple[list[Row], Routings]:
        self.passes[mode] = self.recorder.passes
        return super()._compare(mode)


class OnDisk(DecodingCheck):
    """The same requests; its passes must be those of `memory`, bit for bit."""

    def __init__(self, memory: InMemory, model: Decoder, budget: Slots) -> None:
        super().__init__(memory.scope, MODEL, memory.format, memory.dtype, memory.seed, model, memory.packed)
        self.memory, self.budget = memory, budget

    def _compare(self, mode: str) -> tuple[list[Row], Routings]:
        at = Situation(self.scope, self.budget.name, self.format, self.dtype, mode)
        found, right = _bits(self.recorder.passes), _bits(self.memory.passes[mode])
        if shapes := [name for name in right if name not in found or found[name].shape != right[name].shape]:
            row = Row(at, "from disk: passes", shapes[0], float(len(shapes)), 0.0, 1.0, tuple(shapes))
            return [row], ([], [])
        rows = []
        for quantity in ("states", "logits", "choices", "weights"):
            of = {name: bits for name, bits in right.items() if name.endswith(quantity)}
            rows.append(exact(at, f"from disk: {quantity}", found, of))
        return rows, ([], [])


def stored_rows(seed: int, format: str, dtype: str) -> Iterator[tuple[list[Row], Routings]]:
    """Written as `quantize` writes, opened, decoded from memory, then under every budget. Needs the native kernels."""
    packed = FORMATS[format]
    assert packed is not None
    with TemporaryDirectory(prefix="manyhands-check-") as directory:
        _write(build(MODEL, packed, DTYPES[dtype], seed), packed, Path(directory))
        source = open_source(directory)
        memory = InMemory(format, dtype, seed, only_decoder(from_source(source), "decoding"))
        yield from memory.rows(BATCHES)
        met: Counter[str] = Counter()
        for budget in BUDGETS:
            model: LoadedModel = from_source(source)
            make = partial(_counted, met, budget.policy)
            store = Store(expert_layers(source), make, budget.staged + budget.kept, budget.staged)
            try:
                hold_stored(model, source, store, "auto")
                before = Counter(met)
                decoder = only_decoder(model, "decoding")
                yield from OnDisk(memory, decoder, budget).rows(BATCHES)
                yield [_bytes_read(store, met - before, memory, budget)], ([], [])
                yield [_unpacked(memory, decoder, budget)], ([], [])
            finally:
                store.close()
        never = tuple(what for what in PLACES if not met[what])
        at = Situation("experts on disk", "all budgets", format, dtype, "decode")
        yield (
            [Row(at, "from disk: what became of experts", (never or PLACES)[0], len(never), 0.0, 1.0, never)],
            ([], []),
        )


def _write(model: Decoder, packed: PackedConfig, directory: Path) -> None:
    state = model.state_dict()
    write_packed(directory, MODEL, packed, lambda name: state[name].dtype, lambda name: state[name])


def _counted(met: Counter[str], name: str, budget_bytes: int, record_bytes: list[int]) -> Policy:
    """The policy, with what it decides counted."""
    found = policy(name, budget_bytes, record_bytes, COUNTS)
    want = found.want

    def counted(layer: int, experts: list[int]) -> Decision:
        decision = want(layer, experts)
        met["found in memory"] += len(decision.hits)
        for miss in decision.misses:
            met["read to stay" if miss.kept else "read and not kept"] += 1
            met["evicted"] += len(miss.evicted)
        return decision

    found.want = counted  # type: ignore[method-assign, assignment]
    return found


def _bits(passes: list[Pass]) -> dict[str, Tensor]:
    """Every number of every pass, floats as the integers that have their bits."""
    found: dict[str, Tensor] = {}
    for n, ran in enumerate(passes):
        name = f"pass {n} of {ran.name}"
        found[f"{name}: states"], found[f"{name}: logits"] = ran.states, ran.forward.logits
        ids, weights = ran.forward.routed.experts()
        found[f"{name}: choices"], found[f"{name}: weights"] = ids, weights
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return {name: t.contiguous().view(kinds.get(t.dtype, t.dtype)) for name, t in found.items()}


def _bytes_read(store: Store, met: Counter[str], memory: InMemory, budget: Slots) -> Row:
    """The kernel gave what the policy said was to be read, and no more."""
    at = Situation(memory.scope, budget.name, memory.format, memory.dtype, "decode")
    wanted = (met["read to stay"] + met["read and not kept"]) * store.slot_bytes
    read = {"bytes": torch.tensor(store.num_bytes)}
    return exact(at, "from disk: bytes read", read, {"bytes": torch.tensor(wanted)})


@torch.inference_mode()
def _unpacked(memory: InMemory, model: Decoder, budget: Slots) -> Row:
    """`eager`, which asks for whole experts' weights."""
    at = Situation(memory.scope, budget.name, memory.format, memory.dtype, "eager")
    ids = torch.arange(8)[None]
    found, right = {}, {}
    for layer, moe in model.sparse_layers().items():
        x = memory.model.embed_tokens.weight[ids]
        theirs = memory.model.sparse_layers()[layer]
        _, routing = theirs(x, token_ids=ids)
        found[f"layers.{layer}"] = moe.experts(x.flatten(0, 1), routing, "eager")
        right[f"layers.{layer}"] = theirs.experts(x.flatten(0, 1), routing, "eager")
    return exact(at, "from disk: unpacked experts", found, right)
