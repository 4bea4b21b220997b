"""The registry of expert backends. A new one is a `Backend` and a call of `register`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels import policy
from manyhands.kernels.eager import eager
from manyhands.kernels.experts import Bank
from manyhands.kernels.grouped import grouped_mm, supports_grouped_mm
from manyhands.kernels.native.backend import Native, supports_native
from manyhands.kernels.native.library import missing

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Bank], Tensor]
Rule = Callable[[Tensor, Bank], bool]


def _always(x: Tensor, experts: Bank) -> bool:
    return True


def _never(x: Tensor, experts: Bank) -> bool:
    return False


def _here() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to apply experts."""

    name: str
    supports: Rule
    """(x, experts): whether `run` computes this. Where it is asked for by name and does not, `run` raises."""
    run: Run
    """(x_TD, ids_TK, weights_TK, kept_TK, experts) -> y_TD; ids int64, weights float32, kept false where a pair
    overflowed. It works on `experts.in_memory()` or asks for `experts.stacked(ids)`."""
    best: Rule = _never
    """(x, experts): whether `auto` takes it where it supports them: a measured rule of `policy.py`."""
    missing: Callable[[], str | None] = _here
    """Why it is not on this machine, in one clause; None where it is."""


BACKENDS: dict[str, Backend] = {}
"""By name; `auto` asks the last one first."""


def register(backend: Backend) -> None:
    """Make a backend known by its name: to layers, `check --backend`, `bench` and transformers. `auto` takes it only if
    `best` says so. Raises `ConfigError` for a name that is taken."""
    if backend.name == "auto" or backend.name in BACKENDS:
        raise ConfigError(f"backend {backend.name!r}: there is one of this name already")
    BACKENDS[backend.name] = backend


register(Backend("eager", _always, eager, _always))
register(Backend("grouped_mm", supports_grouped_mm, grouped_mm, policy.grouped_mm_is_best))
register(Backend("native", supports_native, Native(), policy.native_is_best, missing))


def backend_names() -> list[str]:
    """The backends on this machine."""
    return [name for name, backend in BACKENDS.items() if backend.missing() is None]


def check_name(name: str) -> str:
    """`name` if it is `auto` or a backend that is here; otherwise `ConfigError` with the nearest one."""
    if name == "auto":
        return name
    if name not in BACKENDS:
        raise ConfigError(f"experts_implementation = {name!r}: " + suggest(name, ["auto", *backend_names()]))
    if (why := BACKENDS[name].missing()) is not None:
        raise ConfigError(f"experts_implementation = {name!r}: the kernels are not here: {why}")
    return name


def choose(x: Tensor, experts: Bank) -> str:
    """The backend `auto` stands for: the last registered that supports these and is best for them."""
    for name in reversed(list(BACKENDS)):
        if BACKENDS[name].supports(x, experts) and BACKENDS[name].best(x, experts):
            return name
    return "eager"
