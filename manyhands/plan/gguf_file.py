"""A model in GGUF as a plan sees it: what it is, and what its components take as they are stored."""

from dataclasses import dataclass
from pathlib import Path

from manyhands.config import ModelConfig
from manyhands.config.decoder import as_decoder
from manyhands.families import read_config
from manyhands.families.gguf import config_fields, pieces, read_series
from manyhands.plan.count import BUFFERS, COMPONENTS, component

_PARTS = {  # tensors that are stored in another way than they are meant, by what is in their names
    ".attn_k_b.": "attention",
    ".attn_v_b.": "attention",
    ".attn_qkv.": "attention",
    ".ffn_gate_up_exps.": "routed experts",
}


@dataclass(frozen=True, slots=True)
class GgufSubject:
    """What a file says."""

    config: ModelConfig
    published: str
    """Models of its family."""
    sizes: dict[str, int]
    """Bytes of each component."""
    file_bytes: int


def read_gguf(path: Path) -> GgufSubject:
    """From the headers alone. Raises `CheckpointError` or `ConfigError` naming what is wrong."""
    header, parts = read_series(path)
    arch, values = config_fields(header)
    family, found = read_config(values, str(path))
    config = as_decoder(found, "GGUF")
    meant = {piece.theirs: piece.ours for piece in pieces(config, arch)}
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, info in header.tensors.items():
        ours = meant.get(name)
        if ours is not None:
            sizes[component(ours)] += 0 if ours.endswith(BUFFERS) else info.size
        elif (part := next((part for text, part in _PARTS.items() if text in name), None)) is not None:
            sizes[part] += info.size
        elif name.count(".") == 4 and ".ffn_" in name:  # blk.0.ffn_up.7.weight
            sizes["routed experts"] += info.size
    sizes = {name: size for name, size in sizes.items() if size}
    return GgufSubject(config, family.published, sizes, sum(part.path.stat().st_size for part in parts))
