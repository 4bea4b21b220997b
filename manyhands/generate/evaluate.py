"""How well a model predicts a text: loss, perplexity, bits per byte, and the load of its experts.

B batch, S sequence, T = B·S tokens, D model width, X documents.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from manyhands.checkpoint.runs import is_named
from manyhands.config.kinds import longest_sequence
from manyhands.config.load import load_run
from manyhands.engine.mode import evaluating
from manyhands.engine.runner import Runner
from manyhands.errors import DataError
from manyhands.files import RUN
from manyhands.layers.cross_entropy import cross_entropy
from manyhands.models import Decoder, Hidden, LanguageModel
from manyhands.moe import LoadCounter, LoadSummary, Routing
from manyhands.moe.load import summed
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.trace.documents import Sums
from manyhands.trace.part import Phase
from manyhands.trace.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one text."""

    loss: float
    """Mean nats per predicted token."""
    perplexity: float
    """e^loss."""
    bits_per_byte: float | None
    """All nats / ln 2 / bytes: the one figure that compares models with different tokenizers. None without bytes."""
    tokens: int
    """Predicted tokens: every token of the text but its first."""
    load: dict[int, LoadSummary]
    """Per sparse layer, over the positions that predicted something."""
    documents: Sums | None = None
    """Nats and targets of each document, where somebody asked."""


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    given: int | None = None,
    trace: Recorder | None = None,
    ranks: Ranks = ALONE,
    ends_X: npt.NDArray[np.int64] | None = None,
) -> Evaluation:
    """Predict every target of `batches`, pairs of ids [B, S+1] and target mask [B, S] (`text.evaluation_batches`).

    `num_bytes` are the bytes of the whole text in UTF-8. Its first token is predicted by nothing, yet its bytes
    count (a few of millions); separators between documents are no bytes, yet their nats count. If the batches are
    only a part of the text, the bytes of that part's targets are `tokenizer.byte_lengths()[targets].sum()`.
    `dtype` is the compute dtype (None: that of the weights); `progress` is called with the tokens predicted so far.
    `given` is a token that stands in front of every text and is no part of it (`<s>`): where it is the target, nothing
    is to be predicted. `trace` is given every batch as one step, each row of it as a text. `ranks` share the rows of
    every batch, and all get the figures of the whole; without a trace. `ends_X` says behind which token of the text
    each document ends, if losses per document are wanted; the batches are then the whole text.

    A non-causal router (expert choice) looks at later tokens, so that its loss flatters it. Nothing about the
    model changes, and no random number is drawn. Raises `DataError` if there is no target, or a token id or a
    sequence that the model has no room for.
    """
    device, config = model.embed_tokens.weight.device, model.config
    E = config.moe.router.num_experts if config.moe else 0
    load = {layer: LoadCounter.empty(E, device) for layer in config.sparse_layers}
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens, texts, score = 0, 0, _scorer(model, ranks)
    place, sums = 1, None if ends_X is None else Sums.of(ends_X)
    for number, (ids_BS1, mask_BS) in enumerate(batches):
        _check(ids_BS1, config.vocab_size, longest_sequence(config))
        scored_BS = mask_BS if given is None else mask_BS & (ids_BS1[:, 1:] != given)
        count, full = int(scored_BS.sum()), bool(mask_BS.all())
        first, place = place, place + int(mask_BS.sum())
        if not count:
            continue
        rows, counted = own_rows(len(ids_BS1), ranks)
        ids_BS1, mask_BS, scored_BS = ids_BS1[rows], mask_BS[rows], scored_BS[rows]
        own = int(scored_BS.sum()) if counted else 0
        ids_BS1, mask_BS, scored_BS = ids_BS1.to(device), mask_BS.to(device), scored_BS.to(device)
        hidden = score(ids_BS1[:, :-1], None if full else mask_BS, dtype)
        states_TD, targets_T = hidden.states.flatten(0, 1), ids_BS1[:, 1:].flatten()
        each_T = None if sums is None else torch.zeros(len(targets_T), device=device)
        loss = cross_entropy(model.head, states_TD, targets_T, scored_BS.flatten(), config.vocab_size, each_T)
        nats += loss.double() * own
        if sums is not None and each_T is not None and counted:
            here = mask_BS.flatten()  # what it leaves out stands behind the end of the text
            of_each = each_T[here].double().cpu().numpy(), scored_BS.flatten()[here].cpu().numpy()
            sums.add(first + rows.start * mask_BS.shape[1], *of_each)
        for layer, routing in hidden.routings.items() if counted else ():
            load[layer].add(routing)
        if trace is not None:
            _record(trace, ids_BS1[:, :-1], mask_BS, hidden.routings, texts, number)
        texts += len(ids_BS1)
        tokens += count
        if progress is not None:
            progress(tokens)
    if not tokens:
        raise DataError("there is no token to predict")
    gather_no_more(model, ranks)
    nats = ranks.sum(nats)
    load = summed(load, ranks)
    if sums is not None and ranks.size > 1:
        nats_X, targets_X = (ranks.sum(torch.from_numpy(part)).numpy() for part in (sums.nats_X, sums.targets_X))
        sums = Sums(sums.ends_X, nats_X, targets_X)
    mean = float(nats) / tokens
    return Evaluation(
        loss=mean,
        perplexity=math.exp(mean) if mean < 700 else mean * math.inf,
        bits_per_byte=float(nats) / math.log(2) / num_bytes if num_bytes else None,
        tokens=tokens,
        load={layer: counter.summary() for layer, counter in load.items()},
        documents=sums,
    )


def own_rows(num_rows: int, ranks: Ranks) -> tuple[slice, bool]:
    """Which rows of a batch this rank runs, and whether they count.

    Where there are fewer rows than ranks, some run the first once more: a pass of a sharded model is everybody's.
    """
    size = -(-num_rows // ranks.size)
    first = ranks.rank * size
    return (slice(first, first + size), True) if first < num_rows else (slice(0, 1), False)


def gather_no_more(model: nn.Module, ranks: Ranks) -> None:
    """After passes without a backward pass, which would have done it: let go of what others hold."""
    if ranks.size > 1:
        from manyhands.parallel.shards import reshard  # half a second that one process need not wait for

        reshard(model)


def _scorer(model: LanguageModel, ranks: Ranks) -> Callable[[Tensor, Tensor | None, torch.dtype | None], Hidden]:
    """What runs it on ids and their mask in a dtype, in evaluation. Its modules where it may be sharded."""
    if isinstance(model, Decoder) and ranks.size == 1:
        return Runner(model).score

    def score(ids_BS: Tensor, mask_BS: Tensor | None, dtype: torch.dtype | None) -> Hidden:
        with evaluating(list(model.modules())):
            return model.hidden(ids_BS, mask_BS, dtype=dtype)

    return score


def _record(
    trace: Recorder, ids_BS: Tensor, mask_BS: Tensor, routings: dict[int, Routing], first_text: int, step: int
) -> None:
    B, S = ids_BS.shape
    rows = first_text + torch.arange(B).repeat_interleave(S), torch.arange(S).repeat(B), ids_BS.cpu().flatten()
    if len(next(iter(routings.values())).token_mask) < B * S:  # of real tokens only
        sequence, position, ids = (row[mask_BS.cpu().flatten()] for row in rows)
    else:
        sequence, position, ids = rows
    numbers = {"sequence": sequence.numpy(), "position": position.numpy()}
    trace.add(routings, ids, **numbers, phase=Phase.SCORING, step=step)


def trained_length(checkpoint: str | Path) -> int | None:
    """The length of the sequences a run was trained on, from its directory or one of its checkpoints; else None."""
    path = Path(checkpoint).absolute()
    if is_named(path):
        path = path.parent
    for file in (path / RUN, path.parent.parent / RUN):
        if file.is_file() and (file.parent == path or path.parent.name == "checkpoints"):
            return load_run(file).train.sequence_length
    return None


def _check(ids_BS1: Tensor, vocab_size: int, limit: int | None) -> None:
    low, high, S = int(ids_BS1.min()), int(ids_BS1.max()), ids_BS1.shape[1] - 1
    if low < 0 or high >= vocab_size:
        raise DataError(f"the text holds token id {low if low < 0 else high}; the model has vocab_size = {vocab_size}")
    if limit is not None and limit < S:
        raise DataError(f"sequences of {S} tokens are longer than max_position_embeddings = {limit}")
