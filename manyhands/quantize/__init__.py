"""From a checkpoint to a packed one: run it layer by layer, round it, and say in a receipt what that cost.

quantize.py     the whole of it: a directory that is complete or absent, with its receipt
layers.py       two models side by side on a sample, one layer at a time
stream.py       without a sample, one expert at a time
room.py         which of the two: whether a layer fits into memory
calibrate.py    what a layer's inputs look like, which weighs the rounding errors
figures.py      what is measured on the way
receipt.py      what was packed and what was not, the bytes on both sides, what changed

What a packed record is stands in `quant/`, how a directory of them is written and read in `checkpoint/packed.py`.
"""
