"""What a run looks at beside its loss: what each expert is worth, and a text that the model goes on with.

Both are functions of the step and the weights: they draw no random number of the run's, and change nothing.

T tokens of a text for worth, S tokens in one of its pieces.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manyhands.compare.worth import Worth, expert_worth, measurable, num_passes
from manyhands.config import RunConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import ManyhandsError
from manyhands.models import AnyModel, Decoder, Recurrent
from manyhands.text import TokenFile
from manyhands.train.data import RunData
from manyhands.train.task import LanguageModelling, Task

if TYPE_CHECKING:
    from manyhands.train.loop import Trainer

_LONG_RUN = 50
"""Steps from which on a run says a sample unless it is told to."""
_SAMPLE_TOKENS, _PROMPT_TOKENS = 48, 16
_MOST_TOKENS, _LEAST_TEXTS = 4096, 4
_MOST_VALUES = 1 << 26
"""Of hidden states that are kept meanwhile, at the router and below its block each: 256 MB in float32."""
_SHARE = 0.025
"""Of the run's time, at most, for the worth at its end; and as much again for all before it."""
_PASS = 0.3
"""A pass of a token, in tokens trained: a third of one, less the layers below it (measured: 0.28)."""


def look(trainer: "Trainer", last: bool = False) -> None:
    """Measure what experts are worth if it is time, or the `last` of the run; a `worth` record."""
    state, run = trainer.state, trainer.course.now
    step, model = state.progress.step, state.model
    if not _measures(run, model, trainer.task) or not (last or _due(run, step, state.progress.max_steps)):
        return
    texts = worth_texts(trainer.data.valid, run, state.progress.max_steps)
    if texts is None:
        return
    with trainer.screen.busy("measuring what each expert is worth"):
        found = expert_worth(model, texts, dtype=trainer.dtype, seed=run.train.seed, ranks=trainer.ranks)  # type: ignore[arg-type]
    trainer.journal.write("worth", step=step, **worth_record(found, trainer.data.valid))


def worth_steps(run: RunConfig, max_steps: int, valid_tokens: int) -> float:
    """What the worth at the end takes, counted in steps; 0 where it is not measured."""
    texts = _texts(run, max_steps, valid_tokens)
    return 0.0 if texts is None else _cost(run, texts[0] * texts[1])


def worth_texts(valid: TokenFile, run: RunConfig, max_steps: int) -> Tensor | None:
    """Pieces [B, S + 1] of the validation text, evenly spread over it; None if it is not worth the time."""
    sizes = _texts(run, max_steps, len(valid.ids))
    if sizes is None:
        return None
    B, S = sizes
    starts = np.linspace(0, len(valid.ids) - S - 1, B).astype(np.int64)
    return torch.from_numpy(valid.ids[starts[:, None] + np.arange(S + 1)].astype(np.int64))


def _texts(run: RunConfig, max_steps: int, valid_tokens: int) -> tuple[int, int] | None:
    """How many and how long. Where nobody asked for worth, as many as are worth the time, or none."""
    train, moe = run.train, run.model.moe
    if train.worth_every == 0 or moe is None or not run.model.sparse_layers:
        return None
    S = min(train.sequence_length, (valid_tokens - 1) // _LEAST_TEXTS)
    if S < 1:
        return None
    most = min(_MOST_TOKENS, _MOST_VALUES // (run.model.hidden_size * len(run.model.sparse_layers)))
    if train.worth_every is None:
        most = min(most, int(_SHARE * max_steps / _cost(run, 1)))
        if most < _LEAST_TEXTS * S:
            return None
    return max(_LEAST_TEXTS, min(most, valid_tokens - 1) // S), S


def _cost(run: RunConfig, tokens: int) -> float:
    """Of a text of so many tokens, in steps."""
    moe, train = run.model.moe, run.train
    assert moe is not None
    passes = num_passes(dict.fromkeys(run.model.sparse_layers, moe.router))
    return _PASS * passes * tokens / (train.sequence_length * train.batch_size)


def _due(run: RunConfig, step: int, max_steps: int) -> bool:
    """Whether to look between steps: at every n-th; or unless told, at as many validations as are worth the time."""
    every, evals = run.train.worth_every, run.train.eval_every
    if every is not None:
        return every > 0 and step % every == 0
    if not evals or step % evals:
        return False
    sizes = _texts(run, max_steps, _MOST_TOKENS)
    if sizes is None:
        return False
    times = int(_SHARE * max_steps / _cost(run, sizes[0] * sizes[1]))
    return times > 0 and (step // evals) % max(1, -(-max_steps // evals // times)) == 0


def _measures(run: RunConfig, model: AnyModel, task: Task) -> bool:
    """Whether this is a run whose experts can be taken away, and whose loss is bits of a text."""
    if run.train.worth_every == 0 or type(task) is not LanguageModelling:
        return False
    if not isinstance(model, Decoder | Recurrent):
        return False
    return measurable({layer: mlp.router.config for layer, mlp in model.sparse_layers().items()})


def worth_record(found: Worth, valid: TokenFile) -> dict[str, Any]:
    """The fields of a `worth` record: costs in bits per byte, lists with an entry for each expert."""
    bits = valid.info.num_tokens / valid.info.num_bytes / float(np.log(2))
    layers = {}
    for layer, of in found.layers.items():
        each = of.experts
        layers[str(layer)] = {
            "cost": [bits * e.cost for e in each],
            "error": [bits * e.error for e in each],
            "share": [e.share for e in each],
            "tokens": [e.tokens for e in each],
            "size": [e.size for e in each],
            "twin": [e.twin for e in each],
            "distance": [e.distance for e in each],
            "null": bits * of.null,
            "shuffled": bits * of.shuffled,
            "random_router": bits * of.random,
        }
    return {"bits_per_byte": bits * found.loss, "tokens": found.tokens, "texts": found.texts, "layers": layers}


def say_sample(trainer: "Trainer") -> None:
    """Let the model go on with the beginning of the validation text; a `sample` record, and a line on the screen."""
    state, run = trainer.state, trainer.course.now
    asked, model = run.train.sample_tokens, state.model
    count = (_SAMPLE_TOKENS if state.progress.max_steps >= _LONG_RUN else 0) if asked is None else asked
    if not count or trainer.ranks.size > 1 or type(trainer.task) is not LanguageModelling:
        return
    if not isinstance(model, Decoder) or (model.config.moe and not model.config.moe.router.causal_safe):
        return
    prompt, said = sample(model, trainer.data, run.train.seed, count)
    trainer.journal.write("sample", step=state.progress.step, prompt=prompt, text=said)
    trainer.screen.note(f"sample at step {state.progress.step}: {prompt!r} goes on {said!r}")


def sample(model: Decoder, data: RunData, seed: int, count: int) -> tuple[str, str]:
    """The beginning of the validation text, and what the model goes on with: the same for the same weights and seed.

    Where its logits are not finite, or it has no room, that is what stands in the place of the text.
    """
    room = model.config.max_position_embeddings - count
    ids = [int(i) for i in data.valid.ids[: max(1, min(_PROMPT_TOKENS, room))]]
    sampling = SamplingConfig(seed=seed % (1 << 63), max_new_tokens=min(count, max(1, room + count - len(ids))))
    try:
        [completion] = Engine(model, data.tokenizer, max_sequences=1).generate([ids], sampling)
        text = completion.text
    except ManyhandsError as error:  # a look must not end a run
        text = f"({error})"
    return data.tokenizer.decode(ids), text
