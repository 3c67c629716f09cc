# %% [markdown]
# # 5 · Attention: solutions

# %% [markdown]
# **1.** New token i stands at position past + i and sees every key that stands no later.


# %% tags=["exercise-1"]
def visible_after(past, seq):  # -> bool, (seq, past + seq)
    return torch.arange(past + seq) <= past + torch.arange(seq)[:, None]


# %% [markdown]
# **2.** A token that fits only in part does not fit, so round down.


# %% tags=["exercise-2"]
def tokens_that_fit(config, free_bytes):  # -> int
    return free_bytes // (2 * config.cache_elements_per_token)


# %% [markdown]
# **3.** Neighbouring heads form a group; average over the place within the group.


# %% tags=["exercise-3"]
def pool_heads(
    wk, n_heads, n_kv_heads
):  # (n_heads * head_dim, dim) -> (n_kv_heads * head_dim, dim)
    groups = wk.unflatten(0, (n_kv_heads, n_heads // n_kv_heads, -1))
    return groups.mean(1).flatten(0, 1)


# %% [markdown]
# **4.** Each report counts as much as its share of the whole sum: e^a / (e^a + e^b) = sigmoid(a -
# b).


# %% tags=["exercise-4"]
def merge(out_a, log_sum_a, out_b, log_sum_b):  # each (head_dim,) and () -> (head_dim,)
    share_a = torch.sigmoid(log_sum_a - log_sum_b)
    return share_a * out_a + (1 - share_a) * out_b
