"""A task of the caller's own batches and loss, in the place of what a run would learn from its text.

A batch is a tensor, a tuple or list of tensors, or a mapping to tensors, all with the batch's B sequences (images,
rows) first. Without a loss of one's own it is token ids [B, S + 1].
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.engine.mode import evaluating
from manyhands.errors import CheckpointError, DataError
from manyhands.generate.evaluate import Evaluation
from manyhands.moe import LoadCounter, Routing
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.train.task import Batches, Count, Forward, Loss, Task

if TYPE_CHECKING:
    from manyhands.train.data import RunData

OwnLoss = Callable[[Any, Any], Tensor | tuple[Tensor, Mapping[int, Routing]]]
"""Of the model and a batch: its mean (over whatever is asked), and with sparse layers `out.routings`."""


@dataclass(frozen=True)
class OwnTask:
    """`usual`, but for what is given."""

    usual: Task
    source: Iterable[Any] | None = None
    """What is trained on."""
    valid: Iterable[Any] | None = None
    """What is validated on: begun again for each validation."""
    own_loss: OwnLoss | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is the caller's own, so that nobody goes on without."""
        given = {"batches": self.source, "valid": self.valid, "loss": self.own_loss}
        return tuple(name for name, value in given.items() if value is not None)

    def batches(self, data: "RunData", run: RunConfig, ranks: Ranks) -> Batches:
        """The caller's, begun again when they end."""
        return self.usual.batches(data, run, ranks) if self.source is None else OwnBatches(self.source)

    def split(self, batch: Any, size: int | None) -> Sequence[Any]:
        """Rows of every tensor in it."""
        if self.source is None:
            return self.usual.split(batch, size)
        return [batch] if size is None else [_rows(batch, i, i + size) for i in range(0, _length(batch), size)]

    def count(self, micro: Any) -> Count:
        """A loss of one's own is weighted by rows; else every token but the first is a target."""
        if self.own_loss is None:
            return self.usual.count(micro if self.source is None else _ids(micro))
        if self.source is None:
            return self.usual.count(micro)
        rows = _length(micro)
        return Count(rows, max(tensor.numel() for tensor in _tensors(micro)), rows)

    def loss(self, model: Any, micro: Any, how: Forward) -> Loss:
        """What the caller's function says."""
        if self.own_loss is None:
            ids = micro if self.source is None else _ids(micro)
            if self.source is not None and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
                raise DataError(
                    f"batches: token ids up to {int(ids.max())}; model.vocab_size = {model.config.vocab_size}"
                )
            return self.usual.loss(model, ids, how)
        return Loss(*_called(self.own_loss, model, micro), {})

    def figures(self, loss: float, data: "RunData") -> dict[str, float]:
        """None of one's own: a text's bytes say nothing of them."""
        return {} if self.names else self.usual.figures(loss, data)

    def validate(
        self, model: Any, data: "RunData", run: RunConfig, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Evaluation:
        """The mean over the rows (without a loss of one's own: over the targets) of `valid`; else of the run's text."""
        if self.valid is None:
            return self.usual.validate(model, data, run, dtype, ranks)
        layers = model.sparse_layers()
        counters = {
            n: LoadCounter.empty(layer.router.config.num_experts, next(model.parameters()).device)
            for n, layer in layers.items()
        }
        total, asked, tokens = 0.0, 0, 0
        with torch.no_grad(), evaluating(list(model.modules())):
            for batch in self.valid:
                found = self.loss(model, batch, Forward(dtype))
                count = self.count(batch)
                total, asked, tokens = (
                    total + float(found.mean) * count.targets,
                    asked + count.targets,
                    tokens + count.tokens,
                )
                for layer, routing in found.routings.items():
                    counters[layer].add(routing)
        if not asked:
            raise DataError("valid: there is no batch in it; give a list, or something that can be begun again")
        loss = total / asked
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, None, tokens, {n: c.summary() for n, c in counters.items()})


def _called(own: OwnLoss, model: Any, micro: Any) -> tuple[Tensor, Mapping[int, Routing]]:
    found = own(model, micro)
    mean, routings = found if isinstance(found, tuple) else (found, {})
    if not isinstance(mean, Tensor) or mean.ndim:
        what = f"a tensor of shape {list(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
        raise DataError(f"loss: gave {what}; it is to be one number, the batch's mean, or that and out.routings")
    if missing := set(model.config.sparse_layers) - set(routings):
        raise DataError(
            f"loss: gave no routing of layer {min(missing)}; return (mean, out.routings): experts are balanced by it"
        )
    return mean, routings


class OwnBatches:
    """The caller's batches as a run takes them: without end, and from where it was.

    A source with `state_dict` and `load_state_dict` is asked for its position. Another that can be begun again (a list,
    a DataLoader) is drawn from until that place, which is the same batches if it always gives the same. An iterator
    goes on with whatever it gives next.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source, self._taken, self._round = source, 0, 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._source)
        try:
            batch = next(self._iterator)
        except StopIteration:
            if not self._taken or self._iterator is self._source:
                many = f"ended after {self._taken}" if self._taken else "are none"
                raise DataError(
                    f"batches: {many}; give a list or a DataLoader, which can be begun again, or lower train.max_steps"
                ) from None
            self._iterator, self._taken, self._round = None, 0, self._round + 1
            return next(self)
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """How many were taken of this round, and what the source says."""
        state: dict[str, Any] = {"own": True, "round": self._round, "taken": self._taken}
        return state | ({"source": self._source.state_dict()} if _knows(self._source) else {})  # type: ignore[attr-defined]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there. Raises `CheckpointError` for a position in other batches."""
        if not state.get("own") or _knows(self._source) != ("source" in state):
            raise CheckpointError("data position: it is one in other batches than these")
        self._round, self._taken = int(state["round"]), int(state["taken"])
        if _knows(self._source):
            self._source.load_state_dict(state["source"])  # type: ignore[attr-defined]
            return
        self._iterator = iter(self._source)
        if self._iterator is self._source:
            return
        for number in range(self._taken):
            if next(self._iterator, self) is self:
                raise CheckpointError(f"batches: {self._taken} were taken, and there are but {number}")


def _knows(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def _tensors(batch: Any) -> list[Tensor]:
    values = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    if not tensors or len({len(tensor) for tensor in tensors}) > 1:
        raise DataError(
            f"batches: a {type(batch).__name__} of {[list(tensor.shape) for tensor in tensors]}; it is to be a "
            "tensor, or a tuple or mapping of tensors, all with as many rows"
        )
    return tensors


def _length(batch: Any) -> int:
    return len(_tensors(batch)[0])


def _rows(batch: Any, first: int, end: int) -> Any:
    def cut(value: Any) -> Any:
        return value[first:end] if isinstance(value, Tensor) and value.ndim else value

    _tensors(batch)
    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(map(cut, batch))


def _ids(batch: Any) -> Tensor:
    """Token ids [B, S + 1]."""
    if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.dtype != torch.int64 or batch.shape[1] < 2:
        what = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise DataError(f"batches: {what}; without a loss of your own they are token ids [B, S + 1], int64")
    return batch
