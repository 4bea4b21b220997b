"""What completions and chat make of an engine's answers alike: choices, counted, with their extras."""

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from manyhands.engine.answer import Token
from manyhands.engine.answers import Answers, Submission
from manyhands.engine.asked import Asked
from manyhands.serve.entries import Entries, Entry
from manyhands.serve.protocol import Generating
from manyhands.serve.routed import routed_experts, token_routing
from manyhands.serve.served import Served
from manyhands.version import __version__


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with."""

    prefix: str
    object: str
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """As JSON has them."""
        said = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return {**said, "system_fingerprint": f"manyhands-{__version__}"}


def new_head(prefix: str, object: str, model: str) -> Head:
    """With an id of its own."""
    return Head(prefix, object, model, f"{prefix}-{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Asking:
    """A request that was read: what the engine is asked, and what its answer is to hold."""

    body: Generating
    asked: list[Asked]
    """Prompt by prompt, each n times."""
    prompts: list[list[int]]
    wants_logprobs: bool

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer by themselves; the model's own are the tokenizer's."""
        return frozenset(self.body.stop_token_ids or ())


class Reading:
    """The choices of one request, as they come."""

    def __init__(self, served: Served, asking: Asking, answers: Answers) -> None:
        self.served, self.asking, self.answers = served, asking, answers
        eos = frozenset() if asking.body.ignore_eos else served.tokenizer.eos_token_ids
        self.hidden = eos | asking.ends
        """Tokens that end an answer and are not shown."""
        self._ended = 0

    def entries(self, start: int = 0) -> Entries:
        """A reader of one choice's log-probabilities."""
        return Entries(self.served.tokenizer, self.hidden, start)

    def steps(self) -> AsyncGenerator[tuple[int, Token], None]:
        """Each token with its choice. Raises `ApiError`; leaving ends all."""
        return self.served.tokens(self.answers)

    def extras(self, number: int) -> dict[str, Any]:
        """What a choice that has ended holds beside its text."""
        body, submission = self.asking.body, self.submission(number)
        completion = submission.completion()
        stop = completion.stop_reason if completion.stop_reason in (*body.stops, *self.asking.ends) else None
        found: dict[str, Any] = {"stop_reason": stop}
        if not body.return_routed_experts:
            return found
        T = len(submission.request.prompt_ids) + max(0, len(completion.token_ids) - 1)
        return found | {"routed_experts": routed_experts(completion.routings, T, body.routed_experts_prompt_start)}

    def shown(self, token: Token) -> dict[str, Any]:
        """What a chunk holds of a token's routing, if it was asked for."""
        if not self.asking.body.return_token_routing:
            return {}
        return {"manyhands": {"routing": [token_routing(self.served.tokenizer, token)]}}

    def closing(self, token: Token) -> dict[str, Any]:
        """With the last token of all, the ledger."""
        self._ended += token.finish_reason is not None
        return self.ledger() if token.finish_reason and self._ended == len(self.answers.submissions) else {}

    def ledger(self) -> dict[str, Any]:
        """What the answers cost in experts, if it was asked for, when they have ended."""
        ledger = self.asking.asked[0].ledger
        return {} if ledger is None else {"manyhands": ledger.report()}

    def submission(self, number: int) -> Submission:
        """Of one choice."""
        return self.answers.submissions[number]

    def usage_before(self) -> dict[str, Any]:
        """What is known before anything was made."""
        prompt = sum(map(len, self.asking.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}

    def usage(self) -> dict[str, Any]:
        """Tokens: each prompt once, and all that were made."""
        n = self.asking.body.n
        made = sum(len(s.completion().token_ids) for s in self.answers.submissions)
        prompt = sum(map(len, self.asking.prompts))
        cached = sum(getattr(s.request, "num_cached", 0) for s in self.answers.submissions[::n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def push(entries: Entries, token: Token) -> list[Entry]:
    """Entries that are certain with this token."""
    return entries.push(token.token_id, token.logprob, token.top_logprobs, token.text, token.finish_reason is not None)


def arguments(body: Generating, constraint: Any = None) -> dict[str, Any]:
    """What `Engine.add` is told beside prompt and sampling."""
    found: dict[str, Any] = {
        "routing": body.return_routed_experts,
        "cache_salt": body.cache_salt or "",
        "priority": body.priority or 0,
    }
    if constraint is not None:
        found["constraint"] = constraint
    return found


def reason_of(submission: Submission) -> str:
    """Why it ended, as OpenAI says it."""
    return submission.completion().finish_reason or "length"
