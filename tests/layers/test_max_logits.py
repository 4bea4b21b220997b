"""QK-Clip's S: exact where it may exceed the threshold, and blind to padding."""

import torch

from ..models.tiny_models import ids, tiny


def test_padding_does_not_change_the_largest_logits() -> None:
    model, x = tiny(), ids()
    plain = model.hidden(x, clip_above=0.0).max_logits
    padded = torch.cat((x, x[:, :5]), dim=1)
    mask = torch.arange(padded.shape[1]).expand_as(padded) < x.shape[1]
    beside = model.hidden(padded, mask, clip_above=0.0).max_logits
    assert plain.keys() == beside.keys() != set()
    for layer, largest_H in plain.items():
        torch.testing.assert_close(largest_H, beside[layer])


def test_the_bound_is_returned_only_below_the_threshold() -> None:
    model, x = tiny(), ids()
    exact, bound = model.hidden(x, clip_above=0.0).max_logits, model.hidden(x, clip_above=1e9).max_logits
    assert all(bool((bound[layer] >= exact[layer]).all()) for layer in exact)
    assert any(bool((bound[layer] > exact[layer]).any()) for layer in exact)
