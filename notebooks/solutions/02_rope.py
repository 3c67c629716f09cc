# %% [markdown]
# # 2 · RoPE: solutions

# %% [markdown]
# **1.** The opposite of turning by an angle is turning by minus that angle.


# %% tags=["exercise-1"]
def undo_rope(turned, angles):  # (seq, head_dim), (seq, head_dim / 2) -> (seq, head_dim)
    return apply_rope(turned, -angles)


# %% [markdown]
# **2.** $(x + iy)(\cos\alpha + i\sin\alpha)$, multiplied out, is the formula of the notebook.


# %% tags=["exercise-2"]
def complex_rope(x, angles):  # (seq, head_dim), (seq, head_dim / 2) -> (seq, head_dim)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (seq, head_dim / 2)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


# %% [markdown]
# **3.** Turn the key ahead by one position. At $n = m - 1$ it has been turned by $m$ in all, just
# like the query, and no vector of that length matches `q` better than `q` itself.


# %% tags=["exercise-3"]
def key_of_the_word_before(q):  # (head_dim,) -> (head_dim,)
    return apply_rope(q[None], rope_angles(torch.tensor([1]), len(q), 10_000.0))[0]


# %% [markdown]
# **4.** The slowest pair is number head_dim / 2 - 1, so
# $2\pi\,\theta^{(\mathrm{head\_dim} - 2)/\mathrm{head\_dim}} = \mathrm{tokens}$. Solve for θ.


# %% tags=["exercise-4"]
def theta_for(tokens, head_dim):  # -> float
    return (tokens / (2 * math.pi)) ** (head_dim / (head_dim - 2))
