"""What lm-eval asks is answered by the model; lm-eval itself is played by the little of it that is imported."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import UserError
from manyhands.generate.harness import Answers, language_model, run_tasks
from manyhands.generate.score import Scorer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def asks(*args):
    return SimpleNamespace(args=args)


@pytest.fixture
def lm_eval(monkeypatch):
    """The names that are imported; `simple_evaluate` asks one question of each kind."""
    package, api, model, tasks = (
        ModuleType(n) for n in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    )

    class LM:
        def __init__(self) -> None:
            self.rank, self.world_size = 0, 1

    class TaskManager:
        def __init__(self, include_path=None) -> None:
            self.include_path = include_path

        @property
        def all_tasks(self):
            return ["arc_easy", "local"] if self.include_path else ["arc_easy"]

    def simple_evaluate(model, tasks, **how):
        assert isinstance(model, LM) and model.world_size == 1
        if "broken" in how["task_manager"].include_path:
            raise ConnectionError("no\nnetwork")
        found = model.loglikelihood([asks("a", " b")]), model.loglikelihood_rolling([asks("abc")])
        return {"results": {task: {"acc,none": 1.0} for task in tasks}, "found": found, "how": how}

    model.LM, tasks.TaskManager, package.simple_evaluate = LM, TaskManager, simple_evaluate
    for module in (package, api, model, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def answers(make, tokenizer):
    return Answers(make(), tokenizer, name="models/toy")


def test_continuations(answers, tokenizer) -> None:
    requests = [asks("def f(x):", " return"), asks("", "x"), asks("def f(x):", " +")]
    pairs = [answers.asker.pair(*request.args) for request in requests]
    expected = [(s.logprob, s.greedy) for s in Scorer(answers.model).score(pairs)]
    assert answers.loglikelihood(requests) == expected
    assert answers.loglikelihood([]) == []


def test_a_text_is_the_sum_of_its_pieces(make, tokenizer) -> None:
    answers = Answers(make(), tokenizer, max_length=8)
    text = "def f(x):\n    return x + 1\n" * 3
    (found,) = answers.loglikelihood_rolling([asks(text)])
    windows = answers.asker.windows(text)
    assert len(windows) > 2
    assert found == pytest.approx(sum(s.logprob for s in Scorer(answers.model).score(windows)), rel=1e-6)
    assert answers.loglikelihood_rolling([asks(""), asks(text)]) == [0.0, pytest.approx(found, rel=1e-6)]


def test_answers_are_the_engines(answers, tokenizer) -> None:
    settings = {"max_gen_toks": 6, "until": []}
    found = answers.generate_until([asks("def", settings), asks("x +", settings)])
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=6)
    expected = Engine(answers.model, tokenizer).generate(["def", "x +"], greedy)
    assert found == [completion.text for completion in expected] and any(found)
    stop = found[0][2]
    assert answers.generate_until([asks("def", {**settings, "until": [stop]})]) == [found[0].split(stop)[0]]


def test_a_question_that_is_asked_again_gets_another_sample(answers) -> None:
    question = asks("def", {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0})
    found = answers.generate_until([question] * 3)
    assert len(set(found)) == 3
    assert answers.generate_until([question] * 3) == found


def test_questions_that_cannot_be_answered(make, tokenizer) -> None:
    answers = Answers(make(), tokenizer, max_length=16)
    assert answers.max_gen_toks == 8
    with pytest.raises(UserError, match="max_gen_toks = 16"):
        answers.generate_until([asks("def", {"max_gen_toks": 16})])
    for length in (0, 1, 49):
        with pytest.raises(UserError, match="2 to 48"):
            Answers(make(), tokenizer, max_length=length)


def test_chat(make, tokenizer) -> None:
    answers = Answers(make(), tokenizer.with_chat_template(TEMPLATE), name="models/toy")
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is "}]
    assert answers.apply_chat_template(history[:1]) == "[user]hi\n[assistant]"
    assert answers.apply_chat_template(history, add_generation_prompt=False) == "[user]hi\n[assistant]It is"
    assert answers.chat_template(True) == TEMPLATE and answers.chat_template(False) is None
    assert answers.tokenizer_name == "models__toy"


def test_progress_and_what_lm_eval_keeps(make, tokenizer) -> None:
    seen, kept = [], []
    answers = Answers(make(), tokenizer, progress=lambda *said: seen.append(said))
    answers.cache_hook = SimpleNamespace(add_partial=lambda *what: kept.append(what))
    (found,) = answers.loglikelihood([asks("a", " b")])
    answers.generate_until([asks("a", {"max_gen_toks": 2})])
    assert seen == [("continuations", 1, 1), ("answers", 1, 1)]
    assert kept[0] == ("loglikelihood", ("a", " b"), found) and kept[1][0] == "generate_until"


def test_a_run(lm_eval, make, tokenizer, tmp_path) -> None:
    lm = language_model(make(), tokenizer)
    found = run_tasks(lm, ["local"], num_fewshot=2, limit=5, task_dir=tmp_path)
    assert found["found"] == (lm.loglikelihood([asks("a", " b")]), lm.loglikelihood_rolling([asks("abc")]))
    how = found["how"]
    assert (how["num_fewshot"], how["limit"], how["apply_chat_template"]) == (2, 5, False)
    json.dumps(found["results"])


def test_tasks_that_are_not_there(lm_eval, make, tokenizer, tmp_path) -> None:
    lm = language_model(make(), tokenizer)
    with pytest.raises(UserError, match=r"no task is called 'arc_eazy'; did you mean 'arc_easy'\?"):
        run_tasks(lm, ["arc_eazy"])
    with pytest.raises(UserError, match="--task-dir"):
        run_tasks(lm, ["local"])
    with pytest.raises(UserError, match="lm-eval stopped: ConnectionError: no network"):
        run_tasks(lm, ["local"], task_dir=tmp_path / "broken")


def test_without_lm_eval(make, tokenizer, monkeypatch) -> None:
    for name in ("lm_eval", "lm_eval.api.model", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'manyhands\[eval\]'"):
        language_model(make(), tokenizer)
    with pytest.raises(UserError, match=r"pip install 'manyhands\[eval\]'"):
        run_tasks(None, ["arc_easy"])
