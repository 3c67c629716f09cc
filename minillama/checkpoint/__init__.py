"""Weights on disk: `load` recognises a format by its content, `save` and `convert` write any."""

import os
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from minillama.checkpoint.chat_templates import TEMPLATES, format_of
from minillama.checkpoint.fetch import how_to_ask_meta
from minillama.checkpoint.folder import CheckpointError, check_new, interrupted_save
from minillama.checkpoint.gguf import open_gguf, save_gguf
from minillama.checkpoint.hub import local_path
from minillama.checkpoint.huggingface import open_huggingface, save_huggingface
from minillama.checkpoint.llama2c import load_tokenizer_bin, open_llama2c, save_llama2c
from minillama.checkpoint.meta import open_meta, save_meta
from minillama.checkpoint.native import PARAMS, open_native, save_native
from minillama.checkpoint.peft import CONFIG as ADAPTER
from minillama.checkpoint.weights import (
    Checkpoint,
    check_room,
    check_vocabulary,
    checkpoint_of,
    converted,
    llama_from,
)
from minillama.config import LlamaConfig, known_name
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "convert",
    "load",
    "load_config",
    "load_tokenizer",
    "open_checkpoint",
    "open_tokenizer",
    "save",
]

WRITERS: dict[str, Callable[..., None]] = {
    "native": save_native,
    "huggingface": save_huggingface,
    "meta": save_meta,
    "llama2.c": save_llama2c,
    "gguf": save_gguf,
}


def load(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[Llama, Tokenizer]:
    """A model and its tokenizer from a checkpoint of any format that minillama reads.

    `path` is what `open_checkpoint` takes. `tokenizer` names a tokenizer's file, where none comes
    with the weights, or another is wanted. `dtype` converts the weights; None leaves them in the
    one in which most of them are stored, and on a CPU mapped into memory: they are read from the
    file when they are used, and a model of many gigabytes opens at once. `quantize` ("int8",
    "int4", "nf4") puts each matrix into few bits as soon as it is read.

    Raises FileNotFoundError, or CheckpointError (a ValueError) that names the file, if something is
    missing, damaged, or does not fit together; ValueError, with numbers and ways out, if there is
    too little free memory. Shown in notebooks/16_real_weights.ipynb.
    """
    checkpoint = open_checkpoint(path)
    tok = open_tokenizer(checkpoint, tokenizer)
    check_vocabulary(checkpoint.config, tok)
    check_room(checkpoint, device, dtype, quantize)
    return llama_from(checkpoint, device, dtype, quantize), tok


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The sizes of the model in a checkpoint of any format that `load` reads; no weight is read."""
    return open_checkpoint(path).config


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint of any format, recognised by its content; its weights are not read.

    `path` is a folder that minillama saved, Meta's release, or a folder of Hugging Face's; or a
    file of GGUF or llama2.c. It may also be a name: one of `minillama fetch`, or "org/name" of the
    Hugging Face hub.
    Raises FileNotFoundError, or CheckpointError, naming the file, for what cannot be one; for a
    name, what `hub.local_path` raises.
    """
    path = local_path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_file(path)
    if earlier := interrupted_save(path):
        raise FileNotFoundError(
            f"There is no {path}: its last save was cut off. {earlier} is the checkpoint before "
            f"it; rename it to {path.name}."
        )
    if not path.suffix and (how := how_to_ask_meta(path.as_posix())):
        raise FileNotFoundError(how)
    raise FileNotFoundError(
        f"There is no {path}. A checkpoint is a folder (minillama's, Meta's or Hugging Face's), or "
        f"a file of GGUF or llama2.c; `minillama demo` makes one in runs/demo/checkpoint, and "
        f"`minillama fetch` lists real ones."
    )


def save(
    folder: str | os.PathLike[str],
    model: Llama,
    tokenizer: Tokenizer,
    format: str = "native",
    **options: Any,
) -> None:
    """Write a checkpoint, atomically: "native", "huggingface", "meta", "llama2.c" or "gguf".

    The last two are files: `folder` is then the file's name. `options` are those of the format's
    writer: `shards` of "meta", `version` of "llama2.c", `kind` of "gguf", `shard_bytes` of
    "huggingface". See `save_native` for what replaces what.

    Raises ValueError for a format that cannot be written, or has no such option, or no place for
    this model;
    CheckpointError or OSError as `save_native` does.
    """
    _write(folder, checkpoint_of(model, Path(folder)), tokenizer, format, options)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    **options: Any,
) -> None:
    """Write a checkpoint in another format, with one tensor in memory at a time.

    In the source's own dtype, where `dtype` is None, the numbers are the same to the bit. A chat
    template goes from GGUF and Hugging Face's folders to either, and the native format's chat
    format becomes one there; the others have no place for it.
    `quantize` puts the matrices into few bits: "int8", "int4" or "nf4" in the native format, "q8_0"
    in GGUF's, "int8" in llama2.c's. `options` are those of `save`.

    Raises what `open_checkpoint` and `save` raise, CheckpointError if `target` exists, and
    ValueError for a kind of few bits, or a dtype, that the format or the source does not have.
    """
    check_new(Path(target))
    checkpoint = open_checkpoint(source)
    tok = open_tokenizer(checkpoint, tokenizer)
    quantize = quantize.lower() if quantize else None
    if dtype and checkpoint.quantization:
        raise ValueError(
            f"{checkpoint.path} holds weights in {checkpoint.quantization['kind']}, which have no "
            f"other dtype. Leave dtype out; or convert the model that they were made of."
        )
    if dtype not in (None, torch.float32) and format == "llama2.c":
        raise ValueError(
            f"llama2.c holds float32, or int8 with quantize, and no {dtype}. Leave dtype out, or "
            f"write another format."
        )
    if quantize and format == "native":
        check_room(checkpoint, "cpu", dtype, quantize)
        model = llama_from(checkpoint, "cpu", dtype, quantize)
        checkpoint, dtype = checkpoint_of(model, checkpoint.path), None
    elif quantize and format == "gguf":
        options["kind"] = quantize.upper()
    elif quantize == "int8" and format == "llama2.c":
        options["version"] = 2
    elif quantize:
        raise ValueError(
            f"{format} has no weights in {quantize!r}. Few bits are possible in native (int8, "
            f"int4, nf4), gguf (q8_0) and llama2.c (int8)."
        )
    if dtype:
        weights = {
            name: converted(stored, dtype, name) for name, stored in checkpoint.weights.items()
        }
        checkpoint = replace(checkpoint, weights=weights)
    _write(target, checkpoint, tok, format, options)


def open_tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer at `path`; without one, that of the checkpoint.

    Raises CheckpointError if none comes with it, and what `load_tokenizer` raises.
    """
    if path is not None:
        return load_tokenizer(path)
    if checkpoint.tokenizer is not None:
        tok = checkpoint.tokenizer()
        return tok.for_chat(tok.chat_format or format_of(checkpoint.chat_template))
    return load_tokenizer(_beside(checkpoint.path))


def _write(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    format: str,
    options: dict[str, Any],
) -> None:
    writer = WRITERS[known_name("format", format, WRITERS)]
    if checkpoint.quantization and format != "native":
        raise ValueError(
            f"The weights are in {checkpoint.quantization['kind']}, packed as minillama does it, "
            f"which {format} cannot hold. Save them as native; or convert the model that they were "
            f"made of."
        )
    known = list(signature(writer).parameters)[3:]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"{format} is not written with {', '.join(unknown)}: its options are "
            f"{', '.join(known) or 'none'}."
        )
    check_vocabulary(checkpoint.config, tokenizer)
    if checkpoint.chat_template is None:
        template = TEMPLATES.get(tokenizer.chat_format or "")
        checkpoint = replace(checkpoint, chat_template=template)
    writer(Path(path), checkpoint, tokenizer, **options)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from SentencePiece's tokenizer.model or llama2.c's tokenizer.bin.

    Raises OSError, ValueError, or CheckpointError (a ValueError), naming the file, if it is missing
    or damaged.
    """
    if Path(path).suffix == ".bin":
        return load_tokenizer_bin(path)
    return Tokenizer(path)


def _open_folder(path: Path) -> Checkpoint:
    names = {file.name for file in path.iterdir()}
    if any(name.startswith("consolidated.") for name in names):
        return open_meta(path)
    if "config.json" in names or any(name.startswith("pytorch_model") for name in names):
        return open_huggingface(path)
    if ADAPTER in names and PARAMS not in names:
        raise CheckpointError(
            f"{path} is an adapter, which changes a model and is none. Name the model that it was "
            f"trained on, and the adapter beside it: --model BASE --adapter {path}."
        )
    return open_native(path)


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return open_gguf(path)
    if start == b"PK\x03\x04" or path.suffix in (".safetensors", ".json", ".model"):
        raise CheckpointError(
            f"{path} is one file of a checkpoint, which is the whole folder: name {path.parent}."
        )
    return open_llama2c(path)


def _beside(path: Path) -> Path:
    """The tokenizer that lies beside a weights file."""
    for name in ("tokenizer.model", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise CheckpointError(
        f"{path} holds no tokenizer, and neither tokenizer.model nor tokenizer.bin lies beside it. "
        f"Say where it is: load(path, tokenizer=FILE), or --tokenizer FILE."
    )
