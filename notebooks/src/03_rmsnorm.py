# %% [markdown]
# # 3 · RMSNorm: keep the numbers in range
#
# **Question.** A Llama is a tall stack of layers, and each one adds to the same vector. What keeps
# that vector from growing without bound, and its gradient with it?
#
# **You need** means, square roots, matrix times vector, what a gradient is · **It takes** 30
# minutes · **Module** `minillama/model/norm.py`

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# How large is a vector? Its *root mean square* (RMS) is the size of a typical entry. A vector of
# random numbers of variance 1 has RMS 1, whatever its length.


# %%
def rms(x):  # (dim,) -> ()
    return x.pow(2).mean().sqrt()


rms(torch.tensor([3.0, 4.0]))  # sqrt((9 + 16) / 2) = sqrt(12.5)

# %% [markdown]
# Now 32 layers, each as plain as possible: a random matrix, and the result is added to the stream.
# Every matrix has entries of variance 1 / `dim`, so what it returns is as large as what it reads.
# That sounds safe. (For now, `normalise` does nothing.)


# %%
def stream_sizes(normalise, gain=1.0, dim=256, n_layers=32):  # RMS before and after each layer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(dim, generator=generator)
    sizes = [rms(x).item()]
    for _ in range(n_layers):
        weight = gain * torch.randn(dim, dim, generator=generator) / dim**0.5
        x = x + weight @ normalise(x)
        sizes.append(rms(x).item())
    return sizes


without = stream_sizes(normalise=lambda x: x)
for layer in (0, 2, 8, 32):
    print(f"after layer {layer:2d}: RMS {without[layer]:9,.0f}")
assert without[32] > 2**15 * without[0]

# %% [markdown]
# Each layer adds something as large as the stream itself, in an unrelated direction. By Pythagoras
# the sum is $\sqrt 2$ times as large: doubled every other layer, $2^{16}$-fold after 32. Smaller
# weights only slow it down, and training moves weights.
#
# ## By hand
#
# The remedy is to let each layer read a copy of the stream that has been brought to RMS 1:
#
# $$y = \frac{x}{\mathrm{RMS}(x)}$$


# %%
def rms_norm(x):  # (dim,) -> (dim,)
    return x / rms(x)


y = rms_norm(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # RMS is sqrt(30 / 4)
torch.testing.assert_close(y, torch.tensor([1.0, 2.0, 3.0, 4.0]) / 7.5**0.5)
y

# %% [markdown]
# ## The same as the package's?
#
# The module normalises each vector of a whole batch, and multiplies by a learned weight, one number
# per channel, which starts at 1. Its `eps` comes later.

# %%
from minillama.model import RMSNorm

generator = torch.Generator().manual_seed(1)
x = torch.randn(5, 8, generator=generator)  # five vectors
weight = torch.rand(8, generator=generator)

norm = RMSNorm(8, eps=0.0)
norm.load_state_dict({"weight": weight})
by_hand = torch.stack([rms_norm(vector) * weight for vector in x])
torch.testing.assert_close(norm(x), by_hand)

# %% [markdown]
# ## Seen: with and without
#
# With the norm, every layer adds a vector of the same size, however large the stream has become. So
# the *square* of the RMS grows by the same amount at each layer: $\sqrt{1 + 32}$ after 32 layers
# instead of $\sqrt{2}^{\,32}$.

# %%
with_norm = stream_sizes(rms_norm)
print(f"after layer 32: RMS {with_norm[32]:.1f}, and sqrt(33) is {33**0.5:.1f}")
assert abs(with_norm[32] / 33**0.5 - 1) < 0.1

# %%
fig, ax = plt.subplots()
for gain, style in [(2.0, "--"), (1.0, "-"), (0.5, ":")]:
    ax.semilogy(stream_sizes(lambda x: x, gain), "C0" + style, label=f"without, gain {gain}")
for gain, style in [(2.0, "--"), (1.0, "-"), (0.5, ":")]:
    ax.semilogy(stream_sizes(rms_norm, gain), "C1" + style, label=f"RMSNorm, gain {gain}")
ax.set(xlabel="layer", ylabel="RMS of the stream")
ax.legend(ncols=2)
plt.show()

# %% [markdown]
# *Gain is a factor on all weights. Without a norm, a factor of 4 decides between a number and an
# explosion. With it, the weights may be what training wants them to be.*
#
# ## What it forgets, and what LayerNorm forgets
#
# RMSNorm forgets the length of a vector and keeps its direction. LayerNorm, its predecessor, first
# subtracts the mean of the entries, so it forgets a common offset, too.

# %%
x = torch.randn(64, generator=torch.Generator().manual_seed(2))
for name, function in [("RMSNorm", rms_norm), ("LayerNorm", lambda x: F.layer_norm(x, (64,)))]:
    stretched = (function(1000 * x) - function(x)).abs().max()
    shifted = (function(x + 7) - function(x)).abs().max()
    print(f"{name:9s}: 1000 * x moves it by {stretched:.1f}, x + 7 by {shifted:.1f}")
    assert stretched < 1e-3
    assert (shifted < 1e-3) == (name == "LayerNorm")

# %% [markdown]
# Two channels make a picture. RMSNorm puts all vectors on a circle. LayerNorm also flattens the
# direction (1, 1), and of a plane nothing is left but two points.

# %%
points = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
panels = {
    "vectors of two channels": points,
    "RMSNorm": torch.stack([rms_norm(point) for point in points]),
    "LayerNorm": F.layer_norm(points, (2,), eps=1e-12),
}
fig, axes = plt.subplots(1, 3, figsize=(6, 2.1))
for ax, (name, panel) in zip(axes, panels.items(), strict=True):
    ax.scatter(*panel.T, s=6, c=points.atan2(points.flip(-1))[:, 1], cmap="twilight")
    ax.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
plt.show()

# %% [markdown]
# In Llama 2 7B a vector has 4096 channels, and LayerNorm would flatten 1 of 4096 directions. The
# two norms then hardly differ:

# %%
x = torch.randn(4096, generator=torch.Generator().manual_seed(4))
difference = rms(rms_norm(x) - F.layer_norm(x, (4096,)))
print(f"RMS of the difference: {difference:.3f}")
assert difference < 0.05

# %% [markdown]
# The authors of RMSNorm (Zhang & Sennrich 2019) found that models train as well without the
# subtraction. What helps is the rescaling. So Llama leaves out the mean and the bias.
#
# ## Before the layer, not after
#
# The first Transformer normalised the *sum*: $x \leftarrow \mathrm{norm}(x + f(x))$, post-norm.
# Llama normalises what the layer *reads*: $x \leftarrow x + f(\mathrm{norm}(x))$, pre-norm. Both
# keep the numbers in range. The difference shows on the way back.
#
# Post-norm puts a norm into the stream itself, and the gradient must pass every one of them: each
# layer multiplies it by some factor, and 32 factors compound. Pre-norm leaves the stream alone. The
# way back is a plain sum, and each layer only adds to the gradient.
#
# Below, stacks of 32 feed-forward layers, of the kind that Llama has (SwiGLU, notebook 4) and of
# the kind that the first Transformer had (ReLU). The loss pulls the output towards random targets.


# %%
def feed_forward(x, w1, w2, w3, kind):
    if kind == "ReLU":
        return F.relu(x @ w1.T) @ w2.T * 1.4  # the factors keep the output as large as the input
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T * 1.7


# %%
def gradient_sizes(place, kind, dim=64, n_layers=32):  # norm of the gradient of each layer's w2
    generator = torch.Generator().manual_seed(0)
    norm, shapes = RMSNorm(dim, eps=1e-5), [(2 * dim, dim), (dim, 2 * dim), (2 * dim, dim)]
    layers = [
        [(torch.randn(s, generator=generator) / s[1] ** 0.5).requires_grad_() for s in shapes]
        for _ in range(n_layers)
    ]
    x, target = torch.randn(2, 64, dim, generator=generator)  # 64 vectors each
    for weights in layers:
        if place == "pre-norm":
            x = x + feed_forward(norm(x), *weights, kind)
        else:
            x = norm(x + feed_forward(x, *weights, kind))
    (norm(x) - target).pow(2).mean().backward()
    return [w2.grad.norm().item() for _, w2, _ in layers]


# %%
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, kind in zip(axes, ("ReLU", "SwiGLU"), strict=True):
    for place in ("post-norm", "pre-norm"):
        sizes = gradient_sizes(place, kind)
        ax.semilogy(range(1, 33), sizes, label=place)
        print(f"{kind:6s} {place:9s}: gradient of layer 1 / layer 32 = {sizes[0] / sizes[-1]:.1f}")
    ax.set(title=f"{kind} layers", xlabel="layer")
axes[0].set_ylabel("size of the gradient")
axes[0].legend()
plt.show()

# %% [markdown]
# Read the curves from right to left, the way the gradient travels. With ReLU layers, post-norm is
# in balance: the factor happens to be near 1. With SwiGLU layers it sounds harmless, too:

# %%
post, pre = (gradient_sizes(place, "SwiGLU") for place in ("post-norm", "pre-norm"))
factor = (post[0] / post[-1]) ** (1 / 31)
print(f"{factor:.2f} to the power of 31 is {post[0] / post[-1]:.0f}")
assert post[0] / post[-1] > 300 > 30 > pre[0] / pre[-1]

# %% [markdown]
# No one learning rate suits the first layer and the last one then. With pre-norm the gradient grows
# slowly, and most of it in the first few layers, where the stream is still small.
#
# So each block of a Llama has two norms, one before attention and one before the feed-forward
# layer, and one last norm stands before the output. They cost next to nothing:

# %%
from minillama import LlamaConfig

config = LlamaConfig.preset("llama2-7b")
n_norms = 2 * config.n_layers + 1
share = n_norms * config.dim / config.n_parameters
print(f"{n_norms} norms with {n_norms * config.dim:,} weights: {share:.3%} of all parameters")

# %% [markdown]
# ## What breaks: no eps, or eps in the wrong place
#
# The formula of the module is
#
# $$y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot \mathrm{weight}$$
#
# Without ε a vector of zeros is divided by zero. And *where* it stands is not a matter of taste:
# added to the root instead, it saves the value but not the gradient, for the slope of the root at
# zero is infinite.


# %%
def eps_outside(x, eps=1e-5):
    return x / (rms(x) + eps)


print("without eps:", rms_norm(torch.zeros(3)))
for name, function in [("inside the root", RMSNorm(3, eps=1e-5)), ("outside", eps_outside)]:
    zeros = torch.zeros(3, requires_grad=True)
    y = function(zeros)
    y.sum().backward()
    print(f"{name}: value {y.tolist()}, gradient {zeros.grad}")
assert zeros.grad.isnan().all()

# %% [markdown]
# Also, the two do not agree on small vectors. Inside the root, ε is compared with the mean
# *square*: vectors smaller than $\sqrt{10^{-5}} \approx 0.003$ count as noise and stay small.
# Outside, the border is $10^{-5}$ itself.

# %%
sizes = torch.logspace(-6, 1, 100)
direction = rms_norm(torch.randn(64, generator=torch.Generator().manual_seed(5)))
inside = [rms(RMSNorm(64, eps=1e-5)(size * direction)).item() for size in sizes]
outside = [rms(eps_outside(size * direction)).item() for size in sizes]

fig, ax = plt.subplots()
ax.loglog(sizes, outside, label="ε outside the root")
ax.loglog(sizes, inside, label="ε inside the root (Llama)")
ax.axvline(1e-5**0.5, color="gray", lw=0.8, ls="--")
ax.set(xlabel="RMS before", ylabel="RMS after")
ax.legend()
plt.show()

# %% [markdown]
# The value counts as well. LLaMA was trained with $\epsilon = 10^{-6}$, Llama 2 with $10^{-5}$. On
# a vector of RMS 0.02, such as a freshly drawn embedding, that is a difference of one percent:

# %%
x = 0.02 * direction
ratio = rms(RMSNorm(64, eps=1e-5)(x)) / rms(RMSNorm(64, eps=1e-6)(x))
print(f"{ratio:.3f}")
assert 0.98 < ratio < 0.995

# %% [markdown]
# ## What breaks: half precision
#
# Large models hold their numbers in 16 bits. float16 ends at 65,504, and squares get there quickly:
# 300 squared is 90,000.

# %%
x = torch.tensor([300.0, 400.0], dtype=torch.float16)
print("in float16:", rms_norm(x))
print("RMSNorm:   ", RMSNorm(2, eps=1e-5).half()(x).detach())
assert rms_norm(x).count_nonzero() == 0

# %% [markdown]
# The mean square was infinite, and everything divided by it is 0. No error, no warning: a layer
# that has gone blind.
#
# bfloat16 has the range of float32, but only 8 significant bits. Count to 4096 in it, one by one:

# %%
count = torch.tensor(0.0, dtype=torch.bfloat16)
for _ in range(4096):
    count += 1
print(count.item())
assert count == 256

# %% [markdown]
# There is no 257, so 256 + 1 is rounded back to 256. A mean of 4096 squares, added up like this,
# would be 16 times too small. PyTorch's `mean` is more careful and adds in float32. But the
# squares, their mean and its root are still rounded, and the last two roundings hit a whole vector
# at once. Below, the RMS *after* the norm, for 500 vectors of different size. It should be 1.

# %%
generator = torch.Generator().manual_seed(6)
x = torch.randn(500, 4096, generator=generator) * (1 + torch.rand(500, 1, generator=generator))
x = x.bfloat16()
naive = torch.stack([rms_norm(vector) for vector in x])
ours = RMSNorm(4096, eps=0.0).bfloat16()(x).detach()

after = {name: y.float().pow(2).mean(-1).sqrt() for name, y in [("naive", naive), ("ours", ours)]}
for name, sizes in after.items():
    print(f"{name:5s}: off by up to {(sizes - 1).abs().max():.2%}")
assert (after["ours"] - 1).abs().max() < 0.002 < (after["naive"] - 1).abs().max()

# %%
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.hist(after["naive"].tolist(), bins=60, range=(0.994, 1.006), label="all in bfloat16")
ax.hist(after["ours"].tolist(), bins=60, range=(0.994, 1.006), label="RMSNorm: float32 inside")
ax.set(xlabel="RMS after the norm", ylabel="vectors")
ax.legend()
plt.show()

# %% [markdown]
# ## Which comes first, the cast or the weight?
#
# `RMSNorm` returns to 16 bits *before* it multiplies by the weight. Multiplying first and rounding
# once would be slightly more exact. But it would be another function than Meta's:

# %%
generator = torch.Generator().manual_seed(7)
x = torch.randn(4096, generator=generator).bfloat16()
norm = RMSNorm(4096, eps=1e-5)
norm.load_state_dict({"weight": torch.rand(4096, generator=generator)})
norm.bfloat16()

cast_first = norm(x)
cast_last = (x.float() * torch.rsqrt(x.float().pow(2).mean() + 1e-5) * norm.weight).bfloat16()
different = (cast_first != cast_last).float().mean()
print(f"{different:.0%} of the numbers differ in the last bit")
assert 0.1 < different < 0.6
torch.testing.assert_close(cast_first, cast_last, rtol=2**-7, atol=0)

# %% [markdown]
# A last bit does no harm. But where two programs should give the same numbers and do not, nobody
# can tell a harmless difference from a mistake. So the package does what Meta's code does.
#
# ## Exercises
#
# Replace the line that raises, run the cell, then run the check below it. Solutions are in
# `solutions/03_rmsnorm.py`.
#
# **1. LayerNorm from RMSNorm.** Write LayerNorm (without its weight and bias) with the help of
# `rms_norm`.


# %% tags=["exercise-1"]
def layer_norm_by_hand(x):  # (dim,) -> (dim,)
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
x = 5 + torch.randn(64, generator=torch.Generator().manual_seed(8))
torch.testing.assert_close(layer_norm_by_hand(x), F.layer_norm(x, (64,)), rtol=0, atol=1e-4)
print("exercise 1: correct")

# %% [markdown]
# **2. Fold the weight away.** The layer after a norm multiplies by a matrix. Give the matrix that
# does the norm's weight's work as well, so that the norm can do without: `matrix @ (weight * x)` is
# to equal `fold(matrix, weight) @ x`. (A common first step before a model is quantised, or before
# its matrices are studied.)


# %% tags=["exercise-2"]
def fold(matrix, weight):  # (out, dim), (dim,) -> (out, dim)
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
generator = torch.Generator().manual_seed(9)
matrix, weight, x = (torch.randn(s, generator=generator) for s in [(6, 8), (8,), (8,)])
torch.testing.assert_close(fold(matrix, weight) @ rms_norm(x), matrix @ (weight * rms_norm(x)))
print("exercise 2: correct")

# %% [markdown]
# **3. The way back, by hand.** Given `x` and the gradient `grad_y` of the loss with respect to
# $y = x / \mathrm{RMS}(x)$, find the gradient with respect to `x`. (Stretching `x` does not change
# `y`. So the answer must be at right angles to `x`, or to `y`, which points the same way.)


# %% tags=["exercise-3"]
def rms_norm_backward(x, grad_y):  # (dim,), (dim,) -> (dim,)
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
generator = torch.Generator().manual_seed(10)
x, grad_y = torch.randn(2, 16, generator=generator)
x.requires_grad_()
rms_norm(x).backward(grad_y)
torch.testing.assert_close(rms_norm_backward(x.detach(), grad_y), x.grad)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `rms_norm` | `RMSNorm` in `minillama/model/norm.py` | any batch, a weight, ε, 16 bits |
# | pre-norm | `Block` in `minillama/model/llama.py` | attention and SwiGLU as the layers |
#
# Zhang & Sennrich 2019, *Root Mean Square Layer Normalization* (arXiv:1910.07467). Touvron et al.
# 2023a (arXiv:2302.13971), sec. 2.2: normalise the input of each sub-layer, with RMSNorm. On
# pre-norm and post-norm: Xiong et al. 2020 (arXiv:2002.04745).
#
# Next: the layer in between, `04_swiglu`.
