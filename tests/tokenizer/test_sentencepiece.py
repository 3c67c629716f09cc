"""Ids, round trips, training that repeats itself, and one clear error for each bad input."""

import inspect
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from texts import TEXT, for_many, texts

from minillama.tokenizer import BPE, SentencePieceTokenizer, Tokenizer, train_tokenizer
from minillama.tokenizer.vocabulary import utf8


def trained_otherwise(**settings: object) -> bytes:
    """A model that SentencePiece trains with other settings than LLaMA's."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings = {"vocab_size": 500, "minloglevel": 2, **defaults, **settings}
    lines = TEXT.replace("<", "").split("\n")
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()


def changed(model: bytes, change: Callable[[Any], object]) -> bytes:
    proto = model_pb2.ModelProto.FromString(model)
    change(proto)
    return proto.SerializeToString()


def test_bos_and_eos_are_added_by_id(tok):
    ids = tok.encode("the llama")
    assert tok.encode("the llama", bos=True, eos=True) == [1, *ids, 2]
    assert tok.encode("the llama", bos=True) == [1, *ids]
    assert tok.encode("the llama", eos=True) == [*ids, 2]
    assert tok.decode([1, *ids, 2]) == "the llama"
    assert tok.encode("", bos=True, eos=True) == [1, 2]


@pytest.mark.parametrize("literal", ["<s>", "</s>", "<unk>", "<0x0A>", "a</s>b", "▁</s>"])
def test_no_text_makes_a_control_piece(tok, literal):
    assert not {0, 1, 2, 13} & set(tok.encode(literal))


def test_digits_stand_alone_and_japanese_survives(tok):
    assert [tok.pieces[i] for i in tok.encode("2023")] == ["▁", "2", "0", "2", "3"]
    assert tok.decode(tok.encode("鬱🦙")) == "鬱🦙"
    assert all(3 <= i <= 258 for i in tok.encode("鬱")[1:])


def test_text_to_ids_to_text_is_the_identity(tok):
    def check(text: str) -> None:
        assert tok.decode(tok.encode(text, bos=True, eos=True)) == text

    for_many(300, texts(tok.pieces[259:], spaced="▁"), check)


def test_the_one_exception_comes_back_as_a_space(tok, bpe):
    for encoder in (tok, bpe):
        assert encoder.decode(encoder.encode("a▁b▁")) == "a b "
        assert encoder.encode("a▁b") == encoder.encode("a b")


def test_a_batch_equals_its_texts(tok):
    lines = TEXT.split("\n") * 20
    alone = [tok.encode(line, bos=True) for line in lines]
    assert tok.encode_batch(lines, bos=True) == alone
    assert tok.encode_batch(iter(lines), bos=True, num_threads=3) == alone
    assert tok.encode_batch(["a"], eos=True) == [tok.encode("a", eos=True)]
    assert tok.encode_batch([]) == []


def test_two_trainings_give_the_same_bytes():
    assert train_tokenizer(TEXT, 600).to_proto() == train_tokenizer(TEXT, 600).to_proto()
    assert (
        train_tokenizer(TEXT.split("\n"), 600).to_proto() == train_tokenizer(TEXT, 600).to_proto()
    )


def test_training_uses_llama_s_settings_and_keeps_no_paths(llama2):
    def settings(model: bytes) -> dict[str, object]:
        proto = model_pb2.ModelProto.FromString(model)
        specs = (proto.trainer_spec, proto.normalizer_spec)
        fields = [f for spec in specs for f in spec.DESCRIPTOR.fields]
        return {
            f.name: getattr(spec, f.name)
            for spec in specs
            for f in fields
            if f.name in spec.DESCRIPTOR.fields_by_name
        }

    ours, theirs = settings(train_tokenizer(TEXT, 600).to_proto()), settings(llama2.read_bytes())
    different = {name for name in ours if ours[name] != theirs[name]}
    about_the_run = {"input", "model_prefix", "input_format", "input_sentence_size", "vocab_size"}
    assert different == about_the_run | {"num_threads", "max_sentence_length"}
    assert (list(ours["input"]), ours["model_prefix"]) == ([], "")


def test_training_prints_nothing_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    train_tokenizer(TEXT, 600)
    with pytest.raises(ValueError, match="too large"):
        train_tokenizer(TEXT, 60_000)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_no_line_is_too_long_to_be_learned_from():
    line = " ".join(["alpaca"] * 200_000)  # 1.4 MB; SentencePiece's own limit is 4192 bytes
    assert "▁alpaca" in train_tokenizer(line, 270).pieces
    word = "guanaco" * 20_000
    assert "guanaco" in train_tokenizer(word, 275).pieces


def test_a_text_that_fails_while_it_is_read_says_so_itself():
    def lines():
        yield "one"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train_tokenizer(lines(), 300)


def test_impossible_settings_are_an_error():
    with pytest.raises(ValueError, match="refuses these settings"):
        train_tokenizer(TEXT, 600, character_coverage=7.0)


def test_the_file_is_kept_byte_for_byte(tok, tmp_path):
    path = tmp_path / "tokenizer.model"
    tok.save(path)
    assert path.read_bytes() == tok.to_proto()
    for again in (Tokenizer(path), Tokenizer(str(path)), Tokenizer(path.read_bytes())):
        assert again == tok
        assert again.to_proto() == tok.to_proto()
    assert Tokenizer.load(path) == SentencePieceTokenizer.from_proto(tok.to_proto()) == tok
    assert SentencePieceTokenizer.load(path) == pickle.loads(pickle.dumps(tok)) == tok
    assert (tok.file_name, tok.to_bytes()) == ("tokenizer.model", tok.to_proto())


def test_control_pieces_are_known_by_name(tok):
    assert tok.special_ids == {"<s>": 1, "</s>": 2}
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.adds_bos) == (1, 2, -1, True)


def test_a_chat_model_may_end_its_answers_with_a_piece_of_its_own(tok):
    def extend(proto):
        proto.pieces.add(piece="<|im_end|>", score=0.0, type=proto.SentencePiece.CONTROL)
        proto.trainer_spec.eos_piece = "<|im_end|>"

    chat = Tokenizer(changed(tok.to_proto(), extend))
    assert chat.eos_id == chat.special_ids["<|im_end|>"] == 600
    assert chat.encode("the llama", eos=True) == [*tok.encode("the llama"), 600]
    assert BPE.from_proto(chat.to_proto()).eos_id == 600
    assert Tokenizer(BPE.from_proto(chat.to_proto()).to_proto()).eos_id == 600


def test_the_real_file_is_kept_byte_for_byte(llama2, tmp_path):
    Tokenizer(llama2).save(tmp_path / "copy.model")
    assert (tmp_path / "copy.model").read_bytes() == llama2.read_bytes()


def test_pieces_may_be_added_behind_the_others(tok):
    def extend(proto):
        proto.pieces.add(piece="<PRE>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        proto.pieces.add(piece="<step>", score=0.0, type=proto.SentencePiece.CONTROL)

    more = Tokenizer(changed(tok.to_proto(), extend))
    assert more.encode("the<PRE>llama")[1] == 600
    assert more.decode([*more.encode("the<PRE>llama"), 601]) == "the<PRE>llama"
    assert 601 not in more.encode("<step>")


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("cls", [Tokenizer, BPE])
def test_half_a_character_is_refused_with_its_position(tok, bpe, cls):
    encode = {Tokenizer: tok, BPE: bpe}[cls].encode
    with pytest.raises(ValueError, match=r"position 3 is a lone surrogate \(U\+DE00\)"):
        encode("abc\ude00")
    with pytest.raises(ValueError, match="position 0"):
        tok.encode_batch(["fine", "\ud83d\ude00"])


@pytest.mark.parametrize("wrong", [b"bytes", 3, None, ["list"]])
def test_what_is_no_str_is_refused(wrong):
    with pytest.raises(TypeError, match=f"but is of type {type(wrong).__name__}"):
        inspect.unwrap(utf8)(wrong)  # without the tests' own check of types


@pytest.mark.parametrize("cls", [Tokenizer, BPE])
def test_a_missing_file_is_named(tmp_path, cls):
    with pytest.raises(FileNotFoundError, match=r"nothing\.model.*train_tokenizer"):
        cls.load(tmp_path / "nothing.model")
    with pytest.raises(IsADirectoryError, match=r"is a folder.*tokenizer\.model"):
        cls.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n", "damaged"),
        (b"\n\n\n", "damaged"),
        (b'{"version": "1.0"}', "it is JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"PK\x03\x04 a zip file", "starts with other bytes"),
        (bytes(range(256)) * 9, "starts with other bytes"),
        (b"\nWhat a nice text file.\n", "damaged or is no SentencePiece model"),
    ],
)
@pytest.mark.parametrize("cls", [SentencePieceTokenizer, BPE])
def test_a_file_that_is_no_model_is_named(tmp_path, cls, content, message):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        cls.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: trained_otherwise(model_type="unigram", vocab_size=430), "of type UNIGRAM"),
        (lambda _: trained_otherwise(normalization_rule_name="nmt_nfkc"), "normalizer 'nmt_nfkc'"),
        (lambda _: trained_otherwise(byte_fallback=False), "needs byte_fallback"),
        (lambda _: trained_otherwise(pad_id=3), "id 3 is '<pad>'"),
        (lambda _: trained_otherwise(unk_id=2, bos_id=0, eos_id=1), "id 0 is '<s>'"),
        (lambda _: trained_otherwise(bos_id=-1), "id 1 is '<0x00>'"),
        (
            lambda _: trained_otherwise(treat_whitespace_as_suffix=True),
            "treat_whitespace_as_suffix",
        ),
        (lambda m: changed(m, lambda p: setattr(p.trainer_spec, "eos_piece", "END")), "'END', and"),
        (
            lambda m: changed(m, lambda p: setattr(p.trainer_spec, "eos_piece", "▁llama")),
            "is no control piece: a text could end itself",
        ),
        (lambda m: changed(m, lambda p: p.pieces.pop()), "holds 599 pieces but should hold 600"),
        (lambda m: m.replace("▁llama".encode(), b"\xff\xff\xffllama"), "not valid UTF-8"),
        (
            lambda m: m.replace("▁llama".encode(), "▁the".encode() + b"\0\0"),
            "SentencePiece refuses it",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused(tok, make, message):
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(make(tok.to_proto()))
    assert "this model" in str(error.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tok, tmp_path):
    model, path = tok.to_proto(), tmp_path / "cut.model"
    for end in [*range(1, len(model), 7), *range(len(model) - 80, len(model))]:
        path.write_bytes(model[:end])
        with pytest.raises(ValueError, match=r"cut\.model"):
            Tokenizer(path)


def test_a_flipped_bit_is_refused_or_harmless(tok):
    model, rng = tok.to_proto(), random.Random(0)
    refused = 0
    for _ in range(500):
        flipped = bytearray(model)
        flipped[rng.randrange(len(model))] ^= 1 << rng.randrange(8)
        try:
            survivor = Tokenizer(bytes(flipped))
        except ValueError:
            refused += 1
            continue
        assert survivor.vocab_size == tok.vocab_size
        assert survivor.decode(survivor.encode("the llama 🦙")) == "the llama 🦙"
    assert refused > 100


def test_a_place_that_cannot_be_written_is_named(tok, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        tok.save(Path(tmp_path, "nowhere", "tokenizer.model"))
