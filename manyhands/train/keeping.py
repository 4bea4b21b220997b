"""What a run keeps on its way: its validations, its checkpoints, which was best, and when no better one comes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.checkpoint.runs import BEST, LAST
from manyhands.generate.evaluate import Evaluation
from manyhands.trace.documents import keep_losses
from manyhands.train.looks import say_sample

if TYPE_CHECKING:
    from manyhands.train.loop import Trainer


def validate(trainer: "Trainer") -> Evaluation:
    """The task's validation; recorded and shown, and compared with the best."""
    state, data = trainer.state, trainer.data
    with trainer.screen.busy("validating"):
        result = trainer.evaluation = trainer.task.validate(
            state.model, data, trainer.course.run, trainer.dtype, trainer.ranks
        )
    record = trainer.journal.write(
        "eval",
        step=state.progress.step,
        valid_loss=result.loss,
        valid_bits_per_byte=result.bits_per_byte,
        valid_perplexity=result.perplexity,
        tokens=result.tokens,
    )
    trainer.screen.eval(record)
    if trainer.ranks.rank == 0:
        keep_losses(trainer.directory.documents_file, data.documents, record["step"], result.documents)
    say_sample(trainer)
    state.progress.judge(result.loss)
    trainer.tell("on_validation", record)
    return result


def owes_validation(trainer: "Trainer") -> bool:
    """Whether what the run goes on from was saved before it was judged: at a signal, or at the end."""
    progress, every = trainer.state.progress, trainer.course.run.train.eval_every
    due = trainer.had_ended or (every and progress.step % every == 0)
    return bool(progress.step and due and progress.validated < progress.step)


def stop_early(trainer: "Trainer") -> bool:
    """End the run at this step if validations have not got better for long enough."""
    progress, patience = trainer.state.progress, trainer.course.now.train.early_stop
    if patience is None or progress.waited < patience:
        return False
    trainer.course.end_here()
    trainer.journal.write(
        "early_stop",
        step=progress.step,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        patience=patience,
    )
    best = "" if progress.best_step is None else f"; the best was at step {progress.best_step}"
    trainer.screen.note(f"step {progress.step}: stopped early, after {patience} validations that were no better{best}")
    return True


def save(trainer: "Trainer") -> Path:
    """Write a checkpoint and delete those that are too old."""
    began = time.perf_counter()
    directory, step = trainer.directory, trainer.state.progress.step
    path = directory.checkpoint_path(step)
    with trainer.screen.busy("saving"):
        trainer.state.save(path, trainer.data.tokenizer_path, trainer.ranks)
    trainer.journal.write("checkpoint", step=step, path=str(path.relative_to(directory.path)))
    name_best(trainer)
    trainer.saved_at = time.perf_counter()
    trainer.saving_took = trainer.saved_at - began
    return path


def name_best(trainer: "Trainer") -> None:
    """Give the best and the newest checkpoint their names, and delete those that are too old."""
    if trainer.ranks.rank:
        return
    directory, train, best = trainer.directory, trainer.course.run.train, trainer.state.progress.best_step
    complete = directory.checkpoints()
    there = train.keep_best and any(step == best for step, _ in complete)
    if complete:
        directory.name(LAST, complete[-1][0])
    if there or not train.keep_best:
        directory.name(BEST, best if there else None)
    directory.retain(train.keep_checkpoints, {best} if there and best is not None else ())
