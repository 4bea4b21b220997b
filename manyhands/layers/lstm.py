"""A long short-term memory (Hochreiter & Schmidhuber 1997) over a sequence, by torch's kernels.

B batch, S sequence, D width. The gates' rows lie in torch's order: input, forget, cell, output.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, Tensor]
"""(h, c), [B, D] each: what a layer remembers of the sequence so far."""


class LSTM(nn.Module):
    """h_t, c_t from x_t and h_{t−1}, c_{t−1}; as wide as its input. Computes in its input's dtype.

    Fresh weights are uniform in ±1/√D, biases 0 but the forget gate's, which is 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        D = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * D, D))
        self.weight_hh = nn.Parameter(torch.empty(4 * D, D))
        self.bias = nn.Parameter(torch.empty(4 * D)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights."""
        D = self.weight_ih.shape[1]
        for weight in (self.weight_ih, self.weight_hh):
            weight.uniform_(-(D**-0.5), D**-0.5, generator=generator)
        if self.bias is not None:
            forget_4 = torch.tensor([0.0, 1.0, 0.0, 0.0], device=weight.device)
            self.bias.copy_(forget_4.repeat_interleave(D))

    def forward(self, x_BSD: Tensor, state: State | None = None, real_BS: Tensor | None = None) -> tuple[Tensor, State]:
        """[B, S, D] -> every h [B, S, D], and the state after the last token; from `state` on (None: zeros).

        `real_BS` is false for padding, on any side: it changes no state, and its h is 0. None: there is none.
        """
        (B, S, D), dtype = x_BSD.shape, x_BSD.dtype
        params = [self.weight_ih.to(dtype), self.weight_hh.to(dtype)]
        if self.bias is not None:
            bias = self.bias.to(dtype)
            params += [bias, torch.zeros_like(bias)]  # torch adds one for the input and one for the state
        h, c = (
            (x_BSD.new_zeros(B, D), x_BSD.new_zeros(B, D))
            if state is None
            else (state[0].to(dtype), state[1].to(dtype))
        )
        how = self.bias is not None, 1, 0.0, self.training, False
        if real_BS is None:
            y, h1, c1 = torch.lstm(x_BSD, (h[None], c[None]), params, *how, True)
            return y, (h1[0], c1[0])
        order_BS = (
            (~real_BS).to(torch.uint8).argsort(stable=True, dim=1)[..., None].expand(-1, -1, D)
        )  # real tokens first
        lengths_B = real_BS.sum(1)
        rows = lengths_B.argsort(stable=True, dim=0, descending=True)[
            : int((lengths_B > 0).sum())
        ]  # those with a token
        if not len(rows):
            return torch.zeros_like(x_BSD), (h, c)
        packed = pack_padded_sequence(x_BSD.gather(1, order_BS)[rows], lengths_B[rows].cpu(), batch_first=True)
        data, h1, c1 = torch.lstm(packed.data, packed.batch_sizes, (h[rows][None], c[rows][None]), params, *how)
        y, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes), batch_first=True, total_length=S)
        y = torch.zeros_like(x_BSD).index_copy(0, rows, y)
        y = torch.zeros_like(x_BSD).scatter(1, order_BS, y)
        return y, (h.index_copy(0, rows, h1[0]), c.index_copy(0, rows, c1[0]))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
