"""What a type checker sees: calling a module is as typed as its `forward`. `make lint` checks it; it never runs."""

from typing import assert_type

import torch

import manyhands as mh


def calls(ids: torch.Tensor, x: torch.Tensor) -> None:
    """README's calls; `load` gives a model of any kind."""
    y, routing = mh.MoELayer(mh.MoEConfig(), hidden_size=64)(x)
    assert_type(y, torch.Tensor)
    assert_type(routing, mh.Routing)
    assert_type(mh.Router(mh.RouterConfig(), 64)(x), mh.Routing)
    assert_type(mh.Decoder(mh.ModelConfig())(ids).logits, torch.Tensor)
    model, tokenizer = mh.load("runs/quickstart")
    assert_type(mh.generate(model, tokenizer, ["text"]), list[mh.Completion])
    assert_type(model(ids).routings, dict[int, mh.Routing])
    model("text")  # type: ignore[arg-type]  # and this must be seen: an ignore that is not needed is an error
