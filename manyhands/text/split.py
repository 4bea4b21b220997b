"""Which text is held out for validation.

Documents go whole to one side, taken in the order of a hash of their name and the seed until the validation share is
reached. So the split does not depend on where the files lie or in which order they are read; and a document that is
added or left out moves only those near the threshold. The share is one of bytes: documents differ in size by orders
of magnitude. Documents of the same text are one, whatever their names: what is trained on is not validated on.
"""

import hashlib
from collections.abc import Sequence

from manyhands.errors import DataError
from manyhands.text.document import Document

_SLACK = 0.05  # of the share may be missing, or too much


def split_documents(
    documents: Sequence[Document], valid_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """`(train, valid)`, each in the order of `documents`; about `valid_fraction` of the UTF-8 bytes in `valid`.

    Documents are taken in hash order. At the first that no longer fits, the next one that closes the gap (to a
    twentieth of the share) is taken instead and ends it; only if there is none, smaller ones fill it: a sample of
    small documents is not one of the text. Those larger than the whole share cannot be held out. If none fits (there is
    only one, or there are a few large ones) the first in hash order is cut instead: its last part, from a line boundary
    if one is near, is the validation text, and both parts keep its name.

    Raises `DataError` if a side would be left without text.
    """
    target = valid_fraction * sum(document.num_bytes for document in documents)
    groups = _same_text(documents, seed)
    chosen = _chosen([sum(documents[i].num_bytes for i in group) for group in groups], target)
    chosen = {i for number in chosen for i in groups[number]}
    train = [document for i, document in enumerate(documents) if i not in chosen]
    valid = [document for i, document in enumerate(documents) if i in chosen]
    if documents and not chosen:
        for i in groups[0]:
            train[i], tail = _cut(documents[i], target / len(groups[0]))
            valid.append(tail)
    for side in (train, valid):
        if not any(document.text.strip() for document in side):
            total = sum(document.num_bytes for document in documents)
            raise DataError(f"too little text to hold out {valid_fraction:.3g} of it: {total} bytes in all")
    return train, valid


def hold_out(digests: Sequence[bytes], sizes: Sequence[int], valid_fraction: float, seed: int) -> list[bool]:
    """Which of the rows are held out, about `valid_fraction` of the sum of `sizes`; those of one digest go together.

    Rows are whole: in the order of a hash of their digests and the seed. Raises `DataError` if a side would be empty.
    """
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    order = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed}\0".encode() + digest).digest())
    target = valid_fraction * sum(sizes)
    chosen = _chosen([sum(sizes[row] for row in groups[digest]) for digest in order], target) or {0}
    if len(order) <= len(chosen):
        raise DataError(f"too few rows to hold out {valid_fraction:.3g} of them: {len(order)} different ones in all")
    held = {row for number in chosen for row in groups[order[number]]}
    return [row in held for row in range(len(digests))]


def _chosen(sizes: Sequence[int], target: float) -> set[int]:
    """Which of `sizes`, in their order, make up about `target`."""
    chosen: set[int] = set()
    room, slack = target, _SLACK * target
    for i, size in enumerate(sizes):
        if size <= room:
            chosen.add(i)
            room -= size
        elif size <= target:
            closing = next((k for k in range(i + 1, len(sizes)) if abs(sizes[k] - room) <= slack), None)
            if closing is not None:
                return chosen | {closing}
        if room <= slack:
            break
    return chosen


def _same_text(documents: Sequence[Document], seed: int) -> list[list[int]]:
    """Positions of the documents, those of one text together; in the order of the first of their names' hashes."""
    groups: dict[bytes, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest(), []).append(i)
    return sorted(groups.values(), key=lambda group: min(_hash(documents[i].name, seed) for i in group))


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def _cut(document: Document, tail_bytes: float) -> tuple[Document, Document]:
    """Head and tail; the tail has about `tail_bytes` bytes, and starts a line if one starts near there."""
    data = document.text.encode("utf-8")
    goal, slack = len(data) - round(tail_bytes), round(tail_bytes / 2)
    starts = [data.rfind(b"\n", max(goal - slack, 0), goal) + 1, data.find(b"\n", goal, goal + slack) + 1]
    starts = [start for start in starts if 0 < start < len(data)]
    cut = min(starts, key=lambda start: abs(start - goal), default=goal)
    while cut < len(data) and data[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
        cut += 1
    return Document(document.name, data[:cut].decode()), Document(document.name, data[cut:].decode())
