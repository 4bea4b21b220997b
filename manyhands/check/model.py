"""The whole model against the oracle: the training step in all its modes, and a masked forward with every loss.

B sequences, S tokens, T = B·S, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from manyhands.check import cases, losses, oracle_balance
from manyhands.check.compare import (
    KINKED,
    TOLERANCES,
    Named,
    Tolerance,
    close,
    exact,
    gradient_row,
    largest_norm,
    parts,
)
from manyhands.check.oracle import decode, float64_copy
from manyhands.check.oracle_dense import DenseRouting
from manyhands.check.report import Row, Situation
from manyhands.check.subject import Subject, dense_kept, dense_weights, gradients, train
from manyhands.config import BalanceConfig, ModelConfig, OptimConfig, RouterConfig, RunConfig, TrainConfig
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.moe import Routing

B, S = 4, 12
MODES = {"plain": (False, B), "recompute": (True, B), "accumulate": (False, 2)}
"""Mode of the training step -> (recompute, sequences per micro-batch)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Routings = tuple[Sequence[dict[int, Routing]], Sequence[dict[int, DenseRouting]]]


class ModelCheck:
    """One small model in one routing case; `rows` compares it in every backend, dtype and mode."""

    def __init__(self, config: ModelConfig, balance: BalanceConfig, case: str, seed: int) -> None:
        self.config, self.balance, self.case, self.seed = config, balance, case, seed
        self.router = None if config.moe is None else config.moe.router
        acts = {config.hidden_act} | (set() if config.moe is None else {config.moe.hidden_act})
        self.activation = next((act for act in KINKED if act in acts), config.hidden_act)
        generator = torch.Generator().manual_seed(seed)
        self.model = Subject(config)
        cases.fill(self.model, case, generator)
        hashed = self.router is not None and self.router.select == "hash"
        self.batch = cases.token_ids((B, S + 1), config.vocab_size, case, hashed, generator)
        self.mask = cases.padding_mask((B, S)) if case == "padding" else torch.ones(B, S, dtype=torch.bool)

    def rows(self, backend: str, dtype: str) -> Iterator[tuple[list[Row], Routings]]:
        """The rows of each mode, with the routings they came from."""
        self.model.use(backend)
        yield self._forward(Situation("model", self.case, backend, dtype, "forward"))
        if self.case == "padding":  # the training step takes packed text: there is none in it
            return
        for mode in MODES:
            yield self._step(Situation("model", self.case, backend, dtype, mode))

    def _step(self, at: Situation) -> tuple[list[Row], Routings]:
        """`train_step` itself: loss, terms, gradients, counts and the bias after it."""
        recompute, micro = MODES[at.mode]
        seeds = [self.seed + m for m in range(B // micro)]
        run = RunConfig(
            model=self.config,
            balance=self.balance,
            optim=OptimConfig(name="adamw", grad_clip=None),
            train=TrainConfig(batch_size=B, micro_batch_size=micro, sequence_length=S, recompute=recompute),
        )
        trained = train(self.model, self.batch, run, DTYPES[at.dtype], seeds)
        if trained.halted:
            row = Row(at, "training step", trained.halted, float("inf"), 0.0, 1.0, (trained.halted,))
            return [row], ([], [])

        p = float64_copy(self.model)
        oracle = decode(
            self.config,
            p,
            self.batch[:, :-1],
            self.mask,
            training=True,
            seeds=seeds,
            tested=trained.routings,
            slack=TOLERANCES[at.dtype].slack,
        )
        task = cross_entropy(oracle.logits, self.batch[:, 1:], self.mask)
        terms = self._terms(oracle.routings)
        total = task
        for name, term in terms.items():
            total = total + getattr(self.balance, f"{name}_coef") * term
        total.backward()  # type: ignore[no-untyped-call]
        expected = {name: p[name].grad for name, _ in self.model.named_parameters()}

        rows = [close(at, "loss", {"loss": torch.tensor(trained.loss)}, {"loss": task})]
        if terms:
            tested = {name: torch.tensor(value) for name, value in trained.terms.items()}
            rows += [close(at, "balance terms", {n: tested.get(n)}, {n: terms[n]}) for n in terms]
        rows += [Row(at, "balance terms", n, inf, 0.0, 1.0, (n,)) for n in trained.terms if n not in terms]
        rows.append(gradient_row(at, trained.gradients, expected, self.activation))
        if self.router is None:
            return rows, ([], [])
        counts = {
            f"layers.{layer}.mlp.expert_counts": torch.stack([r[layer].counts() for r in oracle.routings]).sum(0)
            for layer in oracle.routings[0]
        }
        dropped = {
            f"layers.{layer}.mlp.dropped": torch.stack([r[layer].dropped() for r in oracle.routings]).sum()
            for layer in oracle.routings[0]
        }
        rows += [
            exact(at, "expert counts", trained.counts, counts),
            exact(at, "dropped pairs", trained.dropped, dropped),
        ]
        if self.router.bias and self.balance.bias_update == "sign":
            rows.append(_bias_row(at, trained.bias, p, counts, self.balance.bias_update_rate))
        elif self.router.bias:
            rows.append(self._quantile_row(at, trained.bias, oracle.routings))
        assert self.config.moe is not None
        if self.config.moe.unchosen == "average":
            named = {n: f"layers.{n}.mlp.average_outputs" for n in oracle.routings[0]}
            decay, micros = self.config.moe.average_decay, oracle.routings
            after = {t: oracle_balance.averages_after(p[t], [r[n] for r in micros], decay) for n, t in named.items()}
            rows.append(close(at, "averages after step", {t: trained.bias[t] for t in after}, after))
        if self.router.select == "positive":
            every = [routing for micro in oracle.routings for routing in micro.values()]
            steps = {name: t for name, t in trained.bias.items() if name.endswith("l1_steps")}
            right = {n: torch.tensor(oracle_balance.l1_steps_after(float(p[n]), every, self.router)) for n in steps}
            rows.append(exact(at, "L1 steps after step", steps, right))
        rows += routing_rows(at, trained.routings, oracle.routings, "layers.{layer}.mlp.router.")
        return rows, (trained.routings, oracle.routings)

    def _terms(self, routings: Sequence[dict[int, DenseRouting]]) -> dict[str, Tensor]:
        """The step's balance terms: mean over layers, then over micro-batches; f in global scope so far."""
        if self.router is None:
            return {}
        so_far = {layer: torch.zeros(self.router.num_experts, dtype=torch.int64) for layer in routings[0]}
        found: dict[str, list[Tensor]] = {}
        for micro in routings:
            for layer, routing in micro.items():
                so_far[layer] = so_far[layer] + routing.counts()
                sequences = B // len(routings)
                terms = oracle_balance.terms(routing, self.router, self.balance, sequences, so_far[layer])
                for name, value in terms.items():
                    found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _quantile_row(
        self, at: Situation, tested: dict[str, Tensor], routings: Sequence[dict[int, DenseRouting]]
    ) -> Row:
        """The bias after the step, a mean of order statistics: as near as the scores it is made of."""
        assert self.router is not None
        name = "layers.{}.mlp.router.e_score_correction_bias"
        right = {
            name.format(n): torch.stack([oracle_balance.quantile_bias(r[n], self.router) for r in routings]).mean(0)
            for n in routings[0]
        }
        return close(at, "bias after step", {n: tested[n] for n in right}, right)

    def _forward(self, at: Situation) -> tuple[list[Row], Routings]:
        """Logits, the masked loss and its gradients through `keep_outputs`, and every balance loss by itself."""
        ids, mask, dtype = self.batch[:, :-1], self.mask, DTYPES[at.dtype]
        model = self.model
        model.watch([self.seed, self.seed])
        with torch.random.fork_rng(devices=[]):
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, dtype=dtype).logits
            hidden = model.hidden(ids, mask, dtype=dtype, keep_outputs=True)
        targets = self.batch[:, 1:].flatten()
        states_TD, real_T = hidden.states.flatten(0, 1), mask.flatten()
        task = linear_cross_entropy(states_TD, model.head_weight, targets, real_T, model.head_bias)
        routers = {name: q for name, q in model.named_parameters() if ".router." in name}
        tested_terms: losses.Terms = {}
        tested_gradients: dict[str, Named] = {}
        if self.router is not None:
            tested_routers = {n: layer.router for n, layer in model.sparse_layers().items()}
            tested_terms = losses.tested_terms(hidden.routings, tested_routers, self.router, B)
            tested_gradients = {n: losses.gradients(tested_terms, n, routers) for n in tested_terms}
        task.backward()  # type: ignore[no-untyped-call]

        p = float64_copy(model)
        oracle = decode(
            model.config,
            p,
            ids,
            mask,
            training=True,
            seeds=[self.seed],
            tested=[hidden.routings],
            slack=TOLERANCES[at.dtype].slack,
        )
        oracle_task = cross_entropy(oracle.logits, self.batch[:, 1:], mask)
        with torch.no_grad():  # by its own routing: that of `keep_outputs` may have been rounded otherwise
            expected_logits = decode(
                model.config,
                p,
                ids,
                mask,
                training=True,
                seeds=[self.seed],
                tested=model.routings[:1],
                slack=TOLERANCES[at.dtype].slack,
            ).logits
        rows = [
            close(at, "logits", {"logits": logits[mask]}, {"logits": expected_logits[mask]}),
            close(at, "loss", {"loss": task}, {"loss": oracle_task}),
        ]
        if self.router is not None:
            oracle_terms = losses.oracle_terms(oracle.routings[0], self.router, B)
            weights = {name: p[name] for name in routers}
            rows += loss_rows(
                at,
                tested_terms,
                tested_gradients,
                oracle_terms,
                weights,
                "layers.{layer}.",
                self.activation,
                self.router,
                divisor=losses.divisor(oracle.routings[0], self.router),
            )
            rows += routing_rows(at, [hidden.routings], oracle.routings, "layers.{layer}.mlp.router.")
            counts = {f"layers.{n}.mlp.expert_counts": r.counts() for n, r in oracle.routings[0].items()}
            tested = {f"layers.{n}.mlp.expert_counts": r.expert_counts() for n, r in hidden.routings.items()}
            rows.append(exact(at, "expert counts", tested, counts))
        oracle_task.backward()  # type: ignore[no-untyped-call]
        expected = {name: p[name].grad for name, _ in model.named_parameters()}
        rows.append(gradient_row(at, gradients(model), expected, self.activation))
        return rows, ([hidden.routings], oracle.routings)


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean of −ln softmax(logits [B, S, V])[target] over the real ones."""
    real = logits[mask]
    return (real.exp().sum(-1).log() - real.gather(1, targets[mask][:, None])[:, 0]).mean()


def loss_rows(
    at: Situation,
    tested: losses.Terms,
    tested_gradients: Mapping[str, Named],
    oracle: losses.Terms,
    parameters: Mapping[str, Tensor],
    prefix: str,
    activation: str,
    router: RouterConfig,
    depth: float = 1.0,
    divisor: float = 1.0,
) -> list[Row]:
    """A row for the value of each balance loss and one for its gradient; one that either side lacks fails.

    Some gradients are zero but for rounding (f·P of tied experts); all are measured against the z-loss's, which never
    is. The importance's CV² is constant where one expert has all: its gradient is then the difference of two terms that
    grow as E − 1, and is measured against as many. Orthogonality squares inner products that nearly cancel: rounding
    counts √D times as much, twice. ReLU's scores have a kink, and their shares a divisor that may be as small as the
    rounding; the smallest of all tokens is `divisor`. A token's gradient goes by its inverse, and so does the rounding
    in it, 1e-6 for logits of a few. `depth` is that of `gradient_row`.
    """
    expected = {name: losses.gradients(oracle, name, parameters) for name in oracle}
    scale = largest_norm(at.dtype, expected["z_loss"])
    promised = {name.removesuffix("_coef") for name in losses.COEFFICIENTS}
    met = {name.partition("/")[0] for name in tested.keys() & oracle.keys()}
    lacking = sorted((tested.keys() ^ oracle.keys()) | (promised - met))
    missing = [name for name in lacking if name not in losses.meaningless(router)]
    rows = [
        Row(
            at,
            f"{name} value",
            f"{name} ({'checked model' if name in tested else 'oracle'} only)",
            inf,
            0.0,
            1.0,
            (name,),
        )
        for name in missing
    ]
    for name in oracle:
        if name not in tested or name in losses.meaningless(router):
            continue
        kinked = activation in KINKED and at.dtype == "bfloat16"
        widen = 3.0 if name == "orthogonality" and at.dtype == "bfloat16" else 1.0
        widen = 10.0 if name == "orthogonality" and kinked else widen
        widen = 6.0 * widen if router.score == "relu" and at.dtype == "bfloat16" else widen
        if at.dtype == "float32" and name.partition("/")[0] in losses.SHARES:
            widen = max(widen, 1e-6 / divisor / TOLERANCES["float32"].error)
        widen *= depth
        mine, right = losses.values(tested, name, prefix), losses.values(oracle, name, prefix)
        rows.append(close(at, f"{name} value", mine, right, at_least=1e-3, widen=widen))
        if name == "orthogonality" and kinked:  # one entry that rounds across the kink may be all of it
            continue
        mine, right = (parts(g[name], at.dtype, activation) for g in (tested_gradients, expected))
        terms = router.num_experts - 1 if name == "importance" else 1
        rows.append(close(at, f"{name} gradient", mine, right, at_least=4.0 * scale * terms, widen=widen))
    return rows


def routing_rows(
    at: Situation,
    tested: Sequence[dict[int, Routing]],
    oracle: Sequence[dict[int, DenseRouting]],
    prefix: str,
    part: str = "",
    tolerance: Tolerance | None = None,
) -> list[Row]:
    """Scores, weights, the choice of experts and which pairs found room, layer by layer over real tokens.

    `part` begins the names of the quantities.
    """
    scores: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    weights: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    room: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    wrong: dict[str, Tensor] = {}
    for layer in oracle[0]:
        name = prefix.format(layer=layer)
        real = torch.cat([o[layer].mask for o in oracle])
        scores[0][name + "scores"] = torch.cat([t[layer].scores for t in tested])[real]
        scores[1][name + "scores"] = torch.cat([o[layer].scores for o in oracle])[real]
        weights[0][name + "weights"] = torch.cat([dense_weights(t[layer]) for t in tested])[real]
        weights[1][name + "weights"] = torch.cat([o[layer].weights for o in oracle])[real]
        room[0][name + "kept"] = torch.cat([dense_kept(t[layer]) for t in tested])[real]
        room[1][name + "kept"] = torch.cat([o[layer].kept for o in oracle])[real]
        wrong[name + "expert_ids"] = torch.tensor(sum(o[layer].wrong for o in oracle))
    return [
        close(at, f"{part}router scores", *scores, tolerance=tolerance),
        close(at, f"{part}router weights", *weights, tolerance=tolerance),
        exact(at, f"{part}expert choice", wrong, {name: torch.zeros_like(count) for name, count in wrong.items()}),
        exact(at, f"{part}kept pairs", *room),
    ]


def _bias_row(
    at: Situation, tested: dict[str, Tensor], before: dict[str, Tensor], counts: dict[str, Tensor], rate: float
) -> Row:
    """The correction bias after the step, equal to the float32 nearest the oracle's up to its last place."""
    rounded: dict[str, Tensor] = {}
    oracle: dict[str, Tensor] = {}
    for name, b in tested.items():
        if not name.endswith("e_score_correction_bias"):
            continue
        layer = name.removesuffix("router.e_score_correction_bias")
        oracle[name] = oracle_balance.bias_after_step(before[name], counts[layer + "expert_counts"], rate)
        last_place = 2.0**-22 * oracle[name].abs().clamp(min=rate)
        rounded[name] = torch.where((b.double() - oracle[name]).abs() <= last_place, oracle[name], b.double())
    return exact(at, "bias after step", rounded, oracle)
