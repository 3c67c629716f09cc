"""minillama's own checkpoint: one folder that is either whole or not there.

params.json        the LlamaConfig
model.safetensors  the weights, under Meta's names; nothing in it can be executed
tokenizer.model    SentencePiece's file
SHA256SUMS         of the three; `sha256sum -c SHA256SUMS` reads it too
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillama.checkpoint.folder import SUMS, CheckpointError, replacing, verify_sums
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.plan import InferencePlan, check_fits, free_memory
from minillama.tokenizer import Tokenizer

PARAMS, WEIGHTS, TOKENIZER = SUMMED = ("params.json", "model.safetensors", "tokenizer.model")
FILES = (*SUMMED, SUMS)
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


def save_native(folder: str | os.PathLike[str], model: Llama, tokenizer: Tokenizer) -> None:
    """Write model and tokenizer to `folder`; an earlier checkpoint there is replaced as a whole.

    Everything is written beside it and flushed to the disk first, so that a full disk, Ctrl-C or a
    crash leaves the earlier checkpoint as it was. Two saves of equal weights are equal bytes.
    Raises CheckpointError if `folder` holds anything else, OSError if it cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)
    check_vocabulary(model.config, tokenizer)
    with replacing(folder) as new:
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


def load_native(folder: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The config and the weights of a folder that `save_native` wrote.

    Raises CheckpointError, naming the file, if one is missing, damaged or does not fit the others,
    and ValueError, before the weights are read, if they do not fit into the memory.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        inside = folder / "checkpoint"
        hint = f"; {inside} is one" if (inside / PARAMS).is_file() else ""
        raise CheckpointError(
            f"{folder} is no checkpoint of minillama: {', '.join(missing)} missing{hint}."
        )
    verify_sums(folder, SUMMED)
    try:
        config = LlamaConfig.from_dict(json.loads((folder / PARAMS).read_text()))
    except ValueError as error:
        raise CheckpointError(f"{folder / PARAMS} is no config of a model: {error}") from error
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for stored in {file.get_slice(name).get_dtype() for name in file.keys()}:  # noqa: SIM118
                if stored in STORED:
                    check_room(config, STORED[stored])
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


def check_room(config: LlamaConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Raises ValueError, with numbers and ways out, if weights of `dtype` do not fit there."""
    plan = InferencePlan(config=config, seq_len=1, dtype=str(dtype).removeprefix("torch."))
    check_fits(plan, free_memory(str(device)))


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
