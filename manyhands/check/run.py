"""The whole check: the model in every case, backend, dtype and mode, then everything else by itself."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf

import torch

from manyhands.check.adapted import adapted_jobs
from manyhands.check.attentions import ATTENTIONS, AttentionCheck
from manyhands.check.cases import CASES, possible
from manyhands.check.coverage import counting, coverage_row, expected
from manyhands.check.decoding import FORMATS, ROWS, DecodingCheck, small_models
from manyhands.check.edited import EditedCheck, editable
from manyhands.check.encoder_decoder import EncoderDecoderCheck
from manyhands.check.model import DTYPES, ModelCheck, Routings
from manyhands.check.numbers import number_rows
from manyhands.check.own import own_rows
from manyhands.check.parts import part_jobs
from manyhands.check.recurrent import RecurrentCheck, shrink_recurrent
from manyhands.check.report import CheckReport, Row, Situation
from manyhands.check.routers import ROUTERS, D, F, RouterCheck, layer_config
from manyhands.check.shrink import shrink
from manyhands.check.shrink_encoder_decoder import shrink_encoder_decoder
from manyhands.check.sizes import layer_jobs, loss_head, wide_expert
from manyhands.check.stored import PACKED, stored_rows
from manyhands.checkpoint.source import Source
from manyhands.config import BalanceConfig, BuiltConfig, EncoderDecoderConfig, ModelConfig, RecurrentConfig, suggest
from manyhands.config.activation import GATED
from manyhands.engine.mode import one_thread
from manyhands.errors import ConfigError
from manyhands.kernels import BACKENDS, ExpertWeights, backend_names, check_name, native

Progress = Callable[[str, int, int], None]
Job = tuple[str, str, str, Callable[[], Iterator[tuple[list[Row], Routings]]]]


def run_check(
    config: BuiltConfig,
    balance: BalanceConfig,
    *,
    seed: int = 0,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[str] = CASES,
    decoding: bool = True,
    routers: bool = True,
    source: Source | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Hold the shrunk `config` against the float64 oracle, in training and, with `decoding`, in generation.

    With `routers` also everything that is not this model: every router, attention, packed format and size at which
    something else runs; it then fails too if a native fast path never ran. `source` is an opened checkpoint whose own
    weights are held against the oracle too (`own.py`). `backends` and `dtypes` default to all
    there are; `cases` are routing cases for the model (`cases.py`). `progress(what, done, total)` is called before
    each part and at the end. Weights and data are random, from `seed`. Raises `ConfigError` for an unknown backend or
    dtype; a failed comparison is in the report, not raised.
    """
    started = time.perf_counter()
    small = shrunk(config)
    report = CheckReport(small, shrunk=small != config)
    everything = backends is None and dtypes is None and decoding and routers
    backends, dtypes = _names(backends, dtypes)
    jobs: list[Job] = []
    if source is not None:
        jobs.append(("own weights", "checkpoint", "–", lambda: own_rows(source, report, seed)))
    jobs += list(_model_jobs(report, small, balance, seed, backends, dtypes, cases))
    if decoding and isinstance(small, ModelConfig):
        jobs += _decoding_jobs(report, {"model": small}, seed, dtypes, list(FORMATS))
        jobs += _edited_jobs(report, {"model": small}, seed, dtypes, EDITED)
    if routers:
        jobs += _router_jobs(report, seed, backends, dtypes)
        jobs += layer_jobs(seed, backends, dtypes)
        jobs += _part_jobs(seed, backends, dtypes)
        if decoding:
            for number, (name, model) in enumerate(small_models().items()):
                formats = ["plain", list(FORMATS)[1 + number % (len(FORMATS) - 1)]]
                jobs += _decoding_jobs(report, {name: model}, seed, dtypes, formats, (ROWS[number % len(ROWS)],))
                if editable(model):
                    jobs += _edited_jobs(report, {name: model}, seed, dtypes, formats)
            jobs += _stored_jobs(report, seed, dtypes)
    with counting() as calls:
        _do(report, jobs, progress, calls)
    report.calls = dict(calls)
    if not native.available():
        report.skipped.append(f"the native library: {native.missing()}")
    elif everything:
        report.rows.append(coverage_row(calls))
    elif idle := [name for name in expected() if not calls[name]]:
        report.skipped.append(f"fast paths that this part of the check does not run: {', '.join(idle)}")
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
    names = [check_name(name) for name in (backend_names() if backends is None else backends)]
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: " + suggest(dtype, list(DTYPES)))
    return names, list(DTYPES if dtypes is None else dtypes)


def _model_jobs(
    report: CheckReport,
    config: BuiltConfig,
    balance: BalanceConfig,
    seed: int,
    backends: list[str],
    dtypes: list[str],
    cases: Sequence[str],
) -> Iterator[Job]:
    """The whole model in each case, whatever its kind."""
    router = None if config.moe is None else config.moe.router
    for case in cases:
        if not possible(case, router):
            report.skipped.append(f"case {case}: this router cannot come into it")
            continue
        check = _check_of(report, config, balance, case, seed)
        for backend, dtype in _ways(report, config, backends, dtypes):
            yield f"model, {case}", backend, dtype, lambda c=check, b=backend, d=dtype: c.rows(b, d)  # type: ignore[misc]


def _check_of(
    report: CheckReport, config: BuiltConfig, balance: BalanceConfig, case: str, seed: int
) -> ModelCheck | EncoderDecoderCheck | RecurrentCheck:
    if isinstance(config, ModelConfig):
        return ModelCheck(config, balance, case, seed)
    if isinstance(config, RecurrentConfig):
        return RecurrentCheck(config, case, seed)
    check = EncoderDecoderCheck(config, case, seed)
    if not check.decodes:
        report.skipped.append(f"decoding to a cache: {NOT_ALIKE}")
    return check


def shrunk(config: BuiltConfig) -> BuiltConfig:
    """A small model of the same kind."""
    if isinstance(config, EncoderDecoderConfig):
        return shrink_encoder_decoder(config)
    return shrink_recurrent(config) if isinstance(config, RecurrentConfig) else shrink(config)


def _ways(
    report: CheckReport, config: BuiltConfig, backends: list[str], dtypes: list[str]
) -> Iterator[tuple[str, str]]:
    """Backends and dtypes that take the sizes of its experts."""
    moe = config.moe
    for backend in backends:
        for dtype in dtypes:
            sizes = None if moe is None else (config.hidden_size, moe.moe_intermediate_size, moe.hidden_act)
            if sizes is not None and not _runs(backend, dtype, *sizes):
                report.skipped.append(f"{backend} in {dtype}: {NEEDS.get(backend, 'does not take these sizes')}")
                continue
            yield backend, dtype


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


def _decoding_jobs(
    report: CheckReport,
    models: dict[str, ModelConfig],
    seed: int,
    dtypes: list[str],
    formats: list[str],
    batches: Sequence[int] = ROWS,
) -> Iterator[Job]:
    for scope, config in models.items():
        if config.moe is not None and not config.moe.router.causal_safe:
            report.skipped.append(f"decoding of {scope}: its router is not causal, so it cannot generate")
            continue
        for format in formats:
            for dtype in dtypes:
                if format != "plain" and dtype != dtypes[0]:  # the parts by themselves are checked in every dtype
                    continue
                check = DecodingCheck(scope, config, format, dtype, seed)
                yield f"decoding, {scope}", format, dtype, lambda c=check: c.rows(batches)  # type: ignore[misc]


def _edited_jobs(
    report: CheckReport, models: dict[str, ModelConfig], seed: int, dtypes: list[str], formats: Sequence[str]
) -> Iterator[Job]:
    for scope, config in models.items():
        if not editable(config):
            report.skipped.append(f"edited routing of {scope}: {NOT_EDITED}")
            continue
        for format in formats:
            check = EditedCheck(scope, config, format, dtypes[0], seed)
            yield f"edited, {scope}", format, dtypes[0], check.rows


def _stored_jobs(report: CheckReport, seed: int, dtypes: list[str]) -> Iterator[Job]:
    if not native.available():
        report.skipped.append("experts on disk: only the native kernels read them")
        return
    for format, dtype in PACKED:
        if dtype in dtypes:
            yield "experts on disk", format, dtype, lambda f=format, d=dtype: stored_rows(seed, f, d)  # type: ignore[misc]


def _part_jobs(seed: int, backends: list[str], dtypes: list[str]) -> Iterator[Job]:
    """What needs no model around it."""
    for name in ATTENTIONS:
        attention = AttentionCheck(name, seed)
        for dtype in dtypes:
            yield name, "attention", dtype, lambda c=attention, d=dtype: _only(c.rows(d))  # type: ignore[misc]
    for what, dtype, rows in part_jobs(seed, dtypes):
        yield what, "decoding", dtype, lambda r=rows: _only(r())  # type: ignore[misc]
    for what, base, dtype, rows in adapted_jobs(seed, dtypes):
        yield what, base, dtype, lambda r=rows: _only(r())  # type: ignore[misc]
    for dtype in dtypes:
        yield "loss head", "chunks", dtype, lambda d=dtype: _only(loss_head(seed, d))  # type: ignore[misc]
    if "float32" in dtypes:
        yield "experts of 1991 and 1994", "–", "float32", lambda: _only(number_rows(seed))
        for backend in backends:
            yield "a wide expert", backend, "float32", lambda b=backend: _only(wide_expert(seed, b))  # type: ignore[misc]


def _only(rows: Iterable[Row]) -> Iterator[tuple[list[Row], Routings]]:
    """Rows that no routing goes with."""
    yield list(rows), ([], [])


EDITED = ("plain", "int4 experts, int8 linear")
NOT_EDITED = "not every edit can be made: it needs a causal top k with an expert to spare, and three in a group"
NOT_ALIKE = "a token may find an expert full, which depends on how many tokens one call brings"
NEEDS = {"grouped_mm": "needs rows of whole multiples of 16 bytes"}


def _runs(backend: str, dtype: str, width: int, expert_width: int, activation: str) -> bool:
    """Whether the backend takes these sizes."""
    one = torch.zeros((), dtype=DTYPES[dtype])
    rows = expert_width * (2 if activation in GATED else 1)
    weights = ExpertWeights(one.expand(1, rows, width), one.expand(1, width, expert_width), None, None, activation)
    return backend == "auto" or BACKENDS[backend].supports(one.expand(1, width), weights)


@one_thread()  # tiny tensors: on a busy machine, threads that wait for each other cost ten times the work
def _do(
    report: CheckReport, jobs: list[Job], progress: Progress | None, calls: Mapping[str, int] | None = None
) -> None:
    how: dict[bool, list[str]] = {True: [], False: []}
    for done, (what, backend, dtype, compare) in enumerate(jobs):
        if progress is not None:
            progress(f"{what}, {backend}, {dtype}", done, len(jobs))
        fused_before = (calls or {}).get("mh_steps", 0)
        for rows, (_, oracle) in _caught(compare, what, backend, dtype):
            report.rows += rows
            for micro in oracle:
                for routing in micro.values():
                    of = rows[0].situation.dtype if rows else dtype
                    report.flips[of] = report.flips.get(of, 0) + routing.flips
                    report.routed[of] = report.routed.get(of, 0) + len(routing.mask)
        if what == "decoding, model" and calls is not None:
            how[calls.get("mh_steps", 0) > fused_before].append(f"{backend} {dtype}")
    for fused, words in ((True, "in fused steps"), (False, "block by block")):
        if how[fused]:
            report.read.append(f"this model generates {words}: {', '.join(how[fused])}")
    if progress is not None:
        progress("done", len(jobs), len(jobs))


def _caught(
    compare: Callable[[], Iterator[tuple[list[Row], Routings]]], what: str, backend: str, dtype: str
) -> Iterator[tuple[list[Row], Routings]]:
    """What cannot even be computed is a failed row, and the rest goes on."""
    try:
        yield from compare()
    except Exception as error:  # of any kind: it is the object of the check
        at = Situation(what, "–", backend, dtype, "–")
        message = f"{type(error).__name__}: {str(error)[:200]}"
        yield [Row(at, "ran without an error", message, inf, 0.0, 1.0, (message,))], ([], [])
