# %% [markdown]
# # 7 · Data: what a model should read, and what not
#
# **Question.** The web is free, endless and dirty. How did LLaMA's authors turn it into 1.4
# trillion tokens worth reading, without reading them?
#
# **You need** notebook 1, dictionaries and sets in Python · **It takes** 60 minutes ·
# **Module** `minillama/data/curation.py`, `minillama/data/ngram.py`, `minillama/data/mixture.py`

# %%
import math
import re
import textwrap
from collections import Counter
from itertools import pairwise
from random import Random

import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update({"figure.figsize": (6, 2.6), "figure.dpi": 100, "font.size": 8})
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 8})

# %% [markdown]
# ## The problem, seen
#
# LLaMA learned from seven sources, all public. Two thirds of what it read are pages of a web crawl.
# A real crawl is too big for a notebook, so the toy world has one of its own: its tales, under
# the same kinds of dirt. Someone planted them there, and noted on each page what it is. The rules
# that we build never look at that note; we may.

# %%
from minillama.data.raw_web import raw

pages = list(raw("commoncrawl"))
planted = Counter(page.meta["planted"] for page in pages)
examples = {page.meta["planted"]: page.text for page in reversed(pages)}
for kind, n in planted.items():
    print(f"{n:4} {kind:15} {textwrap.shorten(examples[kind], 68)}")

# %% [markdown]
# A third of the pages is good, and yet a model that reads them all will imitate them all.
# Which ones to keep could be decided by hand here. For five crawls of the web it must be decided
# by rules, and every rule must be cheap: it will run billions of times.
#
# ## By hand 1: said before
#
# The same menu, the same notice, the same whole page: most of the web stands there many times. A
# model that reads a text a hundred times learns it by heart, at the cost of everything else.
#
# CCNet, the pipeline that LLaMA took over, compares *lines*, across all pages. Two lines count as
# the same when they differ in case, digits and punctuation only; the first one stays.

# %%
three = [
    "Mia had a red kite.\nVisitor number 17",
    "Visitor number 23!\nBen ran.",
    "mia had a red kite",
]


def first_lines(pages):
    seen, kept = set(), []
    for page in pages:
        left = []
        for line in page.split("\n"):
            same = re.sub(r"[^a-z0 ]", "", re.sub(r"\d", "0", line.lower()))
            if same not in seen:
                left.append(line)
            seen.add(same)
        kept.append("\n".join(left) or None)
    return kept


first_lines(three)

# %% [markdown]
# A set of all lines of the web fits nowhere. The package keeps 8 bytes of each line's SHA-1
# instead: a number that says "seen" without saying what.

# %%
from minillama.data.duplicates import duplicate_lines, hash64

seen = set()
assert [duplicate_lines(page, seen) for page in three] == first_lines(three)
assert all(0 <= number < 2**64 for number in seen)
print(f"{len(seen)} lines remembered, one of them as {hash64('mia had a red kite')}")

# %% [markdown]
# ## By hand 2: the language
#
# LLaMA's web pages are English. The plainest test that works: which share of the words are among
# the few that no English text can do without?

# %%
COMMON = {"the", "a", "an", "and", "of", "to", "in", "it", "is", "was", "had", "that", "at", "for"}


def english_by_hand(page):
    words = re.findall(r"\w+", page.lower())
    return sum(word in COMMON for word in words) > 0.1 * len(words)


for page in (examples["good"], examples["foreign"], examples["gibberish"]):
    print(english_by_hand(page), textwrap.shorten(page, 70))

# %% [markdown]
# The package uses a library, which looks at groups of bytes and knows about a hundred languages.
# On our crawl the two agree on every page but one: the notices are English, but in three lines of
# small print there is hardly a common word. Both let the gibberish pass, as they should: its words
# are English, only their order isn't. That is a job for the next rule.

# %%
from minillama.data.language import only

agree = [english_by_hand(p.text) == (only(p.text, "en") is not None) for p in pages]
differ = {page.meta["planted"] for page, same in zip(pages, agree, strict=True) if not same}
print(f"{sum(agree)} of {len(pages)} pages; they differ on: {differ or 'none'}")
assert sum(agree) >= len(pages) - 1

# %% [markdown]
# ## By hand 3: a language model, before Transformers
#
# How *likely* is a page? In the 1990s, language models counted: after "a green", how often did
# "kite" come? The trouble is what never came. Counts say 0, and one 0 makes a whole page
# impossible.
#
# **Kneser-Ney smoothing** takes a bit (D = 0.75) off every count and gives what it took to a
# shorter context. Two lines are enough to see it: "a b" and "a c". After `a` came `b` once and `c`
# once. Each keeps 0.25 of its 1, and 1.5 of the 2 are shared out by the *unigrams*.

# %%
D, lines = 0.75, ["a b", "a c"]
pairs = Counter()
for line in lines:
    words = ["<s>", *line.split(), "</s>"]
    pairs.update(pairwise(words))
dict(pairs)

# %% [markdown]
# The clever part is how the unigrams are counted. Not how often a word occurred, but *how many
# different words stood in front of it*. "Francisco" may be frequent, but only ever after "San", so
# it is a poor guess after anything else. Here `a` always began a line (1), `b` and `c` stood
# behind `a` (1 each), and the end of the line came after two different words (2).

# %%
in_front = Counter(word for _, word in pairs)  # each pair once, however frequent
vocabulary = [*in_front, "<unk>"]  # <unk>: all words that never occurred


def unigram(word):
    kept = max(in_front[word] - D, 0)
    given_up = D * len(in_front)
    return (kept + given_up / len(vocabulary)) / in_front.total()


def bigram(word, before):
    followers = {w: n for (v, w), n in pairs.items() if v == before}
    kept = max(followers.get(word, 0) - D, 0)
    given_up = D * len(followers)
    return (kept + given_up * unigram(word)) / sum(followers.values())


print({word: round(unigram(word), 3) for word in vocabulary})
print({word: round(bigram(word, "a"), 3) for word in vocabulary})
assert math.isclose(sum(unigram(word) for word in vocabulary), 1)
assert math.isclose(sum(bigram(word, "a") for word in vocabulary), 1)

# %% [markdown]
# Nothing is impossible, and the probabilities add up to 1. The package does the same for contexts
# of any length, each falling back on the one that is a word shorter.

# %%
from minillama.data.ngram import KneserNey

model = KneserNey.train(lines, order=2)
assert model.vocabulary == set(vocabulary)
for word in vocabulary:
    assert math.isclose(model.probability(word, ("a",)), bigram(word, "a"))
print(f"P(b | a) = {model.probability('b', ('a',)):.4f}")

# %% [markdown]
# Trained on good text, such a model measures pages. Its **perplexity** on a page says among how
# many words it wavers, on average, at each step. CCNet's model reads Wikipedia; ours reads tales.

# %%
from minillama.data.tales import stories

told = list(stories(1500, seed=1))
good_text = ["\n".join(told[i : i + 3]) for i in range(0, len(told), 3)]
model = KneserNey.train(told, order=3)
perplexity = {page.id: model.perplexity(page.text) for page in pages}
for kind in planted:
    found = sorted(perplexity[page.id] for page in pages if page.meta["planted"] == kind)
    print(f"{kind:15} median {found[len(found) // 2]:8,.1f}")

# %%
from minillama.data.ngram import QualityFilter

quality = QualityFilter.fit(good_text)
fig, ax = plt.subplots()
for kind in ("good", "advertisement", "gibberish", "foreign"):
    found = [perplexity[page.id] for page in pages if page.meta["planted"] == kind]
    ax.hist(found, bins=np.geomspace(2, 4000, 60), label=kind, alpha=0.8)
for boundary, name in ((quality.head, "head"), (quality.middle, "middle")):
    ax.axvline(boundary, color="k", linestyle=":", linewidth=1)
    ax.text(boundary, 104, f"{name} ", ha="right")
ax.set(xscale="log", xlabel="perplexity of the page", ylabel="pages", ylim=(0, 115))
ax.legend(loc="upper center")
plt.show()

# %% [markdown]
# The filter draws its lines where *good text that it hasn't seen* lies: up to its median is the
# head, up to three times what nearly all of it has is the middle. What is right of that goes.
# (CCNet cuts at fixed shares of the pages; then a better crawl loses as many as a worse one.)
#
# Gibberish is gone now. Advertisements aren't: their sentences are simple and well formed.
#
# ## By hand 4: would an encyclopedia cite it?
#
# LLaMA's authors added a linear classifier: pages that Wikipedia cites as references, against
# pages at random. A page's score is the sum of its words' weights, and the weights are learned:
# whenever the score is wrong, every word of the page is nudged.

# %%
cited = ["the castle by the river", "the old river", "a castle and a mill"]
at_random = ["buy a castle now", "the old mill", "buy now and pay the half"]
labelled = [(page, 1) for page in cited] + [(page, 0) for page in at_random]
weights = Counter()
for _ in range(50):
    for page, label in labelled:
        words = sorted(set(page.split()))
        p = 1 / (1 + math.exp(-sum(weights[word] for word in words)))
        for word in words:
            weights[word] += 0.1 * (label - p)
print({word: round(weight, 1) for word, weight in weights.most_common()[:3]})
print({word: round(weight, 1) for word, weight in weights.most_common()[-2:]})
assert weights["buy"] < 0 < weights["river"]

# %% [markdown]
# "the old mill" stood among the random pages although nothing is wrong with it. That is what random
# means, and it is no harm: the classifier learns what is *more* frequent on one side. The
# package's differs in scale: pairs of words too, all hashed into 65,536 numbers, so that no
# vocabulary must be kept.

# %%
from minillama.data.reference import ReferenceClassifier

small = ReferenceClassifier.fit(cited, at_random)
for page in ("a castle by a river", "buy it now"):
    by_hand = sum(weights[word] for word in set(page.split())) > 0
    assert (small.keep(page) is not None) == by_hand
    print(f"{page:20} {'stays' if by_hand else 'goes'}")

# %%
others = [page.text for seed in (1, 2) for page in raw("commoncrawl", seed)]
references = ReferenceClassifier.fit(good_text, others)
for kind in ("good", "advertisement"):
    found = [page.text for page in pages if page.meta["planted"] == kind]
    n_kept = sum(references.keep(text) is not None for text in found)
    print(f"{kind:15} {n_kept} of {len(found)} kept")
    assert n_kept == (len(found) if kind == "good" else 0)

# %% [markdown]
# ## By hand 5: rules of thumb
#
# The second source, C4, is a crawl, too. Its authors trusted no model. Their rules: a line must end
# like a sentence and have five words; a page must have three sentences, no curly bracket, no
# "lorem ipsum", no word of a list.

# %%
page = """Home | Tales | About
Long ago there lived Mia. Mia had a red, red kite. It was gone one fine Friday.
Please enable JavaScript to see more.
Read on!"""


def thumb(page):
    lines = [line for line in page.split("\n") if line.endswith((".", "!", "?"))]
    lines = [line for line in lines if len(line.split()) >= 5 and "javascript" not in line.lower()]
    return "\n".join(lines)


print(thumb(page))

# %%
from minillama.data import heuristics

left = page
for rule in (
    heuristics.ended_lines,
    heuristics.long_lines,
    heuristics.lines_without_javascript,
    heuristics.without_code,
    heuristics.enough_sentences,
):
    left = rule(left)
assert left == thumb(page)
print("the same:", left == thumb(page))

# %% [markdown]
# Cheap, and blunt: poems, recipes and source code go with the menus. A list of bad words is
# blunter still. Dodge et al. (2021) found that C4's own list removed pages by and about minorities
# more often than others. What a filter takes away deserves a look, always.
#
# ## By hand 6: nearly the same book
#
# A second edition isn't the same file, and hardly a line of it need be the same. So books are
# compared by what they share. Cut each into *shingles*, runs of a few words; the overlap is what
# both have, divided by what either has. LLaMA drops a book that overlaps with another by more than
# 90%.

# %%
first, second = "long ago there lived two good friends", "long ago there lived two old friends"


def shingles(text, n=3):
    words = text.split()
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def overlap(a, b):
    return len(a & b) / len(a | b)


print(sorted(shingles(first) & shingles(second)))
print(f"overlap {overlap(shingles(first), shingles(second)):.2f}")

# %%
from minillama.data.duplicates import jaccard, shingle_hashes

assert jaccard(shingle_hashes(first, 3), shingle_hashes(second, 3)) == overlap(
    shingles(first), shingles(second)
)
print("one word in seven differs, and more than half of the shingles do")

# %% [markdown]
# But every book with every other? A million books make 500 billion pairs. **MinHash** turns it
# into a look-up. Give all shingles numbers at random, and let each book show its smallest. Two
# books show the same one if the smallest of *either* belongs to *both*; and as every shingle has
# the same chance to be it, that happens with a probability of exactly their overlap.

# %%
a = {f"shingle {i}" for i in range(0, 90)}
b = {f"shingle {i}" for i in range(10, 100)}


def smallest(shingles, draw):
    return min(shingles, key=lambda shingle: hash64(f"{draw} {shingle}"))


agreed = [smallest(a, draw) == smallest(b, draw) for draw in range(200)]
print(f"overlap {overlap(a, b):.2f}, the smallest agree in {sum(agreed) / 200:.2f} of the draws")
assert abs(sum(agreed) / 200 - overlap(a, b)) < 0.1

# %% [markdown]
# Now file every book under some of its smallest shingles, in groups ("bands") of four. Who shares a
# drawer is compared exactly; who doesn't is never looked at.

# %%
overlaps = np.linspace(0, 1, 201)
fig, ax = plt.subplots(figsize=(6, 2.2))
for bands in (1, 8, 32):
    ax.plot(overlaps, 1 - (1 - overlaps**4) ** bands, label=f"{bands} × 4 draws")
ax.axvline(0.9, color="k", linestyle=":", linewidth=1)
ax.set(xlabel="overlap of two books", ylabel="chance to share a drawer")
ax.legend()
plt.show()
assert (1 - 0.9**4) ** 32 < 1e-14  # pairs at 90% that are missed

# %% [markdown]
# With 32 bands no pair above 90% is missed. Many below are found as well; the exact comparison
# lets them go.
#
# ## Mark-up
#
# Four sources aren't dirty, they are *written in something*: code with licence headers, wikitext,
# LaTeX, HTML. The rules for them are less about judging than about reading.

# %%
from minillama.data.latex import plain_latex
from minillama.data.stackexchange import question_and_answers
from minillama.data.wikipedia import plain_text

print(plain_text("'''Mia''' had a [[kite (toy)|kite]].<ref>Ben</ref>{{citation needed}}"))
paper = r"""\newcommand{\twice}[2]{#1, #1 #2}
\begin{document} Abstract. \section{A tale} Mia had a \twice{red}{kite}. % true?
\bibliography{tales} \end{document}"""
print(plain_latex(paper))
print(question_and_answers("Whose kite?", "<p>Who had it?", [(1, "Ben"), (7, "<b>Mia</b>")]))

# %% [markdown]
# Macros are written out, since no reader of one paper knows another author's abbreviations; the
# best answer comes first, since what comes first is trusted.
#
# ## The recipe
#
# Each source has its list of rules, and documents stream through it one at a time, so a corpus of
# any size fits. Only the hashes of what was said before are remembered. The report counts what
# each rule took away.

# %%
from minillama.data.curation import RECIPES, Report, curate, toy_criteria

report, curated = Report(), {}
for source in RECIPES:
    curated[source] = list(curate(source, raw(source), toy_criteria(), report))
print(report)

# %%
report.waterfall(["commoncrawl", "github"])

# %% [markdown]
# Was everything found, and nothing good lost? Now we may look at what was planted.

# %%
for source in RECIPES:
    kept = {document.id: document.text for document in curated[source]}
    documents = list(raw(source))
    for document in documents:
        expected = document.meta.get("expected", document.text)
        assert kept.get(document.id) == (expected if document.meta["keep"] else None)
    print(f"{source:14} {len(kept):4} of {len(documents):4} documents, all as they should be")

# %% [markdown]
# ## The mixture
#
# Seven clean sources, of very different sizes. How much of each should the model read? LLaMA's
# answer is a table of shares. As the shares don't follow the sizes, some sources are read twice,
# and of GitHub only a part.

# %%
from minillama.data.mixture import LLAMA_1

print(f"{'':15}{'share':>7}{'epochs':>8}{'drawn':>9}{'there are':>11}")
for name, source in LLAMA_1.items():
    drawn, unique = source.drawn_tokens / 1e9, source.unique_tokens / 1e9
    print(f"{name:15}{source.share:7.1%}{source.epochs:8.2f}{drawn:7.0f} B{unique:9.0f} B")
assert math.isclose(sum(source.share for source in LLAMA_1.values()), 1)

# %%
fig, ax = plt.subplots()
names = list(LLAMA_1)[2:]  # without the two crawls, which are far larger
places = np.arange(len(names))
there = [LLAMA_1[name].unique_tokens / 1e9 for name in names]
drawn = [LLAMA_1[name].drawn_tokens / 1e9 for name in names]
ax.bar(places - 0.2, there, width=0.4, label="tokens there are")
ax.bar(places + 0.2, drawn, width=0.4, label="tokens drawn")
ax.set(xticks=places, xticklabels=names, ylabel="billion tokens")
ax.legend()
plt.show()

# %% [markdown]
# Wikipedia and books are read more than twice. That is a statement of value: a token from an
# encyclopedia is worth reading again before another page of the crawl is. And small sources limit
# it: Touvron et al. suspect that their 177 GB of books and papers, where other models had up to
# 2 TB, is why LLaMA lags on the exams of MMLU.
#
# ## What breaks without it
#
# Three models, all Kneser-Ney: one reads the whole dirty crawl, one the curated half of it, and one
# as many words as that, but dirty ones. Then each is asked about tales that none has seen.

# %%
from minillama.data.ngram import words_of

dirty = [line for page in pages for line in page.text.split("\n")]
clean = [line for page in curated["commoncrawl"] for line in page.text.split("\n")]
n_words = sum(len(words_of(line)) for line in clean)
so_far = np.cumsum([len(words_of(line)) for line in dirty])
models = {
    "dirty, all of it": KneserNey.train(dirty),
    "dirty, as many words": KneserNey.train(np.array(dirty)[so_far <= n_words].tolist()),
    "curated": KneserNey.train(clean),
}
unseen = "\n".join(stories(200, seed=99))
result = {name: model.perplexity(unseen) for name, model in models.items()}
for name, value in result.items():
    print(f"{name:22} perplexity {value:.2f}")
assert result["curated"] < result["dirty, all of it"] < result["dirty, as many words"]

# %% [markdown]
# The curated half teaches more than the whole, and much more than as many dirty words. But the
# numbers are close, and a little disappointing: asked about good text only, the dirty model has
# good answers, too. The difference is in what it says when *nobody* asks.


# %%
def sample(model, rng):
    words = ["<s>", "<s>"]
    while words[-1] != "</s>" and len(words) < 40:
        options = sorted(model.vocabulary)
        chances = [model.probability(word, words) for word in options]
        words.append(options[np.searchsorted(np.cumsum(chances), rng.random())])
    return [word for word in words if word not in ("<s>", "</s>")]


ours = {word for story in told for word in words_of(story)}
for name in ("dirty, all of it", "curated"):
    rng = Random(1)
    lines = [sample(models[name], rng) for _ in range(20)]
    foreign = sum(not set(line) <= ours for line in lines)
    print(f"{name}: {foreign} of 20 lines have words that no tale has, such as")
    print(textwrap.indent("\n".join(" ".join(line[:12]) for line in lines[:4]), "    "))
    assert (foreign == 0) == (name == "curated")

# %% [markdown]
# It is a model of what it read. (And two words are a short memory: even the curated model mixes
# up its stories by the second sentence. That is why there are Transformers.)
#
# Three warnings before you trust a filter. It keeps what *resembles the reference*, so it inherits
# the taste of those who wrote that. It doesn't look for names, addresses or telephone numbers, so
# the data card that `minillama curate` writes says so. And it changes no licence: what was
# copyrighted still is.
#
# ## Exercises
#
# **1. Add one.** The oldest smoothing adds 1 to every count: the probability of a word after
# another is (count of the pair + 1) / (count of the first word + size of the vocabulary). Write it,
# and see that Kneser-Ney is better on what it hasn't seen.


# %% tags=["exercise-1"]
def add_one(pairs, vocabulary, word, before):
    """P(word | before); `pairs` counts (before, word), `vocabulary` are all words there are."""
    raise NotImplementedError("exercise 1: yours to write")


# %% tags=["check-1", "raises-exception"]
def pairs_of(lines):
    found = Counter()
    for line in lines:
        words = ["<s>", *words_of(line), "</s>"]
        found.update(pairwise(words))
    return found


counted, kneser_ney = pairs_of(told[:200]), KneserNey.train(told[:200], order=2)
everything = kneser_ney.vocabulary
for before in ("mia", "the", "nowhere"):
    assert math.isclose(sum(add_one(counted, everything, w, before) for w in everything), 1)
new = pairs_of(told[200:300])
loss_add_one = -sum(n * math.log(add_one(counted, everything, w, v)) for (v, w), n in new.items())
loss = -sum(n * math.log(kneser_ney.probability(w, (v,))) for (v, w), n in new.items())
assert loss < loss_add_one
print("exercise 1: correct")

# %% [markdown]
# **2. Not the first one: none.** A line that stands on three pages is rarely worth keeping even
# once. Write a filter that drops *all* copies of each line that occurs on at least `n` different
# pages, and no other line. (Compare lines as they are.) Why is it harder to stream?


# %% tags=["exercise-2"]
def drop_frequent(pages, n):
    """Give back the pages, without the lines that stand on at least n of them."""
    raise NotImplementedError("exercise 2: yours to write")


# %% tags=["check-2", "raises-exception"]
assert drop_frequent(["x\na", "b\nx", "x"], 3) == ["a", "b", ""]
assert drop_frequent(["x\na", "b\nx", "x"], 4) == ["x\na", "b\nx", "x"]
assert drop_frequent(["x\nx\nx\na", "x"], 3) == ["x\nx\nx\na", "x"]  # two pages only
print("exercise 2: correct")

# %% [markdown]
# **3. How many epochs?** You have so many tokens of each source and want to train on `total` tokens
# with given shares. How often is each source read? Check it with LLaMA's table, and see what would
# have become of Wikipedia at 15 trillion tokens.


# %% tags=["exercise-3"]
def epochs(total, shares, unique):
    """{source: how often its tokens are read}, given {source: share} and {source: tokens}."""
    raise NotImplementedError("exercise 3: yours to write")


# %% tags=["check-3", "raises-exception"]
shares = {name: source.share for name, source in LLAMA_1.items()}
unique = {name: source.unique_tokens for name, source in LLAMA_1.items()}
for name, n in epochs(1.4e12, shares, unique).items():
    assert math.isclose(n, LLAMA_1[name].epochs)
assert 26 < epochs(15e12, shares, unique)["wikipedia"] < 27
print("exercise 3: correct")

# %% [markdown]
# ## Where it lives
#
# - `minillama/data/curation.py`: the rules of each source, the report and the data card. `minillama
#   curate RAW --reference GOOD.txt --out FOLDER` runs them over your own text, and `minillama
#   pretrain` reads what comes out.
# - `minillama/data/duplicates.py`, `minillama/data/language.py`, `minillama/data/ngram.py`,
#   `minillama/data/reference.py`, `minillama/data/heuristics.py`: a file for each kind of rule;
#   `minillama/data/github.py`, `minillama/data/wikipedia.py`, `minillama/data/latex.py` and
#   `minillama/data/stackexchange.py`: for each kind of mark-up.
# - `minillama/data/cluster.py`: the same on many machines, to the same bytes.
# - `minillama/data/mixture.py`: LLaMA's table, and the sampler that follows it.
# - Touvron et al. 2023, *LLaMA*, sec. 2.1 and table 1
#   ([arXiv:2302.13971](https://arxiv.org/abs/2302.13971)): the recipe. Wenzek et al. 2020, *CCNet*
#   ([arXiv:1911.00359](https://arxiv.org/abs/1911.00359)), and Raffel et al. 2020, *T5*, sec. 2.2
#   ([arXiv:1910.10683](https://arxiv.org/abs/1910.10683)): the two crawls.
# - Chen & Goodman 1999, *An empirical study of smoothing techniques for language modeling*:
#   Kneser-Ney among its rivals. Dodge et al. 2021
#   ([arXiv:2104.08758](https://arxiv.org/abs/2104.08758)): what C4's filters took away.
#
# Next: notebook 8, where a model reads it.
