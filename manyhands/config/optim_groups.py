"""By its name and dimensions alone: which group of parameters one belongs to (the table of `train/optim.py`)."""


def optim_group(name: str, dimensions: int) -> str:
    """`router`, `embed`, `shared_expert_gate`, `vector`, `gate_up` or `hidden`."""
    parts = name.split(".")
    if "router" in parts:
        return "router"
    if "embed_tokens" in parts or ("lm_head" in parts and parts[-1] != "bias"):
        return "embed"
    if "shared_expert_gate" in parts:
        return "shared_expert_gate"
    # The experts' biases are stacked, and relative positions are a table: two dimensions, still no matrices.
    if dimensions < 2 or parts[-1].endswith("bias") or "relative_attention_bias" in parts:
        return "vector"
    return "gate_up" if parts[-1] == "gate_up_proj" else "hidden"
