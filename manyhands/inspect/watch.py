"""A model reads texts: its routing, what its routers would have said one sublayer early, and what random ones say.

T tokens   D model width   L sparse layers   E experts   K experts per token   R random routers
"""

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyhands.errors import UserError
from manyhands.inspect.observed import Observed
from manyhands.inspect.texts import UPOS, Sequences
from manyhands.models import Decoder
from manyhands.models.decoder import Block
from manyhands.trace.random_router import RandomRouter, recorded_inputs

BATCH_TOKENS = 4096
"""Of one forward pass; the first one's hidden states fit the random routers' offsets."""


def check_inspectable(model: Decoder) -> None:
    """Raises `UserError` for a model without sparse layers."""
    if not model.sparse_layers():
        raise UserError("the model has no mixture-of-experts layer: there is no routing to inspect")


@torch.inference_mode()
def observe(
    model: Decoder,
    read: Sequences,
    front_ids: tuple[int, ...] = (),
    random_routers: int = 3,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Observed:
    """The routing of every token of `read`, in the model's own dtype; no weight changes.

    `front_ids` stand in front of each sequence, as the model is used to, and are not looked at. `progress` is called
    with the tokens read so far. Where a router chooses by token id or lets experts choose, no random router could stand
    beside it, and there are none. Raises `UserError` for a model without sparse layers.
    """
    check_inspectable(model)
    assert model.config.moe is not None
    layers, config = model.sparse_layers(), model.config.moe.router
    if config.select != "topk":
        random_routers = 0
    T, L, K = len(read.token_ids), len(layers), config.most_experts_per_tok
    ids_TLK = np.full((T, L, K), -1, np.int32)
    early_TLK = np.full((T, L, K), -1, np.int32) if config.select == "topk" else None
    random_RTLK = np.full((random_routers, T, L, K), -1, np.int32) if random_routers else None
    routers: dict[int, list[RandomRouter]] = {}
    was_training, done = model.training, 0
    model.eval()
    try:
        modules: dict[tuple[str, int], nn.Module] = {("router", n): mlp.router for n, mlp in layers.items()}
        modules |= {("block", n): model.layers[n] for n in layers}
        with recorded_inputs(modules) as states:
            for rows, ids_BS, mask_BS in _batches(read, front_ids, seed):
                device = model.embed_tokens.weight.device
                hidden = model.hidden(ids_BS.to(device), mask_BS.to(device))
                looked = mask_BS.clone()
                looked[:, : len(front_ids)] = False
                real_T = looked.flatten().to(device)
                for i, (number, routing) in enumerate(sorted(hidden.routings.items())):
                    ids_TK = routing.expert_ids[real_T]
                    ids_TLK[rows, i] = _array(ids_TK)
                    at_router = states["router", number][real_T]  # before the router is asked again
                    if early_TLK is not None:
                        block = cast(Block, model.layers[number])
                        early = block.post_attention_layernorm(states["block", number]).flatten(0, 1)[real_T]
                        early_TLK[rows, i] = _array(layers[number].router(early).expert_ids)
                    if random_RTLK is not None:
                        if number not in routers:
                            seeds = range(seed * 1000 + 100 * number, seed * 1000 + 100 * number + random_routers)
                            routers[number] = [
                                RandomRouter(layers[number].router, at_router, ids_TK, each) for each in seeds
                            ]
                        for r, router in enumerate(routers[number]):
                            random_RTLK[r, rows, i] = _array(router(at_router))
                done += len(rows)
                if progress is not None:
                    progress(done)
    finally:
        model.train(was_training)
    return Observed(
        layers=tuple(sorted(layers)),
        num_experts=config.num_experts,
        expert_ids=ids_TLK,
        token_ids=read.token_ids,
        sequence=read.sequence,
        text=read.text,
        domain=read.domain,
        domains=read.domains,
        tag=read.tag,
        tags=UPOS if read.tag is not None else (),
        early_ids=early_TLK,
        random_ids=random_RTLK,
    )


def _array(ids: Tensor) -> NDArray[np.int32]:
    return ids.to("cpu", torch.int32).numpy()


def _batches(
    read: Sequences, front_ids: tuple[int, ...], seed: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Rows of the tokens that are read, ids [B, S] padded at the end, and the mask [B, S] that is false for padding.

    Sequences of like length are read together; the batches come in random order, so that the first is of all domains.
    """
    starts = np.flatnonzero(np.diff(read.sequence, prepend=-1))
    sizes = np.diff(np.append(starts, len(read.sequence)))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(starts))
    order = order[np.argsort(sizes[order], kind="stable")]
    batches: list[list[int]] = [[]]
    for number in order.tolist():
        if batches[-1] and (len(batches[-1]) + 1) * (int(sizes[number]) + len(front_ids)) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(number)
    for i in rng.permutation(len(batches)).tolist():
        batch = batches[i]
        S = len(front_ids) + int(sizes[batch].max())
        ids, mask = torch.zeros(len(batch), S, dtype=torch.int64), torch.zeros(len(batch), S, dtype=torch.bool)
        rows = []
        for b, number in enumerate(batch):
            span = slice(int(starts[number]), int(starts[number] + sizes[number]))
            row = [*front_ids, *read.token_ids[span].tolist()]
            ids[b, : len(row)] = torch.tensor(row)
            mask[b, : len(row)] = True
            rows.append(np.arange(span.start, span.stop))
        yield np.concatenate(rows), ids, mask
