"""Text to token ids and back. In reading order: vocabulary, bpe, tokenizer, sentencepiece,
tokenizer_json, gguf."""

from .bpe import BPE
from .sentencepiece import SentencePieceTokenizer, train_tokenizer
from .tokenizer import TextDecoder, Tokenizer
from .tokenizer_json import JsonTokenizer
from .vocabulary import StreamDecoder, Vocabulary

__all__ = [
    "BPE",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "TextDecoder",
    "Tokenizer",
    "Vocabulary",
    "train_tokenizer",
]
