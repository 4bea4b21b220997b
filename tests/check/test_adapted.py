"""The check of LoRA is green, and red where a fault is planted, which it names."""

from collections.abc import Iterable

import pytest
import torch

import manyhands.kernels.frozen
import manyhands.kernels.low_rank
import manyhands.layers.adapted
from manyhands.check import Row
from manyhands.check.adapted import BASES, adapted_jobs


def rows(*bases: str, dtype: str = "float32", what: str = "experts with LoRA") -> list[Row]:
    found = [rows for w, base, _, rows in adapted_jobs(0, [dtype]) if w == what and base in bases]
    assert len(found) == len(bases)
    return [row for of_one in found for row in of_one()]


def red(found: Iterable[Row]) -> dict[str, set[str]]:
    """Quantity -> what failed in it."""
    named: dict[str, set[str]] = {}
    for row in found:
        if not row.ok:
            named.setdefault(row.quantity, set()).update(row.failing)
    return named


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["experts with LoRA", "linear with LoRA"])
def test_green(what, dtype) -> None:
    found = rows(*BASES, dtype=dtype, what=what)
    assert red(found) == {} and len(found) >= 8 * len(BASES)


@pytest.mark.parametrize("base", ["stacked", "int4"])
def test_a_scale_that_is_forgotten(base, monkeypatch) -> None:
    real = manyhands.kernels.low_rank._product

    def forgotten(x, b, n, added, *rest):
        return real(x, b, n, added and added._replace(scale=1.0), *rest)

    monkeypatch.setattr(manyhands.kernels.low_rank, "_product", forgotten)
    found = red(rows(base))
    assert found.keys() == {"experts with LoRA", "experts with LoRA, no gradients", "gradients of LoRA"}


def test_a_of_the_next_expert(monkeypatch) -> None:
    real = manyhands.kernels.low_rank._product

    def shifted(x, b, n, added, *rest):
        return real(x, b, n, added and added._replace(A=added.A.roll(1, 0)), *rest)

    monkeypatch.setattr(manyhands.kernels.low_rank, "_product", shifted)
    found = red(rows("stacked"))
    assert any("lora_A[4]" in name for name in found["gradients of LoRA"]), "the idle expert is named"
    assert "LoRA that is zero" not in found


def test_up_before_gate(monkeypatch) -> None:
    real = manyhands.kernels.low_rank._product

    def swapped(x, b, n, added, *rest):
        if n == "up" and added is not None:
            added = added._replace(B=added.B.roll(added.B.shape[1] // 2, 1))
        return real(x, b, n, added, *rest)

    monkeypatch.setattr(manyhands.kernels.low_rank, "_product", swapped)
    assert "experts with LoRA" in red(rows("stacked"))


def test_one_experts_delta_lost(monkeypatch) -> None:
    """What merges of others did and reported as a success (unsloth-zoo 779)."""
    real = manyhands.kernels.low_rank._product

    def without(x, b, n, added, *rest):
        if added is not None:
            mask = torch.ones(added.B.shape[0], 1, 1)
            mask[2] = 0.0
            added = added._replace(B=added.B * mask)
        return real(x, b, n, added, *rest)

    monkeypatch.setattr(manyhands.kernels.low_rank, "_product", without)
    assert {"experts.down_proj.lora_B[2]"} <= red(rows("stacked"))["gradients of LoRA"]


@pytest.mark.parametrize("what", ["experts with LoRA", "linear with LoRA"])
def test_a_gradient_through_packed_weights_that_is_off(what, monkeypatch) -> None:
    """Rounded once more on the way back, say: what the record stands for, and not something near it."""
    real = manyhands.kernels.frozen._without_bias

    def rounded(fetch):
        inner = real(fetch)
        return lambda i: ((inner(i)[0] * 8).round() / 8, None)

    monkeypatch.setattr(manyhands.kernels.frozen, "_without_bias", rounded)
    found = red(rows("int8", what=what))
    assert found and all("x" in names for names in found.values())


def test_weights_that_are_not_frozen(monkeypatch) -> None:
    real = manyhands.moe.adapted.AdaptedExperts.__init__

    def thawed(self, base_layer, ranks):
        real(self, base_layer, ranks)
        base_layer.requires_grad_(True)

    monkeypatch.setattr(manyhands.moe.adapted.AdaptedExperts, "__init__", thawed)
    assert "down_proj_bias" in red(rows("stacked"))["frozen weights"], "the reference makes weights of them"


def test_a_linear_layer_without_its_scale(monkeypatch) -> None:
    def forward(self, x):
        return x @ self.lora_A.to(x.dtype).T @ self.lora_B.to(x.dtype).T

    monkeypatch.setattr(manyhands.layers.adapted.LowRank, "forward", forward)
    assert red(rows("stacked", what="linear with LoRA")).keys() == {"linear with LoRA"}
