"""The version, stated once: pyproject.toml reads it from this file, and receipts and journals write it down."""

__version__ = "0.1.0"
