"""Changing a model that is there: fine-tuning it. Start with `run.py`."""
