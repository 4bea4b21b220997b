"""`model.generate`: what transformers' own gives, token for token; and what it says instead of ignoring an argument."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manyhands.checkpoint.model import load_model
from manyhands.errors import ConfigError, ManyhandsError, UserError
from manyhands.models import Decoder
from tests.families.references import CASES, quiet, randomise
from tests.models.tiny_models import ids, tiny

transformers = pytest.importorskip("transformers")
PROMPTS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]])
PAD = 1


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    """A model of transformers and what we read of its files. (Theirs in float64 answers NaN behind padding.)"""
    quiet()
    name, fields = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields)).eval()
    randomise(theirs, hostile=False)
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    theirs.save_pretrained(directory)
    ours = load_model(directory)
    assert isinstance(ours, Decoder)
    return theirs, ours


def test_greedy_is_theirs(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    given: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    plain = theirs.generate(PROMPTS, **given)
    assert torch.equal(ours.generate(PROMPTS, **given), plain)
    with torch.no_grad():
        best = ours(plain[:1]).logits[0, 8:-1].topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-3, "two tokens hang on rounding"
    ends = sorted({int(plain[0, 11]), int(plain[1, 13])})  # so that rows end at different lengths
    for more in ({"eos_token_id": ends}, {"eos_token_id": ends, "min_new_tokens": 7}, {"repetition_penalty": 1.7}):
        expected = theirs.generate(PROMPTS, **given, **more)
        assert torch.equal(ours.generate(PROMPTS, **given, **more), expected)
        assert not torch.equal(expected, plain)


def test_processors_of_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    processors = transformers.LogitsProcessorList(
        [
            transformers.NoRepeatNGramLogitsProcessor(1),
            transformers.SuppressTokensLogitsProcessor(list(range(50)), device="cpu"),
        ]
    )
    given: dict[str, Any] = {"max_new_tokens": 10, "logits_processor": processors, "do_sample": False}
    expected = theirs.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **given)
    found = ours.generate(PROMPTS, **given)
    assert torch.equal(found, expected) and int(found[:, 9:].min()) >= 50


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny()


def test_sampling_follows_torchs_seed(model: Decoder) -> None:
    def draw(seed: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids(), do_sample=True, max_new_tokens=16, **more)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), model.generate(ids(), max_new_tokens=16))
    three = draw(1, num_return_sequences=3)
    assert three.shape == (6, 28) and torch.equal(three[:, :12], ids().repeat_interleave(3, 0))
    assert len({tuple(row) for row in three[:3].tolist()}) == 3
    assert model.training


def test_a_streamer_gets_every_column_and_criteria_end_rows(model: Decoder) -> None:
    class Columns:
        def __init__(self) -> None:
            self.got: list[Tensor] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.got.append(value)

        def end(self) -> None:
            self.ended += 1

    streamer = Columns()
    plain = model.generate(ids(), max_new_tokens=8)
    wanted = int(plain[0, 14])

    def long(ids_1N: Tensor, scores: None) -> bool:
        return int(ids_1N[0, -1]) == wanted

    criteria = transformers.StoppingCriteriaList([long])
    out = model.generate(ids(), max_new_tokens=8, stopping_criteria=criteria, streamer=streamer, pad_token_id=63)
    assert torch.equal(torch.cat([streamer.got[0], torch.stack(streamer.got[1:], 1)], 1), out) and streamer.ended == 1
    assert torch.equal(out[0, :15], plain[0, :15]) and bool((out[0, 15:] == 63).all())


def test_twenty_more_and_no_further_than_the_context() -> None:
    model = tiny(max_position_embeddings=40)
    assert model.generate(ids()).shape == (2, 32)
    assert model.generate(ids(), max_length=15).shape == (2, 15)
    assert model.generate(ids(S=30)).shape == (2, 40)
    with pytest.raises(UserError, match=r"max_new_tokens = 11 do not fit: max_position_embeddings = 40; at most 10"):
        model.generate(ids(S=30), max_new_tokens=11)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 4}, "num_beams is not done here"),
    "misspelt": ({"max_new_token": 4}, "did you mean 'max_new_tokens'"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds is not done here; token ids"),
    "a dictionary": ({"return_dict_in_generate": True}, "the ids come as a tensor"),
    "temperature alone": ({"temperature": 0.7}, "temperature = 0.7 does nothing without do_sample=True"),
    "several greedy": ({"num_return_sequences": 2}, "num_return_sequences = 2"),
    "a mask of another shape": ({"attention_mask": torch.ones(2, 11)}, r"attention_mask is \[2, 11\]"),
    "padding behind": ({"attention_mask": torch.ones(2, 12).tril(8)}, "row 0 has padding behind a token"),
    "nothing but padding": ({"attention_mask": torch.zeros(2, 12)}, "row 0 of input_ids has no token"),
    "one row": ({"input_ids": ids()[0]}, r"input_ids is \[12\] of torch.int64"),
    "numbers": ({"input_ids": ids().float()}, "float32"),
    "a list": ({"input_ids": ids().tolist()}, "input_ids is list"),
    "shorter than the prompt": ({"max_length": 12}, "the prompt has 12 tokens already"),
    "no token of it": ({"input_ids": ids() + 64}, "vocab_size = 64"),
    "no padding to be had": ({"stopping_criteria": [lambda ids, scores: True]}, "give pad_token_id"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_line_for_what_is_wrong(model: Decoder, wrong: str) -> None:
    given, says = WRONG[wrong]
    with pytest.raises(UserError, match=says) as caught:
        model.generate(**{"input_ids": ids(), **given})
    assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_taken(model: Decoder) -> None:
    plain = model.generate(ids(), max_new_tokens=3)
    usual: dict[str, Any] = {
        "num_beams": 1,
        "use_cache": True,
        "temperature": 1.0,
        "top_k": 50,
        "generation_config": None,
    }
    assert torch.equal(model.generate(ids(), max_new_tokens=3, **usual), plain)
    assert torch.equal(model.generate(ids(), max_new_tokens=3, temperature=0.0), plain)
    with pytest.raises(ConfigError, match="temperature"):
        model.generate(ids(), do_sample=True, temperature=-1.0)


def test_what_a_processor_raises_is_raised(model: Decoder) -> None:
    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(ids(), logits_processor=[broken])
    with pytest.raises(ManyhandsError, match=r"^a logits processor gave \[64\] for scores \[1, 64\]"):
        model.generate(ids(), logits_processor=[lambda ids, scores: scores[0]])
    with pytest.raises(ManyhandsError, match="no token is allowed"):
        model.generate(ids(), logits_processor=[lambda ids, scores: scores - float("inf")])
