# %% [markdown]
# # 6 · Llama: the whole model on one page
#
# **Question.** Norm, rotation, attention, gate: the parts are on the table. How do they become a
# language model, how large does it get, and how can you be sure that it is *the* Llama?
#
# **You need** notebooks 2 to 5 · **It takes** 40 minutes · **Module** `minillama/model/llama.py`

# %%
import ast
import inspect
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.8), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The problem, seen
#
# Attention and the feed-forward layer both turn a row of vectors into a row of vectors of the same
# size. So they can be chained: the output of one is the input of the next, as deep as you like.
#
# Here are two models of four layers. `Chain` does just that. `Block` comes from the package and
# differs by two plus signs: it *adds* each output to its input. Everything else is the same,
# including the first weights.

# %%
from minillama.model import Block


class Chain(Block):
    def forward(self, x, angles, visible=None, cache=None):
        x = self.attention(self.attention_norm(x), angles)  # Block: x + attention(...)
        return self.feed_forward(self.ffn_norm(x))  # Block: x + feed_forward(...)


# %% [markdown]
# Both read stories of the toy world letter by letter and learn to predict the next letter.

# %%
from minillama import Llama, LlamaConfig
from minillama.data.tales import stories

text = "\n".join(stories(200, seed=0))
letters = sorted(set(text))
ids = torch.tensor([letters.index(letter) for letter in text])
config = LlamaConfig(
    dim=48, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=128,
    vocab_size=len(letters), max_seq_len=64,
)  # fmt: skip


def letter_model(block):
    generator = torch.Generator().manual_seed(0)
    model = Llama(config, generator)
    model.layers = nn.ModuleList(block(config) for _ in range(config.n_layers))
    for weight in model.layers.parameters():
        if weight.dim() == 2:  # at this scale a matrix neither shrinks nor grows what passes
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
    return model


def learn(model, steps=100, batch_size=8):
    generator, losses = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        starts = torch.randint(len(ids) - 64, (batch_size, 1), generator=generator)
        rows = ids[starts + torch.arange(65)]
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


# %% [markdown]
# How good is good? A model that knows only how *frequent* each letter is, and looks at no letter
# before, can reach the entropy of these frequencies: $-\sum_i p_i \ln p_i$.

# %%
blocks = {"chain": Chain, "sum": Block}
losses = {name: learn(letter_model(block)) for name, block in blocks.items()}
frequencies = ids.bincount() / len(ids)
entropy = -(frequencies * frequencies.log()).sum().item()
for name, curve in losses.items():
    print(f"{name:5}  {curve[-20:].mean():.1f} nats per letter at the end")
print(f"letter frequencies alone: {entropy:.1f}")
assert abs(losses["chain"][-20:].mean() - entropy) < 0.1
assert losses["sum"][-20:].mean() < entropy - 0.5

fig, ax = plt.subplots(figsize=(6, 2.3))
for name, curve in losses.items():
    ax.plot(curve, label=name)
ax.axhline(entropy, color="gray", linestyle=":", label="letter frequencies alone")
ax.set(xlabel="step", ylabel="loss (nats per letter)", ylim=(2, 4))
ax.legend()
plt.show()

# %% [markdown]
# The chain has learned the frequencies and stops there. Why? Let us ask what is left of a letter at
# the top. We take the same 63 letters of a story, put each letter of the alphabet behind them in
# turn, and compare the vectors that come out for it, before any training. A cosine of 1 means: the
# same vector, whichever letter it was.

# %%
alphabet = torch.arange(len(letters))[:, None]
texts = torch.cat((ids[:63].expand(len(letters), 63), alphabet), dim=1)
cosines = {}
for name, block in blocks.items():
    with torch.no_grad():
        x = nn.functional.normalize(letter_model(block).hidden(texts)[:, -1], dim=-1)
    different = ~torch.eye(len(letters), dtype=torch.bool)
    cosines[name] = (x @ x.T)[different].mean()
    print(f"{name:5}  mean cosine between the vectors of two letters: {cosines[name]:.2f}")
assert cosines["chain"] > 0.95
assert cosines["sum"] < 0.8

# %% [markdown]
# In the chain, four rounds of mixing have left nearly the same vector for every letter: there is
# nothing to learn from, and no layer has learned to carry the letter through. With the plus signs
# nobody has to. What went in *stays*, and a layer only has to learn what to put beside it.
#
# ## The residual stream
#
# So the model isn't a chain of layers. It is a *stream*: one vector per token that runs from the
# bottom to the top. A layer reads a normalised copy of it, and adds what it found. Nothing is ever
# overwritten.

# %%
fig, ax = plt.subplots(figsize=(5.4, 3))
arrow = {"arrowstyle": "-|>"}
ax.annotate("", (0, 9.2), (0, 0), arrowprops=arrow | {"lw": 3, "color": "C0"})
ax.text(-0.35, 4.6, "the stream: dim numbers per token", rotation=90, ha="center", va="center")
sub_layers = [
    (1.5, "attention_norm", "attention:\nwhat do the tokens before say?"),
    (5.0, "ffn_norm", "feed_forward:\nwhat follows from it?"),
]
for y, norm, layer in sub_layers:
    ax.plot([0, 4.4, 4.4], [y, y, y + 1.6], color="black", lw=1, zorder=0)  # behind the boxes
    ax.text(1.6, y, norm, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white"})
    ax.text(4.4, y, layer, ha="center", va="center", bbox={"boxstyle": "round", "fc": "wheat"})
    ax.annotate("", (0.1, y + 1.6), (4.4, y + 1.6), arrowprops=arrow)
    ax.text(0, y + 1.6, "+", ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
ax.plot([6.1, 6.2, 6.2, 6.1], [0.8, 0.8, 7.3, 7.3], color="gray")
ax.text(6.35, 4, "a block,\nn_layers times", va="center")
ax.text(0.2, 0, "in: tok_embeddings[token]", va="center")
ax.text(0.2, 9, "out: norm, then a logit for each token of the vocabulary", va="center")
ax.set(xlim=(-0.6, 7.8), ylim=(-0.4, 9.4))
ax.axis("off")
plt.show()

# %% [markdown]
# ## By hand
#
# A stream of two numbers, a vocabulary of three tokens. The embedding of token 0 is $(3, 4)$. Its
# root mean square is $\sqrt{12.5}$, so the norm makes $(0.849, 1.131)$ of it. The head compares
# this with one row per token. The largest logit wins.

# %%
embedding = torch.tensor([3.0, 4.0])
head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # a row for each of the three tokens


def predict(stream):
    return head @ (stream / stream.pow(2).mean().sqrt())


before = predict(embedding)
print("without a layer:", before, "-> token", before.argmax().item())
assert before.argmax() == 1

# %% [markdown]
# Now a layer that adds $(1, -1)$. The stream is $(4, 3)$ afterwards, and another token wins. This
# is all a layer can ever do: move the stream, so that the head reads something else.

# %%
written = torch.tensor([1.0, -1.0])
after = predict(embedding + written)
print("with a layer:   ", after, "-> token", after.argmax().item())
assert after.argmax() == 0

# %% [markdown]
# The package's model, with these numbers put into its weights, says the same. (A token that is
# alone attends to itself with weight 1, so attention is `wo @ wv @ x` here. We let the
# feed-forward layer write nothing.)

# %%
smallest = Llama(
    LlamaConfig(
        dim=2, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=2, vocab_size=3, max_seq_len=4
    )
)
layer = smallest.layers[0]
with torch.no_grad():
    smallest.tok_embeddings.weight[0] = embedding
    smallest.output.weight.copy_(head)
    layer.feed_forward.w2.weight.zero_()
    layer.attention.wv.weight.copy_(torch.eye(2))
    layer.attention.wo.weight.copy_(torch.diag(written / layer.attention_norm(embedding)))
    assert_close(smallest(torch.tensor([[0]]))[0, 0], after)
print("the same logits: True")

# %% [markdown]
# ## The model in six lines
#
# The general case is no longer than that. Look up the tokens, let each layer add twice, normalise,
# compare with the head. Here are the parts of the package's `tiny` model, called one by one:

# %%
from minillama.model import rope_angles

model = Llama(LlamaConfig.preset("tiny"), generator)
tokens = torch.randint(512, (1, 12), generator=generator)
angles = rope_angles(torch.arange(12)[None, None], model.config.head_dim, model.config.rope_theta)

with torch.no_grad():
    x = model.tok_embeddings(tokens)
    for layer in model.layers:
        x = x + layer.attention(layer.attention_norm(x), angles)
        x = x + layer.feed_forward(layer.ffn_norm(x))
    logits = model.output(model.norm(x))
    assert_close(logits, model(tokens))
print("logits:", tuple(logits.shape), "= (batch, seq, vocab)")

# %% [markdown]
# ## The whole model on one page
#
# This is the package itself: not a copy, but the source of the classes that you have just called,
# without their docstrings. In the order of the course: norm (3), rotation (2), attention (5),
# feed-forward layer (4), block and model. Two things are general that the notebooks kept simple:
# batches, and the optional `cache`.


# %%
def without_docstrings(source):
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            last += isinstance(node, ast.ClassDef)  # the blank line below it
            lines[first:last] = [None] * (last - first)
    return "\n".join(line for line in lines if line is not None)


from minillama.model import Attention, FeedForward, RMSNorm, apply_rope, attend

page = [RMSNorm, rope_angles, apply_rope, attend, Attention, FeedForward, Block, Llama]
page = "\n\n\n".join(without_docstrings(inspect.getsource(part)).strip() for part in page)
print(page)
assert page.count("\n") < 200

# %% [markdown]
# Read `Llama.hidden` last and compare it with our six lines: the loop is there, between a check of
# the length and a line about the cache.
#
# ## How large is it?
#
# Every parameter sits in one of seven matrices per layer, two norms per layer, the embeddings, the
# head and the last norm. Counting them is a matter of shapes. For 7B:

# %%
dim, n_layers, hidden_dim, vocab = 4096, 32, 11008, 32000
attention = 4 * dim * dim  # wq, wk, wv, wo
feed_forward = 3 * dim * hidden_dim  # w1, w2, w3
norms = 2 * dim
total = vocab * dim + n_layers * (attention + feed_forward + norms) + dim + vocab * dim
print(f"a layer: {attention:,} + {feed_forward:,} + {norms:,}")
print(f"in all:  {total:,}")
assert total == 6_738_415_616

# %% [markdown]
# The general rule has one more name in it: with grouped-query attention, `wk` and `wv` are
# narrower, `n_kv_heads * head_dim`. With it, here are all published sizes. The numbers are those of
# Meta's own weights. (The 34B of Llama 2 was never released; its row assumes the width of Code
# Llama's 34B.) We compare three things: our count, the package's formula, and the models
# themselves, which PyTorch can build on its *meta* device: tensors with a shape and no memory.


# %%
def count(config):
    kv_dim = config.n_kv_heads * config.head_dim
    return {
        "attention": config.n_layers * 2 * config.dim * (config.dim + kv_dim),
        "feed-forward": config.n_layers * 3 * config.dim * config.hidden_dim,
        "embeddings": config.vocab_size * config.dim,
        "output": 0 if config.tie_embeddings else config.vocab_size * config.dim,
        "norms": (2 * config.n_layers + 1) * config.dim,
    }


published = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
}
for name, n_parameters in published.items():
    config = LlamaConfig.preset(name)
    with torch.device("meta"):
        model = Llama(config)
    on_meta = sum(parameter.numel() for parameter in model.parameters())
    assert sum(count(config).values()) == config.n_parameters == on_meta == n_parameters
    print(f"{name:14} {n_parameters:>14,} parameters {2 * n_parameters / 1e9:6.1f} GB in 16 bits")

# %% [markdown]
# To the last digit, all twelve. Where are they? In 7B, most of them are in the feed-forward
# layers. The norms are there, too: 0.004 percent, a slice too thin to see.

# %%
parts = count(LlamaConfig.preset("llama2-7b"))
fig, ax = plt.subplots(figsize=(5, 2.6))
ax.pie(parts.values(), startangle=90, counterclock=False, wedgeprops={"edgecolor": "white"})
ax.legend(
    [f"{name}: {n:,} ({n / total:.3%})" for name, n in parts.items()],
    title=f"Llama 2 7B: {total:,} parameters",
    loc="center left",
    bbox_to_anchor=(1, 0.5),
    frameon=False,
)
plt.show()
assert 0.6 < parts["feed-forward"] / total < 0.7
assert 0.3 < parts["attention"] / total < 0.35

# %% [markdown]
# Small models look different. The vocabulary costs `vocab_size * dim`, the layers cost
# `n_layers * dim²` times about twelve. So the vocabulary weighs heavily in a narrow model and
# nearly nothing in a wide one.

# %%
names = ["toy", "stories15m", "llama2-7b", "llama2-13b", "llama-33b", "llama-65b", "llama2-70b"]
sizes = [LlamaConfig.preset(name) for name in names]
fig, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": [4, 3]})
shares = torch.tensor([[n / c.n_parameters for n in count(c).values()] for c in sizes])
start = torch.zeros(len(names))
for index, part in enumerate(parts):
    left.barh(names, shares[:, index], left=start, color=f"C{index}", label=part)
    start += shares[:, index]
left.invert_yaxis()
left.set(xlabel="share of the parameters", xlim=(0, 1))
left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=3, frameon=False)
right.loglog([c.dim for c in sizes], [c.n_parameters for c in sizes], "o", label="the model")
thumb = [12 * c.n_layers * c.dim**2 for c in sizes]
right.loglog([c.dim for c in sizes], thumb, "x", color="black", label="12 · n_layers · dim²")
right.set(xlabel="dim", ylabel="parameters")
right.legend(loc="lower right", fontsize=7)
plt.show()
ratios = {name: c.n_parameters / n for name, c, n in zip(names, sizes, thumb, strict=True)}
assert all(0.95 < ratios[name] < 1.1 for name in names[2:])

# %% [markdown]
# The crosses are a rule worth remembering: **parameters ≈ 12 · n_layers · dim²**. Four `dim²` are
# in attention, eight in the feed-forward layer (three matrices of 8/3). For the large models it is
# right within ten percent.
#
# ## The first weights
#
# Meta never published how the weights were drawn before training. The package does what GPT-2 did:
# normal numbers with a standard deviation of 0.02, and for the two matrices that *write* to the
# stream, `wo` and `w2`, this divided by $\sqrt{2 \cdot \text{n\_layers}}$. Why?
#
# First the 0.02. It is a number for wide models. A query is a sum of `dim` products, and so is a
# key; it follows that attention scores start with a standard deviation of $\text{std}^2 \cdot
# \text{dim}$. At a width of 4096 this is 1.6, so every token looks at some others more than at the
# rest. At the width of our toy it is 0.04: every token looks at all others alike, and attention has
# a hard time to begin. Small models need larger numbers; the toy's recipe says `init_std=0.1`.

# %%
for width, head_dim, std in ((4096, 128, 0.02), (96, 32, 0.02), (96, 32, 0.1)):
    x = torch.randn(200, width, generator=generator)  # the normalised vectors of 200 tokens
    wq, wk = std * torch.randn(2, head_dim, width, generator=generator)
    scores = (x @ wq.T) @ (x @ wk.T).T / head_dim**0.5
    largest = scores.softmax(-1).max(-1).values.mean().item()
    print(
        f"dim {width:4}, std {std:.2f}: scores {scores.std():.2f} (rule: {std**2 * width:.2f}), "
        f"largest weight {200 * largest:5.1f} times the mean"
    )
    assert abs(scores.std() / (std**2 * width) - 1) < 0.2

# %% [markdown]
# Now the division. At the start, what the layers write has nothing to do with each other. Variances
# of independent numbers add up. So after $n$ writes the variance is $n$ times that of one, unless
# each is divided by $\sqrt n$. By hand:

# %%
for n in (4, 16, 64):
    writes = torch.randn(n, 10_000, generator=generator)
    plain, divided = writes.sum(0).std().item(), (writes / n**0.5).sum(0).std().item()
    print(f"{n:2} writes: standard deviation {plain:.1f}, divided by sqrt({n}): {divided:.1f}")
    assert abs(plain - n**0.5) < 0.2 * n**0.5 / 4
    assert abs(divided - 1) < 0.05


# %% [markdown]
# The same in real models of 2, 8 and 32 layers: how large are the numbers in the stream, and how
# does this change from layer to layer?


# %%
@torch.no_grad()
def stream_sizes(n_layers, divide):
    sizes = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 688}
    config = LlamaConfig(n_layers=n_layers, vocab_size=256, max_seq_len=32, **sizes)
    model = Llama(config, torch.Generator().manual_seed(0))
    angles = rope_angles(torch.arange(32)[None, None], config.head_dim, config.rope_theta)
    x = model.tok_embeddings(torch.arange(32)[None])
    rms = [x.pow(2).mean().sqrt().item()]
    for layer in model.layers:
        if not divide:
            layer.attention.wo.weight *= (2 * n_layers) ** 0.5
            layer.feed_forward.w2.weight *= (2 * n_layers) ** 0.5
        x = layer(x, angles)
        rms.append(x.pow(2).mean().sqrt().item())
    return rms


fig, axes = plt.subplots(1, 2, sharey=True, figsize=(6, 2.4))
for ax, divide in zip(axes, (False, True), strict=True):
    ends = []
    for n_layers in (2, 8, 32):
        rms = stream_sizes(n_layers, divide)
        ax.plot(torch.linspace(0, 1, n_layers + 1), rms, marker=".", label=f"{n_layers} layers")
        ends.append(rms[-1])
    ax.set(title="divided by √(2 n_layers)" if divide else "0.02 everywhere", xlabel="depth")
    print(f"divided: {divide!s:5}  size of the stream at the end:", torch.tensor(ends))
    assert (ends[-1] < 1.5 * ends[0]) == divide
axes[0].set(ylabel="root mean square of the stream")
axes[0].legend()
plt.show()

# %% [markdown]
# Left, 32 layers end six times as high as 2; the late layers add to a stream that drowns what they
# say. Right, the depth hardly matters, and every layer starts with an equal say.
#
# ## What an untrained model knows
#
# Nothing. All logits are nearly equal, so every token has nearly the probability `1 / vocab_size`,
# and the loss is nearly `ln(vocab_size)`. Remember this number: if the first loss that you see is
# far from it, something is wrong *before* training begins.
#
# The last line shows such a case: a head drawn with standard deviation 1 instead of 0.02. It isn't
# *less* ignorant, but very sure of itself, and training would spend its first steps on unlearning.

# %%
for vocab_size in (128, 1024, 32_000):
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128,
        vocab_size=vocab_size, max_seq_len=64,
    )  # fmt: skip
    model = Llama(config, torch.Generator().manual_seed(0))
    rows = torch.randint(vocab_size, (8, 65), generator=generator)
    with torch.no_grad():
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    print(
        f"vocabulary {vocab_size:6,}: loss {loss:.2f}, ln({vocab_size}) {math.log(vocab_size):.2f}"
    )
    assert abs(loss - math.log(vocab_size)) < 0.05

with torch.no_grad():
    model.output.weight *= 50
    loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
print(f"vocabulary {vocab_size:6,}: loss {loss:.2f} with a head that is 50 times as large")
assert loss > 3 * math.log(vocab_size)

# %% [markdown]
# ## Body and head
#
# The model can be called in two places. `model.hidden(tokens)` is the body: the normalised stream
# after the last layer. `model(tokens)` puts the head on it. Whoever generates text needs the
# logits of the last token only, and the logits are the largest thing around:

# %%
with torch.no_grad():
    body = model.hidden(rows[:, :-1])
    assert_close(model.output(body), model(rows[:, :-1]))
    assert_close(model.output(body[:, -1]), model(rows[:, :-1])[:, -1])
print("hidden:", tuple(body.shape), " logits:", (*body.shape[:2], vocab_size))
config = LlamaConfig.preset("llama2-7b")
gigabytes = config.max_seq_len * config.vocab_size * 4 / 1e9
print(f"all logits of one full context of 7B: {gigabytes:.2f} GB in float32")

# %% [markdown]
# The head is a matrix like any other, so it can be held into the stream at any depth. This shows a
# prediction while it takes shape. We need a trained model for that: the small one that lies in
# `data/toy`. It has learned the toy world's stories; here it reads the end of a new one.

# %%
from minillama import load
from minillama.data.tales import corpus

toy, tok = load("../data/toy/checkpoint")
story = corpus("valid")[0]
tokens = torch.tensor([tok.encode(story, bos=True)])
config, position = toy.config, torch.arange(tokens.shape[1])[None, None]
angles = rope_angles(position, config.head_dim, config.rope_theta)
with torch.no_grad():
    stream = [toy.tok_embeddings(tokens)]
    for layer in toy.layers:
        stream.append(layer(stream[-1], angles))
    logits = torch.stack([toy.output(toy.norm(x[0, :-1])) for x in stream])
    assert_close(logits[-1], toy(tokens)[0, :-1])
right = logits.softmax(-1)[:, torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
for depth, p in enumerate(right):
    print(f"depth {depth}: the right token gets {p.mean():.2f} on average")
assert (right.mean(dim=1).diff() > 0).all()

last = 22  # tokens to show
fig, ax = plt.subplots(figsize=(6, 2.4))
image = ax.imshow(right[:, -last:], cmap="Blues", vmin=0, vmax=1, aspect="auto")
pieces = [tok.pieces[i] for i in tokens[0, -last:].tolist()]
ax.set_xticks(range(last), pieces, rotation=60, ha="right", rotation_mode="anchor")
ax.set_yticks(range(len(right)), ["embedding", *(f"layer {n}" for n in range(1, len(right)))])
ax.set(title="Probability that the head gives to the token below, at each depth of the stream")
ax.invert_yaxis()
fig.colorbar(image, ax=ax)
plt.show()

# %% [markdown]
# At the bottom nothing is decided. Layer by layer, the stream turns from *which token is this?*
# into *which token comes next?*
#
# ## Is it the Llama?
#
# Counting proves that the shapes are right, not that the computation is. For this we need somebody
# else's Llama. `transformers` has one, written independently of ours. It has other names and keeps
# the rows of `wq` and `wk` in another order (notebook 2); `to_huggingface` takes care of both.
#
# The weights are random, but large enough that no part of the model is negligible.

# %%
import warnings

with warnings.catch_warnings():  # about a progress bar that nobody draws here
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig as TheirConfig  # missing? pip install transformers
    from transformers import LlamaForCausalLM

from minillama.checkpoint.huggingface import to_huggingface

sizes = {"n_layers": 3, "hidden_dim": 160, "vocab_size": 300, "max_seq_len": 256}
config = LlamaConfig(dim=64, n_heads=8, n_kv_heads=2, **sizes)
ours = Llama(config)
with torch.no_grad():
    for parameter in ours.parameters():
        std = 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
theirs = LlamaForCausalLM(
    TheirConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
    )
)
theirs.load_state_dict(to_huggingface(ours.state_dict(), config))
tokens = torch.randint(config.vocab_size, (2, 256), generator=generator)
with torch.no_grad():
    expected, found = theirs(tokens).logits, ours(tokens)
assert found.std() > 0.1
assert_close(found, expected, rtol=1e-5, atol=1e-5)
print("512 tokens, 300 logits each: equal to 1e-5")

# %% [markdown]
# A comparison is worth something only if it can fail. One wrong number is enough: if `wk` is
# reordered as if it had as many heads as `wq`, every shape still fits, and nothing complains.

# %%
from minillama.checkpoint.huggingface import halves_from_pairs, huggingface_name

state = to_huggingface(ours.state_dict(), config)
for index, layer in enumerate(ours.layers):
    wrong = halves_from_pairs(layer.attention.wk.weight.detach(), config.n_heads)  # not n_kv_heads
    state[huggingface_name(f"layers.{index}.attention.wk.weight")] = wrong
theirs.load_state_dict(state)
with torch.no_grad():
    error = (theirs(tokens).logits - found).abs().max() / found.std()
print(f"the largest error is {error:.1f} standard deviations of the logits")
assert error > 0.5

# %% [markdown]
# ## One matrix for two jobs
#
# Embeddings and head have the same shape: one row of `dim` numbers per token. Small models use
# *one* matrix for both (`tie_embeddings`). Llama 1 and 2 don't. Here is what the second matrix
# costs, or would cost:

# %%
for name in ("toy", "stories15m", "llama2-7b"):
    config = LlamaConfig.preset(name)
    matrix = config.vocab_size * config.dim
    rest = config.n_parameters - matrix * (1 if config.tie_embeddings else 2)
    share = matrix / (rest + 2 * matrix)
    print(f"{name:10} tied: {config.tie_embeddings!s:5}  a second matrix is {share:.0%} of all")
assert toy.config.tie_embeddings
assert toy.output.weight is toy.tok_embeddings.weight

# %% [markdown]
# ## Exercises
#
# **1. A model without layers.** If no layer writes anything, the model sees one token and predicts
# from it alone. Any such prediction can be had: choose embeddings and head so that, after token
# `t`, the logits are `table[t]`. The stream has as many numbers as there are tokens, and RMSNorm
# stands between the two.


# %% tags=["exercise-1"]
def embeddings_and_head(table):
    """Give back the two matrices, each (vocab, dim); table is (vocab, vocab), and dim = vocab."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
table = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
sizes = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 8, "max_seq_len": 8}
bigram = Llama(LlamaConfig(dim=8, vocab_size=8, **sizes))
with torch.no_grad():
    bigram.layers[0].attention.wo.weight.zero_()
    bigram.layers[0].feed_forward.w2.weight.zero_()
    for linear, weight in zip(
        (bigram.tok_embeddings, bigram.output), embeddings_and_head(table), strict=True
    ):
        linear.weight.copy_(weight)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert_close(bigram(tokens)[0], table[tokens[0]], rtol=1e-3, atol=1e-3)
print("exercise 1: correct")

# %% [markdown]
# **2. Weights without a label.** You find a checkpoint and no configuration. Read the sizes off the
# shapes of its tensors. One number can't be read off and is given: `head_dim`. (Why can't it?)


# %% tags=["exercise-2"]
def sizes_of(shapes, head_dim):
    """From {name: shape}, give back a dict with dim, n_layers, n_heads, n_kv_heads, hidden_dim
    and vocab_size."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
from minillama.checkpoint.weights import parameter_shapes

for name in ("tiny", "llama2-7b", "llama2-34b"):
    config = LlamaConfig.preset(name)
    found = sizes_of(parameter_shapes(config), config.head_dim)
    assert len(found) == 6
    for field, value in found.items():
        assert getattr(config, field) == value, f"{name}: {field}"
print("exercise 2: correct")

# %% [markdown]
# **3. The way back.** `to_huggingface` turns our weights into theirs. Write the inverse. The module
# `minillama.checkpoint.huggingface` has what you need: `huggingface_name(name)` translates one of
# our names, and `pairs_from_halves(weight, n_heads)` puts the rows of a `wq` or `wk` back into our
# order.


# %% tags=["exercise-3"]
def from_huggingface(theirs, config):
    """Turn {their name: weight} into {our name: weight}; parameter_shapes(config) has our names."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
state = ours.state_dict()
back = from_huggingface(to_huggingface(state, ours.config), ours.config)
assert back.keys() == state.keys()
assert all(torch.equal(back[name], state[name]) for name in state)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/model/llama.py`: block and model; `minillama/model/` has a file for each part.
# - `minillama/config.py`: the sizes, with their sources. `minillama info` prints them.
# - `minillama/checkpoint/huggingface.py`: the other names and the other order.
# - Touvron et al. 2023, *LLaMA*, sec. 2.2 and table 2
#   ([arXiv:2302.13971](https://arxiv.org/abs/2302.13971)), and *Llama 2*, table 1
#   ([arXiv:2307.09288](https://arxiv.org/abs/2307.09288)): the architecture and its sizes.
# - He et al. 2015, *Deep Residual Learning* ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)):
#   the plus sign. Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*,
#   sec. 2.3: the division by the square root of the depth.
