# %% [markdown]
# # 17 · Quantization: how few bits are enough?
#
# **Question.** A trained weight is stored in 16 bits. Does it need them all? What happens to the
# model if it gets 8, or 4, or 2?
#
# **You need** what a linear layer is, and notebook 16 for where the weights come from ·
# **It takes** 60 minutes · **Module** `minillama/adapt/quantize.py`
#
# Where real weights are shown, they are those of SmolLM2-135M-Instruct (`minillama fetch
# smollm2-135m-instruct`, 98 MB). Without them, the toy of notebook 0 takes their place. The outputs
# that you see there are SmolLM2's.

# %%
import math
import time
from copy import deepcopy
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy, linear
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_grad_enabled(False)  # but for one cell
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.4), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# To write one token, a model multiplies by every matrix it has. All weights travel from the memory
# to the processor, are used once, and are forgotten. A laptop's memory delivers perhaps 30 billion
# bytes each second. So the bytes decide twice: whether the model fits, and how fast it writes.

# %%
from minillama import LlamaConfig, load
from minillama.plan import GIB, weight_bytes

seven = LlamaConfig.preset("llama2-7b")
print("Llama 2 7B       GiB   tokens per second, at most")
for kind in (None, "int8", "int4", "nf4"):
    n_bytes = weight_bytes(seven, "bfloat16", kind)
    print(f"{kind or 'bfloat16':10} {n_bytes / GIB:9.1f} {30e9 / n_bytes:12.1f}")
assert weight_bytes(seven, "bfloat16") > 3 * weight_bytes(seven, "bfloat16", "int4")

# %% [markdown]
# In 16 bits it fits into few laptops. In 4 bits it fits into most, and writes three times as fast.
# If it still has anything to say, that is.
#
# ## Eight bits, by hand
#
# A byte has 256 values. Take a row of a matrix, find its largest absolute value (*absmax*), and let
# the whole numbers from -127 to 127 reach exactly that far. What is stored is those numbers, the
# *codes*, and one *scale* for the row.


# %%
def to_int8(row):  # (n,) -> codes and scale
    scale = row.abs().max() / 127
    return (row / scale).round(), scale


row = torch.tensor([0.5, -2.0, 0.0, 0.01])
codes, scale = to_int8(row)
print("codes   ", codes.int().tolist(), " scale", round(scale.item(), 4))
print("restored", codes * scale)

# %% [markdown]
# Check the first one: the scale is 2 / 127 = 0.0157, and 0.5 / 0.0157 is 31.75, so the code is 32.
# No number can be off by more than half a scale, 0.008. For -2 that is nothing. For 0.01 it is
# nearly everything.
#
# The package's is the same, for all rows at once.

# %%
from minillama.adapt.quantize import absmax_int8

rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
codes, scales = absmax_int8(rows)
for i in range(5):
    by_hand, scale = to_int8(rows[i])
    assert_close(codes[i].float(), by_hand)
    assert_close(scales[i], scale)
assert ((codes * scales[:, None] - rows).abs() <= 0.5001 * scales[:, None]).all()
print("equal, and no number is off by more than half a scale")

# %% [markdown]
# ## What one outlier does
#
# The scale belongs to the largest number, and all others have to live with it. Here is a row of 64
# ordinary numbers, to which one is added that grows.


# %%
def error(x, restored):  # how large the mistake is, as a share of the thing
    return ((restored - x).norm() / x.norm()).item()


def rounded(x, bits):  # absmax, with any number of bits, along the last axis
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


ordinary, outliers = rows[0] / rows[0].abs().max(), torch.logspace(0, 3, 31)
errors = {bits: [] for bits in (8, 4)}
for bits, series in errors.items():
    for outlier in outliers:
        together = rounded(torch.cat((ordinary, outlier[None])), bits)
        series.append(error(ordinary, together[:-1]))
fig, ax = plt.subplots()
for bits, series in errors.items():
    ax.loglog(outliers, series, label=f"{bits} bits")
ax.axhline(1, color="gray", linestyle=":", label="all zeros")
ax.set(xlabel="size of the outlier (the largest other number is 1)", ylabel="error of the others")
ax.legend()
plt.show()
assert errors[8][0] < 0.01 and errors[4][-1] == 1  # noqa: PT018

# %% [markdown]
# In 4 bits, an outlier of 15 is enough to turn all others into zeros. Do real weights have
# outliers? Here are the rows of a real model: how far their largest number lies from the usual one.

# %% tags=["nbval-ignore-output"]
from minillama.checkpoint.fetch import fetched

smollm2 = fetched("smollm2-135m-instruct")
model, tok = load(smollm2 or "../data/toy/checkpoint", dtype=torch.float32)
matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
far = {name: (w.abs().amax(-1) / w.square().mean(-1).sqrt()) for name, w in matrices.items()}
several = torch.cat([ratio for name, ratio in far.items() if "layers" in name])
fig, ax = plt.subplots(figsize=(6, 2))
ax.hist(several.clamp(max=20).numpy(), bins=60, log=True)
ax.set(
    xlabel="largest number of a row, in units of its root mean square (20: or more)", ylabel="rows"
)
ax.set_title("SmolLM2" if smollm2 else "the toy")
plt.show()
print(
    f"median {several.median():.1f}; {(several > 10).float().mean():.2%} of the rows are above 10"
)
assert 2 < several.median() < 8

# %% [markdown]
# Three or four is what normally distributed numbers have, too. But there are rows that reach
# further, and each pays for it with all of its numbers. Eight bits can afford that. Four cannot.
#
# ## Groups
#
# So let fewer numbers share a scale: cut each row into *groups*, of 32 neighbours for example. An
# outlier then spoils 31 others instead of thousands. And since 16 codes are few, let them reach
# from the least to the largest number of the group, wherever these lie. That takes two numbers for
# each group: the scale, and where the code 8 lies (called *zero*, though it needn't be 0).


# %%
def to_int4(group):  # (32,) -> codes from 0 to 15, scale, zero
    low, high = group.min(), group.max()
    scale = ((high - low) / 15).bfloat16().float()  # 16 bits each
    zero = (low + 8 * scale).bfloat16().float()
    return ((group - zero) / scale).round().clamp(-8, 7) + 8, scale, zero


group = torch.linspace(-4, 3.5, 16).repeat(2)  # from -4 to 3.5, in steps of 0.5
codes, scale, zero = to_int4(group)
print("codes", codes.int().tolist()[:16], "scale", scale.item(), "zero", zero.item())
assert torch.equal((codes - 8) * scale + zero, group)

# %% [markdown]
# Two codes fit into a byte. With 16 bits for scale and zero each, a weight takes 4 + 32/32 = 5
# bits. The package packs them, and rounds scale and zero to bfloat16 *before* it computes the
# codes, so that these make the best of what will be stored:

# %%
from minillama.adapt.quantize import quantize_linear

weight = rows.repeat(1, 2)  # (5, 128): four groups in a row
layer = quantize_linear(weight, "int4")
for i in range(5):
    for start in range(0, 128, 32):
        codes, scale, zero = to_int4(weight[i, start : start + 32])
        assert_close(layer.dequantized()[i, start : start + 32], (codes - 8) * scale + zero)
print(layer)
print(f"{8 * sum(b.nbytes for b in layer.buffers()) / weight.numel():.0f} bits a weight")

# %% [markdown]
# How does the error depend on bits and groups? Here, for the weights of the toy, which were trained
# in float32; and for the same weights when three in a thousand are ten times as large, where the
# error is that of the others. The price of the groups, 32 / size bits for each weight, is included.


# %%
def grouped(weight, bits, size):  # what comes back from codes of so many bits
    groups = weight.reshape(-1, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    return (((groups - low) / scale).round() * scale + low).view_as(weight)


toy, toy_tok = load("../data/toy/checkpoint")
trained = torch.cat([layer.feed_forward.w1.weight for layer in toy.layers])  # (1024, 96)
long = trained.view(-1, 768)  # eight rows in one: as long as those of a larger model
chosen = torch.rand(long.shape, generator=torch.Generator().manual_seed(4)) < 0.003
spiked = torch.where(chosen, 10 * long, long)
fig, axes = plt.subplots(1, 2, figsize=(6, 2.4), sharey=True)
bits, titles = [2, 3, 4, 5, 6, 8], ("as trained", "with outliers")
for ax, numbers, title in zip(axes, (long, spiked), titles, strict=True):
    for size in (8, 32, 768):
        found = [error(long[~chosen], grouped(numbers, b, size)[~chosen]) for b in bits]
        ax.semilogy([b + 32 / size for b in bits], found, "o-", markersize=3, label=f"of {size}")
    ax.set(title=title, xlabel="bits, with scale and zero")
axes[0].set_ylabel("error")
axes[0].legend(title="groups")
plt.show()
eight, four = (error(trained, grouped(trained, b, 32)) for b in (8, 4))
print(f"groups of 32: {eight:.4f} in 8 bits, {four:.3f} in 4")
assert 12 < four / eight < 24  # 2^4, more or less

# %% [markdown]
# Each bit less doubles the step, and so the error. Groups are an insurance against outliers: as
# trained, the toy would do as well without (768 is the whole row). With outliers, groups of 32 give
# the same error for a bit less. Groups of 8 cost more than they save.
#
# **A fingerprint.** Do the same with SmolLM2's weights, and something odd shows: at 4 bits and
# groups of 32 there is hardly an error. How many different numbers does such a group have?

# %% tags=["nbval-ignore-output"]
real = model.layers[3].feed_forward.w1.weight
for size in (16, 32, 64):
    print(
        f"groups of {size}:", *(f"{error(real, grouped(real, b, size)):.4f}" for b in (3, 4, 5, 8))
    )
distinct = [len(group.unique()) for group in real.reshape(-1, 32)[:500]]
print("different numbers among 32, at most:", max(distinct))
assert max(distinct) <= (16 if smollm2 else 32)

# %% [markdown]
# At most 16. The file was in 4 bits before we got it: GGUF's Q4_1 (notebook 16), whose groups are
# the same as ours. What was lost is lost, and on its grid nothing more is lost. So for SmolLM2,
# read our 4 bits as "once more". The toy's weights are untouched.
#
# ## NF4: levels where the weights are
#
# Whole numbers are evenly spaced. Weights aren't: most are small. Why not put the 16 levels where
# the weights are, each with equally many of them? Trained weights are close to a normal
# distribution, so these are its *quantiles*. Dettmers et al. 2023 take 8 above the middle and 7
# below, add an exact 0, and divide by the largest. That is NF4, "4-bit NormalFloat".

# %%
outermost = 1 - (1 / 32 + 1 / 30) / 2  # of 32 and 30 equal parts, the middle of the last one
above = [NormalDist().inv_cdf(p) for p in torch.linspace(0.5, outermost, 9)[1:].tolist()]
below = [-NormalDist().inv_cdf(p) for p in torch.linspace(0.5, outermost, 8)[1:].tolist()]
levels = torch.tensor(sorted([*below, 0.0, *above])) / max(above)
print(levels)

# %%
from minillama.adapt.quantize import block_nf4, nf4_levels

assert_close(levels, nf4_levels(), rtol=0, atol=1e-6)
block = trained.flatten()[:64]
nearest = (block[:, None] / block.abs().max() - levels).abs().argmin(-1)  # by looking at all 16
codes, absmax = block_nf4(block)
assert torch.equal(codes.long(), nearest) and absmax == block.abs().max()  # noqa: PT018
print("equal")

# %% [markdown]
# A block of 64 neighbours shares an absmax. Here are the toy's weights, each divided by the absmax
# of its block, with NF4's levels and those of whole numbers from -7 to 7:

# %%
shares = trained.reshape(-1, 64)
shares = shares / shares.abs().amax(-1, keepdim=True)
evenly = torch.arange(-7, 8) / 7
fig, axes = plt.subplots(1, 2, figsize=(6, 2), sharey=True)
mistakes = {}
for ax, grid, title in ((axes[0], evenly, "whole numbers"), (axes[1], levels, "NF4")):
    ax.hist(shares.flatten().numpy(), bins=80, color="lightgray")
    for level in grid.tolist():
        ax.axvline(level, linewidth=0.7)
    near = grid[(shares[..., None] - grid).abs().argmin(-1)]
    mistakes[title] = error(shares, near)
    ax.set(title=f"{title}: error {mistakes[title]:.3f}", xlabel="weight / absmax", yticks=[])
plt.show()
assert mistakes["NF4"] < mistakes["whole numbers"]

# %% [markdown]
# At the same 4 bits and the same blocks, NF4's error is smaller. It has no zero to store, either.
# (Our int4 does better still, with 32 to a group and two numbers each; it takes 5 bits.)
#
# ## Double quantisation
#
# An absmax in float32 for each 64 weights is half a bit per weight: for 65B, 4 GB of scales. So the
# scales are numbers to be quantised, too. They are all positive and much alike; take away their
# mean, and put what is left into 8 bits, 256 at a time, as above:

# %%
absmax = trained.reshape(-1, 64).abs().amax(-1)  # 1,536 blocks
mean = absmax.mean()
codes, constants = absmax_int8((absmax - mean).view(-1, 256))
again = (codes * constants[:, None]).flatten() + mean
print(
    f"{len(absmax)} scales, {len(constants)} constants and a mean; error {error(absmax, again):.4f}"
)
layer = quantize_linear(trained, "nf4")
assert torch.equal(layer.absmax, codes.flatten())
assert_close(layer.absmax_scale, constants)
flat = (levels[block_nf4(trained.flatten())[0].long()].view(-1, 64) * again[:, None]).view(1024, 96)
assert_close(layer.dequantized(), flat, rtol=1e-4, atol=1e-6)
print(f"one scale in float32: {4 + 32 / 64} bits; doubly: {4 + 8 / 64 + 32 / (64 * 256):.3f} bits")

# %% [markdown]
# ## Multiplying by codes
#
# `quantize_linear` makes a layer that takes an `nn.Linear`'s place. It could restore the matrix,
# and multiply. But then all 16 or 32 bits travel again. The point is to read the *codes*, and to
# restore each number in the processor, on its way into the product. PyTorch has such kernels for
# int8 and int4. They work in bfloat16, which has 8 bits for its digits, so their products differ
# from those of the restored matrix by up to half a percent. What the codes lost is more:

# %%
generator = torch.Generator().manual_seed(1)
weight = 0.02 * torch.randn(512, 256, generator=generator)
x = torch.randn(3, 256, generator=generator)
exact = x @ weight.T
for kind in ("int8", "int4", "nf4"):
    layer = quantize_linear(weight, kind)
    restored = linear(x, layer.dequantized())
    print(f"{kind}: the codes are off by {error(exact, restored):.3f}")
    assert error(restored, layer(x)) < 0.005

# %% [markdown]
# For many rows of x, as in a prompt, the weights are read once for all of them, and multiplying is
# what takes time. Then the layer restores the matrix after all, a few rows at a time.
#
# **And training?** The codes can't be trained: a gradient's step is far smaller than the distance
# of two levels. But the gradient has to get *through*, to adapters in front (QLoRA, notebook 18).
# It is the upstream gradient times the restored matrix, which is restored again and never kept:

# %%
layer = quantize_linear(weight, "nf4")
with torch.enable_grad():
    x = x.requires_grad_()
    layer(x).sum().backward()
assert_close(x.grad, torch.ones(3, 512) @ layer.dequantized())
assert not list(layer.parameters())
print("the gradient of x is that of the restored matrix")

# %% [markdown]
# ## The bill
#
# `quantize` replaces every linear layer of a model. What does it lose, in nats per token, on tales
# that neither model was trained on? And what does it gain?

# %% tags=["nbval-ignore-output"]
from minillama import generate
from minillama.adapt.quantize import quantize
from minillama.data import tales

ids = tok.encode("\n".join(tales.corpus("valid")[:40]))[:513]
rows_of_ids = torch.tensor(ids).unfold(0, 129, 128)  # 4 of 129


def loss(model, rows=rows_of_ids):
    return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


def tokens_per_second(model, n=10):
    start = time.perf_counter()
    answer = generate(model, tok, "Once upon a time", max_new_tokens=n)[0]
    return len(answer.token_ids) / (time.perf_counter() - start), answer.text


bill = {}
for kind in ("float32", "int8", "int4", "nf4"):
    copy = model if kind == "float32" else quantize(deepcopy(model), kind)
    tokens_per_second(copy, 2)  # the first one warms up
    speed, text = tokens_per_second(copy)
    linears = [m for m in copy.modules() if hasattr(m, "in_features")]
    n_bytes = sum(t.nbytes for m in linears for t in m.state_dict().values())
    n_weights = sum(m.in_features * m.out_features for m in linears)
    bill[kind] = (8 * n_bytes / n_weights, n_bytes / 2**20, loss(copy), speed, text)
print("           bits    MiB    loss  tokens per second")
for kind, (bits, mib, nats, speed, _) in bill.items():
    print(f"{kind:9}{bits:6.2f}{mib:7.1f}{nats:8.3f}{speed:9.1f}")
assert abs(bill["int8"][2] / bill["float32"][2] - 1) < 0.005
assert abs(bill["int4"][2] / bill["float32"][2] - 1) < 0.05
assert all(0.1 < speed < 100_000 for _, _, _, speed, _ in bill.values())

# %% [markdown]
# Eight bits are free, and four cost little. NF4 pays for what SmolLM2's file had already lost:
# these are new levels on an old grid. It has no kernel on CPUs either, so it saves memory there and
# not time. (If these are the toy's numbers: it is so small that Python takes all the time.) Small
# models are the hard case. Dettmers et al. 2023 found those of 7B to 65B, in NF4 and then
# fine-tuned, to be as good as in 16 bits.
#
# What they write:

# %% tags=["nbval-ignore-output"]
for kind, (*_, text) in bill.items():
    print(f"{kind:8} ...{text!r}")
assert bill["int8"][4]

# %% [markdown]
# ## What breaks
#
# Where does it end? The toy, with all matrices rounded to groups of 32, in ever fewer bits:

# %%
encoded = toy_tok.encode_batch(tales.corpus("valid")[:40], bos=True, eos=True)
toy_rows = torch.tensor([token for tale in encoded for token in tale][:2049]).unfold(0, 129, 128)
curve, texts = {}, {}
for bits in (8, 6, 5, 4, 3, 2):
    spoilt = deepcopy(toy)
    for module in spoilt.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(grouped(module.weight, bits, 32))
    curve[bits] = loss(spoilt, toy_rows)
    texts[bits] = generate(spoilt, toy_tok, "One", max_new_tokens=24)[0].text
whole = loss(toy, toy_rows)
fig, ax = plt.subplots(figsize=(6, 2))
ax.plot(curve.keys(), curve.values(), "o-", label="rounded")
ax.axhline(whole, color="gray", linestyle=":", label="float32")
ax.set(xlabel="bits, in groups of 32", ylabel="nats per token")
ax.legend()
plt.show()
for bits in (8, 4, 3, 2):
    print(f"{bits} bits, {curve[bits]:.2f}: One{texts[bits]}")
assert curve[8] < 1.005 * whole < 1.2 * whole < curve[2]

# %% [markdown]
# That is no slope but a cliff. Down to 4 bits nearly nothing happens, 3 cost a little, and at 2 the
# model falls. That is why 4 is where most people stop.
#
# ## Exercises
#
# **1. Before you download.** Give the bits that a weight takes in int4, with its share of scales
# and zeros of 16 bits each, for a row of `d_in` weights in groups of `size`. The last group may not
# be full; it takes as many bytes as the others.


# %% tags=["exercise-1"]
def bits_a_weight(d_in, size):
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
assert bits_a_weight(4096, 32) == 5
assert bits_a_weight(4096, 128) == 4.25
for d_in in (96, 172, 1):
    layer = quantize_linear(torch.randn(16, d_in), "int4")
    n_bits = 8 * sum(buffer.nbytes for buffer in layer.buffers())
    assert math.isclose(bits_a_weight(d_in, 32), n_bits / (16 * d_in))
print("exercise 1: correct")

# %% [markdown]
# **2. Clipping.** The largest number of a block needn't be met. If the scale is a little smaller,
# it is cut off, and all others come out finer. For each row of `x`, try absmax times 1.00, 0.95,
# ..., 0.50 in 4 bits (codes from -7 to 7), and give back what the best one of them restores: that
# with the least sum of squares.


# %% tags=["exercise-2"]
def clipped(x):  # (n, 64) -> (n, 64)
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
x = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
best, plain = clipped(x), rounded(x, 4)
assert ((best - x).square().sum(-1) <= (plain - x).square().sum(-1) + 1e-5).all()
assert 0.85 < error(x, best) / error(x, plain) < 0.97
print("exercise 2: correct")

# %% [markdown]
# **3. Outliers of another kind.** In large models, a few channels of the *activations* are huge.
# LLM.int8() (Dettmers et al. 2022) rounds both factors to int8, rows of x and rows of the weight,
# but first takes out the channels in which any |x| is 6 or more, and multiplies these as they are.
# `absmax_int8` is yours to use.


# %% tags=["exercise-3"]
def llm_int8(x, weight):  # (rows, d_in) and (d_out, d_in) -> (rows, d_out)
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
generator = torch.Generator().manual_seed(3)
x, weight = torch.randn(8, 64, generator=generator), torch.randn(32, 64, generator=generator)
x[:, [5, 40]] *= 60  # two huge channels
(codes, scale), (w_codes, w_scale) = absmax_int8(x), absmax_int8(weight)
naive = (codes.float() @ w_codes.float().T) * scale[:, None] * w_scale
rest = x.clone()
rest[:, [5, 40]] = 0
there = x[:, [5, 40]] @ weight[:, [5, 40]].T
ours = llm_int8(x, weight)
assert error(rest @ weight.T, ours - there) < 0.02
assert error(rest @ weight.T, naive - there) > 0.1
assert not torch.equal(ours, x @ weight.T)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/adapt/quantize.py`: codes, layers, `quantize`.
# - `minillama/plan.py`: `quantized_bytes`, to the last byte.
# - `load(path, quantize="int8")` puts each matrix into few bits as soon as it is read, so that a 7B
#   never exists in 16; `save` keeps the codes. `minillama generate --quantize int4` does the same.
# - `benchmarks/quantization.py` measures the kernels.
#
# Dettmers et al. 2022, LLM.int8() ([arXiv:2208.07339](https://arxiv.org/abs/2208.07339)) and 2023,
# QLoRA ([arXiv:2305.14314](https://arxiv.org/abs/2305.14314)). Smaller still, with some of the
# data: Frantar et al. 2022, GPTQ ([arXiv:2210.17323](https://arxiv.org/abs/2210.17323)).
#
# Next: notebook 18, where such a model learns something new.
