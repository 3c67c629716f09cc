"""Folders that are whole or not there, with the SHA-256 of everything inside."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SUMS = "SHA256SUMS"


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
    Raises CheckpointError if `file` is a folder.
    """
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, and a file is to be written. Name one in it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    new = unfinished(file)
    try:
        yield new
        _flush(new)
        new.replace(file)
        _flush(file.parent)
    finally:
        new.unlink(missing_ok=True)


def unfinished(folder: Path) -> Path:
    """Where a folder, or a file, is written before it takes its place."""
    return folder.with_name(f".{folder.name}.new")


def interrupted_save(folder: Path) -> Path | None:
    """The earlier version of `folder`, if the process died while it was being replaced."""
    old = _earlier(folder)
    return old if old.exists() and not folder.exists() else None


def write_sums(folder: Path) -> None:
    """Write the sums of all files in `folder`; `sha256sum -c SHA256SUMS` reads them too."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    (folder / SUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files))


def verify_sums(folder: Path, needed: Iterable[str]) -> None:
    """Raises CheckpointError, naming the file, if one that has a sum is missing or was changed.

    `needed` are the names that must have one.
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
        if _sha256(folder / name) != digest:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
