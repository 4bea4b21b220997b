"""Small encoder-decoders that translate many languages into English: texts, training, and what is found by language.

B pairs, S tokens read, T written, E experts, K experts per token.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from manyhands.config import BalanceConfig, EncoderDecoderConfig, OptimConfig, ScheduleConfig
from manyhands.errors import DataError
from manyhands.generate.evaluate_pairs import START_ID, run_pairs
from manyhands.inspect.information import information
from manyhands.lab.curves import Progress
from manyhands.lab.job import Job
from manyhands.lab.translations import Translation
from manyhands.models import EncoderDecoder, init_weights
from manyhands.moe import balance_objective
from manyhands.text import PairBatch, Tokenizer, pad_pairs
from manyhands.text.pairs import Pair
from manyhands.train.memory import keep_freed_memory
from manyhands.train.optim import build_optimizers
from manyhands.train.schedule import learning_rate

_SORTED = 16
"""Batches whose pairs are sorted by length together, so that little of a batch is padding."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of token ids, each with its end, and the number of each pair's language."""

    pairs: list[Pair] = field(default_factory=list)
    languages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on and what is tested: no English text is in both."""

    languages: list[str]
    """By number; those with the most pairs first."""
    train: Part
    valid: Part

    def counts(self) -> list[int]:
        """Pairs of each language that are trained on."""
        count = Counter(self.train.languages)
        return [count[number] for number in range(len(self.languages))]


def prepare(translations: Sequence[Translation], vocab_size: int, longest: int, valid_most: int) -> Corpus:
    """Train a vocabulary on the training pairs and cut all texts with it; pairs with a longer text are left out.

    Of held-out pairs at most `valid_most` of each language are kept. Raises `DataError` if either part is empty.
    """
    seen = [t for t in translations if not t.held_out]
    texts = [t.text for t in seen] + sorted({t.english for t in seen})
    random.Random(0).shuffle(texts)
    tokenizer = Tokenizer.train(texts, vocab_size)
    sources = tokenizer.encode_batch([t.text for t in translations])
    targets = tokenizer.encode_batch([t.english for t in translations])
    kept = [
        (t, [*map(int, source), START_ID], [*map(int, target), START_ID])
        for t, source, target in zip(translations, sources, targets, strict=True)
        if len(source) < longest and len(target) < longest
    ]
    random.Random(0).shuffle(kept)
    count = Counter(t.language for t, _, _ in kept if not t.held_out)
    languages = [name for name, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    train, valid = Part(), Part()
    tested: Counter[str] = Counter()
    for t, source, target in kept:
        if t.language not in count or (t.held_out and tested[t.language] >= valid_most):
            continue
        tested[t.language] += t.held_out
        part = valid if t.held_out else train
        part.pairs.append((source, target))
        part.languages.append(languages.index(t.language))
    if not train.pairs or not valid.pairs:
        raise DataError(f"{len(translations)} translations are too few: nothing is left to train on, or to test")
    return Corpus(languages, train, valid)


def batches(part: Part, size: int, seed: int) -> Iterator[tuple[PairBatch, Tensor]]:
    """Endless batches and the languages [B] of their pairs; each epoch in another order, like lengths together."""
    draw = random.Random(seed)
    while True:
        order = list(range(len(part.pairs)))
        draw.shuffle(order)
        for first in range(0, len(order), size * _SORTED):
            chunk = sorted(order[first : first + size * _SORTED], key=lambda i: sum(map(len, part.pairs[i])))
            rows = [chunk[at : at + size] for at in range(0, len(chunk), size)]
            draw.shuffle(rows)
            yield from (_batch(part, places) for places in rows if len(places) == size or len(part.pairs) < size)


def _batch(part: Part, places: Sequence[int]) -> tuple[PairBatch, Tensor]:
    languages_B = torch.tensor([part.languages[i] for i in places])
    return pad_pairs([part.pairs[i] for i in places], START_ID), languages_B


@dataclass(frozen=True, slots=True)
class Translator:
    """A trained model and its way there."""

    model: EncoderDecoder
    """In evaluation mode."""
    progress: Progress
    """Loss of each step's batch, nats per token written."""
    dropped: Tensor
    """[languages] float64: share of the pairs of token and expert that found no room, over the last half of the steps;
    NaN where there were none."""


@dataclass(frozen=True, slots=True)
class Course:
    """How long, with how many pairs a step, and how."""

    steps: int
    batch_size: int
    optim: OptimConfig
    balance: BalanceConfig
    schedule: ScheduleConfig


def train_translator(
    job: Job, config: EncoderDecoderConfig, corpus: Corpus, course: Course, seed: int, name: str
) -> Translator:
    """A fresh model trained on the corpus, with a clock running. Batches depend on the seed, not on the model."""
    if not job.quick:
        keep_freed_memory()
    torch.manual_seed(seed)
    model = EncoderDecoder(config)
    init_weights(model, seed)
    model.train()
    optimizers, feed = build_optimizers(model, course.optim), batches(corpus.train, course.batch_size, seed)
    losses, seconds, began = list[float](), list[float](), time.perf_counter()
    lost, asked = torch.zeros(2, len(corpus.languages), dtype=torch.float64)
    with job.clock():
        for step in range(course.steps):
            if step % 100 == 0:
                job.note(f"{name}, seed {seed}: step {step} of {course.steps}")
            batch, languages_B = next(feed)
            hidden, loss = run_pairs(model, batch)
            balance, _ = balance_objective(hidden.routings, course.balance, len(batch))
            optimizers.zero_grad()
            (loss + balance).backward()  # type: ignore[no-untyped-call]
            if course.optim.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), course.optim.grad_clip)
            optimizers.set_lr(learning_rate(step, course.steps, course.optim.lr, course.schedule))
            optimizers.step()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - began)
            if step >= course.steps // 2:
                for routing in hidden.routings.values():
                    wanted_TK = (routing.expert_ids >= 0) & routing.token_mask[:, None]
                    of_T = languages_B.repeat_interleave(len(wanted_TK) // len(batch))
                    asked.index_add_(0, of_T, wanted_TK.sum(1).double())
                    lost.index_add_(0, of_T, (wanted_TK & ~routing.kept).sum(1).double())
    return Translator(model.eval(), Progress(list(range(1, course.steps + 1)), seconds, losses), lost / asked)


@dataclass(frozen=True, slots=True)
class Read:
    """What a model makes of the test pairs."""

    nats: Tensor
    """[languages] float64: loss per token written; NaN where nothing is tested."""
    overall: float
    """The same over all tokens."""
    experts: dict[int, tuple[Tensor, Tensor]]
    """By sparse layer of the encoder: the first expert of every token read, and the number of its text."""


@torch.no_grad()
def read(model: EncoderDecoder, corpus: Corpus, batch_size: int = 256) -> Read:
    """The loss by language, and who goes where in the encoder."""
    total, count = torch.zeros(2, len(corpus.languages), dtype=torch.float64)
    first: dict[int, list[Tensor]] = {}
    texts: dict[int, list[Tensor]] = {}
    for start in range(0, len(corpus.valid.pairs), batch_size):
        batch, languages_B = _batch(corpus.valid, range(start, min(start + batch_size, len(corpus.valid.pairs))))
        hidden, _ = run_pairs(model, batch)
        logits_BTV, mask_BT = model.head(hidden.states), batch.target_mask_BT
        nats_N = torch.nn.functional.cross_entropy(logits_BTV[mask_BT], batch.labels_BT[mask_BT], reduction="none")
        of_N = languages_B[:, None].expand_as(mask_BT)[mask_BT]
        total.index_add_(0, of_N, nats_N.double())
        count.index_add_(0, of_N, torch.ones(len(of_N), dtype=torch.float64))
        text_BS = torch.arange(start, start + len(batch))[:, None].expand_as(batch.mask_BS)
        for layer, routing in hidden.routings.items():
            if layer < model.config.num_hidden_layers:
                first.setdefault(layer, []).append(routing.expert_ids[:, 0][routing.token_mask])
                texts.setdefault(layer, []).append(text_BS[batch.mask_BS])
    experts = {layer: (torch.cat(ids), torch.cat(texts[layer])) for layer, ids in first.items()}
    return Read(total / count, float(total.sum() / count.sum()), experts)


def tells_language(found: Read, corpus: Corpus, num_experts: int, seed: int) -> dict[int, tuple[float, float]]:
    """By sparse layer of the encoder: I(first expert; language) in bits, and the same with the languages dealt anew to
    the texts.
    """
    language_B = np.asarray(corpus.valid.languages, np.int64)
    dealt_B = np.random.default_rng(seed).permutation(language_B)
    told = {}
    for layer, (expert_T, text_T) in found.experts.items():
        experts, texts = expert_T.numpy().astype(np.int32), text_T.numpy()
        ones = np.ones(len(texts))
        real, null = (information(labels[texts], num_experts)(experts, ones) for labels in (language_B, dealt_B))
        told[layer] = (real, null)
    return told
