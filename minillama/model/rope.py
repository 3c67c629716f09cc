"""Rotary position embedding: a token's position is the angle its queries and keys are turned by."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

# torch.compile leaves products of complex numbers to PyTorch's own kernel, and says so.
warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")


def rope_angles(
    positions: Int[Tensor, "*batch seq"], head_dim: int, theta: float
) -> Float[Tensor, "*batch seq half_head_dim"]:
    """How far each pair of channels is turned at each position, in radians.

    Pair i turns by theta^(-2i / head_dim) per position: the first like a second hand, the last so
    slowly that it hardly moves within the context. Always in float32 and computed anew for each
    call: bfloat16 cannot even represent position 257, and a stored buffer would be rounded by
    `model.bfloat16()`.

    Source: Su et al. 2021, sec. 3.2.2 (arXiv:2104.09864). Built in notebooks/02_rope.ipynb.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    return positions[..., None].float() * theta ** (-pair / head_dim)


def apply_rope(
    x: Float[Tensor, "*batch seq head_dim"], angles: Float[Tensor, "*#batch seq half_head_dim"]
) -> Float[Tensor, "*batch seq head_dim"]:
    """Turn every pair of neighbouring channels (2i, 2i + 1) of x by its angle.

    A rotation keeps lengths, and the product of a query turned by m and a key turned by n depends
    on m - n only: attention sees relative positions. Meta's layout pairs neighbours; Hugging
    Face's pairs channel i with i + head_dim / 2, and its wq and wk have their rows permuted to
    match. Weights of one layout in the rotation of the other give fluent nonsense, no error.

    Source: Su et al. 2021, eq. 34 (arXiv:2104.09864). Built in notebooks/02_rope.ipynb.
    """
    # A pair as a complex number is turned by one product. Written out in cosines and sines it takes
    # two to four times as long (14 against 7 microseconds for a token, 390 against 105 for 512).
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)
