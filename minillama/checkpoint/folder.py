"""Folders that are whole or not there, with the SHA-256 of everything inside."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
_TEXT_THAT_IS_NO_FILE = (b"<!doctype", b"<html", b"<?xml", b"version https://git-lfs")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or must not be overwritten; the text names the file."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; at the end it takes the place of `folder`, or nothing has changed.

    It is `unfinished(folder)`, beside it; everything is summed and flushed to the disk before it is
    renamed, so a crash, a full disk or a kill at any moment leaves what was there before. What an
    earlier kill left behind is removed. Two at a time must not write the same folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = unfinished(folder), _earlier(folder)
    try:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        new.mkdir()
        yield new
        write_sums(new)
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


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """A new file to write; at the end it takes the place of `file`, or nothing has changed.

    As `replacing`, for formats that are a single file and have no place for sums.
    Raises CheckpointError if `file` is a folder, or anything else that is no file.
    """
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, and a file is to be written. Name one in it.")
    if os.path.lexists(file) and not file.is_file():
        raise CheckpointError(
            f"{file} is no file, but a device, a pipe or a link that leads nowhere, and would be "
            f"lost. Name a new file."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    new = unfinished(file)
    try:
        yield new
        _flush(new)
        new.replace(file)
        _flush(file.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def writing(
    path: Path,
    n_bytes: int,
    replace: Callable[[Path], AbstractContextManager[Path]] = replacing,
) -> Iterator[Path]:
    """`replacing`, or `replacing_file`, for about `n_bytes`.

    Raises OSError, which says that nothing was changed, if the disk has no room for them or
    refuses to write.
    """
    check_disk(path, n_bytes)
    with replace(path) as new:
        try:
            yield new
        except OSError as error:
            raise OSError(f"{path} could not be written ({error}); nothing was changed.") from error


def check_disk(path: Path, n_bytes: int) -> None:
    """Raises OSError unless the disk of `path` has room for `n_bytes` more."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{path} cannot be written: {there} is a file, and no folder. Name another place."
        )
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {n_bytes / 1e9:,.2f} GB, but its disk has {free / 1e9:,.2f} GB left: "
            f"nothing was written. Free some, or name a place on another disk",
        )


def check_new(path: Path) -> None:
    """Raises CheckpointError if anything but an empty folder is at `path`: it would be lost."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is not overwritten. Name a place where nothing is yet."
        )


def check_holds_only(folder: Path, files: Iterable[str], what: str) -> None:
    """Raises CheckpointError if `what` is to replace a folder that holds anything but `files`."""
    found = folder.iterdir() if folder.is_dir() else ()
    foreign = sorted(path.name for path in found if path.name not in files)
    if foreign or (os.path.lexists(folder) and not folder.is_dir()):
        raise CheckpointError(
            f"{folder} is not replaced by {what}: "
            f"{'it holds ' + ', '.join(foreign[:3]) if foreign else 'it is a file'}, which would "
            f"be lost. Name a new or an empty folder."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the file, if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON: {error}{what_it_is(path)}. Download or copy it again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {str(values)[:50]!r} in place of named settings.")
    return values


def what_it_is(path: Path) -> str:
    """Why a file is no model, where that can be seen: " (...)", or "" if it cannot."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start.strip(b"\0"):
        return " (it is empty, or starts with zeros: the download failed; start it again)"
    if start.startswith(_TEXT_THAT_IS_NO_FILE):
        return (
            " (it is a message or a pointer in place of the file: the download failed; the link "
            "may have expired, or the file lies in Git LFS; download it again)"
        )
    return ""


def unfinished(folder: Path) -> Path:
    """Where a folder, or a file, is written before it takes its place."""
    return folder.with_name(f".{folder.name}.new")


def interrupted_save(folder: Path) -> Path | None:
    """The earlier version of `folder`, if the process died while it was being replaced."""
    old = _earlier(folder)
    return old if old.exists() and not folder.exists() else None


def checksum(path: Path, kind: str = "sha256") -> str:
    """The SHA-256 of a file, or its MD5, which shows accidents and no malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def write_sums(folder: Path) -> None:
    """Write the sums of all files in `folder`; `sha256sum -c SHA256SUMS` reads them too."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text("".join(f"{checksum(path)}  {path.name}\n" for path in files))


def verify_sums(folder: Path, needed: Iterable[str], up_to: float = math.inf) -> None:
    """Raises CheckpointError, naming the file, if one that has a sum is missing or was changed.

    `needed` are the names that must have one. Files of more than `up_to` bytes are only looked for.
    """
    lines = (folder / SUMS).read_text(errors="replace").removesuffix("\n").split("\n")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    absent = [name for name in expected if not (folder / name).is_file()]
    if not set(needed) <= set(expected) or absent:
        raise CheckpointError(
            f"{folder / SUMS} is damaged, or files are missing: it has the sums of "
            f"{sorted(expected)}, but needs those of {sorted(needed)}"
            f"{'; not there: ' + ', '.join(absent) if absent else ''}. Copy the checkpoint again."
        )
    for name, digest in expected.items():
        if (folder / name).stat().st_size <= up_to and checksum(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is damaged or was changed: its SHA-256 is not the one in {SUMS}. "
                f"Copy the checkpoint again. If you changed it on purpose: sha256sum "
                f"{' '.join(expected)} > {SUMS}"
            )


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
