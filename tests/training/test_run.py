import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from small import STORIES, small_config, small_tokenizer

from minillama.checkpoint import CheckpointError, load
from minillama.config import LlamaConfig, RunConfig, TrainingConfig
from minillama.data.packing import as_batch
from minillama.training import evaluate
from minillama.training.run import PretrainingRun
from minillama.training.state import load_progress
from minillama.training.step import Diverged

TRAINING = TrainingConfig(steps=3, batch_size=2, seq_len=16, warmup_steps=1, learning_rate=1e-2)
STATE = {"SHA256SUMS", "state.json", "state.safetensors"}
FILES = {
    "config.toml",
    "log.jsonl",
    "loss.png",
    "tokens/held_out.safetensors",
    "tokens/sizes.json",
    "tokens/text.safetensors",
    "tokens/tokenizer.model",
    *(f"states/{step:09}/{name}" for step in (2, 3) for name in STATE),
    "checkpoint/params.json",
    "checkpoint/model.safetensors",
    "checkpoint/tokenizer.model",
    "checkpoint/SHA256SUMS",
}


def new_run(folder: Path, **changes) -> PretrainingRun:
    arguments = {
        "documents": STORIES[:20],
        "held_out": STORIES[20:],
        "tokenizer": small_tokenizer(),
        "model_config": small_config(),
        "config": TRAINING,
        "saving": RunConfig(save_every=1, eval_every=2),
    }
    return PretrainingRun(folder, **(arguments | changes))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> PretrainingRun:
    run = new_run(tmp_path_factory.mktemp("run") / "new" / "folder")
    for _ in run:
        pass
    return run


def test_the_folder_holds_what_is_promised_and_nothing_else(finished):
    assert set(contents(finished.folder)) == FILES


def test_the_checkpoint_is_the_model_that_was_trained(finished):
    model, tokenizer = load(finished.folder / "checkpoint")
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), finished.model(tokens))
    assert tokenizer.pieces == small_tokenizer().pieces


def test_the_log_has_a_line_per_step_and_the_validation_loss(finished):
    lines = finished.log()
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]  # evaluated every 2, and at the end
    assert set(lines[0]) == {"step", "loss", "grad_norm", "learning_rate", "n_targets"}
    assert set(lines[2]) == set(lines[4]) == {"step", "validation_loss", "bits_per_byte"}
    assert lines[4]["validation_loss"] == finished.evaluate().loss


def test_the_validation_loss_is_that_of_all_held_out_rows(finished):
    rows = [as_batch(finished.held_out_rows)]  # in one batch; the run took them two by two
    assert len(finished.held_out_rows) > 2
    assert finished.evaluate().loss == pytest.approx(evaluate(finished.model, rows), rel=1e-5)


def test_bits_per_byte_by_hand(finished):
    text = STORIES[20:]
    ids = [id for document in text for id in finished.tokenizer.encode(document, True, True)]
    n_bytes = sum(len(document.encode()) for document in text)
    found = finished.evaluate()
    assert found.bits_per_byte == pytest.approx(
        found.loss / math.log(2) * len(ids) / n_bytes, rel=1e-12
    )


def test_the_settings_are_kept(finished):
    settings = tomllib.loads((finished.folder / "config.toml").read_text())
    assert LlamaConfig.from_dict(settings["model"]) == small_config()
    assert settings["training"] == asdict(TRAINING)
    assert settings["saving"] == {"save_every": 1, "keep": 2, "eval_every": 2}
    assert settings["shares"] == {"text": 1.0}


def test_the_curve_is_a_picture(finished):
    height, width, _ = imread(finished.folder / "loss.png").shape
    assert (height, width) == (300, 600)


def test_two_runs_with_one_seed_write_equal_bytes(finished, tmp_path):
    again = new_run(tmp_path / "again")
    for _ in again:
        torch.rand(1)  # what others draw meanwhile does not matter
    assert contents(again.folder) == contents(finished.folder)


def test_another_seed_writes_other_bytes(finished, tmp_path):
    other = new_run(tmp_path / "other", config=replace(TRAINING, seed=1))
    same = new_run(tmp_path / "same")
    assert not torch.equal(other.model.output.weight, same.model.output.weight)
    for _ in other:
        pass
    mine, theirs = contents(other.folder), contents(finished.folder)
    assert {name for name in FILES if mine[name] == theirs[name]} == {
        "checkpoint/params.json",
        "checkpoint/tokenizer.model",
        *(name for name in FILES if name.startswith("tokens/")),
    }


def test_each_step_is_in_the_log_as_soon_as_it_is_taken(tmp_path):
    steps = iter(new_run(tmp_path))
    next(steps)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert not (tmp_path / "checkpoint").exists()
    steps.close()


# --- Mistakes are seen before the first step -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"documents": ["Ada."]},
            r"source 'text': The text has \d+ tokens, but one row takes 17 .*seq_len of at",
        ),
        (
            {"held_out": ["Ada."]},
            r"text held out for validation: The text has \d+ tokens, but one row takes 17",
        ),
        ({"held_out": []}, "held out for validation: There are no documents"),
        (
            {"tokenizer": small_tokenizer(320)},
            "tokenizer has 320 tokens and the model 300: they do not belong together",
        ),
        (
            {"tokenizer": small_tokenizer(295)},
            "tokenizer has 295 tokens and the model 300: they do not belong together",
        ),
        (
            {"config": replace(TRAINING, seq_len=65)},
            r"seq_len \(65\) is longer than the model's context \(64 tokens\)",
        ),
    ],
    ids=["short", "short to hold out", "none to hold out", "large", "small", "long rows"],
)
def test_what_does_not_fit_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        new_run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.training.run.free_memory", lambda device: 2**17)
    with pytest.raises(ValueError, match=r"Training this model takes .*, but only 0\.1 MiB .*fit"):
        new_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("minillama.training.run.free_memory", lambda device: None)
    new_run(tmp_path / "run")  # a machine that cannot tell refuses nothing


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        new_run(tmp_path / "file" / "run")


@pytest.mark.parametrize("method", ["mkdir", "write_text"])
def test_a_folder_that_must_not_be_written(tmp_path, monkeypatch, method):
    def refuse(path, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(PermissionError, match="run"):
        new_run(tmp_path / "run")


def test_a_checkpoint_folder_that_holds_something_else(tmp_path):
    diary = tmp_path / "checkpoint" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("Dear diary")
    with pytest.raises(CheckpointError, match=r"holds diary\.txt, which would be lost"):
        new_run(tmp_path)
    assert diary.read_text() == "Dear diary"


def test_an_earlier_run_is_not_overwritten(finished):
    with pytest.raises(FileExistsError, match=r"states holds the states of an earlier run.*Resume"):
        new_run(finished.folder)


def test_a_run_that_diverges_leaves_the_earlier_checkpoint_and_what_broke_it(tmp_path):
    def run() -> PretrainingRun:
        return new_run(tmp_path, saving=RunConfig(save_every=0))

    for _ in run():
        pass
    before = contents(tmp_path / "checkpoint")
    second = run()
    with torch.no_grad():
        second.model.norm.weight[0] = float("nan")
    with pytest.raises(Diverged, match=r"Step 1: the loss is nan.*are kept in .*post-mortem"):
        list(second)
    assert contents(tmp_path / "checkpoint") == before
    kept = load_file(tmp_path / "post-mortem" / "state.safetensors")
    batch = next(iter(run().batches))
    assert torch.equal(kept["batch.0.tokens"], batch.tokens)
    assert torch.equal(kept["batch.0.targets"], batch.targets)
    assert kept["norm.weight"][0].isnan()
    assert load_progress(tmp_path / "post-mortem")["step"] == 1


# --- Resume --------------------------------------------------------------------------------------

SOURCES = {"Ada and Ben": STORIES[:10], "the others": STORIES[10:20]}
LONGER = {
    "documents": SOURCES,
    "shares": {"Ada and Ben": 0.25, "the others": 0.75},
    "config": replace(TRAINING, steps=10, accumulation=2),
    "saving": RunConfig(save_every=3, eval_every=4),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for _ in new_run(folder, **LONGER):
        pass
    return contents(folder)


@pytest.mark.parametrize("stop", [*range(1, 11), (2, 5), (4, 4, 9)])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(undisturbed, tmp_path, stop):
    new_run(tmp_path, **LONGER)
    for last in (stop,) if isinstance(stop, int) else stop:
        steps = iter(PretrainingRun.resume(tmp_path))
        for stats in steps:
            if stats.step == last:
                steps.close()
                break
    for _ in PretrainingRun.resume(tmp_path):
        pass
    assert contents(tmp_path) == undisturbed


def test_resuming_takes_the_steps_after_the_newest_state_and_no_others(undisturbed, tmp_path):
    for stats in new_run(tmp_path, **LONGER):
        if stats.step == 8:
            break
    run = PretrainingRun.resume(tmp_path)
    assert run.step == 6
    assert [stats.step for stats in run] == [7, 8, 9, 10]
    assert [path.name for path in sorted((tmp_path / "states").iterdir())] == [
        "000000009",
        "000000010",
    ]


def test_a_finished_run_resumes_to_itself(undisturbed, tmp_path):
    for _ in new_run(tmp_path, **LONGER):
        pass
    assert list(PretrainingRun.resume(tmp_path)) == []
    assert contents(tmp_path) == undisturbed


KILLED = """
import sys
from minillama.training.run import PretrainingRun
from minillama.training.state import load_progress
from minillama.training.step import Diverged
print("starting", flush=True)
for stats in PretrainingRun.resume(sys.argv[1]):
    print(stats.step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [5, pytest.param(50, id="50")])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, kills):
    """SIGKILL, at any moment: between steps, in a step, within a save, while starting."""
    # A state after every step: half of the time goes into saves. Enough steps for all the kills.
    arguments = LONGER | {
        "config": replace(LONGER["config"], steps=max(200, 30 * kills)),
        "saving": RunConfig(save_every=1, eval_every=7),
    }
    for _ in new_run(tmp_path / "undisturbed", **arguments):
        pass
    new_run(tmp_path / "killed", **arguments)
    rng = random.Random(kills)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    states = tmp_path / "killed" / "states"

    def saving() -> bool:
        return states.exists() and any(path.name.startswith(".") for path in states.iterdir())

    in_save = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        kind = rng.choice(["starting", "anywhere", "anywhere", "in a save", "in a save"])
        # By the second step, what an earlier kill left of a save has been replaced.
        for _ in range({"starting": 0, "anywhere": 1, "in a save": 2}[kind]):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        deadline = time.monotonic() + 30
        while kind == "in a save" and not saving() and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL  # it had not ended by itself
        in_save += saving()
    assert in_save > kills // 20, "hardly a kill has hit a save"
    for _ in PretrainingRun.resume(tmp_path / "killed"):
        pass
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def cut_off(folder: Path) -> PretrainingRun:
    """A run with states of the steps 3 and 6, cut off in step 8."""
    run = new_run(folder, **LONGER)
    for stats in run:
        if stats.step == 7:
            return run
    raise AssertionError


@pytest.mark.parametrize("name", sorted(STATE))
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(undisturbed, tmp_path, name):
    cut_off(tmp_path)
    file = tmp_path / "states" / "000000006" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"states/000000006 .*The state before it is used"):
        run = PretrainingRun.resume(tmp_path)
    assert run.step == 3
    for _ in run:
        pass
    assert contents(tmp_path) == undisturbed


def test_no_whole_state_is_an_error_and_not_a_new_start(tmp_path):
    cut_off(tmp_path)
    for state in (tmp_path / "states").iterdir():
        (state / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"state\.json"),
        pytest.raises(CheckpointError, match=r"None of the 2 states in .* is whole"),
    ):
        PretrainingRun.resume(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate = 0.01", "learning_rate = 0.02", r"learning_rate was 0\.01 and is 0\.02"),
        ("hidden_dim = 64", "hidden_dim = 96", "hidden_dim was 64 and is 96 now"),
        ("seed = 0", "seed = 1", "seed was 0 and is 1 now"),
    ],
)
def test_a_state_of_other_settings_is_refused(tmp_path, old, new, message):
    cut_off(tmp_path)
    config = tmp_path / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        PretrainingRun.resume(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "stepps = 10", r"no setting 'stepps'. Did you mean 'steps'"),
        ("steps = 10", 'steps = "ten"', "steps is 'ten', but must be int"),
        ("[training]", "[training", "is no TOML file"),
        ("dim = 32\n", "", "exactly the keys"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, old, new, message):
    cut_off(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        PretrainingRun.resume(tmp_path)


def test_other_text_under_the_same_name_is_refused(tmp_path):
    cut_off(tmp_path)
    new_run(tmp_path / "other", **LONGER | {"documents": dict.fromkeys(SOURCES, STORIES[:12])})
    for file in (tmp_path / "other" / "tokens").iterdir():
        file.replace(tmp_path / "tokens" / file.name)
    with pytest.raises(ValueError, match=r"tokens\..* was .* and is .* now"):
        PretrainingRun.resume(tmp_path)


def test_a_file_of_tokens_from_elsewhere_is_refused(tmp_path):
    cut_off(tmp_path)
    reversed_sources = dict(zip(SOURCES, reversed(SOURCES.values()), strict=True))
    new_run(tmp_path / "other", **LONGER | {"documents": reversed_sources})
    for name in ("Ada and Ben", "the others"):  # equally many documents, but not these
        file = Path("tokens") / f"{name}.safetensors"
        (tmp_path / "other" / file).replace(tmp_path / file)
    with pytest.raises(
        ValueError, match=r"Ada and Ben\.safetensors .*not what this run was started"
    ):
        PretrainingRun.resume(tmp_path)


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config .*config\.toml"):
        PretrainingRun.resume(tmp_path)


def test_a_log_that_was_cut_meanwhile_is_missed(tmp_path):
    cut_off(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    run = PretrainingRun.resume(tmp_path)
    with pytest.raises(CheckpointError, match=r"log\.jsonl has 0 bytes, but had \d+"):
        next(iter(run))


def test_a_full_disk_in_a_save_leaves_the_state_before_it(undisturbed, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    run = iter(new_run(tmp_path, **LONGER))
    for _ in range(5):
        next(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            next(run)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000000003"]
    for _ in PretrainingRun.resume(tmp_path):
        pass
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_byte_of_the_weights(finished, tmp_path, checkpointing):
    run = new_run(tmp_path, config=replace(TRAINING, checkpointing=checkpointing))
    for _ in run:
        pass
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished.folder / weights).read_bytes()


COMPILED = """
import sys
from dataclasses import replace
from test_run import TRAINING, new_run
for stats in new_run(sys.argv[1], config=replace(TRAINING, compile=True)):
    print(stats.loss)
"""


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(finished, tmp_path):
    # In a process of its own: the compiler cannot see through the checks of shapes in this one.
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "training"), str(tests.parent)])
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    losses = [float(line) for line in done.stdout.splitlines()]
    assert losses == pytest.approx([line["loss"] for line in finished.log() if "loss" in line])
