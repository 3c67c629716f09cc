# %% [markdown]
# # 4 · SwiGLU: let one number decide how much of another passes
#
# **Question.** Attention carries information from token to token. What is then done with it,
# inside each token, and why do three matrices do it better than two?
#
# **You need** matrix times vector, what a gradient is · **It takes** 30 minutes ·
# **Module** `minillama/model/feed_forward.py`

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.8), "figure.dpi": 100})
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The problem
#
# A block of Llama has two sub-layers. The second one, the *feed-forward layer*, looks at one
# token at a time: a vector of `dim` numbers goes in, a vector of `dim` numbers comes out.
#
# Why not simply a matrix? And if one matrix is too little, why not two? Because two matrices in a
# row are one matrix: nothing was gained.

# %%
w1 = torch.randn(8, 2, generator=generator)  # 2 numbers -> 8 hidden units
w2 = torch.randn(2, 8, generator=generator)  # 8 hidden units -> 2 numbers
x = torch.randn(2, generator=generator)
torch.testing.assert_close(w2 @ (w1 @ x), (w2 @ w1) @ x)
print("two matrices:", w2 @ (w1 @ x), " one matrix:", (w2 @ w1) @ x)

# %% [markdown]
# What one matrix can't do is let one number depend on *another*: "if the subject is plural, then
# ...", "if this is a name, then ...". The smallest such task is a product. Let the input be two
# numbers `a` and `b` between -1 and 1, and let the answer be `a * b`.
#
# The best that a linear map can do here is to answer 0, whatever it is asked.

# %%
a, b = torch.meshgrid(torch.linspace(-1, 1, 41), torch.linspace(-1, 1, 41), indexing="ij")
points, products = torch.stack((a.flatten(), b.flatten()), dim=1), (a * b).flatten()
best = torch.linalg.lstsq(points, products).solution  # the weights with the least squared error
assert best.abs().max() < 1e-5
print(f"best linear map: {best[0].abs():.3f} * a + {best[1].abs():.3f} * b")

# %% [markdown]
# ## By hand: bend it, or gate it
#
# **Bend it.** The classic way out puts a *nonlinear* function between the two matrices. ReLU,
# `max(0, x)`, is the simplest. Four units that look in the four diagonal directions get at least
# the sign of the product right: `(|a + b| - |a - b|) / 2`. Their answer is made of flat pieces
# with creases in between. More units make more and smaller pieces.

# %%
relu_units = (a + b).relu() + (-a - b).relu() - (a - b).relu() - (b - a).relu()
four_relus = relu_units / 2
assert (four_relus.sign() == (a * b).sign())[a.abs() > 0.01].float().mean() > 0.97
print(f"largest error of four ReLU units: {(four_relus - a * b).abs().max():.3f}")

# %% [markdown]
# **Gate it.** The other way out is to multiply. A *gated* unit computes two numbers from the same
# input: a **gate**, bent by an activation, and a **value**, left as it is. Its output is the
# product of the two.
#
# Llama's activation is SiLU, `x * sigmoid(x)`, also called Swish. It has a charming property:
# `silu(x) - silu(-x)` is exactly `x`. So two gated units, with the gates `a` and `-a` and the
# values `b` and `-b`, add up to the product itself, without any error.

# %%
a_number = torch.tensor(1.0)
print(f"silu(1) = {silu(a_number):.3f}   silu(-1) = {silu(-a_number):.3f}")
two_gates = silu(a) * b + silu(-a) * -b
torch.testing.assert_close(two_gates, a * b)
print(f"largest error of two gated units: {(two_gates - a * b).abs().max():.3f}")

# %%
fig, axes = plt.subplots(1, 4, figsize=(6, 1.9), layout="constrained")
maps = {
    "a · b": a * b,
    "best linear map": torch.zeros_like(a),
    "4 ReLU units": four_relus,
    "2 gated units": two_gates,
}
for ax, (title, surface) in zip(axes, maps.items(), strict=True):
    ax.contourf(a, b, surface, levels=torch.linspace(-1.05, 1.05, 22), cmap="RdBu")
    ax.set(title=title, aspect="equal", xticks=[], yticks=[], xlabel="a", ylabel="b")
    ax.title.set_fontsize(9)
plt.show()

# %% [markdown]
# Blue is positive, red is negative. The third panel has corners where the first has curves; the
# fourth is the first.
#
# ## The activation
#
# Why bend the gate at all, if the product does the work? Because the product of two linear maps
# can't tell `x` from `-x`: both signs flip, and the output stays. It is also never *off*. With
# SiLU, a large negative gate closes the unit, and a large positive one lets the value pass,
# multiplied by the gate.

# %%
x = torch.randn(2, generator=generator)
w3 = torch.randn(8, 2, generator=generator)
torch.testing.assert_close((w1 @ -x) * (w3 @ -x), (w1 @ x) * (w3 @ x))  # no bend: x and -x the same
assert silu(torch.tensor(-20.0)).abs() < 1e-6  # closed
torch.testing.assert_close(silu(torch.tensor(20.0)), torch.tensor(20.0))  # wide open
grid = torch.linspace(-6, 6, 1201)
lowest = silu(grid).argmin()
print(f"SiLU's lowest point is {silu(grid)[lowest]:.3f}, at x = {grid[lowest]:.2f}")

# %% [markdown]
# Two differences to ReLU are small to the eye and matter to the gradient: SiLU has no corner, and
# its slope is zero at its lowest point only, not for all negative inputs. A ReLU unit whose input
# is negative on every example gets no gradient any more and stays as it is; a SiLU unit can come
# back.

# %%
inputs = grid.clone().requires_grad_()
(slope,) = torch.autograd.grad(silu(inputs).sum(), inputs)
fig, (left, right) = plt.subplots(1, 2, layout="constrained")
left.plot(grid, grid.relu(), label="ReLU")
left.plot(grid, silu(grid), label="SiLU")
right.plot(grid, (grid > 0).float(), label="ReLU")
right.plot(grid, slope, label="SiLU")
left.set(title="activation", xlabel="x")
right.set(title="its slope", xlabel="x")
left.legend()
plt.show()
assert (slope[grid < 0].abs() > 1e-3).float().mean() > 0.99

# %% [markdown]
# Here is the whole unit as a surface: the gate from left to right, the value from bottom to top.
# On the left half the unit is nearly closed, whatever the value is. On the right half the value
# passes, larger the further the gate is open. A ReLU unit, beside it, has no second input at all.

# %%
gate, value = torch.meshgrid(torch.linspace(-4, 4, 81), torch.linspace(-4, 4, 81), indexing="xy")
fig, axes = plt.subplots(1, 2, layout="constrained", sharey=True)
surfaces = {
    "ReLU unit: relu(gate)": gate.relu(),
    "gated unit: silu(gate) · value": silu(gate) * value,
}
for ax, (title, surface) in zip(axes, surfaces.items(), strict=True):
    filled = ax.contourf(gate, value, surface, levels=torch.linspace(-16, 16, 33), cmap="RdBu")
    ax.set(title=title, xlabel="gate", ylabel="value")
    ax.title.set_fontsize(10)
fig.colorbar(filled, ax=axes, ticks=[-16, 0, 16])
plt.show()
closed, opened = (silu(gate) * value)[gate <= -3].abs().max(), (silu(gate) * value).abs().max()
assert closed < opened / 20

# %% [markdown]
# ## The layer
#
# Now all units together. Meta calls the three matrices `w1` (gates), `w3` (values, often called
# *up*) and `w2` (back to `dim`, often called *down*). As a loop over the hidden units, for one
# token:


# %%
def feed_forward(x, w1, w2, w3):  # (dim,) -> (dim,)
    y = torch.zeros_like(x)
    for unit in range(len(w1)):
        gate, value = w1[unit] @ x, w3[unit] @ x
        y += w2[:, unit] * silu(gate) * value  # each unit adds its own column of w2
    return y


# %% [markdown]
# The package says it with matrices, for all tokens at once: `w2(silu(w1(x)) * w3(x))`. The loop
# and the module give the same numbers.

# %%
from minillama.config import LlamaConfig
from minillama.model import FeedForward

sizes = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 10, "max_seq_len": 8}
layer = FeedForward(LlamaConfig(dim=12, hidden_dim=32, **sizes))
tokens = torch.randn(5, 12, generator=generator)  # 5 tokens
with torch.no_grad():
    by_hand = [feed_forward(x, layer.w1.weight, layer.w2.weight, layer.w3.weight) for x in tokens]
    torch.testing.assert_close(layer(tokens), torch.stack(by_hand))
print("the same for all 5 tokens: True")

# %% [markdown]
# And the product of two numbers, this time by the package's own layer with two hidden units:

# %%
multiply = FeedForward(
    LlamaConfig(dim=2, hidden_dim=2, **(sizes | {"n_heads": 1, "n_kv_heads": 1}))
)
with torch.no_grad():
    multiply.w1.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # gates: a, -a
    multiply.w3.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))  # values: b, -b
    multiply.w2.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # their sum; a zero
    answer = multiply(torch.tensor([6.0, 7.0]))
torch.testing.assert_close(answer, torch.tensor([42.0, 0.0]))
print("6 x 7 =", answer[0])

# %% [markdown]
# ## How wide? The 2/3 rule
#
# Three matrices cost more than two of the same width. The classic layer is `4 * dim` wide, so it
# has `2 * dim * 4 dim = 8 dim²` weights. Three matrices have as many if each is two thirds as
# wide: `3 * dim * (8/3 dim) = 8 dim²`. A comparison between the two is only fair at this width.
#
# Hardware likes round numbers, so Meta rounds the width *up* to a multiple of 256. For 7B:

# %%
dim = 4096
two_thirds = int(2 * (4 * dim) / 3)
rounded = -(-two_thirds // 256) * 256  # the next multiple of 256
print(f"4 dim = {4 * dim}, two thirds of it = {two_thirds}, rounded up = {rounded}")
classic, gated = 2 * dim * 4 * dim, 3 * dim * rounded
assert rounded == 11008
assert 1 <= gated / classic < 1.01
print(f"weights: {classic:,} in two matrices, {gated:,} in three: {gated / classic - 1:.1%} more")

# %%
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
for row, (width, names) in enumerate(((4 * dim, ["w1", "w2"]), (rounded, ["w1", "w2", "w3"]))):
    for column, name in enumerate(names):
        left = column * (width + 800)
        ax.add_patch(plt.Rectangle((left, -row * 6500), width, dim, color=f"C{column}", alpha=0.6))
        ax.text(
            left + width / 2,
            dim / 2 - row * 6500,
            f"{name}: {dim} × {width}",
            ha="center",
            va="center",
        )
ax.set(
    xlim=(0, 36000), ylim=(-6700, 4300), title="Two wide matrices or three narrow ones (to scale)"
)
ax.axis("off")
plt.show()
assert abs(2 * (4 * dim) - 3 * rounded) < 300  # the rows are equally long

# %% [markdown]
# One function of the package holds the rule. The 70B of Llama 2 and of Code Llama differ: their
# width is multiplied by 1.3 first and rounded to a multiple of 4096. (Grouped-query attention,
# the topic of notebook 5, saves weights in attention; the feed-forward layer got them.) These are
# the published widths of all sizes:

# %%
from minillama.config import PRESETS, swiglu_hidden_dim

widths = {"7b": 11008, "13b": 13824, "33b": 17920, "34b": 22016, "65b": 22016, "70b": 28672}
for name, config in PRESETS.items():
    size = name.split("-")[-1]
    if size in widths:
        rule = {"multiple_of": 4096, "multiplier": 1.3} if size == "70b" else {}
        assert swiglu_hidden_dim(config.dim, **rule) == config.hidden_dim == widths[size]
        print(f"{name:14} dim {config.dim}   hidden_dim {config.hidden_dim}")

# %% [markdown]
# This is where most of a Llama is: of the weights in a layer of 7B, two thirds are in the
# feed-forward layer and one third is in attention.

# %%
config = LlamaConfig.preset("llama2-7b")
in_feed_forward, in_attention = 3 * config.dim * config.hidden_dim, 4 * config.dim**2
share = in_feed_forward / (in_feed_forward + in_attention)
assert (in_feed_forward, in_attention) == (135_266_304, 67_108_864)
print(f"feed-forward {in_feed_forward:,}, attention {in_attention:,}: {share:.1%}")

# %% [markdown]
# ## Is it worth it? An experiment
#
# Two things changed at once between the classic layer and Llama's: another activation, *and* a
# gate. So we train three models that differ in nothing but the feed-forward layer, all with the
# same number of weights:
#
# - **ReLU**: two matrices, 192 hidden units,
# - **SiLU**: two matrices, 192 hidden units, the other activation,
# - **SwiGLU**: three matrices, 128 hidden units, activation and gate.
#
# The model is a Llama of two layers that reads stories of the toy world, letter by letter, and
# predicts each next letter.

# %%
text = Path("../data/tales/train.txt").read_text(encoding="utf-8")[:200_000]
letters = sorted(set(text))
ids = torch.tensor([letters.index(letter) for letter in text])
print(f"{len(letters)} different letters. The first story begins:\n{text[:84]}")

# %%
from minillama.model import Llama

config = LlamaConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=128,
    vocab_size=len(letters), max_seq_len=64,
)  # fmt: skip


class TwoMatrices(nn.Module):
    def __init__(self, activation, generator, dim=48, hidden_dim=192):
        super().__init__()
        self.activation = activation
        self.w1, self.w2 = (
            nn.Linear(dim, hidden_dim, bias=False),
            nn.Linear(hidden_dim, dim, bias=False),
        )
        nn.init.normal_(self.w1.weight, std=0.02, generator=generator)  # as Llama's own weights
        nn.init.normal_(
            self.w2.weight, std=0.02 / (2 * config.n_layers) ** 0.5, generator=generator
        )

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)))


# %%
def build(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config, generator)
    if kind != "SwiGLU":
        for layer in model.layers:
            layer.feed_forward = TwoMatrices({"ReLU": torch.relu, "SiLU": silu}[kind], generator)
    return model


counts = {
    kind: sum(p.numel() for p in build(kind, 0).parameters()) for kind in ("ReLU", "SiLU", "SwiGLU")
}
assert len(set(counts.values())) == 1
print(counts)


# %% [markdown]
# Each kind is trained three times, from three seeds. Within a seed, all kinds read the same
# letters in the same order.


# %%
def train(model, seed, learning_rate=4e-3, steps=240, batch_size=16, seq_len=64):
    generator, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    for _ in range(steps):
        starts = torch.randint(len(ids) - seq_len, (batch_size, 1), generator=generator)
        rows = ids[starts + torch.arange(seq_len + 1)]
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


models = {(kind, seed): build(kind, seed) for kind in counts for seed in range(3)}
losses = {(kind, seed): train(model, seed) for (kind, seed), model in models.items()}

# %%
fig, ax = plt.subplots(layout="constrained")
for index, kind in enumerate(counts):
    for seed in range(3):
        smooth = losses[kind, seed].unfold(0, 10, 1).mean(-1)  # the mean of ten steps
        ax.plot(smooth, f"C{index}", label=kind if seed == 0 else None, alpha=0.8)
ax.set(xlabel="step", ylabel="loss (nats per letter)", ylim=(0.8, 3.3))
ax.legend()
plt.show()

# %%
final = {
    kind: torch.stack([losses[kind, seed][-20:].mean() for seed in range(3)]) for kind in counts
}
for kind, values in final.items():
    print(f"{kind:7} {values.mean():.1f} nats per letter at the end, mean of 3 seeds")
assert (final["SwiGLU"] < final["ReLU"]).all()
assert (final["ReLU"] < final["SiLU"]).all()

# %% [markdown]
# SwiGLU ends below ReLU in each of the three pairs, with exactly as many weights. And the
# activation alone isn't the reason: SiLU *without* the gate is worse than ReLU here. It is the
# gate that helps.
#
# Before believing an experiment, try to break it. All models had the same learning rate; what if
# it is 2.5 times as high?

# %%
fast = [train(build("SwiGLU", seed), seed, learning_rate=1e-2)[-20:].mean() for seed in range(2)]
rate_costs = torch.stack(fast).mean() - final["SwiGLU"].mean()
relu_costs = final["ReLU"].mean() - final["SwiGLU"].mean()
assert rate_costs > 1.5 * relu_costs
print("a bad learning rate costs more than ReLU in place of SwiGLU:", bool(rate_costs > relu_costs))

# %% [markdown]
# So the learning rate matters more than the kind of layer. At half the rate and at 1.5 times the
# rate, SwiGLU leads as it does above; at 2.5 times the rate, chance decides. The verdict: at a
# rate that suits it, the gated layer learns *a little faster* here, with the same number of
# weights. This is a small model and a short run; it doesn't say how wide the gap is elsewhere, or
# that it stays.
#
# The source of the layer (Shazeer 2020) found the same on a larger model: at equal parameters,
# the gated variants end a little lower. It offers no theory for it, and says so.
#
# ## What breaks: the gate and the value swapped
#
# `w1` and `w3` have the same shape. A converter that swaps them gets no error: every weight fits.
# The function is another one, though, since only the gate goes through SiLU.

# %%
model = models["SwiGLU", 0]
rows = ids[: 64 * 65].view(64, 65)


@torch.no_grad()
def mean_loss(model):
    return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


before = mean_loss(model)
for layer in model.layers:
    layer.feed_forward.w1, layer.feed_forward.w3 = layer.feed_forward.w3, layer.feed_forward.w1
after = mean_loss(model)
print(f"loss {before:.1f} as trained; with w1 and w3 swapped {after - before:.1f} more")
assert after > before + 0.1

# %% [markdown]
# ## Exercises
#
# **1. Squares.** Find weights for a SwiGLU layer with four hidden units that turns `(a, b)` into
# `(a², b²)`. Remember what `silu(x) - silu(-x)` is.


# %% tags=["exercise-1"]
def square_weights():
    """Give back w1 (4, 2), w2 (2, 4) and w3 (4, 2)."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
squares = FeedForward(LlamaConfig(dim=2, hidden_dim=4, **(sizes | {"n_heads": 1, "n_kv_heads": 1})))
with torch.no_grad():
    for linear, weight in zip((squares.w1, squares.w2, squares.w3), square_weights(), strict=True):
        assert linear.weight.shape == weight.shape
        linear.weight.copy_(weight)
    torch.testing.assert_close(squares(torch.tensor([3.0, -5.0])), torch.tensor([9.0, 25.0]))
    torch.testing.assert_close(squares(points), points**2)
print("exercise 1: correct")

# %% [markdown]
# **2. The backward pass of a gated unit.** A unit computes `silu(gate) * value`. Write its two
# derivatives by hand, without autograd. (`d sigmoid(x) / dx = sigmoid(x) * (1 - sigmoid(x))`.)


# %% tags=["exercise-2"]
def gate_backward(gate, value, grad):
    """`grad` is the derivative of the loss by the unit's output; give those by gate and value."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
gate, value, grad = torch.randn(
    3, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
gate.requires_grad_(), value.requires_grad_()
expected = torch.autograd.grad(silu(gate) * value, (gate, value), grad)
found = gate_backward(gate.detach(), value.detach(), grad)
torch.testing.assert_close(tuple(found), expected)
print("exercise 2: correct")

# %% [markdown]
# **3. One layer, two machines.** The hidden units don't talk to each other: each adds its own
# column of `w2`. So two machines can share a layer, half of the units each, if their outputs are
# added at the end. Cut the three matrices accordingly. (This is how layers too large for one GPU
# are computed.)


# %% tags=["exercise-3"]
def halves(w1, w2, w3):
    """Give back two triples (w1, w2, w3), each with half of the hidden units."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
generator = torch.Generator().manual_seed(3)
whole = [torch.randn(shape, generator=generator) for shape in ((32, 12), (12, 32), (32, 12))]
x = torch.randn(12, generator=generator)
first, second = halves(*whole)
for half in (first, second):
    assert [tuple(w.shape) for w in half] == [(16, 12), (12, 16), (16, 12)]
torch.testing.assert_close(
    feed_forward(x, *first) + feed_forward(x, *second), feed_forward(x, *whole)
)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/model/feed_forward.py`: the layer, four lines of arithmetic.
# - `minillama/config.py`: `swiglu_hidden_dim` and the widths of all sizes.
# - Shazeer 2020, *GLU Variants Improve Transformer*, eq. 6
#   ([arXiv:2002.05202](https://arxiv.org/abs/2002.05202)): the layer and its variants.
# - Touvron et al. 2023, *LLaMA*, sec. 2.2 ([arXiv:2302.13971](https://arxiv.org/abs/2302.13971)):
#   why Llama has it, and the 2/3.
#
# Next: notebook 5, where the tokens talk to each other.
