"""docs/algorithms.md: every section that is cited exists, every file it names too, and its worked examples hold."""

import re
from pathlib import Path

import pytest
import torch

import manyhands as mh
from manyhands.moe import balance
from manyhands.moe.router import score, weigh
from manyhands.plan.parallel import distinct_shards
from manyhands.train.muon import newton_schulz

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
SECTIONS = set(re.findall(r"^(?:## |- )§([\d.]+) ", PAGE, re.MULTILINE))
CITED = re.compile(r"(arXiv \d{4}\.\d{5},? )?§(\d+)(?:\.(\d+)(?:[.\d]*)(?:–(\d+))?)?")


def test_every_cited_section_exists() -> None:
    """`§7`, `§17.9`, `§17.4–6`; a paper's own sections stand behind its number."""
    found = 0
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "manyhands").rglob("*.py"), ROOT / "docs" / "algorithms.md"]:
        if path == Path(__file__):
            continue
        for paper, section, first, last in CITED.findall(path.read_text(encoding="utf-8")):
            if paper:
                continue
            numbers = range(int(first), int(last or first) + 1) if first else []
            wanted = {section, *(f"{section}.{number}" for number in numbers)}
            assert wanted <= SECTIONS, f"{path.relative_to(ROOT)} cites §{section}: {wanted - SECTIONS}"
            found += 1
    assert found > 20 and {str(number) for number in range(18)} <= SECTIONS


def test_sections_are_in_order() -> None:
    numbers = [int(number) for number in re.findall(r"^## §(\d+) ", PAGE, re.MULTILINE)]
    assert numbers == list(range(len(numbers)))


def routed(scores: list[list[float]], ids: list[list[int]], logits: list[list[float]] | None = None) -> mh.Routing:
    s, chosen = torch.tensor(scores), torch.tensor(ids)
    z = s if logits is None else torch.tensor(logits)
    kept, mask = torch.ones_like(chosen, dtype=torch.bool), torch.ones(len(s), dtype=torch.bool)
    return mh.Routing(chosen, s.gather(1, chosen), s, z, kept, mask)


def close(found: torch.Tensor | float, digits: list[float] | float, within: float = 5e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.tensor(digits).double(), atol=within, rtol=0)


def test_scale_of_f_p_and_precision() -> None:
    routing = routed([[0.34, 0.33, 0.33]] * 9 + [[0.0, 1.0, 0.0]], [[0]] * 9 + [[1]])
    close(balance.load_balancing_loss(routing), 0.945, 5e-4)
    z = torch.tensor([128.0] * 10 + [128.5])
    close(z.softmax(0)[-1], 0.142, 5e-4)
    close(z.bfloat16().float().softmax(0)[-1], 0.091, 5e-4)


def test_jacobs() -> None:
    p, o, d = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 1.0
    close((d - (p * o).sum()) ** 2, 0.25)
    close((p * (d - o) ** 2).sum(), 0.5)
    likely = p * (-0.5 * (d - o) ** 2).exp()
    close(-likely.sum().log(), 0.2191)
    close(likely / likely.sum(), [0.6225, 0.3775])


def test_z_loss_and_mixtral() -> None:
    for logits, value in ([0.0, 0.0], 0.4805), ([10.0, 0.0], 100.0009):
        close(balance.z_loss(routed([[0.5, 0.5]], [[0]], [logits])), value)
    for normed, weights in (True, [[0.7311, 0.2689]]), (False, [[0.6439, 0.2369]]):
        config = mh.RouterConfig(num_experts=4, norm_topk_prob=normed)
        close(weigh(score(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), config), torch.tensor([[0, 1]]), config), weights)


def test_deepseek() -> None:
    s = torch.tensor([[0.9, 0.8, 0.3, 0.1]])
    config = mh.RouterConfig(num_experts=4, score="sigmoid", bias=True, routed_scaling_factor=2.5)
    router = mh.Router(config, 4)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.copy_(torch.tensor([-0.5, 0.0, 0.0, 0.35]))
    ids = router.select(s)
    assert ids.sort().values.tolist() == [[1, 3]]
    close(weigh(s, ids.sort().values, config), [[2.222, 0.278]], 5e-4)
    grouped = torch.tensor([[0.9, 0.1, 0.55, 0.5, 0.6, 0.3, 0.2, 0.2]])
    for kind, experts in ("top2_sum", [0, 2]), ("max", [0, 4]):
        limited = mh.RouterConfig(score="sigmoid", n_group=4, topk_group=2, group_score=kind)
        assert mh.Router(limited, 4).select(grouped).sort().values.tolist() == [experts]
    bias = torch.zeros(4)
    mh.update_bias(bias, torch.tensor([3, 1, 0, 0]), 1e-3)
    close(bias, [-1.25e-3, -0.25e-3, 0.75e-3, 0.75e-3], 1e-9)


def test_muon_shards_and_hash() -> None:
    close(newton_schulz(torch.diag(torch.tensor([3.0, 1.0]))).diagonal(), [0.753, 1.134], 5e-4)
    assert distinct_shards(256, 8, 8) == pytest.approx(5.29, abs=5e-3)
