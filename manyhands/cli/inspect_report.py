"""What `manyhands inspect` says: the page, a few lines, or JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.cli.loudness import LOG
from manyhands.files import write_atomic
from manyhands.inspect import titles
from manyhands.inspect.findings import measure, plain
from manyhands.inspect.observed import Observed
from manyhands.inspect.page import render
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.text import Tokenizer


def report(
    subject: str,
    seen: Observed,
    tokenizer: "Tokenizer | None",
    against: tuple[str, Observed] | None,
    checkpoints: Sequence[tuple[str, Observed]],
    page: Path | None,
    draws: int,
    seed: int,
    json_output: bool,
) -> None:
    """Measure, write the page where one is wanted, and print."""

    def say(line: str) -> None:
        LOG.info("%s", line)

    found = measure(seen, draws, seed, against, checkpoints, say)
    if page is not None:

        def spell(token_id: int) -> str:
            assert tokenizer is not None
            return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")

        name = Path(subject).name or subject
        write_atomic(page, render(name, seen, found, None if tokenizer is None else spell))
    if json_output:
        told = {"subject": subject, "aligned": seen.about.get("aligned"), "titles": titles.of(found), **found}
        print(json.dumps(plain(told)))
        return
    layers = f"{len(seen.layers)} sparse layers of {seen.num_experts} experts"
    print(f"{len(seen):,} tokens of {found['texts']:,} texts, {layers}")
    for title in titles.of(found).values():
        print(f"- {title}")
    if page is not None:
        print(f"{shown(page)}: open it in a browser")
