"""Published model families: one file each, `config.json` and tensor names both ways. Needs no torch.

family, config = read_config(json.loads(text), "config.json")
family.model_type, config.moe.router.num_experts
"""

from manyhands.families.base import Family, Piece
from manyhands.families.fields import UnknownField
from manyhands.families.fit import canonical, export_config, misfit, nearest, read_config, text_fields
from manyhands.families.registry import FAMILIES, family_named

__all__ = [
    "FAMILIES",
    "Family",
    "Piece",
    "UnknownField",
    "canonical",
    "export_config",
    "family_named",
    "misfit",
    "nearest",
    "read_config",
    "text_fields",
]
