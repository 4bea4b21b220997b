"""Turns: what is computed twice, what is remembered, what a full context and an interrupted answer leave behind."""

import pytest
import torch

from manyhands.engine.runner import Runner
from manyhands.errors import CheckpointError, DataError, UserError
from manyhands.generate import Conversation, Prefix, SamplingConfig, Step, conversation, generate
from manyhands.generate.conversation_file import load_conversation, save_conversation

from .conftest import GQA

GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    return tokenizer.with_chat_template(TEMPLATE)


def ids_of(steps):
    return [step.token_ids[0] for step in steps]


@pytest.fixture
def forwards(monkeypatch):
    """How many tokens of each forward pass, in order."""
    lengths = []
    run = Runner.run

    def spy(self, batch):
        lengths.append(batch.num_tokens)
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", spy)
    return lengths


@pytest.mark.parametrize(
    ("then", "run"),
    [
        ([], 1),  # the same again: its last token, whose logits are needed
        ([50, 60], 2),
        ([50, 60, 70, 80], 4),
    ],
)
def test_a_prefix_saves_work_and_changes_nothing(model, forwards, then, run):
    prompt, prefix = [5, 6, 7, 8, 9, 10, 11], Prefix()
    first = ids_of(generate(model, [prompt], GREEDY, prefix=prefix))
    assert prefix.ids == prompt + first[:-1], "the last token was drawn, and has not run"
    again = prompt + then
    forwards.clear()
    steps = list(generate(model, [again], GREEDY, prefix=prefix))
    assert forwards == [run] + [1] * 7
    for step, fresh in zip(steps, generate(model, [again], GREEDY), strict=True):
        assert step.token_ids == fresh.token_ids
        for layer, routing in step.routings[0].items():
            assert torch.equal(routing.expert_ids, fresh.routings[0][layer].expert_ids)
            torch.testing.assert_close(routing.weights, fresh.routings[0][layer].weights, atol=1e-4, rtol=1e-4)


def test_a_prefix_follows_any_change(model):
    prefix = Prefix()
    for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9, 9, 9, 9, 9], [1, 2], [7, 8, 9], [7], [1, 2, 3, 4, 5, 6]):
        assert ids_of(generate(model, [prompt], GREEDY, prefix=prefix)) == ids_of(generate(model, [prompt], GREEDY))


def test_a_prefix_survives_what_was_cut_short(model, monkeypatch):
    prefix, prompt = Prefix(), [1, 2, 3, 4, 5, 6]
    expected = ids_of(generate(model, [prompt], GREEDY))
    steps = generate(model, [prompt], GREEDY, prefix=prefix)
    next(steps), next(steps)
    steps.close()
    assert ids_of(generate(model, [prompt], GREEDY, prefix=prefix)) == expected
    with monkeypatch.context() as patch:
        block = type(model.layers[1])

        def interrupted(self, *args):
            raise KeyboardInterrupt

        patch.setattr(block, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generate(model, [[*prompt, 7]], GREEDY, prefix=prefix))
    assert prefix.ids == [] and prefix.cache is None
    assert ids_of(generate(model, [prompt], GREEDY, prefix=prefix)) == expected


def test_turns_are_remembered_and_not_computed_twice(make, chatty, forwards):
    model = make(max_position_embeddings=512)
    talk = Conversation(model, chatty, GREEDY, system="Be many.")
    assert forwards == []
    first = "".join(step.texts[0] for step in talk.ask("one"))
    before = len(chatty.apply_chat_template(talk.messages[:2]))
    forwards.clear()
    second = list(talk.ask("two"))
    prompt = chatty.apply_chat_template(talk.messages[:-1])
    assert forwards[0] <= len(prompt) - before, "the first turn's prompt is not run again"
    assert ids_of(second) == ids_of(generate(model, [prompt], GREEDY, chatty))
    answer = "".join(step.texts[0] for step in second)
    said = [(message["role"], message["content"]) for message in talk.messages]
    assert said == [
        ("system", "Be many."),
        ("user", "one"),
        ("assistant", first),
        ("user", "two"),
        ("assistant", answer),
    ]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be many."}]
    assert "".join(step.texts[0] for step in talk.ask("one")) == first


def test_the_seed_goes_on_with_the_turns(make, chatty):
    model, sampling = make(max_position_embeddings=512), SamplingConfig(max_new_tokens=12, seed=3)
    one, two = (Conversation(model, chatty, sampling) for _ in range(2))
    turns = [ids_of(one.ask("x")), ids_of(one.ask("x"))]
    assert turns == [ids_of(two.ask("x")), ids_of(two.ask("x"))]
    assert turns[0] != turns[1]


def test_an_interrupted_answer_is_what_was_said_so_far(make, chatty):
    talk = Conversation(make(max_position_embeddings=512), chatty, GREEDY)
    steps = talk.ask("one")
    text = "".join(next(steps).texts[0] for _ in range(5))
    steps.close()
    assert text and talk.messages == [{"role": "user", "content": "one"}, {"role": "assistant", "content": text}]
    talk.ask("two").close()
    assert len(talk.messages) == 2, "not a word of answer: it was no turn"


def test_a_full_context_is_said_and_the_turn_forgotten(make, chatty):
    talk = Conversation(make(max_position_embeddings=48), chatty, GREEDY)
    list(talk.ask("one"))
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"conversation has \d+ tokens.*context holds 48: say less"):
        talk.ask("two " * 40)
    assert talk.messages == before
    (*_, last) = talk.ask("2")
    assert last.finish_reasons == ["length"]


def test_a_full_context_leaves_out_the_oldest_turns_and_goes_on(make, chatty):
    talk = Conversation(make(max_position_embeddings=96), chatty, GREEDY, system="Be many.")
    left_out = []
    for text in ("one", "two", "three", "four", "five", "six"):
        assert list(talk.ask(text))
        left_out.append(talk.left_out)
        assert talk.messages[0] == {"role": "system", "content": "Be many."} and talk.messages[-2]["content"] == text
    assert left_out[0] == 0 and sum(left_out) > 0
    assert len(talk.messages) == 1 + 2 * (6 - sum(left_out))


HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if '<|channel|>' in m.content %}"
    "{{ raise_exception('channel tags in content') }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_a_model_that_answers_in_channels_has_a_second_turn(make, chatty, monkeypatch):
    raw = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Hi!"
    chatty = chatty.with_chat_template(HARMONY)
    talk = Conversation(make(max_position_embeddings=512), chatty, GREEDY)

    def scripted(*_args):
        return iter([Step([1], [raw[:30]], [None]), Step([1], [raw[30:]], ["stop"])])

    monkeypatch.setattr(conversation, "in_step", scripted)
    list(talk.ask("hello"))
    assert talk.messages[-1] == {"role": "assistant", "content": "Hi!"}
    list(talk.ask("again"))
    text = chatty.render_chat(talk.messages[:3])
    assert "<|start|>assistant<|channel|>final<|message|>Hi!<|end|>" in text and "analysis" not in text
    with pytest.raises(DataError, match="channel tags in content"):
        chatty.apply_chat_template([{"role": "assistant", "content": raw}])


def test_any_of_the_ends_ends(make, chatty):
    model = make(max_position_embeddings=512)
    free = ids_of(Conversation(model, chatty, GREEDY).ask("one"))
    chatty = chatty.with_chat_template(TEMPLATE)
    chatty.eos_token_ids = frozenset({free[5], free[2], 319})
    talk = Conversation(model, chatty, GREEDY)
    steps = list(talk.ask("one"))
    assert ids_of(steps) == free[:3] and steps[-1].finish_reasons == ["stop"] and steps[-1].token_ids == [free[2]]
    assert talk.messages[-1]["content"] == chatty.decode(free[:2]), "the end is not a part of the answer"


def test_what_cannot_be_is_said_at_the_start(make, tokenizer, chatty):
    model = make(attention=GQA)
    with pytest.raises(CheckpointError, match="no chat template"):
        Conversation(model, tokenizer, GREEDY)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    Conversation(model, chatty.with_chat_template(refuses), GREEDY)
    with pytest.raises(DataError, match="no system here"):
        Conversation(model, chatty.with_chat_template(refuses), GREEDY, system="s")


def text_of(steps):
    return "".join(step.texts[0] for step in steps)


def test_a_turn_is_taken_back_or_answered_anew(model, chatty):
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=6)
    talk, fresh = Conversation(model, chatty, sampling), Conversation(model, chatty, sampling)
    assert talk.undo() is None
    with pytest.raises(UserError, match="nothing was asked"):
        talk.regenerate()
    first = text_of(talk.ask("f"))
    assert text_of(fresh.ask("f")) == first
    before = list(talk.messages)
    text_of(talk.ask("x"))
    assert talk.undo() == "x" and talk.messages == before
    answers = {text_of(talk.regenerate()) for _ in range(4)} | {first}
    assert len(answers) > 1, "each draws differently"
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[1]["content"] in answers
    kept = list(talk.messages)
    talk.regenerate().close()
    assert talk.messages == kept, "the answer that there is stays if nothing new is said"
    assert talk.undo() == "f" and talk.messages == []


def test_the_system_is_heard_from_then_on(model, chatty):
    talk = Conversation(model, chatty, GREEDY, "be")
    list(talk.ask("f"))
    past = talk.messages[1:]
    talk.system("do")
    assert talk.messages == [{"role": "system", "content": "do"}, *past]
    other = Conversation(model, chatty, GREEDY, "do")
    other.take(talk.messages)
    assert ids_of(talk.ask("x")) == ids_of(other.ask("x")) and talk.prompt_tokens == other.prompt_tokens > 0
    talk.system(None)
    assert talk.messages[0] == past[0]
    talk.reset()
    assert talk.messages == []
    refusing = chatty.with_chat_template("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}")
    talk = Conversation(model, refusing, GREEDY)
    with pytest.raises(DataError):
        talk.system("do")
    assert talk.messages == []


def test_a_conversation_is_written_and_read(model, chatty, tmp_path):
    talk, path = Conversation(model, chatty, GREEDY, "be"), tmp_path / "talk.json"
    list(talk.ask("für"))
    save_conversation(path, talk.messages)
    assert load_conversation(path) == talk.messages
    save_conversation(path, [])  # its own is replaced
    assert load_conversation(path) == []
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    assert len(load_conversation(path)) == 2
    with pytest.raises(UserError, match="was not made by this program"):
        save_conversation(path, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "no conversation"),
        ("[", "talk.json"),
        ('{"messages": 3}', "no conversation"),
        ('{"messages": [], "version": 2}', "version 2"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "role = 'user'"),
        ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant"}]}', "not text"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "content is missing"),
        ('{"messages": [1, 2]}', r"messages\[0\]"),
    ],
)
def test_what_is_no_conversation_is_one_line(text, said, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        load_conversation(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_conversation(tmp_path / "nowhere.json")
