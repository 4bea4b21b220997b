"""The check is green on what is right, in every backend, dtype and mode, and its report says what was compared."""

import io
import json

import pytest
from rich.console import Console

from manyhands.check import ROUTERS, CheckReport, Row, Situation, check_routers, render, run_check
from manyhands.check.cases import CASES, possible
from manyhands.check.model import MODES
from manyhands.check.sizes import FEW, layer_jobs
from manyhands.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from manyhands.errors import CheckFailed, ConfigError
from manyhands.kernels import backend_names, native
from tests.check.configs import BALANCE, DEEPSEEK, MIXTRAL, MOONLIGHT


def _assert_green(report: CheckReport) -> None:
    assert report.ok, "\n".join(row.line() for row in report.failures)


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK], ids=["mixtral", "deepseek-v3"])
def test_green(config):
    report = run_check(config, BALANCE, routers=False, decoding=False)
    _assert_green(report)
    where = [row.situation for row in report.rows if row.situation.mode in ("forward", *MODES)]
    assert {s.case for s in where} == set(CASES)
    assert {s.backend for s in where} == set(backend_names())
    assert {s.dtype for s in where} == {"float32", "bfloat16"}
    assert {s.mode for s in where} == {"forward", *MODES}
    assert report.flips["float32"] == 0
    assert report.flips["bfloat16"] < report.routed["bfloat16"] / 20


def test_green_moonlight():
    _assert_green(
        run_check(MOONLIGHT, BALANCE, routers=False, decoding=False, backends=["grouped_mm"], dtypes=["float32"])
    )


def test_every_term_in_the_step():
    every = BalanceConfig(
        aux_scope="sequence", importance_coef=0.1, load_coef=0.1, orthogonality_coef=0.1, variance_coef=0.1
    )
    noisy = ModelConfig(num_hidden_layers=2, moe=MoEConfig(router=RouterConfig(noisy=True, capacity_factor=1.0)))
    _assert_green(run_check(noisy, every, routers=False, decoding=False, backends=["grouped_mm"], dtypes=["float32"]))


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(select="hash", num_experts_per_tok=1),
        RouterConfig(select="expert_choice"),
        RouterConfig(num_experts_per_tok=1, jitter=0.01, capacity_factor=1.25, init="switch"),
    ],
    ids=["hash", "expert choice", "switch"],
)
def test_other_routers_in_a_model(router):
    config = ModelConfig(num_hidden_layers=2, moe=MoEConfig(router=router, hidden_act="gelu", expert_bias=True))
    _assert_green(run_check(config, BalanceConfig(), routers=False, decoding=False, backends=["grouped_mm"]))


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(select="positive", score="relu", norm_topk_prob=False),
        RouterConfig(bias=True, bias_on="logit", score="sigmoid"),
        RouterConfig(select="sparsemixer", norm_topk_prob=False, mixer_epsilon=0.3),
        RouterConfig(select="base", num_experts_per_tok=1),
    ],
    ids=["remoe", "quantile", "sparsemixer", "base"],
)
def test_routers_with_a_state_or_a_draw_in_the_step(router):
    config = ModelConfig(num_hidden_layers=2, moe=MoEConfig(router=router))
    balance = BalanceConfig(bias_update="quantile", simbal_coef=0.1, l1_coef=0.1)
    how = {"backends": ["eager"], "dtypes": ["float32"], "cases": ["random"]}
    _assert_green(run_check(config, balance, routers=False, decoding=False, **how))


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_it_says_how_the_model_generates():
    """A shrunk model must be one that the fast paths take where they take the model itself."""
    for config in (MIXTRAL, DEEPSEEK):  # whose latent attention alone is called as a module
        report = run_check(config, BALANCE, backends=["eager"], cases=[], dtypes=["float32"], routers=False)
        _assert_green(report)
        (said,) = [line for line in report.read if line.startswith("this model generates")]
        assert "in fused steps" in said and "int4 experts, int8 linear float32" in said


def test_dense_model():
    _assert_green(
        run_check(ModelConfig(num_hidden_layers=2), BALANCE, routers=False, decoding=False, backends=["eager"])
    )


def test_every_router():
    """By one backend: the command compares the others too, and they differ in the sums alone."""
    steps, backend = [], "native" if native.available() else "eager"
    report = check_routers(backends=[backend], progress=lambda what, done, total: steps.append((done, total)))
    _assert_green(report)
    for dtype in ("float32", "bfloat16"):
        assert {row.situation.scope for row in report.rows if row.situation.dtype == dtype} == set(ROUTERS)
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]


def test_few_tokens_of_routers_that_look_at_all_of_them():
    jobs = [job for job in layer_jobs(0, ["eager"], ["float32"]) if job[0] == f"{FEW} tokens, random"]
    found = [row for _, _, _, rows in jobs for row_list, _ in rows() for row in row_list]
    assert all(row.ok for row in found), [row.line() for row in found if not row.ok]
    assert {row.situation.scope for row in found} >= {name for name, r in ROUTERS.items() if not r.causal_safe}


def test_cases_are_what_they_say():
    from manyhands.check.routers import RouterCheck

    for name, router in ROUTERS.items():
        for case in filter(lambda case: possible(case, router), ("one_expert", "empty")):
            check = RouterCheck(name, case, seed=0)
            counts = check.layer.eval()(check.x, check.mask, check.ids)[1].expert_counts()
            if case == "one_expert":
                assert (counts > 0).sum() == router.num_experts_per_tok, name
            assert (counts == 0).any(), name


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="eager"):
        run_check(MIXTRAL, BALANCE, backends=["eagre"])
    with pytest.raises(ConfigError, match="float32"):
        run_check(MIXTRAL, BALANCE, dtypes=["float23"])


def test_any_failing_row_fails_the_report():
    at = Situation("model", "random", "eager", "float32", "plain")
    good = Row(at, "loss", "loss", 1e-7, 1e-4, 1.0)
    bad = Row(at, "gradients", "norm.weight", float("inf"), 1e-4, float("inf"), ("norm.weight",))
    report = CheckReport(MIXTRAL, shrunk=False, rows=[good])
    report.raise_if_failed()
    report.rows.append(bad)
    assert not report.ok
    with pytest.raises(CheckFailed, match=r"norm\.weight") as caught:
        report.raise_if_failed()
    assert caught.value.exit_code == 4
    assert not CheckReport(MIXTRAL, shrunk=False).ok  # nothing compared is not a pass
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (plain["ok"], plain["failed"], plain["rows"][1]["failing"]) == (False, 1, ["norm.weight"])
    out = io.StringIO()
    render(report, Console(file=out, width=160))
    assert "FAILED gradients: norm.weight" in out.getvalue()
