"""dtype and device as a caller names them."""

import pytest
import torch

from manyhands.checkpoint.asked import asked_device, asked_dtype
from manyhands.errors import UserError


def test_dtypes_as_text() -> None:
    assert asked_dtype("bfloat16") is asked_dtype("torch.bfloat16") is asked_dtype(torch.bfloat16) is torch.bfloat16
    assert asked_dtype("auto") is None and asked_dtype(None) is None


@pytest.mark.parametrize("wrong", ["bloat16", "int8", torch.int8, 16])
def test_what_weights_cannot_be(wrong: object) -> None:
    with pytest.raises(UserError, match="allowed are bfloat16, float16, float32, float64"):
        asked_dtype(wrong)  # type: ignore[arg-type]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_device("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:x", None):
        with pytest.raises(UserError, match="there is no such device"):
            asked_device(wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device here"):
        asked_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert asked_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="the last is cuda:1"):
        asked_device("cuda:2")
