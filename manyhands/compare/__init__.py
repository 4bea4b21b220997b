"""Verdicts, what experts are worth, runs side by side."""
