"""Two tokenizer.json files that the tests make themselves, one of each kind."""

import json
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillama.tokenizer import SentencePieceTokenizer

CHAT_PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_CONFIG = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}


def byte_level_json(text: str) -> dict[str, Any]:
    """Byte-level BPE as SmolLM2 has it: digits alone, GPT-2's words, no post-processor."""
    library = Library(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CHAT_PIECES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([text], trainer)
    return json.loads(library.to_str())


def fallback_json(tok: SentencePieceTokenizer, metaspace: bool = False) -> dict[str, Any]:
    """The same vocabulary as a tokenizer.json of Llama 2's kind, in its old or its new form.

    SentencePiece merges what makes the best piece; this file lists the pairs, the best piece first.
    """
    vocabulary = {piece: i for i, piece in enumerate(tok.pieces)}
    merges = [
        [piece[:at], piece[at:]]
        for piece in sorted(tok.pieces[259:], key=lambda piece: -tok.scores[vocabulary[piece]])
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    old = {"type": "Sequence", "normalizers": [prefix, spaces]}
    new = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "special": True, **plain}
            for i, name in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": None if metaspace else old,
        "pre_tokenizer": new if metaspace else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, a],
            "pair": [bos, a, bos, b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def as_bytes(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()
