"""Changing a model that is there: fine-tuning it (start with `run.py`), growing and shrinking it.

upcycle.py      a dense model as a mixture of copies of its networks, exact or refused (copies.py)
prune.py        a mixture with fewer experts, and what that cost (pruned.py)
importance.py   what an expert is worth: REAP, frequency, gate
keep.py         which stay, and a layer of those alone
merge.py        the others put into those that stay, channel by channel (align.py)
curve.py        every way to shrink run beside the whole model, one layer in memory at a time
by_layer.py     a model run from its files, one layer at a time
derived.py      a checkpoint some of whose tensors are computed
write.py        such a checkpoint as a directory with a receipt
"""
