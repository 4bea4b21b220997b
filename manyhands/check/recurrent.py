"""A recurrent model against its oracle: a padded forward with every loss, and step by step from a state.

B sequences, S tokens each, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from manyhands.check import cases, losses
from manyhands.check.compare import TOLERANCES, Named, close, exact, gradient_row
from manyhands.check.model import DTYPES, Routings, cross_entropy, loss_rows, routing_rows
from manyhands.check.oracle import float64_copy
from manyhands.check.oracle_recurrent import RecurrentOutput, recur
from manyhands.check.report import Row, Situation
from manyhands.check.shrink import WIDTHS, shrink_moe
from manyhands.check.subject import gradients
from manyhands.config import RecurrentConfig
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.models import Hidden, Recurrent
from manyhands.moe import ExpertBank, Routing

B, S = 4, 12
STEPS = (3, 1, 1, 4, 2, 1)
"""How many tokens each call brings to the state: `S` in all."""
DEPTH = 6.0
"""A gradient goes back through S cells one after the other, and no norm stands before a router, whose input keeps the
roundings of all that came before: more of them than in a few blocks."""


def shrink_recurrent(config: RecurrentConfig) -> RecurrentConfig:
    """At most 64 wide, 16 experts, two LSTM layers with a mixture behind the first, or behind each where each has one.

    Without dropout, which draws at random. A small model comes back with what it has of each.
    """
    layers = min(config.num_hidden_layers, 2)
    after = tuple(range(layers)) if len(config.moe_after) == config.num_hidden_layers else (0,)
    changes = {
        "num_hidden_layers": layers,
        "moe_after": after,
        "dropout": 0.0,
        "moe": None if config.moe is None else shrink_moe(config.moe),
        "hidden_size": min(config.hidden_size, WIDTHS["hidden_size"]),
        "vocab_size": min(config.vocab_size, WIDTHS["vocab_size"]),
    }
    return RecurrentConfig.model_validate(config.model_copy(update=changes).model_dump())


class RecurrentCheck:
    """One small model in one routing case; `rows` compares it in a backend and dtype."""

    def __init__(self, config: RecurrentConfig, case: str, seed: int, model: Recurrent | None = None) -> None:
        """`model` None: random weights, arranged for the case. One that is given is a checkpoint's, without dropout."""
        self.config, self.case, self.seed = config, case, seed
        self.scope = "model" if model is None else "checkpoint"
        self.router = None if config.moe is None else config.moe.router
        self.activation = "relu" if config.moe is None else config.moe.hidden_act
        generator = torch.Generator().manual_seed(seed)
        self.model = Recurrent(config) if model is None else model
        if model is None:
            cases.fill(self.model, case, generator)
        hashed = self.router is not None and self.router.select == "hash"
        self.batch = cases.token_ids((B, S + 1), config.vocab_size, case, hashed, generator)
        self.mask = cases.padding_mask((B, S)) if case == "padding" else torch.ones(B, S, dtype=torch.bool)

    def rows(self, backend: str, dtype: str) -> Iterator[tuple[list[Row], Routings]]:
        """The rows of each mode, with the routings they came from."""
        for module in self.model.modules():
            if isinstance(module, ExpertBank):
                module.implementation = backend
        for recompute in (False, True):
            mode = "recompute" if recompute else "forward"
            yield self._forward(Situation(self.scope, self.case, backend, dtype, mode), recompute)
        if self.router is None or self.router.causal_safe:
            yield self._steps(Situation(self.scope, self.case, backend, dtype, "step by step"))

    def _oracle(
        self, routings: dict[int, Routing], dtype: str, *, training: bool
    ) -> tuple[dict[str, Tensor], RecurrentOutput]:
        p = float64_copy(self.model)
        found = recur(
            self.config,
            p,
            self.batch[:, :-1],
            self.mask,
            training=training,
            seed=self.seed,
            tested=routings,
            slack=TOLERANCES[dtype].slack,
        )
        return p, found

    def _forward(self, at: Situation, recompute: bool) -> tuple[list[Row], Routings]:
        """Logits, loss and gradients, and every balance loss by itself."""
        model, targets = self.model.train(), self.batch[:, 1:]
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            hidden = model.hidden(
                self.batch[:, :-1],
                self.mask,
                dtype=DTYPES[at.dtype],
                recompute=recompute,
                keep_outputs=not recompute,
            )
        task = linear_cross_entropy(
            hidden.states.flatten(0, 1), model.head_weight, targets.flatten(), self.mask.flatten()
        )
        routers = {name: q for name, q in model.named_parameters() if ".router." in name}
        tested_terms: losses.Terms = {}
        tested_gradients: dict[str, Named] = {}
        if self.router is not None and not recompute:
            tested_routers = {n: layer.router for n, layer in model.sparse_layers().items()}
            tested_terms = losses.tested_terms(hidden.routings, tested_routers, self.router, B)
            tested_gradients = {n: losses.gradients(tested_terms, n, routers) for n in tested_terms}
        task.backward()  # type: ignore[no-untyped-call]

        p, oracle = self._oracle(hidden.routings, at.dtype, training=True)
        oracle_task = cross_entropy(oracle.logits, targets, self.mask)
        logits = model.head(hidden.states)
        rows = [
            close(at, "logits", {"logits": logits[self.mask]}, {"logits": oracle.logits[self.mask]}),
            close(at, "loss", {"loss": task}, {"loss": oracle_task}),
        ]
        if self.router is not None and not recompute:
            oracle_terms = losses.oracle_terms(oracle.routings[0], self.router, B)
            weights = {name: p[name] for name in routers}
            of_losses = (at, tested_terms, tested_gradients, oracle_terms, weights, "layers.{layer}.")
            divisor = losses.divisor(oracle.routings[0], self.router)
            rows += loss_rows(*of_losses, self.activation, self.router, DEPTH, divisor)
            rows += routing_rows(at, [hidden.routings], oracle.routings, "layers.{layer}.mlp.router.")
            counts = {f"layers.{n}.mlp.expert_counts": r.counts() for n, r in oracle.routings[0].items()}
            tested = {f"layers.{n}.mlp.expert_counts": r.expert_counts() for n, r in hidden.routings.items()}
            rows.append(exact(at, "expert counts", tested, counts))
        oracle_task.backward()  # type: ignore[no-untyped-call]
        expected = {name: p[name].grad for name, _ in model.named_parameters()}
        rows.append(gradient_row(at, gradients(model), expected, self.activation, DEPTH))
        return rows, ([hidden.routings], oracle.routings)

    @torch.no_grad()
    def _steps(self, at: Situation) -> tuple[list[Row], Routings]:
        """A few tokens at a time from a state, which the oracle does not have."""
        model = self.model.eval()
        cache, done, steps = model.new_cache(), 0, list[Hidden]()
        for step in STEPS:
            taken = slice(done, done + step)
            ids, mask = self.batch[:, :-1][:, taken], self.mask[:, taken]
            steps.append(model.hidden(ids, mask, cache, dtype=DTYPES[at.dtype]))
            done += step
        routings = {layer: self._joined(layer, steps) for layer in steps[0].routings}
        _, oracle = self._oracle(routings, at.dtype, training=False)
        states = torch.cat([hidden.states for hidden in steps], 1)
        mine, right = model.head(states)[self.mask], oracle.logits[self.mask]
        rows = [
            close(at, "decoding: states", {"states": states[self.mask]}, {"states": oracle.states[self.mask]}),
            close(at, "decoding: logits", {"logits": mine}, {"logits": right}),
        ]
        if routings:
            rows += routing_rows(at, [routings], oracle.routings, "layers.{layer}.mlp.router.", "decoding: ")
        return rows, ([routings], oracle.routings)

    def _joined(self, layer: int, steps: list[Hidden]) -> Routing:
        """A layer's routing of all tokens, row by row."""
        apart = [
            hidden.routings[layer].rows(slice(b * n, (b + 1) * n))
            for b in range(B)
            for hidden, n in zip(steps, STEPS, strict=True)
        ]
        return Routing.cat(apart)
