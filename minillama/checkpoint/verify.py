"""Whether a checkpoint is whole: everything that can be known without running the model."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillama.checkpoint import open_checkpoint, open_tokenizer
from minillama.checkpoint.fetch import CATALOGUE, RemoteFile
from minillama.checkpoint.folder import (
    SUMS,
    CheckpointError,
    checksum,
    verify_sums,
    what_it_is,
)
from minillama.checkpoint.hub import local_path
from minillama.checkpoint.weights import Checkpoint, check_vocabulary, main_dtype, n_bytes

CHECKLIST, TOKENIZER_LIST = "checklist.chk", "tokenizer_checklist.chk"  # Meta's, of MD5 sums


def verify(
    path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> Iterator[str]:
    """Check all of a checkpoint of any format; yields a line for each thing that is right.

    The sums of whole files: SHA256SUMS or Meta's checklist.chk beside it, or those of a model that
    is named as in `minillama fetch`. That names and shapes of the tensors are the config's, that
    every number is finite, and that the tokenizer has the model's vocabulary. All weights are read,
    one at a time.

    Raises what `open_checkpoint` raises, and CheckpointError for the first thing that is wrong; a
    download that failed is told apart from a file that was changed.
    """
    of_catalogue = not Path(path).exists() and CATALOGUE.get(os.fspath(path))
    path = local_path(path)
    if of_catalogue:
        yield _verify_fetched(path if path.is_dir() else path.parent, of_catalogue.files)
    lists = [path / SUMS, path / CHECKLIST, *(p / TOKENIZER_LIST for p in (path, path.parent))]
    sums = [place for place in lists if path.is_dir() and place.is_file()]
    for place in sums:
        yield _verify_sums(place)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    yield (
        f"{len(checkpoint.weights)} tensors have the names and shapes of {config.n_layers} layers "
        f"of width {config.dim}: {config.n_parameters:,} parameters in {_precision(checkpoint)}."
    )
    _check_finite(checkpoint)
    total, stored = sum(map(n_bytes, checkpoint.weights.values())), _packed_bytes(checkpoint)
    packed = f" ({stored / 1e6:,.1f} MB in the file)" if stored else ""
    yield f"All numbers are finite, in {total / 1e6:,.1f} MB of weights{packed}."
    if not sums and not of_catalogue:
        yield "No sums lie beside it: a number that was changed may look like any other."
    tok = open_tokenizer(checkpoint, tokenizer)
    check_vocabulary(config, tok)
    yield f"The tokenizer has {tok.vocab_size:,} tokens, as many as the embeddings have rows."


def _verify_fetched(folder: Path, files: Iterable[RemoteFile]) -> str:
    names = [file.name for file in files]
    for file in files:
        if checksum(folder / file.name) != file.sha256:
            raise CheckpointError(
                f"{folder / file.name} is damaged or was changed: its SHA-256 is not the one of "
                f"`minillama fetch`. Delete it, and fetch it again."
            )
    return f"{', '.join(names)} in {folder}: the SHA-256 is the one of `minillama fetch`."


def _verify_sums(place: Path) -> str:
    if place.name != SUMS:
        return f"{_verify_checklist(place)} files have the MD5 that {place} says."
    verify_sums(place.parent, ())
    return f"{len(place.read_text().splitlines())} files have the SHA-256 that {place} says."


def _verify_checklist(checklist: Path) -> int:
    """How many files have the sum that they should have. Raises CheckpointError for another."""
    lines = [line.split() for line in checklist.read_text(errors="replace").splitlines() if line]
    if not lines or any(len(line) != 2 or len(line[0]) != 32 for line in lines):
        raise CheckpointError(
            f"{checklist} is no list of MD5 sums and names{what_it_is(checklist)}. Download it "
            f"again."
        )
    for digest, name in lines:
        file = checklist.parent / Path(name.lstrip("*")).name  # beside it, whatever the list says
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: {checklist.name} lists it. Its download failed, or it was not "
                f"copied."
            )
        if reason := what_it_is(file):
            raise CheckpointError(f"{file} is not what {checklist.name} lists{reason}.")
        if checksum(file, "md5") != digest:
            raise CheckpointError(
                f"{file} is damaged or was changed: it has {file.stat().st_size:,} bytes, and "
                f"their MD5 is not the one in {checklist.name}. If it is shorter than it was at "
                f"its source, the download was cut off; else a bit was. Download it again."
            )
    return len(lines)


def _check_finite(checkpoint: Checkpoint) -> None:
    bad = {}
    for name, stored in checkpoint.weights.items():
        if stored.dtype.is_floating_point:
            tensor = stored.read()
            n_nan, n_inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            if n_nan or n_inf:
                bad[name] = f"{name} has {n_nan} NaN and {n_inf} inf of {tensor.numel()} numbers"
            stored.release()
    if bad:
        more = f"; {len(bad) - 3} more tensors have such" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.path}: {'; '.join([*bad.values()][:3])}{more}. Any text would become "
            f"NaN: the training diverged, the numbers left the range of {main_dtype(checkpoint)}, "
            f"or the file is damaged. Take an earlier checkpoint, or copy it again."
        )


def _precision(checkpoint: Checkpoint) -> str:
    if checkpoint.quantization:
        return str(checkpoint.quantization["kind"])
    dtype = str(main_dtype(checkpoint)).removeprefix("torch.")
    return f"few bits, read as {dtype}" if _packed_bytes(checkpoint) else dtype


def _packed_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of a file that holds its numbers in few bits (GGUF's Q types, llama2.c's v2)."""
    n_file = checkpoint.path.stat().st_size if checkpoint.path.is_file() else 0
    return n_file if n_file < sum(map(n_bytes, checkpoint.weights.values())) else 0
