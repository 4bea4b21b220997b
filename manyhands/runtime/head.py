"""The head: logits of the rows that draw, and of no others.

R rows, D model width, V vocabulary.
"""

from collections.abc import Sequence
from ctypes import addressof, c_void_p

import torch
from torch import Tensor, nn

from manyhands.kernels.linear import for_native
from manyhands.kernels.moment import held
from manyhands.kernels.native import views
from manyhands.kernels.native.library import CLinear
from manyhands.kernels.policy import FEW_ROWS
from manyhands.models import Decoder
from manyhands.runtime.builder import LINEARS, Builder, Unfit, step_of
from manyhands.runtime.claims import linear
from manyhands.runtime.segments import Native
from manyhands.runtime.snapshot import heard


class Head:
    """The model's, or where a claim covers it a native call."""

    def __init__(self, model: Decoder, b: Builder) -> None:
        self._model = model
        self.why: str | None = None
        """Why it is called as a module; None: it is native."""
        self._native: Native | None = None
        try:
            struct = self._weights(b)
        except Unfit as why:
            self.why = str(why)
            return
        self._V = struct.weight.outputs
        self._rows = views.rows(torch.empty(1, b.D))
        self._to = (c_void_p * 1)()
        self._held = (struct, pointers := (c_void_p * 1)(addressof(struct)))
        self._native = Native([step_of(LINEARS, pointers, self._rows, self._to, n=(1, 0))])

    def _weights(self, b: Builder) -> CLinear:
        model = self._model
        if type(model).head is not Decoder.head or "head" in vars(model):
            raise Unfit("a head of the model's own")
        if model.lm_head is not None:
            if heard(model.lm_head):
                raise Unfit("somebody listens (a hook, or a forward of its own)")
            return linear.linear_of(b, model.lm_head, b.D)
        embed = model.embed_tokens
        found = for_native(embed.weight, None, b.D) if type(embed) is nn.Embedding and held(embed, "weight") else None
        if found is None:
            raise Unfit("an embedding that lies as the kernels do not read it")
        b.most = min(b.most, FEW_ROWS)  # as `claims/linear.py` does
        return found[0]

    def logits(self, states_TD: Tensor, draws: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[R, V] of rows of the states [T, D] float32: float32 where this is native, else what the module gives."""
        R = len(draws)
        if R and draws[-1] - draws[0] == R - 1:
            states_RD = states_TD[draws[0] : draws[0] + R]
        else:
            states_RD = states_TD[list(draws)]
        if self._native is None:
            return self._model.head(states_RD.to(dtype, copy=True))
        logits = torch.empty(R, self._V)
        if R:
            self._rows.data, self._rows.count, self._to[0] = states_RD.data_ptr(), R, logits.data_ptr()
            self._native.make()
        return logits
