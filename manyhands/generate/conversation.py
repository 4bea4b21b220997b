"""Turns with a chat model: the messages so far, in its template, and what of them it has already computed."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.errors import UserError
from manyhands.generate.steps import Step, in_step
from manyhands.models import Decoder
from manyhands.text import Tokenizer
from manyhands.text.answer import Answer
from manyhands.trace.recorder import Recorder


class Conversation:
    """One user and one model, taking turns."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        system: str | None = None,
        trace: Recorder | None = None,
    ) -> None:
        """`trace` is given every pass of the model.

        Raises `CheckpointError` if there is no chat template or it fails, `DataError` if it takes no `system`.
        """
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._start: list[dict[str, Any]] = _system(system)
        self._engine = Engine(model, tokenizer, max_sequences=1, trace=trace)
        self._prefix = Prefix()
        self._prompt_end = ""
        self.reset()
        self._check(self._start)

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.messages: list[dict[str, Any]] = list(self._start)
        self.turns = 0
        """Answers so far, those that were taken back too."""
        self.prompt_tokens = 0
        """Of the last question, with all that stands before it."""
        self.left_out = 0
        """Turns, the oldest, that the last question's answer does not see: the context was full."""

    def undo(self) -> str | None:
        """Take the last turn back, question and answer; the question, None if there is none."""
        if len(self.messages) < len(self._start) + 2:
            return None
        *self.messages, question, _ = self.messages
        return str(question["content"])

    def system(self, text: str | None) -> None:
        """Put `text` in the place of the system's message, also for the turns there were; None: no message.

        Raises `DataError`, and changes nothing, if the template takes none.
        """
        start, past = _system(text), self.messages[len(self._start) :]
        self._check(start)
        self._start, self.messages = start, [*start, *past]

    def take(self, messages: Sequence[dict[str, Any]]) -> None:
        """Go on from these: a system's first, if any, then turns in pairs. Raises what the template does."""
        start = [message for message in messages[:1] if message["role"] == "system"]
        self._check([*messages])
        self._start = start
        self.reset()
        self.messages = [*messages]
        self.turns = (len(messages) - len(start)) // 2

    def _check(self, messages: list[dict[str, Any]]) -> None:
        self.tokenizer.apply_chat_template([*messages, {"role": "user", "content": "Hello"}])

    def regenerate(self) -> Generator[Step, None, None]:
        """Another answer to the last question, in the place of the one there is, which stays if nothing new is said.

        Raises `UserError` if nothing was asked yet, and what `ask` does.
        """
        if len(self.messages) < len(self._start) + 2:
            raise UserError("nothing was asked yet")
        *past, question, _ = self.messages[len(self._start) :]
        return self._ask(question, past)

    def ask(self, text: str) -> Generator[Step, None, None]:
        """The answer to `text`, token by token.

        The whole conversation goes through the template each time; through the model go only the first token that
        differs from the last turn's and those behind it.

        What was answered when the iterator ends or is closed is the model's turn, parted into thought and word as its
        template wants it; without a word of answer, neither turn took place. The turn's number is added to the seed.
        Where the context is too full for it, the oldest turns are left out, for good (`left_out`).

        Raises, on the call, `UserError` if the message alone is too long, and what `apply_chat_template` and `generate`
        do.
        """
        return self._ask({"role": "user", "content": text}, self.messages[len(self._start) :])

    def _ask(self, user: dict[str, Any], past: list[dict[str, Any]]) -> Generator[Step, None, None]:
        limit, left_out = self.model.config.longest_continued, 0
        room = min(self.sampling.max_new_tokens, limit // 4)
        while True:
            messages = [*self._start, *past, user]
            ids = self.tokenizer.apply_chat_template(messages)
            if not past or len(ids) + room <= limit:
                break
            past, left_out = past[2:], left_out + 1
        if len(ids) >= limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens with this message alone, and the model's context holds "
                f"{limit}: say less"
            )
        sampling = self.sampling.model_copy(update={"seed": (self.sampling.seed + self.turns) % (1 << 63)})
        steps = in_step(self._engine, [ids], sampling, self._prefix)
        self.left_out, self.prompt_tokens = left_out, len(ids)
        self._prompt_end = self.tokenizer.decode(ids[-8:])
        return self._answer(messages, steps, self.reader())

    def reader(self) -> Answer:
        """What parts the text of the last question's answer, as it comes, into thought and word."""
        return Answer(self.tokenizer.chat_template or "", self._prompt_end)

    def _answer(
        self, messages: list[dict[str, Any]], steps: Iterator[Step], answer: Answer
    ) -> Generator[Step, None, None]:
        said = False
        try:
            for step in steps:
                said |= bool(step.texts[0])
                answer.push(step.texts[0])
                yield step
        finally:
            if said:
                answer.finish()
                self.messages = [*messages, answer.message()]
                self.turns += 1


def _system(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [{"role": "system", "content": text}]
