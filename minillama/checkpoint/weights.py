"""A checkpoint before it is read: its config, and where each of its tensors comes from.

The reader of a format makes a `Checkpoint` out of headers alone; `load` and the writers then take
it tensor by tensor. So no weights are ever held twice, and any format becomes any other.
"""

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from minillama.adapt.quantize import empty_linear, quantization_of, quantize_linear
from minillama.checkpoint.folder import CheckpointError
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.plan import InferencePlan, check_fits, free_memory
from minillama.tokenizer import Tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint that has not been read yet.

    `read()` gives it: a view of a file that is mapped into memory, or computed from such views. A
    view may be written to; the file stays as it is. `release()` returns the memory of the mapped
    pages to the system, for who is done with the view or has copied it; the next `read()` maps them
    again, as they are in the file. `convert(dtype, name)` is `converted`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    release: Callable[[], None] = _nothing
    convert: Callable[[torch.dtype, str], "Stored"] | None = None  # None: by reading it first


def map_file(path: Path) -> UInt8[Tensor, " n"]:
    """The bytes of a file, mapped: they are read when they are used, and writes stay in memory."""
    n_bytes = path.stat().st_size
    if n_bytes == 0:  # which cannot be mapped
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=n_bytes, dtype=torch.uint8)


def in_file(
    file: UInt8[Tensor, " n"], start: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Stored:
    """The tensor that lies row by row from byte `start` on in a file mapped by `map_file`.

    The caller has checked that it ends within the file.
    """
    stop = start + torch.Size(shape).numel() * dtype.itemsize
    raw = file[start:stop]

    def read() -> Tensor:
        # A processor may refuse numbers at odd addresses; a copy lies at an even one.
        aligned = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(shape)

    return Stored(shape, dtype, read, lambda: release_pages(raw))


def computed(
    sources: list[Stored],
    function: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> Stored:
    """What `function` makes of the tensors of `sources`.

    Without a `dtype` it only moves numbers, and theirs is the dtype; then they are converted before
    they are moved, which takes less memory. The result must be a copy: the sources' memory is
    released as soon as it is there.
    """

    def read() -> Tensor:
        result = function(*(source.read() for source in sources))
        for source in sources:
            source.release()
        return result

    def convert(wanted: torch.dtype, name: str) -> Stored:
        return computed([converted(source, wanted, name) for source in sources], function, shape)

    if dtype is None:
        return Stored(shape, sources[0].dtype, read, convert=convert)
    return Stored(shape, dtype, read)


def converted(stored: Stored, dtype: torch.dtype | None, name: str) -> Stored:
    """The same tensor in another dtype; None leaves it as it is.

    Reading it raises ValueError, with its `name`, if a number is too large for the dtype.
    """
    if dtype is None or dtype == stored.dtype:
        return stored
    if stored.convert:
        return stored.convert(dtype, name)

    def convert(tensor: Tensor) -> Tensor:
        result = tensor.to(dtype)
        ends = torch.stack(result.aminmax())
        if not ends.isfinite().all() and (result.isinf() & tensor.isfinite()).any():
            raise ValueError(
                f"{name} has numbers up to {tensor.abs().max():,.0f}, and {dtype} ends at "
                f"{torch.finfo(dtype).max:,.0f}: they would become infinite. Take bfloat16, which "
                f"has the range of float32, or the dtype in which they are stored."
            )
        return result

    return computed([stored], convert, stored.shape, dtype)


def n_bytes(stored: Stored) -> int:
    """How many bytes the tensor takes."""
    return torch.Size(stored.shape).numel() * stored.dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, row by row, as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def release_pages(mapped: Tensor) -> None:
    """Return the memory of the whole pages within a view of a mapped file to the system.

    Only of a view of `map_file` or of ``torch.load(mmap=True)``: those pages can be read again,
    where other memory would come back as zeros. Pages that it shares with a neighbour are left.
    Windows trims what is mapped by itself, and has no such call.
    """
    if sys.platform == "win32":
        return
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
        ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Checkpoint:
    """A model and what comes with it, in any format, before the weights are read.

    `weights` are under Meta's names and in Meta's order of the rows of wq and wk; a tied head has
    no `output.weight`. `tokenizer` opens the tokenizer that comes with them; None if none does.
    Where `quantization` says how (`adapt.quantize.quantization_of`), the linear layers are in few
    bits, and `weights` hold their codes and scales. `chat_template` is a program, in Jinja, that
    came with the model: it is passed on to the formats that have a place for it, and never run.

    Raises CheckpointError, naming `path`, unless names, shapes and dtypes make a model of `config`.
    """

    config: LlamaConfig
    weights: Mapping[str, Stored]
    tokenizer: Callable[[], Tokenizer] | None
    path: Path
    quantization: dict[str, Any] | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        found = {name: stored.shape for name, stored in self.weights.items()}
        if self.config.n_layers > len(found):
            raise CheckpointError(
                f"{self.path}: the config has {self.config.n_layers} layers, but there are only "
                f"{len(found)} tensors. They belong to different models, or files are missing."
            )
        if self.config.n_parameters > 2**60:  # PyTorch cannot count the bytes of more
            raise CheckpointError(
                f"{self.path}: no model can have these sizes: {self.config}. They are damaged."
            )
        state = empty_llama(self.config, self.quantization).state_dict()
        if self.config.tie_embeddings:
            state.pop("output.weight", None)
        needed = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if needed != found:
            wrong = sorted(needed.items() ^ found.items())
            name = wrong[0][0]
            raise CheckpointError(
                f"{self.path}: the config and the weights disagree about {name}: the config needs "
                f"{needed.get(name, 'no such tensor')}, the file has {found.get(name, 'none')} "
                f"({len({name for name, _ in wrong})} tensors differ). They belong to different "
                f"models."
            )
        for name, stored in self.weights.items():
            # Codes and scales are of one dtype only, or the products would not take them.
            possible = DTYPES if name.endswith(".weight") else (state[name].dtype,)
            if stored.dtype not in possible:
                raise CheckpointError(
                    f"{self.path}: {name} is of {stored.dtype}, which no weight can be: it must be "
                    f"of {' or '.join(map(str, possible))}."
                )


def checkpoint_of(model: Llama, path: Path) -> Checkpoint:
    """A model in memory as a checkpoint to write."""
    weights = {name: _in_memory(tensor) for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        weights.pop("output.weight", None)  # it is tok_embeddings.weight
    return Checkpoint(model.config, weights, None, path, quantization_of(model))


def llama_from(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Llama:
    """Read a model, tensor by tensor: nothing but the result and one tensor is ever in memory.

    On a CPU and in the stored dtype the weights stay mapped: they are read when they are used.
    With `dtype` None all are of the dtype in which most numbers are stored. `quantize` puts the
    linear layers into few bits, each as soon as it is read.
    Raises ValueError if they are so already, and for numbers too large for `dtype`.
    """
    if quantize and checkpoint.quantization:
        raise ValueError(
            f"{checkpoint.path} holds weights in {checkpoint.quantization['kind']} already, and "
            f"what they lost is not regained: load it as it is, or load the model it was made of."
        )
    dtype = dtype or main_dtype(checkpoint)
    model = empty_llama(checkpoint.config, checkpoint.quantization)
    parameters = {name for name, _ in model.named_parameters()}
    left, weights = dict(checkpoint.weights), {}
    for name, layer in list(model.named_modules()) if quantize else ():
        if isinstance(layer, nn.Linear):
            stored = left.pop(f"{name}.weight", None) or left["tok_embeddings.weight"]
            _replace(model, name, quantize_linear(stored.read().to(device), str(quantize)))
            stored.release()
    for name, stored in left.items():
        wanted = converted(stored, dtype if name in parameters else None, name)
        tensor = wanted.read()
        weights[name] = tensor.to(device)
        if weights[name] is not tensor:
            wanted.release()
    model.load_state_dict(weights, assign=True, strict=False)  # Checkpoint has looked at the names
    if checkpoint.config.tie_embeddings and isinstance(model.output, nn.Linear):
        model.output.weight = model.tok_embeddings.weight
    return model


def model_from(config: LlamaConfig, weights: Mapping[str, Tensor], source: object) -> Llama:
    """A Llama around these weights, without copying them; a tied head may be left out.

    Raises CheckpointError, naming `source`, unless names, shapes and dtypes make such a model.
    """
    stored = {name: _in_memory(tensor) for name, tensor in weights.items()}
    if config.tie_embeddings:
        stored.pop("output.weight", None)
    return llama_from(Checkpoint(config, stored, None, Path(str(source))))


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which most of the numbers are stored; of those that are no codes and scales."""
    if checkpoint.quantization:
        return checkpoint.weights["tok_embeddings.weight"].dtype
    numbers: Counter[torch.dtype] = Counter()
    for stored in checkpoint.weights.values():
        numbers[stored.dtype] += torch.Size(stored.shape).numel()
    return numbers.most_common(1)[0][0]


def check_room(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> None:
    """Raises ValueError, with numbers and ways out, if what `llama_from` reads does not fit."""
    kind = quantize or (checkpoint.quantization or {}).get("kind")
    name = str(dtype or main_dtype(checkpoint)).removeprefix("torch.")
    plan = InferencePlan(config=checkpoint.config, seq_len=1, dtype=name, quantize=kind)
    check_fits(plan, free_memory(str(device)))


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError unless model and tokenizer have equally many tokens."""
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            f"they do not belong together, and the text would be gibberish. "
            f"Name the model's own tokenizer."
        )


def config_of(path: Path, sizes: Any) -> LlamaConfig:
    """The LlamaConfig of these fields, as a file of JSON has them.

    Raises CheckpointError, naming `path`, if they cannot be.
    """
    kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
    try:
        for field in fields(LlamaConfig) if isinstance(sizes, dict) else ():
            value = sizes.get(field.name)
            if field.name in sizes and type(value) not in kinds[field.type]:
                kind = getattr(field.type, "__name__", "")
                raise ValueError(f"{field.name} is {value!r}, but must be of type {kind}.")
        return LlamaConfig.from_dict(sizes)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is no config of a model: {error}") from error


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model of this config, by name."""
    return {name: tuple(tensor.shape) for name, tensor in empty_llama(config).state_dict().items()}


def empty_llama(config: LlamaConfig, quantization: dict[str, Any] | None = None) -> Llama:
    """A model whose parameters have shapes and no memory; its linear layers maybe in few bits."""
    with torch.device("meta"):
        model = Llama(config)
    for name, layer in list(model.named_modules()) if quantization else ():
        if isinstance(layer, nn.Linear):
            settings: dict[str, Any] = quantization or {}
            sizes: dict[str, Any] = {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
            }
            _replace(model, name, empty_linear(**settings, **sizes))
    return model


def _replace(model: Llama, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _in_memory(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)
