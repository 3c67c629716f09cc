"""Meta's equations, said once more: NumPy, float64, one sequence, nothing clever.

The rotation is a product of complex numbers, the mask is a matrix of -inf, keys and values are
repeated in memory, the whole score matrix is held. It shares no code with minillama and reads
only a state dict under Meta's names, so that agreement means something.

Source: Touvron et al. 2023a, sec. 2.2 (arXiv:2302.13971), and 2023b, sec. 2.2 (arXiv:2307.09288).
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):  # (seq, heads, head_dim)
    seq, _, head_dim = x.shape
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = np.exp(1j * np.outer(np.arange(seq), frequencies))  # (seq, head_dim / 2)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attention_weights(q, k):  # (seq, heads, head_dim) twice -> (heads, seq, seq)
    seq, _, head_dim = q.shape
    future = np.triu(np.full((seq, seq), -np.inf), k=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim) + future
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(x, weights, config):
    seq = len(x)
    q = (x @ weights["wq"].T).reshape(seq, config.n_heads, config.head_dim)
    k = (x @ weights["wk"].T).reshape(seq, config.n_kv_heads, config.head_dim)
    v = (x @ weights["wv"].T).reshape(seq, config.n_kv_heads, config.head_dim)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    group = config.n_heads // config.n_kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # 0 0 0 1 1 1, not 0 1 0 1 0 1
    mixed = np.einsum("hqk,khd->qhd", attention_weights(q, k), v)
    return mixed.reshape(seq, config.dim) @ weights["wo"].T


def feed_forward(x, weights):
    gate = x @ weights["w1"].T
    return (gate / (1 + np.exp(-gate)) * (x @ weights["w3"].T)) @ weights["w2"].T


def logits(state, config, tokens):
    """Of a whole sequence: (seq,) token ids -> (seq, vocab), from a torch state dict."""
    state = {name: weight.double().numpy() for name, weight in state.items()}
    x = state["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        norm_1 = state[f"layers.{i}.attention_norm.weight"]
        norm_2 = state[f"layers.{i}.ffn_norm.weight"]
        heads = {w: state[f"layers.{i}.attention.{w}.weight"] for w in ("wq", "wk", "wv", "wo")}
        hidden = {w: state[f"layers.{i}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3")}
        x = x + attention(rms_norm(x, norm_1, config.norm_eps), heads, config)
        x = x + feed_forward(rms_norm(x, norm_2, config.norm_eps), hidden)
    return rms_norm(x, state["norm.weight"], config.norm_eps) @ state["output.weight"].T
