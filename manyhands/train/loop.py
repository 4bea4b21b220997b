"""The training loop: prepare, resume, step, journal, save, stop, report.

A run lives in one directory and is described by one `RunConfig`. Starting it again continues it.
"""

import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.history import go_on, record, repeat, settings_at
from manyhands.config.load import dump_run, load_run
from manyhands.errors import Interrupted
from manyhands.files import write_atomic
from manyhands.generate.evaluate import Evaluation, evaluate
from manyhands.models import Decoder, init_weights
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.text import evaluation_batches
from manyhands.trace.journal import Journal
from manyhands.train.budget import Budget, planned, with_plan
from manyhands.train.data import RunData, prepare_data
from manyhands.train.finish import Summary, finish
from manyhands.train.guard import SpikeGuard, StopSignals
from manyhands.train.optim import build_optimizers
from manyhands.train.ready import check_ready
from manyhands.train.schedule import learning_rate, no_faster_than_warmup
from manyhands.train.screen import Screen
from manyhands.train.state import Progress, TrainState, count_parameters, pick_device, pick_dtype
from manyhands.train.step import StepResult, train_step
from manyhands.train.task import LanguageModelling, Task
from manyhands.train.trackers import open_tracker
from manyhands.version import __version__

_TRACED = 200_000  # tokens that the report looks at after the last validation
_SAVING_SHARE = 20  # saving by time takes one part in so many of the time at most


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
    now: RunConfig
    """`run` as it is at this step."""
    task: Task
    ranks: Ranks = field(default_factory=Alone)
    budget: Budget | None = None
    origin: float = 0.0
    """When the run would have begun, had it been done in one go."""
    saved_at: float = 0.0
    saving_took: float = 0.0

    def fit(self, signals: StopSignals) -> None:
        """Step until the end or a signal. Raises `Interrupted` after saving, `TrainingHalted` from the guard."""
        progress, guard = self.state.progress, self.state.guard
        self.saved_at = time.perf_counter()
        self.origin = self.saved_at - progress.wall
        if self.run.train.max_seconds is not None:
            self.budget = Budget(self.run.train.max_seconds, planned(self.run), self.closing_steps())
            self.plan_again()
        while progress.step < progress.max_steps:
            step_started = time.perf_counter()
            run = self.now
            rate = learning_rate(progress.step, progress.max_steps, run.optim.lr, run.schedule)
            lr = no_faster_than_warmup(rate, progress.lr, run.optim.lr, progress.max_steps, run.schedule)
            batch = next(self.state.batches)
            levels = guard.num_levels
            state, number = self.state, progress.step + 1
            result = train_step(
                state.model, state.optimizers, guard, batch, run, number, lr, self.dtype, self.task, self.ranks
            )
            seconds = time.perf_counter() - step_started
            progress.step += 1
            progress.lr = lr
            progress.tokens += result.count.tokens
            progress.elapsed += seconds
            self.look_at_clock()
            last = progress.step == progress.max_steps
            if progress.step % run.train.log_every == 0 or last or result.skipped:
                record = self.record(result, lr, result.count.tokens / seconds)
                self.screen.step(self.journal.write("step", step=progress.step, **record))
            if guard.num_levels > levels:
                self.screen.note(f"step {progress.step}: loss or gradient norm is at a new level; going on from there")
            self.settle(seconds)
            self.between_steps(signals)
            self.look_at_clock()

    def look_at_clock(self) -> None:
        """Take in the time since the run began, saving and validation with it."""
        self.state.progress.wall = time.perf_counter() - self.origin

    def settle(self, seconds: float) -> None:
        """Take in what changes at this step: the run's history, and what the time budget says."""
        progress = self.state.progress
        if any(change.step == progress.step for change in self.run.history):
            self.apply(settings_at(self.run, progress.step))
        if self.budget is None or any(change.step > progress.step for change in self.run.history):
            return
        total = self.budget.steps(
            seconds, step=progress.step, max_steps=progress.max_steps, trained=progress.elapsed, wall=progress.wall
        )
        if total is not None:
            self.set_steps(total)

    def plan_again(self) -> None:
        """Plan from the speed so far, if the budget was changed in a run that is under way."""
        progress = self.state.progress
        assert self.budget is not None
        if progress.step and progress.elapsed > 0 and not self.budget.planned:
            typical = progress.elapsed / progress.step
            self.set_steps(self.budget.end(progress.step, typical, progress.elapsed, progress.wall))

    def set_steps(self, total: int) -> None:
        """From here on the run has `total` steps: in its history, in the journal, on the screen."""
        progress, budget = self.state.progress, self.budget
        assert budget is not None
        progress.planned = True
        changes = {"train.max_steps": (progress.max_steps, total)}
        self.run = self.run.model_copy(update={"history": record(self.run.history, progress.step, changes)})
        write_atomic(self.directory.config_file, dump_run(self.run))
        self.apply(settings_at(self.run, progress.step))
        self.journal.write("plan", step=progress.step, max_steps=total, max_seconds=budget.seconds, wall=progress.wall)
        self.screen.note(f"step {progress.step}: {total} steps fit into {budget.seconds:.0f} s")

    def apply(self, now: RunConfig) -> None:
        """Go on under these settings."""
        if now.optim != self.now.optim:
            state = self.state.optimizers.state_dict()
            self.state.optimizers = build_optimizers(self.state.model, now.optim)
            self.state.optimizers.load_state_dict(state)
        if now.guard != self.now.guard:
            self.state.guard.configure(now.guard)
        self.now = now
        self.state.progress.max_steps = now.train.max_steps
        self.screen.set_max_steps(now.train.max_steps)

    def may_extend(self) -> bool:
        """Whether a changed time budget has yet to be turned into steps."""
        return self.run.train.max_seconds is not None and not planned(self.run)

    def closing_steps(self) -> float:
        """What comes after the last step, in steps: a forward pass is a third of one."""
        tokens = self.data.valid.info.num_tokens
        return (tokens + min(tokens, _TRACED)) / 3 / (self.run.train.sequence_length * self.run.train.batch_size)

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
        by_steps = run.train.save_every and progress.step % run.train.save_every == 0
        wait = max(run.train.save_seconds, _SAVING_SHARE * self.saving_took)
        if by_steps or (run.train.save_seconds and time.perf_counter() - self.saved_at >= wait):
            self.save()

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
        began = time.perf_counter()
        path = self.directory.checkpoint_path(self.state.progress.step)
        self.state.save(path, self.data.tokenizer_path)
        self.journal.write("checkpoint", step=self.state.progress.step, path=str(path.relative_to(self.directory.path)))
        self.directory.retain(self.run.train.keep_checkpoints)
        self.saved_at = time.perf_counter()
        self.saving_took = self.saved_at - began
        return path

    def end(self, reason: str) -> None:
        """Say in the journal why the session ended."""
        progress = self.state.progress
        self.journal.write(
            "end",
            step=progress.step,
            reason=reason,
            elapsed=progress.elapsed,
            wall=progress.wall,
            max_steps=progress.max_steps,
        )

    def record(self, result: StepResult, lr: float, tokens_per_s: float) -> dict[str, Any]:
        """A `step` record of the journal."""
        layers = {str(layer): asdict(counter.summary()) for layer, counter in result.counters.items()}
        progress = self.state.progress
        return {
            "loss": result.loss,
            **self.task.figures(result.loss, self.data),
            "aux_loss": result.terms.get("aux_loss"),
            "terms": result.terms,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": tokens_per_s,
            "elapsed": progress.elapsed,
            "wall": progress.wall,
            "skipped": result.skipped,
            "moe": layers,
        }


def train(path: Path, run: RunConfig, *, quiet: bool = False, task: Task | None = None) -> Summary:
    """Start or continue the run in directory `path`; returns when it is finished. `task` None: language modelling.

    Raises `UserError` if the directory holds anything but a run, `ConfigError` if it holds another run, `RunLocked`
    if a process is using it, `Interrupted` (after saving) on SIGTERM or SIGINT, `TrainingHalted` from the guards,
    `StorageError` if the disk is full.
    """
    task = task or LanguageModelling()
    directory = RunDirectory(path)
    directory.check_ours()
    check_ready(run)
    with directory.lock(), StopSignals() as signals:
        newest = directory.newest_valid()
        changes: dict[str, Any] = {}
        before = load_run(directory.config_file) if directory.config_file.is_file() else None
        if before is None:
            run = repeat(run)
        else:
            before = with_plan(before, newest[1] if newest else None)
            run, changes = go_on(before, run, newest[0] if newest else 0, str(directory.path))
        with Screen(str(path), run.train.max_steps, quiet) as screen:
            with signals.preparing():
                data = prepare_data(directory.data_dir, run, screen.note)
            directory.clean_partial()  # only now: whatever is wrong with the command was said before
            write_atomic(directory.config_file, dump_run(run))
            now = settings_at(run, newest[0] if newest else 0)
            state = _initial_state(now, data, task)
            if newest is not None:
                state.load(newest[1])
            progress = state.progress
            progress.max_steps = now.train.max_steps
            screen.set_max_steps(progress.max_steps)
            description = run.model_dump(mode="json")
            trackers = [open_tracker(name, directory.path, progress.step, description) for name in run.train.trackers]
            with Journal(directory.journal_file, trackers) as journal:
                dtype = pick_dtype(run.train.dtype, state.model.embed_tokens.weight.device)
                trainer = Trainer(run, directory, data, state, journal, screen, dtype, now, task)
                _announce(trainer)
                if newest is not None:
                    _say_changes(trainer, before or run, changes)
                    screen.note(_where(progress, run))
                finished = progress.step >= progress.max_steps and not trainer.may_extend()
                if not finished:
                    trainer.fit(signals)
                    trainer.save()
                evaluation = trainer.validate()
                if not finished:
                    trainer.look_at_clock()
                    trainer.end("finished")
        return finish(directory, trainer.run, data, state.model, evaluation, dtype)


def _where(progress: Progress, run: RunConfig) -> str:
    if progress.step < progress.max_steps:
        return f"continuing from step {progress.step}"
    longer = "a larger train.max_steps"
    if run.train.max_seconds is not None:
        longer = f"train.max_seconds above {run.train.max_seconds:g}, its time budget, or {longer}"
    return f"finished at step {progress.step}: nothing left to train; {longer} goes on"


def _say_changes(trainer: Trainer, before: RunConfig, changes: dict[str, Any]) -> None:
    """Each changed setting, and how the learning rate goes on, on the screen and in the journal."""
    progress, now = trainer.state.progress, trainer.now
    if progress.lr is None and progress.step:  # saved by a version that did not keep it
        old = settings_at(before, progress.step)
        progress.lr = learning_rate(progress.step - 1, old.train.max_steps, old.optim.lr, old.schedule)
    if not changes or not progress.step:
        return
    for path, (old, new) in changes.items():
        trainer.screen.note(f"from step {progress.step} on: {path} {old} -> {new}")
    trainer.journal.write(
        "change",
        step=progress.step,
        changes={path: {"before": old, "after": new} for path, (old, new) in changes.items()},
    )
    if progress.step >= progress.max_steps or progress.lr is None:
        return
    rate = learning_rate(progress.step, progress.max_steps, now.optim.lr, now.schedule)
    reached = no_faster_than_warmup(rate, progress.lr, now.optim.lr, progress.max_steps, now.schedule)
    how = (
        "" if reached == rate else f", rising by {now.optim.lr / max(1, now.schedule.warmup_steps):.2e} a step at most"
    )
    trainer.screen.note(f"the learning rate goes from {progress.lr:.2e} to its schedule's {rate:.2e}{how}")


def _initial_state(run: RunConfig, data: RunData, task: Task) -> TrainState:
    device = pick_device(run.train.device)
    model = Decoder(run.model, run.train.experts_implementation)
    seed_noise(model, run.train.seed)
    model.to(device)
    init_weights(model, run.train.seed)
    model.train()
    optimizers = build_optimizers(model, run.optim)
    batches = task.batches(data, run, Alone())
    return TrainState(model, optimizers, batches, SpikeGuard(run.guard), Progress(max_steps=run.train.max_steps))


def seed_noise(model: Decoder, seed: int) -> None:
    """The global generator as it always was when a run began: after torch's own filling of linear layers.

    `init_weights` must follow, for nothing drawn here is kept. Through it seeded runs with noise while training
    (noisy, jitter, random_second) repeat what they were.
    """
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.Linear.reset_parameters(part)
        elif isinstance(part, nn.Embedding):
            part.reset_parameters()


def _announce(trainer: Trainer) -> None:
    model, moe = trainer.state.model, trainer.run.model.moe
    parameters, active = count_parameters(model)
    record = trainer.journal.write(
        "start",
        step=trainer.state.progress.step,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
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
    if moe is None:
        trainer.screen.note("a dense model: model.moe is not set, so there are no experts")
    if moe is not None and not moe.router.causal_safe:
        trainer.screen.note(
            "warning: this router looks at other tokens, the later ones too; its loss is not a causal "
            "model's, and generate will refuse it"
        )
