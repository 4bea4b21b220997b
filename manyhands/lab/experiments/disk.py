"""Hits, reads and speed of a model whose experts lie on disk, for shares of them that may stay in memory.

L sparse layers, E experts, K experts per token, T tokens.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import load_model, only_decoder
from manyhands.checkpoint.stored import expert_layers, hold_stored
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.errors import UserError
from manyhands.kernels import BACKENDS
from manyhands.lab.decoding import pack
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import arm
from manyhands.lab.reading import check_data, look, trained_mixture
from manyhands.store.policies import policy
from manyhands.store.store import Store

_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_QUICK_SHARES = (0.25, 1.0)


@dataclass(frozen=True, slots=True)
class _Read:
    hits: float
    """Per lookup, the first pass of every sequence left out."""
    num_bytes: float
    """From disk, per token."""
    rate: float
    """Tokens per second."""
    stalled: float
    """Share of the time spent waiting for the disk."""
    logits: Tensor


def run(job: Job) -> Outcome:
    """A model per seed, the same text under every budget."""
    check_data(job)
    shares = _QUICK_SHARES if job.quick else _SHARES
    tokens, length = (192, 64) if job.quick else (4096, 128)
    found: dict[float, list[_Read]] = {share: [] for share in shares}
    trained = None
    for seed in job.seeds:
        trained = trained_mixture(job, seed)
        _, read = look(job, trained, seed)
        packed = pack(trained.directory, job.scratch / f"int8-{seed}")
        ids = read.token_ids[: tokens // length * length].reshape(-1, length).tolist()
        for share in shares:
            job.note(f"seed {seed}: {share:.0%} of the experts in memory")
            found[share].append(_decode(packed, share, ids))
    assert trained is not None and trained.run.model.moe is not None
    router = trained.run.model.moe.router
    wanted = len(trained.run.model.sparse_layers) * router.num_experts_per_tok
    same = all(
        torch.equal(each.logits, whole.logits)
        for reads in found.values()
        for each, whole in zip(reads, found[1.0], strict=True)
    )
    some = [share for share in shares if share < 1]
    criteria = [
        Criterion(
            "the logits are those with every expert in memory, bit for bit",
            "yes" if same else "no",
            same,
        ),
        Criterion(
            "a cache hits more than its share of the experts, which is what uniform routing would give",
            ", ".join(f"{min(r.hits for r in found[share]):.2f} with {share:.0%}" for share in some),
            all(r.hits > share for share in some for r in found[share]),
        ),
    ]
    figures = []
    for share, reads in found.items():
        name = f"{share:.0%} of the experts"
        figures += [
            Figure("hits", name, tuple(r.hits for r in reads), beside=f"uniform routing {share:.2f}"),
            Figure("from disk, a token", name, tuple(r.num_bytes / 1e3 for r in reads), "kB", 1),
            Figure("tokens per second", name, tuple(r.rate for r in reads), digits=0),
            Figure("share of the time waiting for the disk", name, tuple(r.stalled for r in reads), digits=2),
        ]
    x = [100 * share for share in shares]
    hits = [100 * sum(r.hits for r in reads) / len(reads) for reads in found.values()]
    chart = Chart(
        "Experts found in memory",
        "% of the experts in memory",
        "% of lookups",
        (Curve("least frequently used of late", x, hits), Curve("uniform routing", x, x, faint=True)),
        y_from_zero=True,
    )
    note = f"A token wants {wanted} experts. Reads go past the page cache; `manyhands simulate` computes the same hits."
    return Outcome((arm(trained.run, "decoder"),), tuple(figures), tuple(criteria), (chart,), notes=(note,))


def _decode(packed: Path, share: float, sequences: Sequence[Sequence[int]]) -> _Read:
    """Each sequence token by token, the store going on from one to the next."""
    if missing := BACKENDS["native"].missing():
        raise UserError(f"experts on disk need the native kernels, which are not here: {missing}")
    source, model = open_checkpoint(packed), only_decoder(load_model(packed), "this experiment")
    layers = expert_layers(source)
    E = layers[0].num_experts
    kept = max(1, round(share * E * len(layers)))
    with closing(Store(layers, partial(policy, "lfu"), kept + E, E, num_tokens=1)) as store:
        hold_stored(model, source, store, "native")
        runner, logits = Runner(model), []
        hits = misses = num_bytes = tokens = 0
        stalled = seconds = 0.0
        for number, ids in enumerate(sequences):
            cache = Caches(len(model.layers)).new()
            began = time.perf_counter()  # not the job's clock: waiting for the disk is what is measured
            for token in ids:
                logits.append(runner.run(Batch([Row([token], cache)])).logits)
            took = time.perf_counter() - began
            reads = store.take()
            if number:  # the first fills the cache
                hits, misses, num_bytes = hits + reads.hits, misses + reads.misses, num_bytes + reads.num_bytes
                stalled, seconds, tokens = stalled + reads.stalled, seconds + took, tokens + len(ids)
    return _Read(hits / (hits + misses), num_bytes / tokens, tokens / seconds, stalled / seconds, torch.cat(logits))
