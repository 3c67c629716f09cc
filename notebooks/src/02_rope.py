# %% [markdown]
# # 2 · RoPE: a position is an angle
#
# **Question.** Attention compares words by dot products, and a dot product does not know where a
# word stands. How does the model tell *dog bites man* from *man bites dog*?
#
# **You need** vectors, dot products, sine and cosine · **It takes** 40 minutes · **Module**
# `minillama/model/rope.py`

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
# Here is attention for the last word of a sentence, as small as it gets: one head, random weights.
# The word's *query* is compared with every word's *key*; the better they match, the more of that
# word's *value* is read. The function `place` will give words a position later. For now it does
# nothing.

# %%
generator = torch.Generator().manual_seed(0)
word = {name: torch.randn(8, generator=generator) for name in ("dog", "bites", "man", "today")}
wq, wk, wv = torch.randn(3, 8, 8, generator=generator) / 8**0.5


def last_word_reads(sentence, place=lambda vector, position: vector):
    x = [word[name] for name in sentence.split()]
    query = place(wq @ x[-1], len(x) - 1)
    keys = torch.stack([place(wk @ vector, position) for position, vector in enumerate(x)])
    values = torch.stack([wv @ vector for vector in x])
    return torch.softmax(keys @ query / 8**0.5, dim=0) @ values


# %%
dog_bites_man = last_word_reads("dog bites man today")
man_bites_dog = last_word_reads("man bites dog today")
print(dog_bites_man, man_bites_dog, sep="\n")
torch.testing.assert_close(dog_bites_man, man_bites_dog)

# %% [markdown]
# The same numbers. Each word matches the query as well as before, so the sum is the same: to this
# layer, a sentence is a bag of words. Positions have to enter from outside.
#
# ## A pair of numbers is a clock hand
#
# The idea of RoPE (rotary position embedding): take two channels of a query or key as the tip of a
# clock hand, and turn the hand. How far it is turned says where the word stands.
#
# $$(x, y) \;\mapsto\; (x \cos\alpha - y \sin\alpha,\;\; x \sin\alpha + y \cos\alpha)$$
#
# A quarter turn takes $(3, 4)$ to $(-4, 3)$, and its length stays 5.


# %%
def turn(x, y, angle):  # radians, anticlockwise
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos - y * sin, x * sin + y * cos


quarter = turn(3.0, 4.0, math.pi / 2)
assert math.isclose(math.hypot(*quarter), 5.0)
torch.tensor(quarter)

# %% [markdown]
# Turn the query by its position $m$, the key by its position $n$, each time a fixed angle per
# position. The dot product of two hands is the product of their lengths times the cosine of the
# angle between them. If both move on by ten positions, both turn equally far, and the angle
# *between* them stays. So does the score.


# %%
def pair_score(m, n, q=(1.0, 0.5), k=(0.9, 0.2), speed=0.4):  # speed: radians per position
    (qx, qy), (kx, ky) = turn(*q, m * speed), turn(*k, n * speed)
    return qx * kx + qy * ky


for m, n in [(3, 1), (13, 11), (1003, 1001), (3, 2), (1, 3)]:
    print(f"query at {m:4d}, key at {n:4d}: score {pair_score(m, n):6.3f}")
assert math.isclose(pair_score(3, 1), pair_score(13, 11))
assert math.isclose(pair_score(3, 1), pair_score(1003, 1001))

# %% [markdown]
# The first three pairs are two positions apart and agree. Distance 1 gives another score, and so
# does looking two positions ahead instead of two back: the sign counts as well.


# %%
def draw_hands(ax, hands, colors, title):
    ax.add_patch(plt.Circle((0, 0), 1.2, fill=False, color="lightgray"))
    for (x, y), color in zip(hands, colors, strict=True):
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.5})
    ax.set(title=title, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.axis("off")


fig, axes = plt.subplots(1, 4, figsize=(6, 1.8))
steps = [turn(1.0, 0.5, m * 0.4) for m in range(8)]
blues = [plt.cm.Blues(0.3 + 0.1 * m) for m in range(8)]
draw_hands(axes[0], steps, blues, "a query at 0, 1, ... 7")
for ax, (m, n) in zip(axes[1:], [(3, 1), (5, 3), (9, 7)], strict=True):
    hands = [turn(1.0, 0.5, m * 0.4), turn(0.9, 0.2, n * 0.4)]
    draw_hands(ax, hands, ["C0", "C1"], f"query at {m}, key at {n}\nscore {pair_score(m, n):.3f}")
plt.show()

# %% [markdown]
# *Left: one hand, darker as the position grows. Right: query (blue) and key (orange), two positions
# apart. The picture turns as a whole; its shape, and with it the score, does not change.*
#
# Nothing here ever computed a distance. Each word is turned by its own position, alone, and the dot
# product sees only the difference. So a key can be turned once and kept for all later queries
# (notebook 5).
#
# ## A head is a clock with many hands
#
# One hand is not enough: after a full turn it points where it did before, and positions are
# confused. A clock solves this with hands of different speed. A head of `head_dim` channels has
# `head_dim / 2` pairs, and pair $i$ turns by
#
# $$\theta^{-2i / \mathrm{head\_dim}} \ \text{radians per position}, \qquad \theta = 10\,000$$


# %%
def speeds(head_dim, theta=10_000.0):  # radians per position, one for each pair
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


print([round(speed, 3) for speed in speeds(head_dim=8)])


# %%
def rope(x, position, theta=10_000.0):  # (head_dim,) -> (head_dim,): one token, one head
    turned = x.clone()
    for i, speed in enumerate(speeds(len(x), theta)):
        turned[2 * i], turned[2 * i + 1] = turn(x[2 * i], x[2 * i + 1], position * speed)
    return turned


# %% [markdown]
# With four channels the speeds are 1 and 0.01. At position 1 the two hands $(1, 0)$ and $(1, 0)$
# should have become $(\cos 1, \sin 1)$ and $(\cos 0.01, \sin 0.01)$:

# %%
by_hand = [math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)]
turned = rope(torch.tensor([1.0, 0.0, 1.0, 0.0]), position=1)
torch.testing.assert_close(turned, torch.tensor(by_hand))
turned

# %% [markdown]
# With eight channels the four speeds are powers of ten, and a position can be read off the hands
# like the digits of a number. (The shorter a hand is drawn, the slower it turns.)

# %%
fig, axes = plt.subplots(1, 4, figsize=(6, 1.8))
for ax, position in zip(axes, [0, 1, 10, 100], strict=True):
    hands = rope(torch.tensor([1.0, 0.0] * 4), position).view(4, 2)
    lengths = torch.tensor([1.15, 0.9, 0.65, 0.4])[:, None]
    draw_hands(ax, (hands * lengths).tolist(), ["C0", "C1", "C2", "C3"], f"position {position}")
plt.show()

# %% [markdown]
# ## The same as the package's?
#
# The package turns all tokens, heads and rows of a batch at once. It takes the angles as an
# argument, since every layer uses the same ones.

# %%
from minillama.model import apply_rope, rope_angles

generator = torch.Generator().manual_seed(1)
x = torch.randn(16, 8, generator=generator)  # 16 tokens, one head of 8 channels
angles = rope_angles(torch.arange(16), head_dim=8, theta=10_000.0)
print("angles:", tuple(angles.shape), "one for each position and pair")

by_hand = torch.stack([rope(vector, position) for position, vector in enumerate(x)])
torch.testing.assert_close(apply_rope(x, angles), by_hand)

# %% [markdown]
# Back to the dog and the man. With RoPE as `place`, the two sentences are no longer the same:

# %%
dog_bites_man = last_word_reads("dog bites man today", place=rope)
man_bites_dog = last_word_reads("man bites dog today", place=rope)
print(dog_bites_man, man_bites_dog, sep="\n")
assert not torch.allclose(dog_bites_man, man_bites_dog, atol=0.01)

# %% [markdown]
# ## Only the distance counts
#
# Put one query vector at all positions 0 to 31, one key vector likewise, and take all scores. If
# they depend on $m - n$ only, every diagonal of the table has a single value.

# %%
generator = torch.Generator().manual_seed(2)
q, k = torch.randn(2, 1, 64, generator=generator).expand(2, 32, 64)  # the same at each position
angles = rope_angles(torch.arange(32), head_dim=64, theta=10_000.0)
scores = apply_rope(q, angles) @ apply_rope(k, angles).T

for distance in range(-31, 32):
    diagonal = scores.diagonal(distance)
    torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)

# %%
fig, ax = plt.subplots(figsize=(3.4, 2.6))
image = ax.imshow(scores, cmap="viridis")
ax.set(xlabel="position of the key, $n$", ylabel="position of the query, $m$")
fig.colorbar(image, label="score")
plt.show()

# %% [markdown]
# ## What is far away matches less
#
# Let a query look for exactly what a key offers: $q = k$. At distance 0, all hands of the two
# agree. The further apart they stand, the more hands disagree, the fast ones first. Take the score
# at distance $d$ as a share of the score at distance 0: on average over random vectors it is the
# mean of the cosines of all pairs, $\frac{1}{64}\sum_i \cos(d\,\theta^{-2i/128})$.

# %%
distances = torch.arange(400)
angles = rope_angles(distances, head_dim=128, theta=10_000.0)
expected = angles.cos().mean(-1)

generator = torch.Generator().manual_seed(3)
vectors = torch.randn(200, 1, 128, generator=generator).expand(200, 400, 128)
scores = (apply_rope(vectors, angles) * vectors).sum(-1)  # the other one stays at position 0
share = scores / scores[:, :1]
assert (share.mean(0) - expected).abs().max() < 0.03
print(f"distance 1: {expected[1]:.2f}, 10: {expected[10]:.2f}, 100: {expected[100]:.2f}")

# %%
fig, ax = plt.subplots()
ax.plot(distances, share[:5].T, color="C0", lw=0.5, alpha=0.6)
ax.plot(distances, expected, color="C1", lw=1.5)
ax.set(xlabel="distance, tokens", ylabel="score / score at 0")
plt.show()

# %% [markdown]
# *Blue: five single vectors. Orange: the mean of the cosines.*
#
# The decay is a tendency, with ripples, and no law: trained weights may prefer any distance. In
# exercise 3 you make a head that always looks at the word before.
#
# ## How long until the hands come round?
#
# Pair $i$ has made a full turn after $2\pi\,\theta^{2i/\mathrm{head\_dim}}$ tokens. LLaMA and
# Llama 2 use $\theta = 10\,000$. Code Llama was trained further on texts of 16,384 tokens, and for
# that $\theta$ was raised to 1,000,000: every hand but the first slows down, the last one
# 93-fold (Rozière et al. 2023, sec. 2.4).

# %%
from minillama import LlamaConfig

slowest = []
for name in ("llama2-7b", "codellama-7b"):
    config = LlamaConfig.preset(name)
    period = [2 * math.pi / s for s in speeds(config.head_dim, config.rope_theta)]
    slowest.append(period[-1])
    unfinished = sum(tokens > config.max_seq_len for tokens in period)
    print(f"{name}: the slowest hand needs {slowest[-1]:,.0f} tokens for one turn;")
    print(f"    {unfinished} of {len(period)} hands finish none in {config.max_seq_len:,} tokens")
assert round(slowest[1] / slowest[0]) == 93

# %%
fig, (left, right) = plt.subplots(1, 2)
far = torch.logspace(0, math.log10(16_384), 200).long().unique()
for theta, name in [(1e4, "Llama 2: θ = 10,000"), (1e6, "Code Llama: θ = 1,000,000")]:
    left.semilogy([2 * math.pi / s for s in speeds(128, theta)], label=name)
    right.semilogx(far, rope_angles(far, 128, theta).cos().mean(-1))
for context in (4096, 16_384):
    left.axhline(context, color="gray", lw=0.8, ls="--")
    left.text(0, context * 1.2, f"{context:,} tokens", color="gray")
left.set(xlabel="pair", ylabel="tokens for one full turn")
right.set(xlabel="distance, tokens", ylabel="score / score at 0")
left.legend()
plt.show()

# %% [markdown]
# *Right: what the larger θ is for. With 10,000, a match that is thousands of tokens away counts for
# no more than no match at all; with 1,000,000 it still counts.*
#
# ## What breaks: angles in low precision
#
# Large models compute in bfloat16, which keeps 8 significant bits. Weights can live with that.
# Positions cannot: there is no 257.

# %%
positions = torch.arange(4096)
different = positions.bfloat16().unique().numel()
print("257 in bfloat16:", positions[257].bfloat16().item())
print(f"{different} of 4096 positions stay different")
assert positions[257].bfloat16() == 256

# %% [markdown]
# Nor does it help to compute the angles well and store them badly, as happens to a buffer when
# somebody calls `model.bfloat16()`. The fastest hand is then up to four radians off, more than half
# a turn. Below, one query and one key stand next to each other, at every place of the text. The
# score should be the same everywhere.

# %%
angles = rope_angles(torch.arange(2048), head_dim=128, theta=10_000.0)
rounded = angles.bfloat16().float()
print(f"largest error: {(rounded - angles).abs().max():.1f} radians")

generator = torch.Generator().manual_seed(4)
q, k = torch.randn(2, 1, 128, generator=generator).expand(2, 2048, 128)
neighbours = {}
for name, table in [("angles in bfloat16", rounded), ("angles in float32", angles)]:
    neighbours[name] = (apply_rope(q, table)[1:] * apply_rope(k, table)[:-1]).sum(-1)
    print(f"{name}: the score varies by {neighbours[name].std():.2f}")
assert neighbours["angles in float32"].std() < 0.01 < neighbours["angles in bfloat16"].std()

# %%
fig, ax = plt.subplots()
ax.plot(neighbours["angles in bfloat16"], color="C1", lw=0.6, label="angles in bfloat16")
ax.plot(neighbours["angles in float32"], color="C0", label="angles in float32")
ax.set(xlabel="position", ylabel="score with the word before")
ax.legend()
plt.show()

# %% [markdown]
# So `rope_angles` computes in float32, anew in each call, and stores nothing.
#
# ## Two layouts of the same weights
#
# *Which* two channels form a pair is a convention. In Meta's weights neighbours do, as above.
# Hugging Face's code pairs channel $i$ with channel $i + \mathrm{head\_dim}/2$: one from each half.

# %%
layouts = {"Meta": [0, 0, 1, 1, 2, 2, 3, 3], "Hugging Face": [0, 1, 2, 3, 0, 1, 2, 3]}
fig, axes = plt.subplots(2, 1, figsize=(4.5, 1.5))
for ax, (name, pairs) in zip(axes, layouts.items(), strict=True):
    ax.imshow([pairs], cmap="tab10", vmax=9, aspect="auto")
    for channel, pair in enumerate(pairs):
        ax.text(channel, 0, f"pair {pair}", ha="center", va="center", color="white")
    ax.set(xticks=range(8), yticks=[], title=f"{name}: channels 0 to 7")
plt.show()


# %%
def rope_halves(x, position, theta=10_000.0):  # (head_dim,) -> (head_dim,), the other layout
    turned, half = x.clone(), len(x) // 2
    for i, speed in enumerate(speeds(len(x), theta)):
        turned[i], turned[i + half] = turn(x[i], x[i + half], position * speed)
    return turned


# %% [markdown]
# A dot product does not care about the order of channels, as long as query and key agree. Moving
# the channels of a query means moving the rows of `wq`. So there is a way from one layout to the
# other: rows 0 2 4 6 (the first of each pair), then 1 3 5 7 (the second). First the weights as
# they are, then reordered:

# %%
from minillama.checkpoint.huggingface import halves_from_pairs

generator = torch.Generator().manual_seed(5)
text = torch.randn(12, 8, generator=generator)  # 12 tokens


def all_scores(wq, wk, rope):  # (query position, key position), one head
    queries = [rope(wq @ token, position) for position, token in enumerate(text)]
    keys = [rope(wk @ token, position) for position, token in enumerate(text)]
    return torch.stack(queries) @ torch.stack(keys).T


meta = all_scores(wq, wk, rope)
unchanged = all_scores(wq, wk, rope_halves)
order = [0, 2, 4, 6, 1, 3, 5, 7]
reordered = all_scores(wq[order], wk[order], rope_halves)

print(f"weights as they are: off by up to {(unchanged - meta).abs().max():.2f}")
print(f"rows reordered:      off by up to {(reordered - meta).abs().max():.2f}")
torch.testing.assert_close(reordered, meta)
assert torch.equal(wq[order], halves_from_pairs(wq, n_heads=1))

# %% [markdown]
# ## What breaks: one wrong number
#
# With several heads, each head's rows are reordered by themselves, so the function must know how
# many heads there are. In Llama 2 70B the keys have fewer heads than the queries: `n_kv_heads`, not
# `n_heads` (notebook 5). Take 4 query heads and 2 key heads of 8 channels, and watch which rows of
# `wk` end up where:

# %%
rows = torch.arange(16.0)[:, None]
for n_heads in (2, 4):
    moved = halves_from_pairs(rows, n_heads=n_heads).flatten()
    print(f"n_heads={n_heads}:", *(f"{int(row):2d}" for row in moved))
    assert sorted(moved.tolist()) == list(range(16))

# %% [markdown]
# Both are valid orders of 16 rows. Nothing has the wrong shape, and no error will ever be raised.

# %%
generator = torch.Generator().manual_seed(6)
wk_2_heads = torch.randn(16, 8, generator=generator) / 8**0.5
keys = {n: halves_from_pairs(wk_2_heads, n_heads=n)[:8] for n in (2, 4)}  # the first key head
meta = all_scores(wq, wk_2_heads[:8], rope).flatten()
right = all_scores(wq[order], keys[2], rope_halves).flatten()
wrong = all_scores(wq[order], keys[4], rope_halves).flatten()

torch.testing.assert_close(right, meta)
agreement = torch.corrcoef(torch.stack([wrong, meta]))[0, 1]
print(f"correlation of the wrong scores with the right ones: {agreement:.2f}")
assert agreement < 0.8

# %%
fig, axes = plt.subplots(1, 2, figsize=(5, 2.6), sharey=True)
for ax, scores, title in [
    (axes[0], right, "reordered as 2 heads (n_kv_heads)"),
    (axes[1], wrong, "reordered as 4 heads (n_heads)"),
]:
    ax.plot(meta, scores, ".", ms=4)
    ax.set(title=title, xlabel="score in Meta's layout")
axes[0].set_ylabel("score in Hugging Face's")
plt.show()

# %% [markdown]
# This is a bug that one finds only by comparing numbers, which is why the package's tests compare
# logits with Hugging Face's model, for grouped heads as well.
#
# ## Exercises
#
# Replace the line that raises, run the cell, then run the check below it. Solutions are in
# `solutions/02_rope.py`.
#
# **1. Turn back.** Given turned vectors and the angles, recover the vectors. (One line. What is the
# opposite of turning by an angle?)


# %% tags=["exercise-1"]
def undo_rope(turned, angles):  # (seq, head_dim), (seq, head_dim / 2) -> (seq, head_dim)
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
x = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
angles = rope_angles(torch.arange(10), head_dim=8, theta=10_000.0)
torch.testing.assert_close(undo_rope(apply_rope(x, angles), angles), x)
print("exercise 1: correct")

# %% [markdown]
# **2. The way Meta writes it.** A pair $(x, y)$ is also a complex number $x + iy$, and turning it
# by $\alpha$ is a multiplication by $e^{i\alpha}$. Write RoPE with `torch.view_as_complex`,
# `torch.polar` and `torch.view_as_real`. (`view_as_complex` wants a last axis of size 2.)


# %% tags=["exercise-2"]
def complex_rope(x, angles):  # (seq, head_dim), (seq, head_dim / 2) -> (seq, head_dim)
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
x = torch.randn(10, 8, generator=torch.Generator().manual_seed(2))
angles = rope_angles(torch.arange(10), head_dim=8, theta=10_000.0)
torch.testing.assert_close(complex_rope(x, angles), apply_rope(x, angles))
print("exercise 2: correct")

# %% [markdown]
# **3. A head that looks at the word before.** All queries of this head are the same vector `q`, all
# keys the same vector `k`; only positions differ. Which `k`, for a given `q`, gives the highest
# score at the key *one position before* the query, wherever the query stands? (Which key, turned
# by $n$, points the way `q` does when turned by $n + 1$?)


# %% tags=["exercise-3"]
def key_of_the_word_before(q):  # (head_dim,) -> (head_dim,)
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
q = torch.randn(64, generator=torch.Generator().manual_seed(3))
k = key_of_the_word_before(q)
angles = rope_angles(torch.arange(20), head_dim=64, theta=10_000.0)
scores = apply_rope(q.expand(20, 64), angles) @ apply_rope(k.expand(20, 64), angles).T
assert scores[1:].argmax(dim=-1).tolist() == list(range(19))
print("exercise 3: correct")

# %% [markdown]
# **4. A base for a longer context.** Which θ makes the *slowest* hand need exactly `tokens` tokens
# for one full turn? (With it, no two positions of the context have all hands alike.)


# %% tags=["exercise-4"]
def theta_for(tokens, head_dim):  # -> float
    raise NotImplementedError("exercise 4: yours to write")


# %% tags=["check-4", "raises-exception"]
for tokens, head_dim in [(4096, 64), (100_000, 128)]:
    slowest = speeds(head_dim, theta_for(tokens, head_dim))[-1]
    assert math.isclose(2 * math.pi / slowest, tokens)
print("exercise 4: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `speeds` | `rope_angles` in `minillama/model/rope.py` | all positions and pairs at once |
# | `turn`, `rope` | `apply_rope` in `minillama/model/rope.py` | any number of rows and heads |
# | `order` | `halves_from_pairs` in `minillama/checkpoint/huggingface.py` | any number of heads |
#
# Su et al. 2021, *RoFormer* (arXiv:2104.09864), sec. 3.2 to 3.4: the rotation, its relative scores,
# the decay. Touvron et al. 2023a (arXiv:2302.13971), sec. 2.2: RoPE at each layer, instead of
# learned positions. Rozière et al. 2023, *Code Llama* (arXiv:2308.12950), sec. 2.4: θ = 1,000,000.
#
# Next: what keeps the numbers in range, `03_rmsnorm`.
