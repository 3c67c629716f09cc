"""Vocabularies inside GGUF files (llama.cpp): metadata to a `Tokenizer`, and back.

A GGUF holds no tokenizer file but its content, spread over keys named tokenizer.ggml.*. There are
two kinds: "llama" is SentencePiece's model, "gpt2" byte-level BPE, of which only the name of the
pre-tokenizer is kept, the regular expression that cuts a text into words.
Source: the GGUF specification, and llama.cpp's llama-vocab.cpp for what the names mean.
"""

import json
from collections.abc import Mapping
from typing import Any

from .sentencepiece import SentencePieceTokenizer
from .tokenizer import Tokenizer
from .tokenizer_json import JsonTokenizer, post_processor
from .vocabulary import Kind, Vocabulary, naming

KEY = "tokenizer.ggml."


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,  # GPT-2's
    }


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _llama_3(digits: str) -> dict[str, Any]:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _sequence(_split(words), _byte_level(use_regex=False))


_STARCODER = _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))

# How a text is cut into words before the merging, by the names that llama.cpp gives to it.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(use_regex=True),
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "command-r": _STARCODER,
    "llama-bpe": _llama_3(digits=r"\p{N}{1,3}"),
    "qwen2": _llama_3(digits=r"\p{N}"),
    "default": _sequence(
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    ),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """A `Tokenizer` from the metadata of a GGUF file, given by their full keys.

    Raises ValueError, with the key, for another kind of vocabulary than "llama" and "gpt2", for a
    pre-tokenizer that is not among `PRE_TOKENIZERS`, for missing keys, and for what `Tokenizer`
    itself refuses.
    """
    with naming("the vocabulary in the GGUF"):
        kind = _needed(metadata, "model")
        if kind == "llama":
            return _sentencepiece(metadata)
        if kind == "gpt2":
            return _byte_level_bpe(metadata)
        raise ValueError(
            f"{KEY}model is {kind!r}, and only 'llama' (SentencePiece) and 'gpt2' (byte-level BPE) "
            f"are read. Name the model's own file: load(path, tokenizer=FILE)."
        )


def tokenizer_to_gguf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata, by their full keys, from which `tokenizer_from_gguf` makes an equal one.

    Raises ValueError for a tokenizer.json that GGUF has no name for: one with byte fallback, whose
    scores it does not hold, or with another pre-tokenizer than those of `PRE_TOKENIZERS`.
    """
    metadata: dict[str, Any] = {
        "tokens": list(tokenizer.pieces),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.adds_bos,
    }
    if tokenizer.bos_id < 0:
        del metadata["bos_token_id"]
    if isinstance(tokenizer, SentencePieceTokenizer):
        metadata |= {
            "model": "llama",
            "pre": "default",
            "scores": list(tokenizer.scores),
            "token_type": [int(kind) for kind in tokenizer.kinds],
            "unknown_token_id": 0,
            "add_space_prefix": tokenizer.dummy_prefix,
            "remove_extra_whitespaces": tokenizer.squeeze_spaces,
        }
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        added = {token["id"] for token in tokenizer.fields.get("added_tokens", [])}
        special = set(tokenizer.special_ids.values())
        kinds = [
            Kind.CONTROL if i in special else Kind.USER_DEFINED if i in added else Kind.NORMAL
            for i in range(tokenizer.vocab_size)
        ]
        merges = tokenizer.fields["model"].get("merges", [])
        metadata |= {
            "model": "gpt2",
            "pre": _pre_name(tokenizer.fields.get("pre_tokenizer")),
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
            "token_type": [int(kind) for kind in kinds],
        }
    return {KEY + name: value for name, value in metadata.items()}


def _sentencepiece(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    if metadata.get(KEY + "add_bos_token") is False:
        raise ValueError(
            f"{KEY}add_bos_token is false: its texts start without BOS, which the tokenizer.model "
            f"that minillama makes of it cannot say. Take the model's Hugging Face folder."
        )
    bos_id = metadata.get(KEY + "bos_token_id", Vocabulary.bos_id)
    if bos_id != Vocabulary.bos_id:
        raise ValueError(f"{KEY}bos_token_id is {bos_id}, but LLaMA's <s> has id 1.")
    vocabulary = Vocabulary(
        pieces=tuple(_needed(metadata, "tokens")),
        scores=tuple(map(float, _needed(metadata, "scores"))),
        kinds=tuple(map(Kind, _needed(metadata, "token_type"))),
        dummy_prefix=bool(metadata.get(KEY + "add_space_prefix", True)),
        squeeze_spaces=bool(metadata.get(KEY + "remove_extra_whitespaces", False)),
        eos_id=int(metadata.get(KEY + "eos_token_id", Vocabulary.eos_id)),
    )
    return SentencePieceTokenizer(vocabulary.to_proto())


def _byte_level_bpe(metadata: Mapping[str, Any]) -> JsonTokenizer:
    pre = _needed(metadata, "pre")
    pre = ALIASES.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{KEY}pre is {pre!r}: how it cuts a text into words is not known here, and another "
            f"way would give other ids. Known are {', '.join(PRE_TOKENIZERS)}. Take the model's "
            f"tokenizer.json: load(path, tokenizer=FILE)."
        )
    pieces = list(_needed(metadata, "tokens"))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise ValueError("a piece stands in it twice.")
    n = len(pieces)
    eos_id = int(_needed(metadata, "eos_token_id"))
    bos_id = int(metadata.get(KEY + "bos_token_id", -1))
    if not (-1 <= bos_id < n and 0 <= eos_id < n):
        raise ValueError(f"it begins texts with id {bos_id} and ends them with {eos_id}, of {n}.")
    kinds = list(metadata.get(KEY + "token_type", [Kind.NORMAL] * n))
    if len(kinds) != n:
        raise ValueError(f"it has {n} pieces and {len(kinds)} kinds.")
    special = {i for i, kind in enumerate(kinds) if kind == Kind.CONTROL} | {eos_id, bos_id} - {-1}
    added = special | {i for i, kind in enumerate(kinds) if kind == Kind.USER_DEFINED}
    adds_bos = bool(metadata.get(KEY + "add_bos_token", pre == "llama-bpe"))
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i in special,
            }
            for i in sorted(added)
        ],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": post_processor(pieces, bos_id, eos_id, adds_bos),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",  # a word that is a piece needs no merges
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in _needed(metadata, "merges")],
        },
    }
    return JsonTokenizer(json.dumps(fields, ensure_ascii=False).encode())


def _pre_name(pre_tokenizer: Any) -> str:
    for name, known in PRE_TOKENIZERS.items():
        if pre_tokenizer == known:
            return name
    raise ValueError(
        f"the GGUF format names the way a text is cut into words, and has no name that minillama "
        f"knows for this one's: {json.dumps(pre_tokenizer)[:200]}. Known are "
        f"{', '.join(PRE_TOKENIZERS)}; with a tokenizer.model there is no such question."
    )


def _needed(metadata: Mapping[str, Any], name: str) -> Any:
    if KEY + name not in metadata:
        raise ValueError(f"it has no key {KEY}{name}. Convert the model anew.")
    return metadata[KEY + name]
