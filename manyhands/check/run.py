"""The whole check: the model in every case, backend, dtype and mode, then every router by itself."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from manyhands.check.cases import CASES, possible
from manyhands.check.model import DTYPES, ModelCheck, Routings
from manyhands.check.report import CheckReport, Row
from manyhands.check.routers import ROUTERS, D, F, RouterCheck, layer_config
from manyhands.check.shrink import shrink
from manyhands.config import BalanceConfig, ModelConfig, suggest
from manyhands.errors import ConfigError
from manyhands.generate.mode import one_thread
from manyhands.kernels import BACKENDS, check_name
from manyhands.kernels.experts import GATED

Progress = Callable[[str, int, int], None]
Job = tuple[str, str, str, Callable[[], Iterator[tuple[list[Row], Routings]]]]


def run_check(
    config: ModelConfig,
    balance: BalanceConfig,
    *,
    seed: int = 0,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[str] = CASES,
    routers: bool = True,
    progress: Progress | None = None,
) -> CheckReport:
    """Hold the shrunk `config` (and, with `routers`, every router in `ROUTERS`) against the float64 oracle.

    `backends` and `dtypes` default to all there are; `cases` are routing cases for the model (`cases.py`).
    `progress(what, done, total)` is called before each part and at the end. Weights and data are random, from `seed`.
    Raises `ConfigError` for an unknown backend or dtype; a failed comparison is in the report, not raised.
    """
    started = time.perf_counter()
    small = shrink(config)
    report = CheckReport(small, shrunk=small != config)
    backends, dtypes = _names(backends, dtypes)
    jobs = list(_model_jobs(report, small, balance, seed, backends, dtypes, cases))
    if routers:
        jobs += _router_jobs(report, seed, backends, dtypes)
    _do(report, jobs, progress)
    report.seconds = time.perf_counter() - started
    return report


def check_routers(
    *,
    seed: int = 0,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Only the routers of `ROUTERS`, each in a single layer."""
    started = time.perf_counter()
    report = CheckReport(ModelConfig(), shrunk=False)
    backends, dtypes = _names(backends, dtypes)
    _do(report, _router_jobs(report, seed, backends, dtypes), progress)
    report.seconds = time.perf_counter() - started
    return report


def _names(backends: Sequence[str] | None, dtypes: Sequence[str] | None) -> tuple[list[str], list[str]]:
    names = [check_name(name) for name in (BACKENDS if backends is None else backends)]
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: " + suggest(dtype, list(DTYPES)))
    return names, list(DTYPES if dtypes is None else dtypes)


def _model_jobs(
    report: CheckReport,
    config: ModelConfig,
    balance: BalanceConfig,
    seed: int,
    backends: list[str],
    dtypes: list[str],
    cases: Sequence[str],
) -> Iterator[Job]:
    router = None if config.moe is None else config.moe.router
    for case in cases:
        if not possible(case, router):
            report.skipped.append(f"case {case}: this router cannot come into it")
            continue
        check = ModelCheck(config, balance, case, seed)
        for backend in backends:
            for dtype in dtypes:
                if config.moe is not None and not _runs(
                    backend, dtype, config.hidden_size, config.moe.moe_intermediate_size, config.moe.hidden_act
                ):
                    report.skipped.append(f"{backend} in {dtype}: needs rows of whole multiples of 16 bytes")
                    continue
                yield f"model, {case}", backend, dtype, lambda c=check, b=backend, d=dtype: c.rows(b, d)  # type: ignore[misc]


def _router_jobs(report: CheckReport, seed: int, backends: list[str], dtypes: list[str]) -> list[Job]:
    jobs: list[Job] = []
    for name, router in ROUTERS.items():
        for case in CASES:
            if not possible(case, router):
                continue
            check = RouterCheck(name, case, seed)
            for backend in backends:
                for dtype in dtypes:
                    if _runs(backend, dtype, D, F, layer_config(name).hidden_act):
                        what = f"{name}, {case}"
                        jobs.append((what, backend, dtype, lambda c=check, b=backend, d=dtype: c.rows(b, d)))  # type: ignore[misc]
    return jobs


def _runs(backend: str, dtype: str, width: int, expert_width: int, activation: str) -> bool:
    """Whether the backend takes these sizes (`supports_grouped_mm` says the same of tensors)."""
    bytes_each = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    up = expert_width * (2 if activation in GATED else 1)
    return backend != "grouped_mm" or all(n * bytes_each % 16 == 0 for n in (width, expert_width, up))


@one_thread()  # tiny tensors: on a busy machine, threads that wait for each other cost ten times the work
def _do(report: CheckReport, jobs: list[Job], progress: Progress | None) -> None:
    for done, (what, backend, dtype, compare) in enumerate(jobs):
        if progress is not None:
            progress(f"{what}, {backend}, {dtype}", done, len(jobs))
        for rows, (_, oracle) in compare():
            report.rows += rows
            for micro in oracle:
                for routing in micro.values():
                    report.flips[dtype] = report.flips.get(dtype, 0) + routing.flips
                    report.routed[dtype] = report.routed.get(dtype, 0) + len(routing.mask)
    if progress is not None:
        progress("done", len(jobs), len(jobs))
