"""llama.cpp's files: sizes, tokenizer and weights in one GGUF.

A header of keys with values and a list of tensors; then the tensors, each a row of blocks. A block
is one number (F32, F16, BF16), or 32 or 256 numbers that share a scale (Q8_0, Q4_0, ...). wq and
wk are in Meta's order: llama.cpp's converter takes Hugging Face's apart again.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError, replacing_file, writing
from minillama.checkpoint.weights import Checkpoint, Stored, computed, in_file, map_file
from minillama.config import LlamaConfig, known_name
from minillama.tokenizer import Tokenizer

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # of equal layout; version 1 had shorter counts
_HEADER_LIMIT = 1 << 25  # bytes; a vocabulary of 256,000 pieces fills a third of it

# The types of values by their number, as `struct` calls them; two are not of fixed size.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_STRING, _ARRAY = 8, 9
_CHAT_TEMPLATE = "tokenizer.chat_template"
_LENGTH = struct.Struct("<Q")  # stands before a string

# The types of tensors that can be read: ours as they are, the others as float32.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
KINDS = (*_PLAIN, "Q8_0")  # that can be written
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # gguf.LlamaFileType
_Q8_0 = 32  # numbers that share a scale of 2 bytes
_F16_MAX = torch.finfo(torch.float16).max
_ROWS_AT_ONCE = 256  # what is quantised or dequantised in one go stays in the cache

_OUTER_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}

# Keys behind "llama.". A key that is in none of the three tables would change the model.
_SIZES = {
    "context_length": "max_seq_len",
    "embedding_length": "dim",
    "block_count": "n_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_HEAD_DIMS = {"rope.dimension_count", "attention.key_length", "attention.value_length"}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # with these values
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.scale": (0,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.finetuned": (False, True),
    "tensor_data_layout": ("Meta AI original pth",),
}


def open_gguf(file: str | os.PathLike[str]) -> Checkpoint:
    """A model of llama.cpp, its vocabulary included; only the header is read.

    F32, F16 and BF16 are mapped as they are; Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the K types become
    float32 when they are read. What a file leaves out has llama.cpp's value: as many KV heads as
    heads, RoPE's base 10,000, an output matrix that is the embedding.

    Raises CheckpointError, naming the file, for one that is damaged, is of another architecture, or
    sets what minillama's Llama does not have (RoPE scaling, experts); ValueError if the library
    gguf is missing.
    Source: the GGUF specification of ggml, version 3. Built in notebooks/16_real_weights.ipynb.
    """
    path = Path(file)
    gguf = _library()
    with _naming(path):
        content = map_file(path)
        header = _Header(content[:_HEADER_LIMIT].numpy().data)
        metadata, tensors = _contents(header, gguf)
        if metadata.get("split.count", 1) not in (0, 1):
            raise ValueError(
                f"it is one of {metadata['split.count']} parts; llama.cpp's "
                f"`llama-gguf-split --merge` makes one file of them"
            )
        start = _padded(header.position, _alignment(metadata))
        _check_places(tensors, start, path.stat().st_size, _alignment(metadata))
        config = _config(metadata, tensors)
        weights = {
            _meta_name(name): _stored(content, start + tensor.offset, tensor)
            for name, tensor in tensors.items()
        }

    def tokenizer() -> Tokenizer:
        with _naming(path):
            return Tokenizer.from_gguf(metadata)

    embedded = "tokenizer.ggml.model" in metadata
    template = metadata.get(_CHAT_TEMPLATE)
    return Checkpoint(
        config,
        weights,
        tokenizer if embedded else None,
        path,
        chat_template=template if isinstance(template, str) else None,
    )


def save_gguf(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    kind: str | None = None,
) -> None:
    """Write one file that llama.cpp runs, with one tensor in memory at a time.

    `kind` is what the matrices become: "F32", "F16", "BF16", or "Q8_0", which is int8 with a scale
    for every 32 numbers of a row; None leaves each as it is stored. Norms are float32 in any case:
    llama.cpp wants them so, and they are few. An earlier file is replaced as a whole.

    Raises ValueError for another kind, for rows that Q8_0 does not divide, for numbers too large
    for F16, and if the library gguf is missing; OSError if the file cannot be written.
    Source: the GGUF specification of ggml, version 3. Built in notebooks/16_real_weights.ipynb.
    """
    gguf = _library()
    if kind is not None:
        kind = known_name("kind of GGUF tensors", kind.upper(), KINDS)
    config = checkpoint.config
    weights = {name: checkpoint.weights[_meta_name(name)] for name in _gguf_names(config)}
    kinds = {name: _kind_of(stored, kind) for name, stored in weights.items()}
    types = {name: gguf.GGMLQuantizationType[kind] for name, kind in kinds.items()}
    shapes = {
        name: _shape_in_bytes(weights[name], gguf.GGML_QUANT_SIZES[types[name]]) for name in types
    }
    metadata = {f"llama.{key}": getattr(config, name) for key, name in _SIZES.items()}
    metadata["llama.rope.dimension_count"] = config.head_dim
    metadata["general.file_type"] = _FILE_TYPES[kinds["token_embd.weight"]]
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    if checkpoint.chat_template is not None:
        metadata[_CHAT_TEMPLATE] = checkpoint.chat_template

    with writing(Path(path), sum(map(math.prod, shapes.values())), replacing_file) as new:
        writer = gguf.GGUFWriter(new, "llama")  # which adds general.architecture
        for key, value in {**metadata, **tokenizer.to_gguf()}.items():
            writer.add_key_value(key, value, _value_type(value, gguf))
        for name, shape in shapes.items():
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), types[name])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, stored in weights.items():
                tensor = stored.read().detach().cpu()
                writer.write_tensor_data(_blocks(name, tensor, kinds[name]))
                stored.release()
        finally:
            writer.close()


@dataclass(frozen=True)
class _Tensor:
    """One entry of the header's list."""

    shape: tuple[int, ...]  # outermost first, as in torch
    kind: Any  # gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the data
    row_bytes: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


class _Header:
    """The values of a header, one after the other.

    Counts and lengths are the file's word, and a damaged file says anything: nothing is allocated
    for values that the header does not have.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0  # bytes

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """`count` numbers, named as in `struct`."""
        start = self._skip(count * struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{count}{code}", self._data, start)

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def strings(self, count: int) -> list[str]:
        found = []
        for _ in range(count):  # a vocabulary has 100,000: no calls of our own in here
            start = self.position + _LENGTH.size
            if start > len(self._data):
                self._skip(_LENGTH.size)
            stop = start + _LENGTH.unpack_from(self._data, self.position)[0]
            if stop > len(self._data):
                self._skip(stop - self.position)
            found.append(str(self._data[start:stop], "utf-8"))
            self.position = stop
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.strings(1)[0]
        if kind != _ARRAY:
            return self.number(_number_code(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self.strings(count)
        return list(self.numbers(_number_code(kind), count))

    def _skip(self, n_bytes: int) -> int:
        """Go on by `n_bytes`; returns where they start."""
        start = self.position
        if n_bytes > len(self._data) - start:
            raise ValueError(
                f"at byte {start} its header announces {n_bytes} bytes, and "
                f"{len(self._data) - start} are there"
            )
        self.position += n_bytes
        return start


def _number_code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a value in its header is of type {kind}, which GGUF does not know")
    return _NUMBERS[kind]


def _contents(header: _Header, gguf: Any) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """All keys with their values, and all tensors by llama.cpp's names."""
    if (magic := bytes(header.numbers("B", 4))) != MAGIC:
        raise ValueError(f"it starts with {magic!r}, a GGUF file with {MAGIC!r}")
    if (version := header.number("I")) not in _VERSIONS:
        raise ValueError(
            f"it is of GGUF's version {version}, and 2 and 3 can be read (of little-endian files). "
            f"Convert the model again with a llama.cpp of today"
        )
    n_tensors, n_keys = header.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.strings(1)[0]
        if key in metadata:
            raise ValueError(f"its key {key!r} stands there twice")
        metadata[key] = header.value(header.number("I"))
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"its architecture is {architecture!r}; minillama reads 'llama'")
    tensors: dict[str, _Tensor] = {}
    for _ in range(n_tensors):
        name = header.strings(1)[0]
        if name in tensors:
            raise ValueError(f"its tensor {name} stands there twice")
        tensors[name] = _entry(name, header, gguf)
    return metadata, tensors


def _entry(name: str, header: _Header, gguf: Any) -> _Tensor:
    n_axes = header.number("I")
    shape = header.numbers("Q", n_axes)[::-1]
    number, offset = header.number("I"), header.number("Q")
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    if names.get(number) not in _PLAIN.keys() | _QUANTISED:
        raise ValueError(
            f"{name} is of type {names.get(number, number)}, and those that can be read are "
            f"{', '.join([*_PLAIN, *sorted(_QUANTISED)])}. llama.cpp's "
            f"`llama-quantize --allow-requantize IN OUT Q8_0` makes one of them"
        )
    kind = gguf.GGMLQuantizationType(number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]  # numbers, bytes
    if not 1 <= len(shape) <= 4 or 0 in shape or shape[-1] % block:
        raise ValueError(
            f"{name} has the shape {shape}: no whole rows of {kind.name}'s blocks of {block}"
        )
    return _Tensor(shape, kind, offset, shape[-1] // block * block_bytes)


def _alignment(metadata: dict[str, Any]) -> int:
    """Tensors start at multiples of it, in bytes."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {alignment!r}, but must be a power of two")
    return alignment


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _check_places(tensors: dict[str, _Tensor], start: int, file_size: int, alignment: int) -> None:
    """Raises ValueError unless the tensors lie one behind the other, inside the file."""
    expected = 0
    for name, tensor in tensors.items():
        if tensor.offset != expected:
            raise ValueError(
                f"{name} starts at byte {tensor.offset} of the data, but the tensors before it "
                f"end at {expected}: it overlaps them, or leaves a gap"
            )
        if start + tensor.offset + tensor.n_bytes > file_size:
            raise ValueError(
                f"{name} ends at byte {start + tensor.offset + tensor.n_bytes}, but the file has "
                f"{file_size}: it is cut off"
            )
        expected += _padded(tensor.n_bytes, alignment)


def _config(metadata: dict[str, Any], tensors: dict[str, _Tensor]) -> LlamaConfig:
    settings = {
        key.removeprefix("llama."): _shortest(value)
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    sizes = {name: settings[key] for key, name in _SIZES.items() if key in settings}
    sizes.setdefault("n_kv_heads", sizes.get("n_heads"))
    sizes.setdefault("rope_theta", 10_000.0)
    if "token_embd.weight" in tensors:
        sizes.setdefault("vocab_size", tensors["token_embd.weight"].shape[0])
    if missing := [key for key, name in _SIZES.items() if name not in sizes]:
        raise ValueError(f"its header lacks llama.{', llama.'.join(missing)}")
    config = LlamaConfig(**sizes, tie_embeddings="output.weight" not in tensors)
    for key, value in settings.items():
        if key in _HEAD_DIMS and value != config.head_dim:
            raise ValueError(
                f"its llama.{key} is {value}, but must be the embedding_length of its heads, "
                f"{config.head_dim}: minillama's heads share dim evenly, and RoPE turns all of it"
            )
        if key not in _SIZES.keys() | _HEAD_DIMS and value not in _WITHOUT_EFFECT.get(key, ()):
            raise ValueError(
                f"its llama.{key} is {value!r}, which minillama's Llama does not have; without it "
                f"the model would say something else"
            )
    return config


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _meta_name(name: str) -> str:
    """Meta's name of a tensor of llama.cpp's."""
    match name.removesuffix(".weight").split("."):
        case [stem] if stem in _OUTER_NAMES:
            return f"{_OUTER_NAMES[stem]}.weight"
        case ["blk", index, stem] if stem in _LAYER_NAMES and index.isdecimal():
            return f"layers.{int(index)}.{_LAYER_NAMES[stem]}.weight"
    raise ValueError(
        f"it has a tensor {name}, which minillama's Llama does not have (biases, scaled RoPE, "
        f"experts); without it the model would say something else"
    )


def _stored(content: Tensor, start: int, tensor: _Tensor) -> Stored:
    """The tensor that starts at byte `start` of the file; if quantised, as float32."""
    if dtype := _PLAIN.get(tensor.kind.name):
        return in_file(content, start, dtype, tensor.shape)
    blocks = in_file(content, start, torch.uint8, (tensor.n_rows, tensor.row_bytes))

    def values(blocks: Tensor) -> Tensor:
        from gguf.quants import dequantize

        rows = np.empty((tensor.n_rows, tensor.shape[-1]), np.float32)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            _by_rows(lambda some: dequantize(some, tensor.kind), blocks.numpy(), rows)
        return torch.from_numpy(rows).view(tensor.shape)

    return computed([blocks], values, tensor.shape, torch.float32)


def _kind_of(stored: Stored, wanted: str | None) -> str:
    """What a tensor is written as."""
    if len(stored.shape) == 1:
        return "F32"
    if wanted is None:
        return next(kind for kind, dtype in _PLAIN.items() if dtype == stored.dtype)
    if wanted == "Q8_0" and stored.shape[-1] % _Q8_0:
        raise ValueError(
            f"A row of this model has {stored.shape[-1]} numbers, and a block of Q8_0 has {_Q8_0}, "
            f"which does not divide it. Write F16."
        )
    return wanted


def _shape_in_bytes(stored: Stored, sizes: tuple[int, int]) -> tuple[int, ...]:
    """`sizes` are a block's, in numbers and in bytes."""
    block, block_bytes = sizes
    return (*stored.shape[:-1], stored.shape[-1] // block * block_bytes)


def _blocks(name: str, tensor: Tensor, kind: str) -> Any:
    """The bytes of a tensor, row by row."""
    dtype = _PLAIN.get(kind)
    if kind in ("F16", "Q8_0") and tensor.dtype != dtype and not (tensor.abs() <= _F16_MAX).all():
        raise ValueError(
            f"{name} has numbers beyond {_F16_MAX:,.0f}, or that are none (NaN), which {kind} does "
            f"not hold. Write BF16 or F32."
        )
    if dtype is not None:
        return tensor.to(dtype).contiguous().view(torch.uint8).numpy()
    from gguf.quants import quantize

    rows = tensor.float().numpy()
    blocks = np.empty((len(rows), rows.shape[1] // _Q8_0 * (_Q8_0 + 2)), np.uint8)
    _by_rows(lambda some: quantize(some, _library().GGMLQuantizationType.Q8_0), rows, blocks)
    return blocks


def _value_type(value: Any, gguf: Any) -> Any:
    """How a value is stored; sizes and ids are unsigned, as llama.cpp asks for."""
    if type(value) is int:
        return gguf.GGUFValueType.UINT32
    return (
        gguf.GGUFValueType.ARRAY
        if isinstance(value, list | tuple)
        else gguf.GGUFValueType.get_type(value)
    )


def _gguf_names(config: LlamaConfig) -> Iterator[str]:
    """llama.cpp's names of all tensors, in its order."""
    yield "token_embd.weight"
    for layer in range(config.n_layers):
        yield from (f"blk.{layer}.{stem}.weight" for stem in _LAYER_NAMES)
    yield "output_norm.weight"
    if not config.tie_embeddings:
        yield "output.weight"


def _by_rows(convert: Callable[[Any], Any], rows: Any, into: Any) -> None:
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        into[some] = convert(rows[some])


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "GGUF files are read and written with the library gguf, which is not installed: "
            "pip install 'minillama[gguf]'"
        ) from None
    return gguf


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Every error about the content of a file names the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}.") from error
