"""GShard in small: many languages into English, every second layer sparse, capacity by group, a random second expert.

E experts, F width of a feed-forward network and of an expert, D model width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from manyhands.config import BalanceConfig, EncoderDecoderConfig, MoEConfig, OptimConfig, RouterConfig, ScheduleConfig
from manyhands.lab.einsum import einsum_layer
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.translate import (
    Corpus,
    Course,
    Read,
    Translator,
    prepare,
    read,
    tells_language,
    train_translator,
)
from manyhands.lab.translations import made_up_translations, read_translations
from manyhands.models import EncoderDecoder, init_weights
from manyhands.moe import MoELayer
from manyhands.plan.count_kind import count_any, router_flops, sequence_flops

RICH, POOR = 10_000, 1_000
"""Pairs from which a language is rich, and below which it is poor."""
TOLERANCE = 1e-6
_MOST = 200_000
"""Translations that are taken of a collection, at random."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The dense and the sparse model of one seed, and what they make of the test."""

    dense: Translator
    sparse: Translator
    dense_read: Read
    sparse_read: Read
    told: dict[int, tuple[float, float]]
    untrained: dict[int, tuple[float, float]]


def run(job: Job) -> Outcome:
    """Both models on the same batches."""
    corpus = _corpus(job)
    sparse, dense = configs(quick=job.quick)
    course = Course(
        steps=40 if job.quick else 1000,
        batch_size=32 if job.quick else 192,
        optim=OptimConfig(lr=0.01 if job.quick else 0.006, embed_lr_scale=3.0, weight_decay=0.0),
        balance=BalanceConfig(aux_loss_coef=0.01),
        schedule=ScheduleConfig(warmup_steps=10 if job.quick else 50, decay_fraction=0.3),
    )
    pairs = [_pair(job, corpus, sparse, dense, course, seed) for seed in job.seeds]
    criteria = [_einsums(job.seeds[0])]
    gains = [pair.dense_read.overall - pair.sparse_read.overall for pair in pairs]
    if job.quick:
        start = math.log(dense.vocab_size)
        worst = max(max(pair.dense_read.overall, pair.sparse_read.overall) for pair in pairs)
        criteria.append(
            Criterion("both learn: half a nat below guessing", f"{worst:.2f}, {start:.2f}", worst < start - 0.5)
        )
    else:
        criteria.append(
            Criterion(
                "the sparse model's loss on new texts is lower, at equal active size",
                f"{sum(gains) / len(gains):+.3f} nats of gain, {min(gains):+.3f} to {max(gains):+.3f} over seeds",
                min(gains) > 0,
            )
        )
    return Outcome(
        (_arm("dense", dense), _arm("sparse", sparse)),
        tuple(_figures(pairs, corpus)),
        tuple(criteria),
        (_learning(pairs), _by_language(pairs, corpus)),
        notes=tuple(_notes(job, corpus)),
    )


def _corpus(job: Job) -> Corpus:
    job.note("reading translations")
    if job.quick and job.data is None:
        return prepare(made_up_translations(400, 4, seed=0), 288, 32, 20)
    found = read_translations(job.data)
    if len(found) > _MOST:
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:_MOST].tolist()
        found = [found[i] for i in sorted(chosen)]
    job.note(f"cutting {len(found):,} translations into tokens")
    return prepare(found, 288 if job.quick else 1024, 32, 200)


def configs(quick: bool) -> tuple[EncoderDecoderConfig, EncoderDecoderConfig]:
    """(sparse, dense): the dense model's networks are so wide that as many weights, the routers' counted, work for a
    token, to the next multiple of 8.
    """
    E, F, D = (8, 32, 32) if quick else (64, 128, 64)
    router = RouterConfig(
        num_experts=E,
        num_experts_per_tok=2,
        random_second=True,
        capacity_factor=1.0,  # GShard's 2·S/E
        capacity_per="group",
        capacity_group=256 if quick else 1024,
    )
    sizes = {"vocab_size": 288 if quick else 1024, "hidden_size": D, "num_hidden_layers": 2, "num_decoder_layers": 2}
    sizes |= {"num_attention_heads": 2, "head_dim": D // 2}
    dense_width = 8 * math.ceil((F + 2 * F + E / 2) / 2 / 8)  # of two layers one has F, the other 2F and E/2 of router
    dense = EncoderDecoderConfig.model_validate(sizes | {"intermediate_size": dense_width})
    of_sparse = {
        "intermediate_size": F,
        "router": router,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    return EncoderDecoderConfig.model_validate(sizes | of_sparse), dense


def _pair(
    job: Job, corpus: Corpus, sparse: EncoderDecoderConfig, dense: EncoderDecoderConfig, course: Course, seed: int
) -> Pair:
    of_dense = train_translator(job, dense, corpus, course, seed, "dense")
    of_sparse = train_translator(job, sparse, corpus, course, seed, "sparse")
    assert sparse.router is not None
    E = sparse.router.num_experts
    fresh = EncoderDecoder(sparse).eval()
    init_weights(fresh, seed)
    found = read(of_sparse.model, corpus)
    told, untrained = (tells_language(each, corpus, E, seed) for each in (found, read(fresh, corpus)))
    return Pair(of_dense, of_sparse, read(of_dense.model, corpus), found, told, untrained)


def _einsums(seed: int) -> Criterion:
    """One layer in float32, groups of 64 tokens: room for all, and room for half of its share."""
    torch.manual_seed(seed)
    worst, dropped = 0.0, 0
    for places in (64, 8):
        router = RouterConfig(num_experts=8, capacity_tokens=places, capacity_per="group", capacity_group=64)
        layer = MoELayer(MoEConfig(router=router, moe_intermediate_size=32, hidden_act="relu"), 32)
        x_TM = torch.randn(256, 32)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0.0, p.shape[-1] ** -0.5)
            y_TM, routing = layer(x_TM)
            difference_TM = einsum_layer(layer, x_TM, routing, 64, places) - y_TM
        worst = max(worst, float(difference_TM.abs().max() / y_TM.abs().max()))
        dropped += int((~routing.kept).sum())
    text = (
        f"GShard's einsums say what the layer says, with {dropped} pairs dropped too: to {TOLERANCE:g} of the largest"
    )
    return Criterion(text, f"{worst:.1e}", worst <= TOLERANCE and dropped > 0)


def _groups(corpus: Corpus) -> dict[str, list[int]]:
    """Numbers of the languages by how many pairs they are trained on; groups without one are left out."""
    counts = corpus.counts()
    groups = {
        f"more than {RICH:,} pairs": [i for i, count in enumerate(counts) if count > RICH],
        f"{POOR:,} to {RICH:,} pairs": [i for i, count in enumerate(counts) if POOR <= count <= RICH],
        f"fewer than {POOR:,} pairs": [i for i, count in enumerate(counts) if count < POOR],
    }
    return {name: members for name, members in groups.items() if members}


def _mean(values: torch.Tensor, members: Sequence[int]) -> float:
    """Over the languages of which there is something to say."""
    return float(values[list(members)].nanmean())


def _figures(pairs: Sequence[Pair], corpus: Corpus) -> Iterator[Figure]:
    yield Figure("loss on new texts", "dense", tuple(p.dense_read.overall for p in pairs), "nats/token")
    yield Figure("loss on new texts", "sparse", tuple(p.sparse_read.overall for p in pairs), "nats/token")
    for name, members in _groups(corpus).items():
        gains = tuple(_mean(p.dense_read.nats - p.sparse_read.nats, members) for p in pairs)
        if not any(map(math.isnan, gains)):
            dense = sum(_mean(p.dense_read.nats, members) for p in pairs) / len(pairs)
            beside = f"dense {dense:.3f}; {len(members)} languages"
            yield Figure(f"gain, {name}", "sparse", gains, "nats/token", beside=beside)
    for name, members in _groups(corpus).items():
        shares = tuple(100.0 * _mean(p.sparse.dropped, members) for p in pairs)
        if not any(map(math.isnan, shares)):
            every = sum(100.0 * _mean(p.sparse.dropped, range(len(corpus.languages))) for p in pairs) / len(pairs)
            yield Figure(f"dropped, {name}", "sparse", shares, "%", 1, beside=f"all languages {every:.1f}")
    for layer in pairs[0].told:
        bits = tuple(p.told[layer][0] for p in pairs)
        null = sum(p.told[layer][1] for p in pairs) / len(pairs)
        fresh = sum(p.untrained[layer][0] for p in pairs) / len(pairs)
        beside = f"languages shuffled {null:.3f}; untrained {fresh:.3f}"
        yield Figure("I(expert; language)", f"encoder layer {layer}", bits, "bits", beside=beside)


def _arm(name: str, config: EncoderDecoderConfig) -> Arm:
    """FLOPs of a pair of 16 tokens read and 16 written."""
    counts = count_any(config)
    flops = float(sequence_flops(config, 16, 16) + router_flops(config, 16, 16))
    return Arm(name, counts.total, counts.active_without_embedding, flops, "FLOPs of 16 tokens read and 16 written")


def _learning(pairs: Sequence[Pair]) -> Chart:
    curves = []
    for name, progress in (("dense", pairs[0].dense.progress), ("sparse", pairs[0].sparse.progress)):
        every = max(1, len(progress.losses) // 60)
        means = [sum(progress.losses[i : i + every]) / every for i in range(0, len(progress.losses) - every + 1, every)]
        curves.append(Curve(name, [float(every * (i + 1)) for i in range(len(means))], means))
    return Chart("Learning", "step", "nats per token", tuple(curves), "Training loss of the first seed, averaged.")


def _by_language(pairs: Sequence[Pair], corpus: Corpus) -> Chart:
    """Against the logarithm of the pairs."""
    counts = corpus.counts()
    gains = torch.stack([p.dense_read.nats - p.sparse_read.nats for p in pairs]).mean(0)
    points = sorted((math.log10(counts[i]), float(gains[i])) for i in range(len(counts)) if not gains[i].isnan())
    x, y = [x for x, _ in points], [y for _, y in points]
    about = "A point for each language. Those at the left have few texts to be tested on, and scatter."
    curves = (Curve("gain", x, y), Curve("none", [x[0], x[-1]], [0.0, 0.0], faint=True))
    return Chart("Gain of the sparse model", "log₁₀ of the pairs trained on", "nats per token", curves, about)


def _notes(job: Job, corpus: Corpus) -> Iterator[str]:
    counts = corpus.counts()
    told = ", ".join(f"{name} {count:,}" for name, count in zip(corpus.languages[:8], counts, strict=False))
    pairs, tested = len(corpus.train.pairs), len(corpus.valid.pairs)
    yield f"{pairs:,} pairs of {len(counts)} languages trained on ({told}, …), {tested:,} tested"
    if job.quick and job.data is None:
        yield "the languages are made up; a full run reads real ones"
