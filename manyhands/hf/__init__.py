"""transformers' own models: see their routing, and run their experts on our backends.

    with watch(model) as seen:                      # any family that routes; its output stays the same, bit for bit
        model(ids, attention_mask=mask)
    seen.routings[3].expert_counts()                # {layer number: Routing} of the last forward

    with record(model, "trace"):                    # every forward as a trace: who went where, and with whom
        model.generate(ids)

    use_experts(model)                              # or register_experts(), then
    model.set_experts_implementation("manyhands")   # transformers' own switch; back with "grouped_mm" or "eager"

Outside the core: nothing in manyhands imports this room, and it imports transformers inside the functions that need it.
"""

from manyhands.hf.experts import expert_weights, register_experts, use_experts
from manyhands.hf.recording import record
from manyhands.hf.routings import Seen, watch

__all__ = ["Seen", "expert_weights", "record", "register_experts", "use_experts", "watch"]
