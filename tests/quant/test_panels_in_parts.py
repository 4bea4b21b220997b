"""A matrix that is packed some panels at a time has the bytes of one packed whole."""

import pytest
import torch

from manyhands.quant import panels
from manyhands.quant.record import expert_layout


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("format", "group"), [("int8", 32), ("int4", 32), ("int4", 64), ("q8_0", 32), ("q4_0", 32), ("bf16", 32)]
)
def test_the_same_bytes(format, group, gated, monkeypatch):
    rng = torch.Generator().manual_seed(1)
    up, _ = expert_layout(100, 70, "swiglu" if gated else "relu", format, group, gated=gated, bias=False).matrices
    w = torch.randn(70 * up.parts, 100, generator=rng)
    importance = None if format == "bf16" else torch.rand(100, generator=rng)
    whole = panels._encode(w, up, importance)
    pieces = list(panels.chunks(up, 1))
    assert len(pieces) == 5 and sum(part.outputs for *_, part in pieces) == 70
    assert sorted(row for rows, *_ in pieces for of_part in rows for row in range(len(w))[of_part]) == [*range(len(w))]
    monkeypatch.setattr(panels, "CHUNK_VALUES", 1)
    values, scales = panels.encode(w, up, importance)
    assert torch.equal(values, whole[0])
    assert scales is whole[1] is None or torch.equal(scales, whole[1])
