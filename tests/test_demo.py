"""The demo keeps its promise, and the toy checkpoint that ships is what its recipe makes."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minillama import load
from minillama.checkpoint.native import FILES
from minillama.data import tales
from minillama.evaluation.assistant import examine
from minillama.evaluation.tales import write_tales

TOY = Path(__file__).parents[1] / "data" / "toy"


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines[:-1]]


def demo(folder, *flags):
    command = [sys.executable, "-m", "minillama", "demo", "--out", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_toy_that_ships_is_small_and_writes_consistent_stories():
    assert sum(path.stat().st_size for path in (TOY / "checkpoint").iterdir()) < 2_000_000
    report = write_tales(*load(TOY / "checkpoint"), tales.corpus("train"), n=30, seed=1000)
    assert report.n_consistent >= 24  # fewer stories, so a wider margin than for a hundred
    assert report.n_copied == 0


@pytest.mark.slow
def test_the_assistant_that_ships_answers_obeys_and_forgets():
    assert sum(path.stat().st_size for path in (TOY / "chat").iterdir()) < 2_000_000
    report = examine(*load(TOY / "chat"), n=60, seed=1000)
    assert report.share("facts") >= 0.9
    assert report.share("about_tales") >= 0.85
    assert report.share("tales") >= 0.8
    assert report.share("told_now") >= 0.9
    assert report.share("told_before") <= 0.1  # which Ghost Attention is there to change


@pytest.mark.slow
def test_a_short_rebuild_follows_the_toys_loss_curve(tmp_path):
    # In the first 60 of its steps a shorter run has the same warm-up and nearly the same rate.
    settings = tomllib.loads((TOY / "config.toml").read_text())["training"]
    n_steps = settings["warmup_steps"] + 10
    demo(tmp_path / "run", "--no-chat", "--steps", str(n_steps), "--n-checked", "1")
    rebuilt = losses(tmp_path / "run")[: settings["warmup_steps"]]
    assert rebuilt == pytest.approx(losses(TOY)[: len(rebuilt)], abs=0.02)  # another CPU rounds


@pytest.mark.slow
@pytest.mark.timeout(3600)  # it trains for minutes, more on a busy machine
def test_the_demo_ends_with_an_assistant_that_answers_and_keeps_its_instruction(tmp_path):
    output = demo(tmp_path / "run")
    print(output)
    stories = r"Of (\d+) stories .* (\d+) are consistent .* (\d+) are copied"
    n, consistent, copied = map(int, re.search(stories, output).groups())
    assert n == 100
    assert consistent >= 90
    assert copied == 0
    files = {"checkpoint", "config.toml", "log.jsonl", "loss.png", "tokens"}
    for folder, more in (("", {"sft", "gatt"}), ("sft", set()), ("gatt", set())):
        found = tmp_path / "run" / folder
        assert {path.name for path in found.iterdir()} == files | more
        assert {path.name for path in (found / "checkpoint").iterdir()} == set(FILES)
    assert losses(tmp_path / "run")[-1] < 1.0

    (summary,) = re.findall(r"\n(\d+%.*a turn ago\.)", output)
    facts, about, tales_told, _, told_now, told_before = map(int, re.findall(r"(\d+)%", summary))
    assert facts >= 90
    assert about >= 85
    assert tales_told >= 75
    assert told_now >= 90
    assert told_before <= 10
    before, after = (
        [int(share) for share in re.findall(r"(\d+)%", row)]
        for row in re.findall(r"\n((?:before|after) .*)", output)
    )
    assert max(before[1:]) <= 30
    assert min(after) >= 70
    assert sum(after) / len(after) >= 85
    (kept,) = re.findall(r"\n(\d) of 8 answers do what the first turn says", output)
    assert int(kept) >= 6
    dialogue = output.split("Ghost Attention:")[1]
    assert len(re.findall(r"\n *user: \w+", dialogue)) == 8
    assert len(re.findall(r"\n *assistant: \w+", dialogue)) == 8
