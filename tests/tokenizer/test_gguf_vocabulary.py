"""The vocabularies of GGUF files: both kinds there and back, SmolLM2's own, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from json_files import as_bytes, byte_level_json, fallback_json
from test_tokenizer_json import GPT_2, character_of
from texts import TEXT, for_many, texts

from minillama.checkpoint.fetch import fetched
from minillama.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from minillama.tokenizer.gguf import PRE_TOKENIZERS

KEY = "tokenizer.ggml."
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What cuts a text into words, one pattern after the other; what a pattern leaves is a word as well.
WORDS = {
    "gpt-2": [GPT_2],
    "smollm": [r"\p{N}", GPT_2],
    "llama-bpe": [LLAMA_3],
    "qwen2": [LLAMA_3.replace("{1,3}", "")],
    "default": [
        r"[\p{P}\$\+<=>\^~\|]+",
        GPT_2.removesuffix(r"|\s+"),
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ],
}


def words_of(text: str, patterns: list[str]) -> list[str]:
    words = [text]
    for pattern in patterns:
        words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
    return words


def reference_ids(metadata: dict[str, Any], text: str) -> list[int]:
    """Byte-level BPE by its definition, from the metadata alone."""
    ids = {piece: i for i, piece in enumerate(metadata[KEY + "tokens"])}
    ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(metadata[KEY + "merges"])}
    found = []
    for word in words_of(text, WORDS[metadata[KEY + "pre"]]):
        symbols = [character_of(byte) for byte in word.encode()]
        if metadata[KEY + "pre"] == "llama-bpe" and "".join(symbols) in ids:
            symbols = ["".join(symbols)]
        while ranked := [(ranks[p], at) for at, p in enumerate(pairwise(symbols)) if p in ranks]:
            _, at = min(ranked)  # the leftmost of the earliest rule
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found += [ids[symbol] for symbol in symbols]
    return found


@pytest.fixture(scope="module")
def metadata(byte_level) -> dict[str, Any]:
    return byte_level.to_gguf()


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Any]:
    """The metadata of a real file."""
    path = fetched("smollm2-135m-instruct")
    if path is None:
        pytest.skip("needs SmolLM2: minillama fetch smollm2-135m-instruct")
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


# ------------------------------------------------------------------------------------ SentencePiece


def test_sentencepiece_comes_back_as_the_same_vocabulary(tok):
    metadata = tok.to_gguf()
    assert metadata[KEY + "model"] == "llama"
    assert metadata[KEY + "token_type"][:4] == [2, 3, 3, 6]
    again = Tokenizer.from_gguf(metadata)
    assert isinstance(again, SentencePieceTokenizer)
    assert again == tok
    assert again.encode(TEXT) == tok.encode(TEXT)


@pytest.mark.parametrize("name", ["llama2", "stories260k"])
def test_real_vocabularies_come_back(request, name):
    tok = Tokenizer(request.getfixturevalue(name))
    again = Tokenizer.from_gguf(tok.to_gguf())
    assert again.to_gguf() == tok.to_gguf()
    assert again.encode(TEXT) == tok.encode(TEXT)
    assert again.decode(tok.encode(TEXT)) == tok.decode(tok.encode(TEXT))


def test_another_end_of_text_is_kept(tok):
    metadata = tok.to_gguf()
    metadata[KEY + "tokens"] += ["<|im_end|>"]
    metadata[KEY + "scores"] += [0.0]
    metadata[KEY + "token_type"] += [3]
    metadata[KEY + "eos_token_id"] = 600
    chat = Tokenizer.from_gguf(metadata)
    assert chat.eos_id == 600
    assert Tokenizer(chat.to_bytes()) == chat == Tokenizer.from_gguf(chat.to_gguf())


# -------------------------------------------------------------------------------------- byte level


def test_byte_level_comes_back_as_the_same_file(byte_level, metadata):
    assert metadata[KEY + "model"] == "gpt2"
    assert metadata[KEY + "pre"] == "smollm"
    assert metadata[KEY + "token_type"][:4] == [3, 3, 3, 1]
    again = Tokenizer.from_gguf(metadata)
    assert isinstance(again, JsonTokenizer)
    assert (again.bos_id, again.eos_id, again.adds_bos) == (1, 2, False)
    assert again.special_ids == byte_level.special_ids
    assert again.pieces == byte_level.pieces
    assert again.encode(TEXT) == byte_level.encode(TEXT)
    assert again.to_gguf() == metadata
    assert Tokenizer(again.to_bytes()) == again


@pytest.mark.parametrize("pre", WORDS)
def test_ids_are_those_of_the_definition(metadata, pre):
    # Pieces that tell the pre-tokenizers apart: of several digits, and one that no merges lead to.
    more = {"tokens": ["12", "123", "1234", "Ġzebras"], "token_type": [1] * 4}
    more["merges"] = ["1 2", "12 3", "123 4"]
    metadata = metadata | {KEY + name: metadata[KEY + name] + new for name, new in more.items()}
    metadata[KEY + "pre"] = pre
    tokenizer = Tokenizer.from_gguf(metadata)
    text = TEXT + " 12 1234 1234567 zebras"
    assert tokenizer.encode(text) == reference_ids(metadata, text)
    assert (603 in tokenizer.encode(" zebras")) == (pre == "llama-bpe")
    assert (602 in tokenizer.encode("1234")) == (pre == "gpt-2")

    def check(text: str) -> None:
        assert tokenizer.encode(text) == reference_ids(metadata, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    for_many(100, texts(), check)


def test_aliases_and_defaults(metadata):
    llama_3 = Tokenizer.from_gguf(
        {key: v for key, v in metadata.items() if key != KEY + "add_bos_token"}
        | {KEY + "pre": "llama3"}
    )
    assert llama_3.adds_bos
    assert llama_3.to_gguf()[KEY + "pre"] == "llama-bpe"
    without = {key: v for key, v in metadata.items() if not key.endswith(("type", "bos_token_id"))}
    tokenizer = Tokenizer.from_gguf(without)
    assert (tokenizer.bos_id, tokenizer.special_ids) == (-1, {"<|im_end|>": 2})
    assert Tokenizer.from_gguf(tokenizer.to_gguf()) == tokenizer


def test_user_defined_pieces_are_taken_from_text(metadata):
    kinds = [*metadata[KEY + "token_type"], 4]
    more = {KEY + "token_type": kinds, KEY + "tokens": [*metadata[KEY + "tokens"], "<file name>"]}
    tokenizer = Tokenizer.from_gguf(metadata | more)
    assert 600 in tokenizer.encode("the<file name>llama")
    assert tokenizer.decode(tokenizer.encode("the<file name>llama")) == "the<file name>llama"
    assert tokenizer.to_gguf()[KEY + "token_type"] == kinds


def test_smollm2_s_own(smollm2):
    tokenizer = Tokenizer.from_gguf(smollm2)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49_152, 1, 2)
    assert not tokenizer.adds_bos
    assert tokenizer.special_ids["<|im_start|>"] == 1
    assert len(tokenizer.special_ids) == 17
    assert tokenizer.encode("Hello, world!") == [19556, 28, 905, 17]
    text = Path(__file__).read_text() + TEXT
    ids = tokenizer.encode(text)
    assert ids == reference_ids(smollm2, text)
    assert tokenizer.decode(ids) == text
    again = tokenizer.to_gguf()
    assert all(smollm2[key] == value for key, value in again.items())
    with pytest.raises(ValueError, match=r"cannot spell the character '\\x13'"):
        tokenizer.encode("\x13")


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "model is 'bert', and only 'llama' .* and 'gpt2'"),
        ({"pre": "tekken"}, "pre is 'tekken': .* Known are gpt-2, smollm"),
        ({"pre": None}, "pre is None"),
        ({"eos_token_id": 600}, "ends them with 600, of 600"),
        ({"bos_token_id": -7}, "begins texts with id -7"),
        ({"token_type": [1, 3]}, "600 pieces and 2 kinds"),
        ({"merges": ["one two"]}, "out of vocabulary"),
        ({"merges": ["one"]}, "refuses it"),
    ],
)
def test_what_cannot_be_read_is_named(metadata, change, message):
    changed = metadata | {KEY + name: value for name, value in change.items()}
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_gguf(changed)
    assert "the vocabulary in the GGUF cannot be used as a tokenizer" in str(error.value)


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges", "eos_token_id"])
def test_a_missing_key_is_named(metadata, key):
    with pytest.raises(ValueError, match=f"it has no key {KEY}{key}"):
        Tokenizer.from_gguf({name: v for name, v in metadata.items() if name != KEY + key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_bos_token": False}, "add_bos_token is false"),
        ({"bos_token_id": 2}, "bos_token_id is 2, but LLaMA's <s> has id 1"),
        ({"eos_token_id": 300}, "eos_id is 300, which is no control piece"),
        ({"scores": [0.0]}, "600 pieces, 1 scores and 600 kinds"),
        ({"token_type": [9] * 600}, "9 is not a valid Kind"),
        ({"tokens": ["<s>"] * 600}, "id 0 is '<s>'"),
    ],
)
def test_a_sentencepiece_vocabulary_of_another_kind_is_refused(tok, change, message):
    changed = tok.to_gguf() | {KEY + name: value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(changed)


def test_a_piece_that_stands_there_twice_is_refused(metadata):
    tokens = [*metadata[KEY + "tokens"][:-1], "Ġ"]
    with pytest.raises(ValueError, match="stands in it twice"):
        Tokenizer.from_gguf(metadata | {KEY + "tokens": tokens})


def test_what_the_format_has_no_name_for_is_not_written(tok, tmp_path):
    fields = byte_level_json(TEXT)
    fields["pre_tokenizer"] = PRE_TOKENIZERS["gpt-2"] | {"trim_offsets": False}
    (tmp_path / "tokenizer.json").write_bytes(as_bytes(fields))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    with pytest.raises(ValueError, match=r"has no name that minillama knows.*trim_offsets"):
        Tokenizer(tmp_path / "tokenizer.json").to_gguf()
    with pytest.raises(ValueError, match="has no name that minillama knows"):
        Tokenizer(as_bytes(fallback_json(tok))).to_gguf()
