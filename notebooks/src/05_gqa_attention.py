# %% [markdown]
# # 5 · Attention: look things up in the past
#
# **Question.** A story says "Mia found a lamp", and a hundred words later "Mia brought back the
# ...". How does a model look up the word it needs, and what does it cost to keep the past at
# hand?
#
# **You need** notebooks 2 and 3 · **It takes** 45 minutes · **Module**
# `minillama/model/attention.py`, `minillama/model/cache.py`

# %%
import math

import matplotlib.pyplot as plt
import torch

torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# The plainest summary of the past is its average. Six tokens, each a vector of its own; the
# average holds a sixth of each. Whatever we look for, we get the same blend.

# %%
generator = torch.Generator().manual_seed(0)
past = torch.randn(6, 64, generator=generator)
past = past / past.norm(dim=1, keepdim=True)
average = past.mean(0)
print("the average agrees with each token by", past @ average)

# %% [markdown]
# What we want is a *soft lookup*: a **query** says what is sought, each token has a **key** that
# says what it offers and a **value** that it hands over. The better a key fits the query, the
# more of its value comes back. Here the query is the key of token 2, with some noise on it.

# %%
query = past[2] + 0.05 * torch.randn(64, generator=generator)
weights = torch.softmax(10 * (past @ query), dim=0)
print("weights: ", weights)
print("what comes back agrees with token 2 by", round((weights @ past @ past[2]).item(), 2))
assert weights[2] > 0.95

# %% [markdown]
# ## By hand
#
# One head, in loops. For each query: score every key by a dot product, divide by
# $\sqrt{\text{head\_dim}}$, turn scores into weights by softmax, mix the values. A token may look
# at itself and at what came before, not at what comes later: that would be copying the answer.


# %%
def attend_by_hand(q, k, v):  # each (seq, head_dim) -> (seq, head_dim)
    out = []
    for i in range(len(q)):
        scores = [q[i] @ k[j] / math.sqrt(q.shape[1]) for j in range(i + 1)]  # j <= i: the past
        weights = torch.softmax(torch.stack(scores), dim=0)
        out.append(sum(w * v[j] for j, w in enumerate(weights)))
    return torch.stack(out)


# %% [markdown]
# Small enough to check with a pencil: the second query is [0, 2]. Its scores are $0 / \sqrt 2 =
# 0$ and $2 / \sqrt 2 = 1.414$, so the weights are $1 / (1 + e^{1.414}) = 0.196$ and $0.804$.

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
k = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
v = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
print(attend_by_hand(q, k, v))
assert abs(1 / (1 + math.exp(2 / math.sqrt(2))) - 0.196) < 1e-3

# %% [markdown]
# The package does the same for any number of rows and heads at once, in PyTorch's fused kernel.

# %%
from minillama.model import attend

q, k, v = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(1))
torch.testing.assert_close(
    attend_by_hand(q, k, v), attend(*(x[None, None] for x in (q, k, v)))[0, 0]
)
print("equal")

# %% [markdown]
# ## Why divide by the root?
#
# The dot product of two vectors of `head_dim` random entries of variance 1 has a standard
# deviation of $\sqrt{\text{head\_dim}}$. Without the division, wide heads would have scores so
# far apart that softmax puts nearly all weight on one token, whichever it happens to be, and its
# gradient vanishes.

# %%
sizes = [4, 16, 64, 256]
generator = torch.Generator().manual_seed(2)
largest, slope = {True: [], False: []}, {True: [], False: []}
for head_dim in sizes:
    q, k = torch.randn(2, 500, 32, head_dim, generator=generator)
    scores = (q[:, :1] * k).sum(-1)
    for divided in largest:
        weights = (scores / math.sqrt(head_dim) if divided else scores).softmax(-1)
        largest[divided].append(weights.max(-1).values.mean().item())
        # How far a weight p moves with its own score: p (1 - p), summed over the 32 weights.
        slope[divided].append((weights * (1 - weights)).sum(-1).mean().item())
assert largest[False][-1] > 0.8
assert slope[False][-1] < 0.2 < 0.8 < min(slope[True])

fig, axes = plt.subplots(1, 2)
for ax, series, title in zip(
    axes, (largest, slope), ("largest of 32 weights", "how far weights can move"), strict=True
):
    ax.plot(sizes, series[False], "o-", label="not divided")
    ax.plot(sizes, series[True], "o-", label="divided by the root")
    ax.set(title=title, xscale="log", xlabel="head_dim", ylim=(0, 1))
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
axes[0].legend()
plt.show()

# %% [markdown]
# ## Causality
#
# In training, all positions of a text are computed at once. The *mask* makes that honest: it sets
# the score of every later key to $-\infty$, so its weight is 0. Left, what may be seen; right,
# the weights of a random head.

# %%
seq = 12
visible = torch.ones(seq, seq, dtype=torch.bool).tril()
q, k, v = torch.randn(3, seq, 16, generator=torch.Generator().manual_seed(3))
scores = (q @ k.T / 4).masked_fill(~visible, -math.inf)
fig, axes = plt.subplots(1, 2, figsize=(5, 2.4))
for ax, picture, title in zip(
    axes, (visible, scores.softmax(-1)), ("visible", "weights"), strict=True
):
    ax.imshow(picture.numpy(), cmap="Oranges", vmin=0, vmax=1)
    ax.set(title=title, xlabel="key", ylabel="query")
    ax.set_xticks(range(0, seq, 2))
plt.show()
torch.testing.assert_close(scores.softmax(-1) @ v, attend_by_hand(q, k, v))

# %% [markdown]
# The test of causality: change the last token, and nothing before it moves. Not by a rounding
# error: not at all.

# %%
later_k, later_v = k.clone(), v.clone()
later_k[-1] += 1
later_v[-1] += 1
before, after = attend_by_hand(q, k, v), attend_by_hand(q, later_k, later_v)
assert torch.equal(before[:-1], after[:-1])
assert not torch.equal(before[-1], after[-1])
print("positions that changed:", (before != after).any(-1).nonzero().flatten().tolist())

# %% [markdown]
# ## Many heads, fewer keys
#
# One head can look for one thing at a time. A layer has many, each with its own queries: 32 in
# Llama 2 7B. *Multi-head attention* gives each its own keys and values too. *Multi-query*
# attention has one set for all. *Grouped-query* attention (GQA) stands between: each set serves a
# group of neighbouring query heads. Llama 2 34B and 70B have 64 query heads on 8 sets. Why 8 and
# not 1? Such a model runs on 8 GPUs, each with an eighth of the heads. A single set would have to
# lie on each of them anyway; of eight sets, each holds one, which takes no more room.

# %%
fig, axes = plt.subplots(1, 3, figsize=(6, 1.7))
for ax, n_kv_heads, name in zip(
    axes, (8, 2, 1), ("multi-head", "grouped-query", "multi-query"), strict=True
):
    for head in range(8):
        kv_head = head // (8 // n_kv_heads)
        ax.plot([head, (kv_head + 0.5) * 8 / n_kv_heads - 0.5], [1, 0], color=f"C{kv_head}")
        ax.plot(head, 1, "o", color=f"C{kv_head}")
        ax.plot((kv_head + 0.5) * 8 / n_kv_heads - 0.5, 0, "s", color=f"C{kv_head}")
    ax.set(title=f"{name}: {n_kv_heads} KV head{'s' * (n_kv_heads > 1)}", ylim=(-0.4, 1.4))
    ax.set_xticks([])
    ax.set_yticks([0, 1], ["keys, values", "queries"] if n_kv_heads == 8 else ["", ""])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# In numbers: with 6 query heads and 2 KV heads, query head $i$ reads KV head $\lfloor i / 3
# \rfloor$: 0 0 0 1 1 1. So the KV heads are *repeated* one by one. Laying the whole set end to
# end (*tiling*) gives 0 1 0 1 0 1: the same shapes, another model, and no error.

# %%
n_heads, n_kv_heads = 6, 2
kv_heads = torch.arange(n_kv_heads)
print("repeated:", kv_heads.repeat_interleave(n_heads // n_kv_heads).tolist())
print("tiled:   ", kv_heads.repeat(n_heads // n_kv_heads).tolist())

generator = torch.Generator().manual_seed(4)
q = torch.randn(6, 9, 16, generator=generator)
k, v = torch.randn(2, 2, 9, 16, generator=generator)
by_hand = torch.stack([attend_by_hand(q[i], k[i // 3], v[i // 3]) for i in range(6)])
tiled = torch.stack([attend_by_hand(q[i], k[i % 2], v[i % 2]) for i in range(6)])
package = attend(q[None], k[None], v[None])[0]
torch.testing.assert_close(by_hand, package)
wrong = [head for head in range(6) if not torch.allclose(tiled[head], package[head], atol=1e-3)]
print("heads that tiling gets wrong:", wrong)
assert wrong == [1, 4]

# %% [markdown]
# With as many KV heads as query heads, or with all KV heads alike, the three kinds are one.

# %%
alike_k, alike_v = (x[:1].expand(2, -1, -1) for x in (k, v))
torch.testing.assert_close(
    attend(q[None], alike_k[None], alike_v[None]), attend(q[None], k[None, :1], v[None, :1])
)
print("two equal KV heads are one")

# %% [markdown]
# ## The layer
#
# What is around it is short: project to queries, keys and values; turn queries and keys by their
# positions (notebook 2); attend; project back. The naive layer takes one head at a time.

# %%
from minillama.config import LlamaConfig
from minillama.model import Attention, apply_rope, rope_angles

config = LlamaConfig.preset("tiny")  # 6 query heads, 2 KV heads of 8 channels
layer = Attention(config)
x = torch.randn(9, config.dim, generator=torch.Generator().manual_seed(5))
angles = rope_angles(torch.arange(9), config.head_dim, config.rope_theta)


def layer_by_hand(x):  # (seq, dim) -> (seq, dim)
    q, k, v = (w(x).split(config.head_dim, dim=1) for w in (layer.wq, layer.wk, layer.wv))
    turned_k = [apply_rope(head, angles) for head in k]
    heads = [
        attend_by_hand(apply_rope(q[i], angles), turned_k[i // 3], v[i // 3]) for i in range(6)
    ]
    return layer.wo(torch.cat(heads, dim=1))


torch.testing.assert_close(layer_by_hand(x), layer(x[None], angles[None, None])[0])
print("equal")

# %% [markdown]
# ## What a trained model looks at
#
# `data/toy` holds a small Llama that was trained on the toy world's tales, by `minillama demo`.
# It has 4 layers of 3 query heads, which share one KV head. Here is a new story, up to a word
# that none of the last thirty tokens names:

# %%
from minillama import load
from minillama.data import tales

toy, tok = load("../data/toy/checkpoint")
story = next(s for s in tales.corpus("valid") if tales.check(s).plot == "rescue")
animal = str(tales.check(story).cast["animal"])
prefix = story[: story.rindex(f"out the {animal}") + len("out the")]
ids = tok.encode(prefix, bos=True)
mentions = [i for i, token in enumerate(ids) if tok.pieces[token].strip("▁") == animal]
print(f"... {prefix[-75:]} ...\n{len(ids)} tokens; {animal!r} is token {mentions}")
assert len(ids) - mentions[-1] > 30

# %% [markdown]
# Which animal was it? The model has to look it up. To be sure that it does, and that it hasn't
# learned one story by heart, we exchange the animal in the text for each of the others.


# %%
@torch.inference_mode()
def next_word(text):
    logits = toy(torch.tensor([tok.encode(text, bos=True)]))
    return tok.pieces[logits[0, -1].argmax()].strip("▁")


for other in tales.ANIMALS:
    word = next_word(prefix.replace(animal, other))
    print(f"with a {other} in the story, the model goes on: pulled out the {word}")
    assert word == other

# %% [markdown]
# To see where it looks, we walk through the layers with the parts we built above, and keep the
# weights of every head.


# %%
@torch.inference_mode()
def attention_maps(model, ids):  # -> (layer, head, query, key)
    config, maps = model.config, []
    angles = rope_angles(torch.arange(len(ids)), config.head_dim, config.rope_theta)
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    x = model.tok_embeddings(torch.tensor([ids]))
    for layer in model.layers:
        normed = layer.attention_norm(x)[0]
        q = torch.stack(layer.attention.wq(normed).split(config.head_dim, dim=1))
        k = torch.stack(layer.attention.wk(normed).split(config.head_dim, dim=1))
        scores = apply_rope(q, angles) @ apply_rope(k, angles).mT / math.sqrt(config.head_dim)
        maps.append(scores.masked_fill(~visible, -math.inf).softmax(-1))
        x = layer(x, angles[None, None])
    return torch.stack(maps)


maps = attention_maps(toy, ids)
print("layers, heads, queries, keys:", tuple(maps.shape))
assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)

# %% [markdown]
# For the last position, how much of each head's attention falls on the mentions of the animal,
# more than thirty tokens back?

# %%
on_mentions = maps[:, :, -1, mentions].sum(-1)  # (layer, head)
layer_index, head_index = divmod(int(on_mentions.argmax()), on_mentions.shape[1])
print(f"{len(mentions) / len(ids):.0%} of the tokens are {animal!r}.")
print(f"Layer {layer_index}, head {head_index} gives them {on_mentions.max():.0%} of its weight.")
assert on_mentions.max() > 0.8

fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2), width_ratios=[1, 2])
picture = left.imshow(on_mentions.numpy(), cmap="Oranges", vmin=0, vmax=1)
left.set(title=f"weight on {animal!r}", xlabel="head", ylabel="layer", yticks=range(4))
fig.colorbar(picture, ax=left)
right.bar(range(len(ids)), maps[layer_index, head_index, -1].tolist(), color="C1", width=1)
right.plot(mentions, [0.8] * len(mentions), "v", label=animal)
right.legend(loc="upper left")
right.set(title=f"layer {layer_index}, head {head_index}: where the last token looks")
right.set(xlabel="token", ylim=(0, 1))
plt.show()

# %% [markdown]
# That head, over the whole story: each row is a query, each column a key. What lies near the
# diagonal is the text just read; dark spots far from it are look-ups. Blue lines mark the
# mentions of the animal. Beside it, on the left, a head of the first layer.

# %%
fig, axes = plt.subplots(1, 2, figsize=(6, 2.9))
for ax, (layer_at, head_at) in zip(axes, [(0, 0), (layer_index, head_index)], strict=True):
    ax.imshow(maps[layer_at, head_at].sqrt().numpy(), cmap="Oranges", vmin=0, vmax=1)
    ax.set(title=f"layer {layer_at}, head {head_at}", xlabel="key", ylabel="query")
for mention in mentions:
    axes[1].axvline(mention, color="C0", linewidth=0.5, alpha=0.5)
plt.show()

# %% [markdown]
# ## The KV cache
#
# When a model writes, each new token needs the keys and values of all before it. They do not
# change any more, because nothing earlier sees the new token. So they are kept. `KVCache` is that
# memory: with it a text may be read in pieces, and the logits stay the same. To write 60 tokens,
# the model reads 60; without a cache it would read 1 + 2 + ... + 60 = 1,830.

# %%
from minillama.model import KVCache

tokens = torch.tensor([ids[:60]])
with torch.inference_mode():
    whole = toy(tokens)
    for pieces in ([60], [1] * 60, [40, 1, 19]):
        cache = KVCache(toy.config, batch=1, max_len=60)
        parts = [toy(part, cache) for part in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
assert sum(range(1, 61)) == 1830
print("read at once, one by one, or in three pieces: the same logits")

# %% [markdown]
# What does it cost? Per token, layer and KV head: one key and one value of `head_dim` numbers of
# 2 bytes. For Llama 2 7B that is half a mebibyte for every token; a context of 4,096 takes 2 GiB.

# %%
config = LlamaConfig.preset("llama2-7b")
per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2  # bytes
print(
    f"{per_token:,} bytes per token, {per_token * config.max_seq_len / 2**30:.1f} GiB per context"
)
assert per_token == 2 * config.cache_elements_per_token == 524_288

# %% [markdown]
# Grouped queries cut it by `n_heads / n_kv_heads`. The 70B, with 8 KV heads for 64 query heads,
# needs less than the 7B. (In the paper's speed test, at a batch of 1,024 texts of 256 tokens, the
# multi-head model ran out of memory; the grouped and the multi-query one did not.) Here are all
# sizes of Llama 2 as they would be with each kind of attention; a dot marks the kind that each
# was trained with.

# %%
names = ["llama2-7b", "llama2-13b", "llama2-34b", "llama2-70b"]
configs = [LlamaConfig.preset(name) for name in names]
kinds = {
    "multi-head": [config.n_heads for config in configs],
    "grouped, 8 KV heads": [8] * 4,
    "multi-query": [1] * 4,
}
fig, ax = plt.subplots(figsize=(6, 2.6))
for offset, (kind, kv_heads) in zip((-0.25, 0, 0.25), kinds.items(), strict=True):
    for place, (config, n_kv_heads) in enumerate(zip(configs, kv_heads, strict=True)):
        gib = 2 * 2 * config.n_layers * n_kv_heads * config.head_dim * 4096 / 2**30
        color = f"C{list(kinds).index(kind)}"
        ax.bar(place + offset, gib, width=0.25, color=color, label=None if place else kind)
        if n_kv_heads == config.n_kv_heads:
            ax.plot(place + offset, gib * 1.2, "k.")
ax.set_xticks(range(4), names)
ax.set(yscale="log", ylabel="KV cache of 4,096 tokens (GiB)", ylim=(0.04, 60))
ax.legend(ncols=3)
plt.show()
print(f"70B: {2 * configs[-1].cache_elements_per_token:,} bytes per token")
assert 2 * configs[-1].cache_elements_per_token == 327_680

# %% [markdown]
# And all the sizes that were published, as they are: kibibytes per token, in 16 bits.

# %%
from minillama.config import PRESETS

for name, config in PRESETS.items():
    if "llama" in name:
        group = config.n_heads // config.n_kv_heads
        kib = 2 * config.cache_elements_per_token / 1024
        print(f"{name:14} {kib:6,.0f} KiB, {group} query head{'s' * (group > 1)} per KV head")

# %% [markdown]
# ## Attention without the matrix
#
# The weights of a text of $n$ tokens are $n^2$ numbers per head. LLaMA never stores them, and
# doesn't compute those that the mask would hide (sec. 2.4). The trick is that softmax can be
# computed in pieces. Keep, per query, the largest score so far, the sum of $e^{\text{score} -
# \text{largest}}$, and the values mixed with it. When a new block of keys brings a larger score,
# shrink what was summed before by $e^{\text{old} - \text{new}}$.


# %%
def blockwise(q, k, v, block=4):  # each (seq, head_dim); also gives log(sum(exp(scores)))
    largest, total = q.new_full((len(q), 1), -math.inf), q.new_zeros(len(q), 1)
    mixed = torch.zeros_like(q)
    for start in range(0, len(q), block):
        keys, queries = slice(start, start + block), slice(start, None)  # earlier ones see none
        scores = visible_scores(q[queries], k[keys])
        new_largest = torch.maximum(largest[queries], scores.amax(1, keepdim=True))
        shrink, weights = (largest[queries] - new_largest).exp(), (scores - new_largest).exp()
        total[queries] = total[queries] * shrink + weights.sum(1, keepdim=True)
        mixed[queries] = mixed[queries] * shrink + weights @ v[keys]
        largest[queries] = new_largest
    return mixed / total, largest + total.log()


def visible_scores(q, k):  # the first query stands where the first key stands
    scores = q @ k.T / math.sqrt(q.shape[1])
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)


q, k, v = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(6))
torch.testing.assert_close(blockwise(q, k, v)[0], attend_by_hand(q, k, v))
print("equal, with 4 keys at a time")

# %% [markdown]
# The backward pass would need the weights again. Instead of storing them, it computes each block
# anew from q, k and the one number per query that `blockwise` kept. That is an
# `autograd.Function` with its own backward. The weights are $p = e^{s - \mathrm{lse}}$, and the
# gradient of the scores is $p \, (\partial p - \sum p \, \partial p)$, whose sum is that of
# output times its gradient.


# %%
class BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block):
        out, log_sum = blockwise(q, k, v, block)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, log_sum = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (out * grad_out).sum(1, keepdim=True)
        for start in range(0, len(q), ctx.block):
            keys, queries = slice(start, start + ctx.block), slice(start, None)
            weights = (visible_scores(q[queries], k[keys]) - log_sum[queries]).exp()
            grad_v[keys] = weights.T @ grad_out[queries]
            grad_weights = grad_out[queries] @ v[keys].T
            grad_scores = weights * (grad_weights - inner[queries]) / math.sqrt(q.shape[1])
            grad_q[queries] += grad_scores @ k[keys]
            grad_k[keys] = grad_scores.T @ q[queries]
        return grad_q, grad_k, grad_v, None


# %% [markdown]
# Two witnesses, in double precision: finite differences, and PyTorch's own fused kernel, which
# the package calls.

# %%
generator = torch.Generator().manual_seed(7)
q, k, v = torch.randn(3, 10, 4, generator=generator, dtype=torch.float64).requires_grad_().unbind()
assert torch.autograd.gradcheck(lambda *x: BlockwiseAttention.apply(*x, 4), (q, k, v))

ours, fused = BlockwiseAttention.apply(q, k, v, 4), attend(*(x[None, None] for x in (q, k, v)))
torch.testing.assert_close(ours, fused[0, 0])
for one, other in zip(
    *(torch.autograd.grad(o.pow(2).sum(), (q, k, v)) for o in (ours, fused)), strict=True
):
    torch.testing.assert_close(one, other)
print("the output and all three gradients agree with both")

# %% [markdown]
# What has to be held at once, in numbers per head: all weights grow with the square of the text's
# length, a block of 128 keys only in proportion to it. At Llama 2's 4,096 tokens the square is
# 16.8 million numbers, per head and layer.

# %%
lengths = [256, 512, 1024, 2048, 4096]
fig, ax = plt.subplots(figsize=(4, 2.2))
ax.loglog(lengths, [n * n for n in lengths], "o-", label="all weights")
ax.loglog(lengths, [n * 128 for n in lengths], "o-", label="blocks of 128 keys")
ax.set(xlabel="tokens", ylabel="numbers per head")
ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
ax.minorticks_off()
ax.legend()
plt.show()
print(f"{4096**2 / 1e6:.1f} million against {4096 * 128 / 1e6:.1f} million")

# %% [markdown]
# ## What breaks without it
#
# A mask that is off by one lets each token see the next, which is the very answer. In training
# the loss would fall to nothing, and the model would be of no use. The trained toy does not
# expect to see the future, so to it the extra token is noise: its loss goes up.

# %%
from minillama.training import next_token_loss

stories = [torch.tensor([tok.encode(story, bos=True)]) for story in tales.corpus("valid")[:20]]


def loss_with(diagonal):  # nats per token of twenty stories that the toy has not seen
    total = 0.0
    for tokens in stories:
        seq = tokens.shape[1] - 1
        seen = torch.ones(seq, seq, dtype=torch.bool).tril(diagonal)[None, None]
        angles = rope_angles(torch.arange(seq), toy.config.head_dim, toy.config.rope_theta)
        x = toy.tok_embeddings(tokens[:, :-1])
        for layer in toy.layers:
            x = layer(x, angles[None, None], seen)
        total += next_token_loss(toy.output(toy.norm(x)), tokens[:, 1:]).item()
    return total / sum(tokens.shape[1] - 1 for tokens in stories)


with torch.inference_mode():
    right, off_by_one = loss_with(0), loss_with(1)
print(f"right: {right:.2f} nats per token; off by one: {off_by_one:.2f}")
assert off_by_one > 1.5 * right

# %% [markdown]
# ## Exercises
#
# **1. The mask of a continued text.** `past` tokens are in the cache and `seq` new ones are read.
# Say which of the `past + seq` keys each new token sees: `True` = may look.


# %% tags=["exercise-1"]
def visible_after(past, seq):  # -> bool, (seq, past + seq)
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
assert visible_after(0, 3).tolist() == torch.ones(3, 3).tril().bool().tolist()
assert visible_after(2, 2).tolist() == [[True, True, True, False], [True, True, True, True]]
cache = KVCache(toy.config, batch=1, max_len=9)
cache.advance(5)
assert torch.equal(visible_after(5, 4), cache.visible(4)[0, 0])
print("exercise 1: correct")

# %% [markdown]
# **2. How long a context fits?** Given a config and the bytes that are free for the cache, say
# how many whole tokens it can hold, at 2 bytes a number.


# %% tags=["exercise-2"]
def tokens_that_fit(config, free_bytes):  # -> int
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
assert tokens_that_fit(LlamaConfig.preset("llama2-7b"), 2 * 2**30) == 4096
assert tokens_that_fit(LlamaConfig.preset("llama2-70b"), 10 * 2**30) == 32_768
assert tokens_that_fit(LlamaConfig.preset("llama2-7b"), 524_287) == 0
print("exercise 2: correct")

# %% [markdown]
# **3. From many to one.** To turn multi-head attention into grouped-query attention, Ainslie et
# al. average the key (and value) heads of each group. `wk` has `n_heads * head_dim` rows; give
# back the matrix with `n_kv_heads * head_dim` rows.


# %% tags=["exercise-3"]
def pool_heads(
    wk, n_heads, n_kv_heads
):  # (n_heads * head_dim, dim) -> (n_kv_heads * head_dim, dim)
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
heads = torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 3)  # head i is full of i's
pooled = pool_heads(heads, n_heads=4, n_kv_heads=2)
assert pooled.shape == (4, 3)
assert pooled[:, 0].tolist() == [0.5, 0.5, 2.5, 2.5]
wk = torch.randn(8, 3, generator=torch.Generator().manual_seed(8))
assert torch.equal(pool_heads(wk, 4, 4), wk)
torch.testing.assert_close(pool_heads(wk, 4, 1), (wk[:2] + wk[2:4] + wk[4:6] + wk[6:]) / 4)
print("exercise 3: correct")

# %% [markdown]
# **4. Two halves of the past.** Two machines hold one half of the keys and values each. Both
# attend with the same query and report what they found: the mixed values `out`, and `log_sum`,
# the logarithm of the sum of $e^{\text{score}}$ over their keys. Put the reports together, so
# that the result is that of one machine with all keys.


# %% tags=["exercise-4"]
def merge(out_a, log_sum_a, out_b, log_sum_b):  # each (head_dim,) and () -> (head_dim,)
    raise NotImplementedError("exercise 4: yours to write")


# %% tags=["check-4", "raises-exception"]
generator = torch.Generator().manual_seed(9)
for size in (1, 30):  # with scores of this size, e^score must not overflow
    scores, v = size * torch.randn(12, generator=generator), torch.randn(12, 4, generator=generator)
    scores[3] += 200 * (size > 1)
    reports = [
        (scores[part].softmax(0) @ v[part], scores[part].logsumexp(0))
        for part in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(merge(*reports[0], *reports[1]), scores.softmax(0) @ v)
print("exercise 4: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `attend_by_hand` | `attend` in `model/attention.py` | batches, heads, groups, fused kernels |
# | `layer_by_hand` | `Attention` in `model/attention.py` | one path, with and without a cache |
# | reading in pieces | `KVCache` in `model/cache.py` | rows of different lengths |
#
# Vaswani et al. 2017 (arXiv:1706.03762); grouped queries: Ainslie et al. 2023 (arXiv:2305.13245),
# and Llama 2 (arXiv:2307.09288), sec. 2.2. Without the matrix: Rabe & Staats 2021
# (arXiv:2112.05682), Dao et al. 2022 (arXiv:2205.14135), and LLaMA (arXiv:2302.13971), sec. 2.4.
#
# Next: all parts put together, `06_llama`.
