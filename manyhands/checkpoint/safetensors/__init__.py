"""Safetensors: `files.py` reads directories of them by memory map, `shards.py` writes them tensor by tensor."""
