"""The name that somebody meant: fields are found by the last part of their path, and by what others call them."""

import difflib

from pydantic import BaseModel

from manyhands.config.walk import places

OTHER_NAMES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "steps": "max_steps",
    "max_iters": "max_steps",
    "seq_len": "sequence_length",
    "seq_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "max_length": "sequence_length",
    "block_size": "sequence_length",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_checkpointing": "recompute",
    "max_grad_norm": "grad_clip",
    "adam_epsilon": "eps",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "report_to": "trackers",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "moe_num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "moe_top_k": "num_experts_per_tok",
    "experts_per_token": "num_experts_per_tok",
    "router_aux_loss_coef": "aux_loss_coef",
    "router_z_loss_coef": "z_loss_coef",
    "scoring_func": "score",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "num_shared_experts": "n_shared_experts",
}
"""What transformers' configurations and Trainer, Megatron and nanoGPT call fields that have another name here."""


def suggest(name: str, allowed: list[str]) -> str:
    """`did you mean 'x'?`, or the list of what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed: " + ", ".join(allowed)


def nearest(cls: type[BaseModel], name: str, parent: type[BaseModel] | None, path: str) -> str:
    """The field that `name` was to be: one of that very name elsewhere, a neighbour, or one spelt much like it.

    `parent` has no such field, and stands at `path`. Its own sections are looked through first.
    """
    asked = repr(f"{path}.{name}" if path else name)
    for within, at in ((parent, path), (cls, "")):
        if within is not None and (found := [p for p in paths_of(within, name, at) if p.partition(" ")[0] != asked]):
            return _or(found)
    siblings = sorted(parent.model_fields) if parent is not None else []
    if difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return suggest(name, siblings)
    if any(place.path == asked.strip("'") for place in places(cls)):  # right with another kind
        return "allowed: " + ", ".join(siblings)
    leaves = sorted({place.leaf for place in places(cls)})
    close = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
    return _or(paths_of(cls, close[0])) if close else suggest(name, siblings)


def paths_of(cls: type[BaseModel], name: str, path: str = "") -> list[str]:
    """The full paths of the fields called `name`, or what `OTHER_NAMES` says it is here, quoted.

    Where only some kinds of descriptions have it they stand behind it. `path` is where `cls` stands.
    """
    every = list(places(cls, path))
    here = [place for place in every if place.leaf == name]
    elsewhere = [place for place in every if place.leaf == OTHER_NAMES.get(name)]
    general = [p for p in here if not p.only] or [p for p in elsewhere if not p.only]
    found = [repr(path) for path in dict.fromkeys(place.path for place in general)]
    if any(not place.only for place in here):
        return found
    kinds: dict[str, dict[str, None]] = {}
    for place in here or ([] if found else elsewhere):
        kinds.setdefault(place.path, {})[place.only] = None
    for path, only in kinds.items():
        tags = [tag.partition(": ") for tag in only]
        found.append(f"{path!r} ({tags[0][0]}: {', '.join(value for _, _, value in tags)})")
    return found


def _or(paths: list[str]) -> str:
    return "did you mean " + " or ".join(paths[:3]) + "?"
