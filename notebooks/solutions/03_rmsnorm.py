# %% [markdown]
# # 3 · RMSNorm: solutions

# %% [markdown]
# **1.** Subtract the mean first. The variance is the mean square of what is left.


# %% tags=["exercise-1"]
def layer_norm_by_hand(x):  # (dim,) -> (dim,)
    return rms_norm(x - x.mean())


# %% [markdown]
# **2.** Column j of the matrix meets entry j of the vector, so it takes weight j.


# %% tags=["exercise-2"]
def fold(matrix, weight):  # (out, dim), (dim,) -> (out, dim)
    return matrix * weight


# %% [markdown]
# **3.** Take away the part of `grad_y` that points along `y`, whose mean square is 1; divide by the
# RMS, as the forward pass did.


# %% tags=["exercise-3"]
def rms_norm_backward(x, grad_y):  # (dim,), (dim,) -> (dim,)
    y = rms_norm(x)
    return (grad_y - y * (y * grad_y).mean()) / rms(x)
