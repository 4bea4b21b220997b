"""A routing given to a layer of transformers: what its router asks PyTorch for is answered as the edit wants it.

The router's own code weighs the experts: only the top k over E experts is answered with the given ones, and what is off
is at -inf in front of the score and of the choice. A router that does not work so is refused.

T tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.moe import Edit, Force, Mask, Replay, Routing, Swap

INF = float("inf")


class Followed:
    """One layer's edit, in one forward."""

    def __init__(self, edit: Edit, label: str, num_experts: int) -> None:
        """Raises `ConfigError` for experts that the layer has not."""
        self.edit = Replay.of(edit) if isinstance(edit, Routing) else edit
        self.label, self.E = label, num_experts
        self.asked = False
        """Whether the router picked the top k of E experts."""
        named: tuple[int, ...] = ()
        if isinstance(self.edit, Mask | Force):
            named = self.edit.experts
        elif isinstance(self.edit, Swap):
            named = (self.edit.expert, self.edit.by)
        else:
            ids = self.edit.expert_ids
            named = (max(0, int(ids.min())), int(ids.max())) if ids.numel() else ()
        if wrong := [expert for expert in named if not 0 <= expert < num_experts]:
            raise ConfigError(f"{label} has no expert {wrong[0]}: they are numbered from 0 to {num_experts - 1}")
        if not isinstance(self.edit, Mask | Replay) and len(set(named)) < len(named):
            raise ConfigError(f"{label}: {type(self.edit).__name__} names experts {list(named)}: give different ones")

    def call(self, func: Any, name: str, is_score: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` is to answer, and the tensor it was asked about, which a mask changes."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not (is_score or name == "topk"):
            return func(*args, **kwargs), x
        if isinstance(self.edit, Mask):
            x = self._off(x)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
        found = func(*args, **kwargs)
        if name != "topk":
            return found, x
        k = int(args[1] if len(args) > 1 else kwargs["k"])
        if x.shape[-1] != self.E:  # of a group: one whose other experts are off is scored by what is left
            if isinstance(self.edit, Mask):
                alone = (found.values == -INF) & (found.values[..., :1] != -INF)
                found = torch.return_types.topk((found.values.masked_fill(alone, 0.0), found.indices))
            return found, x
        edit = self.edit
        wanted = (
            edit.expert_ids.shape[-1]
            if isinstance(edit, Replay)
            else len(edit.experts)
            if isinstance(edit, Force)
            else k
        )
        if x.dim() > 2 and x.shape[-2] == 1 and k != wanted:  # of one group that is all: its score changes nothing
            return found, x
        self.asked = True
        if isinstance(self.edit, Mask):
            if (left := self.E - len(set(self.edit.experts))) < k:
                raise ConfigError(f"{self.label}: {left} of {self.E} experts are left, and a token needs {k}")
            return found, x
        if isinstance(self.edit, Replay | Force):
            ids = self._given(found.indices, k)
            return torch.return_types.topk((x.gather(-1, ids), ids)), x
        return found, x

    def experts(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts are called with, in the place of what the router said."""
        edit = self.edit
        if not self.asked:
            raise ConfigError(f"{self.label}: its router does not pick the top k of {self.E} experts: cannot edit it")
        if isinstance(edit, Swap):
            swapped_TK = ids_TK.masked_fill(ids_TK == edit.expert, edit.by)
            return swapped_TK.masked_fill(ids_TK == edit.by, edit.expert), weights_TK
        if isinstance(edit, Mask):
            off = torch.tensor(edit.experts, device=ids_TK.device, dtype=ids_TK.dtype)
            if bool(torch.isin(ids_TK, off).any()):
                raise ConfigError(f"{self.label}: too few experts are left in its groups without {list(edit.experts)}")
            return ids_TK, weights_TK
        given_TK = self._given(ids_TK, ids_TK.shape[1])
        if not torch.equal(given_TK, ids_TK):
            raise ConfigError(f"{self.label} calls other experts than those its router picked: cannot edit it")
        if isinstance(edit, Replay) and edit.weights is not None:
            recorded_TK = edit.expert_ids.to(ids_TK)
            at_TKK = ids_TK[:, :, None] == recorded_TK[:, None, :]
            replayed_TK = (at_TKK * edit.weights.to(weights_TK)[:, None, :]).sum(-1)
            weights_TK = replayed_TK.where((recorded_TK >= 0).any(1, keepdim=True), weights_TK)
        return ids_TK, weights_TK

    def logits(self, logits_TE: Tensor) -> Tensor:
        """The router's, without what is off."""
        return self._off(logits_TE) if isinstance(self.edit, Mask) else logits_TE

    def _off(self, x: Tensor) -> Tensor:
        """-inf for the experts of a mask, in what is of E experts, or of groups of them."""
        assert isinstance(self.edit, Mask)
        grouped = x.dim() > 2 and x.shape[-1] * x.shape[-2] == self.E
        if x.shape[-1] != self.E and not grouped:
            return x
        off_E = torch.zeros(self.E, dtype=torch.bool, device=x.device)
        off_E[list(self.edit.experts)] = True
        return x.masked_fill(off_E.view(x.shape[-2:]) if x.shape[-1] != self.E else off_E, -INF)

    def _wanted(self, k: int) -> int:
        """Experts per token, as the edit has it."""
        if isinstance(self.edit, Replay):
            return int(self.edit.expert_ids.shape[-1])
        return len(self.edit.experts) if isinstance(self.edit, Force) else k

    def _given(self, own: Tensor, k: int) -> Tensor:
        """The given experts in the shape of the router's own, whose order stays where they are the same experts."""
        own_TK = own.reshape(-1, k)
        if isinstance(self.edit, Force):
            if len(self.edit.experts) != k:
                raise ConfigError(f"{self.label}: Force names {len(self.edit.experts)} experts; a token has {k}")
            given_TK = torch.tensor(self.edit.experts, device=own.device, dtype=own.dtype).expand_as(own_TK)
        else:
            assert isinstance(self.edit, Replay)
            given_TK = self.edit.expert_ids.to(own)
            if given_TK.shape != own_TK.shape:
                what = f"the tokens and their experts {list(own_TK.shape)}"
                raise ConfigError(f"{self.label}: a replay's expert_ids are {list(given_TK.shape)}, {what}")
            recorded_T1 = (given_TK >= 0).any(1, keepdim=True)
            if bool(((given_TK < 0) & recorded_T1).any()):
                raise ConfigError(f"{self.label}: a replay gives a token fewer than {k} experts")
            given_TK = given_TK.where(recorded_T1, own_TK)
        same_T1 = (given_TK.sort(1).values == own_TK.sort(1).values).all(1, keepdim=True)
        return own_TK.where(same_T1, given_TK).view_as(own)
