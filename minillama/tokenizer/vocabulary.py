"""What a tokenizer.model holds: the pieces with their ids, and the way from ids back to text.

Two encoders of this package, `BPE` and `SentencePieceTokenizer`, share this base and differ in who
does the merging: a page of Python or SentencePiece's C++.
"""

import codecs
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex, TypeVar

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2

V = TypeVar("V", bound="Vocabulary")
ModelProto: Any = model_pb2.ModelProto  # type: ignore[attr-defined]  # made when imported

SPACE = "▁"  # U+2581 stands for a space inside the pieces
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
FIRST_BYTE_ID = len(SPECIAL_PIECES)  # byte b has id b + 3
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
N_FIXED = len(SPECIAL_PIECES) + len(BYTE_PIECES)  # learned pieces start at id 259


class Kind(IntEnum):
    """What a piece may be used for; the numbers are those of SentencePiece's file format."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # <s>, </s>: inserted by id, never produced from text, decoded to nothing
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


FIXED_PIECES = SPECIAL_PIECES + BYTE_PIECES
FIXED_KINDS = (Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL) + (Kind.BYTE,) * 256


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """Pieces in the order of their ids: 0-2 `<unk> <s> </s>`, 3-258 the bytes, then the learned.

    The higher its score, the earlier a piece is merged. Bytes can spell any text, so `<unk>` is
    never produced.
    Raises ValueError if ids 0-258 are not these: models of the family rely on them.
    Source: the tokenizer.model of LLaMA (arXiv:2302.13971, sec. 2.1), which Llama 2 kept.
    Built in notebooks/01_tokenizer.ipynb.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[Kind, ...]
    # A text gets a space in front, so that its first word has the piece it has in mid-sentence.
    dummy_prefix: bool = True
    # Runs of spaces become one, outer spaces vanish. Off in LLaMA, on in stories260K.
    squeeze_spaces: bool = False
    unk_surface: str = " ⁇ "  # what <unk> decodes to
    eos_id: int = 2  # </s>; a chat model may end its answers with another control piece

    bos_id: ClassVar[int] = 1
    pad_id: ClassVar[int] = -1  # LLaMA has none; as an index, -1 would read the last embedding

    def __post_init__(self) -> None:
        sizes = {len(self.pieces), len(self.scores), len(self.kinds)}
        if len(sizes) > 1 or len(self.pieces) < N_FIXED:
            raise ValueError(
                f"there are {len(self.pieces)} pieces, {len(self.scores)} scores and "
                f"{len(self.kinds)} kinds: equally many are needed, and at least the {N_FIXED} of "
                f"<unk>, <s>, </s> and the bytes. train_tokenizer makes such a vocabulary."
            )
        for i, fixed in enumerate(zip(FIXED_PIECES, FIXED_KINDS, strict=True)):
            if (self.pieces[i], self.kinds[i]) != fixed:
                raise ValueError(
                    f"id {i} is {self.pieces[i]!r} ({self.kinds[i].name}), but must be "
                    f"{fixed[0]!r} ({fixed[1].name}): LLaMA's ids 0-2 are <unk> <s> </s> and "
                    f"3-258 the bytes. "
                    f"train_tokenizer makes such a vocabulary."
                )
        if {Kind.UNKNOWN, Kind.BYTE} & set(self.kinds[N_FIXED:]):
            raise ValueError("a second <unk> or a 257th byte stands among the learned pieces.")
        if "" in self.pieces or len(set(self.pieces)) < len(self.pieces):
            raise ValueError("a piece is empty or stands in the list twice.")
        if not all(map(math.isfinite, self.scores)):
            raise ValueError("a score is not a finite number, so the merges have no order.")
        if not 0 <= self.eos_id < len(self.kinds) or self.kinds[self.eos_id] is not Kind.CONTROL:
            raise ValueError(
                f"eos_id is {self.eos_id}, which is no control piece: a text could end itself."
            )

    @classmethod
    def load(cls: type[V], path: str | os.PathLike[str]) -> V:
        """Read a SentencePiece .model file; OSError and ValueError name it and the way out."""
        with naming(os.fspath(path)):
            return cls(**fields_of(read_model(path)))

    @classmethod
    def from_proto(cls: type[V], model: bytes) -> V:
        """The same from the content of such a file."""
        with naming("this model"):
            return cls(**fields_of(model))

    def to_proto(self) -> bytes:
        """The content of a .model file that makes SentencePiece encode as this vocabulary does."""
        model = ModelProto()
        for piece, score, kind in zip(self.pieces, self.scores, self.kinds, strict=True):
            model.pieces.add(piece=piece, score=score, type=int(kind))
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        trainer.model_type, trainer.vocab_size = trainer.BPE, len(self.pieces)
        trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
        trainer.unk_surface = self.unk_surface
        if self.eos_id != Vocabulary.eos_id:
            trainer.eos_id, trainer.eos_piece = self.eos_id, self.pieces[self.eos_id]
        normalizer.name, normalizer.add_dummy_prefix = "identity", self.dummy_prefix
        normalizer.remove_extra_whitespaces = self.squeeze_spaces
        return model.SerializeToString(deterministic=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_proto()` to a file."""
        Path(path).write_bytes(self.to_proto())

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of these ids: the inverse of `encode`, with or without BOS and EOS.

        Bytes that are no valid UTF-8 become U+FFFD, one each. The first space of a text is the
        dummy prefix and is dropped, so decoding id by id loses spaces: `StreamDecoder` does not.
        Raises ValueError for an id outside the vocabulary.
        """
        decoder = StreamDecoder(self)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    @cached_property
    def surfaces(self) -> tuple[str, ...]:
        """The text of each piece. Control pieces have none, and a byte has none alone: ''."""
        silent = {Kind.CONTROL: "", Kind.BYTE: "", Kind.UNKNOWN: self.unk_surface}
        pairs = zip(self.pieces, self.kinds, strict=True)
        return tuple(silent.get(kind, piece.replace(SPACE, " ")) for piece, kind in pairs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class StreamDecoder:
    """Turns ids into text one by one, as a model produces them.

    What `push` returns, and `flush` at the end, adds up to `decode(ids)`: decode is made of them.
    A character that is spread over several byte pieces (an emoji has four) is held back until it
    is complete.
    Source: SentencePiece's decoder (arXiv:1808.06226), tested against it.
    Built in notebooks/01_tokenizer.ipynb.
    """

    def __init__(self, tok: Vocabulary) -> None:
        self._tok = tok
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace_each_byte")
        self._at_start = tok.dummy_prefix or tok.squeeze_spaces

    def push(self, token_id: SupportsIndex) -> str:
        """The text that this id makes certain; may be ''. ValueError for an id out of range."""
        tok = self._tok
        i = in_vocabulary(token_id, tok.vocab_size)
        kind = tok.kinds[i]
        if kind is Kind.BYTE:
            self._at_start = False
            return self._utf8.decode(bytes([i - FIRST_BYTE_ID]))
        text = tok.surfaces[i]
        if self._at_start and kind is not Kind.CONTROL:
            if kind is not Kind.UNKNOWN:
                text = text.removeprefix(" ")
            self._at_start = tok.squeeze_spaces and not text
        return self.flush() + text

    def flush(self) -> str:
        """What an unfinished character has left, as U+FFFD; empty after complete text."""
        return self._utf8.decode(b"", final=True)


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    # Python's own "replace" writes one U+FFFD for a broken sequence, SentencePiece one a byte.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("replace_each_byte", _replace_each_byte)


def in_vocabulary(token_id: SupportsIndex, vocab_size: int) -> int:
    """The id as an int; ValueError if no piece has it."""
    i = index(token_id)
    if not 0 <= i < vocab_size:
        raise ValueError(
            f"token id {i} is not in the vocabulary, whose ids run from 0 to {vocab_size - 1}. "
            f"Drop padding (-1) before decoding; a larger id comes from a model with another "
            f"tokenizer."
        )
    return i


def utf8(text: str) -> bytes:
    """Text as bytes. TypeError for anything but a str, ValueError for one that is not Unicode."""
    if not isinstance(text, str):
        raise TypeError(
            f"text must be a str, but is of type {type(text).__name__}. "
            f"Bytes become a str by data.decode('utf-8')."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: the character at position {error.start} is a lone "
            f"surrogate (U+{ord(text[error.start]):04X}), half of a UTF-16 pair. Read the text as "
            f"UTF-8, or replace such characters: text.encode('utf-8', 'replace').decode()."
        ) from None


def read_model(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a .model file. OSError or ValueError if there is none."""
    name = os.fspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder. Name the file: {name}/tokenizer.model.")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no file {name}. Give the tokenizer.model that comes with the weights, or "
            f"make one from your own text with train_tokenizer."
        )
    with open(path, "rb") as file:
        start = file.read(64)
        if start[:1] == b"\n":  # every SentencePiece model starts so: field 1, length-delimited
            return start + file.read()
    if not start:
        what = "the file is empty. Copy it again"
    elif start.startswith(b"version https://git-lfs"):
        what = "it is a Git LFS pointer, not the file itself. Fetch it with git lfs pull"
    elif start[:1] in b"{[":
        what = "it is JSON. `Tokenizer` opens a tokenizer.json; here, take tokenizer.model"
    else:
        what = "it starts with other bytes. Give the tokenizer.model that came with the weights"
    raise ValueError(f"it is no SentencePiece model: {what}.")


def fields_of(model: bytes) -> dict[str, Any]:
    """The fields of `Vocabulary` from a serialized model; ValueError unless it is of LLaMA's kind.

    A flipped bit inside the text of a piece cannot be noticed: the format has no checksum.
    """
    proto = ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise ValueError("the settings at its end are missing: it is incomplete. Copy it again.")
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        raise ValueError(f"it is of type {kind}, LLaMA's are BPE. Train one with train_tokenizer.")
    if normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"it rewrites characters (normalizer {normalizer.name!r}), so decoding would not give "
            f"back the text. Train with normalization_rule_name='identity', or by train_tokenizer."
        )
    if (
        not trainer.byte_fallback
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        raise ValueError(
            "LLaMA's encoding needs byte_fallback and escape_whitespaces on and "
            "treat_whitespace_as_suffix off. Train one with train_tokenizer."
        )
    pieces = tuple(p.piece for p in proto.pieces)
    if trainer.HasField("vocab_size") and len(pieces) < trainer.vocab_size:
        raise ValueError(
            f"it holds {len(pieces)} pieces but should hold {trainer.vocab_size}: with one lost, "
            f"all later ids mean another piece. Copy it again."
        )
    if not all(isinstance(text, str) for text in (*pieces, trainer.unk_surface)):
        raise ValueError("a piece is not valid UTF-8, so the file is damaged. Copy it again.")
    if trainer.eos_piece not in pieces:
        raise ValueError(f"it ends texts with {trainer.eos_piece!r}, and has no such piece.")
    return {
        "pieces": pieces,
        "scores": tuple(p.score for p in proto.pieces),
        "kinds": tuple(Kind(p.type) for p in proto.pieces),
        "dummy_prefix": normalizer.add_dummy_prefix,
        "squeeze_spaces": normalizer.remove_extra_whitespaces,
        "unk_surface": trainer.unk_surface,
        "eos_id": pieces.index(trainer.eos_piece),
    }


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Every error about the content of a model says which one it was."""
    try:
        yield
    except (DecodeError, UnicodeDecodeError):
        raise ValueError(
            f"{model} is damaged or is no SentencePiece model: its content cannot be parsed. "
            f"Copy tokenizer.model again from where the weights come from."
        ) from None
    except ValueError as error:
        raise ValueError(f"{model} cannot be used as a tokenizer: {error}") from None
