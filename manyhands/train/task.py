"""What a model learns: how a batch is cut and counted, and what the loss of a part of it is.

The step adds losses up as sums: a micro-batch's mean times its share of the step's targets, over all micro-batches and
ranks. So a mask that leaves one part with few targets weighs what it should.

B sequences, S tokens each, T = B·S.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.files import TRAIN_TOKENS
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.layers.linear import Linear
from manyhands.models import LanguageModel
from manyhands.moe import Routing
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.text import PackedBatches, evaluation_batches
from manyhands.text.walk import Walk

if TYPE_CHECKING:
    from manyhands.train.data import RunData


@dataclass(frozen=True, slots=True)
class Count:
    """How much is in a batch or in a part of one."""

    sequences: int
    """What the means of the balance terms are weighted by."""
    tokens: int
    """What the model reads."""
    targets: int
    """What it is asked about: the loss is divided by their number."""


@dataclass(frozen=True, slots=True)
class Forward:
    """How the step wants the model run; see `Decoder.hidden`."""

    dtype: torch.dtype
    recompute: bool = False
    clip_above: float | None = None
    keep_outputs: bool = False


@dataclass(frozen=True, slots=True)
class Loss:
    """What one micro-batch gave."""

    mean: Tensor
    """Over its targets; 0 where it has none. With a gradient."""
    routings: Mapping[int, Routing]
    """Per sparse layer, for load and balance."""
    max_logits: Mapping[int, Tensor]
    """Per layer, for QK-Clip; empty if `clip_above` was None."""


class Batches(Protocol):
    """An endless stream of batches that knows where it is."""

    def __next__(self) -> Any:
        """The next batch of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there. Raises `CheckpointError` if it is none."""


def epochs_of(batches: Batches) -> float | None:
    """How often everything was seen; None of a stream that does not count."""
    walk = getattr(batches, "walk", None)
    return walk.epochs if isinstance(walk, Walk) else None


class Task(Protocol):
    """What a model learns. Its batches may be anything: only the task looks into them."""

    def batches(self, data: "RunData", run: RunConfig, ranks: Ranks) -> Batches:
        """This rank's share of what the run trains on."""

    def split(self, batch: Any, size: int | None) -> Sequence[Any]:
        """Micro-batches of `size` sequences (None: one of all), equally many on every rank."""

    def count(self, micro: Any) -> Count:
        """How much is in it."""

    def loss(self, model: Any, micro: Any, how: Forward) -> Loss:
        """Run the model, of a kind that can learn this, on it, on the device where the model is."""

    def figures(self, loss: float, data: "RunData") -> dict[str, float]:
        """What a step's journal record says of its loss, beside the loss itself."""

    def validate(
        self, model: Any, data: "RunData", run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """How well the model does on what it was not trained on; `ranks` share the work and get the same answer."""


class LanguageModelling:
    """Predict every next token of packed text. A batch is ids [B, S + 1]: inputs and targets overlap by one."""

    def batches(self, data: "RunData", run: RunConfig, ranks: Ranks) -> PackedBatches:
        """The training text, cut anew and shuffled in every epoch."""
        sizes = run.train.sequence_length, run.train.batch_size
        sha256 = data.sha256[TRAIN_TOKENS]
        return PackedBatches(data.train.ids, *sizes, run.train.seed, ranks.rank, ranks.size, sha256=sha256)

    def split(self, batch: Tensor, size: int | None) -> Sequence[Tensor]:
        """Rows of it."""
        return torch.split(batch, size or len(batch))

    def count(self, micro: Tensor) -> Count:
        """Every token but a sequence's first is a target."""
        tokens = micro[:, 1:].numel()
        return Count(len(micro), tokens, tokens)

    def loss(self, model: LanguageModel, micro: Tensor, how: Forward) -> Loss:
        """Cross entropy, nats per token."""
        return next_token_loss(model, micro, torch.ones_like(micro[:, 1:], dtype=torch.bool), how)

    def figures(self, loss: float, data: "RunData") -> dict[str, float]:
        """Bits per byte of the training text."""
        info = data.train.info
        return {"bits_per_byte": loss / math.log(2) * info.num_tokens / info.num_bytes}

    def validate(
        self, model: LanguageModel, data: "RunData", run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The loss on the whole validation text."""
        batches = evaluation_batches(data.valid.ids, run.train.sequence_length, run.train.batch_size)
        eos = data.tokenizer.eos_token_id
        ends_X = None if data.documents is None or eos is None else data.valid.ends(eos)
        return evaluate(model, batches, num_bytes=data.valid.info.num_bytes, dtype=dtype, ranks=ranks, ends_X=ends_X)


def next_token_loss(model: LanguageModel, ids_BS1: Tensor, targets_BS: Tensor, how: Forward) -> Loss:
    """Cross entropy of the next token, mean over where `targets_BS` is true."""
    ids_BS1 = ids_BS1.to(model.embed_tokens.weight.device)
    hidden = model.hidden(
        ids_BS1[:, :-1].contiguous(),
        dtype=how.dtype,
        recompute=how.recompute,
        clip_above=how.clip_above,
        keep_outputs=how.keep_outputs,
    )
    targets_T, mask_T = ids_BS1[:, 1:].flatten(), targets_BS.to(ids_BS1.device).flatten()
    states_TD = hidden.states.flatten(0, 1)
    if type(model.lm_head) not in (Linear, type(None)):  # packed: it has no weight
        mean = F.cross_entropy(model.head(states_TD[mask_T]).float(), targets_T[mask_T], reduction="sum")
        mean = mean / max(1, int(mask_T.sum()))
    else:
        mean = linear_cross_entropy(states_TD, model.head_weight, targets_T, mask_T, model.head_bias)
    return Loss(mean, hidden.routings, hidden.max_logits)
