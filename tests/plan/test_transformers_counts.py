"""Every causal language model that transformers builds from its defaults: counted right, or refused by name."""

import gzip
import json
from pathlib import Path

import pytest

from manyhands.errors import ConfigError
from manyhands.families import FAMILIES
from manyhands.plan.compute import mean_seen
from manyhands.plan.count import count_model
from manyhands.plan.guess import guess_config
from manyhands.plan.subject import read_subject

FILE = Path(__file__).parent / "transformers_counts.json.gz"
"""Of each type its configuration, its parameters on the meta device, and how many of them are vectors
(scripts/count_transformers.py)."""
COUNTED = {
    name: found for name, found in json.loads(gzip.decompress(FILE.read_bytes())).items() if name not in FAMILIES
}


@pytest.mark.parametrize("name", COUNTED)
def test_it_is_counted_right_or_refused(name: str) -> None:
    """Equal within norms and biases; parts beside the language model are named."""
    found = COUNTED[name]
    try:
        config, notes = guess_config(found["config"], "here")
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    counts = count_model(config)
    if any(note.startswith("beside the language model, not counted") for note in notes):
        assert counts.total <= found["total"] + found["vectors"]
    else:
        assert abs(counts.total - found["total"]) <= max(found["vectors"], counts.by_component["norms"])


def test_what_is_plain_is_planned() -> None:
    planned = set()
    for name, found in COUNTED.items():
        try:
            guess_config(found["config"], "here")
        except ConfigError:
            continue
        planned.add(name)
    assert {"axk1", "flint", "glm4_moe_lite", "mistral", "qwen2"} <= planned and len(planned) >= 40


def test_layers_with_chunks(tmp_path: Path) -> None:
    """Three of four of Llama 4, and of a file that nobody knows; a chunk's tokens see half of it in the mean."""
    scout = read_subject("llama-4-scout").sizes
    path = tmp_path / "config.json"
    plain = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 48, "num_attention_heads": 4, "d_ff": 64}
    path.write_text(json.dumps(plain | {"model_type": "own", "attention_chunk_size": 8192}))
    ours = read_subject(str(path)).sizes
    assert ours is not None and scout is not None and ours.chunked and scout.chunked
    assert scout.windows == (8192, 8192, 8192, None) * 12 == ours.windows
    assert mean_seen(20, 8, chunked=True) == pytest.approx(sum(i % 8 + 1 for i in range(20)) / 20, abs=0.5)
    assert mean_seen(4, 8, chunked=True) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [({"ffn_config": {"moe_num_experts": 8}}, "ffn_config"), ({"kv_lora_rank": 8}, "qk_nope_head_dim")],
)
def test_what_was_once_left_to_a_default_is_refused(change: dict[str, object], named: str) -> None:
    plain = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "d_ff": 64}
    with pytest.raises(ConfigError, match=named):
        guess_config(plain | change, "here")
