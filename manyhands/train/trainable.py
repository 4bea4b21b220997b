"""Which parameters a run trains, by patterns over their names.

`*` stands for anything, dots too. `!` in front of a pattern leaves out what it matches; where every pattern has one,
all the others are trained.

    ["layers.*.mlp.experts.*"]                       the routed experts alone
    ["!embed_tokens.*", "!layers.*.mlp.router.*"]    all but the embedding and the routers
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from manyhands.config import suggest
from manyhands.errors import ConfigError

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "experts": ("*.mlp.experts.*",),
    "shared": ("*.mlp.shared_expert*",),
    "dense": ("*.mlp.gate_proj.*", "*.mlp.up_proj.*", "*.mlp.down_proj.*"),
    "attention": ("*.self_attn.*", "*.cross_attn.*"),
    "router": ("*.mlp.router.*",),
    "norms": ("*norm.*",),
    "embedding": ("embed_tokens.*",),
    "head": ("lm_head.*",),
}
"""Parts of a model by name, as patterns; a model has not all of them."""


def patterns_of(groups: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The patterns that are these parts of a model whose parameters have these names.

    Raises `ConfigError` for a part that nobody knows, or that the model has not.
    """
    known, found = list(names), list[str]()
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(f"train: {group!r} is no part of a model; " + suggest(group, list(GROUPS)))
        there = [pattern for pattern in GROUPS[group] if any(fnmatchcase(name, pattern) for name in known)]
        if not there:
            has = [other for other, some in GROUPS.items() if any(fnmatchcase(n, p) for n in known for p in some)]
            raise ConfigError(f"train: this model has no {group!r}; it has {', '.join(has)}")
        found += there
    return tuple(dict.fromkeys(found))


def chosen(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those of `names` that are trained.

    Raises `ConfigError` for a pattern that matches none, naming near ones, and if nothing is left to train.
    """
    known = list(names)
    taken: set[str] = set()
    left_out: set[str] = set()
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        matched = {name for name in known if fnmatchcase(name, bare)}
        if not matched:
            near = difflib.get_close_matches(bare, known, n=3, cutoff=0.3) or known[:3]
            raise ConfigError(f"trainable: {pattern!r} matches no parameter; near: {', '.join(near)}")
        (left_out if pattern.startswith("!") else taken).update(matched)
    if all(pattern.startswith("!") for pattern in patterns):
        taken = set(known)
    if not taken - left_out:
        raise ConfigError(f"trainable: {list(patterns)} leaves nothing to train")
    return taken - left_out


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Only what `patterns` choose gets a gradient from here on, and with it an optimiser's state and decay."""
    trained = chosen((name for name, _ in model.named_parameters()), patterns)
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained)
