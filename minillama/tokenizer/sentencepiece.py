"""tokenizer.model: SentencePiece's C++ encoder and trainer, with LLaMA's settings."""

import io
import os
import re
from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from .bpe import lines_of, too_large, too_small
from .tokenizer import Tokenizer
from .vocabulary import Kind, StreamDecoder, Vocabulary, fields_of, naming, read_model, utf8


class SentencePieceTokenizer(Tokenizer, Vocabulary):
    """A `Tokenizer` from a tokenizer.model, encoded by SentencePiece's own C++.

    Raises OSError or ValueError, with the file's name and the way out, for a file that is missing,
    damaged or not of LLaMA's kind: byte-pair encoding, ids 0-2 `<unk> <s> </s>`, 3-258 the bytes,
    text taken as it is.
    Built in notebooks/01_tokenizer.ipynb.
    """

    adds_bos = True
    file_name = "tokenizer.model"
    _content: bytes
    _processor: SentencePieceProcessor

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        """Open a .model file, or the content of one."""
        with naming("this model" if isinstance(source, bytes) else os.fspath(source)):
            content = source if isinstance(source, bytes) else read_model(source)
            Vocabulary.__init__(self, **fields_of(content))
            try:
                processor = SentencePieceProcessor(model_proto=content)
            except (RuntimeError, OSError) as error:
                raise ValueError(f"SentencePiece refuses it ({error}). Copy it again.") from None
        pairs = enumerate(zip(self.pieces, self.kinds, strict=True))
        control = {piece: i for i, (piece, kind) in pairs if kind is Kind.CONTROL}
        # The way into a frozen class.
        vars(self).update(_content=content, _processor=processor, special_ids=control)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SentencePieceTokenizer":
        """The same as ``SentencePieceTokenizer(path)``."""
        return cls(path)

    @classmethod
    def from_proto(cls, model: bytes) -> "SentencePieceTokenizer":
        """The same as ``SentencePieceTokenizer(model)``."""
        return cls(model)

    def to_proto(self) -> bytes:
        """The same as `to_bytes`."""
        return self._content

    def to_bytes(self) -> bytes:
        """The content of the model file, byte for byte as it was read."""
        return self._content

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text. TypeError if it is no str, ValueError if it is no valid Unicode."""
        return self._framed(self._processor.encode(utf8(text)), bos, eos)

    def encode_batch(
        self,
        texts: Iterable[str],
        bos: bool = False,
        eos: bool = False,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` for many texts at once, on all cores unless ``num_threads`` says otherwise."""
        batch = [utf8(text) for text in texts]
        threads = num_threads or os.cpu_count() or 1
        rows = self._processor.encode(batch, num_threads=threads)
        return [self._framed(ids, bos, eos) for ids in rows]

    def decoder(self) -> StreamDecoder:
        """A fresh decoder for a stream of ids; what it returns adds up to `decode(ids)`."""
        return StreamDecoder(self)


def train_tokenizer(
    text: str | Iterable[str], vocab_size: int, character_coverage: float = 0.99995
) -> SentencePieceTokenizer:
    """Learn a vocabulary with the settings that LLaMA's own tokenizer.model records.

    ``text`` is one string or many; it is learned line by line, and no line is too long. The same
    text gives the same bytes. `BPE.train` learns the same in Python and says what is learned. One
    thing differs from the file that LLaMA ships: there, runs of spaces have the lowest score and
    are merged last; here they have the score of their frequency, so indentation splits otherwise.

    Raises ValueError if there is no text, and if ``vocab_size`` is too small or too large for it,
    with the smallest or largest that works.
    Source: LLaMA (arXiv:2302.13971), sec. 2.1. Built in notebooks/01_tokenizer.ipynb.
    """
    lines = list(lines_of(text))
    content = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=content,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_surface=" ⁇ ",
            max_sentence_length=1 << 30,  # bytes; a longer line would be dropped silently
            num_threads=1,
            minloglevel=2,  # errors only; they are raised as well
        )
    except RuntimeError as error:
        if limit := re.search(r"Vocabulary size is smaller .* vs (\d+)", str(error)):
            raise too_small(vocab_size, int(limit[1])) from None
        if limit := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise too_large(vocab_size, int(limit[1])) from None
        raise ValueError(f"SentencePiece's trainer refuses these settings: {error}") from None
    return SentencePieceTokenizer(content.getvalue())
