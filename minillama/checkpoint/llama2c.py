"""Checkpoints of llama2.c (Karpathy 2023): one .bin of weights, and a tokenizer.bin.

Three layouts. *Legacy* (version 0) starts with seven int32 and nothing that says what it is; *v1*
has a magic number and a header of 256 bytes; *v2* is v1 with the matrices in int8, and a scale for
each group of numbers. Q and K are in Meta's order in all of them.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError, replacing_file, writing
from minillama.checkpoint.weights import (
    Checkpoint,
    Stored,
    computed,
    in_file,
    map_file,
    parameter_shapes,
    raw_bytes,
)
from minillama.config import LlamaConfig
from minillama.model.rope import rope_angles
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
VERSIONS = (0, 1, 2)
_LEGACY_HEADER, _HEADER = 28, 256  # bytes
_GROUP = 64  # numbers that share a scale in v2; fewer where 64 does not divide the rows
# The order of the tensors in the file; a layer's tensor stands for those of all layers in turn.
_NORMS = ["attention_norm", "ffn_norm"]
_ATTENTION = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
_FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
_LEGACY_ORDER = ["tok_embeddings", _NORMS[0], *_ATTENTION, _NORMS[1], *_FEED_FORWARD, "norm"]
_ORDER = [*_NORMS, "norm", "tok_embeddings", *_ATTENTION, *_FEED_FORWARD]


def is_llama2c(path: Path) -> bool:
    """Whether the file starts with the magic number of v1 and v2; legacy files have none."""
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def open_llama2c(file: str | os.PathLike[str]) -> Checkpoint:
    """A legacy, v1 or v2 file, mapped into memory; v2's int8 becomes float32 when it is read.

    The format holds neither eps nor RoPE's base: they are llama2.c's constants, 1e-5 and 10,000.
    It has no checksum either: of damage, only what changes the header or the length is seen.
    Raises CheckpointError, naming the file, if its length is not what its header says.
    """
    path = Path(file)
    with path.open("rb") as content:
        header = content.read(_HEADER)
    if is_llama2c(path):
        version, config, group = _read_header(path, header)
    else:
        version, config, group = 0, _read_legacy_header(path, header), 0

    norms = (2 * config.n_layers + 1) * config.dim
    n_bytes = (_LEGACY_HEADER if version == 0 else _HEADER) + 4 * config.n_parameters
    if version == 0:
        n_bytes += _rope_bytes(config)
    elif version == 2:
        n_bytes -= (config.n_parameters - norms) // group * (3 * group - 4)
    if n_bytes != path.stat().st_size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but its header (dim {config.dim}, "
            f"{config.n_layers} layers, vocabulary {config.vocab_size}) makes {n_bytes}: "
            f"the file is cut off or damaged, or is no llama2.c model."
        )

    return Checkpoint(config, dict(_stored(path, version, config, group)), None, path)


def save_llama2c(
    path: str | os.PathLike[str], checkpoint: Checkpoint, tokenizer: Tokenizer, version: int = 1
) -> None:
    """Write a .bin that llama2.c runs, and its tokenizer.bin beside it; a tensor in memory at once.

    `version` 0 is the legacy layout that run.c reads, 1 the same numbers behind a header that says
    what they are, 2 int8 for runq.c. An earlier file is replaced as a whole.

    Raises ValueError for what the format has no place for: an eps other than 1e-5, a base of RoPE
    other than 10,000, a vocabulary that is not SentencePiece's with LLaMA's settings, or another
    version; CheckpointError if another model's tokenizer lies there; OSError if a file cannot be
    written.
    """
    path, config = Path(path), checkpoint.config
    if version not in VERSIONS:
        raise ValueError(f"There is no version {version} of llama2.c's format: it has 0, 1 and 2.")
    if (config.norm_eps, config.rope_theta) != (1e-5, 10_000.0):
        raise ValueError(
            f"llama2.c computes with an eps of 1e-5 and RoPE's base 10,000, and its files cannot "
            f"say otherwise. This model has {config.norm_eps} and {config.rope_theta:,}. "
            f"Write another format."
        )
    vocabulary = tokenizer_bin(tokenizer)
    beside = path.with_name("tokenizer.bin")
    for other, content in (
        (beside, vocabulary),
        (path.with_name("tokenizer.model"), tokenizer.to_bytes()),
    ):
        if other.exists() and other.read_bytes() != content:
            raise CheckpointError(
                f"{other} is the tokenizer of another model, and would be taken for this one's, "
                f"which is looked for there. Write {path.name} into another folder."
            )
    group = _GROUP
    while config.dim % group or config.hidden_dim % group:
        group //= 2

    with writing(path, 4 * config.n_parameters, replacing_file) as new:
        with new.open("wb") as file:
            file.write(_header(config, version, group))
            for name in _layout(config, _ORDER if version else _LEGACY_ORDER):
                if version == 0 and name == "output.weight":
                    file.write(_rope_tables(config))
                stored = checkpoint.weights[name]
                weight = stored.read().float()
                parts = (weight,) if version < 2 or weight.dim() == 1 else quantised(weight, group)
                for part in parts:
                    file.write(raw_bytes(part))
                stored.release()
            if version == 0 and config.tie_embeddings:
                file.write(_rope_tables(config))
        with replacing_file(beside) as new_vocabulary:
            new_vocabulary.write_bytes(vocabulary)


def quantised(
    weight: Float[Tensor, "rows columns"], group: int
) -> tuple[Int8[Tensor, "groups group"], Float[Tensor, "groups 1"]]:
    """int8 numbers in groups along the rows, and what each group is to be multiplied by.

    The largest of a group becomes 127 or -127, the others their share of it, rounded.
    """
    groups = weight.reshape(-1, group)
    scales = groups.abs().amax(1, keepdim=True) / 127
    return (groups / scales.where(scales > 0, 1)).round().to(torch.int8), scales


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


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """The content of the tokenizer.bin for a vocabulary; `load_tokenizer_bin` is the inverse.

    Lost is whether runs of spaces become one: llama2.c never does so.
    Raises ValueError for a vocabulary that llama2.c does not encode with.
    """
    if not (
        isinstance(tokenizer, Vocabulary)
        and tokenizer.dummy_prefix
        and set(tokenizer.kinds[N_FIXED:]) <= {Kind.NORMAL}
    ):
        raise ValueError(
            "llama2.c's tokenizer.bin holds SentencePiece's pieces, with a space in front of the "
            "text and without control pieces of a model's own; this tokenizer is of another kind. "
            "Write another format."
        )
    texts = [piece.replace(SPACE, " ") for piece in tokenizer.pieces]
    texts[tokenizer.bos_id], texts[tokenizer.eos_id] = "\n<s>\n", "\n</s>\n"
    encoded = [text.encode() for text in texts]
    entries = (
        struct.pack("<fI", score, len(text)) + text
        for text, score in zip(encoded, tokenizer.scores, strict=True)
    )
    return struct.pack("<I", max(map(len, encoded))) + b"".join(entries)


def _stored(
    path: Path, version: int, config: LlamaConfig, group: int
) -> Iterator[tuple[str, Stored]]:
    """Where each tensor lies in a file whose length was checked."""
    content, shapes = map_file(path), parameter_shapes(config)
    start = _LEGACY_HEADER if version == 0 else _HEADER
    for name in _layout(config, _ORDER if version else _LEGACY_ORDER):
        shape = shapes[name]
        n = math.prod(shape)
        if version == 0 and name == "output.weight":
            start += _rope_bytes(config)
        if version == 2 and len(shape) == 2:
            numbers = in_file(content, start, torch.int8, (n // group, group))
            scales = in_file(content, start + n, torch.float32, (n // group, 1))
            yield name, computed([numbers, scales], _product(shape), shape, torch.float32)
            start += n + 4 * (n // group)
        else:
            yield name, in_file(content, start, torch.float32, shape)
            start += 4 * n


def _product(shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda numbers, scales: (numbers * scales).view(shape)


def _header(config: LlamaConfig, version: int, group: int) -> bytes:
    sizes = [config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads]
    tied = config.tie_embeddings
    if version == 0:
        vocab_size = config.vocab_size if tied else -config.vocab_size
        return struct.pack("<7i", *sizes, vocab_size, config.max_seq_len)
    header = struct.pack(
        "<Ii7iB", MAGIC, version, *sizes, config.vocab_size, config.max_seq_len, tied
    )
    return (header + struct.pack("<i", group) * (version == 2)).ljust(_HEADER, b"\0")


def _rope_bytes(config: LlamaConfig) -> int:
    """The cosines and sines of a legacy file, which nobody reads."""
    return 4 * config.max_seq_len * config.head_dim


def _rope_tables(config: LlamaConfig) -> bytes:
    positions = torch.arange(config.max_seq_len)
    angles = rope_angles(positions, config.head_dim, config.rope_theta)
    return angles.cos().numpy().tobytes() + angles.sin().numpy().tobytes()


def _read_legacy_header(path: Path, header: bytes) -> LlamaConfig:
    if len(header) < _LEGACY_HEADER:
        raise CheckpointError(f"{path} has {len(header)} bytes: too few for any llama2.c model.")
    *sizes, vocab_size, max_seq_len = struct.unpack("<7i", header[:_LEGACY_HEADER])
    # A negative vocabulary says that the output matrix is not the embedding.
    return _config(path, sizes, abs(vocab_size), max_seq_len, tied=vocab_size > 0)


def _read_header(path: Path, header: bytes) -> tuple[int, LlamaConfig, int]:
    """Version, sizes, and v2's numbers in a group."""
    if len(header) < _HEADER:
        raise CheckpointError(f"{path} is cut off: a llama2.c header has {_HEADER} bytes.")
    version, *sizes, vocab_size, max_seq_len, tied, group = struct.unpack("<8iBi", header[4:41])
    if version not in VERSIONS[1:]:
        raise CheckpointError(
            f"{path} is llama2.c version {version}; versions 0 (legacy), 1 and 2 can be read. "
            f"Export the model again with llama2.c's export.py --version 1."
        )
    config = _config(path, sizes, vocab_size, max_seq_len, tied=bool(tied))
    if version == 2 and (group < 1 or config.dim % group):
        raise CheckpointError(
            f"{path} has int8 numbers in groups of {group}, which do not divide its rows of "
            f"{config.dim}: its header is damaged."
        )
    return version, config, group


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
        raise CheckpointError(
            f"{path} is neither GGUF nor a model of llama2.c, or its header is damaged. Read as "
            f"llama2.c's, it cannot be: {error}"
        ) from error


def _layout(config: LlamaConfig, names: list[str]) -> Iterator[str]:
    """The parameters' names in the order of the file; an output matrix of its own comes last."""
    for name in names:
        if name in ("tok_embeddings", "norm"):
            yield f"{name}.weight"
        else:
            yield from (f"layers.{layer}.{name}.weight" for layer in range(config.n_layers))
    if not config.tie_embeddings:
        yield "output.weight"
