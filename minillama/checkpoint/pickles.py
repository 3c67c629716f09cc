"""PyTorch's own files of tensors (.pth, .bin): an archive of a pickle and of each tensor's bytes.

A pickle is a program, and reading a stranger's runs it. PyTorch's `weights_only` runs nothing but
the building of tensors, and refuses the rest; nothing here reads a pickle in any other way.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.checkpoint.folder import CheckpointError, what_it_is
from minillama.checkpoint.weights import Stored, raw_bytes, release_pages

_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64  # bytes at whose multiples the tensors lie in the archive, as in PyTorch's files


def open_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a file that `torch.save` wrote, mapped into memory, not read.

    Files from before PyTorch 1.6 are no archives, and are read as a whole.
    Raises CheckpointError, naming the file, if it is damaged, would execute anything, or holds
    anything but named tensors.
    """
    path.open().close()  # or an OSError says why not
    try:
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:  # whatever a damaged program does
        reason = _reason(error)
        if reason.startswith("Unsupported global") or reason.startswith("Unsupported class"):
            raise CheckpointError(
                f"{path} would execute code, and was not read: its pickle asks for more than "
                f"tensors ({reason}). Take the weights from a source you trust, as .safetensors."
            ) from error
        raise CheckpointError(
            f"{path} is no whole file of PyTorch's: {reason}{what_it_is(path)}. Download or copy "
            f"it again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name.")
    for name, tensor in found.items():
        if not _is_plain(name, tensor):
            raise CheckpointError(f"{path}: {name!r} is no plain tensor, as every weight must be.")
    return {name: _stored(tensor.detach(), mapped) for name, tensor in found.items()}


def _is_plain(name: Any, tensor: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )


def _stored(tensor: Tensor, mapped: bool) -> Stored:
    shape = tuple(tensor.shape)
    if mapped and tensor.is_contiguous():  # then it is alone in its pages
        return Stored(shape, tensor.dtype, lambda: tensor, lambda: release_pages(tensor))
    return Stored(shape, tensor.dtype, tensor.contiguous)


def _reason(error: Exception) -> str:
    """What PyTorch says, without its advice to execute the file all the same."""
    _, _, detail = str(error).partition("WeightsUnpickler error: ")
    return ((detail or str(error)).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class PickleWriter:
    """Writes named tensors one by one, as `torch.save` would write them all at once.

    >>> with PickleWriter(path, {"w": stored}) as file:
    ...     file.write(tensor)

    `write` takes them in the order of `tensors`, whose shapes and dtypes alone are looked at.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored]) -> None:
        self._todo = list(enumerate(tensors.values()))[::-1]
        self._files = ExitStack()
        self._zip = self._files.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED))
        self._record("data.pkl", _pickled(tensors))
        self._record("byteorder", b"little")

    def __enter__(self) -> "PickleWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._record("version", b"3\n")
        self._files.close()

    def write(self, tensor: Tensor) -> None:
        index, stored = self._todo.pop()
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise AssertionError(f"{tensor.dtype} {tuple(tensor.shape)} is not {stored}")
        self._record(f"data/{index}", raw_bytes(tensor))

    def _record(self, name: str, content: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")  # of 1980, so that equal weights are equal bytes
        start = self._zip.start_dir + 30 + len(info.filename) + 4  # behind its header
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._zip.writestr(info, content)


class _Storage:
    """Stands for the bytes of a tensor within the pickle."""

    def __init__(self, key: str, stored: Stored) -> None:
        self.key, self.stored = key, stored


class _Tensor:
    """Stands for a tensor within the pickle: what PyTorch calls to build it again."""

    def __init__(self, key: str, stored: Stored) -> None:
        self.storage = _Storage(key, stored)

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.stored.shape
        stride = torch.empty(shape, device="meta").stride()
        hooks: dict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return None
        numbers = torch.Size(thing.stored.shape).numel()
        return "storage", _STORAGES[thing.stored.dtype], thing.key, "cpu", numbers


def _pickled(tensors: Mapping[str, Stored]) -> bytes:
    content = io.BytesIO()
    named = {name: _Tensor(str(i), stored) for i, (name, stored) in enumerate(tensors.items())}
    _Pickler(content, protocol=2).dump(named)
    return content.getvalue()
