"""The files of a tokenizer in a model directory, and what they say beside the vocabulary.

    tokenizer.json            the tokenizer; required
    tokenizer_config.json     bos, eos and other named tokens; the chat template of older models
    special_tokens_map.json   the named tokens again, where tokenizer_config.json leaves one out
    chat_template.jinja       the chat template; wins over the one in tokenizer_config.json
    generation_config.json    `eos_token_id`: a number or several, each of which ends an answer
    config.json               `eos_token_id` again (in `text_config` too), where generation_config.json has none
    tiktoken.model            Kimi's tokenizer where there is no tokenizer.json: made into one (`tiktoken_model.py`)

They come from anywhere: sizes are bounded, and whatever is not as it should be is one line with the file and the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyhands.errors import CheckpointError
from manyhands.files import CONFIG, GENERATION, OUTSIDE, TOKENIZER, within
from manyhands.strict_json import parse_object
from manyhands.text.tiktoken_model import is_kimi, tokenizer_json

TOKENIZER_CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TIKTOKEN = "tiktoken.model"
_MB = 1 << 20
LARGEST = {
    TOKENIZER: 256 * _MB,
    TOKENIZER_CONFIG: 32 * _MB,
    MAP: 4 * _MB,
    TEMPLATE: _MB,
    GENERATION: _MB,
    "added_tokens.json": 32 * _MB,
    "merges.txt": 64 * _MB,
    TIKTOKEN: 64 * _MB,
    "tokenizer.model": 64 * _MB,
    "vocab.json": 64 * _MB,
}
"""What is read and written along, and the bytes each may have. The last five say the same for other programs."""
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a directory says about its tokenizer."""

    content: Mapping[str, bytes] = field(default_factory=dict)
    """Every file that belongs to it, byte for byte."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, … that are set. Templates see them under these names."""
    chat_template: str | None = None
    end_ids: frozenset[int] = frozenset()
    """`eos_token_id` of generation_config.json, or of config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json."""
    padding_side: str = "right"
    """On which side a shorter text is padded."""


def read_tokenizer_files(directory: str | Path) -> TokenizerFiles:
    """Read what lies in `directory`. Raises `CheckpointError` naming the file and the field."""
    directory = Path(directory)
    content = {}
    for name, largest in LARGEST.items():
        if (data := read_small(directory / name, largest)) is not None:
            content[name] = data
    if TOKENIZER not in content and TIKTOKEN not in content:
        raise CheckpointError(f"{directory / TOKENIZER}: cannot be read: there is no such file{instead(directory)}")
    config, others = (_object(directory / name, content.get(name)) for name in (TOKENIZER_CONFIG, MAP))
    tokens = {
        **{role: text for role in _ROLES if (text := _token(directory / MAP, others, role)) is not None},
        **{role: text for role in _ROLES if (text := _token(directory / TOKENIZER_CONFIG, config, role)) is not None},
    }
    if TEMPLATE in content:
        template: str | None = _text(directory / TEMPLATE, content[TEMPLATE])
    else:
        template = _template(directory / TOKENIZER_CONFIG, config.get("chat_template"))
    generation = _object(directory / GENERATION, content.get(GENERATION))
    model = _object(directory / CONFIG, read_small(directory / CONFIG, _MB))
    if TOKENIZER not in content:
        if not is_kimi(config, model):
            raise CheckpointError(
                f"{directory / TIKTOKEN}: how it splits text stands in its publisher's code, which is known for Kimi "
                f"only; put a {TOKENIZER} beside it"
            )
        content[TOKENIZER] = tokenizer_json(directory / TIKTOKEN, content[TIKTOKEN], config)
    ends = _ids(directory / GENERATION, generation.get("eos_token_id")) or _model_ids(directory / CONFIG, model)
    side = config.get("padding_side") or "right"
    if side not in ("left", "right"):
        raise CheckpointError(f"{directory / TOKENIZER_CONFIG}: padding_side is neither 'left' nor 'right'")
    return TokenizerFiles(content, tokens, template, ends, generation, side)


def has_tokenizer(directory: str | Path) -> bool:
    """Whether `read_tokenizer_files` finds a tokenizer in `directory`, damaged or not."""
    directory = Path(directory)
    if (directory / TOKENIZER).is_file():
        return True
    if not (directory / TIKTOKEN).is_file():
        return False
    config = _object(directory / TOKENIZER_CONFIG, read_small(directory / TOKENIZER_CONFIG, LARGEST[TOKENIZER_CONFIG]))
    return is_kimi(config, _object(directory / CONFIG, read_small(directory / CONFIG, _MB)))


def instead(directory: Path) -> str:
    """What lies there in the place of tokenizer.json, and what to do about it."""
    names = ("tokenizer.model", TIKTOKEN)
    others = sorted(p.name for p in directory.glob("*") if p.name in names or p.suffix == ".tiktoken")
    if not others:
        return f"; put the {TOKENIZER} of the model that it was made from beside it"
    return (
        f"; {others[0][:60]} is not read: transformers makes a {TOKENIZER} of it "
        "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
    )


def _model_ids(path: Path, model: dict[str, Any]) -> frozenset[int]:
    """`eos_token_id` of config.json, outside or of the language model inside it."""
    inner = model.get("text_config")
    value = model.get("eos_token_id")
    if value is None and isinstance(inner, dict):
        value = inner.get("eos_token_id")
    return _ids(path, None if value == -1 and type(value) is int else value)  # -1: none, in some old files


def read_small(path: Path, largest: int) -> bytes | None:
    """None for a file that is not there. A device or a pipe, which might never end, is not a file."""
    try:
        if not path.is_file():
            if path.exists() or path.is_symlink():
                raise CheckpointError(f"{path}: cannot be read: it is not a regular file")
            return None
        if not within(path):  # it would be copied, byte for byte, wherever the model is saved
            raise CheckpointError(f"{path}: {OUTSIDE}")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > largest:
        raise CheckpointError(f"{path}: longer than {largest // _MB} MiB, too long for such a file")
    return data


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None


def _object(path: Path, data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    return parse_object(_text(path, data), str(path), CheckpointError)


def _token(path: Path, values: dict[str, Any], role: str) -> str | None:
    """A token as text, or as the object that newer files write."""
    value = values.get(role)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None and value is None:
        return None
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: {role} is neither text nor an object with the text in 'content'")
    return text or None


def _template(path: Path, value: Any) -> str | None:
    """A template, or the one called "default" of several."""
    if value is None or isinstance(value, str):
        return value
    wrong = CheckpointError(f"{path}: chat_template is neither text nor a list of objects with 'name' and 'template'")
    if not isinstance(value, list):
        raise wrong
    named = {}
    for entry in value:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise wrong
        named[entry["name"]] = entry["template"]
    return named.get("default")


def _ids(path: Path, value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and 0 <= token_id < 1 << 31 for token_id in ids):  # a bool is an int
        raise CheckpointError(f"{path}: eos_token_id is neither a token id nor a list of them")
    return frozenset(ids)
