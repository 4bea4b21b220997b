"""What a service is asked, and how it says no."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Prompt
from manyhands.engine.ledger import Ledger
from manyhands.errors import ManyhandsError


class Overloaded(ManyhandsError):
    """As many requests wait as may: try again later."""

    http_status = 429


class Stopping(ManyhandsError):
    """No new requests are taken: the service is about to end."""

    http_status = 503


class EngineDead(ManyhandsError):
    """The engine's thread has ended on an error; no request can be answered any more."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and what `Engine.add` is to be told with it."""

    prompt: Prompt
    sampling: SamplingConfig
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    """What it costs in experts is entered here."""
