"""The tokenizer to use: SentencePiece's C++ encoder and trainer, with LLaMA's settings."""

import io
import os
import re
from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from .bpe import lines_of, too_large, too_small
from .vocabulary import Vocabulary, fields_of, naming, read_model, utf8


class Tokenizer(Vocabulary):
    """Text to ids and back, as LLaMA does it.

    >>> tok = Tokenizer("tokenizer.model")
    >>> tok.encode("Hello world", bos=True)
    [1, 15043, 3186]

    `decode(encode(text)) == text` for all of Unicode but U+2581 (▁): it stands for a space inside
    the pieces and comes back as one. (A vocabulary with `squeeze_spaces` loses spaces, too.)
    Control pieces come from ``bos`` and ``eos`` only. A text that says "</s>" is spelled out, so no
    text can end a sequence.
    There is no padding piece, `pad_id` is -1: pad with any id and mask it, and never look -1 up in
    an embedding, where it means the last row.

    Raises OSError or ValueError, with the file's name and the way out, for a file that is missing,
    damaged or not of LLaMA's kind: byte-pair encoding, ids 0-2 `<unk> <s> </s>`, 3-258 the bytes,
    text taken as it is.
    Source: LLaMA (arXiv:2302.13971), sec. 2.1; Llama 2 (arXiv:2307.09288), sec. 2.2.
    Built in notebooks/01_tokenizer.ipynb.
    """

    _content: bytes
    _processor: SentencePieceProcessor

    def __init__(self, model: str | os.PathLike[str] | bytes) -> None:
        """Open a .model file, or the content of one."""
        with naming("this model" if isinstance(model, bytes) else os.fspath(model)):
            content = model if isinstance(model, bytes) else read_model(model)
            super().__init__(**fields_of(content))
            try:
                processor = SentencePieceProcessor(model_proto=content)
            except (RuntimeError, OSError) as error:
                raise ValueError(f"SentencePiece refuses it ({error}). Copy it again.") from None
        vars(self).update(_content=content, _processor=processor)  # the way into a frozen class

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The same as ``Tokenizer(path)``."""
        return cls(path)

    @classmethod
    def from_proto(cls, model: bytes) -> "Tokenizer":
        """The same as ``Tokenizer(model)``."""
        return cls(model)

    def to_proto(self) -> bytes:
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

    def _framed(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + ids + [self.eos_id] * eos


def train_tokenizer(
    text: str | Iterable[str], vocab_size: int, character_coverage: float = 0.99995
) -> Tokenizer:
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
    return Tokenizer(content.getvalue())
