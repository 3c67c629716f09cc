"""Files that hold named tensors and nothing that could be executed: a header in JSON, then bytes.

    8 bytes   the length of the header
    header    {name: {"dtype", "shape", "data_offsets": [start, stop] behind the header}, ...}
    tensors   row by row, little-endian, without gaps

The library of the same name checks the header; tensors are mapped here, one by one, and written
one by one, where the library wants all of them at once.
"""

import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minillama.checkpoint.folder import CheckpointError, what_it_is
from minillama.checkpoint.weights import Stored, in_file, map_file, n_bytes, raw_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file, mapped into memory, not read.

    Raises CheckpointError, naming the file, if its header is damaged or does not fit its length, or
    if a tensor is of a kind that minillama has no use for.
    """
    try:
        with safe_open(path, "pt"):
            pass  # the library has checked that the tensors fill the file, without overlaps
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file: {error}{what_it_is(path)}."
        ) from error
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    file, tensors = map_file(path), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of {entry['dtype']}, but minillama reads {', '.join(DTYPES)}. "
                f"Export the model in one of these, for example in BF16."
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = in_file(file, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def save_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a file, with one tensor in memory at a time; equal tensors make equal files.

    Raises OSError if it cannot be written.
    """
    # The widest numbers first: so all lie at multiples of their size, as processors like it.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    stops = list(accumulate(n_bytes(tensors[name]) for name in order))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    for name, start, stop in zip(order, [0, *stops], stops, strict=False):
        stored = tensors[name]
        header[name] = {
            "dtype": _NAMES[stored.dtype],
            "shape": stored.shape,
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors start at a multiple of 64, so that kernels can read most of them where they lie.
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(raw_bytes(tensors[name].read()))
            tensors[name].release()
