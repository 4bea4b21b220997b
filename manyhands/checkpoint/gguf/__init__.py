"""GGUF files as checkpoints: the tensors (what the header says stands in `families/gguf/`).

open.py       a path -> an opened checkpoint
files.py      one file or a series of them, by memory map
logical.py    what each tensor stands for, and how it is decoded
export.py     a checkpoint -> one file; blocks.py its number formats, vocabulary.py its tokenizer
"""
