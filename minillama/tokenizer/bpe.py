"""Byte-pair encoding from scratch: how the pieces are learned, and how a text is cut into them.

Source: Sennrich et al. 2016 (arXiv:1508.07909), sec. 3.2, in SentencePiece's variant
(arXiv:1808.06226), which LLaMA uses (arXiv:2302.13971, sec. 2.1).
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

from .vocabulary import (
    FIRST_BYTE_ID,
    FIXED_KINDS,
    FIXED_PIECES,
    N_FIXED,
    SPACE,
    Kind,
    Vocabulary,
    utf8,
)

MAX_PIECE_LENGTH = 16  # characters
WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")  # pieces never reach over the end of a word
LINE_END = re.compile("[\n\0\u2585]|<(?:unk|/?s|0x[0-9A-F]{2})>")  # the fixed pieces, spelled

Pair = tuple[str, str]


class BPE(Vocabulary):
    """LLaMA's tokenizer in plain Python: the same ids as SentencePiece's, without its encoder.

    A text starts as single characters; again and again, the neighbours whose union has the highest
    score are merged. `merges` shows it step by step, `encode` does the same in n log n.
    Built in notebooks/01_tokenizer.ipynb.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if others := set(self.kinds) & {Kind.USER_DEFINED, Kind.UNUSED}:
            names = " and ".join(sorted(kind.name for kind in others))
            raise ValueError(
                f"it has pieces of kind {names}, which BPE does not know: `Tokenizer` does."
            )

    @classmethod
    def train(
        cls, text: str | Iterable[str], vocab_size: int, character_coverage: float = 0.99995
    ) -> "BPE":
        """Learn a vocabulary: merge the most frequent pair of neighbours everywhere, and repeat.

        ``text`` is one string or many; it is learned line by line either way. Ids: the 259 fixed
        pieces, the learned ones in the order of learning, then the single characters, the frequent
        first, until they make up ``character_coverage`` of the text; the rest is spelled in bytes.
        Digits stand alone. A piece has at most 16 characters, of one script, and a space only in
        front, unless it is all spaces. Of equally frequent pairs the shorter is merged first, then
        the smaller in code points: the same text gives the same vocabulary.

        Equal to `train_tokenizer`, piece by piece, as far as Unicode's names tell a character's
        script (tested on Latin, Greek, Cyrillic, Hebrew, Arabic, Hangul, Devanagari, kana and
        kanji). Where no pair is left, SentencePiece goes on with pairs that occur nowhere any more;
        here, ``vocab_size`` is too large then.

        Raises ValueError if there is no text, and if ``vocab_size`` is too small or too large for
        it, with the smallest or largest that works.
        """
        spaced = (SPACE + line.replace(" ", SPACE) for line in lines_of(text))
        words = Counter(word for line in spaced for word in WORD.findall(line))
        alphabet = required_characters(words, character_coverage)
        n_merges = vocab_size - N_FIXED - len(alphabet)
        if n_merges < 0:
            raise too_small(vocab_size, N_FIXED + len(alphabet))
        learned = learn_merges(words, set(alphabet), n_merges)
        if len(learned) < n_merges:
            raise too_large(vocab_size, N_FIXED + len(learned) + len(alphabet))
        pieces = learned + alphabet
        return cls(
            pieces=(*FIXED_PIECES, *pieces),
            scores=(0.0,) * N_FIXED + tuple(-float(rank) for rank in range(len(pieces))),
            kinds=FIXED_KINDS + (Kind.NORMAL,) * len(pieces),
        )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text. TypeError and ValueError for what is no str or no valid Unicode."""
        known: dict[str, list[int]] = {}  # most words of a text occur many times
        ids = [self.bos_id] * bos
        for word in self._words(text):
            if word not in known:
                known[word] = [i for piece in self._merge(word) for i in self._ids_of(piece)]
            ids += known[word]
        return ids + [self.eos_id] * eos

    def merges(self, text: str) -> Iterator[list[str]]:
        """The states on the way from characters to pieces, one merge a step: the definition, in n².

        `encode` turns the last state into ids, and a character that has no piece into its bytes.
        """
        symbols = list("".join(self._words(text)))
        yield symbols
        while True:
            pairs = [left + right for left, right in pairwise(symbols)]
            best = max(pairs, key=lambda piece: self._scores.get(piece, -math.inf), default="")
            if best not in self._scores:
                return
            at = pairs.index(best)  # the leftmost, if the same pair stands in several places
            symbols = [*symbols[:at], best, *symbols[at + 2 :]]
            yield symbols

    def _merge(self, word: str) -> list[str]:
        """The last state of `merges`, in n log n: a heap of pairs over a linked list of symbols."""
        symbols = list(word)  # a merged symbol stands at its first character, "" at the others
        before, after = list(range(-1, len(word) - 1)), list(range(1, len(word) + 1))
        candidates: list[tuple[float, int, int, str, str]] = []  # best score, then leftmost

        def offer(i: int, j: int) -> None:
            if i >= 0 and j < len(word) and (piece := symbols[i] + symbols[j]) in self._scores:
                heappush(candidates, (-self._scores[piece], i, j, symbols[i], symbols[j]))

        for i in range(len(word)):
            offer(i, i + 1)
        while candidates:
            _, i, j, left, right = heappop(candidates)
            if (symbols[i], symbols[j]) != (left, right):
                continue  # one of the two has been merged with another since
            symbols[i], symbols[j] = left + right, ""
            after[i] = after[j]
            if after[j] < len(word):
                before[after[j]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [symbol for symbol in symbols if symbol]

    def _words(self, text: str) -> list[str]:
        utf8(text)
        if self.squeeze_spaces:
            text = re.sub(" +", " ", text.strip(" "))
        if not text:
            return []
        text = SPACE * self.dummy_prefix + text.replace(" ", SPACE)
        return WORD.findall(text) if self._stays_in_words else [text]

    def _ids_of(self, piece: str) -> list[int]:
        known = self._ids.get(piece)
        return [known] if known is not None else [FIRST_BYTE_ID + byte for byte in piece.encode()]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces) if self.kinds[i] is Kind.NORMAL}

    @cached_property
    def _scores(self) -> dict[str, float]:
        return {piece: self.scores[i] for piece, i in self._ids.items()}

    @cached_property
    def _stays_in_words(self) -> bool:
        return all(WORD.fullmatch(piece) for piece in self._ids)


def lines_of(text: str | Iterable[str]) -> Iterator[str]:
    """The lines that both trainers learn from, checked to be Unicode; ValueError if there are none.

    What spells a fixed piece ("</s>") ends a line as well, for it must not be learned again; and so
    do NUL and U+2585, which SentencePiece's trainer keeps for itself: it silently drops such lines.
    """
    empty = True
    for part in [text] if isinstance(text, str) else text:
        utf8(part)
        for line in filter(None, LINE_END.split(part)):
            empty = False
            yield line
    if empty:
        raise ValueError("there is no text to learn from: give at least one line of text.")


def too_small(vocab_size: int, smallest: int) -> ValueError:
    return ValueError(
        f"vocab_size {vocab_size} is too small for this text: 3 control pieces, 256 bytes and its "
        f"{smallest - N_FIXED} single characters need {smallest}. Take at least that, or lower "
        f"character_coverage, so that rare characters are spelled in bytes."
    )


def too_large(vocab_size: int, largest: int) -> ValueError:
    return ValueError(
        f"vocab_size {vocab_size} is too large for this text: it has no pairs left to merge after "
        f"{largest}. Take at most that, or give more text."
    )


def required_characters(words: Counter[str], coverage: float) -> list[str]:
    """The most frequent characters, until they make up ``coverage`` of the text."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for character in word:
            counts[character] += n
    chosen, seen, enough = [], 0, coverage * counts.total()
    for character, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= enough:
            break
        chosen.append(character)
        seen += n
    return chosen


def learn_merges(words: Counter[str], alphabet: set[str], n_merges: int) -> list[str]:
    """Up to ``n_merges`` pieces, in the order of learning.

    Words are counted once, and after a merge only the words that it changed are looked at again.
    """
    # A character outside the alphabet becomes "", which is part of no pair.
    symbols = [[c if c in alphabet else "" for c in word] for word in words]
    frequency = list(words.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # words where it stands, or stood
    for w, word in enumerate(symbols):
        for pair in mergeable_pairs(word):
            counts[pair] += frequency[w]
            places[pair].add(w)

    def entry(pair: Pair) -> tuple[int, int, str, Pair]:
        return -counts[pair], len("".join(pair)), "".join(pair), pair

    candidates = [entry(pair) for pair in counts]
    heapify(candidates)
    learned: list[str] = []
    while candidates and len(learned) < n_merges:
        count, _, piece, pair = heappop(candidates)
        if count == 0 or -count != counts[pair]:
            continue  # occurs no more; or the count has changed, and a newer entry holds it
        learned.append(piece)
        changed = set()
        for w in places.pop(pair, ()):
            for old in mergeable_pairs(symbols[w]):
                counts[old] -= frequency[w]
                changed.add(old)
            symbols[w] = merged(symbols[w], pair)
            for new in mergeable_pairs(symbols[w]):
                counts[new] += frequency[w]
                places[new].add(w)
                changed.add(new)
        for pair in changed:
            heappush(candidates, entry(pair))
    return learned


def merged(symbols: list[str], pair: Pair) -> list[str]:
    """The symbols with each occurrence of the pair, from the left, made one."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def mergeable_pairs(symbols: list[str]) -> Iterator[Pair]:
    """The pairs of neighbours that may become one piece."""
    return (pair for pair in pairwise(symbols) if all(pair) and may_be_piece("".join(pair)))


@lru_cache(maxsize=1 << 16)
def may_be_piece(piece: str) -> bool:
    """LLaMA's rules for pieces of two or more characters: see `BPE.train`."""
    body = piece.lstrip(SPACE)
    n_spaces = len(piece) - len(body)
    if len(piece) > MAX_PIECE_LENGTH or (body and n_spaces > 1) or SPACE in body:
        return False
    scripts = {script(character) for character in body} - {"ANY"}
    return "DIGIT" not in scripts and len(scripts) <= 1


def script(character: str) -> str:
    """The script of a letter, from its Unicode name: LATIN, GREEK, ...; COMMON for all others.

    Kanji and kana are one script, for Japanese words mix them; combining marks go with any.
    """
    if character in "0123456789０１２３４５６７８９":
        return "DIGIT"
    if unicodedata.category(character)[0] not in "LM":
        return "COMMON"
    first, *_ = re.split("[ -]", unicodedata.name(character, "COMMON"))
    if first in ("COMBINING", "VARIATION"):
        return "ANY"
    return "HAN" if first in ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA") else first
