"""A run directory: who may write in it, and which of its checkpoints are good.

RUN/run.yaml                     the resolved description of the run
RUN/journal.jsonl                one line per logged step
RUN/documents.safetensors        the validation losses, document by document
RUN/data/                        tokenizer and token files
RUN/checkpoints/step-00000300/   complete when its manifest is there
RUN/best, RUN/last               links to two of them
RUN/.manyhands-run.json          the mark: this directory is a run, and the names above are this program's
RUN/.lock                        held by the one process that writes here
"""

import errno
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manyhands import strict_json
from manyhands.checkpoint.files import remove, sweep
from manyhands.checkpoint.manifest import MANIFEST, verify
from manyhands.config.load import load_run
from manyhands.errors import CheckpointError, ConfigError, RunLocked, UserError
from manyhands.files import (
    DOCUMENTS,
    JOURNAL,
    PREPARED,
    RUN,
    TOKENIZER,
    TRAIN_TOKENS,
    VALID_DOCUMENTS,
    VALID_TOKENS,
    beside,
    cannot_write,
    did_you_mean,
    write_atomic,
)
from manyhands.system import hold, let_go

NAMES = BEST, LAST = "best", "last"
"""What two of a run's checkpoints are called: that with the best validation, and the newest."""
_STEP = re.compile(r"step-(\d{8,})")
_MARK = {"format": "manyhands run", "version": 1}
_RUN_FILES = re.compile(r"run\.yaml|report\.html|documents\.safetensors|\.manyhands-run\.json")
_DATA_FILES = re.compile(r"tokenizer\.json|(train|valid)\.npy(\.json)?|valid\.documents\.safetensors|data\.json")
_log = logging.getLogger(__name__)


class RunDirectory:
    """The layout of one run. Reading needs no lock; everything that writes or deletes is called under `lock()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / RUN
        self.mark_file = self.path / ".manyhands-run.json"
        self.journal_file = self.path / JOURNAL
        self.documents_file = self.path / DOCUMENTS
        self.data_dir = self.path / "data"
        self.checkpoints_dir = self.path / "checkpoints"

    def check_ours(self) -> None:
        """Raise `UserError` unless a run may be started or continued here: there is nothing, or a run of ours.

        A run's mark is `.manyhands-run.json`. One made before there was a mark is known by its `run.yaml` beside a
        journal, prepared data or a complete checkpoint.
        """
        if str(self.path).startswith("~"):
            raise UserError(f"{self.path}: ~ reached the program as it is; write $HOME, or ./{self.path}")
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path}: exists and is not a directory; choose another --out")
        try:
            empty = not self.path.is_dir() or all(path.name == ".lock" for path in self.path.iterdir())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        if not empty and not self._is_marked():
            raise UserError(f"{self.path}: is not empty and holds no run of this program; choose another --out")

    def _is_marked(self) -> bool:
        try:
            if self.mark_file.is_file() and not self.mark_file.is_symlink():
                return bool(strict_json.loads(self.mark_file.read_bytes()[:1024]) == _MARK)
            if not self.config_file.is_file():
                return False
            load_run(self.config_file)
            with open(self.journal_file, "rb") as journal:
                return bool(strict_json.loads(journal.readline(1 << 20))["kind"] == "start")
        except FileNotFoundError:  # no journal yet
            data = all((self.data_dir / name).is_file() for name in (PREPARED, TRAIN_TOKENS, VALID_TOKENS))
            return data or bool(self.checkpoints())
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that writes here; the kernel lets go when the process dies, however it dies.

        Makes the directory if need be. Raises `RunLocked` at once, with the holder's process id, if another process
        has it, and `StorageError` if the directory cannot be made or locked.
        """
        try:
            fresh = not self.path.is_dir() or not any(self.path.iterdir())
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            hold(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode() or "unknown"
            os.close(descriptor)
            raise RunLocked(
                f"{self.path}: in use by process {holder}; wait until it ends, stop it, or use another directory"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise cannot_write(self.path / ".lock", error) from error
        try:
            if not self.config_file.is_file() and not self.mark_file.exists():
                write_atomic(self.mark_file, json.dumps(_MARK))
            yield
        except BaseException:
            if fresh and not self.config_file.exists():
                self._unmake()
            raise
        finally:
            let_go(descriptor)  # a forked child may hold a copy of the descriptor
            os.close(descriptor)

    def _unmake(self) -> None:
        """Take back what a start that failed made in a directory that was empty or not there."""
        with suppress(OSError):
            tokens = (TRAIN_TOKENS, f"{TRAIN_TOKENS}.json", VALID_TOKENS, f"{VALID_TOKENS}.json", VALID_DOCUMENTS)
            for name in (TOKENIZER, *tokens, PREPARED):
                (self.data_dir / name).unlink(missing_ok=True)
            if self.data_dir.is_dir():
                self.data_dir.rmdir()
            for path in (self.mark_file, self.path / ".lock"):
                path.unlink(missing_ok=True)
            self.path.rmdir()

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` belongs."""
        return self.checkpoints_dir / f"step-{step:08d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and directories of the complete checkpoints, oldest first; their bytes are not verified."""
        return [(step, path) for step, path in self._step_dirs() if (path / MANIFEST).is_file()]

    def newest_valid(self) -> tuple[int, Path] | None:
        """Step and directory of the newest checkpoint whose every byte is right; None if there is no checkpoint.

        A damaged one is logged and passed over. Raises `CheckpointError` if all are damaged.
        """
        complete = self.checkpoints()
        for step, path in reversed(complete):
            if _is_valid(path):
                return step, path
        if complete:
            raise CheckpointError(f"{self.path}: all {len(complete)} checkpoints are damaged, newest {complete[-1][1]}")
        return None

    def clean_partial(self) -> None:
        """Delete what dead processes left unfinished: temporary files and directories, half-deleted checkpoints.

        Call it under `lock()`: whatever is unfinished then has no writer. Failed deletions are logged.
        """
        for directory, ours in (
            (self.path, _RUN_FILES),
            (self.data_dir, _DATA_FILES),
            (self.checkpoints_dir, _STEP),
        ):
            if directory.is_dir() and not directory.is_symlink():
                sweep(directory, ours)
        for _, path in self._step_dirs():
            if not (path / MANIFEST).is_file():
                remove(path)
        for link in self.path.glob(".*.partial-*"):
            if link.is_symlink() and link.name.startswith(tuple(f".{name}." for name in NAMES)):
                link.unlink(missing_ok=True)

    def retain(self, keep: int, also: Collection[int] = ()) -> None:
        """Delete every checkpoint older than the newest `keep` (at least 1) valid ones, but for those of steps `also`.

        A damaged checkpoint does not count, so the newest valid one always stays. Failed deletions are logged.
        """
        assert keep >= 1
        complete = self.checkpoints()
        while complete and keep:
            if _is_valid(complete.pop()[1]):
                keep -= 1
        for step, path in complete:
            if step not in also:
                remove(path)

    def name(self, name: str, step: int | None) -> None:
        """Let the link `name` (of `NAMES`) lead to the checkpoint of `step`; None: to none.

        Only a link to a checkpoint here is replaced. A file system without links, or something else of that name, is
        logged: whatever reads the run by its steps does without.
        """
        link, target = self.path / name, None if step is None else self.checkpoint_path(step)
        new = beside(link, "partial")
        try:
            if os.path.lexists(link) and _linked(link) is None:
                raise FileExistsError(errno.EEXIST, "what is there is not this program's")
            if target is None:
                link.unlink(missing_ok=True)
                return
            new.unlink(missing_ok=True)
            new.symlink_to(target.relative_to(self.path), target_is_directory=True)
            os.replace(new, link)
        except OSError as error:
            _log.warning("%s: cannot be made to name step %s: %s", link, step, error.strerror)

    def _step_dirs(self) -> list[tuple[int, Path]]:
        if not self.checkpoints_dir.is_dir():
            return []
        matches = ((_STEP.fullmatch(path.name), path) for path in self.checkpoints_dir.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in matches if match)


def checkpoint_of(path: str | Path, which: str | None) -> Path:
    """The path that means checkpoint `which` of the run at `path`: `best`, `last`, or a step; None: `path` as it is.

    Raises `UserError` for a `path` that is no run, and a `which` that is none of these.
    """
    if which is None:
        return Path(path)
    if which not in NAMES and not which.isdecimal():
        raise UserError(f"--checkpoint {which}: it is {BEST}, {LAST}, or the step of one")
    if not (Path(path) / RUN).is_file():
        raise UserError(f"--checkpoint {which} is one of a run's, and {path} is no run's directory")
    return Path(path) / which


def resolve_checkpoint(path: str | Path) -> Path:
    """The verified checkpoint a person means by `path`: that directory, the newest valid one of that run, or with
    `RUN/best`, `RUN/last`, `RUN/300` that one of it.

    Raises `CheckpointError` saying what is there and what was expected, or which file is damaged.
    """
    path = Path(path)
    try:
        return _resolve(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _resolve(path: Path) -> Path:
    if is_named(path):
        return _named(RunDirectory(path.parent), path.name)
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    run = RunDirectory(path)
    if newest := run.newest_valid():
        return newest[1]
    expected = f"expected a model (config.json, safetensors), a checkpoint with {MANIFEST}, or a run that has one"
    if not path.is_dir():
        what = "not a directory" if path.exists() else f"does not exist{did_you_mean(path)}"
    elif run.checkpoints_dir.is_dir():
        what = "a run without a complete checkpoint"
    elif names := sorted(entry.name for entry in path.iterdir()):
        what = f"not a checkpoint, or an incomplete one; it holds {', '.join(names[:5])}{', …' if names[5:] else ''}"
    else:
        what = "an empty directory"
    raise CheckpointError(f"{path}: {what}; {expected}")


def is_named(path: Path) -> bool:
    """Whether `path` is `RUN/best`, `RUN/last` or `RUN/300`, and nothing else of that name is there."""
    called = path.name in NAMES or (path.name.isdecimal() and path.name.isascii())
    return called and (path.is_symlink() or not path.exists()) and (path.parent / RUN).is_file()


def _named(run: RunDirectory, name: str) -> Path:
    """The verified checkpoint of that name or step."""
    if name == LAST and (newest := run.newest_valid()):
        return newest[1]
    kept = run.checkpoints()
    step = int(name) if name.isdecimal() else _linked(run.path / name)
    for found, path in kept:
        if found == step:
            verify(path)
            return path
    there = f"it has {', '.join(str(step) for step, _ in kept)}" if kept else "it has none"
    why = f"no checkpoint of step {step}" if step is not None else f"no checkpoint is called {name} (nothing validated)"
    raise CheckpointError(f"{run.path}: {why}; {there}")


def _linked(link: Path) -> int | None:
    """The step of the checkpoint that a link of a run leads to, whether it is there or not; None for any other."""
    if not link.is_symlink():
        return None
    folder, _, name = os.readlink(link).rpartition("/")
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and folder == "checkpoints" else None


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        _log.warning("damaged checkpoint passed over: %s", error)
        return False
    return True
