"""An encoder-decoder against its oracle: a padded forward with every loss, and decoding to a cache.

B sequences, S positions of the input, T of the output, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check import cases, losses
from manyhands.check.compare import TOLERANCES, Named, close, exact, gradient_row
from manyhands.check.model import DTYPES, Routings, cross_entropy, loss_rows, routing_rows
from manyhands.check.oracle import float64_copy
from manyhands.check.oracle_attention import Params
from manyhands.check.oracle_encoder_decoder import Seq2SeqOutput, transduce
from manyhands.check.report import Row, Situation
from manyhands.check.subject import gradients
from manyhands.config import EncoderDecoderConfig
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.models import EncoderDecoder, Hidden
from manyhands.moe import ExpertBank, Routing

B, S, T = 4, 13, 9
STEPS = (1, 3, 1, 1, 2, 1)
"""How many tokens each call brings to the cache: `T` in all."""
DEPTH = 3.0**0.5
"""A gradient of the encoder goes through two stacks, the second with half as many sublayers more: some three times as
many roundings as through one."""


class EncoderDecoderCheck:
    """One small model in one routing case; `rows` compares it in a backend and dtype."""

    def __init__(self, config: EncoderDecoderConfig, case: str, seed: int, model: EncoderDecoder | None = None) -> None:
        """`model` None: random weights, arranged for the case. One that is given is a checkpoint's."""
        self.config, self.case, self.seed, self.router = config, case, seed, config.router
        self.scope = "model" if model is None else "checkpoint"
        self.activation = config.hidden_act
        generator = torch.Generator().manual_seed(seed)
        self.model = EncoderDecoder(config) if model is None else model
        if model is None:
            cases.fill(self.model, case, generator)
        hashed = self.router is not None and self.router.select == "hash"
        self.ids = cases.token_ids((B, S), config.vocab_size, case, hashed, generator)
        self.decoder_ids = cases.token_ids((B, T + 1), config.vocab_size, case, hashed, generator)
        padded = case == "padding"
        self.mask = cases.padding_mask((B, S)) if padded else torch.ones(B, S, dtype=torch.bool)
        self.decoder_mask = torch.ones(B, T, dtype=torch.bool)
        if padded:  # on the right, as batches have it
            self.decoder_mask[0, T - 3 :], self.decoder_mask[2, 1:] = False, False

    def rows(self, backend: str, dtype: str) -> Iterator[tuple[list[Row], Routings]]:
        """The rows of each mode, with the routings they came from."""
        for module in self.model.modules():
            if isinstance(module, ExpertBank):
                module.implementation = backend
        yield self._forward(Situation(self.scope, self.case, backend, dtype, "forward"))
        if self.decodes:
            yield self._decode(Situation(self.scope, self.case, backend, dtype, "cached decoding"))

    @property
    def decodes(self) -> bool:
        """Whether a token's experts in evaluation are the same in whatever company, so that a cache can be exact: no
        expert is ever full, or none of so few tokens."""
        r = self.router
        if r is None or r.causal_safe:
            return True
        return r.capacity_per == "sequence" and r.capacity_tokens is not None and r.capacity_tokens >= max(S, T)

    def _hidden(self, dtype: str, *, recompute: bool = False, keep_outputs: bool = False) -> Hidden:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.model.hidden(
                self.ids,
                self.decoder_ids[:, :-1],
                self.mask,
                self.decoder_mask,
                dtype=DTYPES[dtype],
                recompute=recompute,
                keep_outputs=keep_outputs,
            )

    def _loss(self, hidden: Hidden) -> Tensor:
        states_TD, targets_T = hidden.states.flatten(0, 1), self.decoder_ids[:, 1:].flatten()
        return linear_cross_entropy(states_TD, self.model.head_weight, targets_T, self.decoder_mask.flatten())

    def _oracle(self, p: Params, routings: dict[int, Routing], dtype: str, *, training: bool) -> Seq2SeqOutput:
        """With the choices of `routings` where rounding alone decides."""
        return transduce(
            self.config,
            p,
            self.ids,
            self.mask,
            self.decoder_ids[:, :-1],
            self.decoder_mask,
            training=training,
            seeds=[self.seed],
            tested=[routings],
            slack=TOLERANCES[dtype].slack,
        )

    def _forward(self, at: Situation) -> tuple[list[Row], Routings]:
        """Logits, loss and gradients, once more with recomputation, and every balance loss by itself."""
        model = self.model.train()
        rows = self._recomputed(replace(at, mode="recompute"))
        model.zero_grad(set_to_none=True)
        hidden = self._hidden(at.dtype, keep_outputs=True)
        task = self._loss(hidden)
        routers = {name: q for name, q in model.named_parameters() if ".router." in name}
        tested_terms: losses.Terms = {}
        tested_gradients: dict[str, Named] = {}
        if self.router is not None:
            tested_routers = {n: layer.router for n, layer in model.sparse_layers().items()}
            tested_terms = losses.tested_terms(hidden.routings, tested_routers, self.router, B)
            tested_gradients = {n: losses.gradients(tested_terms, n, routers) for n in tested_terms}
        task.backward()  # type: ignore[no-untyped-call]

        p = float64_copy(model)
        oracle = self._oracle(p, hidden.routings, at.dtype, training=True)
        oracle_task = cross_entropy(oracle.logits, self.decoder_ids[:, 1:], self.decoder_mask)
        real, logits = self.decoder_mask, model.head(hidden.states)
        rows += [
            close(at, "logits", {"logits": logits[real]}, {"logits": oracle.logits[real]}),
            close(at, "loss", {"loss": task}, {"loss": oracle_task}),
        ]
        if self.router is not None:
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

    def _recomputed(self, at: Situation) -> list[Row]:
        """The gradients where activations are computed again on the way back."""
        self.model.zero_grad(set_to_none=True)
        hidden = self._hidden(at.dtype, recompute=True)
        self._loss(hidden).backward()  # type: ignore[no-untyped-call]
        p = float64_copy(self.model)
        oracle = self._oracle(p, hidden.routings, at.dtype, training=True)
        cross_entropy(oracle.logits, self.decoder_ids[:, 1:], self.decoder_mask).backward()  # type: ignore[no-untyped-call]
        expected = {name: p[name].grad for name, _ in self.model.named_parameters()}
        return [gradient_row(at, gradients(self.model), expected, self.activation, DEPTH)]

    @torch.no_grad()
    def _decode(self, at: Situation) -> tuple[list[Row], Routings]:
        """Step by step with a cache, which the oracle does not have."""
        model = self.model.eval()
        cache, steps, done = model.new_cache(), [], 0
        for step in STEPS:
            first = not done
            taken = slice(done, done + step)
            hidden = model.hidden(
                self.ids if first else None,
                self.decoder_ids[:, taken],
                self.mask if first else None,
                self.decoder_mask[:, taken],
                cache,
                dtype=DTYPES[at.dtype],
            )
            steps.append(hidden)
            done += step
        p = {name: t.detach() for name, t in float64_copy(model).items()}
        routings = {layer: self._joined(layer, steps) for layer in steps[0].routings}
        oracle = self._oracle(p, routings, at.dtype, training=False)
        real, states = self.decoder_mask, torch.cat([hidden.states for hidden in steps], 1)
        rows = [
            close(at, "decoding: states", {"states": states[real]}, {"states": oracle.states[real]}),
            close(at, "decoding: logits", {"logits": model.head(states)[real]}, {"logits": oracle.logits[real]}),
        ]
        if routings:
            prefix = "layers.{layer}.mlp.router."
            rows += routing_rows(at, [routings], oracle.routings, prefix, "decoding: ")
        return rows, ([routings], oracle.routings)

    def _joined(self, layer: int, steps: Sequence[Hidden]) -> Routing:
        """A layer's routing of all tokens, row by row: an encoder layer's is of the first call, whole."""
        if layer < self.config.num_hidden_layers:
            return steps[0].routings[layer]
        apart = [
            hidden.routings[layer].rows(slice(b * n, (b + 1) * n))
            for b in range(B)
            for hidden, n in zip(steps, STEPS, strict=True)
        ]
        return Routing.cat(apart)
