"""Causal self-attention with grouped queries."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from minillama.config import LlamaConfig
from minillama.model.cache import LayerCache
from minillama.model.packed import Documents
from minillama.model.rope import apply_rope


def attend(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads k_len head_dim"],
    v: Float[Tensor, "batch kv_heads k_len head_dim"],
    visible: Bool[Tensor, "#batch 1 q_len k_len"] | Documents | None = None,
) -> Float[Tensor, "batch heads q_len head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, where no query sees a later key.

    `visible` None means plain causal attention: q and k stand at the same positions (or one query
    stands at the last of them); `Documents` means that within each document. Query head i reads
    key/value head i // (heads / kv_heads): each key/value head is *repeated* for a group of
    neighbouring query heads, never tiled.

    The score matrix is never stored: PyTorch's fused kernels compute it block by block.
    Source: Vaswani et al. 2017, eq. 1 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245).
    Built in notebooks/05_gqa_attention.ipynb.
    """
    if isinstance(visible, Documents):
        return _attend_within(visible, q, k, v)
    causal = visible is None and q.shape[2] > 1
    return scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=True)


@torch.compiler.disable  # else every row, of other lengths, would be compiled anew
def _attend_within(documents: Documents, *qkv: Tensor) -> Tensor:
    rows = []
    for lengths, *row in zip(documents.lengths, *(x.split(1) for x in qkv), strict=True):
        parts = zip(*(x.split(lengths, dim=2) for x in row), strict=True)
        rows.append(torch.cat([attend(*part) for part in parts], dim=2))
    return torch.cat(rows)


class Attention(nn.Module):
    """Project to queries, keys and values; turn q and k by their positions; attend; project back.

    With n_kv_heads < n_heads (grouped-query attention) the KV cache shrinks by the
    factor n_heads / n_kv_heads. Training and decoding take the same path: `cache` is the only
    difference.

    Source: Touvron et al. 2023b, sec. 2.2 (arXiv:2307.09288). Built in
    notebooks/05_gqa_attention.ipynb.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        angles: Float[Tensor, "#batch 1 seq half_head_dim"],
        visible: Bool[Tensor, "#batch 1 seq k_len"] | Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        q, k, v = (self._split_heads(w(x)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        if cache is not None:
            k, v = cache.append(k, v)  # (batch, kv_heads, past + seq, head_dim)
        mixed = attend(q, k, v, visible)
        return self.wo(mixed.transpose(1, 2).flatten(2))  # (batch, seq, heads * head_dim)

    def _split_heads(self, x: Float[Tensor, "batch seq width"]) -> Tensor:
        # The number of heads is read off the tensor, so that a slice of the heads works too. Not
        # with einops: four calls in every layer take 2% of the time of a token of a small model.
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)
