"""Real text: local files as documents."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from minillama.data.documents import read_jsonl


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


@dataclass(frozen=True)
class JsonLines:
    """The texts of a JSON-lines file, read anew by each loop, one at a time in memory.

    Every tenth document is held out for validation: `held_out` says whether these are the ones.
    """

    path: Path
    held_out: bool = False

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(read_jsonl(self.path)):
            if (number % 10 == 9) == self.held_out:
                yield document.text


def read_mixture(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Iterable[str]], Iterable[str]]:
    """The sources of a folder that `minillama curate` wrote, by name, and what is held out of all.

    A source is a file NAME.jsonl. Raises OSError or ValueError if there is none.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no source: no file NAME.jsonl. `minillama curate --out FOLDER` makes "
            f"such a folder; for plain text use --text."
        )
    held_out = _Chain(tuple(JsonLines(path, held_out=True) for path in paths))
    return {path.stem: JsonLines(path) for path in paths}, held_out


@dataclass(frozen=True)
class _Chain:
    """Several corpora, one after the other, as often as they are asked for."""

    parts: tuple[Iterable[str], ...]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.parts)


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
