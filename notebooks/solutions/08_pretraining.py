# %% [markdown]
# # 8 · Pretraining: solutions

# %% [markdown]
# **1.** What each GPU keeps of its own row can't be shared, so it is taken off first.


# %% tags=["exercise-1"]
def gpus_needed(config, gpu_bytes):
    """Give back an int."""
    row = config.n_layers * config.max_seq_len * 4 * config.dim
    return math.ceil(16 * config.n_parameters / (gpu_bytes - row))


# %% [markdown]
# **2.** The derivative of L is the softmax. So the gradient is softmax minus one-hot, as before,
# and the leash adds 2 c L times the softmax.


# %% tags=["exercise-2"]
def leashed_gradient(z, target, c):
    """`z` are the scores of one position, (vocab,), and `target` is an int; give back (vocab,)."""
    gradient = (1 + 2 * c * z.logsumexp(-1)) * z.softmax(-1)
    gradient[target] -= 1
    return gradient


# %% [markdown]
# **3.** The place in the endless sequence of rows says which epoch it is, and where in its order.


# %% tags=["exercise-3"]
def rows_of_step(step, batch_size, n_rows, seed):
    """Give back `batch_size` row numbers, each in 0 ... n_rows - 1, as a list."""
    chosen = []
    for place in range((step - 1) * batch_size, step * batch_size):
        epoch, position = divmod(place, n_rows)
        order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        chosen.append(int(order[position]))
    return chosen
