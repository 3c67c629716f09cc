"""minillama's own checkpoint: one folder that is either whole or not there.

params.json        the LlamaConfig
model.safetensors  the weights, under Meta's names; nothing in it can be executed
tokenizer.model    SentencePiece's file
SHA256SUMS         of the three; `sha256sum -c SHA256SUMS` reads it too
"""

import json
import os
from pathlib import Path

from minillama.checkpoint.folder import SUMS, CheckpointError, verify_sums, writing
from minillama.checkpoint.safetensors import open_safetensors, save_safetensors
from minillama.checkpoint.weights import (
    Checkpoint,
    check_vocabulary,
    model_from,
    n_bytes,
    parameter_shapes,
)
from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer

__all__ = ["check_vocabulary", "model_from", "open_native", "parameter_shapes", "save_native"]

PARAMS, WEIGHTS, TOKENIZER = SUMMED = ("params.json", "model.safetensors", "tokenizer.model")
FILES = (*SUMMED, SUMS)
# Bytes of a file up to which `open_native` computes its SHA-256: a sum takes seconds per gigabyte,
# and a model of many opens in less than one. `minillama verify` computes all.
SUMMED_AT_ONCE = 2**26


def save_native(
    folder: str | os.PathLike[str], checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    """Write a checkpoint to `folder`; an earlier one there is replaced as a whole.

    Everything is written beside it and flushed to the disk first, so that a full disk, Ctrl-C or a
    crash leaves the earlier checkpoint as it was. Two saves of equal weights are equal bytes.
    Raises CheckpointError if `folder` holds anything else, OSError if it cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    check_vocabulary(checkpoint.config, tokenizer)
    with writing(folder, sum(map(n_bytes, checkpoint.weights.values()))) as new:
        save_safetensors(new / WEIGHTS, checkpoint.weights)
        (new / PARAMS).write_text(json.dumps(checkpoint.config.to_dict(), indent=2) + "\n")
        (new / TOKENIZER).write_bytes(tokenizer.to_proto())


def open_native(folder: str | os.PathLike[str]) -> Checkpoint:
    """A folder that `save_native` wrote; its weights are mapped, not read.

    The sums of files beyond `SUMMED_AT_ONCE` are not computed: of these, what is seen is damage to
    the header or to the length.
    Raises CheckpointError, naming the file, if one is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        inside = folder / "checkpoint"
        hint = f"; {inside} is one" if (inside / PARAMS).is_file() else ""
        raise CheckpointError(
            f"{folder} is no checkpoint of minillama: {', '.join(missing)} missing{hint}."
        )
    verify_sums(folder, SUMMED, SUMMED_AT_ONCE)
    try:
        config = LlamaConfig.from_dict(json.loads((folder / PARAMS).read_text()))
    except ValueError as error:
        raise CheckpointError(f"{folder / PARAMS} is no config of a model: {error}") from error
    weights = open_safetensors(folder / WEIGHTS)
    if config.tie_embeddings and "output.weight" in weights:
        raise CheckpointError(
            f"{folder}: {PARAMS} says that output.weight is tok_embeddings.weight "
            f"(tie_embeddings), but {WEIGHTS} holds one of its own. They belong to different "
            f"models."
        )
    return Checkpoint(config, weights, lambda: Tokenizer(folder / TOKENIZER), folder)


def check_replaceable(folder: Path) -> None:
    """Raises CheckpointError if a checkpoint saved at `folder` would delete anything else."""
    found = folder.iterdir() if folder.is_dir() else ()
    foreign = sorted(path.name for path in found if path.name not in FILES)
    if foreign or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(
            f"{folder} is not replaced by a checkpoint: "
            f"{'it holds ' + ', '.join(foreign[:3]) if foreign else 'it is a file'}, "
            f"which would be lost. Name a new or an empty folder."
        )
