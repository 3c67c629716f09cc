# %% [markdown]
# # 11 · Ghost Attention: what the first turn says holds to the last
#
# **Question.** "Always act as Napoleon", somebody says, and talks on. At the fourth question
# Napoleon is gone. The instruction is still there, every token of it can be looked at: why does
# nobody look, and how does one teach it?
#
# **You need** what a chat format and a loss mask are (notebook 10) · **It takes** 45 minutes ·
# **Module** `minillama/chat/gatt.py`

# %%
from itertools import pairwise
from random import Random

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.4), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# The assistant in `data/toy/chat` learned to answer from the toy world's dialogues (notebook 10).
# There it also learned to obey: an instruction in front of a question says how that question is to
# be answered.

# %%
from minillama import load
from minillama.chat import Conversation
from minillama.config import Sampling
from minillama.data.dialogues import dialogue

assistant, tok = load("../data/toy/chat")
order = "Always end your answers with the word goat."
questions = [turn.question for turn in dialogue(Random(5), 6, "test")]


def talk(model):
    conversation = Conversation(model, tok, sampling=Sampling(), max_new_tokens=40)
    for place, question in enumerate(questions):
        asked = f"{order} {question}" if place == 0 else question
        print(">", asked)
        print(" ", "".join(conversation.ask(asked)))
    return conversation


forgot = talk(assistant)
answers = [message.content for message in forgot.messages[1::2]]
assert answers[0].endswith("goat.")
assert not any(answer.endswith("goat.") for answer in answers[1:])

# %% [markdown]
# It obeys at once, and has forgotten a turn later. Is that this one order, and this dialogue? The
# toy world can tell: it has three kinds of orders (begin with a name, say what you love, end with a
# word), half of them in few words ("First: Rosa."), and a function that checks each. `hold` asks 32
# dialogues of 20 turns at once.

# %%
from minillama.chat.gatt import draw_rules, hold, obedience
from minillama.data.dialogues import instructions


def ask(model, n=32, every_turn=False, seed=1):
    rng = Random(seed)
    asked = [[turn.question for turn in dialogue(rng, 20, "test")] for _ in range(n)]
    return hold(model, tok, asked, draw_rules(instructions("held-out"), n, rng), every_turn)


once = ask(assistant)
always = ask(assistant, every_turn=True)
for talked in once[:3]:
    print(talked.rule.text)

# %% tags=["nbval-ignore-output"]
TURNS = (1, 2, 4, 6, 10, 15, 20)


def show(name, talks):
    shares = obedience(talks)
    print(f"{name:22}", "  ".join(f"{turn}: {shares[turn - 1]:4.0%}" for turn in TURNS))
    return shares


before = show("told once", once)
told = obedience(always)
print(f"told on every turn: {sum(told[:10]) / 10:.0%} over the first ten")
assert before[0] > 0.9
assert max(before[5:]) < 0.3
assert min(told[:10]) > 0.8

# %% [markdown]
# The authors of Llama 2 saw the same of their model: what it had been told was still there in 100%
# of the dialogues at turn 2, in 10% at turn 4, in none at turns 6 and 20 (Touvron et al. 2023b).
#
# But look at the last line. Told on *every* turn, the assistant obeys. It can do what it is asked
# to; what it lacks is to connect this turn with the first. That is the idea of **Ghost Attention**
# (GAtt): the model itself can make the data that it learns from.
#
# ## By hand
#
# One dialogue of three turns. First, the instruction is put in front of every question, and the
# model answers. (The later questions get its short form. That is ours, to save context; the paper
# repeats the same instruction, and shortens half of them everywhere.)

# %%
three = [turn.question for turn in dialogue(Random(8), 3)]
(rule,) = draw_rules(instructions("train", "last word"), 1, Random(3))
(held,) = hold(assistant, tok, [three], [rule])
three_messages = held.messages
print("rule:", rule.text)
for message in three_messages:
    print(f"{message.role:9}", message.content)
assert all(held.obeyed)

# %% [markdown]
# Second, the very same dialogue is written down for training, with the instruction in front of the
# *first* question only. And the loss? The last answer is what the model is to learn. The answers
# before it were given to other prompts (prompts with an instruction in them), so here they look as
# if they came from nowhere. The paper sets the loss to zero on everything but the last answer.

# %%
from minillama.chat import Message, encode_dialog

first, *rest = held.messages
training = [Message("user", f"{rule.text} {first.content}"), *rest]
tokens = encode_dialog(training, tok)
start = len(encode_dialog(training[:-1], tok).ids)
by_hand = [place >= start for place in range(len(tokens.ids))]

from minillama.chat.gatt import ghost

example = ghost(held.messages, rule.text, tok)
assert example.ids == tokens.ids
assert example.learned == by_hand
learned = [token for token, counts in zip(example.ids, example.learned, strict=True) if counts]
print("learned:", [tok.pieces[token] for token in learned])
print(f"{len(learned)} of {len(example.ids)} tokens carry loss")

# %% [markdown]
# Drawn: each token of the dialogue is a small box, the instruction orange, what is learned blue.


# %%
def draw(ax, example, n_told, title):
    width = 64
    for place, counts in enumerate(example.learned):
        colour = "tab:blue" if counts else "tab:orange" if 8 <= place < 8 + n_told else "0.88"
        ax.add_patch(plt.Rectangle((place % width, -(place // width)), 0.9, 0.8, color=colour))
    ax.set(xlim=(0, width), ylim=(-(len(example.ids) // width) - 0.2, 1), title=title)
    ax.axis("off")


n_told = len(tok.encode(rule.text))
plain = encode_dialog(training, tok)
fig, (left, right) = plt.subplots(2, figsize=(6, 1.6))
draw(left, plain, n_told, "fine-tuning as in notebook 10 learns every answer")
draw(right, example, n_told, "Ghost Attention: the last answer")
plt.show()

# %% [markdown]
# ## One pass for twenty examples
#
# Only a few tokens of a long dialogue teach anything, which is expensive. Now each turn could be
# the last one of some example: a dialogue of twenty turns has twenty examples in it, and they are
# beginnings of each other. What a causal model computes at a token depends on what stands before
# it, so the answer of turn 3 costs the same loss in the whole dialogue as in its first three turns.
# One pass over the whole gives the sum of all twenty losses.


# %%
def loss(example):
    ids = torch.tensor([example.ids])
    targets = ids.where(torch.tensor([example.learned]), -100)[:, 1:]
    return cross_entropy(assistant(ids[:, :-1])[0], targets[0], reduction="sum")


with torch.no_grad():
    ends = [ghost(held.messages[: 2 * n], rule.text, tok) for n in (1, 2, 3)]
    apart = [loss(each) for each in ends]
    together = loss(ghost(held.messages, rule.text, tok, learned=held.obeyed))
print(f"{' + '.join(f'{each:.2f}' for each in apart)} = {together:.2f} nats")
assert_close(sum(apart), together, rtol=1e-3, atol=1e-3)

# %% [markdown]
# These are the losses before any training: the model is not surprised by the first answer, and very
# much by the others. (One pass serves where the earlier answers obey. Those that do not must keep
# their loss of zero: see below.)
#
# ## Learning it
#
# 192 dialogues of 2 to 20 turns, held under instructions whose words are never tested, and 15
# seconds of training. (`minillama gatt` takes more of both.)

# %% tags=["nbval-ignore-output"]
from minillama.chat.gatt import examples
from minillama.chat.sft import batches, pack
from minillama.config import TrainingConfig
from minillama.training import make_optimizer, train

rng = Random(7)
dialogues = [dialogue(rng, 2 + n % 19) for n in range(192)]
rules = draw_rules(instructions("train"), len(dialogues), rng)
asked = [[turn.question for turn in each] for each in dialogues]
own = [[turn.answer for turn in each] for each in dialogues]
held = hold(assistant, tok, asked, rules, own=own)
good = [answer for talked in held for answer in talked.obeyed]
print(f"{len(good):,} answers, of which {sum(good) / len(good):.0%} obey: the others are left out")
context = assistant.config.max_seq_len  # tokens: no dialogue that it has held is longer
recipe = TrainingConfig(
    steps=150, batch_size=1, seq_len=context, learning_rate=2e-3, warmup_steps=10
)


def learn(data):
    model, _ = load("../data/toy/chat")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attention." in name)
    source = batches(pack(data, recipe.seq_len), recipe.batch_size, seed=0)
    losses = [stats.loss for stats in train(model, make_optimizer(model, recipe), source, recipe)]
    return model, losses


short_run, losses = learn(examples(held, tok, Random(0)))
print(f"loss: {sum(losses[:5]) / 5:.1f} at first, {sum(losses[-20:]) / 20:.1f} at last")
short = show("after a short run", ask(short_run))
assert sum(losses[-20:]) < 0.5 * 4 * sum(losses[:5])
assert sum(short[1:10]) > sum(before[1:10]) + 5

# %% [markdown]
# We let only the matrices of *attention* change: the assistant knows all that it is to say, it has
# to look elsewhere. If every weight may change, it learns the few words of these instructions by
# heart instead, and says them where it is told others ([results](../docs/results.md)).
#
# The stored checkpoint `data/toy/gatt` is what the command makes in two minutes:
#
#     minillama gatt data/toy/chat --out runs/toy-gatt
#
# Here it is asked the same questions under the same instructions. None of their words stood in an
# instruction that Ghost Attention trained on.

# %% tags=["nbval-ignore-output"]
ghosted, _ = load("../data/toy/gatt")
after = show("after GAtt", ask(ghosted))
assert min(after[9], after[19]) > 0.8

# %%
kept = talk(ghosted)
assert all(message.content.endswith("goat.") for message in kept.messages[1::2])

# %% [markdown]
# ## The table of the paper, drawn
#
# The paper's table has two rows: without GAtt 100%, 10%, 0% and 0% at turns 2, 4, 6 and 20, with it
# 100% throughout. Ours, with error bars: three seeds of dialogues and training, from the same
# assistant, 128 dialogues each. That takes ten minutes, so `python benchmarks/gatt.py --out FILE`
# has kept what it found.

# %%
import json
from pathlib import Path
from statistics import mean, stdev

PAPER = {2: 1.00, 4: 0.10, 6: 0.00, 20: 0.00}
measured = json.loads(Path("../data/toy/obedience.json").read_text())
assert measured["turns"] == list(TURNS)

fig, ax = plt.subplots()
for name, colour in (("without GAtt", "tab:gray"), ("with GAtt", "tab:blue")):
    at_turns = list(zip(*measured[f"{name}: obeys"], strict=True))  # the seeds of each turn
    means, deviations = (list(map(of, at_turns)) for of in (mean, stdev))
    print(f"{name:12}", *(f"{m:.2f} ± {d:.2f}" for m, d in zip(means, deviations, strict=True)))
    style = {"fmt": "o-", "markersize": 4, "capsize": 3, "color": colour}
    ax.errorbar(TURNS, means, deviations, **style, label=f"toy, {name}")
assert min(means[TURNS.index(10)], means[TURNS.index(20)]) > 0.9
front = {"markersize": 9, "zorder": 3}
ax.plot(PAPER.keys(), PAPER.values(), "x:", color="tab:orange", label="Llama 2, no GAtt", **front)
ax.plot(PAPER.keys(), [1.0] * 4, "+:", color="tab:red", label="Llama 2, with GAtt", **front)
ax.set(xlabel="turn", ylabel="share that obeys", ylim=(-0.05, 1.08), xticks=TURNS)
ax.legend(ncols=2, loc="center")
plt.show()

# %% [markdown]
# (The tasks differ: the paper's judges were people, and its attributes hobbies and figures. And our
# assistant forgets at once, theirs at the fourth turn.)
#
# ## Where does it look?
#
# In the paper's figure of attention each row is a token of the dialogue, each column a token that
# it can look back at, and the colour is the *strongest* attention in the whole network: the maximum
# over all heads of all layers. Neighbouring tokens are put into one bin.
#
# By hand for one head, then over all of them:

# %%
from minillama.chat.gatt import strongest_attention

ids = torch.tensor(encode_dialog(training[:3], tok).ids)
layer = assistant.layers[0]
with torch.no_grad():
    x = layer.attention_norm(assistant.tok_embeddings(ids))
    q, k = layer.attention.wq(x)[:, :32], layer.attention.wk(x)  # head 0

from minillama.model import apply_rope, rope_angles

angles = rope_angles(torch.arange(len(ids)), 32, assistant.config.rope_theta)
scores = apply_rope(q, angles) @ apply_rope(k, angles).T / 32**0.5
later = torch.ones_like(scores, dtype=torch.bool).triu(1)
head = scores.masked_fill(later, float("-inf")).softmax(-1)
strongest = strongest_attention(assistant, ids)
assert (strongest >= head - 1e-5).all()
print(f"{len(ids)} tokens; the strongest is at least head 0 of layer 0 everywhere")

# %% [markdown]
# Now the dialogue from above, with its first order, before and after. The order's tokens stand at
# the left edge, before the orange line.

# %%
BIN = 8


def binned(square):
    n = len(square) // BIN * BIN
    return square[:n, :n].reshape(n // BIN, BIN, n // BIN, BIN).amax((1, 3))


ids = torch.tensor(encode_dialog(kept.messages, tok).ids)
maps = {name: strongest_attention(model, ids) for name, model in
        (("before", assistant), ("after", ghosted))}  # fmt: skip
fig, axes = plt.subplots(1, 2, figsize=(6, 3))
for ax, (name, square) in zip(axes, maps.items(), strict=True):
    ax.imshow(binned(square), cmap="viridis", vmin=0, vmax=1)
    ax.axvline(len(tok.encode(order)) / BIN + 0.5, color="tab:orange", linewidth=1)
    ax.set(title=f"{name} GAtt", xlabel=f"looked at (bins of {BIN} tokens)", ylabel="token")
plt.show()

# %% [markdown]
# On the left, each turn sees itself and the one before. On the right a column has appeared: every
# turn looks back at the order. How strongly? Of each answer we take the strongest look of any token
# at any word of the instruction. (Both models read the same dialogue, the one held after GAtt.)


# %%
def looks(square, conversation):
    n_told, strongest = len(tok.encode(order)), []
    for turn in range(2, 2 * len(questions) + 2, 2):
        end = len(encode_dialog(conversation.messages[:turn], tok).ids)
        asked = len(encode_dialog(conversation.messages[: turn - 1], tok).ids)
        strongest.append(square[asked - 1 : end - 1, 8 : 8 + n_told].max().item())
    return strongest


fig, ax = plt.subplots(figsize=(6, 2))
for name, square in maps.items():
    ax.plot(range(1, len(questions) + 1), looks(square, kept), "o-", label=f"{name} GAtt")
ax.set(xlabel="turn", ylabel="attention to the order", ylim=(0, None))
ax.legend()
plt.show()
assert min(looks(maps["after"], kept)) > 0.9
assert min(looks(maps["before"], kept)) < 0.3

# %% [markdown]
# After GAtt one token of every answer looks at the order with all it has. Which one?

# %%
asked, end = (len(encode_dialog(kept.messages[:n], tok).ids) for n in (11, 12))
seen = maps["after"][asked - 1 : end - 1, 8 : 8 + len(tok.encode(order))].amax(-1)
looking = tok.pieces[encode_dialog(kept.messages, tok).ids[asked - 1 + int(seen.argmax())]]
print(f"in the last answer: {looking!r}")
assert looking == ","

# %% [markdown]
# The comma, behind which the word must come.
#
# ## What breaks: answers that disobey, and are learned
#
# In our training data (`own` above; the paper does not say so) some of the earlier answers are the
# dialogue's own, from before anybody gave an instruction. Behind one they *disobey*, and carry no
# loss. What are they good for, and what if they were learned, too? Three assistants, of the same
# dialogues:


# %% tags=["nbval-ignore-output"]
def with_own(share, learn_own):
    rng, found = Random(0), []
    for talked in held:
        messages, learned = list(talked.messages), talked.obeyed
        for turn in range(len(learned)):
            if rng.random() < share:
                messages[2 * turn + 1] = Message("assistant", talked.own[turn])
                learned[turn] = learn_own
        if any(learned):
            found.append(ghost(messages, talked.rule.text, tok, learned))
    return found


curves = {
    "all answers are the model's, which obey": with_own(0.0, False),
    "half of them the dialogue's own, not learned": with_own(0.5, False),
    "half of them the dialogue's own, learned": with_own(0.5, True),
}
fig, ax = plt.subplots(figsize=(6, 2.6))
handed_on = {}
for name, data in curves.items():
    talked = ask(learn(data)[0])
    curves[name] = obedience(talked)
    pairs = [pair for each in talked for pair in pairwise(each.obeyed)]
    for before_it in (True, False):
        now = [obeyed for last, obeyed in pairs if last is before_it]
        handed_on[name, before_it] = sum(now) / max(len(now), 1)
    ax.plot(range(1, 21), curves[name], "o-", markersize=3, label=name)
ax.set(xlabel="turn", ylabel="share that obeys", ylim=(-0.05, 1.05), xticks=TURNS)
fig.legend(loc="outside lower center")
plt.show()
for before_it, shown in ((True, "obeys"), (False, "does not")):
    shares = [f"{share:.0%}" for (_, was), share in handed_on.items() if was is before_it]
    blue, orange, green = shares
    print(f"behind an answer that {shown:8}: blue {blue}, orange {orange}, green {green} obey")
copied, read, unlearned = (sum(shares[1:]) / 19 for shares in curves.values())
print(f"turns 2 to 20: {copied:.1f}, {read:.1f} and {unlearned:.1f} obey")
assert unlearned < 0.5 * read
assert copied < read

# %% [markdown]
# Learned (green), they teach to disobey. The paper speaks of a mismatch between the last answer and
# those before it, and sets the loss of these to zero; here is what it can cost.
#
# Not learned (orange), they are good for something. Where every earlier answer obeys (blue), a
# model may copy the manner of the answer before, and need not look at the first turn at all: one
# mistake is then handed on to the end, as the second line says. Where some disobey, copying does
# not help; it has to look.
#
# ## Exercises
#
# **1. Once, or everywhere.** Write `told`, which gives back the messages of a dialogue with an
# instruction in front of the user's first message, and a reminder, if there is one, in front of the
# user's others.


# %% tags=["exercise-1"]
def told(messages, instruction, reminder=""):
    """`messages` are Message; give back a list of them."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
from minillama.chat.gatt import instructed

for reminder in ("", "Sing!"):
    expected = instructed(three_messages, "Always sing.", reminder)
    assert told(three_messages, "Always sing.", reminder) == expected
print("exercise 1: correct")

# %% [markdown]
# **2. How much is wasted?** A dialogue of n turns takes 40 tokens a turn, 9 of them for the answer.
# What share of the tokens that are read carries loss: if each turn is the last one of an example of
# its own, and if one pass serves all?


# %% tags=["exercise-2"]
def shares_learned(n):
    """Give back two floats: examples of their own, and one pass."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
apart, together = shares_learned(20)
assert abs(apart - 20 * 9 / (40 * 210)) < 1e-9
assert abs(shares_learned(3)[0] - 27 / 240) < 1e-9
assert shares_learned(1) == (9 / 40, 9 / 40)
assert abs(together / apart - 10.5) < 1e-9
print("exercise 2: correct")

# %% [markdown]
# **3. A rule of your own.** Anything with `kind`, `text`, `short` and `obeys` is an instruction.
# Write one that wants the answer to name an animal of the toy world
# (`minillama.data.tales.ANIMALS`). Then ask the assistant whether it obeys, although nobody taught
# it to: `draw_rules([NamesAnAnimal()], 1, Random(0))` makes a rule of it, which `hold` takes.


# %% tags=["exercise-3"]
class NamesAnAnimal:
    kind, text, short = "animal", "Always speak of an animal.", "Animal."

    def obeys(self, answer):
        raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
from minillama.data.tales import ANIMALS

assert all(NamesAnAnimal().obeys(f"The {animal} had it.") for animal in ANIMALS)
assert not NamesAnAnimal().obeys("Max had the boat.")
assert not NamesAnAnimal().obeys("Nobody was foxed by the beard.")
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/chat/gatt.py`: `draw_rules`, `hold`, `ghost`, `examples`, `obedience`,
#   `strongest_attention`.
# - `minillama/data/dialogues.py`: the toy world's instructions, and what obeys them.
# - `minillama gatt CHECKPOINT --instructions FILE --data FILE...` does it with your own.
# - `benchmarks/gatt.py` and [docs/results.md](../docs/results.md): what was measured, and what else
#   was tried.
#
# Touvron et al. 2023, *Llama 2*, sec. 3.3 ([arXiv:2307.09288](https://arxiv.org/abs/2307.09288)).
#
# Next: notebook 12, the reward model.
