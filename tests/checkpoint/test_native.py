import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_config, small_llama, small_tokenizer

from minillama import load, save
from minillama.checkpoint import CheckpointError, load_config, native, weights
from minillama.checkpoint.folder import verify_sums
from minillama.checkpoint.native import FILES, PARAMS, SUMMED, SUMS, TOKENIZER, WEIGHTS
from minillama.model import Llama

TOKENS = torch.arange(12)[None]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint."""
    save(tmp_path / "checkpoint", small_llama(), small_tokenizer())
    return tmp_path / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sign_again(folder: Path) -> None:
    """Make SHA256SUMS right for whatever the files now hold."""
    sums = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in SUMMED]
    (folder / SUMS).write_text("".join(sums))


def change_params(folder: Path, **changes) -> None:
    params = json.loads((folder / PARAMS).read_text())
    (folder / PARAMS).write_text(json.dumps(params | changes))
    sign_again(folder)


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    sign_again(folder)


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_to_the_bit(tmp_path, dtype, tied):
    model = small_llama(tie_embeddings=tied).to(dtype)
    save(tmp_path / "new" / "folder", model, small_tokenizer())
    loaded, tokenizer = load(tmp_path / "new" / "folder")
    assert isinstance(loaded, Llama)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert tokenizer.to_proto() == small_tokenizer().to_proto()
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied


def test_a_loaded_model_can_be_trained(folder):
    model, _ = load(folder)
    model(TOKENS).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_load_converts_where_it_is_told_to(folder):
    model, _ = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(folder)[0].parameters()} == {torch.float32}


def test_a_tied_matrix_is_stored_once(tmp_path):
    save(tmp_path / "tied", small_llama(tie_embeddings=True), small_tokenizer())
    assert "output.weight" not in load_file(tmp_path / "tied" / WEIGHTS)


def test_two_saves_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, small_llama(), small_tokenizer())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_names_are_metas_and_the_config_is_readable(folder):
    assert "layers.1.feed_forward.w2.weight" in load_file(folder / WEIGHTS)
    assert json.loads((folder / PARAMS).read_text()) == small_config().to_dict()
    assert load_config(folder) == small_config()


def test_sha256sum_agrees(folder):
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_another_tokenizer_may_be_named(folder, tmp_path):
    small_tokenizer().save(tmp_path / "other.model")
    (folder / TOKENIZER).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model missing"):
        load(folder, tokenizer=tmp_path / "other.model")  # a folder is whole or it is none


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no format 'pickle'.* Known are: native"):
        save(tmp_path / "x", small_llama(), small_tokenizer(), format="pickle")
    assert list(tmp_path.iterdir()) == []


# --- Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, "but one", "but a line"])
def test_a_truncated_file_is_named(folder, name, share):
    data = (folder / name).read_bytes()
    if share == "but one":  # of SHA256SUMS the last byte ends a line and says nothing
        cut = len(data) - (2 if name == SUMS else 1)
    elif share == "but a line":
        cut = data.rstrip().rfind(b"\n") + 1
    else:
        cut = int(share * len(data))
    (folder / name).write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=f"{folder / name} is damaged"):
        load(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint that no test leaves changed."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    save(folder, small_llama(), small_tokenizer())
    return folder


@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_one_flipped_bit_is_noticed(whole, name, where, bit):
    data = (whole / name).read_bytes()
    damaged = bytearray(data)
    damaged[int(where * len(data))] ^= 1 << bit
    (whole / name).write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError, match=name):
            native.open_native(whole)
    finally:
        (whole / name).write_bytes(data)
    native.open_native(whole)


@pytest.mark.parametrize("bit", range(8))
def test_every_byte_of_the_sums_counts(whole, bit):
    data = (whole / SUMS).read_bytes()
    try:
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            (whole / SUMS).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=SUMS):
                verify_sums(whole, native.SUMMED)
    finally:
        (whole / SUMS).write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    message = rf"checkpoint is no checkpoint of minillama: {name} missing\."
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is no checkpoint .* {SUMS} missing"):
        load(tmp_path)


def test_the_folder_of_a_run_leads_to_its_checkpoint(folder):
    with pytest.raises(CheckpointError, match=f"missing; {folder} is one"):
        load(folder.parent)


def test_a_path_that_leads_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere\. A checkpoint is"):
        load(tmp_path / "nowhere")


# --- Files that are whole and do not fit together ------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "tok_embeddings|needs"),
        ({"n_layers": 3}, r"layers\.2\.attention.wk.weight: .* the file has none"),
        ({"n_layers": 1}, r"layers\.1\.\S+: the config needs no such tensor"),
        ({"n_kv_heads": 4}, r"wk\.weight: the config needs \(32, 32\), the file has \(16, 32\)"),
        ({"hidden_dim": 65}, r"feed_forward\.w1\.weight: the config needs \(65, 32\)"),
        ({"vocab_size": 301}, "301"),
        ({"tie_embeddings": True}, r"output\.weight .* holds one of its own"),
    ],
)
def test_a_config_of_another_model(folder, changes, message):
    change_params(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_weights_of_an_untied_model_without_an_output_matrix(tmp_path):
    save(tmp_path / "tied", small_llama(tie_embeddings=True), small_tokenizer())
    change_params(tmp_path / "tied", tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"output\.weight: .* the file has none"):
        load(tmp_path / "tied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), r"norm\.weight: .* \(32,\), the file has none"),
        (lambda w: w.update(extra=torch.ones(2)), r"extra: .* no such tensor, .* \(2,\)"),
        (lambda w: w.update({"norm.weight": torch.ones(31)}), r"norm\.weight: .* \(31,\)"),
        (lambda w: w.update({"norm.weight": torch.ones(32).int()}), r"norm\.weight is of .*int32"),
        (lambda w: w.clear(), r"the config has 2 layers, but there are only 0 tensors"),
    ],
    ids=["missing", "extra", "shape", "integers", "none"],
)
def test_weights_of_another_model(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_tied_weights_without_the_one_matrix(tmp_path):
    folder = tmp_path / "tied"
    save(folder, small_llama(tie_embeddings=True), small_tokenizer())
    change_weights(folder, lambda weights: weights.pop("tok_embeddings.weight"))
    with pytest.raises(CheckpointError, match=r"disagree about tok_embeddings\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: Expecting property name"),
        ("[1, 2]", "holds .* in place of named settings"),
        ("[" * 100_000, "is no JSON: maximum recursion"),
        ("{}", "exactly the keys"),
        (json.dumps(small_config().to_dict() | {"norm": 1}), "exactly the keys"),
        (json.dumps(small_config().to_dict() | {"n_layers": -1}), "n_layers is -1"),
        (json.dumps(small_config().to_dict() | {"dim": "32"}), "dim is '32'"),
        (json.dumps(small_config().to_dict() | {"norm_eps": float("nan")}), "norm_eps is nan"),
    ],
)
def test_params_that_describe_no_model(folder, text, message):
    (folder / PARAMS).write_text(text)
    sign_again(folder)
    with pytest.raises(CheckpointError, match=rf"{PARAMS} .*{message}"):
        load(folder)


@pytest.mark.parametrize("vocab_size", [295, 320])
def test_a_tokenizer_of_another_model(folder, tmp_path, vocab_size):
    message = f"has {vocab_size} tokens and the model 300: they do not belong together"
    other = small_tokenizer(vocab_size)
    other.save(tmp_path / "other.model")
    with pytest.raises(CheckpointError, match=message):
        load(folder, tokenizer=tmp_path / "other.model")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=message):
        save(folder, small_llama(), other)
    assert contents(folder) == before


def test_a_chat_format_that_is_no_name(folder):
    assert "chat_format" not in json.loads((folder / PARAMS).read_text())
    change_params(folder, chat_format=["llama2"])
    with pytest.raises(CheckpointError, match="has a chat_format that cannot be"):
        load(folder)


def test_a_damaged_tokenizer_that_is_named(folder, tmp_path):
    (tmp_path / "other.model").write_bytes(small_tokenizer().to_proto()[:-50])
    with pytest.raises(ValueError, match=r"other\.model"):
        load(folder, tokenizer=tmp_path / "other.model")


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 2**16)
    monkeypatch.setattr(weights, "model_from", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=r"takes .* MiB .*, but only 0\.1 MiB .*are free\. .*fits"):
        load(folder)


def test_room_is_asked_for_in_the_dtype_and_on_the_device_that_are_wanted(folder, monkeypatch):
    asked = []

    def check(plan, available):
        asked.append((plan.dtype, available))

    monkeypatch.setattr(weights, "check_fits", check)
    monkeypatch.setattr(weights, "free_memory", lambda device: f"free on {device}")
    load(folder)
    load(folder, dtype=torch.bfloat16)
    load(folder, device="meta")
    assert asked == [
        ("float32", "free on cpu"),
        ("bfloat16", "free on cpu"),
        ("float32", "free on meta"),
    ]


class Canary:
    """Unpickled, it sings: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_the_weights_is_not_executed(folder, tmp_path):
    song = tmp_path / "song"
    pickle.loads(pickle.dumps(Canary(song)))
    assert song.exists()  # the canary can sing
    song.unlink()
    for write in (pickle.dump, torch.save):
        with (folder / WEIGHTS).open("wb") as file:
            write(Canary(song), file)
        sign_again(folder)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file"):
            load(folder)
        assert not song.exists()


# --- Nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diary.txt", "model.safetensors.bak", ".hidden"])
def test_foreign_files_are_never_deleted(folder, name):
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=rf"holds {name}, which would be lost\. Name"):
        save(folder, small_llama(seed=1), small_tokenizer())
    assert contents(folder) == before


def test_a_foreign_folder_is_never_deleted(folder):
    (folder / "more").mkdir()
    (folder / "more" / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="it holds more"):
        save(folder, small_llama(), small_tokenizer())
    assert (folder / "more" / "diary.txt").read_text() == "mine"


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="it is a file"):
        save(tmp_path / "file", small_llama(), small_tokenizer())
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_an_older_checkpoint_are_replaced(tmp_path):
    for seed in range(3):
        (tmp_path / "x").mkdir(exist_ok=True)
        save(tmp_path / "x", small_llama(seed), small_tokenizer())
        assert torch.equal(load(tmp_path / "x")[0](TOKENS), small_llama(seed)(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "x", small_llama(), small_tokenizer())


class Accident:
    """Counts the calls that touch the disk; the `at`-th raises, before or after its work."""

    POINTS = (
        (native, "save_safetensors"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (os, "fsync"),
    )

    def __init__(self, monkeypatch, at: int | None, error: BaseException, after: bool) -> None:
        self.calls, self.at, self.error, self.after = 0, at, error, after
        for owner, name in self.POINTS:
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def guard(self, function):
        def guarded(*args, **kwargs):
            self.calls += 1
            if self.calls != self.at:
                return function(*args, **kwargs)
            if self.after:
                function(*args, **kwargs)
            raise self.error

        return guarded


def n_points(tmp_path: Path, monkeypatch) -> int:
    """Calls that touch the disk when a checkpoint is replaced."""
    save(tmp_path / "count", small_llama(), small_tokenizer())
    with monkeypatch.context() as patch:
        accident = Accident(patch, None, OSError(), after=False)
        save(tmp_path / "count", small_llama(), small_tokenizer())
    return accident.calls


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_an_accident_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, error, after):
    points = n_points(tmp_path, monkeypatch)
    assert points >= 14  # 4 files, their folder and its parent are written, renamed, flushed
    folder = tmp_path / "place" / "checkpoint"
    save(folder, small_llama(seed=0), small_tokenizer())
    earlier = contents(folder)
    save(tmp_path / "later", small_llama(seed=1), small_tokenizer())
    later = contents(tmp_path / "later")
    kept = 0
    for point in range(1, points + 1):
        with monkeypatch.context() as patch:
            Accident(patch, point, error, after)
            with pytest.raises(type(error)):
                save(folder, small_llama(seed=1), small_tokenizer())
        # Nothing lies around, and what is there is the old one or the new one, never a mixture.
        assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"], point
        assert contents(folder) in (earlier, later), point
        load(folder)
        if contents(folder) == earlier:
            kept += 1
        else:
            save(folder, small_llama(seed=0), small_tokenizer())
    # The new one takes its place with the last rename; the flush of the parent follows.
    assert points - kept == (2 if after else 1)


def test_an_accident_during_the_first_save_leaves_nothing(tmp_path, monkeypatch):
    points = n_points(tmp_path, monkeypatch) - 1  # there is no earlier folder to rename
    for point in range(2, points):  # 1 makes the parent, the last one flushes it
        with monkeypatch.context() as patch:
            Accident(patch, point, FULL_DISK, after=False)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / "place" / "x", small_llama(), small_tokenizer())
        assert list((tmp_path / "place").iterdir()) == [], point


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs limits on the size of files")
def test_a_disk_that_is_really_full(tmp_path):
    """The system refuses to let any file grow beyond a limit, at every file in turn."""
    code = """
import resource, signal, sys
from minillama import load, save
from small import small_llama, small_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 100, 1000, 50_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(sys.argv[1], small_llama(seed=1), small_tokenizer())
    except OSError as error:
        print("OSError", error, flush=True)
"""
    folder = tmp_path / "checkpoint"
    save(folder, small_llama(), small_tokenizer())
    assert (folder / WEIGHTS).stat().st_size > 100_000
    before = contents(folder)
    run = run_python(code, folder)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 5, run.stdout
    assert all("nothing was changed" in line for line in run.stdout.splitlines())
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_process_that_dies_at_any_point_leaves_a_whole_checkpoint(tmp_path):
    """Power fails: no `finally` runs. The checkpoint is there, or `load` says where it is."""
    code = """
import os, re, sys
from pathlib import Path
from minillama import load, save
from minillama.checkpoint import native
from small import small_llama, small_tokenizer

folder = Path(sys.argv[1])
save(folder, small_llama(), small_tokenizer())
died = hints = 0
for point in range(1, 100):
    child = os.fork()
    if child == 0:
        calls = 0
        def guard(function):
            def guarded(*args, **kwargs):
                global calls
                calls += 1
                if calls == point:
                    os._exit(9)
                return function(*args, **kwargs)
            return guarded
        for owner, name in ((native, "save_safetensors"), (Path, "mkdir"), (Path, "write_text"),
                            (Path, "write_bytes"), (Path, "rename"), (os, "fsync")):
            setattr(owner, name, guard(getattr(owner, name)))
        save(folder, small_llama(seed=point), small_tokenizer())
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    died += 1
    try:
        load(folder)
    except FileNotFoundError as error:
        hints += 1
        earlier = Path(re.search(r"cut off\\. (\\S+) is the checkpoint before it", str(error))[1])
        earlier.rename(folder)
        load(folder)
print(died, hints)
"""
    run = run_python(code, tmp_path / "checkpoint")
    assert run.returncode == 0, run.stderr
    died, hints = map(int, run.stdout.split())
    assert died >= 12
    assert hints == 1  # between the two renames
    # What the dead left lying beside it, the save after them has removed.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
