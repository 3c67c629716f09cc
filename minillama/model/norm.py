"""RMSNorm: keep the numbers in range."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    r"""y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    LayerNorm without the mean and without the bias: rescaling is what stabilises training,
    recentring is not needed. Llama applies it to the *input* of every sub-layer, so that the
    residual stream itself is never squeezed.

    Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467). Built in notebooks/03_rmsnorm.ipynb.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        # In float32: the square of a bfloat16 loses the digits that the mean needs.
        x_float = x.float()
        inv_rms = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_float * inv_rms).type_as(x) * self.weight
