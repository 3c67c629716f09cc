# %% [markdown]
# # 1 · Tokenizer: a story becomes numbers
#
# **Question.** A model computes with numbers, and a story is made of letters. What should get a
# number: each letter, each word, or something in between?
#
# **You need** Python · **It takes** 45 minutes · **Module** `minillama/tokenizer/`

# %%
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt

plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# The corpus of this course is a folder of short stories, one a line.

# %%
stories = Path("../data/tales/train.txt").read_text(encoding="utf-8").splitlines()
unseen = Path("../data/tales/valid.txt").read_text(encoding="utf-8").splitlines()
print(len(stories), "stories. The first begins:", stories[0][:67])

# %% [markdown]
# Number the letters, or number the words. Letters need a small vocabulary and make long texts, and
# a model pays for length: each step of its loop writes one unit. Words make short texts. But what
# is the number of a word that the corpus does not hold?

# %%
text = " ".join(stories)
for unit, parts in [("letters", list(text)), ("words", text.split())]:
    print(f"{unit}: {len(set(parts))} different ones, a text of {len(parts):,}")

sentence = "Nora paid 12 crowns for the yellow kites."
print("no number for:", [word for word in sentence.split() if word not in set(text.split())])

# %% [markdown]
# We would like both: whole words where they are frequent, and parts of words for all the rest.
# *Byte-pair encoding* (BPE) finds such parts by counting. It needs no dictionary and no grammar.
#
# ## Merge the most frequent pair
#
# Start with single characters. Count how often each pair of neighbours occurs, make the most
# frequent pair one new piece, and count again. Two words are enough to see it. A space belongs to
# the word after it, and is written `▁`, so that it can be seen.


# %%
def count_pairs(words):  # Counter of words, each a tuple of pieces -> Counter of pairs
    counts = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


words = Counter([tuple("▁banana"), tuple("▁bandana")])
pairs = count_pairs(words)
for (left, right), times in pairs.most_common():
    print(f"{left}+{right}: {times}", end="   ")
assert pairs["a", "n"] == 4  # b-an-an-a, b-an-d-an-a

# %% [markdown]
# Now every `a n` becomes `an`. The loop goes from left to right, so that in `aaa` the first two
# are merged, not the last two.


# %%
def merge(word, pair):  # a tuple of pieces -> a shorter one
    pieces = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


assert merge(tuple("aaa"), ("a", "a")) == ("aa", "a")
merge(tuple("▁bandana"), ("a", "n"))

# %% [markdown]
# That is all of BPE. Training repeats the two steps. When two pairs are equally frequent, we take
# the shorter, then the one that is first in the order of Unicode: any rule does, but there must be
# one, or two runs would give two vocabularies.


# %%
def learn(words, n_merges, allowed=lambda piece: True):
    for _ in range(n_merges):
        counts = {pair: n for pair, n in count_pairs(words).items() if allowed("".join(pair))}
        best = min(counts, key=lambda pair: (-counts[pair], len("".join(pair)), "".join(pair)))
        words = Counter({merge(word, best): times for word, times in words.items()})
        yield "".join(best), list(words)


history = list(learn(words, n_merges=4))
for piece, state in history:
    print(f"{piece:>4}:", *(" ".join(word).ljust(14) for word in state))
assert [piece for piece, _ in history] == ["an", "▁b", "ana", "▁ban"]

# %% [markdown]
# Check it with pencil and paper: after `an`, three pairs occur twice (`▁ b`, `b an` and `an a`),
# and `▁ b` is the shortest. Here is the same as a picture.


# %%
def draw_pieces(ax, states, labels):
    for row, pieces in enumerate(states):
        start = 0
        for piece in pieces:
            color = plt.cm.Blues(min(0.12 * len(piece), 0.5))
            ax.barh(-row, len(piece) - 0.08, left=start, height=0.8, color=color)
            ax.text(start + len(piece) / 2, -row, piece, ha="center", va="center")
            start += len(piece)
    ax.set(yticks=range(0, -len(states), -1), yticklabels=labels, xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


fig, axes = plt.subplots(1, 2, figsize=(6, 1.7))
labels = ["characters", *(f"+ {piece}" for piece, _ in history)]
for column, ax in enumerate(axes):
    states = [list(words)[column], *(state[column] for _, state in history)]
    draw_pieces(ax, states, labels if column == 0 else [""] * len(labels))
plt.show()

# %% [markdown]
# ## The same as the package's?
#
# `BPE.train` learns from any text. In its list of pieces, the first 259 are the same for every
# text (we come to them soon); then those that were learned, in the order of learning; then the
# single characters, the most frequent first.

# %%
from minillama.tokenizer import BPE

bpe = BPE.train("banana bandana", vocab_size=259 + 4 + 5)
assert list(bpe.pieces[259:263]) == [piece for piece, _ in history]
bpe.pieces[259:]

# %% [markdown]
# On real text, three more rules say which pairs may become a piece. A piece never reaches over the
# end of a word: `▁` stands in front or nowhere. Letters are merged with letters and signs with
# signs, so that `kite.` does not become another word than `kite`. And a digit stays alone, for a
# reason that we shall see. With these rules, our loops learn the same from the stories.


# %%
def by_the_rules(piece):
    body = piece.lstrip("▁")
    return body.isalpha() or not any(character.isalnum() for character in body)


words = Counter(tuple("▁" + word) for word in text.split(" "))
ours = [piece for piece, _ in learn(words, 60, by_the_rules)]
print(*ours)

bpe = BPE.train(stories, vocab_size=512)
assert list(bpe.pieces[259 : 259 + 60]) == ours

# %% [markdown]
# First come parts that many words share, then frequent words as a whole, all of it from counting.
# (The package is a little smarter than our loops: it counts again only what a merge has changed.)
#
# LLaMA used SentencePiece, a library in C++ that learns and encodes faster still. From here on the
# course uses it too, through `Tokenizer`. It must give the same vocabulary:

# %%
from minillama.tokenizer import train_tokenizer

tok = train_tokenizer(stories, vocab_size=512)
assert tok.pieces == bpe.pieces
tok

# %% [markdown]
# ## Encoding: merge again, best piece first
#
# To cut a new text, start with its characters and merge again, each time the neighbours whose
# union was learned *first*. What was frequent early is made early. A piece's place in the list is
# its *id*; an encoded text is a list of ids.


# %%
def encode_word(word, pieces):
    rank = {piece: i for i, piece in enumerate(pieces)}
    states = [tuple(word)]
    while True:
        known = [pair for pair in pairwise(states[-1]) if "".join(pair) in rank]
        if not known:
            return states
        best = min(known, key=lambda pair: rank["".join(pair)])
        states.append(merge(states[-1], best))


states = encode_word("▁afternoon", bpe.pieces)
assert [list(state) for state in states] == list(bpe.merges("afternoon"))
print(states[-1], "->", bpe.encode("afternoon"))

# %%
fig, ax = plt.subplots(figsize=(4.5, 1.9))
draw_pieces(ax, states, [f"{step} merges" for step in range(len(states))])
plt.show()

# %% [markdown]
# The naive loop looks at all pairs again after each merge. `BPE.encode` keeps the candidates in a
# heap instead and comes to the same result sooner. SentencePiece, once more, has to agree.

# %%
for story in unseen:
    assert bpe.encode(story) == tok.encode(story)
ids = tok.encode(sentence)
print(len(sentence), "characters,", len(ids), "ids:", ids)
print(*(tok.pieces[i] for i in ids))

# %% [markdown]
# `crowns` and `kites` are no problem any more: what is not one piece is several. (The stories hold
# no digits. What became of `12` is explained below, under *bytes*.)
#
# ## How large should the vocabulary be?
#
# Each further piece makes texts shorter, and each makes the model larger: it needs a row in the
# embedding and one in the output. LLaMA has 32,000. Let us count pieces per word on two texts that
# the tokenizer has not seen: stories from the same world, and the prose of this notebook.

# %%
sizes = [320, 340, 380, 440, 512, 600, 700, 800, 900, 1000]
prose = """A model computes with numbers, and a story is made of letters. To cut a new text, start
with its characters and merge again, each time the neighbours whose union was learned first. Each
further piece makes texts shorter, and it makes the model larger: it needs a row in the output."""


def pieces_per_word(tok, texts):
    return sum(map(len, tok.encode_batch(texts))) / sum(len(text.split()) for text in texts)


toks = [train_tokenizer(stories, size) for size in sizes]
tales = [pieces_per_word(tok, unseen) for tok in toks]
other = [pieces_per_word(tok, [prose]) for tok in toks]
for size, story, page in zip(sizes, tales, other, strict=True):
    print(f"{size:5d} pieces: {story:.1f} a word in the stories, {page:.1f} in the prose")
assert tales == sorted(tales, reverse=True)

# %%
fig, ax = plt.subplots()
ax.plot(sizes, other, "o-", ms=3, color="C1", label="prose of this notebook")
ax.plot(sizes, tales, "o-", ms=3, color="C0", label="unseen stories")
ax.axhline(1, color="gray", lw=0.8, ls="--")
ax.set(xlabel="vocabulary size", ylabel="pieces per word", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
# *The stories come close to one piece a word, because they use few words. Other English profits
# less: a vocabulary fits the text it was learned from.*
#
# ## What breaks: numbers whose digits are merged
#
# Suppose that digits were merged like letters. We make up amounts as people write them, often round
# and more often small than large, learn from them without the rule, and look at how the numbers
# from 100 to 999 are cut.

# %%
rng = random.Random(0)
amounts = [round(10 ** rng.uniform(0, 3)) for _ in range(3000)]
amounts += [round(amount, -1) for amount in amounts]
words = Counter(tuple(f"▁{amount}") for amount in amounts)
merged = [piece for piece, _ in learn(words, 150)]
cuts = {n: " ".join(encode_word(f"▁{n}", merged)[-1]).removeprefix("▁") for n in range(100, 1000)}
for n in (299, 300, 301, 697, 698, 699):
    print(n, "->", cuts[n])
assert (cuts[300], cuts[301]) == ("300", "30 1")

# %%
shapes = {n: "+".join(str(len(piece)) for piece in cut.split()) for n, cut in cuts.items()}
names = sorted(set(shapes.values()))
fig, ax = plt.subplots(figsize=(6, 1.7))
grid = [[names.index(shapes[n]) for n in range(row, row + 100)] for row in range(100, 1000, 100)]
ax.imshow(grid, cmap="tab10", vmin=0, vmax=9, aspect="auto", interpolation="none")
for rank, name in enumerate(names):
    ax.plot([], [], "s", color=plt.cm.tab10(rank), label=f"{name} digits")
ax.set(yticks=range(9), yticklabels=range(1, 10), ylabel="first digit", xlabel="last two digits")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# *Each square is a number, its colour the way in which it is cut.*
#
# `300` is one piece, and the number after it begins with `30`. To add two of them, a model would
# have to learn what each of 150 pieces is worth, and at which place it stands. With single digits,
# the last piece is always the ones, the one before it the tens, and ten pieces are all there is to
# learn. So LLaMA's tokenizer splits numbers into digits (Touvron et al. 2023a, sec. 2.1), and
# `BPE.train` does, too.

# %%
digits = BPE.train(map(str, amounts), vocab_size=259 + 11)
print(*digits.pieces[259:])
print(*(digits.pieces[i] for i in digits.encode("1999")))
assert set(digits.pieces[259:]) == set("▁0123456789")

# %% [markdown]
# ## Nothing is unknown: bytes
#
# The stories hold no `7`, no `é` and no 猫. A character that has no piece is spelled in the bytes
# of its UTF-8 code, and each of the 256 bytes is a piece: byte `b` has the id `b + 3`. The ids 0, 1
# and 2 are `<unk>`, `<s>` and `</s>`. Together these are the 259 that every vocabulary starts with.

# %%
print([f"{b:#04x}" for b in "猫".encode()], "->", [b + 3 for b in "猫".encode()])
assert tok.encode("猫")[1:] == [b + 3 for b in "猫".encode()]
assert tok.decode(tok.encode("猫")) == "猫"
assert not {"7", "é", "猫"} & set(text)
[tok.pieces[i] for i in tok.encode("a 猫")]

# %% [markdown]
# Without this fallback there would be one number for all that is unknown, `<unk>`, and decoding
# could not bring the text back. SentencePiece can be told to work that way:

# %%
import io

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

model = io.BytesIO()
SentencePieceTrainer.train(
    sentence_iterator=iter(stories),
    model_writer=model,
    model_type="bpe",
    vocab_size=256,
    minloglevel=2,
)
without = SentencePieceProcessor(model_proto=model.getvalue())
lost = without.decode(without.encode("Nora paid 12 crowns to the café."))
print("without bytes:", lost)
print("with bytes:   ", tok.decode(tok.encode("Nora paid 12 crowns to the café.")))
assert "é" not in lost

# %% [markdown]
# Bytes make any text possible, but not cheap. A language that the training text did not hold is
# written byte by byte, two for a Russian letter and three for a Japanese character, and everything
# a model does with it takes that much longer.

# %%
greetings = {
    "English": "Good morning, how are you today?",
    "German": "Guten Morgen, wie geht es dir heute?",
    "Russian": "Доброе утро, как дела сегодня?",
    "Japanese": "おはようございます、元気ですか。",
    "emoji": "🦙🐈🌍🎈🎂",
}
cost = {name: len(tok.encode(text)) / len(text) for name, text in greetings.items()}
assert all(tok.decode(tok.encode(text)) == text for text in greetings.values())
assert cost["English"] < 1 < cost["Russian"] < cost["Japanese"] < cost["emoji"]

fig, ax = plt.subplots(figsize=(5, 1.8))
bars = ax.barh(list(cost), list(cost.values()), color="C0")
ax.bar_label(bars, fmt="%.1f", padding=2)
ax.invert_yaxis()
ax.set(xlabel="pieces per character", xlim=(0, 5))
plt.show()

# %% [markdown]
# LLaMA's own 32,000 pieces do better, since some 2,000 of them are single characters of many
# scripts; still, many kanji cost three byte pieces each. In notebook 21 we extend a vocabulary.
#
# ## The way back, and two traps
#
# Decoding looks pieces up, joins bytes to characters, and turns `▁` into a space. One thing is
# odd. A text gets a space in front before it is cut, so that its first word is the same piece as in
# the middle of a sentence; decoding takes that first space away again. So `decode` gives back what
# `encode` was given, letter by letter (but for a typed `▁`, which becomes a space). Only, all ids
# must be decoded together:

# %%
ids = tok.encode("Once a 🦙 came.")
print("together:   ", tok.decode(ids))
print("id by id:   ", "".join(tok.decode([i]) for i in ids))
assert tok.decode(ids) == "Once a 🦙 came."
assert tok.decode(tok.encode("typed▁here")) == "typed here"

# %% [markdown]
# The second line has lost its spaces, and the llama, which is four bytes, has become four signs
# for "no valid character". A program that prints a story while the model writes it runs into both.
# `StreamDecoder` remembers whether the text has begun, and holds bytes back until their character
# is complete.

# %%
from minillama.tokenizer import StreamDecoder

stream = StreamDecoder(tok)
shown = [stream.push(i) for i in ids]
print(shown)
assert "".join(shown) + stream.flush() == tok.decode(ids)

# %% [markdown]
# The other trap is the end of a text. `<s>` (id 1) marks where a text begins and `</s>` (id 2)
# where it ends; a model that writes id 2 is done. They are added by number. Who *types* the four
# characters of `</s>` gets ordinary pieces, and cannot end a text or open a new one.

# %%
print(tok.encode("The end.", bos=True, eos=True))
typed = tok.encode("The end.</s>")
print([tok.pieces[i] for i in typed])
assert tok.eos_id == 2
assert tok.eos_id not in typed

# %% [markdown]
# ## Exercises
#
# Replace the line that raises, run the cell, then run the check below it. Solutions are in
# `solutions/01_tokenizer.py`.
#
# **1. Decode.** Write `decode` with nothing but the list of pieces: ids 0 to 2 give nothing, ids 3
# to 258 are bytes, `▁` is a space, and the first space of the text is dropped. (Collect *bytes*,
# not characters, and decode them at the end.)


# %% tags=["exercise-1"]
def decode(ids, pieces):  # list of ids -> str
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
for text in [stories[0], "naïve 猫 🦙", "  two spaces", "\nnew line", "", "x  "]:
    assert decode(tok.encode(text, bos=True, eos=True), tok.pieces) == text
print("exercise 1: correct")

# %% [markdown]
# **2. How many bytes to hold back?** In UTF-8, the first byte of a character says how many bytes it
# has: below 0x80 one, from 0xC0 two, from 0xE0 three, from 0xF0 four. The bytes that follow it are
# 0x80 to 0xBF. Given valid UTF-8 that may have been cut off anywhere, return how many bytes at its
# end belong to a character that is not complete.


# %% tags=["exercise-2"]
def unfinished(data):  # bytes -> int
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
complete = "aé猫🦙z".encode()
expected = [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0]  # after 0, 1, 2, ... bytes
assert [unfinished(complete[:end]) for end in range(len(complete) + 1)] == expected
print("exercise 2: correct")

# %% [markdown]
# **3. The smallest vocabulary that does it.** Find the smallest `vocab_size` for which the unseen
# stories need at most `limit` pieces a word. (It lies between 320 and 1000. Search by halving: ten
# trainings are enough.)


# %% tags=["exercise-3"]
def smallest_vocabulary(limit):  # pieces per word -> vocab_size
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
size = smallest_vocabulary(limit=1.75)
assert pieces_per_word(train_tokenizer(stories, size), unseen) <= 1.75
assert pieces_per_word(train_tokenizer(stories, size - 1), unseen) > 1.75
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# | here | in the package | what is more general there |
# |---|---|---|
# | `learn` | `BPE.train` in `minillama/tokenizer/bpe.py` | all scripts, large texts |
# | `encode_word` | `BPE.merges`, `BPE.encode`, same file | whole texts, in n log n |
# | exercises 1, 2 | `StreamDecoder` in `minillama/tokenizer/vocabulary.py` | invalid bytes |
# | `tok` | `Tokenizer` in `minillama/tokenizer/tokenizer.py` | opens LLaMA's tokenizer.model |
#
# Sennrich et al. 2016 (arXiv:1508.07909), sec. 3.2: BPE for words. Kudo and Richardson 2018
# (arXiv:1808.06226): SentencePiece, which takes spaces as characters. Touvron et al. 2023a
# (arXiv:2302.13971), sec. 2.1: split digits and byte fallback. Touvron et al. 2023b
# (arXiv:2307.09288), sec. 2.2: the same tokenizer again, 32,000 pieces.
#
# Next: a list of ids knows no positions; how the model learns of them is `02_rope`.
