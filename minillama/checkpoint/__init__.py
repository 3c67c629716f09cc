"""Weights on disk: `load` recognises a format by its content, `save` writes our own."""

import os
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError, interrupted_save
from minillama.checkpoint.llama2c import load_llama2c, load_tokenizer_bin
from minillama.checkpoint.native import (
    TOKENIZER,
    check_room,
    check_vocabulary,
    load_native,
    model_from,
    save_native,
)
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

__all__ = ["CheckpointError", "load", "load_config", "load_tokenizer", "save"]


def load(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Llama, Tokenizer]:
    """A model and its tokenizer from a checkpoint of any format that minillama reads.

    `path` is a folder that `save` wrote, or a .bin of llama2.c (legacy or v1). `tokenizer` names a
    tokenizer.model or a llama2.c tokenizer.bin, where none lies beside the weights. `dtype`
    converts the weights; None leaves them as stored.

    Raises FileNotFoundError, or CheckpointError (a ValueError) that names the file, if something is
    missing, damaged, or does not fit together; ValueError, with numbers and ways out, if there is
    too little free memory. Shown in notebooks/00_tour.ipynb.
    """
    path = Path(path)
    config, weights = _read(path)
    if tokenizer is None:
        tokenizer = path / TOKENIZER if path.is_dir() else _beside(path)
    tok = load_tokenizer(tokenizer)
    check_vocabulary(config, tok)
    if dtype is not None or torch.device(device).type != "cpu":
        check_room(config, dtype or weights["norm.weight"].dtype, device)
    return model_from(config, weights, path).to(device=device, dtype=dtype), tok


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The sizes of the model in a checkpoint of any format that `load` reads."""
    return _read(Path(path))[0]


def save(
    folder: str | os.PathLike[str], model: Llama, tokenizer: Tokenizer, format: str = "native"
) -> None:
    """Write a checkpoint folder, atomically: see `save_native` for what that promises.

    Raises ValueError for a format that cannot be written, CheckpointError or OSError as
    `save_native` does.
    """
    if format != "native":
        raise ValueError(f"The format {format!r} cannot be written; 'native' can.")
    save_native(folder, model, tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from SentencePiece's tokenizer.model or llama2.c's tokenizer.bin.

    Raises OSError, ValueError, or CheckpointError (a ValueError), naming the file, if it is missing
    or damaged.
    """
    if Path(path).suffix == ".bin":
        return load_tokenizer_bin(path)
    return Tokenizer(path)


def _read(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    if path.is_dir():
        return load_native(path)
    if path.is_file():
        return load_llama2c(path)
    if earlier := interrupted_save(path):
        raise FileNotFoundError(
            f"There is no {path}: its last save was cut off. {earlier} is the checkpoint before "
            f"it; rename it to {path.name}."
        )
    raise FileNotFoundError(
        f"There is no {path}. A checkpoint is a folder that minillama saved, or a .bin file of "
        f"llama2.c; `minillama demo` makes one in runs/demo/checkpoint."
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
