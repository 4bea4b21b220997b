"""`manyhands.train`: a run from Python, with whatever of it is the caller's own."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from manyhands.config import RunConfig
from manyhands.config.load import load_preset, load_run, preset_names
from manyhands.errors import ConfigError
from manyhands.files import RUN
from manyhands.models import AnyModel, Decoder, EncoderDecoder, Recurrent
from manyhands.train.callbacks import Callback, check_callbacks
from manyhands.train.finish import Summary
from manyhands.train.own_task import OwnLoss, OwnTask
from manyhands.train.seq2seq import task_of


def train(
    run: RunConfig | str | Path,
    model: AnyModel | None = None,
    batches: Iterable[Any] | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    valid: Iterable[Any] | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Summary:
    """Train as `manyhands train` does, or go on with a run: journal, checkpoints, guards, signals and report are its.

    Args:
        run: what to train: a `RunConfig`, a run file, a preset's name, or the directory of a run to go on with.
        model: one of this package's models (of `mh.load`, built or changed), float32, which is trained in place. The
            run's model is its config. None: new weights, or `run.start`.
        batches: what is trained on in the place of the run's text: token ids [B, S + 1] int64, or whatever `loss`
            takes. Begun again when it ends. With `state_dict` and `load_state_dict` the run goes on where it was, bit
            for bit; a list or a DataLoader is drawn from until that place; an iterator goes on with what it gives next.
        loss: `loss(model, batch)` gives the mean over the batch's rows, and `out.routings` beside it where the model
            has experts, whose balance terms are added.
        callbacks: told of each step, each validation and the end, see `Callback`.
        valid: batches that validation takes in the place of the run's validation text.
        out: the run's directory. None: `runs/NAME` of a run file or preset, or the directory that `run` is.
        quiet: print nothing.

    The run's `data` section still says which text the tokenizer is of, and without `valid` what is validated on. What
    `run.yaml` cannot hold (model, batches, loss) must be brought again to go on; a run that had them refuses to go on
    without. One process.

    Raises:
        ConfigError: `run`, or what is brought, does not fit.
        DataError: a batch, or what `loss` gave, is none that can be trained on.
        Exception: whatever a callback raises, once the run is saved.
        ManyhandsError: as `manyhands.train.loop.train` does.
    """
    from manyhands.train.loop import train as start

    described, directory = _described(run, out)
    check_callbacks(callbacks)
    if model is not None:
        described = _with(described, model)
    if batches is not None and loss is not None and valid is None:
        raise ConfigError("valid: with batches and a loss of your own, say on which batches validation judges it")
    if described.tune is not None and model is not None:
        raise ConfigError("model: a run that tunes begins with the model of its start; leave model out")
    task = OwnTask(task_of(described), batches, valid, loss)
    own = (*(("model",) if model is not None else ()), *task.names)
    return start(
        directory, described, quiet=quiet, task=task if task.names else None, model=model, callbacks=callbacks, own=own
    )


def _described(run: RunConfig | str | Path, out: str | Path | None) -> tuple[RunConfig, Path]:
    """The run, and its directory."""
    if isinstance(run, RunConfig):
        if out is None:
            raise ConfigError("out: say in which directory the run is kept")
        return run, Path(out)
    path = Path(run)
    if (path / RUN).is_file():
        if out is not None:
            raise ConfigError(f"out: {path} is a run, which goes on in its own directory: leave out away")
        return load_run(path / RUN), path
    if isinstance(run, str) and run in preset_names():
        return load_preset(run), Path(out or Path("runs") / run)
    if not path.is_file():
        raise ConfigError(f"{run}: is no run file, no run's directory and no preset ({', '.join(preset_names())})")
    return load_run(path), Path(out or Path("runs") / path.stem)


def _with(run: RunConfig, model: AnyModel) -> RunConfig:
    """`run` of that model. Raises `ConfigError` for one that the loop cannot train."""
    if not isinstance(model, Decoder | EncoderDecoder | Recurrent):
        raise ConfigError(
            f"model: a {type(model).__name__} is no model of this package; with a loop of your own (or Lightning's, or "
            "the Trainer's) its MoELayers train anywhere: docs/training.md"
        )
    if run.start is not None:
        raise ConfigError(f"model: the run starts from {run.start!r}; give one of the two")
    if "model" in run.model_fields_set and run.model != model.config:
        raise ConfigError("model: its config is not the run's model section; leave that away")
    for name, p in model.named_parameters():
        if str(p.dtype) != "torch.float32":
            raise ConfigError(f"model: {name} is {str(p.dtype).removeprefix('torch.')}; weights are trained in float32")
    return RunConfig(**{n: getattr(run, n) for n in run.model_fields_set if n != "model"}, model=model.config)
