"""Weights on disk: `load` recognises a format by its content, `save` writes any of them."""

import os
from pathlib import Path

import torch

from minillama.checkpoint.folder import CheckpointError, interrupted_save
from minillama.checkpoint.hub import local_path
from minillama.checkpoint.llama2c import load_llama2c, load_tokenizer_bin
from minillama.checkpoint.native import open_native, save_native
from minillama.checkpoint.weights import (
    Checkpoint,
    check_room,
    check_vocabulary,
    checkpoint_of,
    llama_from,
    main_dtype,
)
from minillama.config import LlamaConfig, known_name
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

__all__ = ["CheckpointError", "load", "load_config", "load_tokenizer", "open_checkpoint", "save"]

WRITERS = {"native": save_native}


def load(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Llama, Tokenizer]:
    """A model and its tokenizer from a checkpoint of any format that minillama reads.

    `path` is what `open_checkpoint` takes. `tokenizer` names a tokenizer.model or a llama2.c
    tokenizer.bin, where none comes with the weights. `dtype` converts the weights; None leaves them
    in the one in which most of them are stored, and on a CPU mapped into memory: they are read from
    the file when they are used, and a model of many gigabytes opens at once.

    Raises FileNotFoundError, or CheckpointError (a ValueError) that names the file, if something is
    missing, damaged, or does not fit together; ValueError, with numbers and ways out, if there is
    too little free memory. Shown in notebooks/16_real_weights.ipynb.
    """
    checkpoint = open_checkpoint(path)
    tok = _tokenizer(checkpoint, tokenizer)
    check_vocabulary(checkpoint.config, tok)
    check_room(checkpoint.config, dtype or main_dtype(checkpoint), device)
    return llama_from(checkpoint, device, dtype), tok


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The sizes of the model in a checkpoint of any format that `load` reads; no weight is read."""
    return open_checkpoint(path).config


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint of any format, recognised by its content; its weights are not read.

    `path` may also be a name: one of `minillama fetch`, or "org/name" of the Hugging Face hub.
    Raises FileNotFoundError, or CheckpointError, naming the file, for what cannot be one; for a
    name, what `hub.local_path` raises.
    """
    path = local_path(path)
    if path.is_dir():
        return open_native(path)
    if path.is_file():
        config, weights = load_llama2c(path)
        weights = {
            n: w for n, w in weights.items() if n != "output.weight" or not config.tie_embeddings
        }
        from minillama.checkpoint.weights import _in_memory

        return Checkpoint(config, {n: _in_memory(w) for n, w in weights.items()}, None, path)
    if earlier := interrupted_save(path):
        raise FileNotFoundError(
            f"There is no {path}: its last save was cut off. {earlier} is the checkpoint before "
            f"it; rename it to {path.name}."
        )
    raise FileNotFoundError(
        f"There is no {path}. A checkpoint is a folder that minillama saved, or a .bin file of "
        f"llama2.c; `minillama demo` makes one in runs/demo/checkpoint."
    )


def save(
    path: str | os.PathLike[str], model: Llama, tokenizer: Tokenizer, format: str = "native"
) -> None:
    """Write a checkpoint, atomically: see `save_native` for what that promises.

    Raises ValueError for a format that cannot be written, CheckpointError or OSError as
    `save_native` does.
    """
    writer = WRITERS[known_name("format", format, WRITERS)]
    writer(Path(path), checkpoint_of(model, Path(path)), tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from SentencePiece's tokenizer.model or llama2.c's tokenizer.bin.

    Raises OSError, ValueError, or CheckpointError (a ValueError), naming the file, if it is missing
    or damaged.
    """
    if Path(path).suffix == ".bin":
        return load_tokenizer_bin(path)
    return Tokenizer(path)


def _tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer at `path`, or without one, that of the checkpoint."""
    if path is not None:
        return load_tokenizer(path)
    return (
        checkpoint.tokenizer() if checkpoint.tokenizer else load_tokenizer(_beside(checkpoint.path))
    )


def _beside(path: Path) -> Path:
    """The tokenizer that lies beside a weights file."""
    for name in ("tokenizer.model", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise CheckpointError(
        f"{path} holds no tokenizer, and neither tokenizer.model nor tokenizer.bin lies beside it. "
        f"Say where it is: load(path, tokenizer=FILE), or --tokenizer FILE."
    )
