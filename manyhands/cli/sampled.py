"""The rows of text that a verb calibrates with and measures on."""

from typing import TYPE_CHECKING

from manyhands.errors import DataError

if TYPE_CHECKING:
    from manyhands.checkpoint.source import Source
    from manyhands.quantize.receipt import Sample
    from manyhands.text import Document, Tokenizer

SEQUENCE, BATCH = 256, 8
BUILT_IN = "the standard library's sources"


def sample_of(
    source: "Source", documents: "list[Document] | None", names: list[str], batches: int, calibrate: bool
) -> "Sample | None":
    """[B, S + 1] ids of the given text or of the built-in one; None for a model without a tokenizer.

    `batches` of 8 × 256 tokens. To `calibrate`, the last quarter is measured on and the rest is not. Raises `DataError`
    for too few tokens, and for text that nothing can encode; `ConfigError` for a model that is no decoder.
    """
    from manyhands.checkpoint.sidecars import tokenizer_of
    from manyhands.files import TOKENIZER
    from manyhands.quantize.receipt import Sample
    from manyhands.text import read_documents
    from manyhands.text.tokenizer_files import instead

    longest = source.decoder("packing").max_position_embeddings  # before any text is read
    tokenizer, unread = tokenizer_of(source.path)
    if tokenizer is None:
        if documents is not None:
            why = unread or f"there is no {TOKENIZER}{instead(source.directory)}"
            raise DataError(f"{source.directory}: {why}; and --data is text")
        return None
    if documents is None:
        try:
            documents = read_documents(["stdlib"])
        except DataError:  # a Python without its sources
            return None
    S = min(SEQUENCE, longest)
    ids = _encode(documents, tokenizer, batches * BATCH * S + 1)
    least = 2 if calibrate else 1  # rows: some to calibrate with, and others to measure on
    if len(ids) <= least:
        raise DataError(f"{' '.join(names)}: {len(ids)} tokens are too few: {least + 1} are needed")

    import torch

    S = min(S, (len(ids) - 1) // least)
    rows = [ids[start : start + S + 1] for start in range(0, len(ids) - S, S)]
    measured = max(1, len(rows) // 4) if calibrate else len(rows)
    return Sample(torch.tensor(rows), ", ".join(names) if names else BUILT_IN, len(rows) - measured)


def _encode(documents: "list[Document]", tokenizer: "Tokenizer", enough: int) -> list[int]:
    """The first tokens of the documents, in order, as training reads them."""
    from manyhands.text import encode_documents

    ids: list[int] = []
    for document in documents:
        ids += encode_documents([document], tokenizer).tolist()
        if len(ids) >= enough:
            break
    return ids[:enough]
