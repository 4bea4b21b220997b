"""Which bytes each token stands for.

GPT-2's byte-level vocabularies write each byte as a printable character; SentencePiece's write a space as U+2581 and
a lone byte as `<0x0A>`. A token's own text is not enough to tell them apart, but the decoder in the file is.
"""

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_tokens(inner: Any, vocab_size: int) -> list[bytes]:
    """The bytes of each id below `vocab_size` in a `tokenizers.Tokenizer`.

    Added and special tokens stand for their name; an id without a token for nothing.
    """
    added = inner.get_added_tokens_decoder()
    byte_level = inner.decoder is not None and "ByteLevel" in repr(inner.decoder)
    byte_of = _byte_of()
    table = []
    for token_id in range(vocab_size):
        token: str = inner.id_to_token(token_id) or ""
        if token_id in added:
            table.append(token.encode("utf-8"))
        elif byte_level:
            table.append(b"".join(byte_of.get(character, character.encode("utf-8")) for character in token))
        elif match := _BYTE.fullmatch(token):
            table.append(bytes([int(match[1], 16)]))
        else:
            table.append(token.replace("\u2581", " ").encode("utf-8"))
    return table


def _byte_of() -> dict[str, bytes]:
    """GPT-2's `bytes_to_unicode`, inverted: printable Latin-1 is itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(rest)}
