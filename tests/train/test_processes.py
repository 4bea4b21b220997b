"""A run on several processes: what one process does, and one voice when it ends badly."""

import hashlib
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import seed_rng
from manyhands.errors import ConfigError
from manyhands.models import build
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.trace.journal import read_journal
from manyhands.trace.recording import Trace
from manyhands.train import loop, preparing
from manyhands.train.data import prepare_data
from manyhands.train.finish import Summary
from manyhands.train.fresh import fresh_state
from manyhands.train.ready import check_ready
from manyhands.train.seq2seq import task_of
from manyhands.train.state import TrainState, count_parameters
from tests.gloo import on_processes
from tests.jobs import job, started, store_here
from tests.small_runs import SMALL, Done, small_run, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), 400)


def trained(ranks: Ranks, folder: Path, text: Path, *changes: str) -> Summary:
    return loop.train(folder, small_run(text, *changes), quiet=True, ranks=ranks)


def train_on(size: int, folder: Path, text: Path, *changes: str) -> Summary:
    """What every rank returned."""
    if size == 1:
        return trained(Alone(), folder, text, *changes)
    summary, *others = on_processes(size, trained, folder, text, *changes)
    assert others == [summary] * (size - 1)
    return summary


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_journal(folder / "journal.jsonl") if r["kind"] == "step"]


def near(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and found == pytest.approx(expected, rel=1e-5)


FEW = ("train.max_steps=6", "trace.every=3", "train.worth_every=6")


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, train_on(1, folder, text, *FEW)


@pytest.mark.parametrize(("size", "layout"), [(2, ()), (4, ("parallel.ep=2", "parallel.dispatch=by_tokens"))])
def test_the_same_as_one_process(
    size: int, layout: tuple[str, ...], text: Path, tmp_path: Path, alone: tuple[Path, Summary]
) -> None:
    """Losses, tokens, the load of experts, what is in the directory, and who went where."""
    found, (one, summary) = train_on(size, tmp_path / "run", text, *FEW, *layout), alone
    assert near(losses(tmp_path / "run"), losses(one))
    assert found.valid_loss == pytest.approx(summary.valid_loss, rel=1e-5)
    assert (found.steps, found.tokens, found.skipped) == (summary.steps, summary.tokens, summary.skipped)
    records = [read_journal(folder / "journal.jsonl") for folder in (one, tmp_path / "run")]
    assert [(r["kind"], r["step"]) for r in records[0]] == [(r["kind"], r["step"]) for r in records[1]]
    worths = [next(r["layers"]["1"] for r in each if r["kind"] == "worth") for each in records]
    assert worths[0]["tokens"] == worths[1]["tokens"] and worths[1]["size"] == [None] * 8
    for name in ("cost", "error"):  # what is random each process draws for itself
        assert worths[1][name] == pytest.approx(worths[0][name], abs=1e-6), name
    assert records[1][0]["parallel"]["processes"] == size and "parallel" not in records[0][0]
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (one, tmp_path / "run")]
    rng = "checkpoints/step-00000006/rng{}.safetensors"
    assert names[1] - names[0] == {rng.format(f"-{r:05d}-of-{size:05d}") for r in range(size)}
    assert names[0] - names[1] == {rng.format("")}
    steps = [list(Trace.open(next((folder / "traces").iterdir())).steps()) for folder in (one, tmp_path / "run")]
    for name in ("step", "token_ids", "sequence", "position", "expert_ids"):
        theirs, mine = (np.concatenate([getattr(step, name) for step in each]) for each in steps)
        assert (mine == theirs).mean() > 0.999


LONGER = "train.max_steps=3", "train.max_steps=6"


@pytest.fixture(scope="module")
def longer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process that ended after three steps, and was then given three more."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    for change in LONGER:
        train_on(1, folder, text, change)
    return folder


@pytest.mark.parametrize("layouts", [((1, 1), (2, 2)), ((4, 2), (2, 1))])
def test_a_run_goes_on_with_another_number_of_processes(
    layouts: tuple[tuple[int, int], ...], text: Path, tmp_path: Path, longer: Path
) -> None:
    """And with its experts on another number of them."""
    for (size, ep), change in zip(layouts, LONGER, strict=True):
        train_on(size, tmp_path / "run", text, change, f"parallel.ep={ep}")
    assert near(losses(tmp_path / "run"), losses(longer))


def _state(ranks: Ranks, folder: Path, text: Path, ep: int = 1) -> tuple[TrainState, Path]:
    run = small_run(text, *FEW, "train.dtype=float32")
    data = prepare_data(folder / "data", run, lambda said: None)
    return fresh_state(run, data, task_of(run), ranks, None, mesh_of(ranks, ep)), data.tokenizer_path


def _saved_again(ranks: Group, ep: int, folder: Path, text: Path, target: Path) -> None:
    state, tokenizer = _state(ranks, folder, text, ep)
    newest = RunDirectory(folder).newest_valid()
    assert newest is not None
    assert state.load(newest[1], ranks, 0) == 1
    state.save(target, tokenizer, ranks)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_a_checkpoint_does_not_say_how_its_state_lay(
    ep: int, text: Path, tmp_path: Path, alone: tuple[Path, Summary]
) -> None:
    """The bytes that one process wrote, read and written by four of each layout."""
    on_processes(4, _saved_again, ep, alone[0], text, tmp_path / "again")
    newest = RunDirectory(alone[0]).newest_valid()
    assert newest is not None
    for name in ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"):
        digests = {
            hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (newest[1], tmp_path / "again")
        }
        assert len(digests) == 1, name


def _draws(ranks: Group, folder: Path, text: Path, target: Path) -> list[float]:
    state, tokenizer = _state(ranks, folder, text)
    torch.manual_seed(100 + ranks.rank)
    random.seed(200 + ranks.rank)
    state.save(target, tokenizer, ranks)
    found = [float(torch.rand(())), random.random()]
    assert state.load(target, ranks, 0) == 2
    assert found == [float(torch.rand(())), random.random()]
    return found


def test_random_generators_go_on_or_begin_anew(text: Path, tmp_path: Path, alone: tuple[Path, Summary]) -> None:
    """On as many processes each has its own again; on another number all begin anew, by a rule."""
    zero, one = on_processes(2, _draws, alone[0], text, tmp_path / "two")
    assert zero[0] != one[0] and zero[1] != one[1]
    state, _ = _state(Alone(), alone[0], text)
    assert state.load(tmp_path / "two", Alone(), 5) == 2
    drawn = [float(torch.rand(())), random.random()]
    seed_rng(5, 0, 1, 0)
    assert drawn == [float(torch.rand(())), random.random()] and drawn not in (zero, one)
    seed_rng(5, 0, 2, 1)
    assert drawn[0] != float(torch.rand(()))


def command(folder: Path, text: Path, *changes: str) -> list[str]:
    sources = f"data.sources=['{text}']"
    return ["train", "--preset", "tiny", "--quiet", "--out", str(folder), *SMALL, sources, *changes]


def one_voice(done: list[Done]) -> str:
    """The single line on stderr that all processes together printed."""
    said = [line for each in done for line in each.stderr.splitlines()]
    assert len(said) == 1, done
    assert not any(each.stdout for each in done)
    return said[0]


@pytest.mark.parametrize(("change", "said"), [("data.sources=[nowhere]", "nowhere"), ("model.moe=7", "model.moe")])
def test_a_mistake_is_said_once(change: str, said: str, text: Path, tmp_path: Path) -> None:
    """Of what all find when they begin, and of what rank 0 finds."""
    done = job(2, *command(tmp_path / "run", text, change))
    assert said in one_voice(done) and [each.returncode for each in done] == [2, 2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.batch_size=3"], "3 cannot be shared out over 2 processes: make it a multiple of 2"),
        (
            ["train.batch_size=12", "train.micro_batch_size=4"],
            "4 does not divide the 6 sequences that each of 2 processes has of train.batch_size = 12",
        ),
        (["parallel.ep=4"], "4 does not divide the 2 processes of this job; set parallel.ep to a number that does"),
    ],
)
def test_what_cannot_be_shared_out(changes: list[str], said: str, text: Path) -> None:
    with pytest.raises(ConfigError, match=f"{changes[-1].partition('=')[0]} = {said}"):
        check_ready(small_run(text, *changes), Alone(size=2))
    check_ready(small_run(text, "parallel.ep=2", "train.batch_size=12", "train.micro_batch_size=3"), Alone(size=2))


def test_memory_is_that_of_all_machines(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, run = os.sysconf, small_run(text)
    need = 12 * count_parameters(build(run.model))[0] // real("SC_PAGE_SIZE")  # pages, for weight, gradient, moment
    monkeypatch.setattr(os, "sysconf", lambda name: need // 2 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(ConfigError, match="this machine has 0 GB"):
        check_ready(run, Alone(size=4, local_size=4))
    check_ready(run, Alone(size=4, local_size=1))


def test_a_run_in_use_is_refused_once(text: Path, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").lock():
        done = job(2, *command(tmp_path / "run", text))
    assert f"in use by process {os.getpid()}" in one_voice(done) and [d.returncode for d in done] == [1, 1]


def test_one_process_speaks_for_all(text: Path, tmp_path: Path) -> None:
    first, second = job(2, *command(tmp_path / "run", text, "train.max_steps=2"))
    assert "2 steps" in first.stdout and (second.stdout, first.stderr, second.stderr) == ("", "", "")
    assert first.returncode == second.returncode == 0


def _little_room(rank: int) -> None:
    """No file of rank 0 may be larger: as on a full disk, but for what errno says."""
    if rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def _dies(rank: int) -> None:
    _at_step_4(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _fails(rank: int) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    _at_step_4(rank, fail)


def _at_step_4(rank: int, act):  # type: ignore[no-untyped-def]
    real = loop.train_step

    def spoilt(*args, **kwargs):  # type: ignore[no-untyped-def]
        if args[5] == 4 and rank == 1:
            act()
        return real(*args, **kwargs)

    loop.train_step = spoilt


def whole_checkpoint(folder: Path) -> int:
    """The step of the newest; nothing half-made lies beside it."""
    newest = RunDirectory(folder).newest_valid()
    assert newest is not None
    with RunDirectory(folder).lock():  # whoever had it is gone
        RunDirectory(folder).clean_partial()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [newest[1].name]
    return newest[0]


def test_a_full_disk_ends_all(text: Path, tmp_path: Path) -> None:
    job(2, *command(tmp_path / "run", text, "train.max_steps=2"))
    done = job(2, *command(tmp_path / "run", text, "train.max_steps=4"), before=_little_room)
    said = one_voice(done)
    assert "cannot write" in said and "step-00000004" in said and [d.returncode for d in done] == [1, 1]
    assert whole_checkpoint(tmp_path / "run") == 2


@pytest.mark.parametrize("size", [2])
def test_a_process_that_is_killed_ends_all_and_a_restart_goes_on(
    size: int, text: Path, tmp_path: Path, alone: tuple[Path, Summary]
) -> None:
    changes = ("train.max_steps=6", "train.save_every=3", "train.keep_checkpoints=1")
    store, arguments = store_here(), command(tmp_path / "run", text, *changes)
    done = job(size, *arguments, before=_dies, store=store)
    assert "another process of this job ended without a word" in one_voice(done)
    assert [d.returncode for d in done] == [1, -signal.SIGKILL] + [1] * (size - 2)
    assert whole_checkpoint(tmp_path / "run") == 3
    again = job(size, *arguments, store=store, attempt=1)  # as torchrun --max-restarts does
    assert [d.returncode for d in again] == [0] * size and near(losses(tmp_path / "run"), losses(alone[0]))


def test_an_error_of_one_process_is_its_own(text: Path, tmp_path: Path) -> None:
    first, second = job(2, *command(tmp_path / "run", text), before=_fails)
    assert "MemoryError: no room" in second.stderr and first.stderr == ""
    assert first.returncode == second.returncode == 1


def test_sigterm_saves_one_step_of_all(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(2, *command(folder, text, "train.max_steps=100000")) as running:
        ends = time.monotonic() + 60
        while not (folder / "journal.jsonl").exists() or len(losses(folder)) < 2:
            assert time.monotonic() < ends
            time.sleep(0.02)
        for rank in (1, 0):
            running.kill(rank, signal.SIGTERM)
        done = running.wait()
    assert "SIGTERM: saved step" in one_voice(done) and [d.returncode for d in done] == [143, 143]
    assert whole_checkpoint(folder) == len(losses(folder))
    state = json.loads((folder / "checkpoints" / f"step-{len(losses(folder)):08d}" / "state.json").read_text())
    assert state["world"] == 2


def _slow_text(rank: int) -> None:
    real = preparing.prepare

    def slow(*args, **kwargs):  # type: ignore[no-untyped-def]
        (Path(str(args[0])).parent / "preparing").touch()
        time.sleep(30)
        return real(*args, **kwargs)

    preparing.prepare = slow


def test_a_signal_before_the_first_step(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(2, *command(folder, text), before=_slow_text) as running:
        ends = time.monotonic() + 60
        while not (folder / "preparing").exists():
            assert time.monotonic() < ends
            time.sleep(0.02)
        for rank in (1, 0):
            running.kill(rank, signal.SIGTERM)
        done = running.wait(20)
    assert "SIGTERM before the first step" in one_voice(done)
    assert done[0].returncode == 143 and done[1].returncode in (143, -signal.SIGTERM)  # it may not yet have listened
