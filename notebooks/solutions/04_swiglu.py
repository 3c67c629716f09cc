# %% [markdown]
# # 4 · SwiGLU: solutions
#
# `x * x = x * silu(x) - x * silu(-x)`: each square takes two units, with the gates x and -x and
# the same numbers as values.


# %% tags=["exercise-1"]
def square_weights():
    both = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    w2 = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    return both, w2, both


# %% [markdown]
# silu(x) = x s with s = sigmoid(x), so its slope is s + x s (1 - s), by the product rule.


# %% tags=["exercise-2"]
def gate_backward(gate, value, grad):
    s = gate.sigmoid()
    slope = s + gate * s * (1 - s)
    return grad * value * slope, grad * gate * s


# %% [markdown]
# A hidden unit is a *row* of w1 and w3 and a *column* of w2.


# %% tags=["exercise-3"]
def halves(w1, w2, w3):
    return tuple(zip(w1.chunk(2, dim=0), w2.chunk(2, dim=1), w3.chunk(2, dim=0), strict=True))
