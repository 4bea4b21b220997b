"""Every family from GGUF: the same model as from its publisher's files, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.checkpoint.gguf.open import open_gguf
from manyhands.checkpoint.model import load_model
from manyhands.families.gguf import ARCHS

from .other_references import make_any
from .references import PLAIN, YARN, make
from .to_gguf import to_gguf

YARN_ONE = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"use_sliding_window": False},
    "mixtral": {"sliding_window": None},
    "deepseek": {},
    "deepseek_v2": {"rope_parameters": YARN_ONE},
    "deepseek_v2, greedy": {},
    "deepseek_v3": {"rope_parameters": YARN_ONE},
    "deepseek_v3, full-rank queries": {"rope_parameters": PLAIN},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1, "attention_bias": False},
    "olmoe": {},
    "gpt_oss": {},
    "glm4_moe": {},
    "dots1": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "granitemoe": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "minimax_m2": {},
    "grok-1": {},
}
IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def test_every_architecture_has_a_case() -> None:
    assert {case.split(",")[0] for case in CASES} == ARCHS.keys()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def directory_of(case: str, changes: dict[str, Any], made: dict[str, Path], factory: Any) -> Path:
    if case not in made:
        made[case] = factory.mktemp("published") / "model"
        (make(case, made[case], **changes) if changes else make_any(case, made[case]))
    return made[case]


@pytest.mark.parametrize("case", CASES)
def test_the_same_model(case: str, directories: dict[str, Path], tmp_path_factory, tmp_path: Path) -> None:
    directory = directory_of(case, CASES[case], directories, tmp_path_factory)
    path = to_gguf(directory, tmp_path / "model.gguf")
    ours, theirs = load_model(path), load_model(directory, dtype=torch.float32)
    assert ours.config.model_copy(update={"initializer_range": theirs.config.initializer_range}) == theirs.config
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    values = json.loads((directory / "config.json").read_text())
    assert open_gguf(path).values["model_type"] == values["model_type"]
