"""What a model costs, from its description alone: counts, memory, speed, price. Nothing here imports torch.

count.py      parameters: how many there are, how many work for a token
compute.py    FLOPs per token
storage.py    bits per weight, by class of tensor; bytes of weights
traffic.py    bytes read per step; how many experts a batch touches
cache.py      keys and values
machine.py    a machine, described or measured (measure.py)
roof.py       the best speed on it, and what limits it
"""

from manyhands.plan.count import Counts, count_model

__all__ = ["Counts", "count_model"]
