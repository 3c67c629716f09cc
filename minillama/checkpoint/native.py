"""minillama's own checkpoint: one folder that is either whole or not there.

params.json        the LlamaConfig; for weights in few bits, also how they are quantised; for a
                   model that has learned dialogues, also their format
model.safetensors  the weights, under Meta's names; nothing in it can be executed
tokenizer.model    SentencePiece's file; or tokenizer.json, that of the tokenizers library
SHA256SUMS         of the three; `sha256sum -c SHA256SUMS` reads it too
"""

import json
import os
from pathlib import Path

from minillama.checkpoint.folder import (
    SUMS,
    CheckpointError,
    check_holds_only,
    read_json,
    verify_sums,
    writing,
)
from minillama.checkpoint.safetensors import open_safetensors, save_safetensors
from minillama.checkpoint.weights import (
    Checkpoint,
    check_vocabulary,
    config_of,
    n_bytes,
)
from minillama.tokenizer import Tokenizer

PARAMS, WEIGHTS, TOKENIZER = SUMMED = ("params.json", "model.safetensors", "tokenizer.model")
FILES = (*SUMMED, SUMS)
TOKENIZER_JSON = "tokenizer.json"  # in place of tokenizer.model
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
        params = checkpoint.config.to_dict()
        if checkpoint.quantization:
            params["quantization"] = checkpoint.quantization
        if tokenizer.chat_format:
            params["chat_format"] = tokenizer.chat_format
        (new / PARAMS).write_text(json.dumps(params, indent=2) + "\n")
        (new / tokenizer.file_name).write_bytes(tokenizer.to_bytes())


def open_native(folder: str | os.PathLike[str]) -> Checkpoint:
    """A folder that `save_native` wrote; its weights are mapped, not read.

    The sums of files beyond `SUMMED_AT_ONCE` are not computed: of these, what is seen is damage to
    the header or to the length.
    Raises CheckpointError, naming the file, if one is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    tokenizer = TOKENIZER_JSON if (folder / TOKENIZER_JSON).is_file() else TOKENIZER
    needed = (PARAMS, WEIGHTS, tokenizer)
    missing = [name for name in (*needed, SUMS) if not (folder / name).is_file()]
    if missing:
        inside = folder / "checkpoint"
        hint = f"; {inside} is one" if (inside / PARAMS).is_file() else ""
        raise CheckpointError(
            f"{folder} is no checkpoint of minillama: {', '.join(missing)} missing{hint}."
        )
    verify_sums(folder, needed, SUMMED_AT_ONCE)
    params = read_json(folder / PARAMS)
    quantization = params.pop("quantization", None)
    chat_format = params.pop("chat_format", None)
    if not isinstance(chat_format, str | None):
        raise CheckpointError(
            f"{folder / PARAMS} has a chat_format that cannot be, {chat_format!r}: it is a name, "
            f"such as llama2."
        )
    config = config_of(folder / PARAMS, params)
    weights = open_safetensors(folder / WEIGHTS)
    if config.tie_embeddings and "output.weight" in weights:
        raise CheckpointError(
            f"{folder}: {PARAMS} says that output.weight is tok_embeddings.weight "
            f"(tie_embeddings), but {WEIGHTS} holds one of its own. They belong to different "
            f"models."
        )
    try:
        return Checkpoint(
            config,
            weights,
            lambda: Tokenizer(folder / tokenizer).for_chat(chat_format),
            folder,
            quantization,
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:  # from `empty_linear`
        raise CheckpointError(
            f"{folder / PARAMS} has a quantization that cannot be, {quantization}: {error}"
        ) from error


def check_replaceable(folder: Path) -> None:
    """Raises CheckpointError if a checkpoint saved at `folder` would delete anything else."""
    check_holds_only(folder, (*FILES, TOKENIZER_JSON), "a checkpoint")
