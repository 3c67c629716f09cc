import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import many
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import STORIES, small_config
from torch.testing import assert_close

from minillama.checkpoint import load
from minillama.config import TrainingConfig
from minillama.data.packing import IGNORE, Batch
from minillama.training.parallel import Ranks, all_or_none, from_main, is_main, meet
from minillama.training.run import PretrainingRun

HERE = Path(__file__).parent
CONFIG = TrainingConfig(batch_size=4)


def torchrun(n: int, *arguments: object, timeout: int = 170) -> subprocess.CompletedProcess[str]:
    """Start n processes, on a free port of this machine; all have ended when this returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def results(n: int, what: str, folder: Path) -> list[dict]:
    """What each of n ranks found."""
    done = torchrun(n, HERE / "many.py", what, folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(n)]


def cut(run: Path, copy: Path) -> Path:
    """A copy of a run of 20 steps as it was after 15, when its newest state was that of 10."""
    shutil.copytree(run, copy)
    for name in ("states/000000020", "checkpoint"):
        shutil.rmtree(copy / name)
    (copy / "loss.png").unlink()
    lines = (copy / "log.jsonl").read_text().splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(lines[:15]))
    return copy


# --- One process, and what does not fit, without starting any ------------------------------------


def test_one_process_makes_no_group_and_is_the_main_one(tmp_path):
    run = many.new_run(tmp_path, "grouped", steps=3)
    list(run)
    assert not dist.is_initialized()
    assert is_main()
    assert from_main(lambda: "made") == "made"
    assert run.whole_model() is run.model
    batch = Batch(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    ranks = meet("cpu", small_config(), CONFIG)
    assert ranks.data_group is None
    assert torch.equal(ranks.part(batch).tokens, batch.tokens)
    assert ranks.whole(batch) is batch


class Seen(Ranks):
    """The processes as one of three sees them."""

    n_data = 3
    data_rank = 0


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_the_parts_of_a_batch_are_its_rows_in_order_and_rows_without_targets(rows):
    tokens = torch.arange(1, rows + 1)[:, None].expand(rows, 4)
    parts = []
    for rank in range(3):
        seen = type("One", (Seen,), {"data_rank": rank})(torch.device("cpu"))
        parts.append(seen.part(Batch(tokens, tokens)))
    assert {part.tokens.shape for part in parts} == {(-(-rows // 3), 4)}
    targets = torch.cat([part.targets for part in parts])
    assert torch.equal(targets[:rows], tokens)
    assert (targets[rows:] == IGNORE).all()
    assert torch.cat([part.tokens for part in parts]).min() >= 1  # a filled row holds tokens


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (1, {"tensor_parallel": 2}, r"tensor_parallel is 2, but must divide .* processes \(1\)"),
        (6, {"tensor_parallel": 4}, r"must divide .* \(6\): .* Start a multiple of 4 processes"),
        (4, {"tensor_parallel": 4}, r"tensor_parallel is 4, but must divide n_kv_heads \(2\)"),
        (3, {}, r"batch_size is 4, but must be a multiple of 3: 3 processes, in groups of 1"),
        (16, {"tensor_parallel": 2}, r"a multiple of 8: 16 processes, in groups of 2"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_starts(
    world, changes, message, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        meet("cpu", small_config(), TrainingConfig(batch_size=4, **changes))
    assert not dist.is_initialized()


def test_other_devices_than_cpus_and_gpus_are_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"The device is mps, but 2 processes .* cpu or cuda"):
        meet("mps", small_config(), CONFIG)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes on this machine, but 2 GPUs"):
        meet("cuda", small_config(), CONFIG)


def test_a_run_that_cannot_be_shared_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="multiple of 3"):
        many.new_run(tmp_path / "run", "grouped")
    assert not (tmp_path / "run").exists()


def test_a_lost_connection_is_told_from_other_errors():
    stopped = "Another process of this run has stopped"
    with pytest.raises(ConnectionError, match=stopped), all_or_none():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="out of memory"), all_or_none():
        raise RuntimeError("out of memory")


# --- Two and four processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """What a single process finds."""
    folder = tmp_path_factory.mktemp("one")
    return {
        "folder": folder,
        "grouped": many.pretrain(folder / "saved", "grouped", save_every=10),
        "grouped, accumulated": many.pretrain(folder / "1", "grouped", accumulation=2),
        "tied": many.pretrain(folder / "2", "tied"),
        "tied, 13": many.pretrain(folder / "3", "tied", seq_len=13),
        "tied, accumulated": many.pretrain(folder / "4", "tied", batch_size=2, accumulation=2),
        "masked": {model: many.masked(model) for model in many.MODELS},
        "gradients": {model: many.logits_and_gradients(model) for model in many.MODELS},
    }


@pytest.fixture(scope="module")
def of_four(one, tmp_path_factory) -> Iterator[list[dict]]:
    folder = tmp_path_factory.mktemp("four")
    cut(one["folder"] / "saved", folder / "saved by one")
    found = results(4, "four", folder)
    found[0]["folder"] = folder
    return found


@pytest.fixture(scope="module")
def of_two(of_four, tmp_path_factory) -> Iterator[list[dict]]:
    folder = tmp_path_factory.mktemp("two")
    for name in ("cut 1", "cut 2"):
        cut(of_four[0]["folder"] / "saved", folder / name)
    found = results(2, "two", folder)
    found[0]["folder"] = folder
    return found


def assert_same_curve(found: list[dict], expected: list[dict], rel: float = 1e-5) -> None:
    assert len(found) == len(expected) == 21  # 20 steps and a validation
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows, grouped", "grouped, accumulated"),
        ("rows, tied", "tied"),
        ("matrices, grouped", "grouped"),
        ("matrices, tied", "tied, 13"),
    ],
)
def test_two_processes_take_the_steps_of_one(one, of_two, name, expected):
    """Losses and gradient norms; FSDP ("rows") and tensor with sequence parallelism."""
    assert_same_curve(of_two[0][name], one[expected])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("both, grouped", "grouped"), ("both, tied", "tied, accumulated")]
)
def test_four_processes_take_the_steps_of_one(one, of_four, name, expected):
    assert_same_curve(of_four[0][name], one[expected])


@pytest.mark.slow
def test_ignored_targets_count_on_no_rank(one, of_two, of_four):
    """A mean of the ranks' means would be far off: most targets are in the first row."""
    for found, model in ((of_two, "tied"), (of_four, "grouped")):
        (name,) = (name for name in found[0] if name.endswith("masked"))
        for rank in found:  # and all ranks say the same
            assert len(rank[name]) == 20
            assert_close(torch.tensor(rank[name]), torch.tensor(one["masked"][model]))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["grouped", "tied"])
@pytest.mark.parametrize("kind", ["rows", "matrices"])
def test_logits_and_every_gradient_are_those_of_one_process(one, of_two, kind, model):
    expected = one["gradients"][model]
    found = [rank[f"{kind}, gradients, {model}"] for rank in of_two]
    logits = [torch.tensor(rank["logits"]) for rank in found]
    if kind == "rows":
        logits = [torch.cat(logits)] * 2
    for rank, its_logits in zip(found, logits, strict=True):
        assert rank["tied"] == expected["tied"] == (model == "tied")
        assert_close(its_logits, torch.tensor(expected["logits"]))
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in rank["gradients"].items():
            wanted = torch.tensor(expected["gradients"][name])
            # A sum of terms of either sign is exact up to the size of the largest term.
            atol = 1e-6 * wanted.abs().max().item()
            assert_close(torch.tensor(gradient), wanted, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.slow
def test_bfloat16_is_near(one, of_two):
    expected = [line["loss"] for line in one["grouped"][:20]]
    found = [line["loss"] for line in of_two[0]["bfloat16"][:20]]
    assert found == pytest.approx(expected, rel=5e-3)
    assert found != pytest.approx(expected, rel=1e-6)  # it was not float32


@pytest.mark.slow
def test_the_final_checkpoint_is_whole(one, of_two, of_four):
    expected, _ = load(one["folder"] / "saved" / "checkpoint")
    for folder in (of_four[0]["folder"] / "saved", of_two[0]["folder"] / "3"):
        model, tokenizer = load(folder / "checkpoint")
        assert tokenizer.vocab_size == 300
        for name, weight in model.state_dict().items():
            assert_close(weight, expected.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_each_rank_keeps_its_quarter(of_four):
    """Of weights and both moments; the norms, 160 numbers, are whole on their tp neighbours."""
    for here, whole in (rank["held"] for rank in of_four):
        assert whole / 4 <= here <= whole / 4 + 3 * 160


@pytest.mark.slow
def test_saved_by_four_resumed_by_one(one, of_four, tmp_path):
    folder = cut(of_four[0]["folder"] / "saved", tmp_path / "cut")
    names = [
        {name for file in path.glob("*.safetensors") for name in load_file(file)}
        for run in (of_four[0]["folder"], one["folder"])
        for path in (run / "saved" / "states").iterdir()
    ]
    assert len(names) == 4
    assert all(found == names[0] for found in names)  # also after the validation of step 20
    state = folder / "states" / "000000010"
    assert len(list(state.glob("*.safetensors"))) == 4
    assert json.loads((state / "state.json").read_text())["saved_by"] == 4
    with pytest.raises(ValueError, match=r"tensor_parallel is 2, but must divide .* \(1\)"):
        PretrainingRun.resume(folder)
    run = PretrainingRun.resume(folder, tensor_parallel=1)
    assert run.step == 10
    assert_same_curve(many.log_of(run), one["grouped"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed as rows", "resumed as matrices"])
def test_saved_by_four_resumed_by_two(one, of_two, name):
    assert_same_curve(of_two[0][name], one["grouped"])


@pytest.mark.slow
def test_saved_by_one_resumed_by_four(one, of_four):
    assert_same_curve(of_four[0]["from one"], one["grouped"])


@pytest.mark.slow
def test_an_error_of_rank_0_stops_every_rank(of_four):
    assert [rank["refused"] for rank in of_four] == ["There is no text."] * 4


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_whole_batch(of_two, tmp_path):
    expected = many.diverge(tmp_path / "diverged")
    for rank in of_two:
        assert rank["diverged"].startswith("Step 1: the loss is nan")
        assert "The batch and the weights are kept in" in rank["diverged"]
    kept = {}
    for file in (of_two[0]["folder"] / "diverged" / "post-mortem").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            kept.setdefault(name, []).append(tensor)
    (whole,) = (tmp_path / "diverged" / "post-mortem").glob("*.safetensors")
    tokens = torch.cat(kept["batch.0.tokens"])
    assert sorted(tokens.tolist()) == sorted(load_file(whole)["batch.0.tokens"].tolist())
    assert expected.startswith("Step 1: the loss is nan")


@pytest.mark.slow
def test_a_full_disk_of_one_rank_stops_all_and_keeps_the_state_before(of_two):
    for rank in of_two:
        message, states = rank["full disk"]
        assert "000000002 could not be written by process 1" in message
        assert "No space left on device" in message
        assert "000000001" in states
        assert "000000002" not in states
    assert of_two[0]["full disk"][1] == ["000000001"]  # nor does rank 0 leave anything else


# --- One that dies, and the command line ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "killed"])
def test_when_one_rank_dies_the_others_stop(how, tmp_path):
    done = torchrun(2, HERE / "many.py", "die", tmp_path / "run", how, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("minillama: Rank 1 has had enough.") == (how == "raises")
    assert done.stderr.count("minillama: Another process of this run has stopped") <= 1
    assert "[rank0]: Traceback" not in done.stderr
    assert "[rank1]: Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_on_the_command_line_and_one_that_resumes(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(STORIES))
    sizes = "--by-line --preset tiny --vocab-size 300 --seq-len 16 --batch-size 4 --steps 6"
    flags = [*sizes.split(), "--warmup-steps", "1", "--save-every", "2", "--out", str(out)]
    done = torchrun(2, "-m", "minillama", "pretrain", "--text", text, *flags)
    assert done.returncode == 0, done.stderr
    expected = (out / "log.jsonl").read_text().splitlines()
    assert len(expected) == 7
    model, _ = load(out / "checkpoint")
    assert model.config.vocab_size == 300

    for path in (out / "states" / "000000006", out / "checkpoint"):
        shutil.rmtree(path)
    command = [sys.executable, "-m", "minillama", "pretrain", "--resume", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert resumed.returncode == 0, resumed.stderr
    found = (out / "log.jsonl").read_text().splitlines()
    assert found[:4] == expected[:4]
    for one, other in zip(found, expected, strict=True):
        assert json.loads(one) == pytest.approx(json.loads(other), rel=1e-5)
    assert load(out / "checkpoint")
