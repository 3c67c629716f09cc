import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from small import STORIES, small_config, small_tokenizer

from minillama.checkpoint import CheckpointError, load
from minillama.config import LlamaConfig, TrainingConfig
from minillama.data.packing import as_batch
from minillama.training import evaluate
from minillama.training.run import PretrainingRun

TRAINING = TrainingConfig(steps=3, batch_size=2, seq_len=16, warmup_steps=1, learning_rate=1e-2)
FILES = {
    "config.json",
    "log.jsonl",
    "loss.png",
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
    *steps, last = map(json.loads, (finished.folder / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert set(steps[0]) == {"step", "loss", "grad_norm", "learning_rate", "n_targets"}
    assert last == {"validation_loss": finished.validation_loss}


def test_the_validation_loss_is_that_of_all_held_out_rows(finished):
    rows = [as_batch(finished.held_out_rows)]  # in one batch; the run took them two by two
    assert len(finished.held_out_rows) > 2
    assert finished.validation_loss == pytest.approx(evaluate(finished.model, rows), rel=1e-5)


def test_the_settings_are_kept(finished):
    settings = json.loads((finished.folder / "config.json").read_text())
    assert LlamaConfig.from_dict(settings["model"]) == small_config()
    assert settings["training"] == asdict(TRAINING)


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
            r"text to learn from: The text has \d+ tokens, but one row takes 17 .*seq_len of at",
        ),
        (
            {"held_out": ["Ada."]},
            r"text held out for validation: The text has \d+ tokens, but one row takes 17",
        ),
        ({"held_out": []}, "held out for validation: The text has 0 tokens"),
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


def test_a_run_that_diverges_leaves_the_earlier_checkpoint(tmp_path):
    for _ in new_run(tmp_path):
        pass
    before = contents(tmp_path / "checkpoint")
    run = new_run(tmp_path)
    with torch.no_grad():
        run.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="Step 1: the loss is nan"):
        list(run)
    assert contents(tmp_path / "checkpoint") == before
