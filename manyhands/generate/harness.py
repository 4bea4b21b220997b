"""A model behind lm-eval, the harness that published results come from: its three questions, and a run of its tasks.

    lm = language_model(model, tokenizer)  # give it to lm_eval.simple_evaluate
    results = run_tasks(lm, ["arc_easy"], num_fewshot=5)

lm-eval is imported by the two functions that need it, and by nothing else.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manyhands.engine.engine import Engine
from manyhands.errors import ManyhandsError, UserError
from manyhands.generate.questions import Asker, cut, sampling_of
from manyhands.generate.score import Pair, Scorer
from manyhands.models import Decoder
from manyhands.text import Tokenizer

Progress = Callable[[str, int, int], None]
"""What is under way, how many of its questions are done, and of how many."""
_SEED_END = 1 << 63


class Answers:
    """Answers lm-eval's requests: objects whose `args` are a context and a continuation, a text, or a context and
    settings. `language_model` makes an lm-eval `LM` of it."""

    cache_hook: Any = None
    """lm-eval's, which keeps answers."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        name: str = "manyhands",
        max_length: int | None = None,
        add_bos: bool | None = None,
        batch_size: int = 8,
        exact: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`max_length` are the tokens the model sees at most (None: its context); longer ones are cut from the left.

        `add_bos`: whether contexts get the beginning-of-text token (None: as the tokenizer does it). `batch_size` texts
        run at a time. `exact` as for the engine. Raises `UserError` for a model that cannot generate, or a length that
        is longer than its context.
        """
        super().__init__()
        context = model.config.longest_continued
        length = context if max_length is None else max_length
        if not 2 <= length <= context:
            raise UserError(f"a length of {length} tokens: the model's context holds 2 to {context}")
        self.model, self.words, self.name = model, tokenizer, name
        self.asker = Asker(tokenizer, length, add_bos)
        self.scorer = Scorer(model, lanes=batch_size, exact=exact)
        self.max_length = length
        self._batch_size, self._exact, self._progress = batch_size, exact, progress

    @property
    def tokenizer_name(self) -> str:
        """Names what lm-eval keeps of rendered questions."""
        return self.name.replace("/", "__")

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where a task says nothing."""
        return min(256, self.max_length // 2)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's, for lm-eval's records; None where none is to be used."""
        return self.words.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages as text. Without `add_generation_prompt` the last one is to be continued, so it stays open.

        Raises what `Tokenizer.render_chat` does.
        """
        text = self.words.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = str(chat_history[-1]["content"]).strip()
        at = text.rfind(last)
        if at < 0:
            raise UserError("the chat template changes the last message, so that it cannot be continued")
        return text[: at + len(last)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-probability, and whether no other token was more probable."""
        asked = [request.args for request in requests]
        found = self._score("continuations", [self.asker.pair(*args) for args in asked])
        for args, answer in zip(asked, found, strict=True):
            self._keep("loglikelihood", args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,) the log-probability of all of it."""
        owners: list[int] = []
        pairs: list[Pair] = []
        for number, request in enumerate(requests):
            windows = self.asker.windows(request.args[0])
            pairs += windows
            owners += [number] * len(windows)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score("pieces of text", pairs), strict=True):
            sums[owner] += logprob
        for request, answer in zip(requests, sums, strict=True):
            self._keep("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings) an answer, without what ended it.

        A question that is asked again gets the next seed, or sampling would say the same.
        """
        prompts, samplings, stops = [], [], []
        seen: Counter[str] = Counter()
        for request in requests:
            context, settings = request.args
            sampling, stop = sampling_of(settings, self.max_gen_toks)
            key = f"{context}\0{sorted(settings.items(), key=str)}"
            if seen[key]:
                sampling = sampling.model_copy(update={"seed": (sampling.seed + seen[key]) % _SEED_END})
            seen[key] += 1
            prompts.append(self.asker.prompt(context, sampling.max_new_tokens))
            samplings.append(sampling)
            stops.append(stop)
        engine = Engine(self.model, self.words, max_sequences=self._batch_size, exact=self._exact)
        texts: list[list[str]] = [[] for _ in requests]
        done = 0
        for number, token in engine.stream(prompts, samplings):
            texts[number].append(token.text)
            if token.finish_reason is not None:
                done += 1
                self._say("answers", done, len(requests))
        found = [cut("".join(text), stop) for text, stop in zip(texts, stops, strict=True)]
        for request, answer in zip(requests, found, strict=True):
            self._keep("generate_until", request.args, answer)
        return found

    def _score(self, what: str, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        scores = self.scorer.score(pairs, lambda done: self._say(what, done, len(pairs)))
        return [(score.logprob, score.greedy) for score in scores]

    def _say(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    def _keep(self, what: str, args: Any, answer: Any) -> None:
        if self.cache_hook is not None:
            self.cache_hook.add_partial(what, args, answer)


def language_model(model: Decoder, tokenizer: Tokenizer, **how: Any) -> Any:
    """`Answers(model, tokenizer, **how)` as an `lm_eval.api.model.LM`.

    Raises what that does, and `UserError` if lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise _missing() from None
    return type("ManyhandsLM", (Answers, LM), {})(model, tokenizer, **how)


def run_tasks(
    lm: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_dir: Path | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """lm-eval's results of tasks by name, or of the YAML files that are named; `samples` among them.

    `task_dir` holds YAML files of one's own. `limit`: only the first questions of each task. `chat`: questions go
    through the chat template, examples as turns. Raises `UserError` for an unknown task, and in one line for whatever
    lm-eval stumbles over.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise _missing() from None
    try:
        manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
        _check_names(tasks, manager)
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except ManyhandsError:
        raise
    except Exception as error:  # anything: tasks are other people's files, and their data may be on the network
        reason = " ".join(str(error).split())[:300] or "no reason is given"
        raise UserError(f"lm-eval stopped: {type(error).__name__}: {reason}") from error
    return found


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    import difflib

    known = list(manager.all_tasks)
    for task in tasks:
        if task in known or Path(task).suffix in (".yaml", ".yml") or any(sign in task for sign in "*?["):
            continue
        near = difflib.get_close_matches(task, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--task-dir names a folder with tasks of your own"
        raise UserError(f"no task is called {task!r}; {hint}")


def _missing() -> UserError:
    return UserError("tasks are lm-eval's, which is not installed: pip install 'manyhands[eval]'")
