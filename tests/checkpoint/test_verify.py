import json
import re
import struct
from pathlib import Path

import pytest
import torch
from small import small_llama, small_tokenizer

from minillama import cli, save
from minillama.checkpoint import CheckpointError, native
from minillama.checkpoint.fetch import CATALOGUE, Model, RemoteFile
from minillama.checkpoint.folder import SUMS, checksum, write_sums
from minillama.checkpoint.meta import CHECKLIST
from minillama.checkpoint.verify import verify

FORMATS = {
    "native": "model.safetensors",
    "huggingface": "model.safetensors",
    "meta": "consolidated.00.pth",
    "llama2.c": "",
    "gguf": "",
}


def saved(path: Path, format: str, **changes) -> Path:
    """A checkpoint of that format; of single files, the file."""
    path = path / "model.bin" if format in ("llama2.c", "gguf") else path / "checkpoint"
    model = small_llama(**changes)
    with torch.no_grad():
        for name, value in (("w1", float("nan")), ("w2", float("inf"))):
            if format.endswith(name):
                getattr(model.layers[0].feed_forward, name).weight[3, 5] = value
    save(path, model, small_tokenizer(), format=format)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_saved_is_whole(tmp_path, format):
    lines = list(verify(saved(tmp_path, format)))
    text = "\n".join(lines)
    assert "20 tensors have the names and shapes of 2 layers of width 32" in text or (
        "21 tensors have the names and shapes of 2 layers of width 32" in text
    )
    assert "All numbers are finite, in 0.2 MB of weights." in lines
    assert "The tokenizer has 300 tokens, as many as the embeddings have rows." in lines
    has_sums = format in ("native", "huggingface", "meta")
    assert ("SHA-256" in text) == has_sums
    assert ("No sums lie beside it" in text) != has_sums
    assert ("MD5" in text) == (format == "meta")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("value", "name"), [(float("nan"), "1 NaN and 0"), (-float("inf"), "0 NaN and 1")]
)
def test_numbers_that_are_not_finite_are_named(tmp_path, format, value, name):
    path = tmp_path / ("model.bin" if format in ("llama2.c", "gguf") else "checkpoint")
    model = small_llama()
    model.layers[1].feed_forward.w2.weight[3, 5] = value
    save(path, model, small_tokenizer(), format=format)
    message = rf"layers\.1\.feed_forward\.w2\.weight has {name} inf of 2048 numbers\. Any text"
    with pytest.raises(CheckpointError, match=message):
        list(verify(path))


def test_of_many_such_tensors_three_are_named(tmp_path):
    model = small_llama()
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    save(tmp_path / "x", model, small_tokenizer())
    with pytest.raises(CheckpointError, match=r"; 18 more tensors have such\. Any text"):
        list(verify(tmp_path / "x"))


@pytest.mark.parametrize("format", ["native", "huggingface", "meta"])
def test_a_flipped_bit_in_a_large_file_is_seen_here(tmp_path, format, monkeypatch):
    """`load` leaves out the sums of files that take seconds to sum."""
    monkeypatch.setattr(native, "SUMMED_AT_ONCE", 1000)
    path = saved(tmp_path, format)
    file = path / FORMATS[format]
    data = bytearray(file.read_bytes())
    data[-30_000] ^= 1
    file.write_bytes(data)
    if format == "native":
        native.open_native(path)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or was changed"):
        list(verify(path))


# --- Meta's checklists ---------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path) -> Path:
    """As downloaded: no SHA256SUMS, the tokenizer and its checklist in the folder above."""
    path = saved(tmp_path, "meta")
    (path / SUMS).unlink()
    (path / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    digest = "0" * 32
    (tmp_path / "tokenizer_checklist.chk").write_text(f"{digest}  tokenizer.model\n")
    return path


def test_the_checklist_above_counts_too(release):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged or was changed"):
        list(verify(release))
    (release.parent / "tokenizer_checklist.chk").unlink()
    assert any("3 files have the MD5" in line for line in verify(release))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"is missing: checklist\.chk lists it"),
        (lambda file: file.write_bytes(b""), r"is not what checklist\.chk lists \(it is empty"),
        (
            lambda file: file.write_bytes(b"<?xml version='1.0'?><Error>AccessDenied</Error>"),
            r"is not what checklist\.chk lists \(it is a message or a pointer .* link may have exp",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes()[:1000]),
            r"is damaged or was changed: it has 1,000 bytes, .* download was cut off",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
            r"is damaged or was changed",
        ),
    ],
    ids=["missing", "empty", "a message", "cut off", "a bit"],
)
def test_a_failed_download_is_told_apart_from_a_wrong_sum(release, damage, message):
    (release.parent / "tokenizer_checklist.chk").unlink()
    damage(release / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"consolidated\.00\.pth {message}"):
        list(verify(release))


@pytest.mark.parametrize("text", ["", "<html>403</html>", "abc  params.json\n", "\0\0"])
def test_a_checklist_that_is_none(release, text):
    (release / CHECKLIST).write_text(text)
    with pytest.raises(CheckpointError, match=r"checklist\.chk is no list of MD5 sums"):
        list(verify(release))


def test_a_checklist_leads_nowhere_else(release):
    secret = release.parent / "secret"
    secret.write_text("mine")
    (release / CHECKLIST).write_text(f"{'0' * 32}  ../secret\n")
    with pytest.raises(CheckpointError, match=rf"{release / 'secret'} is missing"):
        list(verify(release))


def test_a_fetched_model_has_the_sums_of_the_catalogue(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLAMA_CACHE", str(tmp_path))
    path = saved(tmp_path / "small.en", "gguf")
    file = RemoteFile(path.name, "https://x.org", path.stat().st_size, checksum(path))
    model = Model(about="", parameters=1, licence="", files=(file,), opens=path.name)
    monkeypatch.setitem(CATALOGUE, "small.en", model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "\n".join(verify("small.en"))
    assert "model.bin in" in text
    assert "the SHA-256 is the one of `minillama fetch`" in text
    assert "No sums" not in text
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.bin is damaged .* fetch it again"):
        list(verify("small.en"))


@pytest.mark.parametrize("options", [("llama2.c", {"version": 2}), ("gguf", {"kind": "q8_0"})])
def test_few_bits_in_a_file_are_called_so(tmp_path, options):
    path = tmp_path / "model.bin"
    save(path, small_llama(), small_tokenizer(), options[0], **options[1])
    text = "\n".join(verify(path))
    assert "parameters in few bits, read as float32." in text
    assert re.search(r"in 0\.2 MB of weights \(0\.\d MB in the file\)\.", text)


# --- On the command line -------------------------------------------------------------------------


def test_the_command_prints_what_it_checked(tmp_path, capsys):
    path = saved(tmp_path, "native")
    cli.main(["verify", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1] == f"{path} is whole."


def test_the_command_ends_with_the_reason(tmp_path, capsys):
    path = saved(tmp_path, "native")
    params = json.loads((path / "params.json").read_text()) | {"hidden_dim": 65}
    (path / "params.json").write_text(json.dumps(params))
    write_sums(path)
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", str(path)])
    assert exit.value.code == 2
    assert "disagree about layers.0.feed_forward.w1.weight" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(tmp_path):
    path = saved(tmp_path, "gguf")
    small_tokenizer(295).save(tmp_path / "other.model")
    with pytest.raises(CheckpointError, match="has 295 tokens and the model 300"):
        list(verify(path, tmp_path / "other.model"))


def test_a_header_of_llama2c_that_lies(tmp_path):
    path = saved(tmp_path, "llama2.c")
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<i", 33)  # dim
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        list(verify(path))
