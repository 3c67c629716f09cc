# %% [markdown]
# # 6 · Llama: solutions
#
# Each token gets a direction of its own. The norm turns a one-hot vector of 8 numbers into one of
# length sqrt(8), whatever its length was, so the head divides by that. A long vector makes the
# norm's eps negligible.


# %% tags=["exercise-1"]
def embeddings_and_head(table):
    vocab = len(table)
    return 100 * torch.eye(vocab), table.T / vocab**0.5


# %% [markdown]
# wq is (dim, dim) however many heads it is cut into: this is why head_dim must be given.


# %% tags=["exercise-2"]
def sizes_of(shapes, head_dim):
    vocab_size, dim = shapes["tok_embeddings.weight"]
    return {
        "dim": dim,
        "n_layers": sum(name.endswith("attention.wq.weight") for name in shapes),
        "n_heads": shapes["layers.0.attention.wq.weight"][0] // head_dim,
        "n_kv_heads": shapes["layers.0.attention.wk.weight"][0] // head_dim,
        "hidden_dim": shapes["layers.0.feed_forward.w1.weight"][0],
        "vocab_size": vocab_size,
    }


# %% [markdown]
# Each of the two matrices is reordered by its own number of heads.

# %% tags=["exercise-3"]
from minillama.checkpoint.huggingface import huggingface_name, pairs_from_halves
from minillama.checkpoint.weights import parameter_shapes


def from_huggingface(theirs, config):
    ours = {}
    for name in parameter_shapes(config):
        weight = theirs[huggingface_name(name)]
        if name.endswith("wq.weight"):
            weight = pairs_from_halves(weight, config.n_heads)
        if name.endswith("wk.weight"):
            weight = pairs_from_halves(weight, config.n_kv_heads)
        ours[name] = weight
    return ours
