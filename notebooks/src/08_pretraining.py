# %% [markdown]
# # 8 · Pretraining: half a million small steps, and none of them lost
#
# **Question.** The model is built and the text is ready. What happens in the weeks between, and
# what keeps it from going wrong: in one step, in the memory, and when the machine dies at night?
#
# **You need** what a loss and a gradient are (notebooks 0 and 6) · **It takes** 75 minutes ·
# **Module** `minillama/training/`

# %%
import json
import lzma
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import finalize

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import cross_entropy, silu
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.4), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# A loss says how wrong the model is, its gradient says which way is down. So: take a step down,
# and repeat. That is *gradient descent*, and it is the whole of training in three lines. Here is a
# tiny Llama that reads the tales with it, at three *learning rates* (how long a step is).

# %%
from minillama import Llama, LlamaConfig
from minillama.data import tales
from minillama.data.packing import batches, pack
from minillama.tokenizer import train_tokenizer

stories = tales.corpus("train")
tok = train_tokenizer(stories, vocab_size=400)
rows = pack(tok.encode_batch(stories, bos=True, eos=True), seq_len=64, vocab_size=400)
small = LlamaConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128,
    vocab_size=400, max_seq_len=64, tie_embeddings=True,
)  # fmt: skip
print(f"{small.n_parameters:,} parameters, {len(rows):,} rows of 64 tokens")


# %%
def new_model(config=small):
    return Llama(config, torch.Generator().manual_seed(0), init_std=0.1)


def descend(learning_rate, steps=80):
    model, source, losses = new_model(), batches(rows, 8, seed=0), []
    while len(losses) < steps and (not losses or math.isfinite(losses[-1])):
        batch = next(source)
        loss = cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


plain = {rate: descend(rate) for rate in (0.3, 1.0, 3.0)}
for rate, losses in plain.items():
    print(f"rate {rate}: the last loss is {losses[-1]:.1f}")
assert math.isnan(plain[3.0][-1])
assert plain[0.3][-1] < plain[1.0][-1] - 1

# %% [markdown]
# At rate 3 it blows up, at 1 it gets stuck, and 0.3 crawls. No rate is right, because one rate has
# to serve all weights, and their gradients are of very different sizes:

# %%
model, batch = new_model(), next(batches(rows, 8, seed=0))
cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten()).backward()
sizes = {name: p.grad.square().mean().sqrt().item() for name, p in model.named_parameters()}
order = sorted(sizes, key=sizes.get)
for name in (order[0], order[len(order) // 2], order[-1]):
    print(f"{name:30} gradients of about {sizes[name]:.4f}")
assert sizes[order[-1]] > 10 * sizes[order[0]]

# %% [markdown]
# Both papers train with **AdamW** instead, with a learning rate that rises and falls, and with
# gradients cut to a maximal length (Touvron et al. 2023a, sec. 2.3). The same model, the same rows:

# %%
from minillama import training
from minillama.config import TrainingConfig

recipe = TrainingConfig(steps=120, batch_size=8, seq_len=64, learning_rate=2e-2, warmup_steps=20)


def learn(recipe, model):
    source = batches(rows, recipe.batch_size, recipe.seed)
    optimizer = training.make_optimizer(model, recipe)
    return [stats.loss for stats in training.train(model, optimizer, source, recipe)]


def smooth(losses):  # each the mean of ten
    return torch.tensor(losses).unfold(0, 10, 1).mean(-1)


trained = new_model()
with_recipe = learn(recipe, trained)

fig, ax = plt.subplots()
for rate, losses in plain.items():
    ax.plot(losses, label=f"plain descent, rate {rate}")
ax.plot(with_recipe, "k", label="the papers' recipe")
ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 8))
ax.legend(ncols=2)
plt.show()
assert smooth(with_recipe)[70] < min(plain[0.3]) - 0.3

# %% [markdown]
# This notebook takes that recipe apart: first the step, then the memory it takes, then the run.
#
# ## AdamW, on one weight
#
# Adam keeps two running averages for each weight: **m**, of its gradients (*momentum*: which way
# has it been going?), and **v**, of their squares (*second moment*: how large are they usually?).
# The step is one divided by the root of the other, so a weight with gradients of 1000 and a weight
# with gradients of 0.001 take equally long steps.
#
# Both averages start at 0, so at first they are too small: after one step, m holds only 10% of the
# first gradient. Dividing by $1 - \beta^t$ corrects that exactly (*bias correction*).
#
# The W stands for *decoupled weight decay*: each weight shrinks a little towards 0 in every step,
# beside the gradient and not as a part of it.


# %%
def adamw_step(weight, gradient, m, v, t, rate, beta1=0.9, beta2=0.95, eps=1e-5, decay=0.1):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    weight = weight - rate * decay * weight  # W
    weight = weight - rate * m_hat / (v_hat**0.5 + eps)  # Adam
    return weight, m, v


gradients = [2.0, -1.0, 0.5, 0.5]
weight, m, v = 1.0, 0.0, 0.0
by_hand = []
print(" t  gradient      m      v   weight")
for t, gradient in enumerate(gradients, 1):
    weight, m, v = adamw_step(weight, gradient, m, v, t, rate=0.1)
    by_hand.append(weight)
    print(f"{t:2} {gradient:9.1f} {m:6.3f} {v:6.3f} {weight:8.3f}")

# %% [markdown]
# Check the first line with a pencil: m = 0.1 · 2 = 0.2, corrected 2; v = 0.05 · 4 = 0.2, corrected
# 4; the step is 0.1 · 2 / √4 = 0.1, and the decay takes 0.1 · 0.1 · 1 = 0.01. So the *first* step
# is as long as the learning rate, whatever the gradient. Remember that for later.
#
# `make_optimizer` takes PyTorch's AdamW, with the papers' settings. A matrix of one weight:

# %%
from minillama.training import make_optimizer

one_weight = torch.nn.Linear(1, 1, bias=False)
one_weight.weight.data.fill_(1.0)
optimizer = make_optimizer(one_weight, replace(recipe, learning_rate=0.1))
for gradient, expected in zip(gradients, by_hand, strict=True):
    one_weight.weight.grad = torch.tensor([[gradient]])
    optimizer.step()
    assert_close(one_weight.weight.item(), expected, rtol=1e-6, atol=0)

decayed, kept = make_optimizer(new_model(), recipe).param_groups
print("decayed:", {p.dim() for p in decayed["params"]}, "axes;", "not decayed:", end=" ")
print({p.dim() for p in kept["params"]}, "axis: the norms' weights")
assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)

# %% [markdown]
# (What is decayed the papers don't say. Matrices and not the norms is the usual choice.)
#
# **Why *beside* the gradient?** If the decay were added to the gradient, it would be divided by
# √v, too: a weight with large gradients would hardly decay at all. Two weights, one with gradients
# of ±100 and one with ±0.01, after 1,000 steps each:

# %%
for name, optimizer_class in (
    ("in the gradient (Adam)", torch.optim.Adam),
    ("beside it (AdamW)", torch.optim.AdamW),
):
    weights = torch.ones(2, requires_grad=True)
    optimizer = optimizer_class([weights], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1000):
        weights.grad = (-1) ** step * torch.tensor([100.0, 0.01])
        optimizer.step()
    print(f"{name:23} {weights[0]:.2f} and {weights[1].abs():.2f}")
assert_close(weights.detach(), torch.full((2,), (1 - 1e-4) ** 1000), rtol=1e-2, atol=0)

# %% [markdown]
# AdamW shrinks both to the same 0.90. In the gradient, the first keeps its size, and the second is
# wiped out.
#
# **Why β₂ = 0.95, and ε = 1e-5?** PyTorch's defaults are 0.999 and 1e-8. The papers give their
# numbers and no reasons, so let us see what they do. β₂ says how long v remembers: 1 / (1 - β₂),
# so 20 steps and not 1,000. When gradients suddenly grow a hundredfold, v must notice before the
# steps get long.


# %%
def step_lengths(gradients, **settings):  # in units of the learning rate
    weight, m, v, lengths = 0.0, 0.0, 0.0, []
    for t, gradient in enumerate(gradients, 1):
        before = weight
        weight, m, v = adamw_step(weight, gradient, m, v, t, 1.0, decay=0.0, **settings)
        lengths.append(abs(weight - before))
    return lengths


jump = [0.01] * 1000 + [1.0] * 100
long_memory, short_memory = (step_lengths(jump, beta2=beta2) for beta2 in (0.999, 0.95))
print(f"longest step: {max(long_memory):.1f} learning rates with 0.999, ", end="")
print(f"{max(short_memory):.1f} with 0.95")
assert max(long_memory) > 4 * max(short_memory)

# %% [markdown]
# And ε is what the root is compared with: a weight whose gradients are much smaller than ε hardly
# moves. 1e-5 sounds like nothing. But the gradient of a 7B is cut to length 1 (see below), and
# length 1 spread over 6.7 billion weights is, for each,

# %%
llama2_7b = LlamaConfig.preset("llama2-7b")
typical = 1 / math.sqrt(llama2_7b.n_parameters)
print(f"{typical * 1e5:.1f} times 1e-5")
assert 1e-5 < typical < 1.3e-5

# %% [markdown]
# at most. So with 1e-5, the weights that matter to the batch at hand move, and those with tiny
# gradients mostly don't. With 1e-8 nearly all weights take full steps all the time.
#
# Here are both effects (how far a weight moves, in learning rates), beside the picture that made
# Adam famous: a long valley, a hundred times as steep across as along. Plain descent leaps from
# wall to wall. AdamW takes equally long steps in both directions, and arrives.


# %%
def walk(step, n=60):
    point, state, path = torch.tensor([-4.0, 1.0]), None, []
    for t in range(1, n + 1):
        path.append(point)
        point, state = step(point, point * torch.tensor([1.0, 100.0]), state, t)
    return torch.stack(path)


def plain_step(point, gradient, state, t):
    return point - 0.0195 * gradient, None


def adam(point, gradient, state, t):
    point, *state = adamw_step(point, gradient, *(state or (0, 0)), t, 0.15, decay=0.0)
    return point, state


fig, (valley, memory, epsilon) = plt.subplots(1, 3, figsize=(6, 2.3))
for step, label in ((plain_step, "plain descent"), (adam, "AdamW")):
    valley.plot(*walk(step).T, ".-", linewidth=0.7, markersize=2, label=label)
valley.plot(0, 0, "k+")
valley.set(title="60 steps in a valley", xlabel="flat", ylabel="steep", ylim=(-2, 1.2))
valley.legend(loc="lower left")
for lengths, label in ((long_memory, "β₂ 0.999"), (short_memory, "β₂ 0.95")):
    memory.plot(range(-20, 60), lengths[980:1060], label=label)
memory.set(title="gradients grow 100 times", xlabel="step", ylabel="learning rates", ylim=(0, 8))
memory.legend(loc="upper left")
sizes = torch.logspace(-10, -2, 81)
for eps in ("1e-8", "1e-5"):
    epsilon.semilogx(sizes, sizes / (sizes + float(eps)), label=f"ε {eps}")
epsilon.axvline(typical, color="gray", linestyle=":", label="7B, length 1")
epsilon.set(title="small gradients", xlabel="usual gradient", ylim=(0, 1.7))
epsilon.legend(loc="upper left")
plt.show()
assert walk(adam)[-1].norm() < 0.3 < 1 < walk(plain_step)[-1].norm()

# %% [markdown]
# ## Warm up, then cool down
#
# The learning rate isn't constant. It rises in a straight line for 2,000 steps (*warm-up*), then
# falls along half a cosine, and ends at *exactly* a tenth of its peak. By hand:


# %%
def schedule(step, steps, warmup, peak):
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)  # 0 ... 1
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# %%
from minillama.training import learning_rate

papers, toy = TrainingConfig.preset("llama2-7b"), TrainingConfig.preset("toy")
for config in (papers, toy):
    for step in range(1, config.steps + 1, 97):
        by_hand = schedule(step, config.steps, config.warmup_steps, config.learning_rate)
        assert math.isclose(by_hand, learning_rate(step, config), rel_tol=1e-12)
    assert learning_rate(config.warmup_steps, config) == config.learning_rate
    assert math.isclose(learning_rate(config.steps, config), 0.1 * config.learning_rate)
print(f"Llama 2 7B: {papers.steps:,} steps of 4M tokens, peak {papers.learning_rate:.4f}")
print(f"toy:        {toy.steps:,} steps, peak {toy.learning_rate:.4f}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(6, 2), sharey=True)
for ax, config, steps, title in zip(
    axes,
    (papers, papers, toy),
    (papers.steps, 5000, toy.steps),
    ("Llama 2 7B", "its first 1%", "the toy in data/toy"),
    strict=True,
):
    at = range(1, steps + 1, max(1, steps // 500))
    ax.plot(at, [learning_rate(step, config) / config.learning_rate for step in at])
    ax.axhline(0.1, color="gray", linestyle=":", label="a tenth")
    ax.set(title=title, xlabel="step", ylim=(0, None))
    ax.xaxis.set_major_locator(plt.MaxNLocator(3))
    ax.xaxis.set_major_formatter("{x:,.0f}")
axes[0].set_ylabel("share of the peak")
axes[0].legend()
plt.show()

# %% [markdown]
# The fall is easy to understand: long steps to get near, short ones to get in. And the rise?
# Remember AdamW's first step: m and v have seen *one* gradient, so every weight moves by the full
# learning rate, the important ones and the noise alike, and at the peak a few such steps undo what
# the first weights were chosen for. In our model these are about 0.1 in size. At a rate of 0.04:

# %%
too_fast = replace(recipe, learning_rate=4e-2)
warm = learn(too_fast, new_model())
cold = learn(replace(too_fast, warmup_steps=0), new_model())

fig, ax = plt.subplots(figsize=(6, 2.2))
ax.plot(smooth(cold), label="no warm-up")
ax.plot(smooth(warm), label="20 steps of warm-up")
ax.set(xlabel="step", ylabel="loss (nats per token)", title="learning rate 0.04")
ax.legend()
plt.show()
print(f"at the end: {smooth(cold)[-1]:.1f} without, {smooth(warm)[-1]:.1f} with")
assert smooth(cold)[-1] > smooth(warm)[-1] + 0.2

# %% [markdown]
# Cold, it is ahead for a moment, and then pays for the rest of the run.
#
# ## Clipping
#
# Once in a while a batch is odd, and its gradient is huge. So the gradient is cut: if its length
# over *all* weights together (the *global norm*) is above 1, everything is divided by that length.
# All weights by the same number, so that the direction stays.

# %%
from torch.nn.utils import clip_grad_norm_

parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
norm = math.sqrt(3**2 + 4**2 + 12**2)
clipped = [p.grad / norm for p in parameters]
assert clip_grad_norm_(parameters, max_norm=1.0) == norm == 13
for by_hand, parameter in zip(clipped, parameters, strict=True):
    assert_close(by_hand, parameter.grad, rtol=1e-6, atol=0)
print("(3, 4) and (12), of length 13, become", clipped[0], "and", clipped[1])

# %% [markdown]
# Doesn't Adam divide by the size of the gradients anyway? It does, and that makes things worse.
# The step of the outlier itself is not so long. But its square stays in v for two hundred steps,
# and everything that comes after is divided by it: the weight stands still. (With β₂ = 0.999 it
# would be fifty times as long.)

# %%
spike = [1.0] * 50 + [1000.0] + [1.0] * 400
unclipped = step_lengths(spike)
clipped = step_lengths([min(gradient, 1.0) for gradient in spike])
fig, ax = plt.subplots(figsize=(6, 2))
ax.plot(unclipped, label="one gradient of 1000, at step 50")
ax.plot(clipped, label="the same, clipped to 1")
ax.set(xlabel="step", ylabel="step (learning rates)")
ax.legend()
plt.show()
lost = sum(length < 0.5 for length in unclipped)
print(f"steps that are less than half as long as they should be: {lost} against 0")
assert 150 < lost < 250
assert min(clipped) > 0.99

# %% [markdown]
# ## A batch too large for the machine
#
# The papers take a step after 4 million tokens. No GPU holds that many. So the batch comes in
# *micro-batches*, one after the other. Their gradients add up (*accumulation*), and then comes one
# step. It should be the step of the big batch.
#
# There is one trap. A loss is a mean over *targets*, and not every token is one: in chat data, only
# the answers count (notebook 10), the rest is marked `IGNORE`. Say that one micro-batch has four
# targets and another has one:

# %%
losses = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([6.0])]
n_targets = sum(len(part) for part in losses)
big_batch = torch.cat(losses).mean()
mean_of_means = sum(part.mean() for part in losses) / len(losses)
sum_divided_once = sum(part.sum() for part in losses) / n_targets
print(f"big batch {big_batch:.1f}, mean of means {mean_of_means:.1f}, ", end="")
print(f"sum divided once {sum_divided_once:.1f}")
assert big_batch == sum_divided_once == 2
assert mean_of_means == 3.5

# %% [markdown]
# In the mean of means, the lonely target counts four times as much as any other. Therefore the
# package's loss is a *sum*, and `train_step` divides once, by all targets of the step. With a
# model: 8 rows, at once or two by two, and in half of the rows only the last eight tokens count.

# %%
from minillama.data.packing import IGNORE, Batch
from minillama.training import next_token_loss, train_step

targets = batch.targets.clone()
targets[:4, :-8] = IGNORE
whole = Batch(batch.tokens, targets)
parts = [Batch(batch.tokens[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)]


def gradient_of(loss_of, micro_batches):
    model = new_model()
    for micro_batch in micro_batches:
        loss_of(model, micro_batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def divided_once(model, part):
    return next_token_loss(model(part.tokens), part.targets) / whole.n_targets


def mean_of_its_own(model, part):
    return next_token_loss(model(part.tokens), part.targets) / part.n_targets / len(parts)


big = gradient_of(divided_once, [whole])
for name, loss_of in (("sum divided once", divided_once), ("mean of means", mean_of_its_own)):
    difference = (gradient_of(loss_of, parts) - big).norm() / big.norm()
    print(f"{name:16}: {100 * difference:.1f}% away from the big batch's gradient")
assert difference > 0.2

# %%
results = {}
for name, micro_batches in (("big", [whole]), ("small", parts)):
    model = new_model()
    stats = train_step(model, micro_batches, make_optimizer(model, recipe), max_grad_norm=1.0)
    results[name] = (stats, torch.cat([p.detach().flatten() for p in model.parameters()]))
assert_close(results["big"][1], results["small"][1], rtol=1e-5, atol=1e-5)
assert_close(results["small"][0].grad_norm, big.norm().item(), rtol=1e-5, atol=0)
print("train_step, one batch of 8 rows or four of 2: the same weights")

# %% [markdown]
# ## The loss without the logits
#
# At each position the model gives a score to each of 32,000 pieces. For one row of Llama 2 these
# *logits* are 4,096 × 32,000 numbers: half a gigabyte, eight times as much as the hidden states
# they are made of, and their gradient takes as much again. Must they exist, all at once?
#
# The loss at a position is $-\ln p_\text{target}$ with $p = \text{softmax}(z)$. Its gradient with
# respect to the scores is as simple as can be: $p$, minus 1 at the target.

# %%
z = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)  # three words; the first was right
loss = cross_entropy(z, torch.tensor(0))
loss.backward()
p = z.detach().softmax(-1)
print("probabilities", p, " gradient", z.grad)
assert_close(z.grad, p - torch.tensor([1.0, 0.0, 0.0]))

# %% [markdown]
# So nobody has to wait for the backward pass. Take a few positions, compute their logits, turn them
# into their gradient at once, multiply that back to what the logits were made of (the hidden state
# and the output matrix), and let go. Then the next few positions.


# %%
def loss_in_chunks(hidden, weight, targets, chunk):  # (positions, dim), (vocab, dim), (positions,)
    total = 0.0
    hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        logits = hidden[part] @ weight.T
        total += cross_entropy(logits, targets[part], reduction="sum")
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(gradient)), targets[part]] -= 1
        hidden_grad[part] = gradient @ weight
        weight_grad += gradient.T @ hidden[part]
    return total, hidden_grad, weight_grad


# %%
from minillama.training import fused_next_token_loss

hidden = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
weight = torch.randn(300, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
targets = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(3))

with torch.no_grad():
    by_hand = loss_in_chunks(hidden.flatten(0, 1), weight, targets.flatten(), chunk=32)
for loss in (
    fused_next_token_loss(hidden, weight, targets, chunk=32),
    next_token_loss(hidden @ weight.T, targets),
):
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    assert_close(by_hand[0], loss.detach())
    assert_close(by_hand[1], hidden_grad.flatten(0, 1))
    assert_close(by_hand[2], weight_grad)
print("by hand in chunks, the package's, and with all logits: the same loss and gradients")

# %% [markdown]
# To see what it saves, we count. `Memory` watches every tensor that PyTorch makes, and lets us know
# how many bytes are alive, now and at most.

# %%
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    def __init__(self, *not_counted):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in not_counted}
        self.now = self.peak = 0  # bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            finalize(storage, self.forget, key, n_bytes)  # when its last user is gone

    def forget(self, key, n_bytes):
        self.known.discard(key)
        self.now -= n_bytes


# %%
hidden = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
weight = torch.randn(32_000, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
targets = torch.zeros(1, 512, dtype=torch.int64)
peaks = {}
for name in ("all at once", "in chunks of 64"):
    with Memory(hidden, weight, targets) as memory:
        if name == "all at once":
            loss = next_token_loss(hidden @ weight.T, targets)
        else:
            loss = fused_next_token_loss(hidden, weight, targets, chunk=64)
        torch.autograd.grad(loss, (hidden, weight))
    peaks[name] = memory.peak / 2**20
    print(f"{name:15}: {peaks[name]:.0f} MiB at most, for 512 positions and 32,000 pieces")
assert peaks["all at once"] > 4 * peaks["in chunks of 64"]

# %% [markdown]
# For real rows of Llama 2 7B (4,096 tokens), in chunks of 512 as the package does it:

# %%
logits = 4 * 4096 * llama2_7b.vocab_size / 2**20  # MiB in float32, for one row
chunk = 4 * 512 * llama2_7b.vocab_size / 2**20
print(f"logits of one row {logits:.1f} MiB, of one chunk {chunk:.1f} MiB, however many rows")
fig, ax = plt.subplots(figsize=(6, 2))
n_rows = range(1, 9)
ax.plot(n_rows, [2 * n * logits / 1024 for n in n_rows], "o-", label="all at once")
ax.plot(n_rows, [2 * chunk / 1024] * 8, "o-", label="in chunks of 512")
ax.set(xlabel="rows in the micro-batch", ylabel="GiB", ylim=(0, None))
ax.set_title("logits and their gradient, 7B")
ax.legend()
plt.show()
assert (logits, chunk) == (500.0, 62.5)

# %% [markdown]
# ## Forget, and compute again
#
# Next the blocks. The backward pass needs what the forward pass computed (*activations*): the
# gradient of a product is made of its factors. So autograd keeps nearly everything, from all
# blocks, until the backward pass comes by. *Activation checkpointing* keeps only the input of each
# block and, when the backward pass arrives, runs the block's forward pass again. Here is the whole
# idea, as an `autograd.Function`:


# %%
class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, angles, x, *weights):  # (weights: so that autograd asks for theirs)
        ctx.block, ctx.angles = block, angles
        ctx.save_for_backward(x)  # nothing else
        return block(x, angles)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            again = ctx.block(x, ctx.angles)
        grads = torch.autograd.grad(again, (x, *ctx.block.parameters()), grad)
        return None, None, *grads


# %% [markdown]
# The gradients are the same to the last bit, since the same operations run on the same numbers. In
# the package, `checkpoint_activations` does this ("full") to all blocks of a model.

# %%
from minillama.model.rope import rope_angles
from minillama.training.checkpointing import checkpoint_activations

block = new_model().layers[0]
angles = rope_angles(torch.arange(64)[None], small.head_dim, small.rope_theta)[:, None]
x = torch.randn(8, 64, 48, generator=torch.Generator().manual_seed(4), requires_grad=True)
inputs = (x, *block.parameters())
usual = torch.autograd.grad(block(x, angles).square().sum(), inputs)
out = Recompute.apply(block, angles, x, *block.parameters())
by_hand = torch.autograd.grad(out.square().sum(), inputs)

gradients = {"autograd": usual, "by hand": by_hand}
for kind in ("full", "selective"):
    model = new_model()
    checkpoint_activations(model, kind)
    out = model.layers[0](x, angles)
    same_block = (x, *model.layers[0].parameters())
    gradients[kind] = torch.autograd.grad(out.square().sum(), same_block)
for kind, found in gradients.items():
    assert all(map(torch.equal, usual, found))
    print(f"{kind:9}: {len(found)} gradients, equal to the last bit")

# %% [markdown]
# It costs one more forward pass, about a third more work. LLaMA found a better bargain (sec. 2.4):
# what is expensive to compute are the *matrix products*, and what fills the memory is mostly the
# cheap rest between them. So keep the outputs of the linear layers, and compute the rest again
# ("selective"). They wrote the backward pass by hand for it, instead of leaving it to autograd.
# Here it is for the feed-forward layer. Autograd keeps four tensors of the hidden width; we keep
# two:


# %%
class GatedByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, w3):  # (tokens, dim) and the three matrices
        gate, value = x @ w1.T, x @ w3.T
        ctx.save_for_backward(x, w1, w2, w3, gate, value)
        return (silu(gate) * value) @ w2.T

    @staticmethod
    def backward(ctx, grad):
        x, w1, w2, w3, gate, value = ctx.saved_tensors
        sigma = gate.sigmoid()
        opened = gate * sigma  # silu(gate), again: no matrix product
        grad_hidden = grad @ w2
        grad_gate = grad_hidden * value * sigma * (1 + gate * (1 - sigma))
        grad_value = grad_hidden * opened
        grad_x = grad_gate @ w1 + grad_value @ w3
        return grad_x, grad_gate.T @ x, grad.T @ (opened * value), grad_value.T @ x


# %%
layer = block.feed_forward
tokens = x.detach()[0].requires_grad_()
weights = (layer.w1.weight, layer.w2.weight, layer.w3.weight)
found = {}
for name, run in (
    ("autograd", lambda: layer(tokens)),
    ("by hand", lambda: GatedByHand.apply(tokens, *weights)),
):
    with Memory(tokens, *weights) as memory:
        out = run()
        kept = memory.now - out.nbytes
    found[name] = torch.autograd.grad(out.square().sum(), (tokens, *weights))
    print(f"{name:8} keeps {kept / (4 * tokens.shape[0] * small.hidden_dim):.0f} numbers ", end="")
    print("per token and hidden unit")
for one, other in zip(*found.values(), strict=True):
    assert_close(one, other, rtol=1e-4, atol=1e-4)

# %% [markdown]
# How much is that in earnest? We let a block of the *real* Llama 2 7B read rows of 4,096 tokens,
# with products in 16 bits (see the next section), and count what stays alive: for two rows and for
# one, so that the difference is what a row costs. That would take gigabytes; but a
# `FakeTensorMode` computes nothing but shapes, so it runs anywhere.
#
# By hand, in bytes per token: the block's input is 4 · dim, and the outputs of its linear layers
# take 2 bytes a number (those of wq, wk, wv, wo and w2 are as wide as dim, those of w1 and w3 as
# hidden_dim).

# %%
from torch._subclasses.fake_tensor import FakeTensorMode


def alive_after_a_block(config, kind, n_rows, seq=4096):  # bytes
    with FakeTensorMode():
        model = Llama(replace(config, n_layers=1))
        checkpoint_activations(model, kind)
        x = torch.empty(n_rows, seq, config.dim, requires_grad=True)
        positions = torch.arange(seq)[None]
        angles = rope_angles(positions, config.head_dim, config.rope_theta)[:, None]
        with Memory(angles, x, *model.parameters()) as memory:
            with torch.autocast("cpu", torch.bfloat16):
                out = model.layers[0](x, angles)
            return memory.now - out.nbytes + x.nbytes  # `out` is the next block's input, x is ours


kept = {
    kind: alive_after_a_block(llama2_7b, kind, 2) - alive_after_a_block(llama2_7b, kind, 1)
    for kind in ("none", "selective", "full")
}
dim, hidden_dim = llama2_7b.dim, llama2_7b.hidden_dim
assert kept["full"] == 4096 * 4 * dim
assert kept["selective"] == 4096 * (4 * dim + 2 * (5 * dim + 2 * hidden_dim))
for kind, n_bytes in kept.items():
    print(f"{kind:9} {n_bytes / 2**20:4.0f} MiB per block, ", end="")
    print(f"{llama2_7b.n_layers * n_bytes / 2**30:4.1f} GiB in {llama2_7b.n_layers} blocks")

# %%
fig, ax = plt.subplots(figsize=(6, 2))
for place, (kind, n_bytes) in enumerate(kept.items()):
    again = 0 if kind == "none" else (kept["none"] - n_bytes) / 2**30
    stays = llama2_7b.n_layers * n_bytes / 2**30
    ax.barh(place, stays, color="C0", label=None if place else "kept, in 32 blocks")
    ax.barh(place, again, left=stays, color="C1", label="computed again" if place == 1 else None)
ax.set_yticks(range(3), kept)
ax.set(xlabel="GiB, one row of 4,096 tokens through Llama 2 7B", xlim=(0, 40))
ax.invert_yaxis()
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# The orange piece is one block, filled up again while the backward pass is in it. Only one block at
# a time needs it.
#
# `minillama.plan` knows these numbers as formulas, and everything else that training takes. This is
# how one GPU would look with the 7B and a single row:

# %%
from minillama.plan import TrainingPlan, block_activations, checkpointed_bytes

assert kept["none"] == 4096 * sum(block_activations(llama2_7b, "bfloat16").values())
for kind in ("selective", "full"):
    assert kept[kind] == 4096 * checkpointed_bytes(llama2_7b, "bfloat16", kind)

plan = TrainingPlan(config=llama2_7b, training=replace(papers, batch_size=1, accumulation=1))
for name, n_bytes in plan.parts.items():
    if n_bytes > 2**30:
        print(f"{name:12} {n_bytes / 2**30:5.1f} GiB")
print(f"{'together':12} {plan.peak / 2**30:5.1f} GiB, at the worst moment: the {plan.worst}")

# %% [markdown]
# (Copies are the weights in 16 bits, for the products. In the worst moment the backward pass has
# come to its end: all gradients are there, and the activations are gone.) That is more than the
# 80 GB of an A100, and most of it has nothing to do with the text. So even a 7B is trained on many
# GPUs that share all of this (notebook 19).
#
# ## Sixteen bits
#
# GPUs multiply 16-bit numbers many times faster than 32-bit ones. **bfloat16** is float32 with the
# last 16 bits cut off: the same range, and only 8 bits of precision (7 are stored). That is two to
# three decimal digits. From 1, the next number upwards is 1.0078.

# %%
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    info = torch.finfo(dtype)
    smallest = f"10^{math.log10(info.smallest_normal):.0f}"
    print(f"{str(dtype)[6:]:9} {info.bits} bits, after 1 comes {1 + info.eps:.4f}, ", end="")
    print(f"smallest with full precision {smallest}")
one = torch.tensor(1.0, dtype=torch.bfloat16)
assert one + 1 / 256 == one
assert one + 1 / 128 > one

# %% [markdown]
# float16 has more digits, but loses them below 10⁻⁴, where the gradients of a 7B live (about 10⁻⁵,
# as we saw). With bfloat16 nothing has to be scaled.
#
# For a *product* of two matrices, 8 bits are enough: its sum is made in 32, and the errors of the
# factors average out. For an *update* they are not. A weight of 1, and a hundred updates of
# -0.001:

# %%
paths = {}
for dtype in (torch.float32, torch.bfloat16):
    weight, paths[dtype] = torch.tensor(1.0, dtype=dtype), []
    for _ in range(100):
        weight = weight - 0.001
        paths[dtype].append(weight.item())
    print(f"{str(dtype)[6:]:9} ends at {weight:.2f}")
assert paths[torch.bfloat16][-1] == 1.0
late = torch.tensor(0.02, dtype=torch.bfloat16)
assert late - 0.1 * papers.learning_rate == late

# %% [markdown]
# The next number below 1 is 0.996, so 0.999 is rounded back to 1, a hundred times. This is no rare
# case. At the end of Llama 2's training the rate is 0.00003: a weight of 0.02 then moves by 0.15%
# or less per step, and in bfloat16 it wouldn't move at all. Therefore weights, moments and updates
# stay in float32, and only the products run in bfloat16. In PyTorch that is `autocast`; in `train`,
# the setting `precision` ("auto" is bfloat16 on GPUs that have it, and float32 on CPUs).

# %%
from minillama.training.step import precision

assert precision("auto", torch.device("cpu")) == torch.float32
model = new_model()
with torch.autocast("cpu", precision("bfloat16", torch.device("cpu"))):
    product = model.layers[0].feed_forward.w1(x.detach())
product.float().sum().backward()
grad = model.layers[0].feed_forward.w1.weight.grad
print(f"under autocast: the product is {product.dtype}, the weight's gradient {grad.dtype}")
assert (product.dtype, grad.dtype) == (torch.bfloat16, torch.float32)

# %% [markdown]
# Now train our model at a low rate in three ways: float32 throughout; products in bfloat16; and
# everything in bfloat16, weights included.

# %%
slow = replace(recipe, steps=70, learning_rate=2e-3)
curves = {
    "float32": learn(slow, new_model()),
    "bfloat16 products": learn(replace(slow, precision="bfloat16"), new_model()),
    "bfloat16 throughout": learn(slow, new_model().bfloat16()),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2.2))
for dtype, path in paths.items():
    left.plot(path, label=str(dtype)[6:])
left.set(title="a weight, 100 updates of -0.001", xlabel="update", ylim=(0.88, 1.01))
left.legend()
for (name, losses), style in zip(curves.items(), ("-", ":", "-"), strict=True):
    right.plot(smooth(losses) - smooth(curves["float32"]), style, label=name)
right.set(title="loss, compared with float32", xlabel="step", ylim=(-0.01, 0.15))
right.legend(loc="upper left")
plt.show()
products, throughout = (
    smooth(curves[name])[-1] - smooth(curves["float32"])[-1]
    for name in ("bfloat16 products", "bfloat16 throughout")
)
assert abs(products) < 0.02
assert throughout > 0.05

# %% [markdown]
# Products in bfloat16 change nothing that can be seen. Weights in bfloat16 fall behind, the more
# the shorter the updates get.
#
# ## A run
#
# All of this together is `PretrainingRun`: documents in, a folder out. It is what `minillama
# pretrain` runs. We give it 1,000 tales, let it save its state every 50 steps, and keep a copy of
# the folder as it was at step 100, for later.

# %%
from minillama.config import RunConfig
from minillama.training.run import PretrainingRun

home = TemporaryDirectory(ignore_cleanup_errors=True)
runs = Path(home.name)
held_out = tales.corpus("valid")[:60]
arguments = {
    "documents": stories[:1000],
    "held_out": held_out,
    "tokenizer": tok,
    "model_config": small,
    "config": replace(recipe, steps=200),
    "saving": RunConfig(save_every=50, eval_every=50),
}
run = PretrainingRun(runs / "undisturbed", **arguments)
for stats in run:
    if stats.step == 100:
        shutil.copytree(runs / "undisturbed", runs / "step 100")
for path in sorted((runs / "undisturbed").iterdir()):
    print(path.name + "/" * path.is_dir())

# %% [markdown]
# Each line of the log is a step, or a validation: the loss on stories that no step learns from.

# %%
log = run.log()
steps = [line for line in log if "loss" in line]
checks = [line for line in log if "validation_loss" in line]
fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2.2))
left.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training")
left.plot(
    [line["step"] for line in checks],
    [line["validation_loss"] for line in checks],
    "o-",
    label="validation",
)
left.set(title="loss (nats per token)", xlabel="step", ylim=(0, None))
left.legend()
right.plot([line["step"] for line in steps], [line["grad_norm"] for line in steps])
right.axhline(1, color="gray", linestyle=":", label="clipped above")
right.set(title="length of the gradient", xlabel="step", ylim=(0, None))
right.legend()
plt.show()
print("validation:", ", ".join(f"{line['validation_loss']:.1f}" for line in checks))
assert checks[-1]["validation_loss"] < 1.9

# %% [markdown]
# Training and validation agree: the model has seen each row at most once, so it couldn't learn any
# by heart. The gradient is longest at the start, so there the clip cuts most; later only now and
# then. (Had the loss become infinite or no number at all, the run would have stopped with its
# weights as they were, and kept the batch that did it.)
#
# **The unit.** *Nats per token* depends on the tokenizer: with longer pieces there are fewer tokens
# in a text, and each is harder to guess. To compare models with different vocabularies, spread the
# same information over the *bytes* of the text, and count in bits: 1 nat = 1 / ln 2 bits. That has
# a meaning of its own: it is how small the text could be made by a compressor that knows what the
# model knows.

# %%
n_tokens = sum(map(len, tok.encode_batch(held_out, bos=True, eos=True)))
n_bytes = sum(len(story.encode()) for story in held_out)
found = run.evaluate()
by_hand = found.loss * n_tokens / math.log(2) / n_bytes
assert math.isclose(by_hand, found.bits_per_byte)
print(f"{n_bytes / n_tokens:.1f} bytes per token, {found.loss:.1f} nats per token: ", end="")
print(f"{found.bits_per_byte:.1f} bits per byte")

# %% [markdown]
# Now compare. The toy in `data/toy` has a vocabulary of 1,024 and trained eleven times as long. A
# real compressor, LZMA, reads the same training stories before it packs the new ones.

# %%
from minillama import load
from minillama.data.packing import as_batch
from minillama.training import evaluate

toy_model, toy_tok = load("../data/toy/checkpoint")
ids = toy_tok.encode_batch(held_out, bos=True, eos=True)
toy_loss = evaluate(toy_model, [as_batch(pack(ids, seq_len=256, vocab_size=1024))])
toy_bits = toy_loss / math.log(2) * sum(map(len, ids)) / n_bytes

seen, unseen = "".join(stories).encode(), "".join(held_out).encode()
packed = (len(lzma.compress(seen + unseen)) - len(lzma.compress(seen))) * 8 / n_bytes
print(f"toy:  {n_bytes / sum(map(len, ids)):.1f} bytes per token, ", end="")
print(f"{toy_loss:.2f} nats per token: {toy_bits:.1f} bits per byte")
print(f"LZMA: {packed:.1f} bits per byte")
assert toy_bits < packed / 2 < packed < found.bits_per_byte

# %% [markdown]
# The compressor beats our model: it looks back over all it has read, and the tales repeat their
# phrases. The toy needs a fifth of what the compressor needs. It doesn't repeat, it knows what
# must come.
#
# ## Kill it
#
# A 7B trained for 184,320 GPU-hours, a 70B for 1,720,320 (Touvron et al. 2023b, table 2). Machines
# die in that time. What is a run worth that was cut off? Everything, if it goes on *as if nothing
# had happened*. We start the same run in another process, and when it reports step 70, we kill it:
# no warning, no chance to tidy up.

# %%
CHILD = """
import sys
import torch
from minillama.training.run import PretrainingRun
torch.set_num_threads(1)
for stats in PretrainingRun.resume(sys.argv[1]):
    print(stats.step, flush=True)
"""
PretrainingRun(runs / "killed", **arguments)
command = [sys.executable, "-c", CHILD, str(runs / "killed")]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
    for line in child.stdout:
        if line.strip() == "70":
            child.kill()  # SIGKILL
            break
assert child.returncode != 0
assert not (runs / "killed" / "checkpoint").exists()
print("killed in the middle; there is no model")

# %% [markdown]
# Now `resume` (`minillama pretrain --resume`). The newest state is older than the kill, so the log
# knows more than the state does. Those lines are taken back; their steps are taken again, and come
# out the same.

# %%
resumed = PretrainingRun.resume(runs / "killed")
assert resumed.step < 200
for _ in resumed:
    pass


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


one, other = contents(runs / "killed"), contents(runs / "undisturbed")
assert one == other
print(f"{len(one)} files, {sum(map(len, one.values())) / 2**20:.1f} MiB: equal in every byte")

# %% [markdown]
# Not similar: equal. The weights, the optimiser, the log, even the picture. What must a state hold
# for that?

# %%
from safetensors import safe_open

newest = sorted((runs / "undisturbed" / "states").iterdir())[-1]
with safe_open(newest / "state.safetensors", "pt") as file:
    names = list(file.keys())
    numbers = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
for kind in ("exp_avg", "exp_avg_sq", "step"):
    of_kind = [name for name in names if name.endswith("." + kind)]
    print(f"{kind:10} {len(of_kind)} tensors, {sum(numbers[name] for name in of_kind):,} numbers")
weights = sum(n for name, n in numbers.items() if not name.startswith("optimizer"))
print(f"weights    {weights:,} numbers")
progress = json.loads((newest / "state.json").read_text())
print(f"step {progress['step']}; rows drawn {progress['batches']['drawn']}")
assert weights == small.n_parameters
assert progress["batches"]["drawn"] == {"text": 200 * 8}

# %% [markdown]
# - **The weights**, of course.
# - **m, v and t** of AdamW (`exp_avg`, `exp_avg_sq`, `step`): a state is three times a model.
# - **The step**, from which the learning rate follows.
# - **The position in the data**: how many rows of each source have been drawn. The order is a
#   function of the seed, so the count is enough.
# - **How long the log was**, and all settings, so that nobody goes on with others by mistake.
#
# No generator of random numbers is among them, because none is left running: the initial weights
# and the order of the rows are functions of the seed. (A model with dropout would need one.)
#
# ## What breaks: almost the same state
#
# Many training scripts save less. Take the copy of step 100 and go on in three ways: with all of
# it; with the optimiser's averages forgotten; and with the data from the start again.

# %%
fresh = PretrainingRun(runs / "fresh", **arguments).batches.state_dict()


def go_on(name, forget):
    shutil.copytree(runs / "step 100", runs / name)
    run = PretrainingRun.resume(runs / name)
    forget(run)
    return [stats.loss for stats in run], run.evaluate().loss


ways = {
    "all of it": go_on("exact", lambda run: None),
    "no averages": go_on("no averages", lambda run: run.optimizer.state.clear()),
    "data from the start": go_on("again", lambda run: run.batches.load_state_dict(fresh)),
}
truth = [line["loss"] for line in steps][100:]
assert ways["all of it"][0] == truth
print("all of it: the same 100 losses as those of the undisturbed run")

# %%
fig, ax = plt.subplots(figsize=(6, 2.2))
for name, (losses, _) in ways.items():
    ax.plot(range(106, 197), smooth(losses), label=name)
ax.set(title="training after a resume", xlabel="step", ylabel="loss (nats per token)")
ax.legend()
plt.show()

# %% [markdown]
# Three healthy curves. Would you have noticed anything? Forgetting the averages costs a little, for
# a while. And reading the data from the start looks like the best of the three! It isn't: those
# rows are known already. On stories that none has read (the validation) nothing is gained, and half
# of the text was never read:

# %%
halfway = json.loads((runs / "step 100/states/000000100/state.json").read_text())["batches"]


def read_from(position):  # the rows of 100 steps
    run.batches.load_state_dict(position)
    return {row.numpy().tobytes() for _ in range(100) for row in next(run.batches).tokens}


first, rest = read_from(fresh), read_from(halfway)
print(f"exact resume: {len(first | rest):,} different rows; ", end="")
print(f"data from the start: {len(first | read_from(fresh)):,}")
exact, again = ways["all of it"], ways["data from the start"]
assert sum(again[0][50:]) / 50 < sum(exact[0][50:]) / 50 - 0.04  # the training loss
assert again[1] > exact[1] - 0.01  # the validation loss

# %% [markdown]
# And if a state is damaged? A disk fails, a copy is cut short. Each state carries checksums
# (SHA-256), so a single wrong bit is found. The state is named, and the one before it is used. As
# resuming is exact, that costs nothing but time.

# %%
state = runs / "again" / "states" / "000000200" / "state.safetensors"
data = bytearray(state.read_bytes())
data[len(data) // 2] ^= 1  # one bit
state.write_bytes(data)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    resumed = PretrainingRun.resume(runs / "again")
message = str(caught[-1].message).replace(str(runs / "again"), "run").replace("\\", "/")
print(message)
print("goes on from step", resumed.step)
assert resumed.step == 150
home.cleanup()

# %% [markdown]
# ## How much does it cost, and what does it buy?
#
# A weight is used in one multiplication and one addition per token, and twice as much again in the
# backward pass (for the gradient of the input, and of the weight). So training $N$ parameters on
# $D$ tokens takes about $6 N D$ operations. Does it add up? LLaMA's authors report that their 65B
# read 380 tokens a second on each of 2,048 GPUs, and that 1.4T tokens took 21 days (sec. 2.4):

# %%
n_65b = LlamaConfig.preset("llama-65b").n_parameters
days = 1.4e12 / (380 * 2048) / 86_400
share = 6 * n_65b * 380 / 312e12  # an A100 can do 312 TFLOP/s in 16 bits
print(f"{days:.1f} days; {6 * n_65b * 1.4e12:.1e} operations, {share:.0%} of what the GPUs can do")
assert 20.5 < days < 21

# %% [markdown]
# With a given number of operations, should one train a large model briefly, or a small one for
# long? Hoffmann et al. 2022 (*Chinchilla*) measured it: for the lowest loss, N and D should grow
# together, at about **20 tokens per parameter**. What did the Llamas do?

# %%
from minillama.plan import run_tokens

for name in ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama2-7b", "llama2-70b"):
    n, d = LlamaConfig.preset(name).n_parameters, run_tokens(TrainingConfig.preset(name))
    print(f"{name:10} {d / 1e12:.1f}T tokens, {d / n:3.0f} per parameter, ", end="")
    print(f"{6 * n * d:.1e} operations")

# %% [markdown]
# The 7B got seven times as many, and Llama 2's fourteen times. On purpose (Touvron et al. 2023a,
# sec. 1): the 20 count the bill of *training* only. But a model is trained once and used for years,
# and each token it writes costs $2N$ operations. What else would the 7B's bill have bought?

# %%
llama_7b = LlamaConfig.preset("llama-7b").n_parameters
bill = 6 * llama_7b * 1.0e12
chinchilla = math.sqrt(bill / (6 * 20))  # N with D = 20 N
print(f"{chinchilla / 1e9:.0f}B parameters on {20 * chinchilla / 1e9:.0f}B tokens; ", end="")
print(f"each token it writes costs {chinchilla / llama_7b:.1f} times as much")
assert 2.5 < chinchilla / llama_7b < 3

# %% [markdown]
# By Chinchilla's count that model would be the better one. But a small model can catch up by
# reading on, and it is the one that fits a laptop. Hoffmann et al. would have stopped a 10B at 200B
# tokens; LLaMA's 7B was still improving after 1T.
#
# ## Straight lines
#
# That one can plan like this at all has a reason: plotted over N or over D, both axes logarithmic,
# losses fall along lines that are nearly straight (Kaplan et al. 2020). So small models foretell
# large ones. We try it: four sizes for 120 steps each, and one size for 30, 60, 120 and 240 steps.
# In each panel the line is drawn through the *first three*. Does it meet the fourth?

# %%
valid_batches = [as_batch(pack(tok.encode_batch(held_out, True, True), 64, vocab_size=400))]


def final_loss(dim, steps):
    config = replace(small, dim=dim, hidden_dim=8 * dim // 3 // 8 * 8)
    model = new_model(config)
    learn(replace(recipe, steps=steps, warmup_steps=10), model)
    return config.n_parameters, evaluate(model, valid_batches)


by_size = [final_loss(dim, 120) for dim in (8, 16, 32, 64)]
by_tokens = [(steps * 8 * 64, final_loss(32, steps)[1]) for steps in (30, 60, 240)]
by_tokens.insert(2, (120 * 8 * 64, by_size[2][1]))
llama2 = [  # final training losses, read off figure 5 of Llama 2's paper
    (LlamaConfig.preset(f"llama2-{size}").n_parameters, loss)
    for size, loss in (("7b", 1.75), ("13b", 1.67), ("34b", 1.57), ("70b", 1.50))
]


# %%
def through_the_first_three(points):  # -> slope, what it says of the fourth
    n, loss = np.log(points).T
    slope, height = np.polyfit(n[:3], loss[:3], 1)
    return slope, math.exp(height + slope * n[3])


fig, axes = plt.subplots(1, 3, figsize=(6, 2.3))
panels = {
    "toy, by parameters": by_size,
    "toy, by tokens": by_tokens,
    "Llama 2, by parameters": llama2,
}
for ax, (title, points) in zip(axes, panels.items(), strict=True):
    slope, said = through_the_first_three(points)
    n, losses = zip(*points, strict=True)
    line = [said * (x / n[3]) ** slope for x in n]
    ax.loglog(n, line, "gray", linewidth=0.8)
    ax.loglog(n[:3], losses[:3], "o", n[3], losses[3], "s", markersize=4)
    ax.set(title=title, xlabel=title.split()[-1])
    ax.set_yticks([1.5, 2, 3, 4] if max(losses) > 2 else [1.5, 1.6, 1.7])
    ax.yaxis.set_major_formatter("{x:.1f}")
    ax.minorticks_off()
    print(f"{title:22}: foretold {said:.1f}, found {losses[3]:.1f}")
    assert slope < 0
    assert abs(said / losses[3] - 1) < 0.3
axes[0].set_ylabel("loss (nats per token)")
plt.show()
print(f"Llama 2: slope {slope:.2f}, the 70B's loss is foretold to be {said:.2f}")
assert abs(said - 1.50) < 0.01

# %% [markdown]
# Llama 2's four sizes lie on one line: from the first three, the loss of the 70B can be foretold as
# exactly as the figure can be read. The slope is small: ten times the parameters, 14% less loss.
#
# Our toys start out just as straight, from models of 4,000 weights. But the last one by tokens is
# better than foretold, for the tales are a very simple world: once a model has understood what a
# tale is, its loss drops. Then there is nothing left to learn, and it stays where it is. The real
# world has more to offer. After 2T tokens, the losses of Llama 2 were still falling (Touvron et al.
# 2023b, fig. 5).
#
# ## Exercises
#
# **1. How many GPUs?** Training needs 16 bytes for each parameter: weight, gradient, m and v, in
# float32. On `n` GPUs, each holds an equal part of that (notebook 19). Each also reads a row of its
# own, of `max_seq_len` tokens, and keeps the input of each block for it (4 · dim bytes per token).
# Give the least `n` for which it fits.


# %% tags=["exercise-1"]
def gpus_needed(config, gpu_bytes):
    """Give back an int."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
assert gpus_needed(llama2_7b, 80e9) == 2
assert gpus_needed(llama2_7b, 24e9) == 5
assert gpus_needed(LlamaConfig.preset("llama2-70b"), 80e9) == 16
assert gpus_needed(small, 16e9) == 1
print("exercise 1: correct")

# %% [markdown]
# **2. A loss with a leash.** PaLM adds a small term to the loss, so that the scores don't drift
# away: with $L = \ln \sum_i e^{z_i}$, the loss of a position is $L - z_\text{target} + c L^2$.
# Write its gradient with respect to `z` by hand. (What is the derivative of $L$? You have met it.)


# %% tags=["exercise-2"]
def leashed_gradient(z, target, c):
    """`z` are the scores of one position, (vocab,), and `target` is an int; give back (vocab,)."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
z = torch.randn(50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
for target, c in ((0, 0.0), (7, 0.01), (49, 1.0)):
    scores = z.clone().requires_grad_()
    log_sum = scores.logsumexp(-1)
    (expected,) = torch.autograd.grad(log_sum - scores[target] + c * log_sum**2, scores)
    assert_close(leashed_gradient(z, target, c), expected)
print("exercise 2: correct")

# %% [markdown]
# **3. Data that can be resumed.** Write a source of rows that needs no state but the number of the
# step: which rows does step 1, 2, ... read? In each epoch every row comes once, each epoch has an
# order of its own, and a batch may reach into the next epoch. The answer must follow from the
# arguments alone. (`np.random.default_rng([seed, epoch]).permutation(n)` is a good start.)


# %% tags=["exercise-3"]
def rows_of_step(step, batch_size, n_rows, seed):
    """Give back `batch_size` row numbers, each in 0 ... n_rows - 1, as a list."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
late = rows_of_step(7, 4, 10, seed=0)  # asked first, and again below
drawn = [row for step in range(1, 11) for row in rows_of_step(step, 4, 10, seed=0)]
epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
assert len({tuple(epoch) for epoch in epochs}) > 1
assert drawn[24:28] == late == rows_of_step(7, 4, 10, seed=0)
assert [row for step in range(1, 5) for row in rows_of_step(step, 10, 10, seed=0)] == drawn
assert rows_of_step(1, 10, 10, seed=1) != epochs[0]
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/training/optimizer.py`, `minillama/training/schedule.py`: AdamW's settings, the rate.
# - `minillama/training/step.py`, `minillama/training/loop.py`: accumulation, clipping, autocast;
#   `train` and `evaluate`.
# - `minillama/training/loss.py`: the loss, with and without the logits.
# - `minillama/training/checkpointing.py`: none, selective, full.
# - `minillama/training/run.py`, `minillama/training/state.py`: the run, its states, and resuming.
# - `minillama pretrain --help` shows every setting; `--resume` goes on.
#
# Touvron et al. 2023, *LLaMA*, sec. 2.3 and 2.4
# ([arXiv:2302.13971](https://arxiv.org/abs/2302.13971)), and *Llama 2*, sec. 2.2
# ([arXiv:2307.09288](https://arxiv.org/abs/2307.09288)); Loshchilov & Hutter 2017, AdamW
# ([arXiv:1711.05101](https://arxiv.org/abs/1711.05101)); Chen et al. 2016, checkpointing
# ([arXiv:1604.06174](https://arxiv.org/abs/1604.06174)); Kaplan et al. 2020
# ([arXiv:2001.08361](https://arxiv.org/abs/2001.08361)) and Hoffmann et al. 2022
# ([arXiv:2203.15556](https://arxiv.org/abs/2203.15556)), scaling laws; Chowdhery et al. 2022, PaLM
# ([arXiv:2204.02311](https://arxiv.org/abs/2204.02311)).
#
# Next: notebook 9, where the model writes.
