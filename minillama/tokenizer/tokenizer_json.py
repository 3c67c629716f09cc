"""tokenizer.json: the file of the tokenizers library, which most Llama-like models come with.

Two kinds of it can spell any text. Byte-level BPE (SmolLM2, Llama 3) merges bytes, each written as
a printable character. Byte fallback (Llama 2, TinyLlama) merges characters as SentencePiece does,
and has a piece for each byte besides.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsIndex

from .tokenizer import Tokenizer
from .vocabulary import BYTE_PIECES, SPACE, in_vocabulary, naming, utf8

# Who gives this back takes text as it is: nothing is folded, trimmed or squeezed.
PROBE = " A  ﬁ Ⅷ e\u0301\t日本語\n\n 🦙 Ａ12 it's x .  "


def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary, so that pieces are text.

    What is printable in Latin-1 stands for itself; the others are counted up from U+0100: a space
    is "Ġ", the end of a line "Ċ".
    Source: Radford et al. 2019 (GPT-2), the code released with it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = map(chr, range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else next(others) for byte in range(256))


BYTE_CHARACTERS = byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class JsonTokenizer(Tokenizer):
    """A `Tokenizer` from a tokenizer.json, encoded by the tokenizers library.

    Which pieces begin and end a text is said by tokenizer_config.json or generation_config.json
    beside the file, or by its post-processor, or the pieces are called <s> and </s>. `to_bytes`
    says it in the post-processor, so that the one file is enough.

    Raises OSError, or ValueError with the file's name and the way out: for damaged JSON, for a
    tokenizer that rewrites text or lacks bytes to fall back on, for ids with gaps, for control
    pieces that a text could make, where nothing says which piece ends a text, and where the library
    is missing. `encode` raises ValueError for a character whose bytes a byte-level vocabulary lacks
    (SmolLM2's: six control characters), rather than drop it.
    """

    file_name = "tokenizer.json"

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        """Open a file, with what lies beside it, or the content of one."""
        name = "this tokenizer.json" if isinstance(source, bytes) else os.fspath(source)
        with naming(name), without_panic():
            self._content = source if isinstance(source, bytes) else Path(source).read_bytes()
            self._library, self.fields = open_library(self._content)
            self._read_vocabulary()
            self._learn_behaviour()
            self._stated = {"bos_id": -1, "eos_id": -1, "adds_bos": False} | self._ends_by_itself()
            ends = self._stated
            if not isinstance(source, bytes):
                ends = ends | self._ends_beside(Path(source).parent)
            self.bos_id, self.eos_id, self.adds_bos = ends.values()
            self._check_ends()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text. TypeError if it is no str, ValueError if it cannot be spelled."""
        return self._framed(self._ids_of(self._spelled(text)), bos, eos)

    def encode_batch(
        self,
        texts: Iterable[str],
        bos: bool = False,
        eos: bool = False,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` for many texts at once, on all cores unless ``num_threads`` is 1."""
        batch = [self._spelled(text) for text in texts]
        if num_threads == 1:
            rows = [self._ids_of(spelled) for spelled in batch]
        else:
            encodings = self._library.encode_batch_fast(batch, add_special_tokens=False)
            rows = [encoding.ids for encoding in encodings]
        return [self._framed(ids, bos, eos) for ids in rows]

    def decoder(self) -> "ByteDecoder":
        """A fresh decoder for a stream of ids; what it returns adds up to `decode(ids)`."""
        return ByteDecoder(self._surfaces, self.dummy_prefix)

    def to_bytes(self) -> bytes:
        """The content of the file as it was read, and in it what the files beside it said."""
        ends = {"bos_id": self.bos_id, "eos_id": self.eos_id, "adds_bos": self.adds_bos}
        if ends == self._stated:
            return self._content
        processor = post_processor(self.pieces, self.bos_id, self.eos_id, self.adds_bos)
        fields = self.fields | {"post_processor": processor}
        return json.dumps(fields, ensure_ascii=False).encode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JsonTokenizer) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def _ids_of(self, spelled: str) -> list[int]:
        ids: list[int] = self._library.encode(spelled, add_special_tokens=False).ids
        return ids

    def _spelled(self, text: str) -> str:
        """The text as the library gets it."""
        data = utf8(text)
        if len(data.translate(None, self._lacking)) < len(data):
            wrong = next(c for c in text if set(c.encode()) & set(self._lacking))
            raise ValueError(
                f"this vocabulary cannot spell the character {wrong!r} (U+{ord(wrong):04X}): it "
                f"has no piece for its bytes. Take the character out: text.replace({wrong!r}, '')."
            )
        # The library puts no space before a text that starts with one; SentencePiece, with which
        # these models learned, does. Without it, the text's own would be dropped in decoding.
        return " " + text if self._spares_space and text[:1] in (" ", SPACE) and text else text

    def _read_vocabulary(self) -> None:
        """Pieces, control pieces, and the bytes that each piece stands for."""
        library, model = self._library, self.fields["model"]
        n, added = library.get_vocab_size(), self.fields.get("added_tokens", [])
        for token in added:
            if library.token_to_id(token["content"]) != token["id"]:
                raise ValueError(
                    f"its added token {token['content']!r} has id {token['id']}, where it does not "
                    f"fit: {n} pieces have the ids 0 to {n - 1}, each one piece. Copy it again."
                )
        pieces = [library.id_to_token(i) for i in range(n)]
        if None in pieces:
            raise ValueError(
                f"it has {n} pieces, but none of id {pieces.index(None)}: ids run from 0 on "
                f"without gaps, as the rows of an embedding do. Copy it again."
            )
        self.pieces = tuple(pieces)
        self.special_ids = {t["content"]: t["id"] for t in added if t.get("special")}
        learned = library.get_vocab(with_added_tokens=False)
        surfaces = {t["content"]: b"" if t.get("special") else t["content"].encode() for t in added}
        self._lacking = b""
        if '"ByteLevel"' in json.dumps([self.fields.get("pre_tokenizer")]):
            self._lacking = bytes(b for b in range(256) if BYTE_CHARACTERS[b] not in learned)
            spell = byte_level
        elif model.get("byte_fallback") and learned.keys() >= set(BYTE_PIECES):
            surfaces |= {piece: bytes([byte]) for byte, piece in enumerate(BYTE_PIECES)}
            spell = with_spaces
        else:
            raise ValueError(
                f"it is a {model.get('type', 'BPE')} that is neither byte-level nor has a piece "
                f"for each of the 256 bytes, so it cannot spell every text. Take the tokenizer of "
                f"a Llama-like model."
            )
        self._surfaces = tuple(
            spell(piece) if (known := surfaces.get(piece)) is None else known for piece in pieces
        )

    def _learn_behaviour(self) -> None:
        """What the library does to spaces; ValueError if it rewrites text or obeys it."""

        def surface(text: str) -> bytes:
            return b"".join(self._surfaces[i] for i in self._ids_of(text))

        self.dummy_prefix = surface("a") == b" a"
        self._spares_space = self.dummy_prefix and surface(" a") == b" a"
        lacking = set(self._lacking)
        probe = "".join(character for character in PROBE if not lacking & set(character.encode()))
        if (back := self.decode(self._ids_of(self._spelled(probe)))) != probe:
            raise ValueError(
                f"it rewrites text: of {probe!r} it makes {back!r}, so decoding would not give "
                f"back what was encoded. Its normalizer or pre-tokenizer must take text as it is."
            )
        control = set(self.special_ids.values())
        for name in self.special_ids:
            if control & set(self._ids_of(name)):
                raise ValueError(
                    f"a text that says {name!r} would make a control piece, so a text could end "
                    f"itself or pose as another. Take the tokenizer.json that the model's makers "
                    f"gave out."
                )

    def _ends_by_itself(self) -> dict[str, Any]:
        """What the file alone says of BOS and EOS: by its post-processor, or by their names."""
        names = {"bos_id": "<s>", "eos_id": "</s>"}
        ends: dict[str, Any] = {
            key: self.special_ids[name] for key, name in names.items() if name in self.special_ids
        }
        one, two = self._library.encode("a"), self._library.encode("a", "b")
        if len(one.ids) > len(self._ids_of("a")) and one.sequence_ids[0] is None:
            ends |= {"bos_id": one.ids[0], "adds_bos": True}
        # Between two texts: the end of the first, then the beginning of the second.
        sides = two.sequence_ids
        if 0 in sides and 1 in sides:
            last, first = len(sides) - 1 - sides[::-1].index(0), sides.index(1)
            between = two.ids[last + 1 : first]
            if len(between) == 2:
                ends |= {"eos_id": between[0], "bos_id": between[1]}
            elif between and between != [ends.get("bos_id")]:
                ends["eos_id"] = between[0]
        return ends

    def _ends_beside(self, folder: Path) -> dict[str, Any]:
        """What tokenizer_config.json, or else generation_config.json or config.json, says."""
        ends: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            config = read_settings(folder / name)
            for key, wanted in (("bos_id", "bos_token_id"), ("eos_id", "eos_token_id")):
                ids = config.get(wanted)
                if first := [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]:
                    ends[key] = first[0]
        config = read_settings(folder / "tokenizer_config.json")
        for key, wanted in (("bos_id", "bos_token"), ("eos_id", "eos_token")):
            piece = config.get(wanted)
            piece = piece.get("content") if isinstance(piece, dict) else piece
            if piece is not None:
                ends[key] = self.special_ids.get(str(piece), piece)
        if isinstance(config.get("add_bos_token"), bool):
            ends["adds_bos"] = config["add_bos_token"]
        return ends

    def _check_ends(self) -> None:
        control = set(self.special_ids.values())
        if self.eos_id == -1:
            raise ValueError(
                "nothing says which of its pieces ends a text. Put the tokenizer_config.json "
                "that comes with it beside it."
            )
        for name, i in (("bos", self.bos_id), ("eos", self.eos_id)):
            if not isinstance(i, int) or (i not in control and (name, i) != ("bos", -1)):
                raise ValueError(
                    f"the {name}_token that is named for it, {i!r}, is none of its "
                    f"{len(control)} control pieces. Take both files from the same place."
                )
        if self.adds_bos and self.bos_id == -1:
            raise ValueError(
                "its texts are to begin with BOS (add_bos_token), and nothing says which piece "
                "that is. Name a bos_token in the tokenizer_config.json beside it."
            )


class ByteDecoder:
    """Turns ids into text one by one, where every piece stands for bytes.

    What `push` returns, and `flush` at the end, adds up to `decode(ids)`. A character that is
    spread over several pieces is held back until it is complete; bytes that are no valid UTF-8
    become U+FFFD.
    """

    def __init__(self, surfaces: Sequence[bytes], drops_space: bool) -> None:
        self._surfaces, self._at_start = surfaces, drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text that this id makes certain; may be ''. ValueError for an id out of range."""
        text = self._utf8.decode(self._surfaces[in_vocabulary(token_id, len(self._surfaces))])
        if self._at_start and text:
            self._at_start, text = False, text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What an unfinished character has left, as U+FFFD; empty after complete text."""
        return self._utf8.decode(b"", final=True)


def byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece: " the" is written "Ġthe"."""
    if BYTE_OF.keys() >= set(piece):
        return bytes(BYTE_OF[character] for character in piece)
    return piece.encode()


def with_spaces(piece: str) -> bytes:
    """The bytes of a piece in which ▁ stands for a space."""
    return piece.replace(SPACE, " ").encode()


def is_json(source: str | os.PathLike[str] | bytes) -> bool:
    """Does it start as JSON does? False for what is no file: the other kind says so."""
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            source = file.read(64)
    return source.lstrip()[:1] in (b"{", b"[")


def open_library(content: bytes) -> tuple[Any, dict[str, Any]]:
    """The library's tokenizer, set so that it takes all of a text and no text as a command."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError(
            "a tokenizer.json is read by the library tokenizers, which is not installed: "
            "pip install 'minillama[hub]', or take the tokenizer.model where there is one."
        ) from None
    try:
        library = Library.from_buffer(content)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(
            f"the tokenizers library refuses it ({error}). It is damaged, or another JSON file: "
            f"copy the model's tokenizer.json again."
        ) from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library, json.loads(content)


@contextmanager
def without_panic() -> Iterator[None]:
    """Where Rust panics over a damaged file, Python gets an exception that is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizers library breaks down over it ({error}): it is damaged. Copy it again."
        ) from None


def read_settings(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file that may be missing; ValueError if it is damaged."""
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} beside it is damaged ({error}). Copy it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} beside it holds no JSON object. Copy it again.")
    return settings


def post_processor(
    pieces: Sequence[str], bos_id: int, eos_id: int, adds_bos: bool
) -> dict[str, Any]:
    """What a tokenizer.json says of BOS and EOS: how one text begins, and what parts it from the
    next."""
    bos = [{"SpecialToken": {"id": pieces[bos_id], "type_id": 0}}] if bos_id >= 0 else []
    eos = [{"SpecialToken": {"id": pieces[eos_id], "type_id": 0}}]
    first, second = ([{"Sequence": {"id": name, "type_id": 0}}] for name in "AB")
    start = bos if adds_bos else []
    return {
        "type": "TemplateProcessing",
        "single": start + first,
        "pair": start + first + eos + bos + second,
        "special_tokens": {
            pieces[i]: {"id": pieces[i], "ids": [i], "tokens": [pieces[i]]}
            for i in {bos_id, eos_id}
            if i >= 0
        },
    }
