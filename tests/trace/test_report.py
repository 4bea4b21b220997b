import re
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands.config import RunConfig
from manyhands.errors import StorageError
from manyhands.trace.report import write_report
from manyhands.trace.tokens import TokenShare

VOCAB = ["def", " return", "\n", "    ", "<script>alert(1)</script>", "x"]


def records(steps: int, layers: tuple[int, ...] = (1, 3), num_experts: int = 4, dead: int | None = None) -> list[dict]:
    """start, `steps` steps, two evals, end. Expert `dead` of every layer gets nothing."""
    rng = np.random.default_rng(0)
    out: list[dict] = [
        {"kind": "start", "step": 0, "time": "2026-05-04T10:00:00+00:00", "version": "0.1.0", "parameters": 9_312_000}
        | {"active_parameters": 3_104_000, "num_experts": num_experts, "num_experts_per_tok": 2}
        | {"sparse_layers": list(layers)}
    ]
    for step in range(1, steps + 1):
        moe = {}
        for layer in layers:
            load = np.exp(rng.normal(0, 0.2, num_experts))
            if dead is not None:
                load[dead] = 0
            load /= load.sum()
            moe[str(layer)] = {"load": load.tolist(), "max_vio": float(load.max() * num_experts - 1), "cv2": 0.04}
            moe[str(layer)] |= {"entropy": 0.98, "dead": int((load == 0).sum()), "dropped": 0.0, "top1_weight": 0.6}
        loss = 2 + 6 * 0.9**step + float(rng.normal(0, 0.02))
        out.append(
            {"kind": "step", "step": step, "loss": loss, "bits_per_byte": loss * 0.6, "lr": 1e-3, "grad_norm": 0.7}
            | {"aux_loss": 1.02 if layers else None, "tokens": 4096 * step, "tokens_per_s": 6200.0}
            | {"elapsed": 0.66 * step, "skipped": step == 7, "moe": moe}
        )
        if step in (steps // 2, steps):
            out.append(
                {"kind": "eval", "step": step, "valid_loss": 3.0, "valid_bits_per_byte": 1.875}
                | {"valid_perplexity": 20.086, "tokens": 9999}
            )
    out.append({"kind": "end", "step": steps, "reason": "finished", "elapsed": 0.66 * steps})
    return out


def token_share(layers: tuple[int, ...] = (1, 3), num_experts: int = 4) -> TokenShare:
    """Token id i goes to experts i and i + 1, modulo E, always."""
    share = TokenShare(num_experts, len(VOCAB))
    ids = torch.arange(600) % len(VOCAB)
    for layer in layers:
        share.add(layer, ids, torch.stack([ids % num_experts, (ids + 1) % num_experts], dim=1))
    return share


EXTRA = {"compressors": {"xz -9e": 1.73, "zlib -9": 2.31}, "machine": "2 cores & <b>more</b>"}


def report(folder: Path, journal: list[dict], **kwargs: object) -> str:
    path = folder / "report.html"
    write_report(path, journal, RunConfig(), **kwargs)  # type: ignore[arg-type]
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_it_loads_nothing(tmp_path: Path) -> None:
    page = report(tmp_path, records(60), tokens=token_share(), decode=VOCAB.__getitem__, extra=EXTRA)
    assert "http://" not in page and "https://" not in page and "//" not in re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"<link|<script src|@import|url\(", page)
    assert set(re.findall(r'src="([^":]*):', page)) == {"data"}
    assert "default-src 'none'" in page


def test_every_layer_has_its_load_its_row_and_its_tokens(tmp_path: Path) -> None:
    page = report(tmp_path, records(60), tokens=token_share(), decode=VOCAB.__getitem__, extra=EXTRA)
    for layer in (1, 3):
        assert page.count(f"<h3>Layer {layer}</h3>") == 2
        assert f"<td>layer {layer}</td>" in page
    assert page.count('class="plot heat"') == page.count('class="plot bars"') == 2
    assert page.count('<div class="expert">') == 8
    assert "1.875" in page and "20.09" in page and "xz -9e" in page and "9.31M" in page and "6.2k" in page


def test_tokens_and_names_are_escaped_and_white_space_is_visible(tmp_path: Path) -> None:
    page = report(tmp_path, records(20), tokens=token_share(), decode=VOCAB.__getitem__, extra=EXTRA)
    assert page.count("<script>") == 1  # our own
    assert "&lt;script&gt;alert(1)&lt;" in page and "␣return" in page and "⏎" in page and "␣×4" in page
    assert "2 cores &amp; &lt;b&gt;" in page


def test_a_dead_expert_is_named_and_a_balanced_run_is_not_blamed(tmp_path: Path) -> None:
    good, bad = report(tmp_path, records(60)), report(tmp_path, records(60, dead=2))
    tile = re.compile(r'<div class="tile( bad)?"><dt>dead experts</dt><dd class="value">(\d+)')
    assert tile.search(good).groups() == (None, "0")  # type: ignore[union-attr]
    assert tile.search(bad).groups() == (" bad", "2")  # type: ignore[union-attr]
    assert bad.count('<td class="bad">1</td>') == 2


def test_a_skipped_update_is_listed(tmp_path: Path) -> None:
    assert "Skipped updates" in report(tmp_path, records(10))
    assert "Skipped updates" not in report(tmp_path, records(6))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", [(), (0,)])
def test_short_runs(tmp_path: Path, count: int, layers: tuple[int, ...]) -> None:
    page = report(tmp_path, records(count, layers))
    assert ("No step has been taken" in page) == (count == 0)


def test_no_journal_at_all_and_one_full_of_nulls(tmp_path: Path) -> None:
    assert "Nothing recorded." in report(tmp_path, [])
    empty = {"kind": "step", "step": 1, "loss": None, "lr": None, "moe": {"0": {"load": [0.5, 0.5], "max_vio": None}}}
    assert "Layer 0" in report(tmp_path, [empty])


def test_a_dense_run_does_not_speak_of_experts(tmp_path: Path) -> None:
    page = report(tmp_path, records(30, layers=()), extra=EXTRA)
    assert "A dense model" in page and "MaxVio</h3>" not in page and "<h2>Expert load" not in page


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    assert "Stopped or still running at step 9." in report(tmp_path, records(9)[:-1])


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    journal = records(200, layers=tuple(range(12)), num_experts=16)
    start, steps = journal[0], [record for record in journal if record["kind"] == "step"]
    long = [start, *({**steps[i % 200], "step": i + 1} for i in range(5_000))]
    tokens = token_share(tuple(range(12)), 16)
    assert len(report(tmp_path, long, tokens=tokens)) < 600_000


def test_a_refused_write_keeps_the_older_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(tmp_path, records(3))

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        report(tmp_path, records(9))
    assert [file.read_text() for file in tmp_path.iterdir()] == [before]


def test_the_planned_number_of_steps_is_the_runs_not_the_configs(tmp_path: Path) -> None:
    journal = [record for record in records(12) if record["kind"] != "end"]
    journal.append({"kind": "end", "step": 12, "reason": "SIGTERM", "elapsed": 9.0, "max_steps": 731})
    write_report(tmp_path / "report.html", journal, RunConfig())
    assert "Ended at step 12 of 731: SIGTERM" in (tmp_path / "report.html").read_text()


def test_a_random_router_stands_beside_what_experts_take(tmp_path: Path) -> None:
    """Chance alone would let any router look as if it had learned to sort tokens by id."""
    page = report(tmp_path, records(60), tokens=token_share(), decode=VOCAB.__getitem__, random_tokens=token_share())
    assert "<th>random router</th>" in page and "of a random router 100 %" in page
    assert "random router" not in report(tmp_path, records(60), tokens=token_share(), decode=VOCAB.__getitem__)


def test_what_experts_are_worth_is_drawn_and_what_is_wrong_with_them_said(tmp_path: Path) -> None:
    journal = records(60)
    of: dict = {"cost": [0.02, 0.001, -0.002, None], "error": [0.001, 0.002, 0.001, None], "share": [0.25] * 4}
    of |= {"tokens": [10] * 4, "size": [1.0, 2.0, 0.0, 1.0], "twin": [3, 0, 1, 0], "distance": [0.0, 0.9, 1.0, 0.0]}
    of |= {"null": 0.004, "shuffled": 0.05, "random_router": None}
    worth = {"kind": "worth", "bits_per_byte": 1.9, "tokens": 4096, "texts": 32, "layers": {"1": of}}
    said = {"kind": "sample", "prompt": "<b>def", "text": " main\n"}
    page = report(tmp_path, [*journal, worth | {"step": 30}, worth | {"step": 60}, said | {"step": 60}])
    assert "1 of 4 experts are missed, as far as this text can tell" in page and "Expert 2 says nothing." in page
    assert "Experts 0 and 3 say the same (distance 0.000)." in page and "loses 0.0500 bits per byte" in page
    assert 'class="whisker"' in page and 'class="null"' in page and "with the experts of other tokens" in page
    assert "&lt;b&gt;def" in page and "<b>def" not in page
    assert "What each expert is worth" not in report(tmp_path, [*journal, {"kind": "worth", "step": 60, "layers": {}}])


def test_one_dead_expert_among_many_is_seen_and_the_layers_in_trouble_are_open(tmp_path: Path) -> None:
    """256 experts share 64 rows, and a mean of four would hide one that got nothing."""
    journal = records(6, layers=tuple(range(12)), num_experts=256)
    for record in journal:
        if record["kind"] == "step":
            record["moe"]["9"]["load"][77] = 0.0
    page = report(tmp_path, journal)
    bars = re.findall(r"<h3>Layer (\d+)</h3><div class=\"chart load.*?data-dead=\"(\d+)\"", page)
    assert {layer: dead.find("1") for layer, dead in bars if "1" in dead} == {"9": 77 // 4} and len(bars) == 12
    opened, folded = page.split("<summary>The other 4 layers")
    assert "<h3>Layer 9</h3>" in opened and folded.count('class="plot heat"') == 4
    assert "up to 4 neighbouring experts" in page and "worst layer" in page and page.count(">layer 11</span>") == 0


def test_a_loss_that_is_lost_ends_the_curve_there(tmp_path: Path) -> None:
    journal = records(60, layers=())
    for record in journal:
        if record["kind"] == "step" and record["step"] > 20:
            record["loss"] = record["bits_per_byte"] = None
    line = re.search(r'bits per byte.*?class="line"[^>]* d="([^"]*)"', report(tmp_path, journal), re.DOTALL)
    assert line and float(re.findall(r"[ML]([\d.]+) ", line[1])[-1]) <= 1000 * 20 / 60 + 0.1


def test_the_curve_of_a_short_run_is_smoothed_too(tmp_path: Path) -> None:
    journal = records(60, layers=())
    for record in journal:
        if record["kind"] == "step":
            record["bits_per_byte"] = 2.0 + (record["step"] % 2)
    line = re.search(r'bits per byte.*?class="line"[^>]* d="([^"]*)"', report(tmp_path, journal), re.DOTALL)
    assert line
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", line[1])]
    assert max(heights) - min(heights) < 500, "of 1000 for a sawtooth from top to bottom"
