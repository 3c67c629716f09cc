"""The tokenizer to use: one class for all the files that Llama models come with."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, SupportsIndex, runtime_checkable


@runtime_checkable
class TextDecoder(Protocol):
    """Turns ids into text one by one, as a model produces them."""

    def push(self, token_id: SupportsIndex) -> str:
        """The text that this id makes certain; may be ''. ValueError for an id out of range."""

    def flush(self) -> str:
        """What an unfinished character has left, as U+FFFD; empty after complete text."""


class Tokenizer:
    """Text to ids and back, as the model learned it.

    >>> tok = Tokenizer("tokenizer.model")
    >>> tok.encode("Hello world", bos=True)
    [1, 15043, 3186]

    Like a Path, it becomes what fits: `SentencePieceTokenizer` for LLaMA's own tokenizer.model,
    `JsonTokenizer` for a tokenizer.json. Both hold to this:

    - `decode(encode(text)) == text`, for all of Unicode but U+2581 (▁), which stands for a space
      inside SentencePiece's pieces and comes back as one. (A tokenizer.model with `squeeze_spaces`
      loses spaces, too.)
    - Control pieces come from ``bos``, ``eos`` and `special_ids` only. A text that says "</s>" is
      spelled out, so no text can end a sequence.

    There is no padding piece, `pad_id` is -1: pad with any id and mask it, and never look -1 up in
    an embedding, where it means the last row.

    Raises OSError or ValueError, with the file's name and the way out, for a file that is missing,
    damaged or cannot keep these promises.
    Source: LLaMA (arXiv:2302.13971), sec. 2.1; Llama 2 (arXiv:2307.09288), sec. 2.2.
    Built in notebooks/01_tokenizer.ipynb.
    """

    pieces: tuple[str, ...]  # in the order of their ids
    bos_id: int  # -1 where the vocabulary has none
    eos_id: int
    pad_id: ClassVar[int] = -1
    adds_bos: bool  # does a text of this model start with BOS? LLaMA's do, SmolLM2's do not
    dummy_prefix: bool  # does a text get a space in front, which decoding drops? LLaMA's do
    special_ids: dict[str, int]  # control pieces by name; they come from structure, never from text
    file_name: ClassVar[str]  # under which programs look for it
    chat_format: str | None = None  # of the dialogues that the model has learned; None: not known

    def __new__(cls, source: str | os.PathLike[str] | bytes = b"") -> "Tokenizer":
        if cls is Tokenizer:
            from .sentencepiece import SentencePieceTokenizer
            from .tokenizer_json import JsonTokenizer, is_json

            cls = JsonTokenizer if is_json(source) else SentencePieceTokenizer
        return super().__new__(cls)

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        """Open a file, or the content of one."""
        raise NotImplementedError  # a Tokenizer is always one of the two kinds above

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The same as ``Tokenizer(path)``."""
        return cls(path)

    @staticmethod
    def from_gguf(metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer in the metadata of a GGUF file: see `minillama.tokenizer.gguf`."""
        from .gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(metadata)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text. TypeError if it is no str, ValueError if it is no valid Unicode."""
        raise NotImplementedError

    def encode_batch(
        self,
        texts: Iterable[str],
        bos: bool = False,
        eos: bool = False,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` for many texts at once, on all cores unless ``num_threads`` says otherwise."""
        raise NotImplementedError

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of these ids: the inverse of `encode`, with or without BOS and EOS.

        Bytes that are no valid UTF-8 become U+FFFD. Where a text begins with a space of its own
        making, that is dropped, so decoding id by id loses spaces: a `decoder` does not.
        Raises ValueError for an id outside the vocabulary.
        """
        decoder = self.decoder()
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self) -> TextDecoder:
        """A fresh decoder for a stream of ids; what it returns adds up to `decode(ids)`."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The content of the file, from which ``Tokenizer(content)`` makes an equal one."""
        raise NotImplementedError

    def to_gguf(self) -> dict[str, Any]:
        """The metadata from which `from_gguf` makes an equal one."""
        from .gguf import tokenizer_to_gguf

        return tokenizer_to_gguf(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_bytes()` to a file; `file_name` says how others expect it to be called."""
        with open(path, "wb") as file:
            file.write(self.to_bytes())

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def _framed(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if bos and self.bos_id < 0:
            raise ValueError(
                "bos=True asks for a beginning-of-sequence piece, and this vocabulary has none. "
                "Its texts start without: leave bos out, as adds_bos (False) says."
            )
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def for_chat(self, chat_format: str | None) -> "Tokenizer":
        """The same for a model that has learned dialogues in this format.

        A checkpoint keeps it, and `minillama.chat` writes dialogues in it: see
        `minillama.chat.recognise`. The file that `save` writes has no place for it.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self), chat_format=chat_format)  # the way into a frozen class
        return other

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes], dict[str, str | None]]:
        return type(self), (self.to_bytes(),), {"chat_format": self.chat_format}

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"
