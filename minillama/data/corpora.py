"""Real text: local files as documents."""

import os
from collections.abc import Iterable
from pathlib import Path


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises OSError or ValueError, naming the file, if it is missing, empty or not text.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the text files in it, e.g. {path}/*.txt")
    if not path.exists():
        raise FileNotFoundError(f"There is no text file {path}.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. If it is "
            f"text in another encoding, convert it: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path} is a binary file, not text: character {text.index(chr(0))} is NUL. "
            f"Name plain text files."
        )
    if not text.strip():
        raise ValueError(f"{path} is empty: there is nothing to learn from.")
    return text


def read_documents(paths: Iterable[str | os.PathLike[str]], by_line: bool = False) -> list[str]:
    """Each file is one document; or, `by_line`, each line that is not blank."""
    texts = [read_text(path) for path in paths]
    if not by_line:
        return texts
    return [line for text in texts for line in text.splitlines() if line.strip()]


def hold_out(documents: list[str], share: float = 0.1) -> tuple[list[str], list[str]]:
    """Split off the last `share` of the characters for validation; a document may be cut in two."""
    rest = round(sum(map(len, documents)) * share)
    kept, held_out = list(documents), list[str]()
    while rest > 0 and kept:
        last = kept.pop()
        cut = max(len(last) - rest, 0)
        held_out.insert(0, last[cut:])
        if cut:
            kept.append(last[:cut])
        rest -= len(last) - cut
    return kept, held_out
