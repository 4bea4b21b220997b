"""One tree of errors. Each class carries the process exit code and the HTTP status it ends in.

    ManyhandsError            1 / 500   something the program could not do
    ├─ UserError              2 / 400   the input is wrong, and the message says what would be right
    │  ├─ ConfigError                   a description of a model or run that cannot be
    │  ├─ DataError                     text that cannot be read or is not enough
    │  └─ CheckpointError               a directory that is not a checkpoint, or a damaged one
    ├─ RunLocked              1 / 409   another process is using the run directory
    ├─ StorageError           1 / 507   the disk refused a write; what was there before is intact
    ├─ DiskError              1 / 500   experts that lie on disk could not be read while the model ran
    ├─ TrainingHalted         3 / 500   a guard stopped the run: NaN, Inf, too many spikes
    ├─ CheckFailed            4 / 500   a fast path disagrees with the oracle
    ├─ Interrupted          143 / 503   SIGTERM (SIGINT: 130); the state was saved
    ├─ ProcessLost            1 / 500   another process of this job died without a word
    └─ EndedElsewhere         1 / 500   another process of this job failed and said why; this one says nothing

Raise `UserError` and its children for a user's mistake; `assert` is for our own bugs.
"""


class ManyhandsError(Exception):
    """Base of every error this package raises on purpose. The message is one line for a person."""

    exit_code = 1
    http_status = 500


class UserError(ManyhandsError):
    """Something the user gave is wrong."""

    exit_code = 2
    http_status = 400


class ConfigError(UserError):
    """A model or run description that is malformed or contradicts itself."""


class DataError(UserError):
    """Text that is missing, unreadable or too little."""


class CheckpointError(UserError):
    """Not a checkpoint, an incomplete one, or one whose bytes do not match its manifest."""


class RunLocked(ManyhandsError):
    """The run directory is in use by another live process."""

    http_status = 409


class StorageError(ManyhandsError):
    """A write failed (disk full, permission). Nothing that existed before was changed."""

    http_status = 507


class DiskError(ManyhandsError):
    """A model's experts lie on disk and could not be read: the disk refused, or a file is not what it was."""


class TrainingHalted(ManyhandsError):
    """A guard stopped training before any weight was changed by the offending step."""

    exit_code = 3


class CheckFailed(ManyhandsError):
    """`manyhands check` found a disagreement with the oracle."""

    exit_code = 4


class Interrupted(ManyhandsError):
    """SIGTERM or SIGINT arrived and the state was saved."""

    exit_code = 143
    http_status = 503


class ProcessLost(ManyhandsError):
    """Another process of the same job (torchrun) is no longer there, and did not say why."""


class EndedElsewhere(ManyhandsError):
    """Another process of the same job failed and said why. This one ends with its exit code, and prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process of this job failed with exit code {exit_code}, and said why")
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """What a process that `error` ends exits with."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, ManyhandsError) else 1
