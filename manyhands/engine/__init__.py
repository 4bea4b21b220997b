"""Requests in, tokens out, many at once. Start with `engine.py`; `scheduler.py` and `blocks.py` need no torch."""
