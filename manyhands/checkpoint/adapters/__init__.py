"""LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.

names.py    which of a family's modules holds what of which matrix of ours
fields.py   `adapter_config.json`: what it says, and what is refused
file.py     `adapter_model.safetensors`: A and B in pairs
read.py     all three layouts PEFT has written -> A and B of each matrix
write.py    both forms: an expert at a time, and fused
"""

from manyhands.checkpoint.adapters.read import Adapter, load_adapter, read_adapter
from manyhands.checkpoint.adapters.write import FORMS, adapter_of, save_adapter, write_adapter

__all__ = ["FORMS", "Adapter", "adapter_of", "load_adapter", "read_adapter", "save_adapter", "write_adapter"]
