"""Where the tokenizer may not merge: the pieces text is cut into before BPE runs inside each.

Made for source code and good for prose. Against GPT-2's and GPT-4's rules, the end of a line, the next line's
indentation and its first word are one piece, an identifier keeps its underscores and digits, a dotted name is one
piece, and one sign in front of a word (a space, `(`, `.`, a quote) belongs to it.
"""

_NAME = r"[\p{L}\p{M}_][\p{L}\p{M}\p{N}_]*"
_DOTTED = rf"{_NAME}(?:\.{_NAME})*"
_NEWLINE = r"(?:[ \t]*\r?\n)+[ \t]*"
_SIGN = r"[^\s\p{L}\p{M}\p{N}_]"

PIECES = "|".join(
    (
        rf"{_SIGN}*{_NEWLINE}(?:{_DOTTED})?",  # a line's last signs, the line break, the next line's first word
        rf"[^\r\n\p{{L}}\p{{M}}\p{{N}}_]?{_DOTTED}",  # a word, with one space or sign in front
        r"\p{N}{1,3}",
        rf" ?{_SIGN}+",
        r"\s+(?!\S)|\s+",  # spaces, but for the last one before a word
    )
)
