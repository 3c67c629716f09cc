"""Hugging Face's folders, and its names and layout of the same weights.

config.json                    the sizes, under other names than Meta's
model.safetensors              the weights; large models in parts, with model.safetensors.index.json
pytorch_model.bin              the same in older folders, with pytorch_model.bin.index.json
tokenizer.model, .json         SentencePiece's file, or that of the tokenizers library, or both;
                               transformers reads the latter, minillama rather the former
tokenizer_config.json          which piece begins a text

Two things differ from Meta's: the names, and the order of the rows of wq and wk. Their rotation
pairs channel i with channel i + head_dim / 2, so each head's rows go from 0 1 2 3 ... to
0 2 4 ... 1 3 5 .... Nothing else in minillama knows that layout.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError, check_new, read_json, writing
from minillama.checkpoint.pickles import open_pickle
from minillama.checkpoint.safetensors import open_safetensors, save_safetensors
from minillama.checkpoint.weights import (
    Checkpoint,
    Stored,
    check_vocabulary,
    computed,
    config_of,
    main_dtype,
    n_bytes,
)
from minillama.config import LlamaConfig
from minillama.tokenizer import Tokenizer, Vocabulary
from minillama.tokenizer.tokenizer_json import post_processor
from minillama.tokenizer.vocabulary import SPACE, Kind

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SHARD_BYTES = 5 * 10**9  # of one file, at most; what many hosts of files take

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_OUR_LAYER_NAMES = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
_OUR_OUTER_NAMES = {theirs: ours for ours, theirs in _OUTER_NAMES.items()}

# The fields of LlamaConfig under Hugging Face's names, with the value that stands for an absent one
# (of transformers' own configuration, where a folder may rely on it); None: it must be there.
_FIELDS: dict[str, tuple[str, Any]] = {
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "hidden_dim": ("intermediate_size", None),
    "vocab_size": ("vocab_size", None),
    "max_seq_len": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
}
# Settings that change what is computed, and the values that are what a Llama of the papers does.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}


def halves_from_pairs(
    weight: Float[Tensor, "width dim"], n_heads: int
) -> Float[Tensor, "width dim"]:
    """Reorder the rows of wq or wk from neighbouring pairs (Meta) to two halves (Hugging Face).

    `n_heads` is the number of heads of *this* matrix: n_kv_heads for wk. With the wrong number the
    shapes still fit and the model still speaks, wrongly.
    Source: Touvron et al.'s release and transformers' conversion script. Built in
    notebooks/02_rope.ipynb.
    """
    pattern = "(heads half two) dim -> (heads two half) dim"
    return rearrange(weight, pattern, heads=n_heads, two=2)


def pairs_from_halves(
    weight: Float[Tensor, "width dim"], n_heads: int
) -> Float[Tensor, "width dim"]:
    """The inverse of `halves_from_pairs`."""
    pattern = "(heads two half) dim -> (heads half two) dim"
    return rearrange(weight, pattern, heads=n_heads, two=2)


def heads_of(name: str, config: LlamaConfig) -> int | None:
    """By how many heads the rows of one of our matrices are reordered; None if they are not."""
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    return n_heads.get(name.removesuffix(".weight").rpartition(".")[2])


def huggingface_name(name: str) -> str:
    """The name of one of our parameters in LlamaForCausalLM's state dict."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, index, inner = stem.split(".", 2)
    return f"model.layers.{index}.{_LAYER_NAMES[inner]}.weight"


def our_name(theirs: str) -> str | None:
    """The inverse of `huggingface_name`; None for a tensor that a Llama does not have."""
    stem = theirs.removesuffix(".weight")
    if not theirs.endswith(".weight"):
        return None
    if stem in _OUR_OUTER_NAMES:
        return f"{_OUR_OUTER_NAMES[stem]}.weight"
    model, layers, index, inner = (stem.split(".", 3) + [""] * 4)[:4]
    if (model, layers) != ("model", "layers") or inner not in _OUR_LAYER_NAMES:
        return None
    return f"layers.{index}.{_OUR_LAYER_NAMES[inner]}.weight"


def to_huggingface(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """A state dict of ours as LlamaForCausalLM's: renamed, wq and wk reordered."""
    renamed = {}
    for name, weight in state.items():
        heads = heads_of(name, config)
        renamed[huggingface_name(name)] = halves_from_pairs(weight, heads) if heads else weight
    return renamed


def open_huggingface(folder: str | os.PathLike[str]) -> Checkpoint:
    """A folder that transformers saved; wq and wk are reordered when they are read.

    Safetensors are preferred to pickles. Of the tokenizers, tokenizer.model is, unless it has not
    the model's vocabulary and tokenizer.json lies beside it.
    Raises CheckpointError, naming the file, if one is missing, damaged or does not fit the others,
    and if config.json asks for anything that a Llama of the papers does not do.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    weights = {}
    for theirs, stored in _tensors(folder).items():
        if theirs.endswith("rotary_emb.inv_freq"):
            continue  # RoPE's frequencies, which are computed
        name = our_name(theirs)
        if name is None:
            raise CheckpointError(
                f"{folder} holds {theirs}, which no Llama has: it is a model of another kind, or "
                f"an adapter, and read without it, it would speak wrongly."
            )
        if name == "output.weight" and config.tie_embeddings:
            continue  # transformers ties the head to the embeddings, whatever the file has for it
        weights[name] = _reordered(name, stored, config, pairs_from_halves)
    return Checkpoint(
        config,
        weights,
        _tokenizer(folder, config),
        folder,
        chat_template=_chat_template(folder),
    )


def save_huggingface(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that transformers loads, with one tensor in memory at a time.

    Files grow to `shard_bytes` at most, unless a single tensor is larger.
    Raises CheckpointError if `folder` exists, OSError if it cannot be written.
    """
    folder, config = Path(folder), checkpoint.config
    check_new(folder)
    check_vocabulary(config, tokenizer)
    theirs = {
        huggingface_name(name): _reordered(name, stored, config, halves_from_pairs)
        for name, stored in checkpoint.weights.items()
    }
    total = sum(map(n_bytes, theirs.values()))
    shards = list(_shards(theirs, shard_bytes))
    with writing(folder, total) as new:
        places: dict[str, str] = {}
        for index, shard in enumerate(shards, start=1):
            name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            name = name if len(shards) > 1 else WEIGHTS
            save_safetensors(new / name, shard)
            places |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            index_ = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_json(new / f"{WEIGHTS}.index.json", index_)
        dtype = str(main_dtype(checkpoint)).removeprefix("torch.")
        _write_json(new / CONFIG, config_json(config, tokenizer, dtype))
        template = checkpoint.chat_template
        named = {} if template is None else {"chat_template": template}
        _write_json(new / TOKENIZER_CONFIG, tokenizer_config_json(tokenizer) | named)
        (new / tokenizer.file_name).write_bytes(tokenizer.to_bytes())
        if isinstance(tokenizer, Vocabulary):
            _write_json(new / "tokenizer.json", tokenizer_json(tokenizer))


def read_config(path: Path) -> LlamaConfig:
    """The sizes in a config.json, of transformers 4 or 5.

    Raises CheckpointError, naming the file and the setting, for anything that changes what is
    computed and is not what a Llama of the papers does: nothing is ignored that matters.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}, which says what model the weights beside it make. It comes with "
            f"them: download or copy it, too."
        )
    values = read_json(path)
    for name, plain in _PLAIN.items():
        if values.get(name) is not None and values[name] not in plain:
            raise _refused(path, name, values[name], " or ".join(map(repr, plain)) or "absent")
    if values.get("architectures", ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
        raise _refused(path, "architectures", values["architectures"], "['LlamaForCausalLM']")
    sizes = {}
    for ours, (theirs, default) in _FIELDS.items():
        sizes[ours] = values.get(theirs, default)
        if sizes[ours] is None:
            raise CheckpointError(f"{path} says no {theirs}, without which there is no model.")
    sizes["n_kv_heads"] = values.get("num_key_value_heads") or sizes["n_heads"]
    sizes["rope_theta"] = _rope_theta(path, values)
    config = config_of(path, sizes)
    if values.get("head_dim") not in (None, config.head_dim):
        raise _refused(path, "head_dim", values["head_dim"], f"{config.head_dim}, dim / n_heads")
    return config


def config_json(config: LlamaConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json, so that transformers 4 and 5 read the same model out of it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,  # where transformers 4 looks for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and 5
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": dtype,
    }


def tokenizer_config_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json: transformers is to read the tokenizer.json beside it.

    Its own class for a LLaMA's tokenizer.model gives texts that start with a space other ids.
    """
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes nothing else
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.pieces[i] for name, i in named.items() if i >= 0},
    }


def tokenizer_json(tokenizer: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json that makes the same ids and texts as a tokenizer.model.

    SentencePiece merges the two neighbours that make the piece with the best score; the tokenizers
    library wants a list of such pairs, best first. Control pieces in a text become their ids there,
    which ours never do, unless transformers is asked for ``split_special_tokens=True``.
    """
    ids = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    normal = {piece: i for piece, i in ids.items() if tokenizer.kinds[i] is Kind.NORMAL}
    merges = [
        (-tokenizer.scores[i], normal[piece[:cut]], normal[piece[cut:]])
        for piece, i in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[dict[str, Any]] = [space]
    if tokenizer.dummy_prefix:
        steps = [{"type": "Prepend", "prepend": SPACE}, space]
    if tokenizer.squeeze_spaces:
        first, runs, last = (
            {"type": "Replace", "pattern": {"Regex": regex}, "content": content}
            for regex, content in ((r"\A +", ""), (" +", " "), (rf"{SPACE}+\z", ""))
        )
        steps = [first, runs, *steps, last]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokenizer.pieces[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, kind in enumerate(tokenizer.kinds)
            if kind in (Kind.UNKNOWN, Kind.CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": post_processor(
            tokenizer.pieces, tokenizer.bos_id, tokenizer.eos_id, adds_bos=True
        ),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": int(tokenizer.dummy_prefix), "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[tokenizer.pieces[a], tokenizer.pieces[b]] for _, a, b in sorted(merges)],
        },
    }


def _rope_theta(path: Path, values: dict[str, Any]) -> Any:
    """RoPE's base: a setting of its own, or among others that stretch the positions."""
    theta = values.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise _refused(path, name, rope, "a table")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or not set(rope) <= {"rope_type", "type", "rope_theta"}:
            raise CheckpointError(
                f"{path}: {name} is {rope}, which stretches RoPE's positions. The Llamas of the "
                f"papers do not; read without it, the model would speak wrongly."
            )
        theta = rope.get("rope_theta", theta)
    return 10_000.0 if theta is None else theta


def _refused(path: Path, name: str, value: Any, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {value!r}, but a Llama of the papers needs {needed}. Read without it, "
        f"the model would speak wrongly."
    )


def _tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, under their names there."""
    for name, reader in ((WEIGHTS, open_safetensors), (PICKLE, open_pickle)):
        if (folder / name).is_file():
            return reader(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json", reader)
    raise CheckpointError(
        f"{folder} holds a {CONFIG}, but neither {WEIGHTS} nor {PICKLE}, nor an index of parts of "
        f"them. Download or copy the weights, too."
    )


def _indexed(index: Path, reader: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """All tensors of the parts that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise CheckpointError(f"{index} has no list of names of files. Download it again.")
    names = sorted(set(places.values()))
    for name in names:
        _check_inside(index, name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {', '.join(missing)} missing, {len(missing)} of {len(names)} parts "
            f"of the model. Download or copy them, too."
        )
    tensors: dict[str, Stored] = {}
    for name in names:
        part = reader(index.parent / name)
        wrong = {tensor for tensor in part if places.get(tensor) != name}
        wrong |= {tensor for tensor, place in places.items() if place == name} - set(part)
        if wrong:
            raise CheckpointError(
                f"{index.parent / name} and {index.name} disagree about {min(wrong)} "
                f"({len(wrong)} tensors). They belong to different models."
            )
        tensors |= part
    return tensors


def _check_inside(index: Path, name: str) -> None:
    """Raises CheckpointError if an index leads out of its folder, where it has no business.

    A download cache of huggingface_hub keeps the files themselves in `blobs`, and links to them in
    `snapshots/COMMIT`: these links may be followed.
    """
    folder = index.parent.resolve()
    allowed = {folder}
    if folder.parent.name == "snapshots":
        allowed.add(folder.parent.parent / "blobs")
    if (folder / name).resolve().parent not in allowed:
        raise CheckpointError(
            f"{index} names the file {name!r}, which lies outside of its folder and was not "
            f"opened. Parts of a model lie beside their index."
        )


def _reordered(
    name: str, stored: Stored, config: LlamaConfig, reorder: Callable[..., Tensor]
) -> Stored:
    """wq and wk with their rows in another order, each by its own number of heads."""
    heads = heads_of(name, config)
    if heads is None:
        return stored
    if stored.shape != (heads * config.head_dim, config.dim):
        return stored  # Checkpoint refuses it
    return computed([stored], partial(reorder, n_heads=heads), stored.shape)


def _shards(tensors: Mapping[str, Stored], limit: int) -> Iterator[dict[str, Stored]]:
    """The tensors in their order, in groups of at most `limit` bytes."""
    shard: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if shard and sum(map(n_bytes, shard.values())) + n_bytes(stored) > limit:
            yield shard
            shard = {}
        shard[name] = stored
    yield shard


def _tokenizer(folder: Path, config: LlamaConfig) -> Callable[[], Tokenizer] | None:
    found = [p for p in (folder / "tokenizer.model", folder / "tokenizer.json") if p.is_file()]

    def choose() -> Tokenizer:
        tokenizer = Tokenizer(found[0])
        if tokenizer.vocab_size != config.vocab_size and len(found) > 1:
            return Tokenizer(found[1])
        return tokenizer

    return choose if found else None


def _chat_template(folder: Path) -> str | None:
    """From a file of its own, or, in older folders, from among the tokenizer's settings."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8", errors="replace")
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    template = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    return template if isinstance(template, str) else None  # a list: several, by name


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
