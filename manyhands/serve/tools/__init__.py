"""Tools: what a request offers, and what in a model's answer is a call of one. Start with `offer.py`."""
