"""Which text is held out for validation.

Documents go whole to one side, in the order of a hash of their name and the seed, so the split does not depend
on where the files lie or on what else is read. The goal is a share of the bytes: documents differ in size by orders
of magnitude, and a share of their number would give anything.
"""

import hashlib
from collections.abc import Sequence

from manyhands.errors import DataError
from manyhands.text.document import Document


def split_documents(
    documents: Sequence[Document], valid_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """`(train, valid)`, each in the order of `documents`; about `valid_fraction` of the UTF-8 bytes in `valid`.

    In hash order, each document that still fits into the validation share goes there. If none fits (there is
    only one, or there are a few large ones) the first in hash order is cut instead: its last part, from a line
    boundary if one is near, is the validation text, and both parts keep its name.

    Raises `DataError` if a side would be left without text.
    """
    sizes = [document.num_bytes for document in documents]
    target = valid_fraction * sum(sizes)
    order = sorted(range(len(documents)), key=lambda i: _hash(documents[i].name, seed))
    chosen: set[int] = set()
    room = target
    for i in order:
        if sizes[i] <= room:
            chosen.add(i)
            room -= sizes[i]
    train = [document for i, document in enumerate(documents) if i not in chosen]
    valid = [document for i, document in enumerate(documents) if i in chosen]
    if documents and not chosen:
        first = order[0]
        train[first], tail = _cut(documents[first], target)
        valid = [tail]
    for side in (train, valid):
        if not any(document.text.strip() for document in side):
            raise DataError(f"too little text to hold out {valid_fraction:.3g} of it: {sum(sizes)} bytes in all")
    return train, valid


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
