"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan, Hinton 1991): where all of it began.

    model = LocalExperts(LocalExpertsConfig(num_inputs=2, num_outputs=4, num_experts=4, output="sigmoid"))
    history = model.fit(x, y, step=10.0, epochs=100)
    model.predict(x), model(x).gates

N examples, I inputs, O outputs, K experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from manyhands.config import LocalExpertsConfig
from manyhands.models.fitting import Array, History, Mixed, NumberRegressor, descend, mean_squared

Objective = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def distances(outputs_NKO: Tensor, target_NO: Tensor) -> Tensor:
    """[N, K]: ‖d − o_i‖²."""
    return (target_NO[:, None] - outputs_NKO).square().sum(-1)


def cooperative(log_p_NK: Tensor, outputs_NKO: Tensor, target_NO: Tensor, sigma: float = 1.0) -> Tensor:
    """[N]: ‖d − Σ p_i o_i‖². Experts mend each other's mistakes together, so that many of them answer each case."""
    mean_NO = (log_p_NK.exp()[..., None] * outputs_NKO).sum(1)
    return (target_NO - mean_NO).square().sum(-1)


def gated(log_p_NK: Tensor, outputs_NKO: Tensor, target_NO: Tensor, sigma: float = 1.0) -> Tensor:
    """[N]: Σ p_i ‖d − o_i‖². Each is to be right by itself; the one that is nearest learns slowest."""
    return (log_p_NK.exp() * distances(outputs_NKO, target_NO)).sum(-1)


def competitive(log_p_NK: Tensor, outputs_NKO: Tensor, target_NO: Tensor, sigma: float = 1.0) -> Tensor:
    """[N]: −log Σ p_i exp(−½ ‖d − o_i‖² / σ²). The nearest learns fastest, and experts specialise."""
    return -(log_p_NK - distances(outputs_NKO, target_NO) / (2.0 * sigma**2)).logsumexp(-1)


OBJECTIVES: dict[str, Objective] = {"competitive": competitive, "gated": gated, "cooperative": cooperative}
"""Every `LocalExpertsConfig.objective`: (log p [N, K], o [N, K, O], d [N, O], σ) -> [N]. Source: section 1 there."""


class LocalExperts(NumberRegressor):
    """K linear experts and a gate, all of which see the input. Fresh weights are uniform in ±½."""

    def __init__(self, config: LocalExpertsConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config.num_inputs, config.num_outputs, dtype)
        self.config = config
        K, O, columns = config.num_experts, config.num_outputs, config.num_inputs + 1
        self.experts = nn.Parameter(torch.empty(K, O, columns, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(K, columns, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None) -> None:
        """Fresh weights; without a seed from torch's global generator."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) - 0.5)

    def mix(self, x1_NI: Tensor) -> Mixed:
        """What `forward` returns, for inputs that are scaled and have their column of ones."""
        outputs_NKO = torch.einsum("ni,koi->nko", x1_NI, self.experts)
        if self.config.output == "sigmoid":
            outputs_NKO = outputs_NKO.sigmoid()
        log_p_NK = (x1_NI @ self.gate.T).log_softmax(-1)
        return Mixed((log_p_NK.exp()[..., None] * outputs_NKO).sum(1), outputs_NKO, log_p_NK)

    def objective(self, x: Array, y: Array) -> Tensor:
        """[N]: what is minimised, of each example; carries gradient."""
        x1_NI, y_NO = self.pair(x, y)
        return self._objective(self.mix(x1_NI), y_NO)

    def _objective(self, mixed: Mixed, y_NO: Tensor) -> Tensor:
        of = OBJECTIVES[self.config.objective]
        return of(mixed.log_gates, mixed.outputs, y_NO, self.config.sigma)

    @torch.no_grad()
    def responsibilities(self, x: Array, y: Array) -> Tensor:
        """[N, K]: p_i exp(−½‖d−o_i‖²/σ²) over its sum: how probable it is that expert i made the example."""
        x1_NI, y_NO = self.pair(x, y)
        mixed = self.mix(x1_NI)
        return (mixed.log_gates - distances(mixed.outputs, y_NO) / (2.0 * self.config.sigma**2)).softmax(-1)

    def fit(
        self,
        x: Array,
        y: Array,
        *,
        step: float = 0.3,
        epochs: int = 1000,
        until: float | None = None,
        valid: tuple[Array, Array] | None = None,
        rescale: bool = True,
    ) -> History:
        """Gradient descent with a fixed step on the mean objective over all examples, as the paper did.

        It begins at the weights that are there, and ends after `epochs`, or as soon as the mean squared error is
        below `until`. `rescale` sets the inputs' mean and scale from x.

        Raises `DataError` for arrays that do not fit, `ConfigError` for a step or number of epochs that cannot be, and
        `UserError` if the step was so large that the objective is no number any more.
        """
        if rescale:
            self.take_scale(x)
        x1_NI, y_NO = self.pair(x, y)
        held_out = None if valid is None else self.pair(*valid)

        def evaluate() -> tuple[Tensor, Tensor]:
            mixed = self.mix(x1_NI)
            return self._objective(mixed, y_NO).mean(), mixed.mean

        def error() -> float:
            assert held_out is not None
            with torch.no_grad():
                return mean_squared(self.mix(held_out[0]).mean, held_out[1])

        return descend(
            [self.experts, self.gate],
            evaluate,
            y_NO,
            step=step,
            epochs=epochs,
            until=until,
            valid=None if held_out is None else error,
        )
