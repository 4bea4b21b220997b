"""Texts in which it is known what each token is: Python, tagged by its own tokenizer, and prose beside it.

Both are on every machine: the code of a package that is installed anyway and was not trained on, and the language
reference that the interpreter carries for `help()`.

T tokens.
"""

import io
import keyword
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics

import numpy as np

from manyhands.checkpoint.model import load, only_decoder
from manyhands.config.load import load_preset
from manyhands.errors import DataError
from manyhands.inspect.conllu import Tagged, align, read_conllu
from manyhands.inspect.observed import Observed
from manyhands.inspect.texts import Sequences, read_sequences, spans
from manyhands.inspect.watch import observe
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, changed, regime, train_arm, with_experts
from manyhands.models import Decoder
from manyhands.text import Tokenizer, read_documents

CLASSES = (
    "keyword", "definition", "call", "attribute", "name", "bracket", "separator", "operator", "number", "string",
    "comment",
)  # fmt: skip
_PACKAGE = "numpy"
_DOMAINS = ("code", "prose")
_MOST_BYTES = 60_000


def python_and_prose(tokenizer: Tokenizer, length: int, tokens: int, seed: int) -> Sequences:
    """About `tokens` tokens of each, in sequences of at most `length`; the prose has no tags."""
    rng = np.random.default_rng(seed)
    code = _cut([_tagged(text, tokenizer) for text in _enough(_sources(rng), tokens)], length, tokens, rng)
    passages = [str(text) for text in topics.topics.values()]
    drawn = (passages[i] for i in rng.permutation(len(passages)))
    prose = _cut([(tokenizer.encode(text), None) for text in _enough(drawn, tokens)], length, tokens, rng)
    parts = [(ids, tags, 0) for ids, tags in code] + [(ids, tags, 1) for ids, tags in prose]
    sizes = [len(ids) for ids, *_ in parts]
    number = np.repeat(np.arange(len(parts)), sizes)
    tag = np.concatenate([np.full(len(ids), -1) if tags is None else tags for ids, tags, _ in parts])
    domain = np.repeat([domain for *_, domain in parts], sizes)
    ids_T = np.concatenate([np.asarray(ids, np.int64) for ids, *_ in parts])
    return Sequences(ids_T, number, number, domain, _DOMAINS, tag, float((tag[domain == 0] >= 0).mean()))


def trained_mixture(job: Job, seed: int, *, checkpoints: bool = False) -> Trained:
    """The quickstart's model after 900 steps of the standard library, whatever `--data` says: that is read afterwards.
    A tiny one if the job is quick.
    """
    job = replace(job, data=None)
    if job.quick:
        run = with_experts(regime(job, 120, 120, f"train.seed={seed}"), 8, 2, 32)
    else:
        run = load_preset("quickstart", [f"train.seed={seed}", "train.max_steps=900", "train.max_seconds=null"])
    if checkpoints:
        run = changed(run, "train.save_every=150", "train.keep_checkpoints=100")
    return train_arm(job, run, f"seed-{seed}")


def check_data(job: Job, *, tagged: bool = False) -> None:
    """Read `--data` once before anything is trained. Raises `DataError` if it cannot be read, or has no word classes
    where they are needed.
    """
    if job.data is None:
        return
    if job.data.name.lower().endswith(".conllu"):
        read_conllu(job.data)
    elif tagged:
        raise DataError(f"{job.data}: no treebank: its words have no classes; expected a file in CoNLL-U, .conllu")
    else:
        read_documents([str(job.data)], "text")


def look(job: Job, trained: Trained, seed: int) -> tuple[Decoder, Sequences]:
    """The model, and what it is to read: Python and prose, or `--data`."""
    loaded, tokenizer = load(trained.directory)
    model = only_decoder(loaded, "this experiment")
    assert tokenizer is not None
    job.note(f"seed {seed}: reading")
    length, tokens = (64, 3000) if job.quick else (128, 40_000)
    if job.data is None:
        return model, python_and_prose(tokenizer, length, tokens, seed)
    return model, read_sequences([str(job.data)], tokenizer, length, tokens, seed=seed)


def watch(model: Decoder, read: Sequences, seed: int, random_routers: int = 3) -> Observed:
    """The routing of all that was read; the tags are `CLASSES` where the text is Python."""
    seen = observe(model, read, random_routers=random_routers, seed=seed)
    return replace(seen, tags=CLASSES) if read.domains == _DOMAINS else seen


def python_words(text: str) -> tuple[tuple[int, int, int], ...]:
    """(first character, the one behind the last, index into `CLASSES`) of each token; none if it is not Python."""
    starts = [0, *np.cumsum([len(line) for line in text.splitlines(keepends=True)]).tolist()]
    found: list[tuple[int, int, int]] = []
    before = ""
    try:
        read = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return ()
    for each, after in zip(read, [*read[1:], None], strict=True):
        kind = _class_of(each, before, "" if after is None else after.string)
        if kind is not None:
            begin, end = (starts[row - 1] + column for row, column in (each.start, each.end))
            found.append((begin, end, CLASSES.index(kind)))
        if each.string.strip():
            before = each.string
    return tuple(found)


def _class_of(token: tokenize.TokenInfo, before: str, after: str) -> str | None:
    match token.type:
        case tokenize.NUMBER:
            return "number"
        case tokenize.STRING:
            return "string"
        case tokenize.COMMENT:
            return "comment"
        case tokenize.OP:
            return "bracket" if token.string in "()[]{}" else "separator" if token.string in ",:;." else "operator"
        case tokenize.NAME:
            if keyword.iskeyword(token.string):
                return "keyword"
            if before in ("def", "class"):
                return "definition"
            return "call" if after == "(" else "attribute" if before == "." else "name"
    return None


def _sources(rng: np.random.Generator) -> Iterator[str]:
    spec = find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None
    files = sorted(path for path in Path(spec.origin).parent.rglob("*.py") if 2000 < path.stat().st_size < _MOST_BYTES)
    for i in rng.permutation(len(files)):
        yield files[i].read_text(encoding="utf-8", errors="replace")


def _enough(texts: Iterator[str], tokens: int) -> list[str]:
    """Texts of four characters a token and more in all."""
    found: list[str] = []
    while sum(map(len, found)) < 4 * tokens and (text := next(texts, None)) is not None:
        found.append(text)
    return found


_Part = tuple[Sequence[int], "np.ndarray[tuple[int], np.dtype[np.int64]] | None"]


def _tagged(text: str, tokenizer: Tokenizer) -> _Part:
    ids = tokenizer.encode(text)
    return ids, align(Tagged("", text, python_words(text)), spans(text, ids, tokenizer))


def _cut(texts: Sequence[_Part], length: int, tokens: int, rng: np.random.Generator) -> list[_Part]:
    """Sequences drawn from all of them."""
    pieces = [
        (ids[at : at + length], None if tags is None else tags[at : at + length])
        for ids, tags in texts
        for at in range(0, len(ids) - length // 2, length)
    ]
    return [pieces[i] for i in rng.permutation(len(pieces))[: max(2, tokens // length)]]
