"""`LoRASftRun`, and `minillama lora --data` on top of it."""

import json
import shutil
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small import STORIES, small_config, small_tokenizer

from minillama.adapt.lora import attach
from minillama.chat.dialog import Message
from minillama.chat.sft import LoRASftRun, SftRun, tokenise, toy_dialogues
from minillama.checkpoint import load, load_tokenizer, save
from minillama.checkpoint.peft import load_adapter
from minillama.cli import main
from minillama.config import ADAPTABLE, LoRAConfig, RunConfig, TrainingConfig
from minillama.data.packing import IGNORE
from minillama.model import Llama
from minillama.training.loss import batch_loss

TRAINING = TrainingConfig(
    steps=6, batch_size=2, seq_len=128, learning_rate=1e-2, warmup_steps=1, weight_decay=0.0
)
ADAPTER = LoRAConfig(rank=4, dropout=0.2, targets=("wq", "wv", "w2"))
PAIRS = [
    [Message("user", f"Which {n}?"), Message("assistant", story)] for n, story in enumerate(STORIES)
]
FLAGS = ["--steps", "4", "--warmup-steps", "1", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder, config = tmp_path_factory.mktemp("base") / "model", small_config(max_seq_len=256)
    save(folder, Llama(config, torch.Generator().manual_seed(0), 0.1), small_tokenizer())
    return folder


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": [asdict(message) for message in dialogue]} for dialogue in PAIRS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def new_run(folder: Path, base: Path, **changes) -> LoRASftRun:
    tok = small_tokenizer()
    arguments = {"saving": RunConfig(save_every=2), "config": TRAINING, "adapter": ADAPTER}
    return LoRASftRun(
        folder, tokenise(PAIRS[3:], tok), tokenise(PAIRS[:3], tok), tok, base, **arguments | changes
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_an_adapter_of_full_rank_learns_twenty_dialogues_by_heart(tmp_path, quantize):
    checkpoint = "data/toy/checkpoint"
    tok = load_tokenizer(f"{checkpoint}/tokenizer.model")
    first = [dialogue[:2] for dialogue in toy_dialogues("train", 100)]
    short = [each for each in first if sum(len(message.content) for message in each) < 150]
    examples = tokenise(short[:20], tok)
    assert len(examples) == 20
    run = LoRASftRun(
        tmp_path / "run",
        examples,
        examples,
        tok,
        checkpoint,
        LoRAConfig(rank=96, alpha=96, targets=ADAPTABLE),
        replace(TRAINING, steps=60, seq_len=256, warmup_steps=5),
        saving=RunConfig(save_every=0),
        quantize=quantize,
    )
    assert hasattr(run.model.layers[0].attention.wq.base, "codes")
    for _ in run:
        pass
    assert run.log()[-1]["validation_loss"] < 0.05  # nats per learned token; it began at 8
    model, _ = load(checkpoint, quantize=quantize)
    attach(model, load_adapter(run.folder / "adapter", model.config))
    ids = torch.tensor([examples[0].ids])
    with torch.no_grad():
        assert torch.equal(model(ids), run.model(ids))


def test_its_first_batch_is_that_of_fine_tuning_and_has_the_same_loss(tmp_path, base):
    tok, losses = small_tokenizer(), []
    examples = tokenise(PAIRS[3:], tok), tokenise(PAIRS[:3], tok)
    runs = (
        new_run(tmp_path / "lora", base),
        SftRun(tmp_path / "sft", *examples, tok, base, TRAINING),
    )
    for run in runs:
        batch = next(run.batches)
        losses.append(batch_loss(run.model, batch).item() / batch.n_targets)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # B = 0: the adapter changes nothing


def test_what_users_say_is_not_learned(tmp_path, base):
    tok = small_tokenizer()
    run = new_run(tmp_path / "run", base)
    learned = {tok.decode(e.ids[e.learned.index(True) :]).strip() for e in tokenise(PAIRS, tok)}
    for _ in range(20):
        batch = next(run.batches)
        for targets in batch.targets.tolist():
            ends = [place for place, id in enumerate(targets) if id == tok.eos_id]
            starts = [0, *(end + 1 for end in ends[:-1])]
            for start, end in zip(starts, ends, strict=True):
                said = [id for id in targets[start:end] if id != IGNORE]
                assert tok.decode(said).strip() in learned
    sizes = json.loads((run.folder / "tokens" / "sizes.json").read_text())
    held_out = tokenise(PAIRS[:3], tok)
    assert sizes["held_out"]["tokens"] == sum(sum(each.learned) for each in held_out)


@pytest.mark.parametrize(("stop", "quantize"), [(1, None), (4, "nf4"), (5, None)])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path, base, stop, quantize):
    for _ in new_run(tmp_path / "whole", base, quantize=quantize):
        pass
    cut = iter(new_run(tmp_path / "cut", base, quantize=quantize))
    for _ in range(stop):
        next(cut)
    del cut
    torch.manual_seed(stop)
    run = LoRASftRun.resume(tmp_path / "cut")
    assert run.step == stop // 2 * 2
    for _ in run:
        pass
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_epochs_are_counted_in_rows(tmp_path, base):
    assert new_run(tmp_path / "run", base, epochs=2.0).config.steps == 27  # of 2 of the 27 rows


def test_rows_longer_than_the_bases_context_are_refused(tmp_path, base):
    with pytest.raises(ValueError, match="longer than the model's context"):
        new_run(tmp_path / "run", base, config=replace(TRAINING, seq_len=512))
    assert not (tmp_path / "run").exists()


# --- The command ----------------------------------------------------------------------------------


def lora(base: Path, chats: Path, out: Path, *more: str) -> None:
    main(["lora", str(base), "--data", str(chats), "--out", str(out), *FLAGS, *more])


def test_the_command_leaves_an_adapter_to_chat_with(tmp_path, base, chats, capsys, monkeypatch):
    out = tmp_path / "run"
    lora(base, chats, out, "--merge")
    shown = capsys.readouterr().out
    assert "27 dialogues in the format llama2: " in shown
    assert f"{out} holds adapter/, loss.png" in shown
    assert shown.endswith(f"Try it: minillama chat {base} --adapter {out / 'adapter'}\n")
    settings = tomllib.loads((out / "config.toml").read_text())
    assert settings["data"]["files"] == [str(chats)]
    assert settings["data"]["chat_format"] == "llama2"
    assert settings["training"]["seq_len"] == 256  # no more than the base reads
    merged, tokenizer = load(out / "checkpoint")
    assert (merged.config.max_seq_len, tokenizer.chat_format) == (256, "llama2")

    lines = iter(["Which 1?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    adapter = ["--adapter", str(out / "adapter")]
    main(["chat", str(base), *adapter, "--device", "cpu", "--max-new-tokens", "5"])
    assert "a context of 256 tokens, chat format llama2" in capsys.readouterr().out


@pytest.mark.parametrize("joined", [False, True])
def test_dialogues_have_defaults_of_their_own(tmp_path, base, chats, joined):
    out = tmp_path / "run"
    data = [f"--data={chats}"] if joined else ["--data", str(chats)]
    more = ["--out", str(out), "--steps", "1", "--warmup-steps", "0", "--device", "cpu"]
    main(["lora", str(base), *data, *more])
    training = tomllib.loads((out / "config.toml").read_text())["training"]
    assert (training["batch_size"], training["seq_len"]) == (1, 256)


def test_another_format_is_named_to_the_user_again(tmp_path, base, capsys, chats):
    lora(base, chats, tmp_path / "run", "--chat-format", "alpaca")
    assert capsys.readouterr().out.endswith("/adapter --chat-format alpaca\n")


def test_the_command_resumes_with_or_without_the_same_flags(tmp_path, base, chats, capsys):
    out = tmp_path / "run"
    lora(base, chats, out, "--save-every", "2")
    whole = bytes_of(out / "adapter")
    shutil.rmtree(out / "states" / "000000004")
    main(["lora", "--resume", "--out", str(out), "--device", "cpu"])
    assert "2 of them were taken before" in capsys.readouterr().out
    assert bytes_of(out / "adapter") == whole
    lora(base, chats, out, "--resume")
    assert bytes_of(out / "adapter") == whole
    for flags, message in (
        (["--data", "other.jsonl"], "files was ["),
        (["--chat-format", "alpaca"], "chat_format was 'llama2' when"),
        (["--epochs", "3"], "epochs was 0.0 when"),
    ):
        with pytest.raises(SystemExit):
            main(["lora", "--resume", "--out", str(out), "--device", "cpu", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "BOOK", "--data", "CHATS"], "--data FILE.jsonl...; one of the two"),
        (["--text", "CHATS"], "If they are dialogues: minillama lora BASE --data CHATS"),
        (["--text", "BOOK", "--epochs", "2"], "--epochs and --chat-format are for dialogues"),
        (["--data", "CHATS", "--epochs", "2", "--steps", "30"], "Both --steps and --epochs say"),
        (["--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_text_and_leaves_nothing(
    tmp_path, base, chats, capsys, arguments, message
):
    (tmp_path / "book.txt").write_text("".join(STORIES))
    names = {"BASE": str(base), "CHATS": str(chats), "BOOK": str(tmp_path / "book.txt")}
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(["lora", str(base), *(names.get(a, a) for a in arguments), "--out", str(out)])
    assert end.value.code == 2
    for name, value in names.items():
        message = message.replace(name, value)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_sft_of_a_base_in_few_bits_names_the_command_that_works(tmp_path, base, chats, capsys):
    model, tokenizer = load(base, quantize="int8")
    int8, out = tmp_path / "int8", tmp_path / "run"
    save(int8, model, tokenizer)
    with pytest.raises(SystemExit):
        main(["sft", str(int8), "--data", str(chats), "--out", str(out)])
    assert f"minillama lora {int8} --data FILE.jsonl" in capsys.readouterr().err
    lora(int8, chats, out)
    assert (out / "adapter").exists()


def test_a_base_in_few_bits_is_not_merged_and_that_is_said_before_training(
    tmp_path, base, chats, capsys
):
    model, tokenizer = load(base, quantize="int8")
    int8, out = tmp_path / "int8", tmp_path / "run"
    save(int8, model, tokenizer)
    for _ in range(2):
        with pytest.raises(SystemExit):
            lora(int8, chats, out, "--merge", "--resume")
        error = capsys.readouterr().err
        assert f"{int8} holds weights in int8, into which no adapter is merged. Leave" in error
        if not out.exists():
            lora(int8, chats, out)  # and the same for a run that is resumed
            capsys.readouterr()
