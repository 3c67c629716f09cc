"""`LoRARun`, and `minillama lora` on top of it."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import STORIES, small_config, small_llama, small_tokenizer
from torch.testing import assert_close

from minillama.adapt.lora import attach
from minillama.checkpoint import load, save
from minillama.checkpoint.peft import load_adapter
from minillama.cli import main
from minillama.config import LoRAConfig, RunConfig, TrainingConfig
from minillama.model import Llama
from minillama.training.lora_run import MIB, LoRARun, base_digest
from minillama.training.run import PretrainingRun

TRAINING = TrainingConfig(
    steps=6, batch_size=4, seq_len=32, learning_rate=3e-2, warmup_steps=1, weight_decay=0.0
)
ADAPTER = LoRAConfig(rank=4, dropout=0.2, targets=("wq", "wv", "w2"))
FLAGS = ["--steps", "4", "--warmup-steps", "1", "--batch-size", "2", "--seq-len", "16"]
FLAGS += ["--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save(folder, Llama(small_config(), torch.Generator().manual_seed(0), 0.1), small_tokenizer())
    return folder


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text("".join(STORIES))
    return tmp_path / "book.txt"


def new_run(folder: Path, base: Path, config: TrainingConfig = TRAINING, **changes) -> LoRARun:
    arguments = {"adapter": ADAPTER, "saving": RunConfig(save_every=2)} | changes
    return LoRARun(
        folder, STORIES[3:], STORIES[:3], small_tokenizer(), base, config=config, **arguments
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_learns_and_leaves_an_adapter_that_gives_the_same_logits(tmp_path, base):
    before = bytes_of(base)
    run = new_run(tmp_path / "run", base, replace(TRAINING, steps=20))
    losses = [stats.loss for stats in run]
    assert losses[-1] < losses[0] - 0.3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"adapter", "config.toml", "log.jsonl", "loss.png", "states", "tokens"}
    model, _ = load(base)
    adapter = load_adapter(tmp_path / "run" / "adapter", model.config)
    assert adapter.config.rank == 4
    attach(model, adapter)
    tokens = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        assert torch.equal(model(tokens), run.model(tokens))
    assert bytes_of(base) == before


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes_with_dropout_too(tmp_path, base, stop):
    losses = [stats.loss for stats in new_run(tmp_path / "whole", base)]
    cut = iter(new_run(tmp_path / "cut", base))
    for _ in range(stop):
        next(cut)
    del cut
    torch.manual_seed(stop)  # another process has other random numbers
    run = LoRARun.resume(tmp_path / "cut")
    saved = stop // 2 * 2
    assert run.step == saved
    assert [stats.loss for stats in run] == losses[saved:]
    assert bytes_of(tmp_path / "cut" / "adapter") == bytes_of(tmp_path / "whole" / "adapter")


def test_dropout_leaves_the_callers_random_numbers_alone(tmp_path, base):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn = [torch.rand(1) for _, _ in zip(new_run(tmp_path / "run", base), range(2), strict=False)]
    assert torch.equal(torch.cat(drawn), expected)


def test_another_step_drops_others(tmp_path, base, monkeypatch):
    seeds = []

    def dropout(x, *_):
        seeds.append(torch.initial_seed())
        return x

    monkeypatch.setattr("minillama.adapt.lora.dropout", dropout)
    run = new_run(tmp_path / "run", base, saving=RunConfig(save_every=0))
    for step, _ in enumerate(run, 1):
        assert len(set(seeds)) == step


def test_a_state_holds_what_is_trained_and_nothing_else(tmp_path, base):
    run = new_run(tmp_path / "run", base)
    for _ in run:
        pass
    state = load_file(tmp_path / "run" / "states" / "000000006" / "state.safetensors")
    trained = {name: p.numel() for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name for name in state if not name.startswith("optimizer.")} == set(trained)
    assert sum(tensor.numel() for tensor in state.values()) == 3 * sum(trained.values()) + len(
        trained  # AdamW's count of steps, for each
    )


def test_a_quantised_base_learns_and_is_resumed(tmp_path, base):
    whole = [s.loss for s in new_run(tmp_path / "whole", base, quantize="nf4")]
    cut = iter(new_run(tmp_path / "cut", base, quantize="nf4"))
    for _ in range(4):
        next(cut)
    run = LoRARun.resume(tmp_path / "cut")
    assert hasattr(run.model.layers[0].attention.wk, "codes")
    assert run.plan.quantize == "nf4"
    assert [stats.loss for stats in run] == whole[4:]


@pytest.mark.parametrize(("quantize", "checkpointing"), [(None, "none"), ("nf4", "selective")])
def test_in_16_bits_as_on_gpus_it_learns_as_well(tmp_path, base, quantize, checkpointing):
    config = replace(TRAINING, steps=12, precision="bfloat16", checkpointing=checkpointing)
    run = new_run(tmp_path / "run", base, config, quantize=quantize)
    assert run.model.tok_embeddings.weight.dtype == torch.bfloat16
    losses = [stats.loss for stats in run]
    assert losses[-1] < losses[0] - 0.2
    adapter = load_adapter(tmp_path / "run" / "adapter", run.model.config)
    assert {low.b.dtype for low in adapter.layers.values()} == {torch.float32}


def test_the_plan_counts_the_adapter_and_not_the_model(tmp_path, base):
    run = new_run(tmp_path / "run", base, adapter=replace(ADAPTER, targets=("wq", "output")))
    assert (run.plan.lora, run.plan.targets) == (4, ("wq",))
    assert run.plan.optimizer_state < run.plan.weights / 10


def test_another_model_in_the_place_of_the_base_is_noticed(tmp_path):
    save(tmp_path / "base", small_llama(), small_tokenizer())
    new_run(tmp_path / "run", tmp_path / "base")
    save(tmp_path / "base", small_llama(n_layers=3), small_tokenizer())
    with pytest.raises(ValueError, match="holds another model than when this run was started"):
        LoRARun.resume(tmp_path / "run")


def test_other_weights_in_the_place_of_the_base_are_noticed(tmp_path):
    save(tmp_path / "base", small_llama(), small_tokenizer())
    next(iter(new_run(tmp_path / "run", tmp_path / "base")))
    LoRARun.resume(tmp_path / "run")
    save(tmp_path / "base", small_llama(seed=1), small_tokenizer())
    with pytest.raises(
        ValueError, match=r"when this run was started: its weights were changed\. R"
    ):
        LoRARun.resume(tmp_path / "run")


def test_the_digest_of_a_base_sees_every_sixteenth_mebibyte_of_a_large_file(tmp_path):
    """A sparse file of more than 1 GiB."""
    path, digests = tmp_path / "model.gguf", []
    for place in (None, 5, 64 * MIB + 9, 64 * MIB + MIB + 9):
        with path.open("wb") as file:
            file.truncate(1024 * MIB + 1)
            if place is not None:
                file.seek(place)
                file.write(b"1")
        digests.append(base_digest(path))
    assert len({*digests}) == 3
    assert digests[3] == digests[0]  # as the docstring says


def test_one_process_trains_an_adapter():
    run = LoRARun.__new__(LoRARun)
    run._ranks = SimpleNamespace(mesh=SimpleNamespace(size=lambda: 4))
    with pytest.raises(ValueError, match="trained by one process, but 4 were started: run"):
        run._plan({})


def test_a_pretraining_run_is_not_resumed_as_an_adapters(tmp_path):
    PretrainingRun(
        tmp_path / "run", STORIES[3:], STORIES[:3], small_tokenizer(), small_config(), TRAINING
    )
    with pytest.raises(ValueError, match="holds a run of `minillama pretrain`"):
        LoRARun.resume(tmp_path / "run")


# --- The command ---------------------------------------------------------------------------------


def lora(base: Path, book: Path, out: Path, *more: str) -> None:
    main(["lora", str(base), "--text", str(book), "--by-line", "--out", str(out), *FLAGS, *more])


def test_the_command_trains_merges_and_says_how_to_use_it(tmp_path, base, book, capsys):
    out = tmp_path / "run"
    lora(base, book, out, "--rank", "2", "--targets", "wq", "w1", "--merge", "--alpha", "8")
    shown = capsys.readouterr().out
    numbers = 2 * 2 * (2 * 32 + 32 + 64)
    assert f"rank 2 beside wq, w1, {numbers} numbers. All others are frozen" in shown
    assert f"{out} holds adapter/, loss.png" in shown
    assert f"--model {base} --adapter {out / 'adapter'}" in shown
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 8)
    assert settings["base_model_name_or_path"] is None  # transformers cannot open our folder

    merged, _ = load(out / "checkpoint")
    model, _ = load(base)
    attach(model, load_adapter(out / "adapter", model.config))
    tokens = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        assert_close(merged(tokens), model(tokens), rtol=0, atol=1e-5)

    texts = []
    for arguments in (
        ["--model", base, "--adapter", out / "adapter"],
        ["--model", out / "checkpoint"],
        ["--model", base],
    ):
        main(["generate", *map(str, arguments), "--max-new-tokens", "20", "--device", "cpu", "Ada"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Ada")


def test_the_command_resumes_with_or_without_the_same_flags(tmp_path, base, book, capsys):
    out = tmp_path / "run"
    lora(base, book, out, "--save-every", "2")
    whole = bytes_of(out / "adapter")
    for more in (["--resume"], ["lora", "--resume"]):
        cut = LoRARun.resume(out)  # its last state is that of the last step
        assert cut.step == 4
        arguments = ["lora", "--resume", "--out", str(out), "--device", "cpu"]
        main(arguments if len(more) > 1 else [*arguments, str(base), "--text", str(book), *FLAGS])
        assert bytes_of(out / "adapter") == whole
    for flags, message in (
        (["--rank", "3"], "rank was 8 when the run in"),
        (["--quantize", "int8"], "quantize was '' when"),
        (["--text", "other.txt"], "text was ["),
        (["--tokenizer", "nowhere"], "tokenizer was '' when"),
    ):
        with pytest.raises(SystemExit):
            main(["lora", "--resume", "--out", str(out), "--device", "cpu", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the model, and what it is to learn from: minillama lora MODEL --text FILE"),
        (["BASE"], "Name the model, and what it is to learn from"),
        (["nowhere", "--text", "BOOK"], "There is no nowhere"),
        (["BASE", "--text", "BOOK", "--targets", "wx"], "no linear layer 'wx'. Known are: wq"),
        (["BASE", "--text", "BOOK", "--seq-len", "65"], "longer than the model's context"),
        (
            ["BASE", "--text", "BOOK", "--quantize", "int9", *FLAGS],
            "There is no quantisation 'int9'",
        ),
        (["BASE", "--text", "BOOK", "--rank", "0"], "rank is 0, but must be at least 1"),
    ],
)
def test_a_mistake_is_one_text_and_leaves_nothing(tmp_path, base, book, capsys, arguments, message):
    names = {"BASE": str(base), "BOOK": str(book)}
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["lora", *(names.get(a, a) for a in arguments), "--out", str(out), "--device", "cpu"])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not out.exists()


def test_an_adapter_that_is_there_is_not_overwritten(tmp_path, base, book, capsys):
    lora(base, book, tmp_path / "run")
    with pytest.raises(SystemExit):
        lora(base, book, tmp_path / "run")
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_by_generate(tmp_path, base, book, capsys):
    lora(base, book, tmp_path / "run")
    save(tmp_path / "other", small_llama(n_layers=3), small_tokenizer())
    adapter = str(tmp_path / "run" / "adapter")
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(tmp_path / "other"), "--adapter", adapter, "Ada"])
    assert "made for another model" in capsys.readouterr().err


def test_the_config_says_all_of_it(tmp_path, base):
    new_run(tmp_path / "run", base, origin={"text": ["a.txt"]})
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["adapter"]["targets"] == ["wq", "wv", "w2"]
    assert (settings["base"]["path"], settings["base"]["quantize"]) == (str(base), "")
    assert settings["data"] == {"text": ["a.txt"]}
    assert settings["training"]["steps"] == 6


@pytest.mark.parametrize(
    ("saving", "steps"),
    [(None, [18, 20]), (RunConfig(save_every=15), [15, 20]), (RunConfig(save_every=0), [])],
)
def test_a_short_run_saves_every_tenth_of_its_steps_unless_told_otherwise(
    tmp_path, base, saving, steps
):
    for _ in new_run(tmp_path / "run", base, replace(TRAINING, steps=20), saving=saving):
        pass
    states = tmp_path / "run" / "states"
    assert sorted(int(state.name) for state in states.glob("*")) == steps


def test_a_resume_without_a_state_says_so(tmp_path, base, book, capsys):
    out = tmp_path / "run"
    lora(base, book, out, "--save-every", "0")
    whole = bytes_of(out / "adapter")
    capsys.readouterr()
    main(["lora", "--resume", "--out", str(out), "--device", "cpu"])
    assert "No state was saved yet: the run starts at step 1." in capsys.readouterr().out
    assert bytes_of(out / "adapter") == whole
    main(["lora", "--resume", "--out", str(out), "--device", "cpu"])
    assert "No state was saved yet" not in capsys.readouterr().out
