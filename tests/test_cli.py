import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest
from small import STORIES

from minillama.checkpoint import load
from minillama.cli import main
from minillama.config import PRESETS
from minillama.data.mixture import LLAMA_1
from minillama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
QUICK = ["--steps", "3", "--warmup-steps", "1", "--batch-size", "2", "--seq-len", "16"]
QUICK += ["--preset", "tiny", "--vocab-size", "300", "--device", "cpu"]


COMMANDS = (
    "demo",
    "tokenizer",
    "pretrain",
    "lora",
    "sft",
    "gatt",
    "generate",
    "chat",
    "serve",
    "info",
    "curate",
    "plan",
    "fetch",
)


def minillama(*arguments: object) -> list[str]:
    """The command in a process of its own."""
    return [sys.executable, "-m", "minillama", *map(str, arguments)]


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def processor_time(*command: str) -> float:
    """Seconds of work, whatever else the machine does meanwhile."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # user and system, of children


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(STORIES))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What `minillama pretrain` leaves."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "book.txt").write_text("".join(STORIES))
    main(["pretrain", "--text", str(folder / "book.txt"), "--out", str(folder / "run"), *QUICK])
    return folder / "run" / "checkpoint"


# --- Help ----------------------------------------------------------------------------------------


def test_help_answers_in_half_a_second():
    # Neighbours on the machine slow a run down and never speed it up: one good run is proof.
    assert any(processor_time(*minillama("--help")) < 0.5 for _ in range(20))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["info"], ["info", "toy"]]
)
def test_torch_is_not_imported_where_it_is_not_needed(arguments):
    done = run(sys.executable, "-X", "importtime", *minillama(*arguments)[1:])
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "sentencepiece"}


def test_help_names_every_command():
    done = run(*minillama("--help"))
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", ["chat", "plan", "serve"])
def test_a_model_that_needs_no_flag_is_told_its_place(capsys, command):
    error = one_line(capsys, command, "--model", "data/toy/chat")
    assert f"minillama {command} MODEL. Leave --model out." in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"Example: minillama {command}" in " ".join(capsys.readouterr().out.split())


def test_flags_and_defaults_come_from_the_dataclasses(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--beta2 FLOAT (default: 0.95)" in text
    assert "--accumulation INT micro-batches in one step" in text


# --- The way through -----------------------------------------------------------------------------


def test_pretrain_writes_a_checkpoint_and_says_how_to_use_it(book, tmp_path, capsys):
    main(["pretrain", "--text", str(book), "--out", str(tmp_path / "run"), *QUICK])
    shown = capsys.readouterr().out
    assert "step      1  loss" in shown
    assert "step      3  loss" in shown
    assert f"--model {tmp_path / 'run' / 'checkpoint'}" in shown
    model, tokenizer = load(tmp_path / "run" / "checkpoint")
    assert (model.config.dim, model.config.vocab_size) == (PRESETS["tiny"].dim, 300)
    assert tokenizer.vocab_size == 300
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint",
        "config.toml",
        "log.jsonl",
        "loss.png",
        "states",
        "tokens",
    }
    assert "tokens/s, MFU" in shown
    assert "bits per byte" in shown


def test_pretrain_with_a_tokenizer_that_is_there(book, tmp_path, checkpoint):
    tokenizer = checkpoint / "tokenizer.model"
    out = tmp_path / "run"
    arguments = ["--text", str(book), "--tokenizer", str(tokenizer), "--out", str(out)]
    main(["pretrain", *arguments, "--by-line", *QUICK])
    assert (out / "checkpoint" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


# --- Presets, configs, flags ---------------------------------------------------------------------


def settings(folder: Path) -> dict:
    return tomllib.loads((folder / "config.toml").read_text())


def test_a_preset_brings_the_sizes_and_the_papers_settings(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--preset", "llama2-7b", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for shown in (
        "--model.dim INT width of the residual stream (default: 4096)",
        "small models take more (default: 0.0003)",
        "(default: 476837)",
        "--warmup-steps INT the papers: 2,000 (default: 2000)",
    ):
        assert shown in text


def test_flags_override_the_config_which_overrides_the_preset(book, tmp_path):
    (tmp_path / "my.toml").write_text(
        "preset = 'tiny'\n[model]\nn_layers = 1\nvocab_size = 300\n"
        "[training]\nsteps = 5\nwarmup_steps = 1\nbatch_size = 2\nseq_len = 16\nseed = 7\n"
        f"[data]\ntext = ['{book}']\n"
    )
    out = tmp_path / "run"
    flags = ["--config", tmp_path / "my.toml", "--steps", "3", "--model.hidden-dim", "64"]
    main(["pretrain", "--out", str(out), *map(str, flags)])
    found = settings(out)
    assert (found["training"]["steps"], found["training"]["seed"]) == (3, 7)
    expected = replace(PRESETS["tiny"], n_layers=1, vocab_size=300, hidden_dim=64)
    assert found["model"] == expected.to_dict()
    assert found["data"] == {"text": [str(book)]}
    # What a run writes down makes the same run again.
    again = tmp_path / "again"
    main(["pretrain", "--config", str(out / "config.toml"), "--out", str(again)])
    assert settings(again) == found
    weights = Path("checkpoint") / "model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[training]\nlerning_rate = 1", "[training]: There is no setting 'lerning_rate'. Did you"),
        ("[trainin]\nsteps = 1", "'trainin'. Did you mean 'training'?"),
        ("[training]\nsteps = '1'", "[training]: steps is '1', but must be int"),
        ("[model]\ntie_embeddings = 1", "[model]: tie_embeddings is 1, but must be bool"),
        ("[data]\ntxt = []", "'txt'. Did you mean 'text'?"),
        ("training = 3", "[training] is 3, but must be a table"),
        ("preset = 'toi'", "There is no preset 'toi'"),
        ("[training", "is no TOML file"),
        (None, "There is no config"),
    ],
)
def test_a_config_that_cannot_be(capsys, book, tmp_path, toml, message):
    path = tmp_path / "my.toml"
    if toml is not None:
        path.write_text(toml)
    arguments = ["--text", book, "--out", tmp_path / "out", "--config", path]
    assert message in one_line(capsys, "pretrain", *arguments)
    assert not (tmp_path / "out").exists()


# --- Resume --------------------------------------------------------------------------------------


def test_resume_starts_a_run_continues_it_and_leaves_a_finished_one(book, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["pretrain", "--text", str(book), "--out", str(out), *QUICK, "--save-every", "1"]
    main([*command, "--resume"])
    finished = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    rmtree(out / "states" / "000000003")
    rmtree(out / "checkpoint")
    capsys.readouterr()
    main(["pretrain", "--resume", "--out", str(out)])  # the settings are those of the run
    assert "2 of them were taken before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == finished
    main(["pretrain", "--resume", "--out", str(out)])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == finished


def test_a_damaged_state_is_a_warning_of_one_line(book, tmp_path):
    out = tmp_path / "run"
    main(["pretrain", "--text", str(book), "--out", str(out), *QUICK, "--save-every", "1"])
    (out / "states" / "000000003" / "state.json").write_text("{}")
    done = run(*minillama("pretrain", "--resume", "--out", out))
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("minillama: warning: ")
    assert "state.json is damaged" in line
    assert "The state before it is used" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "4"], "steps was 3 when the run in"),
        (["--model.n-layers", "1"], "n_layers was 2 when the run in"),
    ],
)
def test_a_resumed_run_keeps_its_settings(capsys, book, tmp_path, flags, message):
    out = tmp_path / "run"
    main(["pretrain", "--text", str(book), "--out", str(out), *QUICK])
    capsys.readouterr()
    error = one_line(capsys, "pretrain", "--resume", "--out", out, *flags)
    assert message in error
    assert "leave that out, or start a new run" in error


def test_there_is_no_run_to_resume_and_no_text_to_start_one(capsys, tmp_path):
    error = one_line(capsys, "pretrain", "--resume", "--out", tmp_path / "nowhere")
    assert "Name what to learn from: text files with --text" in error


# --- Mixtures, samples, curves -------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path) -> Path:
    folder = tmp_path / "curated"
    folder.mkdir()
    for n, name in enumerate(LLAMA_1):
        lines = [json.dumps({"text": story}) + "\n" for story in STORIES[n : n + 20]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_pretrain_on_a_mixture_in_llamas_proportions(mixture, tmp_path):
    out = tmp_path / "run"
    main(["pretrain", "--mixture", str(mixture), "--out", str(out), *QUICK])
    assert settings(out)["shares"] == {name: source.share for name, source in LLAMA_1.items()}
    assert settings(out)["data"] == {"mixture": str(mixture)}
    sizes = json.loads((out / "tokens" / "sizes.json").read_text())
    assert set(sizes) == {*LLAMA_1, "held_out"}
    # Each tenth document of each source is held out.
    held_out = sum(len(story.encode()) for n in range(7) for story in STORIES[n : n + 20][9::10])
    assert sizes["held_out"]["bytes"] == held_out


def test_a_mixture_of_ones_own(mixture, tmp_path, capsys):
    (mixture / "arxiv.jsonl").rename(mixture / "letters.jsonl")
    arguments = ["pretrain", "--mixture", mixture, "--out", tmp_path / "run", *QUICK]
    assert "Say how yours are mixed: --shares NAME SHARE" in one_line(capsys, *arguments)
    shares = dict.fromkeys(sorted(path.stem for path in mixture.iterdir()), 0.1) | {"letters": 0.4}
    flags = [str(part) for share in shares.items() for part in share]
    main([*map(str, arguments), "--shares", *flags])
    assert settings(tmp_path / "run")["shares"] == shares
    flags[-1] = "0.2"
    arguments[4] = tmp_path / "other"
    assert "shares add up to 1.1" in one_line(capsys, *arguments, "--shares", *flags)


@pytest.mark.parametrize("both", [True, False])
def test_text_or_a_mixture(capsys, book, mixture, tmp_path, both):
    sources = ["--text", book, "--mixture", mixture] if both else []
    error = one_line(capsys, "pretrain", *sources, "--out", tmp_path / "out")
    assert "one of the two" in error


def test_a_mixture_of_nothing(capsys, tmp_path):
    error = one_line(capsys, "pretrain", "--mixture", tmp_path, "--out", tmp_path / "out")
    assert "holds no source" in error
    assert "minillama curate" in error


def test_samples_are_shown_on_the_way(book, tmp_path, capsys):
    flags = ["--sample-every", "2", "--sample-prompt", "Ada had"]
    main(["pretrain", "--text", str(book), "--out", str(tmp_path / "run"), *QUICK, *flags])
    shown = capsys.readouterr()
    assert "step 2: Ada had" in shown.out + shown.err
    assert "step 3: Ada had" not in shown.out + shown.err


def test_curves_for_tensorboard(book, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    main(["pretrain", "--text", str(book), "--out", str(out), *QUICK, "--tensorboard"])
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    drawn = [(event.step, event.value) for event in events.Scalars("loss")]
    assert drawn == [(line["step"], pytest.approx(line["loss"])) for line in losses[:3]]
    assert "tokens_per_second" in events.Tags()["scalars"]


def test_without_tensorboard_it_says_what_to_install(book, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["--text", book, "--out", tmp_path / "run", *QUICK, "--tensorboard"]
    assert "pip install 'minillama[track]'" in one_line(capsys, "pretrain", *arguments)


# --- Generate, tokenizer, info -------------------------------------------------------------------


def test_generate_continues_the_prompt(checkpoint, capsys):
    shown = []
    for _ in range(2):
        main(["generate", "--model", str(checkpoint), "--max-new-tokens", "10", "Ada had"])
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith("Ada had")
    assert len(shown[0]) > len("Ada had\n")
    assert shown[0] == shown[1]


def test_the_seed_decides_what_generate_draws(checkpoint, capsys):
    def drawn(seed: int) -> str:
        settings = ["--temperature", "1", "--top-p", "0.99", "--top-k", "250", "--seed", str(seed)]
        main(["generate", "--model", str(checkpoint), *settings, "--max-new-tokens", "20"])
        return capsys.readouterr().out

    assert drawn(1) == drawn(1) != drawn(2)


def test_generate_stops_before_a_stop_string(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--temperature", "1", "--seed", "0"]
    main(["generate", *arguments])
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[len(whole) // 2]
    main(["generate", *arguments, "--stop", stop, "--stop", "never"])
    assert capsys.readouterr().out == whole.partition(stop)[0] + "\n"


def test_a_stop_string_leaves_the_prompt_alone(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--max-new-tokens", "5"]
    main(["generate", *arguments, "--stop", "never", "Ada had"])
    assert capsys.readouterr().out.startswith("Ada had")


def test_a_reference_leaves_the_raw_folder_alone(capsys, book, tmp_path):
    flags = ["--out", tmp_path / "out", "--reference", book]
    error = one_line(capsys, "curate", *flags, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in error


def test_generate_and_chat_open_a_model_alike(checkpoint, capsys, monkeypatch):
    flags = ["--max-new-tokens", "20", "--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for command in (["generate", "--model", str(checkpoint)], ["chat", str(checkpoint)]):
        for wrong, told in (
            (["--dtype", "float12"], "There is no dtype 'float12'"),
            (["--quantize", "int5"], "'int5'"),
            (["--adapter", "nowhere"], "nowhere"),
        ):
            assert told in one_line(capsys, *command, *flags, *wrong)
        main([*command, *flags, "--dtype", "bfloat16", "--quantize", "int8"])


def test_every_setting_of_generate_is_a_flag(checkpoint, capsys):
    def written(*flags: str) -> str:
        main(["generate", "--model", str(checkpoint), "--max-new-tokens", "20", *flags])
        return capsys.readouterr().out

    greedy = written()
    assert written("--draft", str(checkpoint)) == greedy
    assert written("--temperature", "1", "--min-p", "1") == greedy
    assert written("--repetition-penalty", "3") != greedy


@pytest.mark.parametrize("tokenizer", ["tok512.bin", "tok512.model"])
def test_generate_tells_the_story_of_lily(assets, tokenizer, capsys):
    folder = assets / "stories260K"
    arguments = ["--model", folder / "stories260K.bin", "--tokenizer", folder / tokenizer]
    main(["generate", *map(str, arguments), "--temperature", "0", "--max-new-tokens", "200"])
    story = capsys.readouterr().out
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
    assert "One day, she saw a big, red ball" in story


def test_a_tokenizer_of_ones_own(book, tmp_path, capsys):
    out = tmp_path / "new" / "tokenizer.model"
    main(["tokenizer", "--text", str(book), "--vocab-size", "300", "--out", str(out)])
    assert Tokenizer(out).vocab_size == 300
    assert "300 pieces" in capsys.readouterr().out


def test_info_lists_every_preset(capsys):
    main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert "68,976,648,192" in next(line for line in lines if line.startswith("llama2-70b"))


@pytest.mark.parametrize("name", PRESETS)
def test_info_of_a_preset(name, capsys):
    main(["info", name])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["n_kv_heads"] == str(PRESETS[name].n_kv_heads)
    assert shown["parameters"] == f"{PRESETS[name].n_parameters:,}"


def test_info_of_llama_2_7b_by_hand(capsys):
    """12.55 GiB in 16 bit; 2 * 32 layers * 4096 channels * 2 bytes a token, 2 GiB for 4096."""
    main(["info", "llama2-7b"])
    shown = capsys.readouterr().out
    assert "12.55 in bfloat16" in shown
    assert "524,288 bytes per token in bfloat16, 2.000 GiB for a full context" in shown


def test_info_of_a_checkpoint(checkpoint, capsys):
    main(["info", str(checkpoint)])
    assert "vocab_size     300" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    quick = ("--no-chat", "--steps", "10", "--n-checked", "4", "--out", tmp_path / "demo")
    done = run(*minillama("demo", *quick))
    assert done.returncode == 0, done.stderr
    assert "Of 4 stories like these" in done.stdout
    assert load(tmp_path / "demo" / "checkpoint")[0].config == PRESETS["toy"]


# --- Bad input -----------------------------------------------------------------------------------


def complaint(capsys, *arguments: object) -> str:
    """The one text with which the command ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert "Traceback" not in error
    return error.strip()


def one_line(capsys, *arguments: object) -> str:
    error = complaint(capsys, *arguments)
    assert error.startswith("minillama: ")
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no text file"),
        (b"", "is empty"),
        (b"GIF89a\0\0", "is a binary file, not text"),
        ("naïve".encode("latin-1") * 100, "is not UTF-8 text"),
    ],
    ids=["missing", "empty", "binary", "latin-1"],
)
@pytest.mark.parametrize("command", ["pretrain", "tokenizer"])
def test_a_text_that_is_none(capsys, tmp_path, command, content, message):
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    error = one_line(capsys, command, "--text", path, "--out", tmp_path / "out")
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "out").exists()


def test_a_folder_for_a_text(capsys, tmp_path):
    error = one_line(capsys, "pretrain", "--text", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path} is a folder; name the text files in it" in error


def test_a_text_shorter_than_a_row(capsys, book, tmp_path):
    """Its last tenth, that is: what is held out must fill a row, too."""
    out = ["--out", tmp_path / "out"]
    error = one_line(capsys, "pretrain", "--text", book, *out, *QUICK, "--seq-len", "500")
    assert "The text held out for validation: The text has" in error
    assert "one row takes 501" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "toi"], "There is no preset 'toi'. Did you mean 'toy'?"),
        (["--preset", "llama-2-7b"], "Did you mean 'llama2-7b'?"),
        (["--steps", "0"], "steps is 0, but must be at least 1"),
        (["--batch-size", "-1"], "batch_size is -1"),
        (["--warmup-steps", "3"], "warmup_steps (3) must be at least 0 and less than steps (3)"),
        (["--learning-rate", "0"], "learning_rate is 0.0, but must be above 0"),
        (["--seq-len", "513"], "seq_len (513) is longer than the model's context (512 tokens)"),
        (["--vocab-size", "200"], "vocab_size 200 is too small"),
        (["--vocab-size", "100000"], "vocab_size 100000 is too large"),
        (["--tokenizer", "nowhere.model"], "no file nowhere.model"),
        (["--device", "toaster"], "The device 'toaster' cannot be used here"),
    ],
)
def test_settings_of_pretrain_that_cannot_be(capsys, book, tmp_path, flags, message):
    error = one_line(capsys, "pretrain", "--text", book, "--out", tmp_path / "out", *QUICK, *flags)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_what_stands_there_is_not_overwritten(capsys, book, checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    error = one_line(capsys, "pretrain", "--text", book, "--out", checkpoint.parent, *QUICK)
    assert f"{checkpoint} exists and is not overwritten. Name another place with --out" in error
    tokenizer = checkpoint / "tokenizer.model"
    assert "is not overwritten" in one_line(capsys, "tokenizer", "--text", book, "--out", tokenizer)
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize("command", ["pretrain", "tokenizer"])
def test_a_place_below_a_file(capsys, book, command):
    flags = QUICK if command == "pretrain" else ["--vocab-size", "300"]
    assert str(book) in one_line(capsys, command, "--text", book, "--out", book / "x", *flags)


@pytest.mark.parametrize("command", ["pretrain", "tokenizer"])
def test_a_place_that_must_not_be_written(capsys, monkeypatch, book, tmp_path, command):
    def refuse(path, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    flags = QUICK if command == "pretrain" else ["--vocab-size", "300"]
    out = tmp_path / "place" / "out"
    error = one_line(capsys, command, "--text", book, "--out", out, *flags)
    assert "Permission denied" in error
    assert str(tmp_path / "place") in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0, but must be at least 0"),
        (["--top-p", "90"], "top_p is 90.0, but must be within [0, 1]"),
        (["--top-k", "0"], "top_k is 0, but must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0, but must be at least 1"),
        (["--seed", "-1"], "seed is -1, but must be at least 0"),
        (["--stop", ""], "A stop string is empty"),
        (["--device", "toaster"], "The device 'toaster' cannot be used here"),
        (["--device", "meta"], "The device 'meta' cannot be used here"),
        (["--tokenizer", "nowhere.bin"], "no file nowhere.bin"),
        (["x" * 600], "the model's context holds 512, the answer included. Shorten the prompt"),
    ],
)
def test_settings_of_generate_that_cannot_be(capsys, checkpoint, flags, message):
    assert message in one_line(capsys, "generate", "--model", checkpoint, *flags)


def test_a_chat_format_that_is_none(capsys, checkpoint):
    error = one_line(capsys, "chat", checkpoint, "--chat-format", "nosuch")
    assert "There is no chat format 'nosuch'" in error


@pytest.mark.parametrize("train", [[], ["--train"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 0", "batch_size is 0, but must be at least 1"),
        ("--seq-len 0", "seq_len is 0, but must be at least 1"),
        ("--device-memory 0", "device_memory is 0.0, but must be above 0"),
        ("--device-memory -3", "device_memory is -3.0"),
        ("--device-memory nan", "device_memory is nan"),
        ("--tokens 1e12 --tokens-per-second 0", "tokens_per_second is 0.0, but must be above 0"),
        ("--tflops -1", "tflops is -1.0"),
        ("--utilization 0", "utilization is 0.0"),
        ("--watts -1", "watts is -1.0"),
        ("--tokens 0", "tokens is 0.0"),
        ("--device foo", "There is no device 'foo'"),
    ],
)
def test_settings_of_plan_that_cannot_be(capsys, train, flags, message):
    assert message in one_line(capsys, "plan", "toy", *train, *flags.split())


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-7b-chat", "codellama-34b"])
def test_a_model_of_meta_s_says_how_to_ask_for_it(capsys, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = complaint(capsys, "generate", "--model", name)
    assert f"{name} is not fetched: Meta gives" in error
    assert f"There is no {name}.gguf" in one_line(capsys, "generate", "--model", f"{name}.gguf")


def test_a_model_that_is_none(capsys, checkpoint, tmp_path):
    error = one_line(capsys, "generate", "--model", tmp_path / "nowhere")
    assert "There is no" in error
    assert "minillama demo" in error
    assert f"{tmp_path} is no checkpoint of minillama" in one_line(
        capsys, "generate", "--model", tmp_path
    )
    error = one_line(capsys, "generate", "--model", checkpoint.parent)
    assert f"{checkpoint} is one" in error
    error = one_line(capsys, "generate", "--model", checkpoint / "tokenizer.model")
    assert "tokenizer.model" in error


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "params.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_damaged_checkpoint(capsys, checkpoint, command, name, damage):
    path = checkpoint / name
    data = path.read_bytes()
    middle = len(data) // 2
    try:
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(data[:middle])
        else:
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        model = ["--model", checkpoint] if command == "generate" else [checkpoint]
        assert name in one_line(capsys, command, *model)
    finally:
        path.write_bytes(data)


def test_a_tokenizer_of_another_model(capsys, checkpoint, book, tmp_path):
    other = tmp_path / "other.model"
    main(["tokenizer", "--text", str(book), "--vocab-size", "310", "--out", str(other)])
    error = one_line(capsys, "generate", "--model", checkpoint, "--tokenizer", other)
    assert "The tokenizer has 310 tokens and the model 300" in error


def test_a_preset_that_does_not_exist(capsys):
    error = one_line(capsys, "info", "llama2-7c")
    assert "There is no preset 'llama2-7c'. Did you mean 'llama2-7b'?" in error
    assert all(name in error for name in PRESETS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "--text", "x", "--stepps", "3"], "--steps"),
        (["generate", "--model", "x", "--temprature", "1"], "--temperature"),
        (["generat"], "generate"),
        (["generate"], "--model"),
        (["pretrain", "--text", "x", "--steps", "many"], "--steps"),
        ([], "demo"),
    ],
)
def test_a_flag_that_does_not_exist_leads_to_the_nearest(capsys, arguments, expected):
    assert expected in complaint(capsys, *arguments)


def test_an_error_in_a_process_of_its_own():
    done = run(*minillama("info", "llama2-7c"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minillama: There is no preset")
    assert len(done.stderr.splitlines()) == 1


# --- Interruptions -------------------------------------------------------------------------------


def interrupted(process: subprocess.Popen, line_start: str) -> str:
    """Press Ctrl-C as soon as such a line is shown; what comes on stderr."""
    for line in process.stdout:
        if line.startswith(line_start):
            break
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=300)[1]
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_pretraining_without_a_traceback(book, tmp_path):
    flags = ["--text", book, "--out", tmp_path / "run", *QUICK, "--steps", "1000000"]
    process = subprocess.Popen(
        minillama("pretrain", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    error = interrupted(process, "step      1 ")
    assert process.returncode == 130
    assert error.strip() == "minillama: stopped; what was saved before is as it was."
    assert (tmp_path / "run" / "log.jsonl").read_text().startswith('{"step": 1,')
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes that break")
def test_a_reader_that_leaves_is_no_error(checkpoint):
    """minillama generate ... | head -c 3"""
    command = minillama("generate", "--model", checkpoint, "--temperature", "2", "Ada had")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.read(3) == b"Ada"
        process.stdout.close()
        assert process.stderr.read() == b""
