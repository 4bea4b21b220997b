"""What a session says when it begins: what is trained, where it goes on, what changed."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from manyhands.config import EncoderDecoderConfig, RunConfig
from manyhands.config.history import settings_at, stopped_early
from manyhands.config.kinds import BuiltConfig
from manyhands.kernels.native import missing
from manyhands.models import AnyModel, build
from manyhands.trace.journal import Journal
from manyhands.train.schedule import learning_rate, no_faster_than_warmup
from manyhands.train.screen import Screen
from manyhands.train.start import Start
from manyhands.train.state import Progress, TrainState, count_parameters, count_trained
from manyhands.version import __version__


def announce(
    run: RunConfig,
    state: TrainState,
    journal: Journal,
    screen: Screen,
    dtype: torch.dtype,
    start: Start | None,
    processes: int,
    before: int,
    told: Mapping[str, Any],
) -> None:
    """The `start` record, and what is `told` beside it (`about`).

    `start` is the checkpoint that the run has just begun from, `before` is how many `processes` wrote the one that it
    goes on from.
    """
    moe = run.model.moe
    parameters, active = count_parameters(_whole(run) if run.saves_changes else state.model)
    trained = count_trained(state.model)
    more: dict[str, Any] = {} if trained == parameters else {"trained_parameters": trained}
    if start is not None:
        more["start"] = start.described()
    if state.own:
        more["own"] = list(state.own)
    if processes > 1:
        more["parallel"] = {"processes": processes, **run.parallel.model_dump()}
    record = journal.write(
        "start",
        step=state.progress.step,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        parameters=parameters,
        active_parameters=active,
        num_experts=moe.router.num_experts if moe else None,
        num_experts_per_tok=moe.router.num_experts_per_tok if moe else None,
        sparse_layers=run.model.sparse_layers,
        dtype=str(dtype).removeprefix("torch."),
        **told,
        **more,
    )
    screen.start(record)
    if start is not None:
        screen.note(f"starting from {start.source}")
    if processes > 1:
        ep = run.parallel.ep
        screen.note(f"{processes} processes" + (f", each set of experts on {ep} of them" if ep > 1 else ""))
    if before != processes:
        screen.note(
            f"the checkpoint is of {before} process{'es' if before > 1 else ''}: random generators begin anew, which "
            "changes only what a router draws (noise, jitter)"
        )
    if moe is None:
        screen.note("a dense model: model.moe is not set, so there are no experts")
    if warning := not_causal(run.model):
        screen.note(f"warning: {warning}")
    if slower := without_kernels(run, next(state.model.parameters()).device):
        screen.note(slower)


def _whole(run: RunConfig) -> AnyModel:
    """The model that is tuned: what lies in memory has adapters as well, and may be packed."""
    with torch.device("meta"):
        return build(run.model)


def not_causal(config: BuiltConfig) -> str | None:
    """What a router that looks at other tokens means for the loss and for `generate`; None where it looks at none."""
    router = None if config.moe is None else config.moe.router
    if router is None or router.causal_safe:
        return None
    if isinstance(config, EncoderDecoderConfig) and router.select != "expert_choice":
        return (
            "in evaluation too an expert has limited room, and what it drops depends on the tokens beside it; generate "
            "counts each token by itself, and may keep what validation dropped"
        )
    if router.prefix_causal:
        return "this router counts the tokens before a token; generate, which has one at a time, will refuse it"
    return (
        "this router looks at other tokens, the later ones too; its loss is not a causal model's, and generate will "
        "refuse it"
    )


def without_kernels(run: RunConfig, device: torch.device) -> str | None:
    """That PyTorch computes what the native kernels would, and why; None where they do, or were not to."""
    absent = missing()
    wanted = run.model.moe is not None and run.train.experts_implementation == "auto" and device.type == "cpu"
    return None if absent is None or not wanted else f"PyTorch computes the experts, which is slower: {absent}"


def say_changes(
    before: RunConfig,
    now: RunConfig,
    changes: Mapping[str, tuple[Any, Any]],
    progress: Progress,
    journal: Journal,
    screen: Screen,
) -> None:
    """Each changed setting, and how the learning rate goes on."""
    if progress.lr is None and progress.step:  # saved by a version that did not keep it
        old = settings_at(before, progress.step)
        progress.lr = learning_rate(progress.step - 1, old.train.max_steps, old.optim.lr, old.schedule)
    if not changes or not progress.step:
        return
    for path, (was, new) in changes.items():
        screen.note(f"from step {progress.step} on: {path} {was} -> {new}")
    journal.write(
        "change",
        step=progress.step,
        changes={path: {"before": was, "after": new} for path, (was, new) in changes.items()},
    )
    if progress.step >= progress.max_steps or progress.lr is None:
        return
    rate = learning_rate(progress.step, progress.max_steps, now.optim.lr, now.schedule)
    reached = no_faster_than_warmup(rate, progress.lr, now.optim.lr, progress.max_steps, now.schedule)
    how = (
        "" if reached == rate else f", rising by {now.optim.lr / max(1, now.schedule.warmup_steps):.2e} a step at most"
    )
    screen.note(f"the learning rate goes from {progress.lr:.2e} to its schedule's {rate:.2e}{how}")


def where(progress: Progress, run: RunConfig) -> str:
    """From which step the run goes on, or how it could."""
    if progress.step < progress.max_steps:
        return f"continuing from step {progress.step}"
    if stopped_early(run, progress.step):
        return (
            f"stopped early at step {progress.step}: nothing left to train; train.early_stop=null or a larger "
            "one, or a larger train.max_steps, goes on"
        )
    longer = "a larger train.max_steps"
    if run.train.max_seconds is not None:
        longer = f"train.max_seconds above {run.train.max_seconds:g}, its time budget, or {longer}"
    return f"finished at step {progress.step}: nothing left to train; {longer} goes on"
