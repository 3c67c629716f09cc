"""By hand; the heap against its definition; SentencePiece's encoder and trainer against ours."""

import json
import time

import pytest
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from texts import FEW_AND_MANY, TEXT, for_many, texts

from minillama.tokenizer import BPE, Tokenizer, train_tokenizer
from minillama.tokenizer.bpe import lines_of
from minillama.tokenizer.vocabulary import FIXED_KINDS, FIXED_PIECES, Kind


def with_pieces(*pieces: str, **options: bool) -> BPE:
    """A vocabulary with these pieces behind the fixed ones, the first to be merged first."""
    n_fixed, n = len(FIXED_PIECES), len(pieces)
    scores = (0.0,) * n_fixed + tuple(-float(rank) for rank in range(n))
    kinds = FIXED_KINDS + (Kind.NORMAL,) * n
    return BPE(FIXED_PIECES + pieces, scores, kinds, **options)


def ids_of_last_state(bpe: BPE, text: str) -> list[int]:
    *_, last = bpe.merges(text)
    ids = {piece: i for i, piece in enumerate(bpe.pieces) if bpe.kinds[i] is Kind.NORMAL}
    return [i for s in last for i in ([ids[s]] if s in ids else [3 + b for b in s.encode()])]


def test_training_by_hand():
    # Words: ▁ab three times, ▁ac once. Pairs: ▁a 4, ab 3, ac 1; then ▁a+b 3, ▁a+c 1.
    bpe = BPE.train("ab ab ab ac", 259 + 2 + 4)
    assert bpe.pieces[259:] == ("▁a", "▁ab", "a", "▁", "b", "c")
    assert bpe.scores[259:] == (0, -1, -2, -3, -4, -5)


def test_ties_go_to_the_shorter_pair_and_then_to_the_smaller():
    # Each pair occurs once: ab, ▁a, ▁x (▁ is U+2581, so after ab). Then ▁x is shorter than ▁+ab.
    assert BPE.train("x ab", 259 + 3 + 4).pieces[259:262] == ("ab", "▁x", "▁ab")


def test_encoding_by_hand():
    bpe = BPE.train("ab ab ab ac", 259 + 2 + 4)
    assert bpe.encode("ab") == [260]
    assert bpe.encode("ab ac") == [260, 259, 264]
    assert bpe.encode("b") == [262, 263]  # ▁ b
    assert bpe.encode("é\n") == [262, 0xC3 + 3, 0xA9 + 3, 13]  # ▁, then bytes
    assert bpe.encode("ab", bos=True, eos=True) == [1, 260, 2]
    assert bpe.encode("") == []
    assert bpe.encode("", bos=True, eos=True) == [1, 2]


def test_merges_show_each_step():
    bpe = BPE.train("ab ab ab ac", 259 + 2 + 4)
    assert list(bpe.merges("abc")) == [["▁", "a", "b", "c"], ["▁a", "b", "c"], ["▁ab", "c"]]
    assert list(bpe.merges("")) == [[]]


def test_the_leftmost_of_equal_pairs_is_merged_first():
    bpe = with_pieces("aa", "a", "▁", dummy_prefix=False)
    assert bpe.encode("aaa") == [259, 260]
    assert bpe.encode("aaaa") == [259, 259]


def test_a_pair_whose_left_half_was_swallowed_is_not_merged_again():
    # bc first, then ab is no longer possible; aa+a must not be taken for a+aa.
    assert with_pieces("bc", "ab", "a", "b", "c", dummy_prefix=False).encode("abc") == [261, 259]
    bpe = with_pieces("aa", "aaa", "a", dummy_prefix=False)
    for n in range(1, 12):
        assert bpe.encode("a" * n) == ids_of_last_state(bpe, "a" * n)


def test_the_heap_does_what_the_definition_says():
    bpe = BPE.train("aaab abab bbaa aabb  ab   aaaa bab" * 3, 278)

    def check(text: str) -> None:
        assert bpe.encode(text) == ids_of_last_state(bpe, text)

    for_many(500, st.text("ab ", max_size=30), check)


def test_a_piece_may_reach_over_a_space():
    bpe = with_pieces("▁b", "a▁b", "a▁", "a", "b", "▁")
    theirs = SentencePieceProcessor(model_proto=bpe.to_proto())
    for text in ["a b", "aa bb a b", "b a b", "a  b"]:
        assert bpe.encode(text) == theirs.encode(text)
    assert bpe.encode("xa b") == [264, ord("x") + 3, 260]


def test_rare_characters_become_bytes():
    text = "a " * 20_000 + "é"  # 1 in 40,000 is less than what may be left out, 1 in 20,000
    bpe = BPE.train(text, 259 + 2)
    assert bpe.pieces[259:] == ("▁", "a")
    assert bpe.decode(bpe.encode("éa")) == "éa"
    assert "é" in BPE.train(text, 259 + 3, character_coverage=1.0).pieces


def test_pieces_keep_the_rules():
    learned = BPE.train(TEXT, 600).pieces[259:]
    assert not any(len(p) > 1 and any(c in "0123456789１２" for c in p) for p in learned)
    assert all("▁" not in p.lstrip("▁") for p in learned)
    assert all(len(p) - len(p.lstrip("▁")) <= 1 for p in learned if p.strip("▁"))
    assert max(map(len, learned)) <= 16
    assert not set(learned) & set(FIXED_PIECES)
    assert not any(c in p for p in learned for c in "\n\0\u2585")
    assert "▁▁" in learned  # indentation
    assert not {"a.", "s,", "語E", "aб"} & set(learned)  # scripts do not mix
    assert "コンピューター" in BPE.train("コンピューター" * 9 + "。コンピューター" * 9, 275).pieces


@pytest.mark.parametrize("vocab_size", [421, 500, 560, 600])
def test_training_equals_sentencepiece_s(vocab_size):
    ours, theirs = BPE.train(TEXT, vocab_size), train_tokenizer(TEXT, vocab_size)
    assert ours.pieces == theirs.pieces
    assert ours.scores == theirs.scores


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [512, 4096])
def test_training_equals_sentencepiece_s_on_shakespeare(assets, vocab_size):
    text = (assets / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ours, theirs = BPE.train(text, vocab_size), train_tokenizer(text, vocab_size)
    assert ours.pieces == theirs.pieces


def test_lines_are_the_units_however_the_text_is_given():
    lines = TEXT.split("\n")
    assert BPE.train(TEXT, 500) == BPE.train(lines, 500) == BPE.train(iter(lines), 500)
    assert BPE.train("a\nb", 262).pieces[259:] == ("▁", "a", "b")


@pytest.mark.parametrize("train", [BPE.train, train_tokenizer])
def test_a_wrong_vocab_size_says_which_one_works(train):
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small .* need 264\."):
        train("hello", 100)  # ▁ h e l o
    assert train("hello", 264).vocab_size == 264
    with pytest.raises(ValueError, match="vocab_size 263 is too small"):
        train("hello", 263)
    with pytest.raises(ValueError, match=r"vocab_size 5000 is too large .* after (\d+)\.") as error:
        train("hello hello", 5000)
    largest = int(str(error.value).split("after ")[1].split(".")[0])
    assert train("hello hello", largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"vocab_size {largest + 1} is too large"):
        train("hello hello", largest + 1)


@pytest.mark.parametrize("train", [BPE.train, train_tokenizer])
@pytest.mark.parametrize("text", ["", "\n\n", [], ["", "\n"], "\0"])
def test_no_text_no_vocabulary(train, text):
    with pytest.raises(ValueError, match="no text to learn from"):
        train(text, 300)


@pytest.mark.parametrize("train", [BPE.train, train_tokenizer])
def test_a_line_with_a_reserved_character_still_counts(train):
    pieces = train(["llama \u2585 llama", "llama\0llama", "llama </s> llama"], 268).pieces
    assert "▁llama" in pieces
    assert not {"\u2585", "\0", "<", "/"} & set(pieces)


def test_what_spells_a_fixed_piece_ends_a_line():
    assert list(lines_of("a" + "a".join(FIXED_PIECES))) == ["a"] * 259
    assert list(lines_of("a<0x0a>b<S>\r\n<pad>")) == ["a<0x0a>b<S>\r", "<pad>"]


def test_training_equals_sentencepiece_s_where_pairs_overlap():
    text = "aaaa aaa aaaaa abab ababab " * 5
    ours, theirs = BPE.train(text, 271), train_tokenizer(text, 271)
    assert ours.pieces == theirs.pieces


@pytest.mark.parametrize("train", [BPE.train, train_tokenizer])
def test_training_text_must_be_unicode(train):
    with pytest.raises(ValueError, match=r"position 2 is a lone surrogate \(U\+D83D\)"):
        train(["good", "no\ud83d"], 300)


def test_what_is_written_sentencepiece_opens(tmp_path):
    bpe = BPE.train(TEXT, 600)
    bpe.save(tmp_path / "own.model")
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    assert theirs.encode(TEXT) == bpe.encode(TEXT)
    assert BPE.load(tmp_path / "own.model") == bpe


def test_pieces_that_only_sentencepiece_knows_are_refused():
    bpe = with_pieces("a", "▁")
    kinds = (*bpe.kinds[:-1], Kind.USER_DEFINED)
    with pytest.raises(ValueError, match=r"USER_DEFINED.*`Tokenizer`"):
        BPE(bpe.pieces, bpe.scores, kinds)


@pytest.mark.parametrize("examples", FEW_AND_MANY)
def test_equal_to_sentencepiece_on_any_text(bpe, tok, examples):
    def check(text: str) -> None:
        assert (ids := bpe.encode(text)) == tok.encode(text)
        assert tok.decode(ids) == text.replace("▁", " ")

    for_many(examples, texts(tok.pieces[259:]), check)


@pytest.mark.parametrize("examples", FEW_AND_MANY)
def test_equal_to_sentencepiece_on_any_text_with_llama_2_s_file(llama2, examples):
    bpe, tok = BPE.load(llama2), Tokenizer(llama2)

    def check(text: str) -> None:
        assert (ids := bpe.encode(text)) == tok.encode(text)
        assert tok.decode(ids) == text.replace("▁", " ")

    for_many(examples, texts(tok.pieces[259:]), check)


def test_equal_to_sentencepiece_where_spaces_are_squeezed(stories260k):
    bpe, tok = BPE.load(stories260k), Tokenizer(stories260k)
    assert bpe.squeeze_spaces

    def check(text: str) -> None:
        assert bpe.encode(text) == tok.encode(text)

    for_many(300, texts(tok.pieces[259:], spaced="▁"), check)


@pytest.mark.parametrize("cls", [BPE, Tokenizer])
def test_the_published_encodings(assets, llama2, cls):
    tok = cls.load(llama2)
    vectors = json.loads((assets / "token_vectors.json").read_text(encoding="utf-8"))
    cases = vectors["encode_no_bos_eos"]
    assert len(cases) > 50
    for case in cases:
        assert tok.encode(case["text"]) == case["ids"]
        assert tok.decode(case["ids"]) == case["decoded"]


def test_encoding_is_not_quadratic(bpe):
    text = "lamaol" * 10_000  # one word: about a second with the heap, half an hour without
    start = time.perf_counter()
    ids = bpe.encode(text)
    assert time.perf_counter() - start < 60
    assert bpe.decode(ids) == text
