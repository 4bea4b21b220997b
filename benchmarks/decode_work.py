"""The work of `decode.py`: OLMoE's layer with random weights, as a plain checkpoint and in every packed format."""

from pathlib import Path

import torch
from llama_cpp_peer import BITS, write_gguf
from torch import Tensor

from manyhands.checkpoint.model import save
from manyhands.checkpoint.packed import records_of
from manyhands.checkpoint.random_packed import write_random_packed
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.config.shapes import tensor_shapes
from manyhands.models import Decoder

FULL = {"D": 2048, "H": 16, "E": 64, "F": 1024, "L": 4, "V": 16_384, "prefill": 512, "decode": 24}
QUICK = {"D": 256, "H": 4, "E": 16, "F": 128, "L": 2, "V": 2048, "prefill": 64, "decode": 8}


def model_config(size: dict[str, int]) -> ModelConfig:
    """OLMoE's layer at these sizes."""
    return ModelConfig(
        vocab_size=size["V"],
        hidden_size=size["D"],
        num_hidden_layers=size["L"],
        intermediate_size=size["F"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        attention={"num_attention_heads": size["H"], "head_dim": size["D"] // size["H"], "qk_norm": "full"},
        moe={
            "router": {"num_experts": size["E"], "num_experts_per_tok": 8, "norm_topk_prob": False},
            "moe_intermediate_size": size["F"],
        },
    )


def bytes_per_token(config: ModelConfig, system: str, experts: float | None = None) -> int:
    """What a decoded token reads: every linear layer, the chosen experts, the routers.

    `experts`: how many of a layer are read instead, by a step of several tokens.
    """
    assert config.moe is not None
    router = config.moe.router
    format = system.split()[1] if system.startswith("manyhands") and "not packed" not in system else "bf16"
    packed = PackedConfig(experts=packing(format), linear=packing(format))
    total = 0
    for record in records_of(config, packed):
        size = sum(size for _, size in record.layout.sections.values())  # without what fills the last page
        chosen = router.num_experts_per_tok if experts is None else experts
        total += size if record.num_experts is None else int(size * chosen)
    if system.startswith("llama.cpp"):
        total = int(total * BITS[system.split()[1]] / 16)
    return total + 4 * len(config.sparse_layers) * router.num_experts * config.hidden_size


def operations_per_token(config: ModelConfig) -> int:
    """Additions and multiplications of a prompt's token in linear layers and its experts; no attention, no head."""
    assert config.moe is not None
    D, router = config.hidden_size, config.moe.router
    experts = 3 * D * config.moe.moe_intermediate_size * router.num_experts_per_tok
    return 2 * config.num_hidden_layers * (4 * D * D + experts + D * router.num_experts)


def packing(format: str) -> Packing:
    """int4 in groups of 32."""
    return Packing(format=format, group_size=32 if format == "int4" else 0)  # type: ignore[arg-type]


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Random bfloat16 weights, and float32 routers, by our names."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in tensor_shapes(config).items():
        dtype = torch.float32 if ".router." in name else torch.bfloat16
        state[name] = torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        if "norm" in name:
            state[name].fill_(1.0)
    return state


def write_plain(config: ModelConfig, state: dict[str, Tensor], directory: Path) -> None:
    """The checkpoint that transformers reads too."""
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    save(model, directory, family="olmoe")


def held(config: ModelConfig, format: str, directory: Path) -> Path:
    """The files of one format (`plain`, a packed one, or one of llama.cpp's), written if they are not there."""
    if format in BITS:
        path = directory / "gguf" / f"{format}.gguf"
        if not path.exists():
            write_gguf(config, random_state(config), list(BITS), path.parent)
        return path
    path = directory / format
    if not path.exists() and format == "plain":
        write_plain(config, random_state(config), path)
    elif not path.exists():
        write_random(config, format, path)
    return path


def write_random(config: ModelConfig, format: str, directory: Path) -> None:
    """Random records of one format."""
    write_random_packed(directory, config, PackedConfig(experts=packing(format), linear=packing(format)))
