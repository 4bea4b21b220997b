"""A policy fed with the wants of a trace, and what it hit and read."""

from dataclasses import dataclass, field

from manyhands.simulate.wants import Wants
from manyhands.store.policies import Policy


@dataclass
class Tally:
    """Sums over forward passes. A lookup is one distinct expert that one layer wants for one pass."""

    steps: int = 0
    tokens: int = 0
    lookups: int = 0
    hits: int = 0
    wanted_bytes: int = 0
    read_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 where nothing was looked up."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Read from disk."""
        return self.read_bytes / self.tokens if self.tokens else 0.0

    @property
    def experts_per_step(self) -> float:
        """Distinct experts of all layers together."""
        return self.lookups / self.steps if self.steps else 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class Result:
    """What one policy did under one budget: on decoded tokens, and on the others (prompts, training)."""

    decode: Tally = field(default_factory=Tally)
    other: Tally = field(default_factory=Tally)

    @property
    def all(self) -> Tally:
        """Of all forward passes."""
        return self.decode.plus(self.other)


def replay(policy: Policy, wants: Wants) -> Result:
    """Ask `policy`, which must be new, for every want in order."""
    result = Result()
    lists, sizes = wants.lists(), wants.record_bytes
    for tokens, decode in zip(wants.tokens.tolist(), wants.decode.tolist(), strict=True):
        tally = result.decode if decode else result.other
        tally.steps += 1
        tally.tokens += tokens
        for layer, size in enumerate(sizes):
            experts = next(lists)
            missed = len(policy.want(layer, experts).misses)
            tally.lookups += len(experts)
            tally.hits += len(experts) - missed
            tally.wanted_bytes += len(experts) * size
            tally.read_bytes += missed * size
        policy.end_step()
    return result
