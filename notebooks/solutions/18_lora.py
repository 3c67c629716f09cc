# %% [markdown]
# # 18 · LoRA: solutions

# %% [markdown]
# **1.** wq and wo are dim × dim; wk and wv read dim numbers and give fewer.


# %% tags=["exercise-1"]
def attention_adapter(config, rank):
    """Give back an int."""
    kv_dim = config.n_kv_heads * config.head_dim
    return config.n_layers * rank * (2 * (config.dim + config.dim) + 2 * (kv_dim + config.dim))


# %% [markdown]
# **2.** Of the sum of both ranks: the rows of A below each other, the columns of B side by side.


# %% tags=["exercise-2"]
def both(one, other, one_scale, other_scale):
    """`one` and `other` are LowRank; give back a LowRank."""
    b = torch.cat([one_scale * one.b, other_scale * other.b], dim=1)
    return LowRank(torch.cat([one.a, other.a]), b)


# %% [markdown]
# **3.** u and v have length 1, so the root of s makes A's rows and B's columns equally long.


# %% tags=["exercise-3"]
def extracted(change, rank):
    """`change` is (d_out, d_in); give back a LowRank."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * v[:rank], u[:, :rank] * root)
