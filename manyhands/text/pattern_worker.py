"""The process that tries regular expressions of a `tokenizer.json`. It holds the tokenizers library and limits.

    python -I -S pattern_worker.py DIRECTORY…       where tokenizers and what it needs lie

Request on stdin: a JSON list of patterns. Exit code 0: all of them matched everything in time.
"""

import contextlib
import json
import string
import sys

SECONDS, MEMORY = 2, 1 << 30
_REPEATS = 40


def main() -> None:
    """Match each pattern against texts that repeat what stands in it, and then break off."""
    sys.path += sys.argv[1:]
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    patterns = json.load(sys.stdin)
    _limit()
    for pattern in patterns:
        split = Split(Regex(pattern), "isolated")
        letters = sorted({c for c in pattern if c.isprintable()})[:64]
        units = [
            *dict.fromkeys(["a", "A", "1", " ", "\n", "\t", "\r\n", "'", "ä", "中", ".", *letters, "ab", "a ", "1a"])
        ]
        for unit in units:
            for end in ("", "\0", "!" if unit != "!" else "~"):
                split.pre_tokenize_str(unit * _REPEATS + end)
        split.pre_tokenize_str(string.printable)


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: `vet.py` stops this process when its time is over, and nothing else limits it
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS knows the name alone
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


if __name__ == "__main__":
    main()
