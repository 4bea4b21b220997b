"""Text in: documents, their split, a tokenizer with its chat template, packed batches with an exact position."""

from manyhands.text.batches import PackedBatches, evaluation_batches
from manyhands.text.chat import ChatTemplate, Message
from manyhands.text.corpus import read_documents
from manyhands.text.document import Document
from manyhands.text.split import split_documents
from manyhands.text.stream import StreamDecoder
from manyhands.text.token_file import TokenFile, TokenInfo, encode_documents, write_tokens
from manyhands.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Document",
    "Message",
    "PackedBatches",
    "StreamDecoder",
    "TokenFile",
    "TokenInfo",
    "Tokenizer",
    "encode_documents",
    "evaluation_batches",
    "read_documents",
    "split_documents",
    "write_tokens",
]
