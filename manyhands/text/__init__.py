"""Text in: documents, their split, a tokenizer with its chat template, packed batches with an exact position."""

from manyhands.text.batches import PackedBatches, evaluation_batches
from manyhands.text.chat import ChatTemplate, Message
from manyhands.text.corpus import read_documents
from manyhands.text.document import Document
from manyhands.text.pairs import PairBatch, PairBatches, pad_pairs
from manyhands.text.spans import SpanBatches, SpanRule, span_evaluation
from manyhands.text.split import split_documents
from manyhands.text.stream import StreamDecoder
from manyhands.text.token_file import TokenFile, TokenInfo, encode_documents, write_tokens
from manyhands.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Document",
    "Message",
    "PackedBatches",
    "PairBatch",
    "PairBatches",
    "SpanBatches",
    "SpanRule",
    "StreamDecoder",
    "TokenFile",
    "TokenInfo",
    "Tokenizer",
    "encode_documents",
    "evaluation_batches",
    "pad_pairs",
    "read_documents",
    "span_evaluation",
    "split_documents",
    "write_tokens",
]
