"""SwiGLU: a feed-forward layer whose hidden units are gated."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from minillama.config import LlamaConfig


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 is the gate, w3 the value it lets through, w2 leads back to dim.

    Three matrices instead of two; `swiglu_hidden_dim` narrows them to keep the parameters equal.
    Source: Shazeer 2020, eq. 6 (arXiv:2002.05202). Built in notebooks/04_swiglu.ipynb.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.w2(silu(self.w1(x)) * self.w3(x))
