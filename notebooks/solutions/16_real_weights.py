# %% [markdown]
# # 16 · Real weights: solutions

# %% [markdown]
# **1.** Eight bytes of length, then JSON. `__metadata__` is a comment and no tensor.


# %% tags=["exercise-1"]
def shapes_in(raw):  # bytes -> {name: shape as a tuple}
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return {n: tuple(entry["shape"]) for n, entry in header.items() if n != "__metadata__"}


# %% [markdown]
# **2.** Everything that is cut must be a multiple of `n`. The heads decide it: a head is never cut.


# %% tags=["exercise-2"]
def possible_shards(config):  # -> list[int], from the smallest on
    c = config
    cut = (c.n_heads, c.n_kv_heads, c.hidden_dim, c.dim, c.vocab_size)
    return [n for n in range(1, 17) if all(size % n == 0 for size in cut)]


# %% [markdown]
# **3.** As `q4_1`, with one number in front instead of two, and 8 in place of the minimum.


# %% tags=["exercise-3"]
def q4_0(block):  # 18 bytes -> 32 floats
    (d,) = struct.unpack("<e", block[:2])
    q = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [d * (value - 8) for value in q]
