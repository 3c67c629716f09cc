# %% [markdown]
# # 9 · Generation: from probabilities to text
#
# **Question.** A language model gives every token a probability of coming next, and that is all it
# does. How does a text come out of it: which token is taken, what is computed only once, where does
# the text end, and how do many readers share one model?
#
# **You need** notebooks 5 and 6 · **It takes** 75 minutes · **Module** `minillama/generation/`

# %%
from collections import Counter
from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

torch.set_num_threads(1)
torch.set_printoptions(precision=3, sci_mode=False)
plt.rcParams.update({"figure.figsize": (6, 2.5), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# The toy model that `minillama demo` trains, and three ways to go on with "One morning": always
# with the likeliest token, or with one that is drawn as the model says, or with one that is drawn
# from a flatter distribution.

# %%
from minillama import generate, load
from minillama.data import tales

toy, tok = load("../data/toy/checkpoint")
for temperature in (0.0, 1.0, 2.0):
    (completion,) = generate(toy, tok, "One morning", 26, temperature=temperature, seed=2)
    print(f"{temperature}: {completion.text!r}")

# %% [markdown]
# The first is right, and the same each time. The last is new each time, and nonsense. The trouble
# is in the tail. Of 1,024 tokens, a few fit; each of the others is improbable, but they are many.
# Here is what the model gives to all tokens but the ten likeliest, at each place of one of its
# stories; below, how probable it is that a story of so many tokens never draws one of them.

# %%
(story,) = generate(toy, tok, "One morning", 120)
ids = tok.encode("One morning", bos=True) + story.token_ids
with torch.inference_mode():
    logits = toy(torch.tensor([ids[:-1]]))[0, -len(story.token_ids) :]  # (seq, vocab)

fig, (left, right) = plt.subplots(1, 2)
for temperature in (1.0, 1.5, 2.0):
    p = (logits / temperature).softmax(-1).sort(descending=True).values
    tail = p[:, 10:].sum(-1)
    left.plot(tail, label=f"temperature {temperature}")
    right.plot((1 - tail).cumprod(0))
    print(f"{temperature}: {tail.mean():6.1%} a token, {(1 - tail).prod():6.1%} for the story")
left.set(title="probability of the tail", xlabel="token", ylim=(0, 1))
right.set(title="probability that no token was from the tail", xlabel="token", ylim=(0, 1))
left.legend()
plt.show()
assert (1 - tail).prod() < 1e-3

# %% [markdown]
# ## Which token: five knobs, by hand
#
# Four tokens, with probabilities that a pencil can handle. A model gives *logits*, the logarithms
# of these up to a constant.

# %%
p = torch.tensor([0.5, 0.3, 0.15, 0.05])
four_logits = p.log()


def normalised(p):
    return p / p.sum()


# %% [markdown]
# **Temperature** T raises each probability to the power 1 / T (it divides the logits by T). At T =
# 1/2 that squares them: 0.25, 0.09, 0.0225, 0.0025, of together 0.365. Towards T = 0 the likeliest
# takes all.

# %%
print("T = 0.5:", normalised(p**2))
print("T = 2:  ", normalised(p**0.5))
assert_close(normalised(p**2), (four_logits / 0.5).softmax(-1))
assert_close(normalised(p**2)[0].item(), 0.25 / 0.365, rtol=1e-5, atol=0)


# %% [markdown]
# The others cut the tail off. **Top-k** keeps the k likeliest tokens (Fan et al. 2018). But how
# many are good depends on the place: after "Once upon a" there is one, at the start of a story
# there are several. So **top-p** keeps the fewest tokens that together have probability p (Holtzman
# et al. 2020), and **min-p** those that are at least min_p times as probable as the likeliest
# (Nguyen et al. 2024).


# %%
def top_k_by_hand(p, k):
    least = sorted(p, reverse=True)[k - 1]
    return [x if x >= least else 0.0 for x in p]


def top_p_by_hand(p, top_p):
    kept, mass = [0.0] * len(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass <= top_p:  # those before it are not enough
            kept[i] = p[i]
        mass += p[i]
    return kept


def min_p_by_hand(p, min_p):
    return [x if x >= min_p * max(p) else 0.0 for x in p]


# %%
from minillama.generation import keep_min_p, keep_top_k, keep_top_p

for by_hand, package, value in (
    (top_k_by_hand, keep_top_k, 2),
    (top_p_by_hand, keep_top_p, 0.75),
    (top_p_by_hand, keep_top_p, 0.9),
    (min_p_by_hand, keep_min_p, 0.2),
):
    kept = normalised(torch.tensor(by_hand(p.tolist(), value)))
    print(f"{by_hand.__name__:14} {value}:", kept)
    assert_close(kept, package(four_logits, value).softmax(-1))

# %% [markdown]
# Where they differ: a place where the model is sure, and one where it is not. Top-k takes as many
# tokens in both. Top-p takes few or many; but when it needs a tenth of a percent more, it takes
# whatever comes next. Min-p asks how a token compares with the best.

# %%
with torch.inference_mode():
    start = toy(torch.tensor([[tok.bos_id]]))[0, -1]
sure = logits[60]
fig, axes = plt.subplots(1, 2)
for ax, place, title in zip(axes, (sure, start), ("within a story", "at its start"), strict=True):
    place_p = place.softmax(-1).sort(descending=True).values[:30]
    ax.bar(range(30), place_p.tolist(), color="lightgray")
    for height, (name, cut) in enumerate(
        {
            "top-k = 10": keep_top_k(place, 10),
            "top-p = 0.95": keep_top_p(place, 0.95),
            "min-p = 0.1": keep_min_p(place, 0.1),
        }.items()
    ):
        n = int(cut.isfinite().sum())
        ax.plot([-0.5, n - 0.5], [0.9 - 0.12 * height] * 2, lw=3, label=f"{name}: {n}")
    ax.set(title=title, xlabel="tokens, the likeliest first", ylim=(0, 1))
    ax.legend(loc="center right")
plt.show()

# %% [markdown]
# And what does it do to the stories? Of 25 that start from nothing, how many agree with themselves
# from the first sentence to the last (`tales.check`)? All of them are different, in every column.


# %%
def consistent(n=25, **settings):
    drawn = generate(toy, tok, [""] * n, 256, seed=range(n), **settings)
    texts = {completion.text for completion in drawn}
    assert len(texts) == n or settings["temperature"] == 0
    return sum(bool(tales.check(text)) for text in texts) / n


temperatures = [0.5, 1.0, 1.5, 2.0]
cuts = {
    "no cut": {},
    "top-k = 5": {"top_k": 5},
    "top-p = 0.9": {"top_p": 0.9},
    "min-p = 0.1": {"min_p": 0.1},
}
shares = {
    name: [consistent(temperature=t, **cut) for t in temperatures] for name, cut in cuts.items()
}
fig, ax = plt.subplots()
for name, share in shares.items():
    ax.plot(temperatures, share, "o-", label=name)
ax.set(xlabel="temperature", ylabel="consistent stories", ylim=(-0.03, 1.03), xticks=temperatures)
ax.legend()
plt.show()
assert shares["no cut"][2] < 0.1
assert shares["min-p = 0.1"][2] > 0.8

# %% [markdown]
# (That min-p bears the most heat here says that it was measured on a grammar, whose every wrong
# word is a mistake. Which cut is best for real text is disputed.)
#
# The fifth knob, the **repetition penalty** (Keskar et al. 2019), divides the logits of the tokens
# that the text already has. Dividing a negative logit would make its token *likelier*; the paper
# divides all the same, and the libraries multiply instead.

# %%
from minillama.generation import penalize

scores = torch.tensor([4.0, -4.0, 2.0])
print(penalize(scores, [0, 1], penalty=2.0))
assert penalize(scores, [0, 1], penalty=2.0).tolist() == [2.0, -8.0, 2.0]

# %% [markdown]
# It is meant for models that go round in circles. It has a price: a story *must* repeat the names
# of those it is about.

# %%
penalties = [1.0, 1.1, 1.3, 1.6]
penalised = [consistent(temperature=0.8, repetition_penalty=penalty) for penalty in penalties]
for penalty, share in zip(penalties, penalised, strict=True):
    print(f"penalty {penalty}: {share:4.0%} of the stories are consistent")
assert penalised[-1] < 0.5 < penalised[0]

# %% [markdown]
# **The draw.** Put the probabilities end to end on a line, and take the token on whose piece a
# random point falls. A *seed* fixes the points, and with them the text.

# %%
from minillama.generation import draw


def draw_by_hand(p, generator):
    point = 1 - torch.rand((), generator=generator, dtype=torch.float64).item()  # above 0, up to 1
    for token, probability in enumerate(p.tolist()):
        point -= probability
        if point <= 0:
            return token


ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
drawn = [draw_by_hand(p, ours) for _ in range(1000)]
assert drawn == [draw(p, theirs) for _ in range(1000)]
print("of 1000 draws:", dict(sorted(Counter(drawn).items())))

# %% [markdown]
# ## The loop, and what it costs
#
# Take a token, put it behind the text, ask again. We count how many tokens the model reads: with
# the whole text each time, and with a KV cache (notebook 5), which keeps what was read.

# %%
from minillama.model import KVCache

n_read = 0


def counted(module, arguments):
    global n_read
    n_read += arguments[0].numel()


toy.layers[0].attention.wq.register_forward_pre_hook(
    lambda module, arguments: counted(module, (arguments[0][..., 0],))
)


@torch.inference_mode()
def write(prompt, n, cached):
    """The n likeliest next tokens, and how many tokens the model has read after each."""
    global n_read
    n_read = 0
    ids, reads = list(prompt), []
    cache = KVCache(toy.config, batch=1, max_len=len(prompt) + n) if cached else None
    unread = ids
    for _ in range(n):
        logits = toy(torch.tensor([unread]), cache)[0, -1]
        ids = [*ids, int(logits.argmax())]
        unread = ids[-1:] if cached else ids
        reads.append(n_read)
    return ids[len(prompt) :], reads


prompt = tok.encode("One morning", bos=True)
slow, reads_without = write(prompt, 120, cached=False)
fast, reads_with = write(prompt, 120, cached=True)
assert slow == fast == story.token_ids
print(f"to write 120 tokens, the model reads {reads_with[-1]} with a cache,")
print(f"and {reads_without[-1]:,} without. The text is the same, and that of generate.")
assert reads_with[-1] == len(prompt) + 119
assert reads_without[-1] == sum(len(prompt) + i for i in range(120))

# %%
fig, ax = plt.subplots(figsize=(4, 2.2))
ax.plot(reads_without, label="without a cache")
ax.plot(reads_with, label="with a cache")
ax.set(xlabel="tokens written", ylabel="tokens read", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# The prompt itself is read in one pass (*prefill*), which is far cheaper than token by token: the
# weights are fetched once. A prompt of 100,000 tokens would need much memory at once, though, so it
# is read in *chunks*. How it is cut doesn't matter:

# %%
from minillama.generation import Decoder

with torch.inference_mode():
    whole = toy(torch.tensor([ids[:60]]))[0, -1]
    for chunk in (60, 25, 7, 1):
        decoder = Decoder(toy, rows=1, max_len=64)
        for at in range(0, 60, chunk):
            last = decoder.prefill(0, [ids[at : min(at + chunk, 60)]])
        assert_close(last[0], whole, rtol=1e-4, atol=1e-4)
print("60 tokens in chunks of 60, 25, 7 or 1: the same logits")

# %% [markdown]
# ## Half a character
#
# A reader wants the text as it comes. But a token is not a piece of text: in this vocabulary an
# emoji is four tokens, one for each byte (notebook 1). Shown one by one they are broken, and the
# space in front of a word gets lost.

# %%
text = "Ada saw 日本 and a 🦙."
text_ids = tok.encode(text)
one_by_one = [tok.decode([token]) for token in text_ids]
print("".join(one_by_one))
assert "".join(one_by_one) != text

# %% [markdown]
# So the bytes of a character are held back until it is complete. In UTF-8 the first byte tells how
# many there are: below 128 it is alone, from 192 there are two, from 224 three, from 240 four.


# %%
def stream_by_hand(ids):
    held = b""
    for position, token in enumerate(ids):
        piece = tok.pieces[token].replace("▁", " ")
        if piece.startswith("<0x"):
            held += bytes([int(piece[3:5], 16)])
            length = next(
                n for n, first in ((4, 240), (3, 224), (2, 192), (1, 0)) if held[0] >= first
            )
            piece = ""
            if len(held) == length:
                piece, held = held.decode(), b""
        yield piece.removeprefix(" ") if position == 0 else piece


pieces = list(stream_by_hand(text_ids))
print(pieces)
assert "".join(pieces) == text

# %% [markdown]
# The package's decoder does the same, for any bytes, also those that spell nothing.

# %%
from minillama import stream

decoder = tok.decoder()
assert [decoder.push(token) for token in text_ids] == pieces
print("|".join(stream(toy, tok, "One morning", 20)))
assert "".join(stream(toy, tok, "One morning", 20)) == generate(toy, tok, "One morning", 20)[0].text

# %% [markdown]
# ## Where to stop
#
# A model ends its text with a token of its own, EOS. A program may want it to end elsewhere: at the
# first blank line, or before "User:". Such a *stop string* is text, and the tokens don't care where
# it begins. Looking for a token won't do; nor will a matcher that compares letter by letter and
# starts anew after a mismatch. It misses the string whose beginning overlaps with itself:


# %%
def naive(text, stop):  # -> the text before the stop string
    matched = 0
    for position, letter in enumerate(text):
        matched = matched + 1 if letter == stop[matched] else 0  # starts anew, too late
        if matched == len(stop):
            return text[: position + 1 - len(stop)]
    return text


print("'aab' in 'xab' + 'aaab':", repr(naive("xabaaab", "aab")), "where 'xaba' would be right")
assert naive("xabaaab", "aab") == "xabaaab"

# %% [markdown]
# And the pieces that were streamed can't be taken back, so nothing may be shown that could be the
# beginning of a stop string. By hand: put the new piece behind what was held back; if the stop
# string is in there, end; else hold back the longest end that the string starts with.


# %%
def filter_by_hand(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        n = max(n for n in range(len(stop)) if held.endswith(stop[:n]))  # 0: every text ends in ""
        yield held[: len(held) - n]
        held = held[len(held) - n :]
    yield held


print(list(filter_by_hand(["xab", "a", "a", "ab", "c"], "aab")))

# %% [markdown]
# `StopFilter` does so for several strings at once. Both, on every text of up to six letters and
# every stop string of up to three, letter by letter:

# %%
from minillama.generation import StopFilter

n_checked = 0
for letters, stop_letters in product(range(7), (1, 2, 3)):
    for text_, stop in product(product("ab", repeat=letters), product("ab", repeat=stop_letters)):
        text_, stop = "".join(text_), "".join(stop)
        stop_filter = StopFilter([stop])
        shown = "".join(stop_filter.push(letter) for letter in text_) + stop_filter.flush()
        assert shown == "".join(filter_by_hand(text_, stop)) == text_.partition(stop)[0]
        n_checked += 1
print(f"{n_checked:,} pairs of a text and a stop string: all right")
(cut,) = generate(toy, tok, "One morning", 120, stop=["empty bu", "The bell"])
print(repr(cut.text), "->", cut.finish_reason)
assert story.text.startswith(cut.text)

# %% [markdown]
# ## Many texts at once
#
# Reading one token for eight texts costs a large model hardly more than for one, since its weights
# are fetched once for all. But the texts have different lengths. The usual way is to fill up the
# short ones with *padding* on the left, so that all end at the same place. Then each token stands
# at another position than it would alone, and sees the padding, unless a mask hides it:

# %%
short, long = tok.encode("The fox", bos=True), ids[:40]
with torch.inference_mode():
    alone = toy(torch.tensor([short]))[0, -1].softmax(-1)
    padded = torch.tensor([[0] * (len(long) - len(short)) + short, long])
    on_the_left = toy(padded)[0, -1].softmax(-1)
word = int(alone.argmax())
print(f"behind 'The fox', {tok.pieces[word]!r} has {alone[word]:.0%};", end=" ")
print(f"with padding on the left, {on_the_left[word]:.0%}")
assert on_the_left[word] < 0.2 * alone[word]

# %% [markdown]
# minillama pads on the *right*, and needs no mask for it. A token sees what stands at its own
# position or before. So no token of a text sees the padding behind it, and when the text grows, the
# new token takes the padding's place in the cache. Two texts of 3 and 6 tokens, and their next one:

# %%
cache = KVCache(toy.config, batch=2, max_len=10)
cache.lengths = [3, 6]
visible = cache.visible(1)[:, 0, 0]  # (batch, k_len)
stored = torch.tensor([[1, 1, 1, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 2]])  # 2: the new token
fig, axes = plt.subplots(2, 1, figsize=(5, 1.6))
for row, ax in enumerate(axes):
    ax.imshow(stored[row][None].float(), cmap="Oranges", vmin=0, vmax=2.5)
    for place in range(7):
        ax.text(place, 0, "sees" if visible[row, place] else "", ha="center", va="center")
    ax.set(xticks=range(7), yticks=[0], yticklabels=[f"text {row}"])
axes[0].set_title("the new token (dark) sees its own text; what was padding is white")
plt.show()
assert visible.sum(1).tolist() == [4, 7]

with torch.inference_mode():
    decoder = Decoder(toy, rows=2, max_len=64)
    together = decoder.prefill(0, [short, long])[0].softmax(-1)
assert_close(together, alone, rtol=1e-4, atol=1e-5)
print(f"with padding on the right, {tok.pieces[word]!r} has {together[word]:.0%}")

# %% [markdown]
# **Nobody waits for the longest.** Texts end at different times. If a batch ran until the last of
# its texts had ended, most rows would idle. The `Engine` gives the row of a text that has ended to
# the next in the queue at once (*continuous batching*, Yu et al. 2022). Twelve requests, four rows:

# %%
from minillama.generation import Engine, Request

limits = [5, 30, 8, 12, 6, 25, 9, 4, 18, 7, 11, 5]
engine = Engine(toy, tok, rows=4)
tickets = [engine.submit(Request("One morning", limit)) for limit in limits]
steps = []  # which requests went on in each step
while engine.busy:
    steps.append({tickets.index(ticket) for ticket in engine.step()})
waves = [limits[i : i + 4] for i in range(0, 12, 4)]

fig, axes = plt.subplots(1, 2, sharex=True, sharey=True)
for number in range(12):
    at = [step for step, going in enumerate(steps) if number in going]
    axes[1].barh(number, len(at), left=at[0], color=f"C{number % 4}")
    begin = sum(max(wave) for wave in waves[: number // 4])
    axes[0].barh(number, limits[number], left=begin, color=f"C{number % 4}")
    assert len(at) == limits[number]
in_waves = sum(max(wave) for wave in waves)
axes[0].set(title=f"in waves of four: {in_waves} steps", xlabel="step", ylabel="request")
axes[1].set(title=f"continuous: {len(steps)} steps", xlabel="step")
axes[0].invert_yaxis()
plt.show()
assert len(steps) < 0.75 * in_waves

# %% [markdown]
# Each of them gets, to the token, what it would get alone. So every request can have settings of
# its own: temperature, cuts, seed, stop strings, limit.

# %%
for ticket, limit in zip(tickets, limits, strict=True):
    assert ticket.token_ids == story.token_ids[:limit]
mixed = generate(
    toy, tok, ["One morning", "", "The fox"], 40, temperature=[0, 0.7, 1.2], seed=[0, 1, 2]
)
(alone_again,) = generate(toy, tok, "The fox", 40, temperature=1.2, seed=2)
assert mixed[2] == alone_again
print(repr(alone_again.text))

# %% [markdown]
# **Nothing need be read twice.** The next turn of a dialogue begins with all that was said before,
# and many questions begin with the same instruction. With `keep`, a row whose text has ended
# remembers it, and a prompt is read only from where it parts from what some row has read:

# %%
engine = Engine(toy, tok, rows=4, keep=True)


def ask(prompt):
    ticket = engine.submit(Request(prompt, 20))
    while engine.busy:
        engine.step()
    print(f"a prompt of {ticket.n_prompt} tokens, of which {ticket.n_kept} had been read")
    (alone,) = generate(toy, tok, [prompt], 20)
    assert ticket.token_ids == alone.token_ids
    return ticket


first = ask(ids[:60])
second = ask([*first.ids, *tok.encode("The fox had an idea.")])
third = ask([*ids[:40], *tok.encode("The fox had an idea.")])
assert (first.n_kept, second.n_kept, third.n_kept) == (0, 79, 40)

# %% [markdown]
# The second text went on where the first had ended, in its row. Of the 80 tokens it has in common
# with it, one was not known: the last one that was drawn was never read. The third has a beginning
# in common with both, and got a copy.

# %% [markdown]
# ## Guess, then check
#
# A large model spends its time on fetching weights, one token at a time. *Speculative decoding*
# (Leviathan et al. 2023; Chen et al. 2023) lets a small model, the *draft*, guess the next few
# tokens, and the large one, the *target*, read them all in one pass. Its logits say at every place
# what it would have taken itself. The guesses that agree stand; the first that doesn't is replaced
# by the target's own token, and what follows is dropped. So each pass gives at least one token, and
# the text is exactly the target's.
#
# Our draft has a fifth of the toy's parameters, and reads stories for a few seconds:

# %%
from minillama import Llama
from minillama.config import TrainingConfig
from minillama.data.packing import batches, pack
from minillama.training import make_optimizer, train

rows = pack(tok.encode_batch(tales.corpus("train"), bos=True, eos=True), 64, tok.vocab_size)
recipe = TrainingConfig(steps=300, batch_size=16, seq_len=64, learning_rate=1e-2, warmup_steps=20)
small = replace(toy.config, dim=48, n_layers=2, n_heads=2, hidden_dim=96)
draft = Llama(small, torch.Generator().manual_seed(0), init_std=0.1)
*_, last_step = train(draft, make_optimizer(draft, recipe), batches(rows, 16, seed=0), recipe)
draft.requires_grad_(False)
print(f"target {toy.config.n_parameters:,} parameters, draft {small.n_parameters:,};", end=" ")
print(f"the draft's last loss is {last_step.loss:.1f}")


# %%
@torch.inference_mode()
def speculate_by_hand(prompt, n, n_draft):
    """n tokens, and for each pass of the target how many of the guesses stood."""
    ids, stood = list(prompt), []
    while len(ids) < len(prompt) + n:
        guesses = []
        for _ in range(n_draft):
            guesses.append(int(draft(torch.tensor([ids + guesses]))[0, -1].argmax()))
        choices = toy(torch.tensor([ids + guesses]))[0, -n_draft - 1 :].argmax(-1).tolist()
        n_right = 0
        while n_right < n_draft and guesses[n_right] == choices[n_right]:
            n_right += 1
        ids += choices[: n_right + 1]
        stood.append(n_right)
    return ids[len(prompt) :][:n], stood


written, stood = speculate_by_hand(prompt, 120, n_draft=4)
assert written == story.token_ids
assert len(stood) < 60
print("the same 120 tokens, in less than half as many passes of the target")

# %% [markdown]
# The package does it with two caches, for many rows, and reports the share that stood.

# %%
(faster,) = generate(toy, tok, "One morning", 120, draft=draft, n_draft=4)
assert faster.text == story.text
assert 0.3 < faster.acceptance < 0.7
print("the same text; between 30% and 70% of the guesses stood")

# %% [markdown]
# **When the text is sampled**, a guess x that the draft drew with probability q(x) stands with
# probability min(1, p(x) / q(x)), where p is the target's. If it falls, the replacement is drawn
# from what p has more than q: max(0, p - q). Then x comes out with probability p(x), whatever q is.
# No experiment is needed, three tokens and a pencil will do:

# %%
p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
stands = q * torch.minimum(torch.ones(3), p / q)  # drawn, and not refused: min(p, q)
left_over = (p - q).clamp(min=0)
comes_out = stands + (1 - stands.sum()) * normalised(left_over)
print("stands:   ", stands)
print("comes out:", comes_out)
assert_close(comes_out, p)

# %% [markdown]
# The rule in code, with the package's next to it: the same generator, the same outcome.

# %%
from minillama.config import Sampling
from minillama.generation import verify


def verify_by_hand(guess, p, q, p_next, generator):
    if torch.rand((), generator=generator).item() * q[guess] < p[guess]:
        return [guess, draw(p_next, generator)]
    return [draw((p - q).clamp(min=0), generator)]


p_next, plain = torch.tensor([0.1, 0.1, 0.8]), Sampling(temperature=1.0)
counts = Counter()
for seed in range(1000):
    guess = draw(q, torch.Generator().manual_seed(10_000 + seed))
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    tokens = verify_by_hand(guess, p, q, p_next, ours)
    assert tokens == verify([guess], [q], torch.stack([p, p_next]).log(), plain, theirs)
    counts[tokens[0]] += 1
print("first tokens:", dict(sorted(counts.items())))
assert all(abs(counts[token] - 1000 * p[token]) < 65 for token in range(3))  # four sigma

# %% [markdown]
# How many tokens does a pass give? If each guess stands with probability $\alpha$, independently,
# it is $1 + \alpha + \dots + \alpha^\gamma$ for $\gamma$ guesses (Leviathan et al., eq. 1): more
# guesses help less and less, and each costs a pass of the draft. Measured on ten stories, beside
# the formula with the $\alpha$ of a single guess:

# %%
beginnings = [story_[:30] for story_ in tales.corpus("valid")[:10]]
guesses = [1, 2, 4, 8]
fig, ax = plt.subplots(figsize=(4.5, 2.4))
for temperature, color in ((0.0, "C0"), (1.0, "C1")):
    per_pass = []
    for n_draft in guesses:
        engine = Engine(toy, tok, rows=10, draft=draft, n_draft=n_draft)
        sampling = Sampling(temperature=temperature)
        going = [engine.submit(Request(text_, 80, sampling, seed=0)) for text_ in beginnings]
        while engine.busy:
            engine.step()
        share = sum(t.n_accepted for t in going) / sum(t.n_proposed for t in going)
        per_pass.append(1 + n_draft * share)
    alpha = per_pass[0] - 1
    formula = [sum(alpha**i for i in range(n_draft + 1)) for n_draft in guesses]
    ax.plot(guesses, per_pass, "o-", color=color, label=f"temperature {temperature:.0f}")
    ax.plot(guesses, formula, ":", color=color, label=f"formula, alpha = {alpha:.2f}")
    assert 1.4 < per_pass[0] < per_pass[1] < per_pass[2] < per_pass[3]
ax.set(xlabel="guesses", ylabel="tokens per pass of the target", xticks=guesses, ylim=(1, 5))
ax.legend()
plt.show()

# %% [markdown]
# Whether that saves *time* depends on what a pass of each model costs. Here the draft's layers are
# half as many as the toy's, and both take the time that Python takes: nothing is gained. For models
# of billions of parameters, the papers report a factor of two to three.
#
# ## What breaks without it
#
# Weights that were damaged on the way, or that are too large for float16, give NaN (*not a
# number*). Drawing from NaN would still give a token, some token, and a long text of nonsense. So
# the engine looks at every logit it uses, and a row that has none ends alone.

# %%
damaged = Llama(toy.config)
damaged.load_state_dict(toy.state_dict())
damaged.requires_grad_(False).layers[2].ffn_norm.weight[5] = torch.nan
print("the likeliest of these would be token", int(damaged(torch.tensor([prompt]))[0, -1].argmax()))

# %% tags=["raises-exception"]
generate(damaged, tok, "One morning")

# %% [markdown]
# ## Exercises
#
# **1. How sure was it?** `generate(..., logprobs=True)` gives each token's log-probability, in
# nats. Draw one text for each seed, and give back the Completion that the model finds likeliest:
# the one with the largest *mean* log-probability. (With the sum, the shortest would win.)


# %% tags=["exercise-1"]
def best_of(prompt, seeds):  # 30 tokens each, at temperature 1 -> Completion
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
best = best_of("The fox", range(8))
with torch.inference_mode():
    means = []
    for seed in range(8):
        (one,) = generate(toy, tok, "The fox", 30, temperature=1.0, seed=seed)
        fox = tok.encode("The fox", bos=True)
        whole = torch.tensor([fox + one.token_ids])
        log_p = toy(whole)[0, len(fox) - 1 : -1].log_softmax(-1)
        means.append(log_p.gather(1, whole[0, len(fox) :, None]).mean().item())
        if one.token_ids == best.token_ids:
            chosen = means[-1]
assert chosen == max(means)
print("exercise 1: correct")

# %% [markdown]
# **2. Steps of an engine.** A single request has `n_prompt` tokens and may write `n_new`; a chunk
# has at most `chunk` tokens. The last chunk gives the first new token. How many calls of `step()`
# does it take?


# %% tags=["exercise-2"]
def n_steps(n_prompt, n_new, chunk):  # -> int
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
for n_prompt, n_new, chunk in ((1, 1, 8), (16, 3, 8), (17, 3, 8), (40, 5, 64)):
    engine, steps_taken = Engine(toy, tok, prefill_chunk=chunk), 0
    engine.submit(Request(story.token_ids[:n_prompt], n_new))
    while engine.busy:
        engine.step()
        steps_taken += 1
    assert n_steps(n_prompt, n_new, chunk) == steps_taken
print("exercise 2: correct")

# %% [markdown]
# **3. A draft without a model.** Code, and answers about a text, repeat what was there. Look for
# the last `n` tokens of `ids` at an earlier place, the latest one that has something behind it, and
# guess that the text goes on as it did there, with up to `n_draft` tokens. No such place: no guess.


# %% tags=["exercise-3"]
def look_up(ids, n, n_draft):  # -> list of at most n_draft ids
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
assert look_up([1, 2, 3, 4, 1, 2], n=2, n_draft=3) == [3, 4, 1]
assert look_up([1, 2, 7, 1, 2, 8, 1, 2], n=2, n_draft=1) == [8]
assert look_up([5, 5, 5], n=2, n_draft=4) == [5]
assert look_up([1, 2, 3], n=2, n_draft=4) == []
quoting = ids + ids[1:]  # the second half repeats the first
n_passes, at = 0, len(ids)
while at < len(quoting):
    guessed = look_up(quoting[:at], n=2, n_draft=4)
    right = 0
    while right < len(guessed) and quoting[at + right : at + right + 1] == [guessed[right]]:
        right += 1
    at += right + 1
    n_passes += 1
assert n_passes < 0.4 * len(ids)
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `top_p_by_hand`, `draw_by_hand`, ... | `generation/sampling.py` | batches, without a full sort |
# | `write` | `Decoder` in `generation/decoder.py` | rows of any lengths in one static cache |
# | `stream_by_hand` | `decoder()` of every tokenizer | bytes that spell nothing |
# | `filter_by_hand` | `StopFilter` in `generation/stop.py` | many stop strings |
# | `speculate_by_hand`, `verify_by_hand` | `generation/speculative.py` | many rows, all settings |
# | the queue | `Engine` in `generation/engine.py` | chunks, `cancel`, one result for each |
#
# Holtzman et al. 2020 (arXiv:1904.09751) on why the tail has to go; Fan et al. 2018
# (arXiv:1805.04833), Nguyen et al. 2024 (arXiv:2407.01082), Keskar et al. 2019 (arXiv:1909.05858);
# Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318); continuous
# batching: Yu et al. 2022 (Orca, OSDI); prompts in chunks: Agrawal et al. 2023 (arXiv:2308.16369).
#
# Next: the same questions at 7 billion parameters, with real weights.
