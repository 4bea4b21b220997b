"""The end of a run: the report says what a router with random weights shows too."""

from pathlib import Path

import pytest

from manyhands.train import loop

from ..small_runs import small_run, write_text


@pytest.mark.parametrize("select", ["topk", "hash"])
def test_the_report_has_a_random_router_where_there_can_be_one(select: str, tmp_path: Path) -> None:
    router = [] if select == "topk" else ["model.moe.router={select: hash, num_experts: 4, num_experts_per_tok: 1}"]
    loop.train(tmp_path / "run", small_run(write_text(tmp_path), "train.max_steps=3", *router), quiet=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Specialisation against chance" in page
    assert ("<th>random router</th>" in page) == (select == "topk")
