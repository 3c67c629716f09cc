"""Meta's own release: params.json and consolidated.00.pth, .01.pth, ...: a file for each GPU.

Each GPU of a group holds a part of every matrix (tensor parallelism), and its file that part: the
heads, or columns, that are its own. Put side by side along the right axis they are the matrix.
Source: the layout of Meta's model.py, where a ColumnParallelLinear is split along axis 0 and a
RowParallelLinear along axis 1. Shown in notebooks/16_real_weights.ipynb.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint.folder import (
    CheckpointError,
    check_new,
    checksum,
    read_json,
    writing,
)
from minillama.checkpoint.pickles import PickleWriter, open_pickle
from minillama.checkpoint.weights import (
    Checkpoint,
    Stored,
    check_vocabulary,
    computed,
    config_of,
    n_bytes,
)
from minillama.config import LlamaConfig, swiglu_hidden_dim
from minillama.tokenizer import Tokenizer

PARAMS, TOKENIZER, CHECKLIST = "params.json", "tokenizer.model", "checklist.chk"
# What params.json cannot say: Meta's program would stumble over it there, and ignores this file.
EXTRAS = "minillama.json"
_EXTRA_FIELDS = ("max_seq_len", "tie_embeddings")

_FROM_TOKENIZER = ("vocab_size", -1)  # as many as the tokenizer has
_MULTIPLIER = "ffn_dim_multiplier"
# The axis along which the parts lie side by side. Norms are the same on every GPU.
_AXES = {
    "tok_embeddings": 1,  # along the features, not the vocabulary
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}
_DIVIDED = ("n_kv_heads", "hidden_dim", "vocab_size", "dim")  # sizes of which each has a part
_KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"}
_KNOWN |= {_MULTIPLIER, "norm_eps", "rope_theta"}


def open_meta(folder: str | os.PathLike[str]) -> Checkpoint:
    """A folder of Meta's release; the parts are merged when a tensor is read.

    tokenizer.model lies in it or in the folder above. params.json does not say for how long texts
    the model was made: it is 2048 tokens for LLaMA 1 (known by its eps of 1e-6), 16,384 for Code
    Llama (by RoPE's base of a million), 4096 otherwise; a folder that `save_meta` wrote says it.
    Raises CheckpointError, naming the file, if one is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    params = _read_params(folder / PARAMS)
    parts = [open_pickle(path) for path in _shards(folder)]
    for part in parts:
        for name in [name for name in part if name.endswith("rope.freqs")]:
            del part[name]  # angles of RoPE, which are computed
    names = list(parts[0])
    for index, part in enumerate(parts):
        if _outlines(part) != _outlines(parts[0]):
            raise CheckpointError(
                f"{folder}: consolidated.{index:02d}.pth does not hold the same tensors, of the "
                f"same shapes, as consolidated.00.pth. They belong to different models."
            )
    weights = {name: _merged(name, [part[name] for part in parts]) for name in names}
    config = _config(folder, params, weights, len(parts))
    if config.tie_embeddings:
        weights.pop("output.weight", None)
    return Checkpoint(config, weights, _tokenizer(folder), folder)


def save_meta(
    folder: str | os.PathLike[str], checkpoint: Checkpoint, tokenizer: Tokenizer, shards: int = 1
) -> None:
    """Write a folder as Meta released it, for `shards` GPUs, with one tensor in memory at a time.

    Meta's program knows SentencePiece's tokenizer.model alone, and no tied embeddings: a matrix
    that is both is written twice.
    Raises CheckpointError if `folder` exists, ValueError if the model cannot be split like that or
    comes with another kind of tokenizer, OSError if it cannot be written.
    """
    folder, config = Path(folder), checkpoint.config
    check_new(folder)
    check_vocabulary(config, tokenizer)
    if tokenizer.file_name != TOKENIZER:
        raise ValueError(
            f"Meta's format has a SentencePiece tokenizer.model, but this model comes with a "
            f"{tokenizer.file_name}. Write it as huggingface, gguf or native."
        )
    _check_split(config, shards)
    weights = dict(checkpoint.weights)
    if config.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    with writing(folder, sum(map(n_bytes, weights.values()))) as new:
        part = {name: _part(name, stored, shards) for name, stored in weights.items()}
        with ExitStack() as stack:
            files = [
                stack.enter_context(PickleWriter(new / f"consolidated.{index:02d}.pth", part))
                for index in range(shards)
            ]
            for name, stored in weights.items():
                for file, piece in zip(files, _split(name, stored.read(), shards), strict=True):
                    file.write(piece)
                stored.release()
        _write_json(new / PARAMS, _params(config))
        _write_json(new / EXTRAS, {name: getattr(config, name) for name in _EXTRA_FIELDS})
        (new / TOKENIZER).write_bytes(tokenizer.to_bytes())
        names = sorted(path.name for path in new.iterdir() if path.suffix in (".pth", ".json"))
        (new / CHECKLIST).write_text(
            "".join(f"{checksum(new / name, 'md5')}  {name}\n" for name in names)
        )


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{index:02d}.pth" for index in range(len(found))]
    if not found or found != expected:
        last = found[-1].name if found else "consolidated.00.pth"
        missing = sorted({path.name for path in expected} - {path.name for path in found}) or [last]
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} missing; there are "
            f"{', '.join(path.name for path in found) or 'no parts at all'}. A model in Meta's "
            f"format is all of its parts, numbered from 00 on. Download or copy them again."
        )
    return found


def _read_params(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}, which says how many heads the weights beside it have. It comes "
            f"with them: download or copy it, too."
        )
    params = {name: value for name, value in read_json(path).items() if value is not None}
    if params.get("use_scaled_rope") is False:  # of Llama 3: RoPE as it was
        del params["use_scaled_rope"]
    strange = sorted(set(params) - _KNOWN)
    if strange:
        raise CheckpointError(
            f"{path} has the settings {', '.join(strange)}, which no Llama of the papers has: "
            f"ignored, they could make the model speak wrongly."
        )
    for name in ("dim", "n_layers", "n_heads", *params):
        value: Any = params.get(name)
        whole = name not in ("norm_eps", "rope_theta", _MULTIPLIER)
        if type(value) not in ((int,) if whole else (int, float)) or not (
            0 < value < 10**9 or (name, value) == _FROM_TOKENIZER
        ):
            raise CheckpointError(
                f"{path} is no config of a model: {name} is {value!r}, but must be a "
                f"{'whole ' * whole}number above 0."
            )
    return params


def _config(
    folder: Path, params: dict[str, Any], weights: Mapping[str, Stored], n_parts: int
) -> LlamaConfig:
    path = folder / PARAMS
    embeddings = weights.get("tok_embeddings.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise CheckpointError(f"{folder}: the weights hold no matrix tok_embeddings.weight.")
    vocab_size, dim = embeddings.shape
    stated = params.get("vocab_size", -1)
    if stated not in (-1, vocab_size):
        raise CheckpointError(
            f"{path} has vocab_size {stated}, but the embeddings have {vocab_size} rows. "
            f"They belong to different models."
        )
    if dim and params["dim"] > dim:
        n_needed = params["dim"] * n_parts // dim
        raise CheckpointError(
            f"{folder}: the model has {n_needed} parts, and {n_parts} of them are here: "
            f"consolidated.{n_parts:02d}.pth is missing (the embeddings of {n_parts} make "
            f"{dim} of {params['dim']} features). Download or copy the others."
        )
    eps, theta = params.get("norm_eps", 1e-5), params.get("rope_theta", 10_000.0)
    sizes = {
        "dim": params["dim"],
        "n_layers": params["n_layers"],
        "n_heads": params["n_heads"],
        "n_kv_heads": params.get("n_kv_heads", params["n_heads"]),
        "hidden_dim": swiglu_hidden_dim(
            params["dim"], params.get("multiple_of", 256), params.get(_MULTIPLIER, 1.0)
        ),
        "vocab_size": vocab_size,
        "max_seq_len": 2048 if eps == 1e-6 else 16_384 if theta == 1e6 else 4096,
        "norm_eps": eps,
        "rope_theta": theta,
        "tie_embeddings": False,
    }
    return config_of(path, sizes | _extras(folder / EXTRAS))


def _extras(path: Path) -> dict[str, Any]:
    """What `save_meta` wrote beside params.json, where it did."""
    if not path.is_file():
        return {}
    values = read_json(path)
    if set(values) != set(_EXTRA_FIELDS):
        raise CheckpointError(f"{path} must hold {' and '.join(_EXTRA_FIELDS)}, not {values}.")
    return values


def _params(config: LlamaConfig) -> dict[str, Any]:
    """What Meta's params.json says of a model, without what its first programs do not know."""
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "multiple_of": 256,
    }
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    if swiglu_hidden_dim(config.dim) != config.hidden_dim:
        # Rounded up to a multiple of hidden_dim, anything from 1 to hidden_dim is hidden_dim.
        params["multiple_of"] = config.hidden_dim
        if (width := swiglu_hidden_dim(config.dim, multiple_of=1)) > config.hidden_dim:
            params[_MULTIPLIER] = (config.hidden_dim + 0.5) / width  # Meta's program truncates
    return params


def _axis(name: str) -> int | None:
    return _AXES.get(name.split(".")[-2]) if "." in name else None


def _merged(name: str, parts: list[Stored]) -> Stored:
    axis, shape = _axis(name), list(parts[0].shape)
    if len(parts) == 1 or axis is None or len(shape) != 2:
        return parts[0]
    shape[axis] *= len(parts)
    return computed(parts, lambda *tensors: torch.cat(tensors, axis), tuple(shape))


def _part(name: str, stored: Stored, shards: int) -> Stored:
    """The outline of one of the parts."""
    shape, axis = list(stored.shape), _axis(name)
    if axis is not None:
        shape[axis] //= shards
    return replace(stored, shape=tuple(shape))


def _split(name: str, tensor: Tensor, shards: int) -> list[Tensor]:
    axis = _axis(name)
    return [tensor] * shards if axis is None else list(tensor.chunk(shards, axis))


def _check_split(config: LlamaConfig, shards: int) -> None:
    sizes = {name: getattr(config, name) for name in _DIVIDED}
    possible = [n for n in (1, 2, 4, 8) if not any(size % n for size in sizes.values())]
    if shards not in possible:
        raise ValueError(
            f"The model cannot be split into {shards} parts: every GPU has as many heads, columns "
            f"and tokens as the others ({', '.join(f'{n} {size}' for n, size in sizes.items())}). "
            f"Possible are {', '.join(map(str, possible))}."
        )


def _outlines(part: Mapping[str, Stored]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (stored.shape, stored.dtype) for name, stored in part.items()}


def _tokenizer(folder: Path) -> Any:
    for place in (folder, folder.parent):
        if (place / TOKENIZER).is_file():
            return lambda: Tokenizer(place / TOKENIZER)
    return None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
