"""minillama's own checkpoint: one folder that is either whole or not there.

params.json        the LlamaConfig
model.safetensors  the weights, under Meta's names; nothing in it can be executed
tokenizer.model    SentencePiece's file
SHA256SUMS         of the three; `sha256sum -c SHA256SUMS` reads it too
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

PARAMS, WEIGHTS, TOKENIZER, SUMS = FILES = (
    "params.json",
    "model.safetensors",
    "tokenizer.model",
    "SHA256SUMS",
)
SUMMED = (PARAMS, WEIGHTS, TOKENIZER)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or must not be overwritten; the text names the file."""


def save_native(folder: str | os.PathLike[str], model: Llama, tokenizer: Tokenizer) -> None:
    """Write model and tokenizer to `folder`; an earlier checkpoint there is replaced as a whole.

    Everything is written beside it and flushed to the disk first, so that a full disk, Ctrl-C or a
    crash leaves the earlier checkpoint as it was. Two saves of equal weights are equal bytes.
    Raises CheckpointError if `folder` holds anything else, OSError if it cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    check_vocabulary(model.config, tokenizer)
    with _replacing(folder) as new:
        weights = model.state_dict()
        if model.config.tie_embeddings:
            del weights["output.weight"]  # it is tok_embeddings.weight
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in weights.items()}, new / WEIGHTS
            )
        except SafetensorError as error:  # its name for a full disk, too
            raise OSError(
                f"{folder} could not be written ({error}); nothing was changed."
            ) from error
        (new / WEIGHTS).chmod(0o644)  # safetensors makes it for the owner alone
        (new / PARAMS).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        (new / TOKENIZER).write_bytes(tokenizer.to_proto())
        sums = [f"{_sha256(new / name)}  {name}\n" for name in SUMMED]
        (new / SUMS).write_text("".join(sums))


def load_native(folder: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The config and the weights of a folder that `save_native` wrote.

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
    _verify(folder)
    try:
        config = LlamaConfig.from_dict(json.loads((folder / PARAMS).read_text()))
    except ValueError as error:
        raise CheckpointError(f"{folder / PARAMS} is no config of a model: {error}") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is no safetensors file: {error}") from error
    if config.tie_embeddings:
        if "output.weight" in weights:
            raise CheckpointError(
                f"{folder}: {PARAMS} says that output.weight is tok_embeddings.weight "
                f"(tie_embeddings), but {WEIGHTS} holds one of its own. They belong to different "
                f"models."
            )
        if "tok_embeddings.weight" in weights:
            weights["output.weight"] = weights["tok_embeddings.weight"]
    return config, weights


def model_from(config: LlamaConfig, weights: dict[str, Tensor], source: object) -> Llama:
    """A Llama around these weights, without copying them.

    Raises CheckpointError, naming `source`, unless names and shapes are exactly the config's, and
    the numbers are floating-point numbers.
    """
    needed = parameter_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if needed != found:
        wrong = sorted(needed.items() ^ found.items())
        name = wrong[0][0]
        raise CheckpointError(
            f"{source}: the config and the weights disagree about {name}: the config needs "
            f"{needed.get(name, 'no such tensor')}, the file has {found.get(name, 'none')} "
            f"({len({name for name, _ in wrong})} tensors differ). They belong to different models."
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name} is of {tensor.dtype}, which no weight can be.")
    model = _empty_model(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model of this config, by name."""
    return {name: tuple(tensor.shape) for name, tensor in _empty_model(config).state_dict().items()}


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


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError unless model and tokenizer have equally many tokens."""
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            f"they do not belong together, and the text would be gibberish. "
            f"Name the model's own tokenizer."
        )


def _empty_model(config: LlamaConfig) -> Llama:
    """A model whose parameters have shapes and no memory."""
    with torch.device("meta"):
        return Llama(config)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; at the end it takes the place of `folder`, or nothing has changed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        new.mkdir()
        yield new
        for path in (*new.iterdir(), new):
            _flush(path)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        _flush(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    lines = (folder / SUMS).read_text(errors="replace").removesuffix("\n").split("\n")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(expected) != set(SUMMED):
        raise CheckpointError(
            f"{folder / SUMS} is damaged: it has the sums of {sorted(expected)}, but needs those "
            f"of {sorted(SUMMED)}. Copy the checkpoint again."
        )
    for name in SUMMED:
        if _sha256(folder / name) != expected[name]:
            raise CheckpointError(
                f"{folder / name} is damaged or was changed: its SHA-256 is not the one in {SUMS}. "
                f"Copy the checkpoint again. If you changed it on purpose: sha256sum "
                f"{' '.join(SUMMED)} > {SUMS}"
            )


def interrupted_save(folder: Path) -> Path | None:
    """The earlier checkpoint of `folder`, if the process died while it was being replaced."""
    hidden = folder.parent.glob(".*")
    return next((path for path in hidden if path.name.startswith(f".{folder.name}.old-")), None)
