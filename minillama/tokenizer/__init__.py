"""Text to token ids and back. In reading order: vocabulary, bpe, sentencepiece."""

from .bpe import BPE
from .sentencepiece import Tokenizer, train_tokenizer
from .vocabulary import StreamDecoder, Vocabulary

__all__ = ["BPE", "StreamDecoder", "Tokenizer", "Vocabulary", "train_tokenizer"]
