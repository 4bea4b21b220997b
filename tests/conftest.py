"""Shared by every test: one thread, so that the suite's speed does not hang on what else the machine does."""

import torch

torch.set_num_threads(1)
