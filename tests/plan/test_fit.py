"""What fits, and that nothing is said about the speed or the price of what does not."""

import json
from typing import Any

import pytest

from manyhands.catalog import entries, load
from manyhands.config import ModelConfig
from manyhands.plan import Counts, count_model
from manyhands.plan.fit import RESERVE, SYSTEM, need, reserve, shown_share, usable
from manyhands.plan.machine import Machine, machine_named, machine_names
from manyhands.plan.published import counts_of
from manyhands.plan.roof import prefill_bound
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import BF16
from manyhands.plan.subject import read_subject

from ..small_runs import manyhands

PLAIN = Machine(name="m", title="m", kind="cpu", memory=64e9, bandwidth=5e10, rates={}, source="made up")


def count_of(name: str) -> tuple[Counts, ModelConfig]:
    config = load(name).config
    assert config is not None
    return count_model(config), config


def test_what_is_idle_is_told_by_component() -> None:
    """For every system of the catalogue: no component has a negative active part, and they add up."""
    for entry in entries():
        if (counts := counts_of(entry)) is not None:
            assert sum(counts.idle.values()) == counts.total - counts.active, entry.id
            assert all(0 <= n <= counts.by_component[name] for name, n in counts.idle.items()), entry.id


def test_the_largest_lstm_mixture_has_its_papers_experts() -> None:
    """MoE-131072-h (arXiv 1701.06538, table 8): 4 experts of 2·512·1024 work for a token, of 131,072."""
    rows = _plan("shazeer-moe-131072-h")["sections"]["parameters"]["table"]
    active = {row["component"]: row["active"]["value"] for row in rows}
    assert active["routed experts"] == 4 * 2 * 512 * 1024 and active["router"] == 2 * 512 * (256 + 2 * 512)


def _plan(*arguments: str) -> dict[str, Any]:
    done = manyhands("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("machine", ["rtx-4090", "raspberry-pi-5"])
def test_no_speed_and_no_price_of_what_does_not_fit(machine: str) -> None:
    sections = _plan("deepseek-v3", "--machine", machine, "--price", "2")["sections"]
    assert all(row["all"]["value"] is None for row in sections["speed"]["table"])
    assert all(found["value"] is None for found in sections["price"]["figures"])
    assert "does not fit" in " ".join(sections["price"]["notes"])
    assert not any(row["fits"] for row in sections["memory"]["table"])


def test_speeds_stop_at_the_batch_whose_caches_fill_the_memory() -> None:
    """Mixtral in int4 on one H100 at 32k: 26.27 GB of weights, 4.29 GB of cache each, 8 fit and 64 do not."""
    sections = _plan("mixtral-8x7b", "--format", "int4", "--machine", "h100", "--context", "32k", "--price", "2")[
        "sections"
    ]
    speed = {row["step"]: row["all"]["value"] for row in sections["speed"]["table"]}
    assert speed["decode, batch 8"] > speed["decode, batch 1"] > 0 and speed["decode, batch 64"] is None


def test_every_machine_holds_what_its_driver_reports() -> None:
    """An H100 SXM reports 81,559 MiB; memory that is not a GPU's is sold in GiB."""
    assert machine_named("h100").memory == 81_559 * 2**20
    assert all(machine_named(name).memory % 2**20 == 0 for name in machine_names())


def test_fits_is_one_statement_at_its_edge() -> None:
    """Working memory and the reserve count; what is too much is never printed as 1x."""
    counts, config = count_of("olmoe-1b-7b")
    found = need(counts, config, sizes_of(config), BF16, batch=1, context=4096, prompt=4096, kv_bits=16)
    assert found.working > 0 and found.total == found.weights + found.cache + found.working
    exact = PLAIN.model_copy(update={"kind": "gpu", "memory": found.total / (1 - RESERVE)})
    assert found.fits(exact) and not found.fits(exact.model_copy(update={"memory": exact.memory * 0.9999}))
    assert shown_share(1.0004) == "1.0004x" and shown_share(1 + 1e-9) == "just over" and shown_share(1.57) == "1.57x"


def test_what_is_kept_from_a_model_depends_on_the_machine() -> None:
    """5 % of a card and of a large server, 2 GiB of a small computer, what macOS keeps from its GPU; or as given."""
    assert reserve(machine_named("h100")) == pytest.approx(0.05 * 81_559 * 2**20)
    assert reserve(machine_named("epyc-9654")) == pytest.approx(0.05 * 768 * 2**30)
    assert usable(machine_named("laptop-ddr5")) == 14 * 2**30 and reserve(machine_named("laptop-ddr5")) == SYSTEM
    assert usable(machine_named("m4-max")) == pytest.approx(107.52 * 2**30)
    assert reserve(machine_named("m4")) == pytest.approx(0.26 * 32 * 2**30)
    assert usable(machine_named("h100x8").model_copy(update={"reserve": 1e9})) == 8 * (81_559 * 2**20 - 1e9)
    assert usable(PLAIN.model_copy(update={"memory": 2.0**30})) == 2**29, "half of a very small one is left"


def test_attention_has_no_weights_and_no_weights_rate() -> None:
    """V3 at 128k on 8 H800 in FP8: scores and values at the bf16 rate (by hand from its config.json)."""
    subject = read_subject("deepseek-v3")
    assert subject.sizes is not None and subject.native is not None
    bound = prefill_bound(machine_named("h800x8"), subject.sizes, subject.counts, subject.native, 131072)
    scores = 131072 * (131072 / 2) * 61 * 2 * 128 * (192 + 128)
    assert bound.attention == pytest.approx(scores, rel=1e-6)
    weights = 2 * (131072 * subject.counts.body + 129280 * 7168)
    by_hand = scores / (8 * 989.4e12) + weights / (8 * 1978.9e12)
    assert bound.compute_seconds == pytest.approx(by_hand, rel=1e-6)


def test_prompts_are_priced_together() -> None:
    """V3, prompts of 256: one pass alone reads most experts for 256 tokens; 64 prompts share that."""
    figures = _plan("deepseek-v3", "--machine", "h200x8", "--price", "3", "--context", "256")["sections"]["price"]
    prices = {found["label"]: found["value"] for found in figures["figures"]}
    alone, together = (prices[f"10^6 tokens in, {n} x 256"] for n in (1, 64))
    floor = 2 * 35.7e9 / 1978.9e12 / 3600 * 3 * 1e6  # arithmetic alone, FLOP per token / rate
    assert alone > 4 * together and floor < together < 1.5 * floor


def test_experts_on_disk_are_of_one_batch() -> None:
    """64 sequences whose caches alone fill the card: no expert fits, and no speed stands beside that."""
    arguments = ("mixtral-8x7b", "--format", "int4", "--machine", "rtx-4090", "--context", "32k")
    alone, many = (_plan(*arguments, "--batch", n)["sections"]["offload"] for n in ("1", "64"))
    assert 0 < alone["figures"][0]["value"] < 1 and all(row["in turn"]["value"] for row in alone["table"])
    assert many["figures"][0]["value"] == 0 and all(row["in turn"]["value"] is None for row in many["table"])
    eight = _plan("mixtral-8x7b", "--format", "int4", "--machine", "rtx-4090", "--batch", "8", "--context", "1k")
    read = eight["sections"]["offload"]["table"][0]["from disk"]["value"]
    assert read == pytest.approx(8 * (1 - (1 - 2 / 8) ** 8) * 32 * 3 * 4096 * 14336 * 4.5 / 8, rel=1e-9)
