"""Where experts' weights come from: `ExpertBank`, which a layer holds as `experts`.

`Experts` holds stacked parameters and `RecordExperts` packed records. Another bank (weights that are fetched, adapted,
made on demand) says four things and runs through every backend that supports it: how many experts there are, how wide
tokens are, the activation, and the weights of some experts when asked (`stacked`). Router and layer know none of it.

E experts, D model width, F expert width, T tokens, K experts per token.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.errors import ConfigError
from manyhands.kernels import BACKENDS, Bank, ExpertWeights, check_name, run_experts
from manyhands.kernels.moment import unheard
from manyhands.moe.exchange import Meanwhile, Placement
from manyhands.moe.routing import Routing
from manyhands.quant import FetchedExperts, PackedExperts


class ExpertBank(nn.Module):
    """E experts whose weights are got by `stacked`.

    `implementation` names the backend (`auto`, `eager`, `grouped_mm`, `native`, or one registered with
    `manyhands.kernels.register`); it can be changed at any time and given per call.
    """

    activation: str
    """Between an expert's two products: a name of `manyhands.config.activation`."""
    placement: Placement | None = None
    """Where the experts lie, if on several processes: every call is a collective one then."""

    def __init__(self, implementation: str = "auto") -> None:
        super().__init__()
        self.implementation = check_name(implementation)

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E."""
        raise NotImplementedError

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""
        raise NotImplementedError

    @property
    def num_packed(self) -> int:
        """Weights and biases that lie in records, not in parameters."""
        return 0

    def extra_repr(self) -> str:
        """Sizes, activation and backend."""
        sizes = f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"
        return f"{sizes}, hidden_act={self.activation}, implementation={self.implementation}"

    @abstractmethod
    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """The exact float weights of these experts, stacked in that order; gradients go through them.

        Asked for with every pass, and only for experts that some token chose: `eager` asks for one at a time,
        `grouped_mm` for all that are needed.
        """
        raise NotImplementedError

    def in_memory(self) -> ExpertWeights | PackedExperts | None:
        """All weights as they lie in memory, stacked or packed, for backends that read them there; None: they do not.

        Views of what the bank holds, not copies. They are what `stacked` gives.
        """
        return None

    def fetched_experts(self) -> FetchedExperts | None:
        """Packed records of which only some are in memory, for native programs; None: no source brings any.

        The same table and source with every look, or programs are prepared anew.
        """
        return None

    def for_native(self) -> ExpertWeights | PackedExperts | FetchedExperts | None:
        """What a native call that bypasses `forward` may point at: `fetched_experts` or `in_memory`, unless somebody
        listens or replaced `forward`, another backend was named, or other processes hold some of the experts. Not to be
        kept without watching this module."""
        ours = type(self).forward is ExpertBank.forward and unheard(self) and self.implementation in ("auto", "native")
        ours = ours and self.placement is None and BACKENDS["native"].missing() is None
        return (self.fetched_experts() or self.in_memory()) if ours else None

    def own_experts(self) -> Bank:
        """The experts that this process holds, numbered from 0, where they have a `placement`.

        Raises `ConfigError` for a bank that cannot be shared out.
        """
        raise ConfigError(f"parallel.ep: {type(self).__name__} cannot lie on several processes")

    def reset_parameters(
        self,
        std: float = INITIALIZER_RANGE,
        residual_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fresh weights, where a bank has parameters: see `Experts`. What is no parameter stays as it is."""

    def forward(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """[T, D] -> [T, D]: each token's kept experts, weighted and summed."""
        return self._run(x_TD, routing.expert_ids, routing.weights, routing.kept, implementation)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def beside(self, x_TD: Tensor, routing: Routing, work: Meanwhile) -> Tensor:
        """The same of experts that have a `placement`; `work` is done while tokens travel."""
        assert self.placement is not None
        decided = routing.expert_ids, routing.weights, routing.kept
        return self.placement.run(self.implementation, x_TD, *decided, self.own_experts(), work)

    def outputs(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """[T, K, D]: the chosen experts' outputs, unweighted; zeros where the pair is not kept."""
        T, K = routing.expert_ids.shape
        ids, kept = routing.expert_ids.reshape(-1, 1), routing.kept.reshape(-1, 1)
        ones = torch.ones_like(ids, dtype=torch.float32)
        return self._run(x_TD.repeat_interleave(K, dim=0), ids, ones, kept, implementation).view(T, K, x_TD.shape[-1])

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        name = self.implementation if implementation is None else implementation
        if self.placement is not None:
            return self.placement.run(name, x, ids, weights, kept, self.own_experts())
        return run_experts(name, x, ids, weights, kept, self)
