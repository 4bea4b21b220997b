"""`generate --without-expert` and `--replay`: the text beside the original's, and the loss beside the original's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import UserError

if TYPE_CHECKING:
    from manyhands.config import SamplingConfig
    from manyhands.engine.edited import Recorded
    from manyhands.engine.engine import Engine
    from manyhands.generate.edited import Effect
    from manyhands.moe.edit import Edits
    from manyhands.text import Tokenizer


def parse_experts(without: list[str]) -> dict[int, tuple[int, ...]]:
    """`["3.17", "3.2"]` as experts by layer. Raises `UserError` for anything else."""
    found: dict[int, list[int]] = {}
    for text in without:
        if not re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}", text):
            raise UserError(f"--without-expert {text}: give a layer and one of its experts, as in 3.17")
        layer, expert = map(int, text.split("."))
        found.setdefault(layer, []).append(expert)
    return {layer: tuple(sorted(set(experts))) for layer, experts in found.items()}


def show_edited(
    engine: "Engine",
    tokenizer: "Tokenizer",
    prompts: list[str],
    sampling: "SamplingConfig",
    without: dict[int, tuple[int, ...]],
    replay: Path | None,
    json_output: bool,
) -> None:
    """Run each prompt, or each text of the trace, as the model is and edited, and print both."""
    import json

    from manyhands.generate.edited import effect

    name = "replayed" if replay else "without " + ", ".join(f"{n}.{e}" for n, es in without.items() for e in es)
    made = []
    for number, (prompt, edit, judged) in enumerate(_asked(engine, prompts, without, replay)):
        done = effect(engine, prompt, sampling, edit, judged)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt))
        if json_output:
            made.append(_as_dict(text, done, sampling, without, replay))
        else:
            print("\n" if number else "", end="")
            _print(text, done, name)
    if json_output:
        print(json.dumps(made if len(made) > 1 else made[0]))


def _asked(
    engine: "Engine", prompts: list[str], without: dict[int, tuple[int, ...]], replay: Path | None
) -> "Iterator[tuple[str | list[int], Edits | Recorded, list[int] | None]]":
    if replay is None:
        from manyhands.moe import Mask

        for prompt in prompts:
            yield prompt, {layer: Mask(experts) for layer, experts in without.items()}, None
        return
    from manyhands.generate.replay import recorded_texts
    from manyhands.trace.recording import Trace

    for text in recorded_texts(Trace.open(replay), engine.model):
        ids = list(text.recorded.token_ids)
        yield ids[: text.prompt], text.recorded, ids


def _print(prompt: str, done: "Effect", name: str) -> None:
    from manyhands.terminal import clean

    for title, completion in (("as it is", done.original), (name, done.edited)):
        print(f"[{title}]\n{clean(prompt)}{clean(completion.text)}\n")
    lengths = len(done.original.token_ids), len(done.edited.token_ids)
    parted = (
        "the same answer" if lengths == (done.same_tokens,) * 2 else f"the answers part after {done.same_tokens} tokens"
    )
    rise = done.edited_loss - done.original_loss
    print(
        f"loss {done.original_loss:.4f} as it is, {done.edited_loss:.4f} {name} ({rise:+.4f} nats per token, "
        f"{done.tokens:,} tokens); {parted}"
    )


def _as_dict(
    prompt: str, done: "Effect", sampling: "SamplingConfig", without: dict[int, tuple[int, ...]], replay: Path | None
) -> dict[str, object]:
    each = {
        title: {"text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason, "loss": _finite(loss)}
        for title, c, loss in (
            ("original", done.original, done.original_loss),
            ("edited", done.edited, done.edited_loss),
        )
    }
    return {
        "prompt": prompt,
        "without_experts": {str(layer): list(experts) for layer, experts in without.items()},
        "replay": None if replay is None else str(replay),
        **each,
        "loss_tokens": done.tokens,
        "same_tokens": done.same_tokens,
        "sampling": sampling.model_dump(mode="json"),
    }


def _finite(loss: float) -> float | None:
    return loss if loss == loss else None
