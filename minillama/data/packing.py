"""Documents to a stream of token ids, in memory or on disk; the stream to rows, rows to batches."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from minillama.tokenizer import Tokenizer

IGNORE = -100  # a target that does not count: the one masking mechanism of all training here


@dataclass(frozen=True)
class Batch:
    """Token ids and, at each position, the id that should come next (or `IGNORE`).

    With `positions`, a row holds several documents that know nothing of each other: each is counted
    from 0 on. Without, a row is one text.
    """

    tokens: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"] | None = None

    @property
    def n_targets(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), positions)


# --- A stream in memory ---------------------------------------------------------------------------


def pack(
    documents: Iterable[Sequence[int]], seq_len: int, vocab_size: int
) -> UInt[np.ndarray, "rows row_len"]:
    """Join the documents to one stream and cut it into rows of seq_len + 1 ids.

    Neighbouring rows share one id: the last target of a row is the first token of the next, so
    every id of the stream but the first is a target exactly once. Nothing is padded; documents are
    told apart by their BOS and EOS alone, as in the papers' pretraining. The rest that fills no row
    is dropped.

    Raises ValueError if the stream is shorter than one row, or holds ids outside the vocabulary.
    Source: Touvron et al. 2023a, sec. 2. Shown in notebooks/00_tour.ipynb.
    """
    stream = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    rows = _rows(stream, seq_len)
    if stream.min() < 0 or stream.max() >= vocab_size:
        raise ValueError(
            f"The token ids lie between {stream.min()} and {stream.max()}, but the vocabulary has "
            f"the ids 0 to {vocab_size - 1}. Encode the text with the model's own tokenizer."
        )
    return rows.astype(_dtype(vocab_size))


def _rows(stream: np.ndarray, seq_len: int) -> np.ndarray:
    """Row i is stream[i * seq_len : i * seq_len + seq_len + 1]: a window, not a copy."""
    if len(stream) <= seq_len:
        raise ValueError(
            f"The text has {len(stream)} tokens, but one row takes {seq_len + 1} (seq_len + 1). "
            f"Give more text, or a seq_len of at most {max(len(stream) - 1, 1)}."
        )
    return sliding_window_view(stream, seq_len + 1)[::seq_len]


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# --- A stream on disk -----------------------------------------------------------------------------

HEADER_SIZE = 512  # bytes, of which the first 8 say how long the rest is
MIN_PART, MAX_PART = 2**10, 2**16  # characters encoded as one text
BLOCK = 2**20  # characters, or a few more, of which ids are in memory at a time
GUARD = "\0"  # no vocabulary has a piece with it: what follows is encoded as in mid-text
WORD_END = re.compile("[^ \n](?=[ \n])")


def write_tokens(
    path: str | os.PathLike[str], documents: Iterable[str], tokenizer: Tokenizer
) -> int:
    """Encode the documents, each between BOS and EOS, into one file of ids; returns their number.

    There is no BOS where the model's texts have none (`Tokenizer.adds_bos`).

    Memory is constant: the documents are taken one by one, and the ids written block by block. A
    document of more than 1,024 characters is encoded in parts, cut at ends of words and lines (in a
    stretch without any, after 65,536 characters). The cuts depend on the document alone, and no
    piece of LLaMA's reaches over the end of a word: so the ids are those of
    `tokenizer.encode(document, bos=True, eos=True)`, and in a longer stretch without any space
    still those of the same text.

    The file is a safetensors file with the one tensor "ids", uint16 where the vocabulary allows it,
    else uint32; its metadata state the vocabulary's size and the SHA-256 of the ids. It is written
    under another name and renamed at the end: `path` is whole or as it was before.

    Raises ValueError if there are no documents, and OSError if the file cannot be written.
    Source: Touvron et al. 2023a, sec. 2. Built in notebooks/07_data.ipynb.
    """
    path, n_ids, digest = Path(path), 0, hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(bytes(HEADER_SIZE))
            for ids in _encoded(documents, tokenizer):
                file.write(ids.data)
                digest.update(ids.data)
                n_ids += len(ids)
            if n_ids == 0:
                raise ValueError(f"There are no documents to write to {path}: give at least one.")
            file.seek(0)
            file.write(_header(n_ids, tokenizer.vocab_size, digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise OSError(f"{path} was not written ({error}); nothing was changed.") from error
    finally:
        new.unlink(missing_ok=True)
    return n_ids


def open_rows(
    path: str | os.PathLike[str], seq_len: int, vocab_size: int, verify: bool = True
) -> UInt[np.ndarray, "rows row_len"]:
    """The ids that `write_tokens` wrote, as `pack` would cut them, read from the disk when used.

    Opening reads the file once to compare its SHA-256, block by block (about a second per GB);
    where many processes open one file, all but the first may leave that out with ``verify=False``.

    Raises OSError if there is no such file; ValueError, naming it, if it is anything else, has lost
    its end, was changed in any byte, has ids of another vocabulary or too few for one row.
    Built in notebooks/07_data.ipynb.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of token ids {path}: `write_tokens` makes one.")
    with path.open("rb") as file:
        header = file.read(HEADER_SIZE)
        try:
            fields = json.loads(header[8:])
            (n_ids,), metadata = fields["ids"]["shape"], fields["__metadata__"]
            vocabulary, digest = int(metadata["vocab_size"]), metadata["sha256"]
            intact = header == _header(n_ids, vocabulary, digest)
        except (ValueError, LookupError, TypeError):
            intact = False
        if not intact:
            raise ValueError(
                f"{path} is no file of token ids, or its first {HEADER_SIZE} bytes are damaged. "
                f"Write it again with `write_tokens`."
            )
        if vocabulary != vocab_size:
            raise ValueError(
                f"{path} holds ids of a vocabulary of {vocabulary}, but {vocab_size} are asked "
                f"for: the same ids mean other pieces there. Encode the text with the model's own "
                f"tokenizer."
            )
        dtype = _dtype(vocabulary)
        size, needed = path.stat().st_size, HEADER_SIZE + n_ids * dtype.itemsize
        if size != needed:
            raise ValueError(
                f"{path} has {size:,} bytes, but its {n_ids:,} ids take {needed:,}: a part of it "
                f"is missing, or is not its own. Copy it again, or write it with `write_tokens`."
            )
        if verify and hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(
                f"{path} is damaged: the SHA-256 of its ids is not the one that it states. Copy it "
                f"again, or write it with `write_tokens`."
            )
    return _rows(np.memmap(path, dtype, mode="r", offset=HEADER_SIZE, shape=(n_ids,)), seq_len)


def _header(n_ids: int, vocab_size: int, digest: str) -> bytes:
    """How a safetensors file starts: the length of the JSON text that follows, and that text."""
    dtype = _dtype(vocab_size)
    span = [0, n_ids * dtype.itemsize]  # bytes, after the header
    fields = {
        "__metadata__": {"vocab_size": str(vocab_size), "sha256": digest},
        "ids": {"dtype": f"U{8 * dtype.itemsize}", "shape": [n_ids], "data_offsets": span},
    }
    text = json.dumps(fields).encode().ljust(HEADER_SIZE - 8)
    return len(text).to_bytes(8, "little") + text


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The stream of ids, block by block."""
    n_guard = len(tokenizer.encode(GUARD))
    bos, eos = [tokenizer.bos_id] * tokenizer.adds_bos, [tokenizer.eos_id]
    dtype = _dtype(tokenizer.vocab_size)
    for block in _blocks(chain.from_iterable(map(_parts, documents))):
        rows = tokenizer.encode_batch(text if first else GUARD + text for text, first, _ in block)
        framed = (
            (bos if first else []) + ids[0 if first else n_guard :] + (eos if last else [])
            for ids, (_, first, last) in zip(rows, block, strict=True)
        )
        yield np.fromiter(chain.from_iterable(framed), dtype)


Part = tuple[str, bool, bool]  # a text; does the document start with it, does it end with it?


def _parts(document: str) -> Iterator[Part]:
    """A document in parts that can be encoded one by one."""
    start, end = 0, -1  # so that an empty document is one part, too
    while end < len(document):
        word_end = WORD_END.search(document, start + MIN_PART, start + MAX_PART)
        end = word_end.end() if word_end else min(start + MAX_PART, len(document))
        yield document[start:end], start == 0, end == len(document)
        start = end


def _blocks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """As many parts together as make a block."""
    block, size = list[Part](), 0
    for part in parts:
        block.append(part)
        size += len(part[0]) + 1  # many empty documents fill a block, too
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


# --- Batches --------------------------------------------------------------------------------------


def batches(rows: UInt[np.ndarray, "rows row_len"], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of rows without end; each epoch shows every row once, in an order of its own.

    The order is a function of the seed and the epoch alone. A batch may reach into the next epoch,
    so no row is left out. It is a mixture of one source: `Batches` takes several, and resumes.
    """
    from minillama.data.mixture import Batches  # here, because it imports Batch from this module

    return Batches({"rows": rows}, {"rows": 1.0}, batch_size, seed)


def as_batch(rows: UInt[np.ndarray, "batch row_len"]) -> Batch:
    """Rows of seq_len + 1 ids as seq_len tokens and, one place on, their targets."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(tokens=ids[:, :-1], targets=ids[:, 1:])
