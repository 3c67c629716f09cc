# %% [markdown]
# # 18 · LoRA: teach a model something new, and keep the old one
#
# **Question.** A model of billions of weights is to learn a new manner of speaking. Must they all
# change? And when there are ten manners, must there be ten models?
#
# **You need** what a linear layer and a gradient are (notebooks 6 and 8) · **It takes** 45 minutes
# · **Module** `minillama/adapt/lora.py`

# %%
import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.4), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# The toy model in `data/toy` tells tales of a small world. We want it to tell them like a pirate.

# %%
from minillama import load
from minillama.data import tales
from minillama.data.packing import as_batch, batches, pack

PIRATE = {"the": "ye", "The": "Ye", "and": "an'", "was": "be"}


def pirate(text):
    return re.sub(r"\w+", lambda word: PIRATE.get(word[0], word[0]), text)


def toy():
    return load("../data/toy/checkpoint")


base, tok = toy()
stories, unread = tales.corpus("train")[:400], tales.corpus("valid")[:60]
print(pirate(stories[1][:150]) + "...")


# %%
from minillama.training import evaluate


def rows(texts):
    return pack(tok.encode_batch(texts, bos=True, eos=True), 128, tok.vocab_size)


voices = {"plain": str, "pirate": pirate, "excited": lambda text: text.replace(".", "!")}
valid = {name: [as_batch(rows(map(voice, unread)))] for name, voice in voices.items()}
for name, batch in valid.items():
    print(f"{name:8} {evaluate(base, batch):.1f} nats per token")
assert evaluate(base, valid["pirate"]) > 10 * evaluate(base, valid["plain"])

# %% [markdown]
# It has never heard a pirate. So we *fine-tune* it: go on with training, on the new text. All the
# matrices of the blocks may change (the embeddings we leave alone here).

# %%
from minillama.config import TrainingConfig
from minillama.training import make_optimizer, train

recipe = TrainingConfig(steps=40, batch_size=4, seq_len=128, warmup_steps=4, weight_decay=0.0)


def learn(model, voice, rate):
    texts = rows(map(voices[voice], stories))
    config = replace(recipe, learning_rate=rate)
    source, optimizer = batches(texts, 4, seed=0), make_optimizer(model, config)
    return [stats.loss for stats in train(model, optimizer, source, config)]


full = toy()[0]
full.tok_embeddings.weight.requires_grad_(False)
curves = {"all weights": learn(full, "pirate", rate=3e-3)}
trained = sum(p.numel() for p in full.parameters() if p.requires_grad)
found = evaluate(full, valid["pirate"])
print(f"{trained:,} weights trained; a pirate's tales: {found:.1f} nats per token")
assert found < 1.5

# %% [markdown]
# That works. But look at the bill. While it learned, each weight had a gradient and AdamW's two
# averages: four numbers instead of one. And now there are two models to keep, the old and the new.
# For the toy that is nothing. For Llama 2 7B it is a second file of 13 GB, for each manner of
# speaking, and more memory than the 80 GB of an A100 (notebook 8).
#
# ## How much of the change matters?
#
# Both models are here, so let us look at what changed: $\Delta = W_\text{new} - W_\text{old}$, for
# each matrix. Any matrix is a sum of *directions*, from the strongest to the weakest (its singular
# value decomposition, SVD): $\Delta = \sum_i s_i\, u_i v_i^\top$. Each term reads one number from
# the input, $v_i \cdot x$, and writes it along one direction, $u_i$. The number of terms that are
# not zero is the *rank*.

# %%
from minillama.adapt.lora import target_shapes

INNER = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
names = list(target_shapes(base.config, INNER))


def weight(model, name):
    return model.get_submodule(name).weight.detach()


changes = {name: weight(full, name) - weight(base, name) for name in names}
for name in ("layers.0.attention.wq", "layers.3.attention.wo", "layers.3.feed_forward.w2"):
    energy = torch.linalg.svdvals(changes[name]).square()
    share = energy[:16].sum() / energy.sum()
    print(f"{name:25} {len(energy)} directions; 16 of them make {100 * share:.0f}% of the change")
    assert share > 0.75

# %% [markdown]
# Does the rest matter to what the model *does*? We keep only the strongest `rank` directions of
# every change, and ask for the loss again.


# %%
def truncated(change, rank):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


ranks, losses = (0, 1, 2, 4, 8, 16, 32, 96), []
for rank in ranks:
    model = toy()[0]
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight += truncated(changes[name], rank)
    losses.append(evaluate(model, valid["pirate"]))

fig, (left, right) = plt.subplots(1, 2)
for name in names[4::7]:  # w1 of each layer
    values = torch.linalg.svdvals(changes[name])
    left.plot(values / values[0], label=f"layer {name.split('.')[1]}")
left.set(title="singular values of the change of w1", xlabel="number", ylabel="share of the first")
left.legend()
right.plot(range(len(ranks)), losses, "o-")
right.set_xticks(range(len(ranks)), ranks)
right.set(title="directions kept in every matrix", xlabel="rank", ylim=(0, None))
right.set_ylabel("loss (nats per token)")
plt.show()
gained = (losses[0] - losses[5]) / (losses[0] - losses[-1])
print(f"16 of 96 directions bring {100 * gained:.0f}% of what all of them bring")
assert gained > 0.9

# %% [markdown]
# Most directions are hardly needed. Hu et al. (2021) turned this around: if a change of low rank is
# enough, then *train* one of low rank. Do not look for it afterwards.
#
# ## By hand
#
# Leave $W$ alone. Beside it, put two thin matrices: $A$ reads `rank` numbers from the input, and
# $B$ writes them out.
#
# $$ y = W x + \frac{\alpha}{r} B A x $$
#
# With an input of 3 numbers, an output of 2, and rank 1:

# %%
W = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
A = torch.tensor([[1.0, 1.0, 0.0]])  # (rank, d_in): reads x1 + x2
B = torch.tensor([[0.0], [3.0]])  # (d_out, rank): writes it to y2, three times
x = torch.tensor([1.0, 2.0, 5.0])
scale = 2 / 1  # alpha / rank
print("W x       ", W @ x)
print("A x       ", A @ x, " one number")
print("y         ", W @ x + scale * B @ (A @ x))
print("(W + ..) x", (W + scale * B @ A) @ x)

# %%
from minillama.adapt.lora import LoRALinear, LowRank
from minillama.config import LoRAConfig

linear = nn.Linear(3, 2, bias=False)
linear.weight.data.copy_(W)
layer = LoRALinear(linear, LoRAConfig(rank=1, alpha=2), LowRank(A, B))
assert_close(layer(x).detach(), W @ x + scale * B @ (A @ x))
print("by hand and the package's: the same")

# %% [markdown]
# How many numbers is that? $W$ has d_out · d_in, the two thin ones r · (d_out + d_in). For a 4096 ×
# 4096 matrix of the 7B and rank 8: 65,536 instead of 16,777,216.
#
# **How to start.** An adapter must not disturb the model before it has learned anything, so $BA$
# must be 0. Could both be 0? The gradients say no. With $G$ the gradient with respect to $y$ (one
# column for each token of $x$):
#
# $$ \frac{\partial}{\partial B} = \frac{\alpha}{r}\, G (A x)^\top \qquad
#    \frac{\partial}{\partial A} = \frac{\alpha}{r}\, B^\top G\, x^\top $$
#
# Each needs the other one. If both are 0, nothing ever moves. So $A$ is random, and $B$ is 0.

# %%
g = torch.Generator().manual_seed(0)
x, G = torch.randn(3, 5, generator=g), torch.randn(2, 5, generator=g)  # five tokens
layer.zero_grad()
(layer(x.T).T * G).sum().backward()
assert_close(layer.b.grad, scale * G @ (A @ x).T)
assert_close(layer.a.grad, scale * B.T @ G @ x.T)
for start in ("both 0", "B 0"):
    layer.a.data.copy_(0 * A if start == "both 0" else A)
    layer.b.data.zero_()
    layer.zero_grad()
    (layer(x.T).T * G).sum().backward()
    moves = [bool(p.grad.any()) for p in (layer.a, layer.b)]
    print(f"{start:6}: does A move? {moves[0]}; does B? {moves[1]}")
assert moves == [False, True]

# %% [markdown]
# In the first step only $B$ moves; from the second on, both do. In the package, `new_adapter` draws
# an adapter for a whole model, and `attach` puts it in: every `nn.Linear` that is named becomes a
# `LoRALinear`, and all else is frozen. Not a single bit of what the model says has changed.

# %%
from minillama.adapt.lora import attach, detach, new_adapter


def with_adapter(rank, **settings):
    model = toy()[0]
    lora = LoRAConfig(rank=rank, **({"alpha": 2 * rank, "targets": INNER} | settings))
    attach(model, new_adapter(model.config, lora, torch.Generator().manual_seed(0)))
    return model


tokens = valid["plain"][0].tokens[:4]
with torch.no_grad():
    assert torch.equal(with_adapter(4)(tokens), base(tokens))
print("equal to the last bit")

# %% [markdown]
# ## Rank 1, 4, 16, beside all weights
#
# The same tales, the same number of steps. Only the learning rate is another: an adapter starts
# from nothing, so it takes longer steps.

# %%
sizes, adapted = {}, {}
for rank, rate in ((1, 2e-2), (4, 2e-2), (16, 1e-2)):
    model = adapted[rank] = with_adapter(rank)
    curves[f"rank {rank}"] = learn(model, "pirate", rate)
    sizes[rank] = sum(p.numel() for p in model.parameters() if p.requires_grad)

results = {"before": base, "all weights": full} | {f"rank {r}": m for r, m in adapted.items()}
scores = {
    name: [evaluate(model, valid[voice]) for voice in ("pirate", "plain")]
    for name, model in results.items()
}
for name, (new, old) in scores.items():
    print(f"{name:12} pirate {new:.1f}, plain {old:.1f} nats per token")
print({f"rank {rank}": f"{n:,} numbers" for rank, n in sizes.items()})
assert scores["before"][0] > 2 * scores["rank 1"][0] > 2 * scores["rank 4"][0]
assert scores["rank 4"][0] > scores["rank 16"][0]

# %%
fig, (left, right) = plt.subplots(1, 2)
for name, losses in curves.items():
    left.plot(losses, "k" if name == "all weights" else "", label=name, linewidth=1)
left.set(title="learning", xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
left.legend()
for voice, side, colour in ((0, -0.2, "C0"), (1, 0.2, "lightgray")):
    heights = [score[voice] for score in scores.values()]
    places = [n + side for n in range(len(scores))]
    right.bar(places, heights, 0.4, color=colour, label=("pirate", "plain")[voice])
right.set_xticks(range(len(scores)), [name.replace(" ", "\n") for name in scores])
right.set(title="learned and forgotten", ylabel="loss (nats per token)", ylim=(0, 4))
right.legend()
plt.show()

# %% [markdown]
# Rank 1 gets surprisingly far with a sixtieth of the numbers, and rank 16 nearly as far as all
# weights. On the right (the bar for "before" goes up to 6) is the price, and nobody escapes it: who
# speaks like a pirate has forgotten plain speech, adapter or not. But an adapter can be taken out.

# %%
adapters = {"pirate": detach(adapted[16])}
with torch.no_grad():
    assert torch.equal(adapted[16](tokens), base(tokens))
print("without its adapter, the model is the old one, to the last bit")

# %% [markdown]
# **What alpha does.** $\alpha / r$ multiplies the change. As AdamW's steps are as long as the
# learning rate whatever the gradient, twice the alpha is about twice the learning rate for $B$.
# Then why divide by $r$? So that a rate that was found at one rank does for others. Here is how far
# the outputs move in one step, with AdamW's first step from notebook 8 (each entry of $B$ by one
# learning rate, against its gradient's sign):


# %%
def first_step(rank, scale, d=512, tokens=64, rate=1e-3):  # -> how far an output moves
    g = torch.Generator().manual_seed(0)
    x, G = torch.randn(d, tokens, generator=g), torch.randn(d, tokens, generator=g)
    A = torch.randn(rank, d, generator=g) / d**0.5
    B = -rate * (G @ (A @ x).T).sign()
    return (scale * B @ (A @ x)).square().mean().sqrt().item()


tried = (1, 4, 16, 64)
rules = {"alpha": lambda r: 16, "alpha / r": lambda r: 16 / r, "alpha / √r": lambda r: 16 / r**0.5}
moved = {name: [first_step(r, scale(r)) for r in tried] for name, scale in rules.items()}
fig, ax = plt.subplots(figsize=(6, 2))
for name, lengths in moved.items():
    ax.loglog(tried, [length / lengths[0] for length in lengths], "o-", label=name)
ax.set(title="one step", xlabel="rank", ylabel="outputs move (rank 1 = 1)")
ax.set_xticks(tried, tried)
ax.minorticks_off()
ax.legend()
plt.show()
root = moved["alpha / √r"]
assert max(root) < 1.5 * min(root)
assert moved["alpha"][-1] > 8 * moved["alpha"][0]
assert moved["alpha / r"][-1] < moved["alpha / r"][0] / 5

# %% [markdown]
# Undivided, a larger rank moves farther; divided by $r$, it moves *less*, and learns more slowly
# than it could. Divided by the root it moves about the same. Kalajdzievski (2023) proposed that
# (rsLoRA); here it is `rank_stabilized=True`.
#
# ## Merging
#
# For an answer, a model with an adapter computes three products where one would do. $W + \frac
# {\alpha}{r} B A$ is a matrix of the same size, so add it up once (*merge*). That is the same in
# mathematics; in floating point, nearly:

# %%
from minillama.adapt.lora import merge, unmerge

model = toy()[0]
attach(model, adapters["pirate"])
with torch.no_grad():
    beside = model(tokens)
replaced = merge(model)
merged = weight(model, "layers.0.attention.wq")
low = adapters["pirate"].layers["layers.0.attention.wq"]
assert_close(merged, weight(base, "layers.0.attention.wq") + 2 * low.b @ low.a)
with torch.no_grad():
    assert_close(model(tokens), beside, rtol=0, atol=1e-4)
print("merged:", type(model.layers[0].attention.wq).__name__)

# %% [markdown]
# And back? Subtract it again... Watch the bits.

# %%
old = weight(base, "layers.0.attention.wq")
change = 2 * low.b @ low.a
again = old + change - change
differ = (again != old).float().mean()
print("more than a tenth of the weights differ:", bool(differ > 0.1))
unmerge(model, replaced)
with torch.no_grad():
    assert torch.equal(model(tokens), beside)
assert differ > 0.1

# %% [markdown]
# Each sum rounds, and what was rounded off is gone. Merge and subtract a hundred adapters, one
# after the other, and the errors add up. So `merge` does not subtract: it puts the old layers
# aside, and `unmerge` puts them back. (Who merges for good lets go of them.)
#
# ## Memory: before and after
#
# `minillama.plan` counts what training takes (notebook 8). Llama 2 7B, one row of 4,096 tokens, on
# a GPU: all weights; LoRA of rank 16 beside the queries and values; and **QLoRA** (Dettmers et al.
# 2023): the frozen weights, as nobody changes them, may just as well be kept in 4 bits.

# %%
from minillama import LlamaConfig
from minillama.plan import GIB, TrainingPlan

seven = LlamaConfig.preset("llama2-7b")
row = TrainingConfig(batch_size=1, seq_len=4096, checkpointing="selective", precision="bfloat16")
everything = TrainingPlan(config=seven, training=row)
plans = {
    "all weights": everything,
    "LoRA": everything.changed(lora=16),
    "QLoRA": everything.changed(lora=16, quantize="nf4"),
}
parts = ("weights", "copies", "gradients", "optimizer", "activations", "loss")
fig, ax = plt.subplots(figsize=(6, 1.8))
for n, (name, plan) in enumerate(plans.items()):
    print(f"{name:11} trains {plan.trained:13,} numbers, takes {plan.peak / GIB:5.1f} GiB")
    left = 0
    for part, colour in zip(parts, plt.cm.tab10.colors, strict=False):
        size = plan.parts.get(part, 0) / GIB
        ax.barh(n, size, left=left, color=colour, label=part if n == 0 else None)
        left += size
ax.set_yticks(range(3), plans)
ax.invert_yaxis()
ax.axvline(24e9 / GIB, color="gray", linestyle=":")
ax.set(title="one training step of Llama 2 7B; dotted: a 24 GB GPU", xlabel="GiB")
ax.legend(ncols=2)
plt.show()
assert plans["QLoRA"].peak < 24e9 < plans["LoRA"].peak < plans["all weights"].peak / 4

# %% [markdown]
# And the file: 8.4 million numbers are 34 MB, where the model has 13,500. Does an adapter learn
# beside weights in 4 bits? Its gradient goes through the frozen matrix as it is, dequantised
# (notebook 17). We hold the toy in NF4:

# %%
from minillama.adapt.quantize import quantize

tiny = quantize(toy()[0], "nf4")
lora = LoRAConfig(rank=4, alpha=8, targets=INNER)
attach(tiny, new_adapter(tiny.config, lora, torch.Generator().manual_seed(0)))
before = tiny.layers[0].attention.wq.base.codes.clone()
learn(tiny, "excited", rate=2e-2)
after = evaluate(tiny, valid["excited"])
print(f"excited tales: {evaluate(base, valid['excited']):.1f} before, {after:.1f} after")
assert torch.equal(tiny.layers[0].attention.wq.base.codes, before)
assert after < evaluate(base, valid["excited"]) / 2
adapters["excited"] = detach(tiny)

# %% [markdown]
# ## Several adapters, one model
#
# Ten manners of speaking are now one model and ten small files. A server can go further: it holds
# the base once, and in *one batch*, each row goes through the adapter that its user asked for. The
# large product $W x$ is shared; for the thin ones, each row picks its own $A$ and $B$.

# %%
from minillama.adapt.lora import Adapters
from minillama.generation.decoder import Decoder

model = toy()[0]
many = Adapters(model, adapters)
chosen = ["pirate", None, "excited"]
many.choose(chosen)
rows_of_three = tokens[:3]
with torch.no_grad():
    together = model(rows_of_three)
    for row, name in enumerate(chosen):
        alone = toy()[0]
        if name:
            attach(alone, adapters[name])
        assert_close(together[row], alone(rows_of_three[row : row + 1])[0], rtol=0, atol=1e-4)
print("each row is what its adapter gives alone")

# %%
prompt = tok.encode("Long ago there was a harbour.", bos=True)
texts = [list(prompt) for _ in chosen]
with torch.inference_mode():
    decoder = Decoder(model, rows=3, max_len=len(prompt) + 60)
    logits = decoder.prefill(0, texts)
    for _ in range(60):
        new = logits.argmax(-1).tolist()
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        logits = decoder.step(new)
told = [tok.decode(text[len(prompt) :]).strip() for text in texts]

fig, axes = plt.subplots(1, 3, figsize=(6, 1.8))
for ax, name, text in zip(axes, chosen, told, strict=True):
    ax.set_title(name or "no adapter")
    ax.text(0, 1, fill(text, 36), va="top", fontsize=7)
    ax.axis("off")
plt.show()
words = [re.findall(r"\w+", text) for text in told]
assert "ye" in words[0]
assert "the" not in words[0]
assert "ye" not in words[1]
assert told[2].count("!") > told[2].count(".")

# %% [markdown]
# Three voices from one batch, one set of large weights, and one pass per token.
#
# ## What breaks: an adapter in another's layout
#
# The library `peft` writes an adapter as two files. We write the same two, and their checksums
# beside them, so that adapters go both ways. Remember from notebook 2 that Hugging Face keeps the
# rows of wq and wk in another order. $B$ makes these rows, so it must be reordered with them; $A$
# and all other layers are as they are. If one forgets, all shapes fit, and nothing complains:

# %%
from minillama.checkpoint.huggingface import halves_from_pairs
from minillama.checkpoint.peft import load_adapter, save_adapter

with TemporaryDirectory() as folder:
    save_adapter(folder, adapters["pirate"], base.config)
    print(sorted(path.name for path in Path(folder).iterdir()))
    settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    back = load_adapter(folder, base.config)
print({name: settings[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")})
assert all(
    torch.equal(back.layers[name].b, low.b) for name, low in adapters["pirate"].layers.items()
)

heads = {"wq": base.config.n_heads, "wk": base.config.n_kv_heads}
forgotten = dict(back.layers)
for name, low in back.layers.items():
    if n_heads := heads.get(name.split(".")[-1]):
        forgotten[name] = LowRank(low.a, halves_from_pairs(low.b, n_heads))
losses = {}
for name, layers in (("right", back.layers), ("forgotten", forgotten)):
    model = toy()[0]
    attach(model, replace(back, layers=layers))
    losses[name] = evaluate(model, valid["pirate"])
    print(f"{name:9} {losses[name]:.1f} nats per token")
assert losses["forgotten"] > losses["right"] + 0.1

# %% [markdown]
# It still speaks, only worse. No shape and no message shows it, and who has nothing to compare with
# may take the second number for what the adapter can do. Logits compared with the other library's
# find it: see `tests/checkpoint/test_peft.py`.
#
# ## Exercises
#
# **1. Count.** How many numbers does an adapter of rank `r` beside wq, wk, wv and wo have, in all
# layers together? Mind the grouped heads: wk and wv give n_kv_heads · head_dim numbers.


# %% tags=["exercise-1"]
def attention_adapter(config, rank):
    """Give back an int."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
for config in (base.config, seven, LlamaConfig.preset("llama2-70b")):
    shapes = target_shapes(config, ("wq", "wk", "wv", "wo"))
    for rank in (1, 8):
        assert attention_adapter(config, rank) == rank * sum(map(sum, shapes.values()))
print("exercise 1: correct")

# %% [markdown]
# **2. Two in one.** A pirate, and excited: the sum of two changes is again a product of two thin
# matrices. Of which rank? Write it, for two pairs (A, B) with scales of their own, so that the
# result has scale 1.


# %% tags=["exercise-2"]
def both(one, other, one_scale, other_scale):
    """`one` and `other` are LowRank; give back a LowRank."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
layers = [adapters[name].layers["layers.1.feed_forward.w1"] for name in ("pirate", "excited")]
sum_of_both = both(*layers, 2.0, 0.5)
assert sum_of_both.a.shape == (20, 96)
assert_close(
    sum_of_both.b @ sum_of_both.a,
    2.0 * layers[0].b @ layers[0].a + 0.5 * layers[1].b @ layers[1].a,
)
print("exercise 2: correct")

# %% [markdown]
# **3. An adapter without training one.** `full` was trained with all weights. Make its change of a
# matrix a LowRank (scale 1) of the given rank, as good as any can be: from the SVD. Let A and B
# both have a part in the singular values, the root of each.


# %% tags=["exercise-3"]
def extracted(change, rank):
    """`change` is (d_out, d_in); give back a LowRank."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
change = changes["layers.3.attention.wo"]
low = extracted(change, 8)
assert (low.a.shape, low.b.shape) == ((8, 96), (96, 8))
assert_close(low.b @ low.a, truncated(change, 8), rtol=1e-3, atol=1e-4)
assert_close(low.a.norm(dim=1), low.b.norm(dim=0), rtol=1e-3, atol=1e-4)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/adapt/lora.py`: `LoRALinear`, `attach`, `detach`, `merge`, `unmerge`, `Adapters`.
# - `minillama/checkpoint/peft.py`: both files of an adapter; `merged` adds one to a checkpoint, one
#   matrix in memory at a time.
# - `minillama/training/lora_run.py`: `minillama lora MODEL --text FILE --out FOLDER` trains one,
#   with `--quantize nf4` beside 4-bit weights; `minillama generate --adapter FOLDER/adapter` uses
#   it.
# - `minillama/plan.py`: `minillama plan llama2-7b --lora 16 --quantize nf4`.
#
# Hu et al. 2021, *LoRA* ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685)); Dettmers et al.
# 2023, *QLoRA* ([arXiv:2305.14314](https://arxiv.org/abs/2305.14314)); Kalajdzievski 2023, rsLoRA
# ([arXiv:2312.03732](https://arxiv.org/abs/2312.03732)); Chen et al. 2023, *Punica*, several
# adapters in a batch ([arXiv:2310.18547](https://arxiv.org/abs/2310.18547)).
#
# Next: notebook 19, many processes.
