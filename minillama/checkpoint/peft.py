"""Adapters in the format of the `peft` library, which transformers, vLLM and others read as well.

adapter_config.json          rank, alpha, and which layers
adapter_model.safetensors    A and B of each of them, under Hugging Face's names
SHA256SUMS                   of both, where minillama wrote them

As B makes rows of wq and wk, it is reordered as they are: see `minillama.checkpoint.huggingface`.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from minillama.adapt.lora import Adapter, LowRank, target_shapes
from minillama.checkpoint.folder import (
    SUMS,
    CheckpointError,
    check_holds_only,
    interrupted_save,
    read_json,
    verify_sums,
    writing,
)
from minillama.checkpoint.huggingface import (
    halves_from_pairs,
    heads_of,
    huggingface_name,
    our_name,
    pairs_from_halves,
)
from minillama.checkpoint.safetensors import open_safetensors, save_safetensors
from minillama.checkpoint.weights import Checkpoint, Stored, computed, n_bytes
from minillama.config import ADAPTABLE, LlamaConfig, LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Beside the A and B of a head, peft keeps the head as it was: the base model has that, too.
_FROZEN_HEAD = f"{_PREFIX}lm_head.base_layer.weight"
_MODULES = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "output": "lm_head",
}

# Settings that are read, and those that describe an adapter without changing what it computes.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
_DESCRIBING = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",  # how A was drawn
    "inference_mode",
    "megatron_core",  # a module's name, of use with megatron_config alone
    "peft_version",
    "qalora_group_size",  # of use with use_qalora alone
    "revision",
    "runtime_config",
    "task_type",
}
# Those that choose among layers: they change nothing where the weights say the same.
_CHOOSING = {
    "exclude_modules": "leaves out layers that the weights have A and B of",
    "layers_to_transform": "adapts some of the blocks, where minillama adapts all",
    "layers_pattern": "",  # of use with layers_to_transform alone
    "rank_pattern": "gives some layers another rank, where minillama has one for all",
    "alpha_pattern": "gives some layers another alpha, where minillama has one for all",
}
# Any other setting must be absent, or one of these: then it changes nothing.
_NEUTRAL: tuple[Any, ...] = (None, False, "none", "", [], {})
# How A and B were drawn is of no matter once they are trained, unless the base was changed, too.
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, config: LlamaConfig, base: str = ""
) -> None:
    """Write an adapter of a model of `config`; an earlier one in `folder` is replaced as a whole.

    `base` says which model it belongs to, as the path of a Hugging Face folder or a name of the
    hub: peft loads it from there. It is empty for a model that transformers cannot open.
    Equal adapters are equal bytes. Raises CheckpointError if `folder` holds anything else, OSError
    if it cannot be written. Shown in notebooks/18_lora.ipynb.
    """
    folder = Path(folder)
    check_holds_only(folder, (CONFIG, WEIGHTS, SUMS), "an adapter")
    tensors = {}
    for name, low in adapter.layers.items():
        b = _reordered(name, low.b, config, halves_from_pairs)
        for part, tensor in (("lora_A", low.a), ("lora_B", b)):
            tensors[_their_name(name, part)] = Stored(
                tuple(tensor.shape), tensor.dtype, partial(Tensor.detach, tensor)
            )
    lora = adapter.config
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(_MODULES[name] for name in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with writing(folder, sum(map(n_bytes, tensors.values()))) as new:
        save_safetensors(new / WEIGHTS, tensors)
        (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def load_adapter(folder: str | os.PathLike[str], config: LlamaConfig) -> Adapter:
    """The adapter that peft or `save_adapter` wrote, for a model of `config`.

    Raises FileNotFoundError, or CheckpointError, naming the file, for what is missing, damaged or
    made for another model, and for every setting that may change what is computed and is not known
    here (DoRA, biases, ranks that differ from layer to layer): nothing is ignored that matters.
    Shown in notebooks/18_lora.ipynb.
    """
    folder = Path(folder)
    _check_there(folder)
    settings = _settings(folder / CONFIG)
    layers = _layers(folder / WEIGHTS, config)
    _check_choice(folder / CONFIG, settings, layers, config)
    targets = tuple(t for t in ADAPTABLE if any(t == name.rpartition(".")[2] for name in layers))
    named = settings.get("target_modules")  # or a pattern: then the weights alone say it
    found = [_MODULES[target] for target in targets]
    excluded = settings.get("exclude_modules")
    without = {*map(str, excluded)} if isinstance(excluded, list) else set()
    if isinstance(named, list) and (
        {str(name).rpartition(".")[2] for name in named} - without != set(found)
    ):
        raise CheckpointError(
            f"{folder}: {CONFIG} says that the layers {', '.join(map(str, named))} have adapters, "
            f"but {WEIGHTS} holds those of {', '.join(found) or 'none'}. They belong to different "
            f"adapters, or parts are missing."
        )
    try:
        lora = LoRAConfig(
            rank=_number(settings, "r", int),
            alpha=float(_number(settings, "lora_alpha", int, float)),
            dropout=float(_number(settings, "lora_dropout", int, float)),
            targets=targets,
            rank_stabilized=bool(settings.get("use_rslora")),
        )
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no adapter's config: {error}") from error
    _check_shapes(folder / WEIGHTS, layers, config, lora)
    return Adapter(
        lora,
        {
            name: LowRank(a, _reordered(name, b, config, pairs_from_halves))
            for name, (a, b) in layers.items()
        },
    )


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter added to its weights, to be written or loaded as any other.

    Each W + scale * B A is computed, in float32, when it is read: one matrix at a time, whatever
    the size of the model. A tied head that the adapter changes becomes one of its own.
    Raises CheckpointError if the weights are quantised: what is added would be rounded away.
    """
    if checkpoint.quantization:
        raise CheckpointError(
            f"{checkpoint.path} holds quantised weights, and the sum with an adapter would be "
            f"rounded to their few levels. Merge into the weights they were made of, and quantise "
            f"the result; or use the adapter beside them."
        )
    weights, config = dict(checkpoint.weights), checkpoint.config
    for name, low in adapter.layers.items():
        key = f"{name}.weight"
        stored = weights.get(key) or weights["tok_embeddings.weight"]
        add = partial(_sum, low=low, scale=adapter.config.scale)
        weights[key] = computed([stored], add, stored.shape)
    if "output" in adapter.layers:
        config = replace(config, tie_embeddings=False)
    return replace(checkpoint, weights=weights, config=config)


def _sum(
    weight: Float[Tensor, "d_out d_in"], low: LowRank, scale: float
) -> Float[Tensor, "d_out d_in"]:
    return (weight.float() + scale * low.b @ low.a).to(weight.dtype)


def _check_there(folder: Path) -> None:
    if folder.is_dir() and (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        if (folder / SUMS).is_file():
            verify_sums(folder, (CONFIG, WEIGHTS))
        return
    if earlier := interrupted_save(folder):
        raise FileNotFoundError(
            f"There is no {folder}: its last save was cut off. {earlier} is the adapter before it; "
            f"rename it to {folder.name}."
        )
    hint = ""
    if (folder / "adapter" / CONFIG).is_file():
        hint = f" {folder / 'adapter'} is one."
    elif (folder / "adapter_model.bin").is_file():
        hint = " Its adapter_model.bin is a pickle: load and save it with a newer peft."
    raise FileNotFoundError(
        f"{folder} is no adapter: that is a folder with {CONFIG} and {WEIGHTS}.{hint}"
    )


def _settings(path: Path) -> dict[str, Any]:
    """What the config says, if minillama knows what all of it means."""
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} describes an adapter of the kind {values.get('peft_type')!r}, but minillama "
            f"knows LORA alone."
        )
    for name, value in values.items():
        allowed = _INITIAL if name == "init_lora_weights" else _NEUTRAL
        if name not in _READ | _DESCRIBING | _CHOOSING.keys() and value not in allowed:
            what = "may change what the adapter computes in a way that minillama does not know"
            raise CheckpointError(_not_known(path, name, value, what))
    return values


def _check_choice(
    path: Path, settings: Mapping[str, Any], layers: Iterable[str], config: LlamaConfig
) -> None:
    """Raises CheckpointError unless all layers that have A and B are adapted, and all alike."""
    theirs = [huggingface_name(f"{name}.weight").removesuffix(".weight") for name in layers]
    for name, what in _CHOOSING.items():
        value = settings.get(name)
        if value not in (None, "", [], {}) and not _is_idle(name, value, settings, theirs, config):
            raise CheckpointError(_not_known(path, name, value, what))


def _is_idle(
    name: str, value: Any, settings: Mapping[str, Any], theirs: list[str], config: LlamaConfig
) -> bool:
    """Whether a setting that chooses among layers makes no difference to those with A and B."""
    if name == "layers_to_transform":
        chosen = value if isinstance(value, list) else [value]
        return all(block in chosen for block in range(config.n_layers))
    if name == "exclude_modules" and isinstance(value, list):
        return not any(f".{layer}".endswith(f".{each}") for each in value for layer in theirs)
    if name in ("exclude_modules", "layers_pattern"):
        return isinstance(value, str | list)  # a pattern: the weights alone say what it left
    usual = settings.get("r" if name == "rank_pattern" else "lora_alpha")
    return isinstance(value, dict) and all(
        given == usual or not _may_match(key, theirs) for key, given in value.items()
    )


def _may_match(key: str, theirs: list[str]) -> bool:
    """Whether peft takes the key for one of the layers; a pattern's key might always be one."""
    is_plain = re.fullmatch(r"[\w.]+", key) is not None
    return not is_plain or any(re.match(rf"(.*\.)?({key})$", layer) for layer in theirs)


def _not_known(path: Path, name: str, value: Any, what: str) -> str:
    return (
        f"{path}: {name} is {value!r}, which {what}. Merge it into its model with peft "
        f"(merge_and_unload), and load that."
    )


def _number(settings: Mapping[str, Any], name: str, *kinds: type) -> Any:
    value = settings.get(name, 0.0 if name == "lora_dropout" else None)
    if type(value) not in kinds:
        raise ValueError(f"{name} is {value!r}, but must be {kinds[-1].__name__}.")
    return value


def _layers(path: Path, config: LlamaConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, by our names; B still in Hugging Face's order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for theirs, stored in open_safetensors(path).items():
        if theirs == _FROZEN_HEAD and stored.shape == (config.vocab_size, config.dim):
            continue
        stem, _, part = theirs.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        name = (our_name(f"{stem}.weight") or "").removesuffix(".weight")
        whole = theirs == f"{_PREFIX}{stem}.{part}.weight" and part in ("lora_A", "lora_B")
        if not whole or name.rpartition(".")[2] not in ADAPTABLE:
            raise CheckpointError(
                f"{path} holds {theirs}, which is no A or B of a linear layer of a Llama. Adapters "
                f"of other kinds, or of other models, are not read."
            )
        tensor = stored.read()
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {theirs} is of {tensor.dtype}, or holds inf or NaN: nothing that "
                f"training could have left. Copy it again, or train anew with smaller steps."
            )
        parts.setdefault(name, {})[part] = tensor.float()
    for name, found in parts.items():
        if len(found) < 2:
            raise CheckpointError(f"{path} holds one of A and B of {name}, and not the other.")
    return {name: (found["lora_A"], found["lora_B"]) for name, found in parts.items()}


def _check_shapes(
    path: Path, layers: Mapping[str, tuple[Tensor, Tensor]], config: LlamaConfig, lora: LoRAConfig
) -> None:
    needed = {
        name: ((lora.rank, d_in), (d_out, lora.rank))
        for name, (d_out, d_in) in target_shapes(config, lora.targets).items()
    }
    found = {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in layers.items()}
    for name in sorted({*needed, *found}):
        if needed.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: A and B of {name} have the shapes {found.get(name, 'of none')}, but the "
                f"model and the config need {needed.get(name, 'none')}. The adapter was made for "
                f"another model, or adapts some of its layers only, which minillama does not."
            )


def _reordered(
    name: str, b: Float[Tensor, "d_out rank"], config: LlamaConfig, reorder: Callable[..., Tensor]
) -> Float[Tensor, "d_out rank"]:
    """B with its rows in the order of the matrix that it changes."""
    n_heads = heads_of(name, config)
    return b if n_heads is None else reorder(b, n_heads=n_heads).contiguous()


def _their_name(name: str, part: str) -> str:
    return f"{_PREFIX}{huggingface_name(f'{name}.weight').removesuffix('weight')}{part}.weight"
