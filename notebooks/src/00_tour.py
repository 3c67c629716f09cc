# %% [markdown]
# # 0 · The tour: a language model in one sitting
#
# **Question.** What is a language model, and what does it take to make one?
#
# **You need** Python; if you have seen PyTorch, you will recognise more · **It takes** 20 minutes ·
# **Module** all of `minillama`, from far above
#
# In this notebook you train a small Llama on your own computer, watch it learn, and let it write.
# It shows how the pieces fit together. What is inside each of them comes later, one notebook at a
# time; the map is at the end.

# %%
import math
import re
import textwrap
from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})


def show(text):
    print(textwrap.fill(text, width=90))


# %% [markdown]
# ## A world to learn
#
# Meta's Llamas read trillions of words. We have minutes, so we need a smaller world. The *tales*
# are short stories that a little grammar wrote: some 250 different words, and yet each story keeps
# its promises. Who lost what, and where it was found, agrees from the first sentence to the last.

# %%
from minillama.data import tales

train_stories, new_stories = tales.corpus("train"), tales.corpus("valid")
print(
    f"{len(train_stories):,} stories to learn from, {len(new_stories)} to test with. The first:\n"
)
show(train_stories[0])

# %% [markdown]
# Since a grammar wrote them, a program can check them. `tales.check` reads a story and says whether
# its end agrees with its beginning. It will judge our models later. Let us try it, and exchange one
# word at the end.

# %%
assert all(tales.check(story) for story in train_stories[:100] + new_stories)
spoiled = train_stories[0].replace("for Max and for the hare", "for Tom and for the hare")
assert spoiled != train_stories[0]
verdict = tales.check(spoiled)
show(f"-> {verdict.problem}")
assert not verdict.ok

# %% [markdown]
# ## What a language model does
#
# One thing only: it reads the beginning of a text and says how likely each word is to come *next*.
# Whoever can do that can write: pick a likely word, put it behind the text, ask again.
#
# The simplest language model counts. What follows "by the" in the stories?

# %%
everything = " ".join(train_stories)


def followers(context):
    return Counter(re.findall(rf"\b{re.escape(context)} (\w+)", everything))


for context in ("by the", "cake by the", "had a"):
    found = followers(context)
    likely = ", ".join(f"{word} {n / found.total():.0%}" for word, n in found.most_common(4))
    print(f"{context} ...   seen {found.total():,} times: {likely}")

# %% [markdown]
# ## What counting can't do
#
# Here is a story that nobody has counted, without its last words. You know how it goes on. Why?

# %%
puzzle, answer = re.match(r"(.* came home to the) (\w+)", new_stories[0]).groups()
show(f"{puzzle} ...")

# %%
words = puzzle.split()
for n in (2, 4, 8, 16):
    context = " ".join(words[-n:])
    times_seen = everything.count(context)
    print(f"seen {times_seen:3} times: ... {context}")
assert times_seen == 0
counted = followers("home to the")
print(f'\nAfter "home to the", counting gives "{answer}" {counted[answer] / counted.total():.0%}.')
assert 0.1 < counted[answer] / counted.total() < 0.3

# %% [markdown]
# Counting is stuck. A short context says too little: people of the toy world live in five kinds of
# places, all about equally likely. A long context has never been seen before. The right word stands
# at the very beginning, and the way from there to here is different in every story.
#
# So the model must do better than remember: it has to learn *what to look for*. This is what the
# rest of this notebook, and of the course, is about.
#
# ## Text to numbers
#
# A model computes with numbers. A *tokenizer* cuts text into pieces from a fixed list, its
# vocabulary, and gives each piece a number. Llama's has 32,000 pieces; ours learns 700 from the
# stories. Frequent words become one piece; others are put together.

# %%
from minillama.tokenizer import train_tokenizer

tok = train_tokenizer(train_stories, vocab_size=700)
ids = tok.encode("Ben had a white lamp and a xylophone.")
print(" ".join(tok.pieces[i] for i in ids))
print(ids)
assert tok.decode(ids) == "Ben had a white lamp and a xylophone."

# %% [markdown]
# All stories become one long row of numbers, cut into rows of equal length. The exercise for the
# model is at *every* place the same: here is what came before, what comes next? So the right
# answers, the *targets*, are the same tokens, one place further on.

# %%
from minillama.data.packing import batches, pack

rows = pack(tok.encode_batch(train_stories, bos=True, eos=True), seq_len=128, vocab_size=700)
pieces = [tok.pieces[i] for i in rows[0, :7]]
for n in range(1, 7):
    print(f"{' '.join(pieces[:n]):28} -> {pieces[n]}")

batch = next(batches(rows, batch_size=8, seed=0))
assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
print(f"{len(rows):,} rows, {batch.n_targets:,} such questions in a batch of 8")

# %% [markdown]
# ## The model
#
# Between the numbers of the text and the probabilities of the next piece stands the model. Each
# token becomes a vector. Layer by layer, each vector looks at those before it (*attention*: which
# of them matters?) and is worked on by itself (*feed-forward*: what does it mean for me?). At the
# end, each of the 700 pieces gets a score.

# %%
fig, ax = plt.subplots(figsize=(6, 2.5))
stations = [
    (0.0, "text", "Ben had\na white", "white"),
    (2.1, "tokenizer", "\n".join(map(str, tok.encode("Ben had a white"))), "lightblue"),
    (4.2, "embeddings", "a vector\nfor each\ntoken", "lightblue"),
    (6.3, "attention", "which token\nbefore me\nmatters?", "wheat"),
    (8.4, "feed-forward", "what does\nit mean\nfor me?", "wheat"),
    (10.5, "head", "a score\nfor each of\n700 pieces", "lightblue"),
]
for x, name, inside, colour in stations:
    ax.add_patch(plt.Rectangle((x, 0), 1.7, 2, facecolor=colour, edgecolor="black"))
    ax.text(x + 0.85, 1, inside, ha="center", va="center", fontsize=7)
    ax.text(x + 0.85, 2.15, name, ha="center", weight="bold", fontsize=7)
    ax.annotate("", (x + 2.1, 1), (x + 1.7, 1), arrowprops={"arrowstyle": "-|>"})
ax.plot([6.1, 6.1, 10.3, 10.3], [-0.2, -0.4, -0.4, -0.2], color="gray")
ax.text(8.2, -0.55, "3 layers of these (7B: 32)", ha="center", va="top")
ax.barh([1.5, 1.1, 0.7, 0.3], [1.6, 0.7, 0.3, 0.2], 0.3, left=12.65, color="C0")
for y, piece in ((1.5, "lamp"), (1.1, "drum"), (0.7, "kite"), (0.3, "...")):
    ax.text(14.4, y, piece, va="center")
ax.text(12.6, 2.15, "probabilities", weight="bold", fontsize=7)
ax.set(xlim=(-0.2, 15.4), ylim=(-1.1, 2.7))
ax.axis("off")
plt.show()

# %% [markdown]
# In the package this takes a line. Ours has the architecture of Llama 2 70B, with grouped-query
# attention and all. It is only some 400,000 times smaller.

# %%
from minillama import Llama, LlamaConfig

config = LlamaConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=176,
    vocab_size=700, max_seq_len=256, tie_embeddings=True,
)  # fmt: skip
model = Llama(config, torch.Generator().manual_seed(0), init_std=0.1)
print(f"ours: {config.n_parameters:,} parameters")
n_70b = LlamaConfig.preset("llama2-70b").n_parameters
print(f"70B:  {n_70b:,} parameters")
assert 350_000 < n_70b / config.n_parameters < 450_000
print("logits:", tuple(model(batch.tokens).shape), "= (row, place, score of each piece)")

# %% [markdown]
# ## How wrong is it?
#
# If the model gave the right piece the probability $p$, it is wrong by $-\ln p$. That is 0 for
# $p = 1$, 0.69 for one half, and 6.55 for $1/700$. The mean over all places is the *loss*. An
# untrained model finds everything about equally likely, so its loss must be near $\ln 700$. (A bit
# more: it doesn't know how little it knows, and prefers some pieces for no reason.)

# %%
from minillama.training import next_token_loss

with torch.no_grad():
    logits = model(batch.tokens)
probabilities = logits.softmax(-1)
of_the_right = probabilities.gather(-1, batch.targets[..., None])
loss = -of_the_right.log().mean()
torch.testing.assert_close(loss, next_token_loss(logits, batch.targets) / batch.n_targets)
print(f"loss {loss:.1f}, ln 700 = {math.log(700):.1f}")
assert 0 < loss - math.log(700) < 0.5

# %% [markdown]
# ## Writing
#
# To write, take the likeliest piece, put it behind the text, ask again. By hand this is a loop of
# three lines. The package's `generate` does the same, and faster, because it keeps what it has
# computed for the earlier tokens (notebook 5).

# %%
from minillama import generate

by_hand = tok.encode("One morning", bos=True)
for _ in range(12):
    with torch.no_grad():
        scores = model(torch.tensor([by_hand]))[0, -1]
    by_hand.append(scores.argmax().item())

(completion,) = generate(model, tok, "One morning", max_new_tokens=12)
assert completion.token_ids == by_hand[-12:]
print(tok.decode(by_hand))

# %% [markdown]
# It has read nothing yet, and it shows.
#
# ## Pretraining
#
# Now it reads. Each step takes eight rows of 128 tokens, measures the loss, and moves all
# parameters a little in the direction that makes it smaller. `train` gives control back after every
# step, so we can look at the model while it learns.

# %%
from minillama.config import TrainingConfig
from minillama.training import make_optimizer, train

recipe = TrainingConfig(steps=300, batch_size=8, seq_len=128, learning_rate=8e-3, warmup_steps=20)
optimizer, losses = make_optimizer(model, recipe), []
for stats in train(model, optimizer, batches(rows, recipe.batch_size, seed=0), recipe):
    losses.append(stats.loss)
    if stats.step in (1, 10, 30, 100, 300):
        (completion,) = generate(model, tok, "One morning", max_new_tokens=14)
        print(f"step {stats.step:3}, loss {stats.loss:.1f}: One morning{completion.text}")
assert losses[0] > 6
assert losses[-1] < 1

# %%
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.plot(range(1, 301), losses)
ax.axhline(math.log(700), color="gray", linestyle=":", label="all 700 pieces equally likely")
ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
# First it finds out which pieces are frequent, then which words exist, then how sentences run. Does
# it also know what it is talking about? We give it the beginning of a new story, let it write the
# rest, and check the whole.

# %%
beginning = " ".join(new_stories[0].split()[:19])
(completion,) = generate(model, tok, beginning, max_new_tokens=150)
verdict = tales.check(beginning + completion.text)
show(f"[{beginning}]{completion.text}")
print()
show(f"-> {verdict.problem}")
assert not verdict.ok

# %% [markdown]
# It sounds right. But look at the names, the colours and the pronouns: each sentence is fine, and
# together they make no story. This is a model that has learned the language and not yet the world.
#
# ## Train longer
#
# What is missing is not another idea. `minillama demo` trains a somewhat larger model with the same
# code, in a few minutes. What came out lies in `data/toy`, ready to load. It gets the same
# beginning.

# %%
from minillama import load

toy, toy_tok = load("../data/toy/checkpoint")
print(f"{toy.config.n_parameters:,} parameters")
(completion,) = generate(toy, toy_tok, beginning, max_new_tokens=150)
show(f"[{beginning}]{completion.text}")
assert tales.check(beginning + completion.text)

# %% [markdown]
# Now everything fits. Was it luck? It writes twenty more, from nothing. So that no two are alike,
# the next piece isn't always the likeliest now, but drawn by chance.

# %%
from minillama.evaluation.tales import write_tales

report = write_tales(toy, toy_tok, train_stories, n=20, temperature=0.8)
show(report.stories[0])
print(f"\nconsistent from beginning to end: {report.n_consistent} of 20")
print(f"copied from the training stories: {report.n_copied} of 20")
assert report.n_consistent >= 18
assert report.n_copied == 0

# %% [markdown]
# ## The puzzle, solved
#
# Back to the story that counting couldn't finish. What does the model expect after *came home to
# the*? And does it really know this from the beginning of the story? We take everything but the
# last sentence away and look at what breaks.


# %%
@torch.no_grad()
def probability(word, context):  # of a word that may have several pieces: multiply theirs
    n_before = len(toy_tok.encode(context, bos=True))
    ids = torch.tensor([toy_tok.encode(f"{context} {word}", bos=True)])
    logprobs = toy(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    return logprobs[0, n_before - 1 :].sum().exp().item()


last_sentence = "Ben came home to the"
assert puzzle.endswith(last_sentence)
places = (*tales.HOMES, *tales.PLACES)
known = [probability(place, puzzle) for place in places]
blind = [probability(place, last_sentence) for place in places]
index = places.index(answer)
print(f'"{answer}" gets {blind[index]:.2f} after "{last_sentence}" alone')
print(f'"{answer}" gets {known[index]:.2f} after the whole story')
assert known[index] > 0.9
assert blind[index] < 0.5

# %%
fig, ax = plt.subplots(figsize=(6, 2.2))
shares = [counted[place] / counted.total() for place in places]
for shift, heights in zip((-0.3, 0, 0.3), (shares, blind, known), strict=True):
    ax.bar([place + shift for place in range(len(places))], heights, 0.28)
ax.set_xticks(range(len(places)), places)
ax.set(ylabel="probability", ylim=(0, 1))
ax.legend(["counting", "model, last sentence only", "model, whole story"])
plt.show()

# %% [markdown]
# With the whole story before it, the model looks back to the first sentence and picks the one word
# that matters, past another place that came later. Nobody told it where to look.
#
# ## Chance, by degrees
#
# A model gives probabilities; what is written also depends on how we draw. The *temperature*
# divides the scores before they become probabilities. Below 1 the likely gets likelier, above 1 the
# unlikely gets its chance, and 0 means: always the likeliest. How does a story begin?

# %%
with torch.no_grad():
    scores = toy(torch.tensor([[toy_tok.bos_id]]))[0, -1]
top = scores.topk(12).indices
fig, ax = plt.subplots(figsize=(6, 2.2))
for shift, temperature in zip((-0.3, 0, 0.3), (0.5, 1.0, 2.0), strict=True):
    p = (scores / temperature).softmax(-1)[top].tolist()
    ax.bar([place + shift for place in range(12)], p, 0.28, label=f"temperature {temperature}")
ax.set_xticks(range(12), [toy_tok.pieces[i].lstrip("▁") for i in top.tolist()])
ax.set(xlabel="first piece of a story", ylabel="probability")
ax.legend()
plt.show()

# %%
for temperature in (0.0, 0.8, 2.0):
    (completion,) = generate(
        toy, toy_tok, "One morning", max_new_tokens=30, temperature=temperature, seed=1
    )
    show(f"{temperature}: One morning{completion.text}")

# %% [markdown]
# ## A model that answers
#
# All this goes on with a text. An assistant is the same model, trained a little longer on dialogues
# in which marks say who speaks: you have some minutes more, and `data/toy/chat` is what they make.
# It reads the whole dialogue each time, and writes the next answer.

# %%
from minillama.chat import Conversation
from minillama.config import Sampling

assistant, assistant_tok = load("../data/toy/chat")
talk = Conversation(assistant, assistant_tok, sampling=Sampling(temperature=0.0))
for question in (
    "Hello, I am Mia.",
    "Emil had a drum, and Ida had a kite. Who had the kite?",
    "What can we eat, the soup or the boat?",
):
    print(">", question)
    show("".join(talk.ask(question)))
assert "Mia" in talk.messages[1].content
assert "Ida" in talk.messages[3].content
assert "soup" in talk.messages[5].content

# %% [markdown]
# ## Exercises
#
# **1. Write by counting.** Let the counting model write: start with a word, draw the next one in
# proportion to how often it follows, and so on. Here are the counts. You will see what a model
# writes that looks back one word.

# %%
counts = defaultdict(Counter)
for before, after in pairwise(everything.split()):
    counts[before][after] += 1
print('after "There":', dict(counts["There"]))


# %% tags=["exercise-1"]
def write_by_counting(word, n_words, rng):
    """Give back n_words words as a list; the first is `word`. rng is a random.Random."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
written = [write_by_counting("There", 12, Random(seed)) for seed in range(400)]
for text in written:
    assert len(text) == 12
    assert text[0] == "There"
    assert all(after in counts[before] for before, after in pairwise(text))
for word, n in counts["There"].items():
    found = sum(text[1] == word for text in written) / len(written)
    assert abs(found - n / counts["There"].total()) < 0.08
print(" ".join(written[0]))
print("exercise 1: correct")

# %% [markdown]
# **2. Temperature without scores.** Somebody gives you the probabilities of the next piece, not the
# scores. Apply the temperature all the same. (Scores are logarithms of probabilities, up to a
# constant that doesn't matter.)


# %% tags=["exercise-2"]
def with_temperature(p, temperature):
    """p are probabilities at temperature 1; give back those at another temperature."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
for temperature in (0.5, 1.0, 3.0):
    expected = (scores / temperature).softmax(-1)
    torch.testing.assert_close(with_temperature(scores.softmax(-1), temperature), expected)
print("exercise 2: correct")

# %% [markdown]
# **3. A fair comparison.** Our two models have different vocabularies, so their losses *per token*
# can't be compared: who cuts finer has easier pieces. Per *letter* they can. Give a story a BOS in
# front, sum up the loss of all its tokens after that, and divide by the number of its letters
# (spaces and signs are letters, too).


# %% tags=["exercise-3"]
def loss_per_letter(model, tok, story):
    """In nats, a float."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
def mean_loss(model, tok):
    return sum(loss_per_letter(model, tok, story) for story in new_stories[:20]) / 20


ids = torch.tensor([tok.encode(puzzle, bos=True)])
with torch.no_grad():
    expected = next_token_loss(model(ids[:, :-1]), ids[:, 1:]) / len(puzzle)
assert abs(loss_per_letter(model, tok, puzzle) - expected) < 1e-4
assert mean_loss(toy, toy_tok) < mean_loss(model, tok)
print("exercise 3: correct")

# %% [markdown]
# ## The map of the course
#
# Each notebook builds one piece by hand, shows that it equals the package's, and lets you break it.
# Each runs alone. *LLaMA* is Touvron et al. 2023
# ([arXiv:2302.13971](https://arxiv.org/abs/2302.13971)), *Llama 2* its successor of the same year
# ([arXiv:2307.09288](https://arxiv.org/abs/2307.09288)).
#
# | notebook | you build | in `minillama/` | paper |
# |---|---|---|---|
# | 0 · this tour | | | |
# | [1 · tokenizer](01_tokenizer.ipynb) | pieces, out of bytes | `tokenizer/` | LLaMA, 2.1 |
# | [2 · RoPE](02_rope.ipynb) | positions that are angles | `model/rope.py` | LLaMA, 2.2 |
# | [3 · RMSNorm](03_rmsnorm.ipynb) | numbers kept in range | `model/norm.py` | LLaMA, 2.2 |
# | [4 · SwiGLU](04_swiglu.ipynb) | the gated layer | `model/feed_forward.py` | LLaMA, 2.2 |
# | [5 · attention](05_gqa_attention.ipynb) | looking back | `model/attention.py` | Llama 2, 2.2 |
# | [6 · Llama](06_llama.ipynb) | the whole model, all sizes | `model/llama.py` | LLaMA, 2.2 |
# | [7 · data](07_data.ipynb) | clean text out of a dirty web | `data/` | LLaMA, 2.1 |
# | [8 · pretraining](08_pretraining.ipynb) | a run that survives | `training/` | LLaMA, 2.3 |
# | [9 · generation](09_generation.ipynb) | from probabilities to text | `generation/` | |
# | [10 · fine-tuning](10_sft.ipynb) | from texts to answers | `chat/sft.py` | Llama 2, 3.1 |
# | [11 · Ghost Attention](11_gatt.ipynb) | said once, it holds | `chat/gatt.py` | Llama 2, 3.3 |
# | [16 · real weights](16_real_weights.ipynb) | any box, opened | `checkpoint/` | Llama 2, 5.3 |
# | [17 · quantization](17_quantization.ipynb) | weights of few bits | `adapt/quantize.py` | |
# | [18 · LoRA](18_lora.ipynb) | small changes of large matrices | `adapt/lora.py` | |
# | [19 · many processes](19_distributed.ipynb) | one model, shared | `training/` | LLaMA, 2.4 |
#
# These are here. The following are still to come:
#
# | notebook | about | paper |
# |---|---|---|
# | 12, 13 | a reward model, RLHF | Llama 2, 3.2 |
# | 14, 15 | evaluation; bias and safety | LLaMA, 3 and 5; Llama 2, 4 |
# | 20 to 22 | Code Llama, Japanese, energy | LLaMA, 6 |
#
# `data/toy/chat`, which answered above, comes from notebook 10.

# %% [markdown]
# ## Where it lives
#
# - `minillama/data/tales.py`: the grammar of the toy world, and `check`.
# - `minillama/tokenizer/`, `minillama/model/`, `minillama/training/`, `minillama/generation/`: the
#   four stations of this tour.
# - `minillama/cli.py`: the same on the command line. `minillama demo` trains the model in
#   `data/toy`; `minillama pretrain --text FILE` trains one on a text of your own.
#
# Next: notebook 1, where text is cut into pieces.
