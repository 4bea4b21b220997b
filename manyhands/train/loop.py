"""The training loop: prepare, resume, step, journal, save, stop, report.

A run lives in one directory and is described by one `RunConfig`. Starting it again continues it.
"""

import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import manyhands
from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.load import dump_run, load_run
from manyhands.errors import ConfigError, Interrupted
from manyhands.files import write_atomic
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.nn import Decoder, init_weights
from manyhands.text import PackedBatches, evaluation_batches
from manyhands.train.data import RunData, prepare_data
from manyhands.train.finish import Summary, finish
from manyhands.train.guard import SpikeGuard, StopSignals
from manyhands.train.journal import Journal
from manyhands.train.optim import build_optimizers
from manyhands.train.schedule import learning_rate
from manyhands.train.screen import Screen
from manyhands.train.state import Progress, TrainState, count_parameters, pick_device, pick_dtype
from manyhands.train.step import StepResult, train_step

MAY_CHANGE = {  # between sessions of a run: how long and how it runs, not what it computes
    *("train." + name for name in ("max_steps", "log_every", "eval_every", "save_every", "keep_checkpoints")),
    *("train." + name for name in ("trackers", "device", "experts_implementation")),
}
PLAN_AFTER = 12  # steps measured before a time budget becomes a number of steps
PLAN_WARMUP = 4  # of which the first are slower: allocations, caches


@dataclass(slots=True)
class Trainer:
    """One session of a run: its fixed parts, and the state that moves."""

    run: RunConfig
    directory: RunDirectory
    data: RunData
    state: TrainState
    journal: Journal
    screen: Screen
    dtype: torch.dtype

    def fit(self, signals: StopSignals) -> None:
        """Step until the end or a signal. Raises `Interrupted` after saving, `TrainingHalted` from the guard."""
        run, progress = self.run, self.state.progress
        started = time.perf_counter() - progress.elapsed
        times: list[float] = []
        while progress.step < progress.max_steps:
            step_started = time.perf_counter()
            lr = learning_rate(progress.step, progress.max_steps, run.optim.lr, run.schedule)
            batch = next(self.state.batches).to(self.state.model.embed_tokens.weight.device)
            result = train_step(
                self.state.model, self.state.optimizers, self.state.guard, batch, run, progress.step + 1, lr, self.dtype
            )
            progress.step += 1
            progress.tokens += batch[:, 1:].numel()
            progress.elapsed = time.perf_counter() - started
            times.append(time.perf_counter() - step_started)
            if progress.step % run.train.log_every == 0 or progress.step == progress.max_steps:
                record = self.record(result, lr, batch[:, 1:].numel() / times[-1])
                self.screen.step(self.journal.write("step", step=progress.step, **record))
            if run.train.max_seconds and not progress.planned and len(times) == PLAN_AFTER:
                self.plan(times, run.train.max_seconds)
            self.between_steps(signals)

    def between_steps(self, signals: StopSignals) -> None:
        """Save and validate when it is time; save and leave when a signal asked for it."""
        run, progress = self.run, self.state.progress
        if signals.requested is not None:
            self.save()
            name = signals.requested.name
            self.end(name)
            stopped = Interrupted(f"{name}: saved step {progress.step} in {self.directory.path}; run again to continue")
            stopped.exit_code = 128 + signals.requested
            raise stopped
        if progress.step >= progress.max_steps:
            return
        if run.train.eval_every and progress.step % run.train.eval_every == 0:
            self.validate()
        if run.train.save_every and progress.step % run.train.save_every == 0:
            self.save()

    def plan(self, times: list[float], budget: float) -> None:
        """Turn the time budget into a number of steps, once; from here on the run is deterministic again."""
        progress = self.state.progress
        typical = sorted(times[PLAN_WARMUP:])[len(times[PLAN_WARMUP:]) // 2]
        progress.max_steps = progress.step + max(1, int((budget - progress.elapsed) / typical))
        progress.planned = True
        self.screen.set_max_steps(progress.max_steps)
        self.screen.note(f"{typical * 1e3:.0f} ms a step: {progress.max_steps} steps fit in {budget:.0f} s")

    def validate(self) -> Evaluation:
        """Validation loss on the whole validation text; recorded and shown."""
        run, data = self.run, self.data
        batches = evaluation_batches(data.valid.ids, run.train.sequence_length, run.train.batch_size)
        result = evaluate(self.state.model, batches, num_bytes=data.valid.info.num_bytes, dtype=self.dtype)
        record = self.journal.write(
            "eval",
            step=self.state.progress.step,
            valid_loss=result.loss,
            valid_bits_per_byte=result.bits_per_byte,
            valid_perplexity=result.perplexity,
            tokens=result.tokens,
        )
        self.screen.eval(record)
        return result

    def save(self) -> Path:
        """Write a checkpoint and delete those that are too old."""
        path = self.directory.checkpoint_path(self.state.progress.step)
        self.state.save(path, self.data.tokenizer_path)
        self.journal.write("checkpoint", step=self.state.progress.step, path=str(path.relative_to(self.directory.path)))
        self.directory.retain(self.run.train.keep_checkpoints)
        return path

    def end(self, reason: str) -> None:
        """Say in the journal why the session ended."""
        progress = self.state.progress
        self.journal.write(
            "end", step=progress.step, reason=reason, elapsed=progress.elapsed, max_steps=progress.max_steps
        )

    def record(self, result: StepResult, lr: float, tokens_per_s: float) -> dict[str, Any]:
        """A `step` record of the journal."""
        info = self.data.train.info
        layers = {str(layer): asdict(counter.summary()) for layer, counter in result.counters.items()}
        progress = self.state.progress
        return {
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2) * info.num_tokens / info.num_bytes,
            "aux_loss": result.terms.get("aux_loss"),
            "terms": result.terms,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": tokens_per_s,
            "elapsed": progress.elapsed,
            "skipped": result.skipped,
            "moe": layers,
        }


def train(path: Path, run: RunConfig, *, quiet: bool = False) -> Summary:
    """Start or continue the run in directory `path`; returns when it is finished.

    Raises `UserError` if the directory holds anything but a run, `ConfigError` if it holds another run, `RunLocked`
    if a process is using it, `Interrupted` (after saving) on SIGTERM or SIGINT, `TrainingHalted` from the guards,
    `StorageError` if the disk is full.
    """
    directory = RunDirectory(path)
    directory.check_ours()
    pick_device(run.train.device)
    with directory.lock(), StopSignals() as signals:
        _check_same_run(directory, run)
        with Screen(str(path), run.train.max_steps, quiet) as screen:
            data = prepare_data(directory.data_dir, run, screen.note)
            directory.clean_partial()  # only now: whatever is wrong with the command was said before
            write_atomic(directory.config_file, dump_run(run))
            state = _initial_state(run, data)
            newest = directory.newest_valid()
            if newest is not None:
                state.load(newest[1])
                if not state.progress.planned:
                    state.progress.max_steps = run.train.max_steps
                screen.note(_where(state.progress))
            screen.set_max_steps(state.progress.max_steps)
            with Journal(directory.journal_file, run.train.trackers) as journal:
                dtype = pick_dtype(run.train.dtype, state.model.embed_tokens.weight.device)
                trainer = Trainer(run, directory, data, state, journal, screen, dtype)
                _announce(trainer)
                finished = state.progress.step >= state.progress.max_steps
                if not finished:
                    trainer.fit(signals)
                    trainer.save()
                evaluation = trainer.validate()
                if not finished:
                    trainer.end("finished")
        return finish(directory, run, data, state.model, evaluation, dtype)


def _where(progress: Progress) -> str:
    if progress.step < progress.max_steps:
        return f"continuing from step {progress.step}"
    return f"finished at step {progress.step}: nothing left to train"


def _check_same_run(directory: RunDirectory, run: RunConfig) -> None:
    if not directory.config_file.is_file():
        return
    before = load_run(directory.config_file)
    for section in type(run).model_fields:
        old, new = getattr(before, section), getattr(run, section)
        for name in type(old).model_fields:
            if getattr(old, name) != getattr(new, name) and f"{section}.{name}" not in MAY_CHANGE:
                raise ConfigError(
                    f"{directory.path} holds another run: its {section}.{name} is {getattr(old, name)!r}, yours is "
                    f"{getattr(new, name)!r}; choose another --out, or remove it"
                )


def _initial_state(run: RunConfig, data: RunData) -> TrainState:
    torch.manual_seed(run.train.seed)
    device = pick_device(run.train.device)
    model = Decoder(run.model, run.train.experts_implementation).to(device)
    init_weights(model, run.train.seed)
    model.train()
    batches = PackedBatches(data.train.ids, run.train.sequence_length, run.train.batch_size, run.train.seed)
    optimizers = build_optimizers(model, run.optim)
    return TrainState(model, optimizers, batches, SpikeGuard(run.guard), Progress(max_steps=run.train.max_steps))


def _announce(trainer: Trainer) -> None:
    model, moe = trainer.state.model, trainer.run.model.moe
    parameters, active = count_parameters(model)
    record = trainer.journal.write(
        "start",
        step=trainer.state.progress.step,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version=manyhands.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        parameters=parameters,
        active_parameters=active,
        num_experts=moe.router.num_experts if moe else None,
        num_experts_per_tok=moe.router.num_experts_per_tok if moe else None,
        sparse_layers=trainer.run.model.sparse_layers,
        dtype=str(trainer.dtype).removeprefix("torch."),
    )
    trainer.screen.start(record)
    if moe is not None and not moe.router.causal_safe:
        trainer.screen.note(
            "warning: this router looks at other tokens, the later ones too; its loss is not a causal "
            "model's, and generate will refuse it"
        )
