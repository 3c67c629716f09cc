"""Checkpoints of llama2.c (Karpathy 2023): one .bin of float32, and a tokenizer.bin.

Two layouts. *Legacy* (version 0) starts with seven int32 and nothing that says what it is; *v1*
has a magic number and a header of 256 bytes. Q and K are in Meta's order in both.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError
from minillama.checkpoint.native import parameter_shapes
from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.vocabulary import (
    FIXED_KINDS,
    FIXED_PIECES,
    N_FIXED,
    SPACE,
    Kind,
    Vocabulary,
)

MAGIC = 0x616B3432  # "ak42"
_V1_HEADER = 256  # bytes
# The order of the tensors in the file; a layer's tensor stands for those of all layers in turn.
_NORMS = ["attention_norm", "ffn_norm"]
_ATTENTION = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
_FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
_LEGACY_ORDER = ["tok_embeddings", _NORMS[0], *_ATTENTION, _NORMS[1], *_FEED_FORWARD, "norm"]
_V1_ORDER = [*_NORMS, "norm", "tok_embeddings", *_ATTENTION, *_FEED_FORWARD]


def is_v1(path: Path) -> bool:
    """Whether the file starts with v1's magic number."""
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def load_llama2c(path: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The config and the weights of a legacy or v1 file, mapped into memory, not copied.

    The format holds neither eps nor RoPE's base: they are llama2.c's constants, 1e-5 and 10,000.
    It has no checksum either: of damage, only what changes the header or the length is seen.
    Raises CheckpointError, naming the file, if its length is not what its header says.
    """
    path = Path(path)
    with path.open("rb") as file:
        header = file.read(_V1_HEADER)
    if is_v1(path):
        config, first = _read_v1_header(path, header), _V1_HEADER
        names = _V1_ORDER
    else:
        config, first = _read_legacy_header(path, header), 7 * 4
        names = _LEGACY_ORDER

    rope_tables = 0 if is_v1(path) else config.max_seq_len * config.head_dim  # cos and sin, unused
    size = first + 4 * (config.n_parameters + rope_tables)
    if size != path.stat().st_size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but its header (dim {config.dim}, "
            f"{config.n_layers} layers, vocabulary {config.vocab_size}) makes {size}: "
            f"the file is cut off or damaged, or is no llama2.c model."
        )

    numbers = np.memmap(path, dtype="<f4", mode="c", offset=first)  # "c": writes stay in memory
    shapes = parameter_shapes(config)
    weights, start = {}, 0
    for name in _layout(config, names):
        if name == "output.weight":
            start += rope_tables
        stop = start + math.prod(shapes[name])
        weights[name] = torch.from_numpy(numbers[start:stop]).view(shapes[name])
        start = stop
    if config.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def load_tokenizer_bin(path: str | os.PathLike[str]) -> Tokenizer:
    """A `Tokenizer` from llama2.c's tokenizer.bin.

    The file holds (score, length, bytes) per id. Ids 0 to 258 are <unk>, <s>, </s> and the bytes,
    as in every Llama tokenizer; in the others a space stands for SentencePiece's "▁".
    Raises FileNotFoundError, or CheckpointError if it is cut off or damaged; both name the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no file {path}. Name the tokenizer.bin, or the tokenizer.model, that comes "
            f"with the weights."
        )
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    position = 4  # behind the length of the longest piece
    try:
        while position < len(data):
            score, length = struct.unpack_from("<fI", data, position)
            position += 8
            if position + length > len(data):
                raise ValueError("its last piece is cut off")
            pieces.append(data[position : position + length].decode())
            scores.append(score)
            position += length
        learned = [piece.replace(" ", SPACE) for piece in pieces[N_FIXED:]]
        kinds = FIXED_KINDS + (Kind.NORMAL,) * len(learned)
        vocabulary = Vocabulary((*FIXED_PIECES, *learned), tuple(scores), kinds)
        return Tokenizer(vocabulary.to_proto())
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            f"{path} is no whole tokenizer.bin of llama2.c ({error}). Copy it again, or name the "
            f"tokenizer.model that comes with the weights."
        ) from error


def _read_legacy_header(path: Path, header: bytes) -> LlamaConfig:
    if len(header) < 28:
        raise CheckpointError(f"{path} has {len(header)} bytes: too few for any llama2.c model.")
    *sizes, vocab_size, max_seq_len = struct.unpack("<7i", header[:28])
    # A negative vocabulary says that the output matrix is not the embedding.
    return _config(path, sizes, abs(vocab_size), max_seq_len, tied=vocab_size > 0)


def _read_v1_header(path: Path, header: bytes) -> LlamaConfig:
    if len(header) < _V1_HEADER:
        raise CheckpointError(f"{path} is cut off: a llama2.c header has {_V1_HEADER} bytes.")
    version, *sizes, vocab_size, max_seq_len, tied = struct.unpack("<8iB", header[4:37])
    if version != 1:
        raise CheckpointError(
            f"{path} is llama2.c version {version}; versions 0 (legacy) and 1 can be read. "
            f"Export the model again with llama2.c's export.py --version 1."
        )
    return _config(path, sizes, vocab_size, max_seq_len, tied=bool(tied))


def _config(
    path: Path, sizes: list[int], vocab_size: int, max_seq_len: int, tied: bool
) -> LlamaConfig:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads = sizes
    try:
        return LlamaConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            hidden_dim=hidden_dim,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            tie_embeddings=tied,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is no llama2.c model: {error}") from error


def _layout(config: LlamaConfig, names: list[str]) -> Iterator[str]:
    """The parameters' names in the order of the file; an output matrix of its own comes last."""
    for name in names:
        if name in ("tok_embeddings", "norm"):
            yield f"{name}.weight"
        else:
            yield from (f"layers.{layer}.{name}.weight" for layer in range(config.n_layers))
    if not config.tie_embeddings:
        yield "output.weight"
