"""The layout of ids, decoding, and the same text in a stream."""

import dataclasses
from itertools import chain

import numpy as np
import pytest
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from texts import for_many

from minillama.tokenizer import BPE, StreamDecoder, Tokenizer, Vocabulary
from minillama.tokenizer.vocabulary import FIXED_KINDS, FIXED_PIECES, Kind

EMOJI = [b + 3 for b in "🦙".encode()]  # four byte pieces


def vocabulary(*pieces: str, **options: bool) -> Vocabulary:
    n_fixed, n = len(FIXED_PIECES), len(pieces)
    scores = (0.0,) * n_fixed + tuple(-float(rank) for rank in range(n))
    return Vocabulary(FIXED_PIECES + pieces, scores, FIXED_KINDS + (Kind.NORMAL,) * n, **options)


HELLO, WORLD, SPACE, SPACES = 259, 260, 261, 262
TOK = vocabulary("▁Hello", "▁world", "▁", "▁▁")


def test_the_ids_that_every_model_of_the_family_relies_on():
    assert TOK.pieces[:3] == ("<unk>", "<s>", "</s>")
    assert TOK.pieces[ord("\n") + 3] == "<0x0A>"
    assert (TOK.bos_id, TOK.eos_id, TOK.pad_id, TOK.vocab_size) == (1, 2, -1, 263)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([HELLO, WORLD], "Hello world"),
        ([1, HELLO, 2, WORLD, 2], "Hello world"),  # control pieces are silent
        ([SPACE, HELLO], " Hello"),  # one space of the whole text is dropped
        ([SPACES, HELLO], "  Hello"),
        ([1, SPACE, 1, SPACE, HELLO], "  Hello"),
        ([13, HELLO], "\n Hello"),  # after a byte, nothing is dropped
        (EMOJI, "🦙"),
        ([*EMOJI[:3], HELLO, *EMOJI[3:]], "\ufffd\ufffd\ufffd Hello\ufffd"),
        ([*EMOJI[:2], 1, *EMOJI[2:]], "\ufffd\ufffd\ufffd\ufffd"),
        ([0, HELLO], " ⁇  Hello"),
        ([], ""),
        ([1, 2], ""),
    ],
)
def test_decoding_by_hand(ids, text):
    assert TOK.decode(ids) == text
    assert SentencePieceProcessor(model_proto=TOK.to_proto()).decode(ids) == text


def test_without_the_dummy_prefix_no_space_is_dropped():
    assert vocabulary("▁Hello", dummy_prefix=False).decode([HELLO]) == " Hello"


def test_squeezing_drops_each_leading_space():
    tok = vocabulary("▁Hello", "▁world", "▁", "▁▁", squeeze_spaces=True)
    assert tok.decode([SPACE, SPACE, HELLO, SPACE, WORLD]) == "Hello  world"


def test_any_sequence_of_integers_is_decoded():
    assert TOK.decode((HELLO, WORLD)) == "Hello world"
    assert TOK.decode(iter([HELLO, WORLD])) == "Hello world"
    assert TOK.decode(np.array([HELLO, WORLD], dtype=np.uint16)) == "Hello world"


@pytest.mark.parametrize("bad", [-1, 263, 32_000])
def test_an_id_outside_the_vocabulary_is_named(bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not .* from 0 to 262"):
        TOK.decode([HELLO, bad])


def test_a_stream_holds_a_character_back_until_it_is_complete():
    stream = StreamDecoder(TOK)
    assert [stream.push(i) for i in [1, HELLO, *EMOJI, WORLD]] == [
        *("", "Hello", "", "", "", "🦙", " world")
    ]
    assert stream.flush() == ""


def test_a_stream_that_ends_in_mid_character_says_so():
    stream = StreamDecoder(TOK)
    assert [stream.push(i) for i in EMOJI[:2]] == ["", ""]
    assert stream.flush() == "\ufffd\ufffd"


def ids_of(tok: Vocabulary) -> st.SearchStrategy[list[int]]:
    """Random ids, a good part of them bytes and those around the letters of a real character."""
    utf8 = st.sampled_from("é界🦙\U0010ffff\ud7ff").map(lambda c: [b + 3 for b in c.encode()])
    wrong = st.lists(st.sampled_from([0x80, 0xBF, 0xC0, 0xE3, 0xED, 0xA0, 0xF0, 0xF4, 0x90, 0xFF]))
    some = st.lists(st.integers(0, tok.vocab_size - 1), max_size=3)
    fixed = st.lists(st.integers(0, 258), max_size=3)
    spaces = st.lists(st.sampled_from([i for i, p in enumerate(tok.pieces) if not p.strip("▁")]))
    part = st.one_of(some, fixed, utf8, spaces, wrong.map(lambda bs: [b + 3 for b in bs]))
    return st.lists(part, max_size=8).map(lambda parts: list(chain(*parts)))


def check_decoding(tok: Vocabulary, examples: int) -> None:
    theirs = SentencePieceProcessor(model_proto=tok.to_proto())

    def check(ids: list[int]) -> None:
        text = tok.decode(ids)
        assert text == theirs.decode(ids)
        stream, so_far = StreamDecoder(tok), ""
        for i in ids:
            so_far += stream.push(i)
            assert text.startswith(so_far)
        assert so_far + stream.flush() == text

    for_many(examples, ids_of(tok), check)


def test_decoding_any_ids_equals_sentencepiece_s_and_the_stream(tok):
    check_decoding(tok, 500)


@pytest.mark.parametrize("squeeze", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_decoding_equals_sentencepiece_s_in_every_setting_of_spaces(bpe, prefix, squeeze):
    check_decoding(dataclasses.replace(bpe, dummy_prefix=prefix, squeeze_spaces=squeeze), 200)


@pytest.mark.parametrize("name", ["llama2", "stories260k"])
def test_decoding_with_real_files_equals_sentencepiece_s(request, name):
    check_decoding(Tokenizer(request.getfixturevalue(name)), 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, k: (("<s>", "<unk>", *p[2:]), k), "id 0 is '<s>' .* but must be '<unk>'"),
        (lambda p, k: (p, (k[0], Kind.NORMAL, *k[2:])), "id 1 is '<s>' .NORMAL., but must be"),
        (lambda p, k: ((*p[:3], "<pad>", *p[4:]), k), "id 3 is '<pad>' .* must be '<0x00>'"),
        (lambda p, k: (p[:258], k[:258]), "at least the 259"),
        (lambda p, k: (p, k[:-1]), "263 pieces, 263 scores and 262 kinds"),
        (lambda p, k: (p, (*k[:-1], Kind.BYTE)), "257th byte"),
        (lambda p, k: ((*p[:-1], ""), k), "empty"),
        (lambda p, k: ((*p[:-1], "▁"), k), "twice"),
    ],
)
def test_a_wrong_layout_is_refused(change, message):
    pieces, kinds = change(TOK.pieces, TOK.kinds)
    with pytest.raises(ValueError, match=message):
        Vocabulary(pieces, TOK.scores[: len(pieces)], kinds)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="not a finite number"):
        dataclasses.replace(TOK, scores=(*TOK.scores[:-1], float("nan")))


def test_a_vocabulary_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOK.pieces = ()


def test_a_vocabulary_prints_short():
    assert repr(TOK) == "Vocabulary(vocab_size=263)"
    assert repr(BPE(TOK.pieces, TOK.scores, TOK.kinds)) == "BPE(vocab_size=263)"
