"""Decoding prepared from a model: what has a claim runs in native calls, what has none is called as a module."""

from manyhands.runtime.prepare import prepare
from manyhands.runtime.program import Program

__all__ = ["Program", "prepare"]
