"""Safetensors: `header.py` is the format, `files.py` maps directories of them, `shards.py` writes them."""
