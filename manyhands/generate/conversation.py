"""Turns with a chat model: the messages so far, in its template, and what of them it has already computed."""

from collections.abc import Generator, Iterator

from manyhands.errors import UserError
from manyhands.generate.engine import Step, generate
from manyhands.generate.prefix import Prefix
from manyhands.generate.sampling import SamplingConfig
from manyhands.nn import Decoder
from manyhands.text import Tokenizer


class Conversation:
    """One user and one model, taking turns."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, sampling: SamplingConfig, system: str | None = None
    ) -> None:
        """Raises `CheckpointError` if there is no chat template or it fails, `DataError` if it takes no `system`."""
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._prefix = Prefix()
        self.reset()
        tokenizer.apply_chat_template([*self._start, {"role": "user", "content": "Hello"}])

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.messages = list(self._start)
        self.turns = 0

    def ask(self, text: str) -> Generator[Step, None, None]:
        """The answer to `text`, token by token.

        The whole conversation goes through the template each time; through the model go only the first token that
        differs from the last turn's and those behind it.

        What was answered when the iterator ends or is closed is the model's turn; without a word of answer, neither
        turn took place. The turn's number is added to the seed.

        Raises, on the call, `UserError` if the context is full, and what `apply_chat_template` and `generate` do.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(messages)
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens with this message, and the model's context holds {limit}: "
                "say less, or start a new conversation (/reset)"
            )
        sampling = self.sampling.model_copy(update={"seed": (self.sampling.seed + self.turns) % (1 << 63)})
        return self._answer(messages, generate(self.model, [ids], sampling, self.tokenizer, self._prefix))

    def _answer(self, messages: list[dict[str, str]], steps: Iterator[Step]) -> Generator[Step, None, None]:
        pieces: list[str] = []
        try:
            for step in steps:
                pieces.append(step.texts[0])
                yield step
        finally:
            if answer := "".join(pieces):
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                self.turns += 1
