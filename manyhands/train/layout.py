"""A model on a mesh of processes: experts shared out over `ep` and then over `dp`, everything else over all (FSDP2).

    gradients      sums over the processes, never means: a loss is divided by the global number of targets already
    compute dtype  blocks are gathered in it; routers, norms, embedding and head in float32, as one process holds them

B blocks; E experts; W processes.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree as pytree

from manyhands.config import RunConfig
from manyhands.errors import ConfigError
from manyhands.layers.norm import LayerNorm, RMSNorm
from manyhands.models import AnyModel, EncoderDecoder, build, init_weights
from manyhands.moe import ExpertBank, Router
from manyhands.moe.exchange import Placement
from manyhands.parallel.drawing import DrawnWhole
from manyhands.parallel.group import Mesh

FLOAT32 = MixedPrecisionPolicy(cast_forward_inputs=False)


def build_on(run: RunConfig, mesh: Mesh, device: torch.device) -> AnyModel:
    """The run's model with its fresh weights, sharded over `mesh`: those of one process, of which none holds all."""
    with torch.device("meta"):
        model = build(run.model, run.train.experts_implementation)
    lay_out(model, mesh, run.parallel.dispatch, getattr(torch, run.train.dtype))
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()  # as they are built; what is not 0 is filled with the weights
    with DrawnWhole():
        init_weights(model, run.train.seed)
    return model


def lay_out(
    model: AnyModel,
    mesh: Mesh,
    dispatch: Literal["by_pairs", "by_tokens"] = "by_pairs",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Shard `model` over `mesh`, in place; from here on its parameters are DTensors and every pass is collective.

    `dtype` is what it computes in. Frozen parameters stay frozen. Raises `ConfigError` if the experts cannot be
    shared out.
    """
    shared: set[nn.Parameter] = set()
    for layer in model.sparse_layers().values():
        if mesh.ep.size() > 1:  # else all processes hold the same experts, as they do everything else
            share_out(layer.experts, mesh, dispatch)
            shared.update(layer.experts.parameters())
    over_dp = _placed(mesh)
    low = dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if low else FLOAT32
    if isinstance(model, EncoderDecoder):
        for block in model.decoder.layers:  # what reads the encoded input runs before the block does
            ahead: list[nn.Module] = [block.get_submodule(f"cross_attn.{name}") for name in ("k_proj", "v_proj")]
            fully_shard(ahead, mesh=mesh.world, mp_policy=policy)
    for block in _blocks(model):
        block.register_forward_hook(_without_views)
        for router in [part for part in block.modules() if isinstance(part, Router)]:
            router.register_forward_hook(_without_views)
            fully_shard(router, mesh=mesh.world, mp_policy=FLOAT32)
        norms: list[nn.Module] = [part for part in block.modules() if isinstance(part, RMSNorm | LayerNorm)]
        if low and norms:
            fully_shard(norms, mesh=mesh.world, mp_policy=FLOAT32)
        fully_shard(
            block, mesh=mesh.world, mp_policy=policy, shard_placement_fn=lambda p: over_dp if p in shared else None
        )
    fully_shard(model, mesh=mesh.world, mp_policy=FLOAT32)
    register_fsdp_forward_method(model, "hidden")  # what training calls, not `forward`
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # or gloo is asked for a reduction that it lacks


def _placed(mesh: Mesh) -> Any:
    """What `fully_shard` is told of experts: their rows go to the processes that hold the same ones.

    Not public, and the only way to have two meshes in one unit: experts as a unit of their own would return views.
    Raises `ConfigError` where torch is too old for it.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise ConfigError(f"training on several processes needs torch 2.13, not {torch.__version__}") from None
    return ShardPlacementResult(Shard(0), FSDPMeshInfo(mesh.dp, shard_mesh_dim=0))


def share_out(experts: ExpertBank, mesh: Mesh, dispatch: Literal["by_pairs", "by_tokens"]) -> None:
    """Leave this process its experts of those over `mesh.ep`, as DTensors of all, and what is beside them (LoRA).

    Raises `ConfigError` for experts that cannot be shared out.
    """
    placement = Placement.even(mesh.ep.get_group(), experts.num_experts, dispatch)
    own = slice(placement.first, placement.first + placement.count)
    experts.own_experts()  # which a bank that cannot be shared out refuses
    for part in experts.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            shard = DTensor.from_local(p.detach()[own].clone(), mesh.ep, [Shard(0)], run_check=False)
            part.register_parameter(name, nn.Parameter(shard, p.requires_grad))
        if isinstance(part, ExpertBank):
            part.placement = placement


def _without_views(module: nn.Module, arguments: Any, output: Any) -> Any:
    """`output` with copies of the views with a gradient in it: FSDP's hooks are lost where those are written to."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.requires_grad and tensor._base is not None else tensor

    return pytree.tree_map_only(Tensor, copied, output)


def _blocks(model: AnyModel) -> Iterable[nn.Module]:
    """Units that are gathered and let go of together, in the order in which they run."""
    if isinstance(model, EncoderDecoder):
        return [*model.encoder.layers, *model.decoder.layers]
    return list(model.layers)
