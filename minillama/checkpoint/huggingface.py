"""Hugging Face's names and layout of the same weights.

Two things differ from Meta's: the names, and the order of the rows of wq and wk. Their rotation
pairs channel i with channel i + head_dim / 2, so each head's rows go from 0 1 2 3 ... to
0 2 4 ... 1 3 5 .... Nothing else in minillama knows that layout.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minillama.config import LlamaConfig

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}


def halves_from_pairs(
    weight: Float[Tensor, "width dim"], n_heads: int
) -> Float[Tensor, "width dim"]:
    """Reorder the rows of wq or wk from neighbouring pairs (Meta) to two halves (Hugging Face).

    `n_heads` is the number of heads of *this* matrix: n_kv_heads for wk. With the wrong number the
    shapes still fit and the model still speaks, wrongly.
    Source: Touvron et al.'s release and transformers' conversion script. Built in
    notebooks/02_rope.ipynb.
    """
    pattern = "(heads half two) dim -> (heads two half) dim"
    return rearrange(weight, pattern, heads=n_heads, two=2)


def pairs_from_halves(
    weight: Float[Tensor, "width dim"], n_heads: int
) -> Float[Tensor, "width dim"]:
    """The inverse of `halves_from_pairs`."""
    pattern = "(heads two half) dim -> (heads half two) dim"
    return rearrange(weight, pattern, heads=n_heads, two=2)


def huggingface_name(name: str) -> str:
    """The name of one of our parameters in LlamaForCausalLM's state dict."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, index, inner = stem.split(".", 2)
    return f"model.layers.{index}.{_LAYER_NAMES[inner]}.weight"


def to_huggingface(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """A state dict of ours as LlamaForCausalLM's: renamed, wq and wk reordered."""
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    renamed = {}
    for name, weight in state.items():
        kind = name.split(".")[-2]
        if kind in n_heads:
            weight = halves_from_pairs(weight, n_heads[kind])
        renamed[huggingface_name(name)] = weight
    return renamed
