"""What an encoder-decoder writes: step by step what a whole forward pass would say, and it ends where it should."""

from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.config import EncoderDecoderConfig, RouterConfig, SamplingConfig
from manyhands.errors import ManyhandsError, UserError
from manyhands.generate.pairs import filled, rewrite, write
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.text import Tokenizer

PROMPT = "def f(<extra_id_0>):\n    return <extra_id_1>\n"
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x\n" * 20], 280, sentinels=4)


def build(tokenizer: Tokenizer, select: str = "topk") -> EncoderDecoder:
    torch.manual_seed(3)
    router = RouterConfig.model_validate({"num_experts": 4, "num_experts_per_tok": 1, "select": select})
    config = EncoderDecoderConfig(
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_decoder_layers=2,
        intermediate_size=24,
        num_attention_heads=2,
        head_dim=8,
        router=router,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    return EncoderDecoder(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> EncoderDecoder:
    return build(tokenizer)


def test_greedy_is_the_argmax_of_whole_passes(model: EncoderDecoder, tokenizer: Tokenizer) -> None:
    [found] = rewrite(model, tokenizer, [PROMPT], GREEDY)
    read = torch.tensor([[*tokenizer.encode(PROMPT, parse_special=True), 1]])
    assert read[0].tolist().count(tokenizer.sentinel_ids[0]) == 1
    written = [0]
    for token in found.token_ids:
        assert token == int(model(read, torch.tensor([written])).logits[0, -1].argmax())
        written.append(token)
    assert (len(found.token_ids) == 12 and found.finish_reason == "length") or found.token_ids[-1] == 1
    assert found.text == tokenizer.decode([token for token in found.token_ids if token != 1])


def test_a_prompts_answer_is_its_own(model: EncoderDecoder, tokenizer: Tokenizer) -> None:
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=10, seed=5, logprobs=0)
    alone, beside = rewrite(model, tokenizer, [PROMPT], sampling), rewrite(model, tokenizer, ["x", PROMPT], sampling)
    assert alone[0] == beside[1]
    others = [rewrite(model, tokenizer, [PROMPT], sampling.model_copy(update={"seed": seed}))[0] for seed in range(4)]
    assert len({tuple(one.token_ids) for one in others}) == 4
    assert alone[0].logprobs is not None and len(alone[0].logprobs) == len(alone[0].token_ids)
    assert [said.token_id for said in alone[0].logprobs] == alone[0].token_ids


def test_how_it_ends(model: EncoderDecoder, tokenizer: Tokenizer) -> None:
    [free] = rewrite(model, tokenizer, [PROMPT], GREEDY.model_copy(update={"ignore_eos": True}))
    forced = GREEDY.model_copy(update={"logit_bias": ((1, 100.0),)})
    [ended] = rewrite(model, tokenizer, [PROMPT], forced)
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("", [1], "stop")
    at = free.token_ids[2]
    [stopped] = rewrite(model, tokenizer, [PROMPT], GREEDY.model_copy(update={"stop_token_ids": (at,)}))
    assert stopped.finish_reason == "stop" and stopped.stop_reason == at
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(at) + 1]
    forced = GREEDY.model_copy(update={"logit_bias": ((66, 100.0),), "stop": (tokenizer.decode([66]) * 3,)})
    [stopped] = rewrite(model, tokenizer, [PROMPT], forced)
    assert (stopped.text, len(stopped.token_ids), stopped.stop_reason) == ("", 3, tokenizer.decode([66]) * 3)
    assert rewrite(model, tokenizer, [PROMPT], SamplingConfig(max_new_tokens=0))[0].token_ids == []


def test_the_mode_is_put_back(model: EncoderDecoder, tokenizer: Tokenizer) -> None:
    model.train()
    pieces = write(model, tokenizer, PROMPT, GREEDY)
    next(pieces)
    assert model.training
    model.eval()
    [again] = rewrite(model, tokenizer, [PROMPT], GREEDY)
    assert [piece.token_id for piece in pieces] == again.token_ids[1:] and not model.training


def test_what_cannot_be_is_said(model: EncoderDecoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        write(model, tokenizer, "", GREEDY)
    with pytest.raises(UserError, match="prompt_logprobs"):
        write(model, tokenizer, PROMPT, SamplingConfig(prompt_logprobs=1))
    with pytest.raises(UserError, match="expert_choice"):
        write(build(tokenizer, "expert_choice"), tokenizer, PROMPT, GREEDY)
    broken = build(tokenizer)
    torch.nn.init.constant_(broken.embed_tokens.weight, float("nan"))
    with pytest.raises(ManyhandsError, match="NaN or infinite"):
        rewrite(broken, tokenizer, [PROMPT], GREEDY)


def test_a_switch_checkpoint_writes_what_it_writes_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With room for two tokens per expert: the encoder drops what does not fit, and a single step never does."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 2}
    untied = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = SwitchTransformersConfig(**sizes, **sparse, **untied, num_decoder_layers=2)
    theirs = SwitchTransformersForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, EncoderDecoder)
    read = torch.tensor([[*tokenizer.encode(PROMPT, parse_special=True), 1]])
    expected = theirs.generate(read, do_sample=False, max_new_tokens=12)[0, 1:].tolist()
    [found] = rewrite(ours, tokenizer, [PROMPT], GREEDY)
    assert found.token_ids == expected and len(set(expected)) > 2


@pytest.mark.parametrize(
    ("prompt", "written", "expected"),
    [
        ("a <extra_id_0> b <extra_id_1>.", "<extra_id_0>x y<extra_id_1> z", "a x y b  z."),
        ("a <extra_id_0> b <extra_id_1>.", "<extra_id_0>x", "a x b <extra_id_1>."),
        ("a <extra_id_0> b.", "noise<extra_id_0>x<extra_id_0>y<extra_id_7>", "a x b."),
        ("a <extra_id_0> b.", "", "a <extra_id_0> b."),
        ("a b.", "<extra_id_0>x", None),
    ],
)
def test_filled(prompt: str, written: str, expected: str | None) -> None:
    assert filled(prompt, written) == expected
