"""A transformers model's routing, and its experts on our backend: `python examples/watch_transformers.py [model]`."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyhands.hf import use_experts, watch

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:  # a small random one, offline
    config = AutoConfig.for_model("mixtral", vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config)
ids = torch.randint(model.config.get_text_config().vocab_size, (1, 64))
with torch.no_grad(), watch(model) as seen:
    expected = model(ids).logits
for layer, routing in seen.routings.items():
    print(f"layer {layer}: tokens per expert {routing.expert_counts().tolist()}")
use_experts(model)
with torch.no_grad():
    print(f"manyhands' experts: largest difference of a logit {(model(ids).logits - expected).abs().max():.1e}")
