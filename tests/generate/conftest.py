"""The engine's toys."""

from ..engine.conftest import GQA, make, model, tokenizer

__all__ = ["GQA", "make", "model", "tokenizer"]
