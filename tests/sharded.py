"""A tree of modules cut over a mesh as a trained model is, for tests of what works on its parameters alone.

model = cut(build_model(), mesh)            # stacks of experts over ep, then dp; everything else over the world
give_gradients(model, {"norm.weight": whole})
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from manyhands.parallel.group import Group, Mesh, mesh_of
from manyhands.parallel.shards import laid_out, share, whole

LAYOUTS = {2: [1, 2], 4: [1, 2, 4]}
"""By the number of processes, into how many the experts are cut first."""


def mesh_for(ranks: Group, ep: int) -> Mesh:
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    return mesh


def cut(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Shard every parameter in place; whoever is called `experts` is a stack of them."""
    experts = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    for module in experts:
        for name, param in list(module.named_parameters()):
            stack = distribute_tensor(param.detach(), mesh.ep, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(stack, requires_grad=param.requires_grad))
        fully_shard(module, mesh=mesh.dp)
    fully_shard(model, mesh=mesh.world)
    return model


def give_gradients(model: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Every process its rows of `grads`, which name whole tensors; parameters that are not named get none."""
    for name, param in model.named_parameters():
        param.grad = laid_out(share(grads[name], param).clone(), param, param.shape) if name in grads else None


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters, as copies."""
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor."""
    assert found.keys() == expected.keys()
    return {n: float((found[n] - expected[n]).abs().max()) if expected[n].numel() else 0.0 for n in expected}


def random_like(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A gradient for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(param.shape, generator=generator) for name, param in model.named_parameters()}
