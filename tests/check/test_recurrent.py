"""check holds recurrent models: all is well as it stands, and a planted fault is found."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyhands.check.own import own_rows
from manyhands.check.recurrent import RecurrentCheck, shrink_recurrent
from manyhands.check.report import CheckReport, Row
from manyhands.checkpoint.model import save
from manyhands.checkpoint.source import open_source
from manyhands.config import RecurrentConfig
from manyhands.layers.lstm import LSTM
from manyhands.models import Recurrent

HIERARCHY = {"num_experts": 16, "num_experts_per_tok": 4, "select": "hierarchical", "n_group": 4, "topk_group": 2}
TWO = {"num_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "two levels": RecurrentConfig(moe={"router": {**HIERARCHY, "noisy": True}, "hidden_act": "relu"}),
    "tied, two mixtures": RecurrentConfig(
        moe={"router": {**TWO, "noisy": True}}, moe_after=(0, 1), tie_word_embeddings=True, sigmoid_output=False
    ),
    "dense, no bias": RecurrentConfig(moe=None, lstm_bias=False, num_hidden_layers=5),
}


def rows(config: RecurrentConfig, case: str, dtype: str = "float32") -> list[Row]:
    check = RecurrentCheck(shrink_recurrent(config), case, 0)
    return [row for found, _ in check.rows("auto", dtype) for row in found]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("case", "dtype"), [("padding", "float32"), ("random", "bfloat16")])
def test_it_holds(name: str, case: str, dtype: str) -> None:
    found = rows(CONFIGS[name], case, dtype)
    assert {row.situation.mode for row in found} == {"forward", "recompute", "step by step"}
    assert all(row.ok for row in found), [row.line() for row in found if not row.ok]


def test_shrinking_keeps_the_mechanism() -> None:
    large = {**HIERARCHY, "num_experts": 131072, "n_group": 256}
    small = shrink_recurrent(RecurrentConfig(moe={"router": large}, dropout=0.3))
    assert small.moe is not None and small.dropout == 0.0
    router = small.moe.router
    assert (router.select, router.n_group, router.topk_group, router.num_experts_per_tok) == ("hierarchical", 4, 2, 4)


def test_a_checkpoints_own_weights(tmp_path: Path) -> None:
    model = Recurrent(shrink_recurrent(CONFIGS["two levels"]).model_copy(update={"dropout": 0.3}))
    save(model, tmp_path / "M")
    source = open_source(tmp_path / "M")
    report = CheckReport(source.config, shrunk=False)
    found = [row for rows, _ in own_rows(source, report, 0) for row in rows]
    assert {row.situation.mode for row in found} >= {"read", "forward", "recompute", "step by step"}
    assert all(row.ok for row in found), [row.line() for row in found if not row.ok]
    assert "all of its weights" in report.read and not report.skipped


def test_a_state_that_padding_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LSTM.forward

    def careless(self: LSTM, x: Tensor, state: object = None, real_BS: Tensor | None = None) -> object:
        return real(self, x, state, None)  # type: ignore[arg-type]

    monkeypatch.setattr(LSTM, "forward", careless)
    failing = [row for row in rows(CONFIGS["two levels"], "padding") if not row.ok]
    assert {"logits", "decoding: logits"} <= {row.quantity for row in failing}


def test_a_gate_that_is_not_a_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.moe import router

    real = router.choose_within

    def second_only(*args: object) -> tuple[Tensor, Tensor]:
        ids, weights = real(*args)  # type: ignore[arg-type]
        return ids, torch.full_like(weights, 0.25)

    monkeypatch.setattr(router, "choose_within", second_only)
    failing = [row for row in rows(CONFIGS["two levels"], "random") if not row.ok]
    assert {"router weights", "logits"} <= {row.quantity for row in failing}
