"""How modules and threads are set for a while, and then as they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules (`list(model.modules())`) are in evaluation mode inside the block, and as they were after it.

    Gives those that were training: one that is added inside the block is trained after it.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield training
    finally:
        for module in training:
            module.training = True


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch works on one thread inside the block: for small work between calls of the native kernels.

    OpenMP's threads spin for milliseconds after an operator that woke them, on the cores that the kernels want next.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
