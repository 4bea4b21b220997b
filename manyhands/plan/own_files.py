"""What one of our checkpoints holds, to the byte: from the headers of its safetensors files, by component."""

from math import prod
from pathlib import Path

from manyhands import strict_json
from manyhands.plan.count import BUFFERS, Counts, component
from manyhands.plan.storage import Storage

_LIMIT = 100 << 20
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "I64": 8, "I32": 4}


def storage_of_files(directory: Path, counts: Counts, packed: bool) -> Storage | None:
    """Bits per weight of every component, padding and scales of packed records included; None without such files.

    Records are stored as uint8 under the names of their modules, other tensors under their own.
    """
    sizes = dict.fromkeys(counts.by_component, 0)
    try:
        for file in sorted(directory.glob("*.safetensors")):
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > _LIMIT:
                    return None
                header = strict_json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__" and not name.endswith(BUFFERS):
                    sizes[component(name)] += prod(entry["shape"]) * _BYTES[entry["dtype"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None
    return storage_of_sizes(sizes, counts, packed)


def storage_of_sizes(sizes: dict[str, int], counts: Counts, packed: bool) -> Storage | None:
    """Bits per weight, from the bytes of every component; None if one of them has none."""
    if not sizes or not all(sizes.values()):
        return None
    bits = {name: 8 * size / counts.by_component[name] for name, size in sizes.items()}
    widest = max(bits.values())
    linear = bits.get("dense feed-forward", bits.get("attention", widest))
    base = (bits.get("routed experts", linear), linear, bits.get("embedding", widest), bits.get("norms", widest))
    plain = Storage("files", *base)
    parts = tuple((name, value) for name, value in bits.items() if value != plain.bits(name))
    name = "packed" if packed else "fp32" if widest == 32 and min(bits.values()) == 32 else "files"
    return Storage(name, *base, "int8" if packed else "fp32", "by the bytes of its files", parts)
