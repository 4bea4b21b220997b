"""Text from token ids as they arrive."""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Holds back the bytes of an unfinished character until the token that completes it.

    The pushed pieces and the flush together are `decode` of all ids. Bytes that can never become a character
    are U+FFFD, as in `decode`.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete now; often a word, sometimes nothing."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that never got finished."""
        return self._utf8.decode(b"", final=True)
