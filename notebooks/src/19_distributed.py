# %% [markdown]
# # 19 · Many processes: share the work, get the same model
#
# **Question.** The 65B was trained on 2,048 GPUs. How do so many processes train *one* model, each
# holding only a piece of it, so that every loss is the one that a single, huge machine would have
# had?
#
# **You need** notebooks 4 to 6, and 8 · **It takes** 50 minutes · **Module**
# `minillama/training/parallel.py`, `minillama/adapt/tensor_parallel.py`

# %%
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The problem, seen
#
# Training keeps four float32 numbers for each parameter: the weight, its gradient, and AdamW's two
# moments. And one GPU is slow: the paper reports 380 tokens a second for each, at 65B.

# %%
from minillama.config import LlamaConfig

for name in ("llama-7b", "llama-65b"):
    n = LlamaConfig.preset(name).n_parameters
    print(f"{name}: 4 x 4 bytes x {n / 1e9:.2f} billion = {16 * n / 1e9:,.0f} GB; a GPU has 80")
years = 1.4e12 / 380 / (3600 * 24 * 365)
print(f"1.4T tokens at 380 a second: {years:.0f} years on one GPU, "
      f"{years * 365 / 2048:.0f} days on 2,048")  # fmt: skip
assert 115 < years < 118

# %% [markdown]
# So there are two wishes: to be faster, and to hold less. And there are three things to share: the
# *rows* of a batch, the *matrices* of a layer, and the *state* that lies about in between. All
# three are done here by hand first, with lists: entry $r$ of a list is what process $r$, its
# **rank**, has in its memory. What moves from one entry to another is communication.
#
# ## Sharing the rows: data parallelism
#
# Each rank reads other rows of the batch, with a copy of all weights. The loss of a batch is a sum
# over its targets, so its gradient is the sum of the ranks' gradients. Adding up what all ranks
# have, and giving the sum to each, is called an **all-reduce**.


# %%
def all_reduce(parts):
    total = sum(parts)
    return [total.clone() for _ in parts]


def gradient(weight, x, targets):  # of the summed squared error
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(((x @ weight - targets) ** 2).sum(), weight)[0]


weight = torch.randn(3, generator=generator)
x, targets = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
whole = gradient(weight, x, targets) / 8
rows = [slice(0, 4), slice(4, 8)]
added = all_reduce([gradient(weight, x[r], targets[r]) for r in rows])
for rank in range(2):
    assert_close(added[rank] / 8, whole)
print("both ranks have the gradient of the whole batch:", added[0] / 8)

# %% [markdown]
# The division comes last, by the number of *all* targets. It is tempting to let each rank take its
# own mean, and to average the two means. That is the same only while all have equally many
# targets; with ignored ones (padding, or the user's words in a chat) they don't:

# %%
counts = [slice(0, 4), slice(4, 5)]  # rank 1 has a single target
right = all_reduce([gradient(weight, x[r], targets[r]) for r in counts])[0] / 5
means = [gradient(weight, x[r], targets[r]) / (r.stop - r.start) for r in counts]
wrong = all_reduce(means)[0] / 2
print("right:", right)
print("wrong:", wrong, "(half the weight on one target of five)")
assert_close(right, gradient(weight, x[:5], targets[:5]) / 5)
assert (right - wrong).abs().max() > 0.1

# %% [markdown]
# ## The two halves of an all-reduce
#
# Suppose rank $r$ needs only part $r$ of the sum: that is a **reduce-scatter**. An **all-gather**
# then puts the parts together everywhere. One after the other they are an all-reduce.


# %%
def reduce_scatter(parts, dim=0):
    return list(sum(parts).chunk(len(parts), dim))


def all_gather(parts, dim=0):
    return [torch.cat(parts, dim) for _ in parts]


parts = [torch.arange(4.0) + 10 * rank for rank in range(4)]
print("reduce-scatter:", reduce_scatter(parts))
print("then all-gather, on each rank:", all_gather(reduce_scatter(parts))[0])
for one, other in zip(all_gather(reduce_scatter(parts)), all_reduce(parts), strict=True):
    assert torch.equal(one, other)

# %% [markdown]
# This is also how it is *done*. If all send their numbers to rank 0, and it sends the sum back, its
# line is busy with $2 (n - 1)$ times the data. In a **ring** each rank talks to its right neighbour
# only: in each round it passes on the partial sum of one part. After $n - 1$ rounds each rank has
# one finished part (reduce-scatter); after $n - 1$ more, all have all (all-gather). A part is an
# $n$-th of the data, so a rank sends $2 (n - 1) / n$ times the data: less than twice, however many
# ranks there are.


# %%
def ring_reduce_scatter(parts):  # -> what each rank holds after each round, as parts of the sum
    n = len(parts)
    chunks = [list(part.chunk(n)) for part in parts]
    terms = [[{rank} for _ in range(n)] for rank in range(n)]  # whose numbers are in it
    history = [[[len(t) for t in rank] for rank in terms]]
    for round_ in range(n - 1):
        # All send at the same time, so what is sent is taken before anything arrives.
        sent = [(rank, (rank - 1 - round_) % n) for rank in range(n)]
        arriving = [(rank, k, chunks[rank][k], terms[rank][k]) for rank, k in sent]
        for rank, k, numbers, whose in arriving:
            right = (rank + 1) % n
            chunks[right][k] = chunks[right][k] + numbers
            terms[right][k] = terms[right][k] | whose
        history.append([[len(t) for t in rank] for rank in terms])
    return [chunks[rank][rank] for rank in range(n)], history


done, history = ring_reduce_scatter(parts)
assert torch.equal(torch.cat(done), sum(parts))

fig, axes = plt.subplots(1, 5, figsize=(6, 1.5), width_ratios=[1, 1, 1, 1, 1.5])
for round_, (ax, counts) in enumerate(zip(axes, history, strict=False)):
    ax.imshow(counts, cmap="Oranges", vmin=0, vmax=5)
    for rank, row in enumerate(counts):
        for k, count in enumerate(row):
            ax.text(k, rank, count, ha="center", va="center")
    ax.set(title=f"after round {round_}", xlabel="part", xticks=range(4), yticks=range(4))
axes[0].set_ylabel("rank")
n = torch.arange(2, 65)
axes[4].plot(n, 2 * (n - 1))
axes[4].plot(n, 2 * (n - 1) / n)
axes[4].text(17, 14, "rank 0 sums", color="C0")
axes[4].text(30, 2.6, "ring", color="C1")
axes[4].set(title="times the data, per rank", xlabel="ranks", yscale="log", ylim=(0.8, 300))
axes[4].set_yticks([1, 2, 10, 100], ["1", "2", "10", "100"])
axes[4].minorticks_off()
plt.show()

# %% [markdown]
# Left, how many ranks' numbers each part of each rank is the sum of: on the diagonal, all four in
# the end. Right, why that is worth the trouble.
#
# ## Sharing a matrix: columns and rows
#
# A linear layer computes $y = x W^T$. Cut by its *outputs*, the matrix gives each rank some
# columns of $y$: nothing to add. Cut by its *inputs*, it needs only some columns of $x$, and each
# rank gets one term of a sum. (PyTorch stores $W$ as (outputs, inputs); the names "column-wise" and
# "row-wise" are those of $W^T$.)

# %%
x = torch.randn(5, 8, generator=generator)
weight = torch.randn(6, 8, generator=generator)
y = x @ weight.T

by_outputs = [x @ part.T for part in weight.chunk(2, dim=0)]  # column-wise
print("column-wise: two pieces of shape", tuple(by_outputs[0].shape))
assert_close(torch.cat(by_outputs, dim=1), y)

pieces = zip(x.chunk(2, dim=1), weight.chunk(2, dim=1), strict=True)
by_inputs = [own_x @ own_weight.T for own_x, own_weight in pieces]  # row-wise
print("row-wise:    two terms of shape", tuple(by_inputs[0].shape))
assert_close(all_reduce(by_inputs)[0], y)

# %% [markdown]
# Now put them in this order: first column-wise, then row-wise. The first leaves each rank with some
# columns, and the second wants just those. In between, SwiGLU treats each hidden unit by itself.
# So a feed-forward layer, whose ranks hold half of the hidden units each, needs *one* all-reduce,
# at its end.

# %%
from minillama.model import FeedForward

config = LlamaConfig.preset("tiny")
layer = FeedForward(config).requires_grad_(False)
x = torch.randn(1, 12, config.dim, generator=generator)


def half_of_hidden(layer, rank, n=2):
    half = copy.deepcopy(layer)
    half.w1.weight = torch.nn.Parameter(layer.w1.weight.chunk(n, dim=0)[rank])
    half.w3.weight = torch.nn.Parameter(layer.w3.weight.chunk(n, dim=0)[rank])
    half.w2.weight = torch.nn.Parameter(layer.w2.weight.chunk(n, dim=1)[rank])
    return half


halves = [half_of_hidden(layer, rank) for rank in range(2)]
terms = [half.w2(silu(half.w1(x)) * half.w3(x)) for half in halves]
assert_close(all_reduce(terms)[0], layer(x))
print("each half has", halves[0].w1.weight.shape[0], "of", config.hidden_dim, "hidden units; equal")

# %% [markdown]
# Attention likewise: each rank takes some of the heads. `wq`, `wk`, `wv` are cut by outputs, and
# heads stand next to each other there; `wo` is cut by inputs. Heads don't talk to each other, so
# the only exchange is again the sum at the end. The package's `Attention` reads the number of heads
# off the tensors; half a layer is a layer, without a change of its code. With grouped heads, a rank
# takes whole groups: 3 query heads and the KV head that they share.

# %%
from minillama.model import Attention, rope_angles

layer = Attention(config).requires_grad_(False)
angles = rope_angles(torch.arange(12), config.head_dim, config.rope_theta)[None, None]


def half_of_heads(layer, rank, n=2):
    half = copy.deepcopy(layer)
    for name in ("wq", "wk", "wv"):
        part = getattr(layer, name).weight.chunk(n, dim=0)[rank]
        getattr(half, name).weight = torch.nn.Parameter(part)
    half.wo.weight = torch.nn.Parameter(layer.wo.weight.chunk(n, dim=1)[rank])
    return half


halves = [half_of_heads(layer, rank) for rank in range(2)]
assert_close(all_reduce([half(x, angles) for half in halves])[0], layer(x, angles))
q_rows, k_rows = (getattr(halves[0], name).weight.shape[0] for name in ("wq", "wk"))
print(f"a rank has {q_rows // config.head_dim} query heads and {k_rows // config.head_dim} KV head")

# %% [markdown]
# Who holds what, in one picture: the matrices of a block as they multiply ($W^T$, so inputs run
# down and outputs to the right), coloured by rank. The grouped `wk` and `wv` are narrow.

# %%
names = ["wq", "wk", "wv", "wo", "w1", "w3", "w2"]
shapes = [tuple(getattr(layer, name).weight.shape[::-1]) for name in names[:4]]
shapes += [(config.dim, config.hidden_dim)] * 2 + [(config.hidden_dim, config.dim)]
fig, ax = plt.subplots(figsize=(6, 2.4))
left = 0
for name, (d_in, d_out) in zip(names, shapes, strict=True):
    if name in ("wo", "w2"):  # by rows
        ax.broken_barh([(left, d_out)], (-d_in / 2, d_in / 2), color="C0")
        ax.broken_barh([(left, d_out)], (-d_in, d_in / 2), color="C1")
    else:  # by columns
        ax.broken_barh([(left, d_out / 2)], (-d_in, d_in), color="C0")
        ax.broken_barh([(left + d_out / 2, d_out / 2)], (-d_in, d_in), color="C1")
    ax.text(left + d_out / 2, 4, name, ha="center")
    left += d_out + 12
ax.plot([], [], "sC0", label="rank 0")
ax.plot([], [], "sC1", label="rank 1")
ax.set(aspect="equal", ylim=(-132, 20))
ax.axis("off")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# ## Why exactly one sum for each sub-layer?
#
# Could the sums wait until the end of the model? No: after each sub-layer comes a norm, and the
# norm of a sum isn't the sum of the norms. Each rank needs the whole stream there.

# %%
from minillama.model import Block

block = Block(config).requires_grad_(False)
with torch.no_grad():
    for parameter in block.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2, generator=generator)
a, b = torch.randn(2, config.dim, generator=generator)
print("norm of the sum:  ", block.ffn_norm(a + b)[:4])
print("sum of the norms: ", (block.ffn_norm(a) + block.ffn_norm(b))[:4])


def block_by_hand(block, x, add=all_reduce):  # x: the same stream on both ranks, as a list
    attention = [half_of_heads(block.attention, rank) for rank in range(2)]
    terms = [half(block.attention_norm(x[r]), angles) for r, half in enumerate(attention)]
    x = [x[r] + total for r, total in enumerate(add(terms))]
    feed_forward = [half_of_hidden(block.feed_forward, rank) for rank in range(2)]
    terms = [half(block.ffn_norm(x[r])) for r, half in enumerate(feed_forward)]
    return [x[r] + total for r, total in enumerate(add(terms))]


expected = block(x, angles)
for found in block_by_hand(block, [x, x]):
    assert_close(found, expected)
print("two all-reduces: both ranks have the block's output")

# %% [markdown]
# ## Sharing the positions: sequence parallelism
#
# In all this the norms and the residual stream are on every rank, twice the same: twice the memory,
# twice the work. But a norm treats each *position* by itself. So let a rank keep half of the
# positions there. Before the sub-layer an all-gather brings the positions together; after it a
# reduce-scatter adds up the terms and deals out the positions. These are the two halves of the
# all-reduce that was there before: not a byte more is sent, and the stream takes half the memory.


# %%
def block_by_positions(block, x):  # x: on each rank, its half of the positions
    attention = [half_of_heads(block.attention, rank) for rank in range(2)]
    seen = all_gather([block.attention_norm(own) for own in x], dim=1)
    terms = [half(seen[r], angles) for r, half in enumerate(attention)]
    x = [x[r] + own for r, own in enumerate(reduce_scatter(terms, dim=1))]
    feed_forward = [half_of_hidden(block.feed_forward, rank) for rank in range(2)]
    seen = all_gather([block.ffn_norm(own) for own in x], dim=1)
    terms = [half(seen[r]) for r, half in enumerate(feed_forward)]
    return [x[r] + own for r, own in enumerate(reduce_scatter(terms, dim=1))]


found = block_by_positions(block, list(x.chunk(2, dim=1)))
print("a rank keeps", tuple(found[0].shape), "of", tuple(expected.shape))
assert_close(torch.cat(found, dim=1), expected)

# %% [markdown]
# ## Two real processes
#
# Enough of lists. `two_processes.py`, beside this notebook, trains the `tiny` model for fifteen
# steps. Started alone, it has everything to itself. Started by `torchrun`, it is two processes with
# a memory of their own that talk over this machine's loopback address: first they share the rows,
# then the matrices and positions. This is all it takes:

# %%
script = Path("two_processes.py")
text = script.read_text()
print(text[text.index("def on_all_ranks") : text.index("def overlap")].strip())


# %%
workplace = tempfile.TemporaryDirectory()


def run(name, *launcher):
    folder = Path(workplace.name, name)
    folder.mkdir()
    subprocess.run([sys.executable, *launcher, script, folder], check=True, capture_output=True)
    return folder, json.loads((folder / "found.json").read_text())


torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
_, alone = run("alone")
folder, together = run("together", *torchrun)
single = torch.tensor(alone["alone or rows"])
by_rows, by_matrices = (torch.tensor(together[name]) for name in ("alone or rows", "matrices"))
for found in (by_rows, by_matrices):
    assert_close(found, single, rtol=1e-5, atol=0)

fig, ax = plt.subplots(figsize=(4, 2.2))
steps = range(1, len(single) + 1)
ax.plot(steps, single, label="one process")
ax.plot(steps, by_rows, "o", label="two, each half the rows")
ax.plot(steps, by_matrices, "x", color="black", label="two, each half of all matrices")
ax.set(xlabel="step", ylabel="loss (nats per byte)")
ax.legend()
plt.show()
print("equal to five digits, at every step")

# %% [markdown]
# The package cuts nothing by hand: it tells PyTorch, for each layer, along which axis its weight is
# to be dealt out, and PyTorch's `DTensor` finds out what to send (`tensor_parallel` in
# `minillama/adapt/tensor_parallel.py` is that list). Each process wrote down what it held, and what
# it made of twelve tokens. Is it what our lists would have held and made?

# %%
from safetensors.torch import load_file

from minillama.model import Llama

model = Llama(config, torch.Generator().manual_seed(0), init_std=0.1).requires_grad_(False)
x = list(model.tok_embeddings(torch.arange(12)[None]).chunk(2, dim=1))
for block in model.layers:
    x = block_by_positions(block, x)
by_hand = torch.cat([model.norm(own) for own in x], dim=1)

for rank in range(2):
    held = load_file(folder / f"rank{rank}.safetensors")
    assert_close(held["hidden"], by_hand)
    ours = half_of_heads(model.layers[0].attention, rank)
    for name in ("wq", "wk", "wv", "wo"):
        assert torch.equal(held[f"layers.0.attention.{name}.weight"], getattr(ours, name).weight)
workplace.cleanup()
n_held = sum(t.numel() for name, t in held.items() if name != "hidden")
print(f"a rank holds {n_held:,} of {config.n_parameters:,} parameters, and makes the same of them")

# %% [markdown]
# ## Sharing the state: FSDP
#
# Data parallelism as above is fast, and holds everything on every rank. But a rank that reads other
# rows needs a weight only while its layer runs. So let each rank *keep* an $n$-th of every weight,
# gradient and moment, and gather a block's weights just before it runs: all-gather, compute, throw
# away. In the backward pass the same again, and then a reduce-scatter of the block's gradients:
# each rank gets the sum for the part it keeps, and updates that part alone. This is *fully sharded*
# data parallelism (FSDP, also called ZeRO-3); PyTorch calls it `fully_shard`.
#
# The next block is gathered while this one computes, so the network works behind the scenes. With
# lists, who has which of eight blocks whole, in which moment of a step?

# %%
n_blocks = 8
order = [*range(n_blocks), *reversed(range(n_blocks))]  # forward, then backward
whole = torch.zeros(n_blocks, len(order))
for moment, block in enumerate(order):
    whole[block, moment] = 2  # it runs
    if moment + 1 < len(order) and order[moment + 1] != block:
        whole[order[moment + 1], moment] = 1  # it is on its way
n_ranks = 8
resident = 1 / n_ranks + (1 - 1 / n_ranks) * (whole > 0).sum(0) / n_blocks  # shares of the weights

fig, (left, right) = plt.subplots(1, 2, width_ratios=[1.2, 1])
left.imshow(whole.numpy(), cmap="Oranges", vmin=0, vmax=2.5, aspect="auto")
left.axvline(n_blocks - 0.5, color="black", linewidth=0.8)
left.set(title="whole on a rank: running (dark), arriving (light)", ylabel="block")
left.set(xlabel="forward, then backward", xticks=[], yticks=range(n_blocks))
right.step(range(len(order)), resident, where="mid", label="FSDP")
right.axhline(1, color="C1", label="everything on every rank")
right.axhline(1 / n_ranks, color="gray", linestyle=":", label="its own eighth")
right.set(title="weights in memory, 8 ranks", xlabel="forward, then backward", ylim=(0, 1.1))
right.set(xticks=[], ylabel="share of the model")
right.legend(loc="center right", bbox_to_anchor=(1, 0.65))
plt.show()
print(f"at most {resident.max():.0%} of the weights; with the 32 blocks of a 7B it would be "
      f"{1 / 8 + 7 / 8 * 2 / 32:.0%}")  # fmt: skip

# %% [markdown]
# "While this one computes" needs a collective that doesn't wait: it is started, comes back at once,
# and the program goes on; before the result is used, it waits for it. `overlap` in
# `two_processes.py` does this by hand: one rank comes 0.8 seconds late to an all-reduce, and the
# other has 0.8 seconds of other work. FSDP does it by itself.

# %%
print(text[text.index("        work = dist") : text.index("        took")].rstrip())
assert 0.4 < together["overlap"] < 0.9
print("\nat the same time, it takes about half as long as one after the other")

# %% [markdown]
# ## What 7B takes on 1, 8 and 64 GPUs
#
# In numbers, for a row of 4,096 tokens on each GPU, bfloat16 products and selective activation
# checkpointing, as in the papers. The state is divided by the number of ranks; the activations
# aren't, for each rank has a row of its own (tensor and sequence parallelism divide these, too).
# Not all that is stacked here is there in one moment; `minillama plan` knows the details.

# %%
from minillama.config import TrainingConfig
from minillama.plan import TrainingPlan

llama, gpus = LlamaConfig.preset("llama2-7b"), [1, 8, 64]
plans = [
    TrainingPlan(
        config=llama,
        training=TrainingConfig(
            batch_size=n, seq_len=4096, precision="bfloat16", checkpointing="selective"
        ),
        data_parallel=n,
    )
    for n in gpus
]
fig, ax = plt.subplots(figsize=(6, 2.2))
bottom = torch.zeros(3)
parts = {"weights": "weights", "gradients": "gradients", "optimizer_state": "AdamW's moments"}
parts |= {"copies": "copies in bfloat16, blocks gathered", "activations": "activations"}
for part, label in parts.items():
    height = torch.tensor([getattr(plan, part) / 1e9 for plan in plans])
    ax.bar(["one GPU", "8 GPUs", "64 GPUs"], height, bottom=bottom, label=label)
    bottom += height
ax.axhline(80, color="black", linewidth=0.8, linestyle="--", label="what a GPU has")
ax.set(ylabel="GB on each")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
for n, plan in zip(gpus, plans, strict=True):
    state = plan.weights + plan.gradients + plan.optimizer_state
    assert abs(state - 16 * llama.n_parameters / n) < 10
    fits = "fits" if plan.peak < 80e9 else "does not fit"
    gpu = "GPUs" if n > 1 else "GPU "
    print(f"{n:2} {gpu}: {state / 1e9:5.1f} GB of state, {plan.peak / 1e9:5.1f} GB in all: {fits}")
assert plans[0].peak > 80e9 > plans[1].peak > plans[2].peak

# %% [markdown]
# And what goes over the network, from each rank, for one micro-batch? FSDP gathers the weights
# twice (2 bytes each, in bfloat16) and reduce-scatters the gradients once (4 bytes, because sums
# want more digits). That doesn't depend on the batch, so a longer batch hides it better. Tensor
# parallelism sends the stream: 4 times in the forward pass of a block (two all-gathers, two
# reduce-scatters), and as often in the backward pass. That grows with the batch, and none of it can
# wait: it needs the fast wires inside one machine.

# %%
n, tokens = 8, 4096
share = (n - 1) / n
fsdp = share * (2 + 2 + 4) * llama.n_parameters
tensor = share * 8 * llama.n_layers * tokens * llama.dim * 4
print(f"on 8 GPUs: FSDP {fsdp / 1e9:.0f} GB, tensor parallelism {tensor / 1e9:.0f} GB per row")
assert 46 < fsdp / 1e9 < 48
assert 14 < tensor / 1e9 < 16

# %% [markdown]
# ## What breaks without it
#
# Forget an all-reduce, and no shape is wrong and no error appears: each rank goes on with its own
# term, and the ranks drift apart, block by block. That is why the package is tested against a
# single process, and not against its own idea of what is right.

# %%
forgotten, right = list(model.tok_embeddings(torch.arange(12)[None]).expand(2, -1, -1)[:, None]), []
expected = forgotten[0]
apart = []
for block in model.layers:
    forgotten = block_by_hand(block, forgotten, add=lambda terms: terms)
    expected = block(expected, angles)
    apart.append([((x - expected).norm() / expected.norm()).item() for x in forgotten])
for index, errors in enumerate(apart):
    print(f"after block {index}: off by " + " and ".join(f"{error:.0%}" for error in errors))
assert min(apart[-1]) > 0.2

# %% [markdown]
# ## Exercises
#
# **1. The other half of the ring.** After `ring_reduce_scatter` rank $r$ holds part $r$ of the sum.
# Let the parts go round: in each of $n - 1$ rounds every rank passes one part to its right
# neighbour, `(rank + 1) % n`. Give back what all ranks hold, and how many parts each has sent.


# %% tags=["exercise-1"]
def ring_all_gather(parts):  # [part of rank 0, ...] -> ([whole on rank 0, ...], parts sent by each)
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
for n in (2, 3, 5):
    own = [torch.arange(2) + 10 * rank for rank in range(n)]
    wholes, sent = ring_all_gather(own)
    assert len(wholes) == n
    assert all(torch.equal(whole, torch.cat(own)) for whole in wholes)
    assert sent == n - 1
print("exercise 1: correct")

# %% [markdown]
# **2. Half of the words.** The output matrix is cut by words, so each rank has the logits of half
# of the vocabulary. The loss of a position is $\log \sum_w e^{z_w} - z_\text{target}$, and the
# logits are far too many to be sent. Let each rank send two numbers per position, and compute the
# losses from these. Mind that $e^z$ overflows.


# %% tags=["exercise-2"]
def report(own_logits, targets, first):  # logits of the words first, first + 1, ... -> 2 tensors
    raise NotImplementedError("exercise 2: yours to write")


def losses(reports):  # what all ranks reported -> the loss of each position
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
from torch.nn.functional import cross_entropy

logits = 100 * torch.randn(6, 10, generator=torch.Generator().manual_seed(5))
targets = torch.tensor([0, 4, 5, 9, 2, 7])
reports = [report(logits[:, :5], targets, 0), report(logits[:, 5:], targets, 5)]
assert all(len(sent) == 2 and sent[0].shape == sent[1].shape == (6,) for sent in reports)
assert_close(losses(reports), cross_entropy(logits, targets, reduction="none"))
print("exercise 2: correct")

# %% [markdown]
# **3. How many GPUs?** With FSDP a rank keeps its share of the 16 bytes per parameter, and beside
# it two whole blocks in bfloat16. Given a config and the bytes of one GPU (activations left out),
# say the smallest power of two of GPUs that is enough. A block has
# `block_matrix_parameters(config) / n_layers` numbers.


# %% tags=["exercise-3"]
def gpus_needed(config, gpu_bytes):  # -> 1, 2, 4, ...
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
from minillama.plan import block_matrix_parameters

assert gpus_needed(LlamaConfig.preset("stories15m"), 80e9) == 1
assert gpus_needed(LlamaConfig.preset("llama2-7b"), 80e9) == 2
assert gpus_needed(LlamaConfig.preset("llama2-7b"), 16e9) == 8
assert gpus_needed(LlamaConfig.preset("llama2-70b"), 80e9) == 16
two_blocks = 2 * 2 * block_matrix_parameters(llama) / llama.n_layers
just_enough = 4 * llama.n_parameters + two_blocks
assert gpus_needed(llama, just_enough) == 4
assert gpus_needed(llama, just_enough - 1) == 8
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/adapt/tensor_parallel.py`: `tensor_parallel` is `half_of_heads`, `half_of_hidden` and
#   `block_by_positions` for any number of ranks, and for embeddings and head, too.
# - `minillama/training/parallel.py`: `shard` is FSDP; rows and matrices at once, in a grid.
# - `minillama/training/loss.py`: `fused_next_token_loss` with a group is exercise 2, with its
#   gradient.
#
# `torchrun --nproc-per-node 4 -m minillama pretrain --tensor-parallel 2 ...` trains with both, and
# saves states that any number of processes can resume.
#
# Tensor parallelism: Shoeybi et al. 2019 (arXiv:1909.08053); sequence parallelism: Korthikanti et
# al. 2022 (arXiv:2205.05198); FSDP: Rajbhandari et al. 2019 (arXiv:1910.02054) and Zhao et al. 2023
# (arXiv:2304.11277). LLaMA used the first two: Touvron et al. 2023 (arXiv:2302.13971), sec. 2.4.
