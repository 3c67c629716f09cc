"""One row and one token: every matrix is multiplied by a single vector, and read for that."""

import copy
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillama.model import Llama


def for_one_row(model: Llama, compiled: bool = False) -> Llama:
    """The same model, in the same memory, with the products that are fastest here for one vector.

    Or the model itself, where these are those of nn.Linear: on GPUs, say.
    """
    return cast(Llama, _twin(model, compiled))


def _twin(module: nn.Module, compiled: bool) -> nn.Module:
    if isinstance(module, nn.Linear):
        return VectorProduct(module.weight) if _is_slow(module.weight, compiled) else module
    children = {name: _twin(child, compiled) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)  # parameters, buffers and all else are shared
    twin._modules = {**module._modules, **children}
    return twin


class VectorProduct(nn.Module):
    """What an nn.Linear does, for a single vector: one pass over the weights.

    nn.Linear asks for a product of matrices. In bfloat16, PyTorch's product with a vector is 1.2 to
    2 times as fast on processors that have bfloat16. On others, a compiler adds up in float32 what
    it reads, and so it does in float32 on processors other than Intel's, where MKL reads no faster
    than a third of the memory's speed. Tables in docs/results.md.
    """

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        # A compiler would take the kernel apart, and add up in bfloat16.
        if _has_kernel(self.weight) and not torch.compiler.is_compiling():
            return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
        return (self.weight.float() * x.float()).sum(-1).view(*x.shape[:-1], -1).type_as(x)


def _is_slow(weight: Tensor, compiled: bool) -> bool:
    """Whether there is something better than nn.Linear."""
    if weight.device.type != "cpu":
        return False
    if weight.dtype != torch.float32:
        return compiled or _has_kernel(weight)
    return compiled and "Intel" not in torch.cpu.get_capabilities()["cpu_name"]


def _has_kernel(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
