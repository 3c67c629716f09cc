"""tokenizer.json of both kinds: the ids, the text back, who ends a text, and what is refused."""

import json
import pickle
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import strategies as st
from json_files import CHAT_CONFIG, CHAT_PIECES, as_bytes, byte_level_json, fallback_json
from texts import TEXT, for_many, texts
from tokenizers import Tokenizer as Library

from minillama.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from minillama.tokenizer.tokenizer_json import BYTE_CHARACTERS, byte_level

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NOT_ASCII = "日本語の吾輩は猫である。🦙😀👩\u200d🚀🇯🇵é界"


def reference_ids(fields: dict[str, Any], text: str) -> list[int]:
    """Byte-level BPE by its definition: cut into words, spell in bytes, merge the earliest rule."""
    vocabulary = fields["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(fields["model"]["merges"])}
    ids = []
    parts = regex.findall(r"\p{N}|[^\p{N}]+", text)  # digits stand alone
    for word in (word for part in parts for word in regex.findall(GPT_2, part)):
        symbols = [character_of(byte) for byte in word.encode()]
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            best, merged = min(pairs, key=ranks.__getitem__), []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best and not isinstance(merged[-1], Done):
                    merged[-1] = Done(merged[-1] + symbol)  # not to be merged twice in one pass
                else:
                    merged.append(symbol)
            symbols = [str(symbol) for symbol in merged]
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


class Done(str):
    __slots__ = ()


def character_of(byte: int) -> str:
    """GPT-2's rule in other words: what Unicode calls printable stays, the rest is renumbered."""
    hidden = [b for b in range(256) if unicodedata.category(chr(b)) in ("Cc", "Cf", "Zs")]
    return chr(0x100 + hidden.index(byte)) if byte in hidden else chr(byte)


def changed(fields: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(json.dumps(fields))
    change(fields)
    return as_bytes(fields)


# ------------------------------------------------------------------------------------ ids and text


def test_by_hand():
    assert [BYTE_CHARACTERS[byte] for byte in b" a\n!"] == ["Ġ", "a", "Ċ", "!"]
    assert byte_level("Ġaé") == b" a\xe9"
    assert "".join(BYTE_CHARACTERS) == "".join(map(character_of, range(256)))


def test_a_tokenizer_becomes_what_the_file_is(byte_level, tok, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.to_bytes())
    (tmp_path / "tokenizer.model").write_bytes(tok.to_bytes())
    opened = Tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(opened, JsonTokenizer)
    assert isinstance(opened, Tokenizer)
    assert isinstance(Tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)
    assert opened == Tokenizer(byte_level.to_bytes()) == Tokenizer.load(tmp_path / "tokenizer.json")
    assert repr(opened) == "Tokenizer(vocab_size=600)"
    assert opened.file_name == "tokenizer.json"


def test_byte_level_ids_are_those_of_the_definition(byte_level):
    fields = byte_level_json(TEXT)
    assert byte_level.encode(TEXT) == reference_ids(fields, TEXT)

    def check(text: str) -> None:
        assert byte_level.encode(text) == reference_ids(fields, text)

    for_many(300, texts(), check)


def test_byte_level_decoding_of_any_ids_is_the_library_s(byte_level):
    theirs = Library.from_str(as_bytes(byte_level_json(TEXT)).decode())

    def check(ids: list[int]) -> None:
        assert byte_level.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    for_many(500, st.lists(st.integers(0, 599), max_size=12), check)


@pytest.mark.parametrize("kind", ["fallback", "metaspace"])
def test_fallback_ids_are_sentencepiece_s(request, tok, kind):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.encode(TEXT) == tok.encode(TEXT)
    for text in ("", " ", "  ", " a", "  a", "a  b ", "\n a", "▁ a", " </s>"):
        assert tokenizer.encode(text) == tok.encode(text), text


def test_llama_2_s_vocabulary_gives_llama_2_s_ids_through_the_library(llama2, assets):
    tok = Tokenizer(llama2)
    fallback = Tokenizer(as_bytes(fallback_json(tok)))
    vectors = json.loads((assets / "token_vectors.json").read_text())
    for case in vectors["encode_no_bos_eos"]:
        assert fallback.encode(case["text"]) == case["ids"], case
        assert fallback.decode(case["ids"]) == case["decoded"], case


@pytest.mark.parametrize("kind", ["byte_level", "fallback", "metaspace"])
def test_text_to_ids_to_text_is_the_identity(request, kind):
    tokenizer = request.getfixturevalue(kind)
    spaced = "" if kind == "byte_level" else "▁"

    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text

    for_many(300, texts(spaced=spaced), check)


@pytest.mark.parametrize("kind", ["byte_level", "fallback", "metaspace"])
def test_a_stream_never_shows_half_a_character(request, kind):
    tokenizer = request.getfixturevalue(kind)
    by_byte = {surface: i for i, surface in enumerate(tokenizer._surfaces) if len(surface) == 1}

    def check(parts: list[tuple[str, bool]]) -> None:
        """Some parts in the pieces of the vocabulary, some spelled byte by byte."""
        ids = []
        for text, spelled in parts:
            bytes_of = [by_byte[bytes([byte])] for byte in text.encode()]
            ids += bytes_of if spelled else tokenizer.encode(text)
        decoder, shown = tokenizer.decoder(), []
        for i in ids:
            shown.append(decoder.push(i))
            assert "\ufffd" not in shown[-1]
        assert decoder.flush() == ""
        assert "".join(shown) == tokenizer.decode(ids)
        if all(spelled for _, spelled in parts[1:]):
            assert "".join(shown) == "".join(text for text, _ in parts)

    part = st.tuples(st.text(NOT_ASCII, max_size=4), st.booleans())
    for_many(300, st.lists(part, max_size=5), check)


def test_a_stream_that_ends_in_mid_character_says_so(byte_level):
    decoder = byte_level.decoder()
    ids = [byte_level.pieces.index(BYTE_CHARACTERS[byte]) for byte in "🦙".encode()[:3]]
    assert [decoder.push(i) for i in ids] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


def test_a_batch_equals_its_texts(byte_level):
    lines = TEXT.split("\n")
    alone = [byte_level.encode(line, bos=True, eos=True) for line in lines]
    assert byte_level.encode_batch(iter(lines), bos=True, eos=True) == alone
    assert byte_level.encode_batch(lines, bos=True, eos=True, num_threads=1) == alone
    assert byte_level.encode_batch([]) == []


def test_long_texts_are_not_cut_off(fallback, tok):
    assert fallback.encode("llama " * 100) == tok.encode("llama " * 100)  # the file says 8 tokens


# --------------------------------------------------------------------------------- control pieces


@pytest.mark.parametrize("kind", ["byte_level", "fallback", "metaspace"])
def test_no_text_makes_a_control_piece(request, kind):
    tokenizer = request.getfixturevalue(kind)
    control = set(tokenizer.special_ids.values())

    def check(text: str) -> None:
        assert not control & set(tokenizer.encode(text))
        assert not control & set(tokenizer.encode_batch([text])[0])

    names = st.sampled_from([*CHAT_PIECES, "<s>", "</s>", "<unk>", "<|im_", "start|>"])
    for_many(300, st.lists(st.one_of(names, texts()), max_size=4).map("".join), check)


def test_control_pieces_come_by_id_and_are_silent(byte_level):
    ids = byte_level.encode("the llama")
    start, end = (byte_level.special_ids[name] for name in CHAT_PIECES[1:])
    assert byte_level.encode("the llama", bos=True, eos=True) == [start, *ids, end]
    assert byte_level.decode([start, *ids, end]) == "the llama"
    assert byte_level.decode([start, end]) == ""


@pytest.mark.parametrize("bad", [-1, 600, 50_000])
def test_an_id_outside_the_vocabulary_is_named(byte_level, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not .* from 0 to 599"):
        byte_level.decode([5, bad])


# ------------------------------------------------------------------------ how texts begin and end


def ends_of(tokenizer: Tokenizer) -> tuple[int, int, bool]:
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos


def beside(tmp_path, **files: dict[str, Any]) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes(as_bytes(byte_level_json(TEXT)))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer(tmp_path / "tokenizer.json")


def test_llama_s_names_need_no_other_file(fallback):
    assert ends_of(fallback) == (1, 2, True)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config": CHAT_CONFIG}, (1, 2, False)),
        ({"tokenizer_config": CHAT_CONFIG | {"add_bos_token": True}}, (1, 2, True)),
        ({"generation_config": {"bos_token_id": 0, "eos_token_id": [2, 0]}}, (0, 2, False)),
        ({"config": {"bos_token_id": 1, "eos_token_id": 0}}, (1, 0, False)),
        ({"generation_config": {"eos_token_id": 0}}, (-1, 0, False)),
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": 0}},
            (-1, 2, False),
        ),
    ],
)
def test_the_files_beside_it_say_how_texts_begin_and_end(tmp_path, files, ends):
    tokenizer = beside(tmp_path, **files)
    assert ends_of(tokenizer) == ends
    again = Tokenizer(tokenizer.to_bytes())
    assert ends_of(again) == ends
    assert again == tokenizer == pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_what_is_written_is_a_file_of_the_library_that_begins_texts_alike(tmp_path):
    tokenizer = beside(tmp_path, tokenizer_config=CHAT_CONFIG | {"add_bos_token": True})
    theirs = Library.from_str(tokenizer.to_bytes().decode())
    assert theirs.encode("the llama").ids == tokenizer.encode("the llama", bos=True)


def test_a_file_that_says_all_by_itself_is_kept_byte_for_byte(fallback, tmp_path):
    fallback.save(tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path / "tokenizer.json").to_bytes() == fallback._content


def test_bos_is_not_made_up(tmp_path):
    tokenizer = beside(tmp_path, generation_config={"eos_token_id": 0})
    with pytest.raises(ValueError, match=r"this vocabulary has none.*leave bos out"):
        tokenizer.encode("the llama", bos=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing says which of its pieces ends a text"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "'</s>', is none of its 3 control pieces"),
        ({"config": {"eos_token_id": 65}}, "65, is none of its 3"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, "is none of its 3 control pieces"),
        ({"config": {"eos_token_id": {"a": 2}}}, "is none of its 3 control pieces"),
        ({"config": {"eos_token_id": 2, "bos_token_id": -2}}, "bos_token that is named"),
        ({"tokenizer_config": ["eos"]}, "tokenizer_config.json beside it holds no JSON object"),
        ({"generation_config": 3}, "generation_config.json beside it holds no JSON object"),
        (
            {"tokenizer_config": {"add_bos_token": True, "eos_token": "<|im_end|>"}},
            "begin with BOS",
        ),
    ],
)
def test_ends_that_cannot_be_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as error:
        beside(tmp_path, **files)
    assert "tokenizer.json cannot be used as a tokenizer" in str(error.value)


def test_a_damaged_file_beside_it_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json beside it is damaged"):
        beside(tmp_path)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the tokenizers library refuses it"),
        (b"[]", "or another JSON file"),
        (b'{"eos_token": "</s>"}', "or another JSON file"),
        (b'{"version": "1.0"}', "Model missing"),
        (b'{"a": \xff}', "refuses it"),
        (b"{" * 100_000, "refuses it"),
        (b'{"a":' * 100_000, "refuses it"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


def add(content: str, i: int, **more: Any) -> Callable[[dict[str, Any]], object]:
    """An added token of the file."""
    token = {"id": i, "content": content, "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False, **more}
    return lambda fields: fields["added_tokens"].append(token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add("<pad>", 1000), "added token '<pad>' has id 1000, where it does not fit"),
        (add("<pad>", 5), "added token '<pad>' has id 5"),
        (lambda f: f["model"]["vocab"].update({"llamallama": 900}), "none of id 600"),
        (lambda f: f.update(normalizer={"type": "NFKC"}), "it rewrites text"),
        (lambda f: f.update(normalizer={"type": "Lowercase"}), "it rewrites text"),
        (lambda f: f.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level nor"),
        (lambda f: f.update(pre_tokenizer=None), "neither byte-level nor"),
        (lambda f: f["added_tokens"][0].update(content="a"), "added token 'a' has id 0"),
        (lambda f: f["model"]["merges"].append(["zz", "zz"]), "out of vocabulary"),
    ],
)
def test_a_tokenizer_that_cannot_keep_its_promises_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(changed(byte_level_json(TEXT), change))
    assert "this tokenizer.json" in str(error.value)


def test_a_control_piece_that_a_text_could_make_is_refused():
    fields = byte_level_json(TEXT)
    words = fields["model"]["vocab"]
    word = next(word for word in reversed(words) if word.isascii() and word.isalpha())
    with pytest.raises(ValueError, match=f"a text that says {word!r} would make a control piece"):
        Tokenizer(changed(fields, add(word, words[word])))


def test_fallback_needs_every_byte(tok):
    def change(fields: dict[str, Any]) -> None:
        fields["model"]["vocab"]["<0x0B>"] = fields["model"]["vocab"].pop("<0x0A>")

    def without(fields: dict[str, Any]) -> None:
        fields["model"]["byte_fallback"] = False

    for damage in (change, without):
        with pytest.raises(ValueError, match=r"nor has a piece for each of the 256 bytes|gaps|2 "):
            Tokenizer(changed(fallback_json(tok), damage))


def test_a_character_that_cannot_be_spelled_is_an_error_and_not_lost(tmp_path):
    fields = byte_level_json(TEXT)
    lost = fields["model"]["vocab"].pop(BYTE_CHARACTERS[0x13])
    fields["model"]["vocab"]["llamallama"] = lost
    post = {"tokenizer_config": CHAT_CONFIG}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(post["tokenizer_config"]))
    (tmp_path / "tokenizer.json").write_bytes(as_bytes(fields))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"cannot spell the character '\\x13' \(U\+0013\)"):
        tokenizer.encode("the llama\x13")
    with pytest.raises(ValueError, match="cannot spell"):
        tokenizer.encode_batch(["the llama", "\x13"])
    assert tokenizer.decode(tokenizer.encode("日本🦙")) == "日本🦙"


def test_half_a_character_is_refused_with_its_position(byte_level):
    with pytest.raises(ValueError, match=r"position 3 is a lone surrogate"):
        byte_level.encode("abc\ude00")


def test_a_truncated_file_is_refused_wherever_it_ends(byte_level):
    content = byte_level.to_bytes()
    for end in range(1, len(content), len(content) // 60):
        with pytest.raises(ValueError, match=r"this tokenizer\.json"):
            Tokenizer(content[:end])


def test_a_flipped_bit_is_refused_or_harmless(byte_level):
    content, rng = byte_level.to_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        try:
            survivor = Tokenizer(bytes(flipped))
        except ValueError:
            refused += 1
            continue
        assert survivor.decode(survivor.encode("the llama 🦙")) == "the llama 🦙"
    assert refused > 20


def test_a_panic_of_the_library_is_an_error_like_others(byte_level):
    damaged = byte_level.to_bytes().replace(b'"<|im_start|>": {"id"', b'"<|im_stort|>": {"id"')
    with pytest.raises(ValueError, match=r"breaks down over it .no entry found"):
        Tokenizer(damaged)


def test_without_the_library_the_way_to_it_is_named():
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from minillama import Tokenizer\n"
        "try: Tokenizer(b'{}')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'minillama[hub]'" in done.stdout
