"""Hierarchical mixtures of experts (Jordan and Jacobs 1994): a tree of gates, fitted by expectation maximisation.

    model = HierarchicalExperts(HierarchicalExpertsConfig(num_inputs=6, num_outputs=2, branching=(2, 2, 2)))
    history = model.fit(x, y, epochs=40)

A gate divides its share of an example among its branches by a softmax of linear functions; a leaf is a linear expert
with Gaussian noise of its own. The weights are float64: EM solves linear systems.

N examples, I inputs, O outputs, M experts (leaves), G gates of a level, b branches of each.
"""

import math

import torch
from torch import Tensor, nn

from manyhands.config import HierarchicalExpertsConfig
from manyhands.errors import ConfigError
from manyhands.models.expectation_maximisation import Tree, improve, penalty, start
from manyhands.models.fitting import Array, History, Mixed, NumberRegressor, mean_squared
from manyhands.models.local_experts import distances


class HierarchicalExperts(NumberRegressor):
    """Leaves are numbered from left to right: the last level's branches of its first gate come first."""

    def __init__(self, config: HierarchicalExpertsConfig, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(config.num_inputs, config.num_outputs, dtype)
        self.config = config
        columns = config.num_inputs + 1
        self.gates = nn.ParameterList(
            nn.Parameter(torch.empty(config.gates_of(level), branches, columns, dtype=dtype))
            for level, branches in enumerate(config.branching)
        )
        self.experts = nn.Parameter(torch.empty(config.num_experts, config.num_outputs, columns, dtype=dtype))
        self.log_variance = nn.Parameter(torch.empty(config.num_experts, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None) -> None:
        """Gates N(0, 0.3²), experts N(0, 0.1²), variances 1; without a seed from torch's global generator."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for gate in self.gates:
                gate.copy_(0.3 * torch.randn(gate.shape, generator=generator, dtype=gate.dtype))
            self.experts.copy_(0.1 * torch.randn(self.experts.shape, generator=generator, dtype=self.experts.dtype))
            self.log_variance.zero_()

    def mix(self, x1_NI: Tensor) -> Mixed:
        """What `forward` returns, for scaled inputs with their column of ones; its gates are those of the leaves."""
        log_p_NM = x1_NI.new_zeros(len(x1_NI), 1)
        for gate_GbI in self.gates:
            branch_NGb = torch.einsum("ni,gbi->ngb", x1_NI, gate_GbI).log_softmax(-1)
            log_p_NM = (log_p_NM[..., None] + branch_NGb).flatten(1)
        outputs_NMO = torch.einsum("ni,moi->nmo", x1_NI, self.experts)
        return Mixed((log_p_NM.exp()[..., None] * outputs_NMO).sum(1), outputs_NMO, log_p_NM)

    def log_likelihood(self, x: Array, y: Array) -> Tensor:
        """[N]: log Σ_m p_m N(y; o_m, σ_m² I); carries gradient."""
        x1_NI, y_NO = self.pair(x, y)
        return self.log_joint(x1_NI, y_NO)[0].logsumexp(-1)

    def log_joint(self, x1_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, Mixed]:
        """[N, M]: log of p_m N(y; o_m, σ_m² I), and what it was made of."""
        mixed = self.mix(x1_NI)
        density = distances(mixed.outputs, y_NO) / self.log_variance.exp()
        density = density + y_NO.shape[1] * (self.log_variance + math.log(2.0 * math.pi))
        return mixed.log_gates - 0.5 * density, mixed

    @torch.no_grad()
    def fit(
        self,
        x: Array,
        y: Array,
        *,
        epochs: int = 40,
        seed: int = 0,
        fresh: bool = True,
        valid: tuple[Array, Array] | None = None,
    ) -> History:
        """Expectation maximisation; no epoch lowers the objective, which is the log-likelihood less a small penalty.

        `fresh`: begin with random gates (from `seed`) and with experts that are the linear regression of all examples
        and some noise; otherwise with the weights that are there.

        Raises `DataError` for arrays that do not fit, and `ConfigError` for a number of epochs below 0.
        """
        if epochs < 0:
            raise ConfigError(f"epochs = {epochs}: at least 0")
        if fresh:
            self.take_scale(x)
            self.reset_parameters(seed)
        x1_NI, y_NO = self.pair(x, y)
        held_out = None if valid is None else self.pair(*valid)
        tree = Tree(list(self.gates), self.experts, self.log_variance)
        if fresh:
            start(tree, x1_NI, y_NO)
        objectives, errors, valid_errors = [], [], []
        for epoch in range(epochs + 1):
            joint_NM, mixed = self.log_joint(x1_NI, y_NO)
            objectives.append(float(joint_NM.logsumexp(-1).mean()) - penalty(tree) / len(y_NO))
            errors.append(mean_squared(mixed.mean, y_NO))
            if held_out is not None:
                valid_errors.append(mean_squared(self.mix(held_out[0]).mean, held_out[1]))
            if epoch < epochs:
                improve(tree, joint_NM.softmax(-1), x1_NI, y_NO)
        return History(tuple(objectives), tuple(errors), tuple(valid_errors))
