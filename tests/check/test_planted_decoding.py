"""Faults planted in what only decoding runs, or one kind of attention: the check must be red and name the place."""

import ctypes
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

import manyhands.check.run
import manyhands.kernels.native.backend
import manyhands.layers.attention
import manyhands.layers.cross_entropy
import manyhands.layers.latent_attention
import manyhands.layers.rope
import manyhands.models.decoder
import manyhands.moe.router
import manyhands.moe.routing
import manyhands.quant.packed
from manyhands.check import ROUTERS, Row, run_check
from manyhands.check.attentions import ATTENTIONS, AttentionCheck
from manyhands.check.coverage import counting, coverage_row, expected
from manyhands.check.decoding import FORMATS, DecodingCheck, small_models
from manyhands.check.parts import part_jobs
from manyhands.check.sizes import layer_jobs, loss_head, wide_expert
from manyhands.engine.caches import Caches
from manyhands.kernels import linear, native
from manyhands.kernels.native import library, step
from manyhands.layers.attention import Attention
from manyhands.layers.norm import RMSNorm
from manyhands.moe import Router
from tests.check.configs import BALANCE, MIXTRAL

needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels")
MODELS = small_models()


def attention_rows(*names: str, dtype: str = "float32") -> list[Row]:
    return [row for name in names or ATTENTIONS for row in AttentionCheck(name, 0).rows(dtype)]


def part_rows(*parts: str) -> list[Row]:
    found = list(part_jobs(0, ["float32"]))
    assert not set(parts) - {what for what, _, _ in found}
    return [row for what, _, rows in found if not parts or what in parts for row in rows()]


def decoding_rows(name: str = "", format: str = "plain", rows: int = 3) -> list[Row]:
    name = name or next(iter(MODELS))
    check = DecodingCheck(name, MODELS[name], format, "float32", 0)
    ran = manyhands.check.run._caught(lambda: check.rows((rows,)), "decoding", format, "float32")
    return [row for found, _ in ran for row in found]


def red(rows: Iterable[Row]) -> set[str]:
    """The quantities that failed."""
    return {row.quantity for row in rows if not row.ok}


def scopes(rows: Iterable[Row]) -> set[str]:
    return {row.situation.scope for row in rows if not row.ok}


def test_green():
    """The parts are in `test_whole`."""
    rows = attention_rows() + attention_rows("multi-head", dtype="bfloat16")
    assert not red(rows), [row.line() for row in rows if not row.ok]


@pytest.mark.parametrize("format", FORMATS)
def test_green_decoding(format):
    for name in list(MODELS)[1::6]:
        rows = decoding_rows(name, format)
        assert not red(rows), [row.line() for row in rows if not row.ok]


def test_every_router_and_attention_is_decoded():
    names = " ".join(MODELS)
    continued = {name for name, model in ATTENTIONS.items() if model.longest_continued >= 64}
    assert set(ATTENTIONS) - continued == {"LongRoPE, long"}  # nothing that is cached stays right beyond its length
    assert all(name in names for name in continued)
    assert all(name in names for name, router in ROUTERS.items() if router.causal_safe)


def test_everything_is_a_job(monkeypatch):
    jobs = []
    monkeypatch.setattr(manyhands.check.run, "_do", lambda report, todo, *_: jobs.extend(todo))
    report = run_check(MIXTRAL, BALANCE)
    what = {job[0] for job in jobs}
    assert what >= {
        *ATTENTIONS,
        "norms and linears",
        "routing of few tokens",
        "int4 records",
        "loss head",
        "a wide expert",
    }
    assert ("experts on disk" in what) == native.available()
    assert what >= {f"decoding, {name}" for name in ("model", *MODELS)}
    assert {job[1] for job in jobs if job[0].startswith("decoding, ")} >= set(FORMATS)
    if native.available():  # nothing ran, and that is said
        assert red(report.rows) == {"fast paths that ran"}
        assert set(report.failures[0].failing) == set(expected())


@needs_native
def test_what_ran_is_counted():
    with counting() as calls:
        decoding_rows()
    assert calls["mh_steps"] and calls["mh_steps: route"] and calls["mh_steps: attend"]
    assert "mh_backward" in coverage_row(calls).failing


# ---- fast paths of decoding ----


@needs_native
def test_wrong_experts_for_few_tokens(monkeypatch):
    right = step.route

    def wrong(router, x, *rest):
        logits, scores, ids, weights = right(router, x, *rest)
        return logits, scores, (ids + 1) % router.experts, weights

    monkeypatch.setattr(step, "route", wrong)
    assert red(part_rows("routing of few tokens")) >= {"routing of few tokens: expert choice"}


@needs_native
@pytest.mark.parametrize(("name", "part", "quantity"), [
    ("linears", "norms and linears", "linears"),
    ("rms_norm", "norms and linears", "norm"),
])  # fmt: skip
def test_doubled_for_few_rows(monkeypatch, name, part, quantity):
    right = getattr(step, name)

    def twice(*arguments):
        y = right(*arguments)
        return [2 * t for t in y] if isinstance(y, list) else 2 * y

    monkeypatch.setattr(step, name, twice)
    assert red(part_rows(part)) == {quantity}


@needs_native
def test_attention_to_a_cache_doubled(monkeypatch):
    right = step.attend
    monkeypatch.setattr(step, "attend", lambda *a, **k: 2 * right(*a, **k))
    assert red(attention_rows("multi-head", "latent (Moonlight)")) == {"attention to a cache"}


@needs_native
@pytest.mark.parametrize("fault", ["raises", "states", "route", "place"])
def test_fused_step(monkeypatch, fault):
    call, held = library.call, []

    def broken(name, *arguments):
        if name == "mh_steps":
            steps = ctypes.cast(arguments[0], ctypes.POINTER(library.CStep))
            if fault == "raises":
                raise RuntimeError("broken on purpose")
            for i in range(arguments[1]):
                if fault == "states" and steps[i].kind == 6:  # what is added is doubled
                    steps[i].factor = 2.0
                if fault == "place" and steps[i].kind == 2:  # keys and values one place too early
                    who = ctypes.cast(steps[i].a[3], ctypes.POINTER(library.CSequences))[0]
                    first = ctypes.cast(who.first, ctypes.POINTER(ctypes.c_int64))
                    early = (ctypes.c_int64 * who.count)(*(first[s] - 1 for s in range(who.count)))
                    moved = library.CSequences.from_buffer_copy(who)
                    moved.first, steps[i].a[3] = ctypes.addressof(early), ctypes.addressof(moved)
                    held.append((early, moved))
                if fault == "route" and steps[i].kind == 4:
                    router = ctypes.cast(steps[i].a[0], ctypes.POINTER(library.CRouter))
                    router[0].renormalise = not router[0].renormalise
        return call(name, *arguments)

    monkeypatch.setattr(library, "call", broken)
    if fault == "raises":
        report = run_check(MIXTRAL, BALANCE, backends=["eager"], dtypes=["float32"], cases=[], routers=False)
        assert "ran without an error" in red(report.rows)
        return
    places = {"decoding: states", "decoding: logits", "decoding: router weights", "ran without an error"}
    assert red(decoding_rows()) & places


def _told(monkeypatch, function: str, place: int, struct: type, **wrong) -> None:
    """Change what a native function is told, as if it read the field wrongly. `zero` fields only where they are set."""
    call = library.call

    def changed(name, *arguments):
        if name == function:
            pointer = ctypes.cast(arguments[place], ctypes.POINTER(struct))
            for field, value in wrong.items():
                if getattr(pointer[0], field):
                    setattr(pointer[0], field, value)
        return call(name, *arguments)

    monkeypatch.setattr(library, "call", changed)


WINDOWS = {"window (Mistral)", "sinks, window, YaRN (gpt-oss)", "latent, window, biases"}


@needs_native
@pytest.mark.parametrize(("function", "place", "struct", "field", "value", "kinds"), [
    ("mh_attend", 0, library.CAttention, "cap", 0.0, {"soft cap (Grok-1)"}),
    ("mh_attend", 0, library.CAttention, "sinks", None, {"sinks, window, YaRN (gpt-oss)"}),
    ("mh_attend", 0, library.CAttention, "window", 0, WINDOWS),
    ("mh_attend", 0, library.CAttention, "scale", 1.0, None),
])  # fmt: skip
def test_native_attention_that_reads_a_field_wrongly(monkeypatch, function, place, struct, field, value, kinds):
    _told(monkeypatch, function, place, struct, **{field: value})
    rows = attention_rows()
    assert red(rows) == {"attention to a cache"}
    native_kinds = {name for name in ATTENTIONS if "without a kernel" not in name and not name.startswith("chunks")}
    assert scopes(rows) == (native_kinds if kinds is None else kinds)


@needs_native
@pytest.mark.parametrize(("field", "value", "kind"), [
    ("interleave", 0, "neighbouring pairs"),
    ("norms", 2, "norm of each head (Qwen3)"),
    ("norms", 2, "half rotated (GLM-4.5)"),
])  # fmt: skip
def test_a_step_that_reads_the_rotation_wrongly(monkeypatch, field, value, kind):
    call = library.call

    def changed(name, *arguments):
        if name == "mh_steps":
            steps = ctypes.cast(arguments[0], ctypes.POINTER(library.CStep))
            for i in range(arguments[1]):
                if steps[i].kind == 2:
                    rotation = ctypes.cast(steps[i].a[4], ctypes.POINTER(library.CRotation))[0]
                    setattr(rotation, field, value)
        return call(name, *arguments)

    (name,) = [name for name in MODELS if kind in name]
    assert not red(decoding_rows(name))
    monkeypatch.setattr(library, "call", changed)
    assert red(decoding_rows(name)) & {"decoding: states", "decoding: logits"}


@needs_native
@pytest.mark.parametrize(("field", "value", "which"), [
    ("sigmoid", 0, lambda r: r.score == "sigmoid"),
    ("choice_bias", None, lambda r: r.bias),
    ("renormalise", 0, lambda r: r.norm_topk_prob and r.num_experts_per_tok > 1),
    ("best_of_group", 3, lambda r: r.n_group > 1),
    ("scaling", 1.0, lambda r: r.routed_scaling_factor != 1.0),
])  # fmt: skip
def test_native_routing_that_reads_a_field_wrongly(monkeypatch, field, value, which):
    _told(monkeypatch, "mh_route", 0, library.CRouter, **{field: value})
    rows = part_rows("routing of few tokens")
    found = scopes(rows)
    simple = {n for n, r in ROUTERS.items() if r.select == "topk" and r.eval_capacity_factor is None}
    assert found and found <= {n for n in simple if which(ROUTERS[n])}


def test_a_mask_that_forgets_padding(monkeypatch):
    def forgets(right):
        return lambda real, *rest: right(torch.ones_like(real), *rest)

    for name in ("causal_mask", "start_of"):  # for PyTorch, for the native kernels
        monkeypatch.setattr(manyhands.models.decoder, name, forgets(getattr(manyhands.models.decoder, name)))
    assert {"attention", "attention to a cache"} <= red(attention_rows("multi-head"))


def test_positions_that_count_padding(monkeypatch):
    right = manyhands.models.decoder.rope_tables
    monkeypatch.setattr(manyhands.models.decoder, "rope_tables", lambda c, d, p, *whole: right(c, d, p * 2, *whole))
    assert {"attention", "attention to a cache"} <= red(attention_rows("multi-head"))


@needs_native
def test_a_bias_prepared_once_for_ever(monkeypatch):
    kept = {}
    right = linear.for_native

    def prepared(weight, bias, width):
        return kept.setdefault(id(weight), (weight, right(weight, bias, width)))[1]

    monkeypatch.setattr(linear, "for_native", prepared)
    (rows,) = [list(rows()) for what, _, rows in part_jobs(0, ["bfloat16"]) if what == "norms and linears"]
    wrong = [row for row in rows if not row.ok]
    assert {row.worst for row in wrong} == {"linear, bias"}
    assert {row.situation.mode for row in wrong} == {"decode, 1 rows, new weights", "decode, 16 rows, new weights"}


# ---- packed records ----


def _scaled(right, at):
    def wrong(*arguments):
        values, scales = right(*arguments)
        if scales is not None:
            scales = scales.clone()
            scales.view(-1)[at] = 0
        return values, scales

    return wrong


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_scales_written_wrong(monkeypatch, format):
    monkeypatch.setattr(manyhands.quant.packed, "encode", _scaled(manyhands.quant.packed.encode, slice(0, 4)))
    assert "rounding (plain rounding is 1)" in red(part_rows(f"{format} records"))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_scales_read_wrong(monkeypatch, format):
    right = manyhands.quant.packed.decode

    def wrong(weight, scales, matrix):
        return 1.5 * right(weight, scales, matrix)

    monkeypatch.setattr(manyhands.quant.packed, "decode", wrong)
    assert "packed records" in red(part_rows(f"{format} records"))


@needs_native
@pytest.mark.parametrize("format", ["int8", "int4", "bf16", "float32"])
def test_kernels_of_packed_experts(monkeypatch, format):
    right = manyhands.kernels.native.backend.packed_experts
    monkeypatch.setattr(manyhands.kernels.native.backend, "packed_experts", lambda *a: 1.02 * right(*a))
    found = red(part_rows(f"{format} records"))
    assert found <= {"packed experts", "packed experts: slope", "packed experts gradients"}
    assert "packed experts: slope" in found


# ---- kinds of attention ----


def test_rotation_without_interleave(monkeypatch):
    for module in (manyhands.layers.attention, manyhands.layers.latent_attention):
        right = module.apply_rope
        monkeypatch.setattr(module, "apply_rope", lambda x, tables, _, f=right: f(x, tables, False))
    assert {"neighbouring pairs", "latent (Moonlight)"} <= scopes(attention_rows())


def test_norm_of_the_wrong_width(monkeypatch):
    forward = RMSNorm.forward

    def by_halves(self, x):
        if x.shape[-1] < 32:
            return forward(self, x)
        one, two = x.chunk(2, -1)
        both = torch.cat([t / (t.float().square().mean(-1, keepdim=True) + self.eps).sqrt() for t in (one, two)], -1)
        return both * self.weight

    monkeypatch.setattr(RMSNorm, "forward", by_halves)
    found = scopes(attention_rows())
    assert {"norm of the full width (OLMoE)", "latent (Moonlight)"} <= found
    assert "norm of each head (Qwen3)" not in found


def test_latent_without_its_norm(monkeypatch):
    init = manyhands.layers.latent_attention.LatentAttention.__init__

    def without(self, *arguments):
        init(self, *arguments)
        self.kv_a_layernorm.forward = lambda x: x * self.kv_a_layernorm.weight

    monkeypatch.setattr(manyhands.layers.latent_attention.LatentAttention, "__init__", without)
    assert scopes(attention_rows()) == {name for name in ATTENTIONS if name.startswith("latent")}


@pytest.mark.parametrize("off_by", [-1, 1])
def test_window(monkeypatch, off_by):
    right = manyhands.models.decoder.causal_mask

    def wrong(real, n, window, plain, chunk=None):
        return right(real, n, window and window + off_by, plain, chunk and chunk + off_by)

    monkeypatch.setattr(manyhands.models.decoder, "causal_mask", wrong)
    windows = {n for n, c in ATTENTIONS.items() if c.attention.sliding_window or c.attention.attention_chunk_size}
    assert scopes(attention_rows()) == windows


@pytest.mark.parametrize(("field", "value", "kind"), [
    ("rotates", True, "no rotation, queries by position (Llama 4)"),
    ("eps", 0.0, "chunks, norm without weights (Llama 4)"),
])  # fmt: skip
def test_layers_of_llama_4(monkeypatch, field, value, kind):
    right = Attention.__init__

    def wrong(self, *arguments):
        right(self, *arguments)
        setattr(self, field, value)

    monkeypatch.setattr(Attention, "__init__", wrong)
    assert scopes(attention_rows()) == {kind}


def test_queries_by_position_from_one_late(monkeypatch):
    right = manyhands.models.decoder._temperature
    monkeypatch.setattr(manyhands.models.decoder, "_temperature", lambda config, at_BS: right(config, at_BS - 1))
    assert scopes(attention_rows()) == {"no rotation, queries by position (Llama 4)"}


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear"])
def test_rotation_of_long_contexts(monkeypatch, kind):
    right = manyhands.layers.rope.inverse_frequencies

    def plain(config, *rest):
        return right(config.model_copy(update={"rope_type": "default"}) if config.rope_type == kind else config, *rest)

    monkeypatch.setattr(manyhands.layers.rope, "inverse_frequencies", plain)
    assert scopes(attention_rows()) == {name for name, c in ATTENTIONS.items() if c.rope.rope_type == kind}


def test_temperature_of_yarn(monkeypatch):
    right = manyhands.layers.rope.inverse_frequencies
    monkeypatch.setattr(manyhands.layers.rope, "inverse_frequencies", lambda *a: (right(*a)[0], 1.0))
    assert {"YaRN", "sinks, window, YaRN (gpt-oss)"} <= scopes(attention_rows())
    monkeypatch.undo()
    monkeypatch.setattr(manyhands.layers.latent_attention, "yarn_mscale", lambda factor, mscale=1.0: 1.0)
    assert scopes(attention_rows()) == {"latent, low-rank queries, YaRN (DeepSeek-V3)"}


def test_sinks_and_cap_forgotten(monkeypatch):
    right = manyhands.layers.attention.attend

    def without(q, k, v, mask, scale, cap, sinks):
        return right(q, k, v, mask, scale, None, torch.full_like(sinks, -torch.inf))

    monkeypatch.setattr(manyhands.layers.attention, "attend", without)
    assert scopes(attention_rows()) == {"sinks, window, YaRN (gpt-oss)", "soft cap (Grok-1)"}


# ---- sizes ----


def test_second_chunk_of_the_loss_head(monkeypatch):
    assert not red(loss_head(0, "float32"))
    right = torch.nn.functional.linear

    def wrong(a, b, bias=None):
        return right(a, b, bias) * (3.0 if len(a) == 37 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    rows = list(loss_head(0, "float32"))
    assert red(rows) == {"loss", "loss head gradients"}
    assert "states of chunk 1" not in rows[1].failing and "states of chunk 2" in rows[1].failing


def _layer_rows(what: str) -> list[Row]:
    ((_, _, _, rows),) = [job for job in layer_jobs(0, ["eager"], ["float32"]) if job[0] == what]
    return [row for found, _ in rows() for row in found]


def test_large_top_k(monkeypatch):
    what = "5000 tokens, tied"
    assert not red(_layer_rows(what))
    keys = torch.arange

    def backwards(*arguments, **more):  # the low bits of the keys, which break ties
        return keys(*arguments, **more) if len(arguments) < 3 else keys(*arguments, **more).flip(0)

    monkeypatch.setattr(torch, "arange", backwards)
    assert red(_layer_rows(what)) & {"expert choice", "router weights", "output"}


@needs_native
def test_expert_whose_rows_span_two_groups(monkeypatch):
    assert not red(wide_expert(0, "native"))
    call = library.call

    def last_rows_lost(name, *arguments):
        if name == "mh_backward":
            rows = ctypes.cast(arguments[4], ctypes.POINTER(library.CRows))[0]
            tail = (rows.count - 200) * rows.stride * 4
            ctypes.memset(rows.data + tail, 0, 200 * rows.stride * 4)
        return call(name, *arguments)

    monkeypatch.setattr(library, "call", last_rows_lost)
    assert red(wide_expert(0, "native")) == {"wide expert gradients"}


def test_bias_of_selection_forgotten_for_few(monkeypatch):
    forward = Router.forward

    def few(self, x, *rest):
        if x.shape[0] > 16 or self.e_score_correction_bias is None:
            return forward(self, x, *rest)
        routing = forward(self, x, *rest)
        ids = manyhands.moe.routing.top_k_stable(routing.scores, self.config.num_experts_per_tok)
        return replace(routing, expert_ids=ids)

    monkeypatch.setattr(Router, "forward", few)
    rows = [row for row in part_rows("routing of few tokens") if not row.ok]
    assert {row.situation.scope for row in rows} == {name for name, r in ROUTERS.items() if r.bias}
    assert all(int(row.situation.mode.split()[1]) <= 16 for row in rows)


@pytest.mark.parametrize("format", ["plain", "int4 experts"])
def test_a_block_of_the_cache_that_somebody_wrote_to(format, monkeypatch):
    new = Caches.new

    def damaged(self, table=None, length=0):
        for pool in self.pools if length else ():
            pool.buffers[0][table.ids[0], :, 5:9] *= 2
        return new(self, table, length)

    monkeypatch.setattr(Caches, "new", damaged)
    rows = [row for row in decoding_rows(format=format) if not row.ok]
    assert {row.situation.mode for row in rows} == {"prefix cache, 2 rows"} and "decoding: logits" in red(rows)
