"""Count what transformers builds, on the meta device: the oracle of tests/plan/test_guess.py. Needs transformers."""

import gzip
import json
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FILE = Path(__file__).parents[1] / "tests" / "plan" / "transformers_counts.json.gz"


def counted(model_type: str) -> dict[str, object]:
    """The default configuration of a type, its parameters, and those of them that are vectors."""
    config = CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    parameters = list({id(p): p for p in model.parameters()}.values())
    return {
        "config": json.loads(config.to_json_string(use_diff=True)),
        "total": sum(p.numel() for p in parameters),
        "vectors": sum(p.numel() for p in parameters if p.dim() < 2),
    }


def main() -> None:
    """Every causal language model that builds from its defaults; the others are listed."""
    transformers.logging.set_verbosity_error()
    found: dict[str, object] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            found[model_type] = counted(model_type)
        except Exception as error:  # a default that its own class refuses, or a package that is not installed
            print(f"{model_type}: {type(error).__name__}: {str(error)[:80]}")
    text = json.dumps(found, separators=(",", ":"), sort_keys=True)
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{FILE}: {len(found)} types of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
