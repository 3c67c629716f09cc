"""Every format, damaged a thousand times: an error that names the file, or a model that is whole.

The damage is done in a process of its own, which is this file run as a program: a crash of the
interpreter is then a failed test, its memory can be limited, and nothing checks the types of what a
file says before minillama does.
"""

import faulthandler
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from json_files import CHAT_CONFIG, as_bytes, byte_level_json
from small import STORIES, small_llama, small_tokenizer

from minillama.checkpoint import WRITERS, load, load_tokenizer, save
from minillama.checkpoint.folder import SUMS, write_sums
from minillama.checkpoint.huggingface import to_huggingface
from minillama.checkpoint.weights import checkpoint_of, parameter_shapes
from minillama.model import Llama

SIZES = {"dim": 32, "n_layers": 1, "hidden_dim": 32}  # so that headers are most of a file
MEMORY = 3 << 30  # bytes that a damaged file may make the process ask for, beyond what it has


# --- What is damaged -----------------------------------------------------------------------------


def saved(name: str, **options: object) -> Callable[[Path], Path]:
    """What writes a small model in a format, and returns what `load` is to open."""

    def write(folder: Path) -> Path:
        file = {"llama2.c": "model.bin", "gguf": "model.gguf"}.get(name, "model")
        model = small_llama(**SIZES)
        checkpoint = checkpoint_of(model, folder / file)
        WRITERS[name](folder / file, checkpoint, small_tokenizer(), **options)
        return folder / file

    return write


def bin_folder(folder: Path) -> Path:
    """A Hugging Face folder from before safetensors."""
    path = saved("huggingface")(folder)
    model = small_llama(**SIZES)
    torch.save(to_huggingface(model.state_dict(), model.config), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    write_sums(path)
    return path


class Canary:
    """Pickled, it is a program that makes a file."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def evil_folder(folder: Path) -> Path:
    """Meta's format with a pickle that runs a program: it never is a model, damaged or not."""
    path = saved("meta")(folder)
    state = small_llama(**SIZES).state_dict()
    torch.save({**state, "rope.freqs": Canary(folder / "canary")}, path / "consolidated.00.pth")
    return path


def byte_level_gguf(folder: Path) -> Path:
    tokenizer = load_tokenizer(tokenizer_file("tokenizer.json")(folder))
    model = small_llama(vocab_size=tokenizer.vocab_size, **SIZES)
    save(folder / "model.gguf", model, tokenizer, format="gguf")
    return folder / "model.gguf"


def tokenizer_file(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        if name == "tokenizer.json":
            (folder / name).write_bytes(as_bytes(byte_level_json("".join(STORIES))))
            (folder / "tokenizer_config.json").write_text(json.dumps(CHAT_CONFIG))
        elif name == "tokenizer.bin":
            saved("llama2.c")(folder)
        else:
            small_tokenizer().save(folder / name)
        return folder / name

    return write


SOURCES = {
    "native": saved("native"),
    "meta": saved("meta", shards=2),
    "meta with a pickle that runs a program": evil_folder,
    "huggingface, safetensors": saved("huggingface", shard_bytes=20_000),
    "huggingface, bin": bin_folder,
    "llama2.c, legacy": saved("llama2.c", version=0),
    "llama2.c, v1": saved("llama2.c", version=1),
    "llama2.c, v2": saved("llama2.c", version=2),
    "gguf, F32": saved("gguf", kind="F32"),
    "gguf, Q8_0": saved("gguf", kind="Q8_0"),
    "gguf, byte-level vocabulary": byte_level_gguf,
    "tokenizer.model": tokenizer_file("tokenizer.model"),
    "tokenizer.json": tokenizer_file("tokenizer.json"),
    "tokenizer.bin": tokenizer_file("tokenizer.bin"),
}


# --- Damage --------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1, 2, 1e308, -0.5, 2**31, 2**63, 2**200, "", "x", "../x", "/etc/passwd"]
ODD += [[], {}, [1], {"a": 1}, float("nan"), float("inf"), "model.safetensors", [[0, 2**62]]]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bits, bytes or numbers changed; the start and the end of a file are hit more often."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        position = rng.randrange(min(rng.choice([100, 1000, len(damaged)]), len(damaged)))
        if rng.random() < 0.2:
            position = len(damaged) - 1 - position
        match rng.randrange(5):
            case 0 | 1:
                damaged[position] ^= 1 << rng.randrange(8)
            case 2:
                damaged[position] = rng.randrange(256)
            case 3:  # a count, a length or a place
                number = rng.choice(
                    [0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(99)]
                )
                damaged[position : position + 8] = number.to_bytes(8, "little")
            case 4:  # bytes that are lost or come in between
                damaged[position : position + rng.randrange(9)] = rng.randbytes(rng.randrange(1, 9))
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, rng.randrange(100), rng.randrange(len(data)), len(data) - 1])]


def other_value(data: bytes, rng: random.Random) -> bytes:
    """JSON that says something else in one place."""
    content = json.loads(data)
    places: list[tuple] = []

    def walk(node: object) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = rng.choice(places[:50] if rng.random() < 0.5 else places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(ODD)
    return json.dumps(content, ensure_ascii=False).encode()


def other_header(data: bytes, rng: random.Random) -> bytes:
    """The same in the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = other_value(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def other_pickle(data: bytes, rng: random.Random) -> bytes:
    """A whole archive of PyTorch's around a damaged pickle."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, flipped(content, rng) if name.endswith(".pkl") else content)
    return result.getvalue()


def damaged(path: Path, data: bytes, rng: random.Random) -> bytes:
    ways = [flipped, flipped, cut]
    if path.suffix == ".json":
        ways += [other_value] * 3
    elif path.suffix == ".safetensors":
        ways += [other_header] * 2
    elif path.suffix in (".pth", ".bin") and zipfile.is_zipfile(path):
        ways += [other_pickle] * 2
    return rng.choice(ways)(data, rng)


# --- The program ---------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    """ "refused", "loaded", or what went wrong."""
    try:
        if path.name.startswith("tokenizer."):
            tokenizer = load_tokenizer(path)
            tokenizer.decode(tokenizer.encode("Ada had 3 of these: 日本 🦙\n"))
            return "loaded"
        model, _ = load(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == parameter_shapes(model.config), "a model of other shapes"
        sum(float(parameter.detach().sum()) for parameter in model.parameters())  # all are read
        return "loaded"
    except (ValueError, OSError) as error:
        # Files that lie beside the weights are named by their own paths.
        named = str(path) in str(error) or str(path.parent) in str(error)
        return "refused" if named else f"names no file: {error!r}"
    except Exception:
        return traceback.format_exc(limit=-4)


def fuzz(name: str, folder: Path, n_cases: int) -> dict:
    """Damage one of the files `n_cases` times, and count what comes of it."""
    start = time.perf_counter()
    path = SOURCES[name](make_new(folder))
    beside = path.parent / "tokenizer_config.json"
    files = sorted(path.iterdir()) if path.is_dir() else [path, *[beside] * beside.exists()]
    whole = {file: file.read_bytes() for file in files if file.name != SUMS}
    as_it_is = outcome(path)
    counts, wrong, slowest, rng = {"refused": 0, "loaded": 0}, [], 0.0, random.Random(name)
    for _ in range(n_cases):
        file = rng.choice(list(whole))
        file.write_bytes(damaged(file, whole[file], rng))
        if path / SUMS in files:
            write_sums(path)  # or the damage is all that is seen
        began = time.perf_counter()
        result = outcome(path)
        slowest = max(slowest, time.perf_counter() - began)
        if result in counts:
            counts[result] += 1
        else:
            wrong.append(f"{file.name}: {result}")
        file.write_bytes(whole[file])
    return {
        "as it is": as_it_is,
        **counts,
        "wrong": wrong,
        "slowest": slowest,
        "seconds": time.perf_counter() - start,
        "canary": (folder / "canary").exists(),
    }


def main(folder: Path, n_cases: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # On memory that does not exist, drawing the first weights takes most of the time.
    Llama._init_weights = lambda *_: None
    found = {}
    for name in SOURCES:
        outcome(SOURCES[name](make_new(folder / "first")))  # imports what it needs
    if sys.platform == "linux":
        limit_memory()
    for name in SOURCES:
        print(f"fuzzing {name}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(120, exit=True)  # a hang
        found[name] = fuzz(name, folder / "fuzz", n_cases)
    print(json.dumps(found))


def limit_memory() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    n_bytes = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def make_new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --- What must come of it ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[30, pytest.param(1000, marks=pytest.mark.slow)])
def found(request, tmp_path_factory) -> dict[str, dict]:
    """What the program found, by format."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path_factory.mktemp("fuzz")), str(request.param)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]  # a crash, a hang, or too much memory
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SOURCES)
def test_damage_is_refused_by_name_or_does_no_harm(found, name):
    result = found[name]
    assert result["as it is"] == ("refused" if "runs a program" in name else "loaded")
    assert not result["wrong"], "\n".join(result["wrong"])
    assert not result["canary"], "the pickle was executed"
    # A format without checksums cannot see a changed weight, but damage to headers is seen.
    many = result["refused"] + result["loaded"] > 100  # of thirty cases, chance decides
    assert result["refused"] > result["loaded"] / (2 if many else 5)
    assert result["slowest"] < 10  # seconds; on a busy machine, too


def test_a_pickle_that_runs_a_program_would_have_been_noticed(tmp_path):
    """The canary does sing when the pickle is read as PyTorch once did."""
    path = evil_folder(tmp_path) / "consolidated.00.pth"
    assert not (tmp_path / "canary").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "canary").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
