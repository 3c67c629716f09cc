"""Any format into any other, to the bit."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import small_llama, small_tokenizer

from minillama import Llama, cli, generate, load, save
from minillama.adapt.lora import new_adapter
from minillama.checkpoint import CheckpointError, convert, folder, load_config, open_checkpoint
from minillama.checkpoint.chat_templates import TEMPLATES
from minillama.checkpoint.huggingface import CHAT_TEMPLATE, save_huggingface
from minillama.checkpoint.peft import save_adapter
from minillama.checkpoint.weights import checkpoint_of
from minillama.config import LoRAConfig

# dim 64 splits into 8; 16 heads on 8 (groups of 2), or on 2 (groups of 8)
SHAPES = {
    "multi-head": {"n_heads": 16, "n_kv_heads": 16},
    "grouped": {"n_heads": 16, "n_kv_heads": 8},
    "few": {"n_heads": 16, "n_kv_heads": 2},
    "tied": {"n_heads": 16, "n_kv_heads": 8, "tie_embeddings": True},
}
SIZES = {"dim": 64, "hidden_dim": 176, "vocab_size": 304}
VARIANTS = {
    "native": ("native", {}),
    "huggingface": ("huggingface", {}),
    "huggingface in parts": ("huggingface", {"shard_bytes": 50_000}),
    "meta": ("meta", {}),
    "meta in 2": ("meta", {"shards": 2}),
    "meta in 4": ("meta", {"shards": 4}),
    "meta in 8": ("meta", {"shards": 8}),
    "gguf": ("gguf", {}),
    "llama2.c": ("llama2.c", {}),
    "legacy llama2.c": ("llama2.c", {"version": 0}),
}


def varied(**changes) -> Llama:
    """No two tensors of it are alike, the norms' weights included."""
    model = small_llama(**(SIZES | changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def place(folder: Path, variant: str) -> Path:
    """Where a variant is written: a folder, or a file in a folder of its own."""
    name = variant.replace(" ", "-")
    return folder / name / "model.bin" if "llama2.c" in variant else folder / name


def assert_same(path: Path, model: Llama) -> None:
    loaded, tokenizer = load(path)
    assert loaded.config == model.config
    assert tokenizer.pieces == small_tokenizer(304).pieces
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == weight.dtype, name
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((name, torch.float32) for name in SHAPES),
        ("grouped", torch.bfloat16),
        ("tied", torch.bfloat16),
        ("grouped", torch.float16),
    ],
)
def test_through_every_format_in_turn_to_the_bit(tmp_path, shape, dtype):
    """Each is made of the one before it, and the last must be the first."""
    model = varied(**SHAPES[shape]).to(dtype)
    save(tmp_path / "start", model, small_tokenizer(304))
    before = tmp_path / "start"
    for variant, (format, options) in VARIANTS.items():
        if model.config.n_kv_heads % options.get("shards", 1):
            continue
        if "llama2.c" in format and dtype != torch.float32:
            continue  # it has float32 alone
        target = place(tmp_path, variant)
        convert(before, target, format, **options)
        assert_same(target, model)
        before = target
    convert(before, tmp_path / "end", "native", dtype=dtype)
    assert_same(tmp_path / "end", model)
    for name in ("model.safetensors", "params.json"):
        assert (tmp_path / "start" / name).read_bytes() == (tmp_path / "end" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_to_another_dtype_is_torchs(tmp_path, dtype):
    model = varied()
    save(tmp_path / "start", model, small_tokenizer(304), format="meta", shards=2)
    convert(tmp_path / "start", tmp_path / "end", "huggingface", dtype)
    assert_same(tmp_path / "end", model.to(dtype))
    assert load_config(tmp_path / "end") == model.config


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_few_bits_in_the_native_format(tmp_path, kind):
    tokens = torch.arange(12)[None]
    save(tmp_path / "hf", varied(), small_tokenizer(304), format="huggingface")
    convert(tmp_path / "hf", tmp_path / kind, "native", quantize=kind)
    assert open_checkpoint(tmp_path / kind).quantization["kind"] == kind
    expected, _ = load(tmp_path / "hf", quantize=kind)
    assert torch.equal(load(tmp_path / kind)[0](tokens), expected(tokens))


@pytest.mark.parametrize(("format", "kind"), [("llama2.c", "int8"), ("gguf", "q8_0")])
@torch.no_grad()
def test_few_bits_in_formats_that_have_them(tmp_path, format, kind):
    tokens, model = torch.arange(12)[None], varied(hidden_dim=192)
    save(tmp_path / "hf", model, small_tokenizer(304), format="huggingface")
    convert(tmp_path / "hf", tmp_path / "x" / "model.bin", format, quantize=kind)
    size = (tmp_path / "x" / "model.bin").stat().st_size
    assert size < 0.5 * 4 * model.config.n_parameters
    logits = load(tmp_path / "x" / "model.bin")[0](tokens)
    assert 0 < (logits - model(tokens)).abs().max() < 0.1 * model(tokens).abs().max()


@pytest.mark.parametrize("format", ["huggingface", "meta", "llama2.c"])
def test_few_bits_in_formats_that_have_none(tmp_path, format):
    save(tmp_path / "start", varied(), small_tokenizer(304))
    with pytest.raises(ValueError, match=f"{format} has no weights in 'nf4'"):
        convert(tmp_path / "start", tmp_path / "x", format, quantize="nf4")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["Q8_0", "q8_0"])
def test_a_kind_may_be_written_as_llama_cpp_writes_it(tmp_path, name):
    model = varied(hidden_dim=192)
    save(tmp_path / "a", model, small_tokenizer(304))
    convert(tmp_path / "a", tmp_path / "b", "gguf", quantize=name)
    save(tmp_path / "c", model, small_tokenizer(304), "gguf", kind=name)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("target", ["native", "llama2.c"])
def test_a_dtype_that_cannot_be_is_refused(tmp_path, target):
    save(tmp_path / "plain", varied(), small_tokenizer(304))
    convert(tmp_path / "plain", tmp_path / "int8", "native", quantize="int8")
    source = "int8" if target == "native" else "plain"
    message = {"native": "weights in int8, which have no other", "llama2.c": "holds float32, or"}
    with pytest.raises(ValueError, match=message[target]):
        convert(tmp_path / source, tmp_path / "x" / "y", target, dtype=torch.float16)
    assert not (tmp_path / "x").exists()
    convert(tmp_path / "plain", tmp_path / "x" / "z", target, dtype=torch.float32)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("gguf", {"shards": 2}, "gguf is not written with shards: its options are kind"),
        ("native", {"kind": "F16"}, "native is not written with kind: its options are none"),
        ("meta", {"version": 1}, "with version: its options are shards"),
    ],
)
def test_options_are_those_of_the_format(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "x", varied(), small_tokenizer(304), format, **options)
    assert not (tmp_path / "x").exists()


TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }} 🦙\n{% endfor %}"


def test_a_chat_template_is_passed_on_as_it_is(tmp_path):
    import transformers

    checkpoint = replace(checkpoint_of(varied(), tmp_path), chat_template=TEMPLATE)
    save_huggingface(tmp_path / "hf", checkpoint, small_tokenizer(304))
    convert(tmp_path / "hf", tmp_path / "x.gguf", "gguf")
    assert open_checkpoint(tmp_path / "x.gguf").chat_template == TEMPLATE
    convert(tmp_path / "x.gguf", tmp_path / "back", "huggingface")
    assert open_checkpoint(tmp_path / "back").chat_template == TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.chat_template == TEMPLATE
    theirs.save_pretrained(tmp_path / "back")  # puts it into a file of its own
    assert (tmp_path / "back" / CHAT_TEMPLATE).is_file()
    assert open_checkpoint(tmp_path / "back").chat_template == TEMPLATE
    convert(tmp_path / "back", tmp_path / "native", "native")
    assert open_checkpoint(tmp_path / "native").chat_template is None


@pytest.mark.parametrize("format", ["huggingface", "gguf", "native"])
@pytest.mark.parametrize("chat_format", ["llama2", "alpaca", "chatml", "code-llama-70b"])
def test_the_format_of_the_dialogues_goes_along(tmp_path, chat_format, format):
    tokenizer = small_tokenizer(304).for_chat(chat_format)
    save(tmp_path / "a", varied(), tokenizer)
    assert load(tmp_path / "a")[1].chat_format == chat_format
    convert(tmp_path / "a", tmp_path / "b", format)
    known = format == "native" or chat_format in TEMPLATES
    assert load(tmp_path / "b")[1].chat_format == (chat_format if known else None)
    convert(tmp_path / "b", tmp_path / "c", "native", quantize="int8")
    assert load(tmp_path / "c")[1].chat_format == (chat_format if known else None)


def test_transformers_frames_a_dialogue_as_the_model_has_learned_it(tmp_path):
    import transformers

    save(tmp_path / "x", varied(), small_tokenizer(304).for_chat("llama2"), "huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Ada? "}]
    written = theirs.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert written == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Ada? [/INST]"


# --- Nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["native", "huggingface", "meta", "gguf", "llama2.c"])
def test_nothing_is_overwritten(tmp_path, variant):
    save(tmp_path / "start", varied(), small_tokenizer(304))
    target = place(tmp_path, variant)
    target.parent.mkdir(exist_ok=True)
    if variant in ("gguf", "llama2.c"):
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        convert(tmp_path / "start", target, VARIANTS[variant][0])
    assert (target if target.is_file() else target / "diary.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["pipe", "link that leads nowhere"])
@pytest.mark.parametrize("variant", ["native", "huggingface", "meta", "gguf", "llama2.c"])
def test_what_is_neither_file_nor_folder_is_not_replaced(tmp_path, variant, kind):
    save(tmp_path / "start", varied(), small_tokenizer(304))
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="target exists and is not overwritten"):
        convert(tmp_path / "start", target, VARIANTS[variant][0])
    if variant in ("gguf", "llama2.c"):
        with pytest.raises(CheckpointError, match="target is no file, but a device, a pipe or"):
            save(target, varied(), small_tokenizer(304), variant)
    assert not target.is_file()


@pytest.mark.parametrize("variant", ["native", "huggingface", "meta", "gguf", "llama2.c"])
def test_a_file_is_no_folder_to_write_into(tmp_path, variant):
    save(tmp_path / "start", varied(), small_tokenizer(304))
    (tmp_path / "file").write_text("mine")
    message = rf"{tmp_path / 'file'} is a file, and no folder\. Name another place"
    for target in ("file/x", "file/x/y"):
        with pytest.raises(OSError, match=message):
            convert(tmp_path / "start", tmp_path / target, VARIANTS[variant][0])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("variant", ["native", "huggingface", "meta", "gguf", "llama2.c"])
def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch, variant):
    save(tmp_path / "start", varied(), small_tokenizer(304))

    class Usage:
        free = 1000

    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match=r"needs 0\.00 GB, but its disk has .* nothing was written"):
        convert(tmp_path / "start", place(tmp_path, variant), VARIANTS[variant][0])
    assert not place(tmp_path, variant).exists()


@pytest.mark.parametrize("variant", ["native", "huggingface", "meta", "gguf", "llama2.c"])
def test_an_accident_leaves_nothing_behind(tmp_path, monkeypatch, variant):
    """The source cannot be read to its end: the target is not there, nor parts of it."""
    save(tmp_path / "start", varied(), small_tokenizer(304))
    target = place(tmp_path / "place", variant)
    checkpoint = open_checkpoint(tmp_path / "start")
    read = []

    def fail_late(tensor: torch.Tensor) -> torch.Tensor:
        read.append(1)
        if len(read) > 10:
            raise OSError("the disk was unplugged")
        return tensor

    for stored in checkpoint.weights.values():
        object.__setattr__(stored, "read", lambda read=stored.read: fail_late(read()))
    monkeypatch.setattr("minillama.checkpoint.open_checkpoint", lambda path: checkpoint)
    with pytest.raises(OSError, match="unplugged"):
        convert(tmp_path / "start", target, VARIANTS[variant][0])
    assert len(read) == 11
    assert not target.exists()
    assert list(target.parent.glob(".*")) == []


# --- What is what --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ("tokenizer.model", b"\n\x0e"),
        ("consolidated.00.pth", b"PK\x03\x04"),
        ("config.json", b"{}"),
    ],
)
def test_one_file_of_a_folder_leads_to_the_folder(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{file} is one file of a checkpoint.*: name {tmp_path}"
    ):
        load(tmp_path / file)


def test_a_text_is_neither_gguf_nor_llama2c(tmp_path):
    (tmp_path / "notes.txt").write_text("Remember that a model is no text. " * 10)
    message = r"notes\.txt is neither GGUF nor a model of llama2\.c, or its header is damaged"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "notes.txt")


def test_an_adapter_is_no_model(tmp_path):
    config = small_llama().config
    adapter = new_adapter(config, LoRAConfig(rank=2), torch.Generator())
    save_adapter(tmp_path / "a", adapter, config)
    with pytest.raises(CheckpointError, match=rf"a is an adapter.*BASE --adapter {tmp_path / 'a'}"):
        load(tmp_path / "a")


def test_an_unknown_format_suggests_the_nearest(tmp_path):
    save(tmp_path / "start", varied(), small_tokenizer(304))
    with pytest.raises(ValueError, match=r"no format 'hugingface'\. Did you mean 'huggingface'"):
        convert(tmp_path / "start", tmp_path / "x", "hugingface")


# --- The command, and the real stories260K -------------------------------------------------------

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside"


@pytest.mark.slow
def test_stories260k_tells_its_story_in_every_format(assets, tmp_path, capsys):
    source = assets / "stories260K" / "stories260K.bin"
    tokenizer = ["--tokenizer", str(assets / "stories260K" / "tok512.bin")]
    original = load(source, assets / "stories260K" / "tok512.bin")[0].state_dict()
    for variant, (format, options) in VARIANTS.items():
        if options.get("shards", 1) > 4:
            continue  # it has 4 key/value heads
        target = place(tmp_path, variant)
        flags = ["--shards", str(options["shards"])] if "shards" in options else []
        if "version" in options or "shard_bytes" in options:
            convert(source, target, format, tokenizer=tokenizer[1], **options)
        else:
            cli.main(["convert", str(source), str(target), "--format", format, *flags, *tokenizer])
            assert f"minillama verify {target}" in capsys.readouterr().out
        source, tokenizer = target, []
        model, tok = load(target)
        assert all(torch.equal(w, original[n]) for n, w in model.state_dict().items())
        tokenizer = ["--tokenizer", str(assets / "stories260K" / "tok512.bin")]
        (story,) = generate(model, tok, "", max_new_tokens=28)
        assert story.text.startswith(TEXT), variant


def test_parts_are_for_metas_format(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "a", str(tmp_path / "b"), "--format", "gguf", "--shards", "2"])
    assert "--shards is for --format meta" in capsys.readouterr().err
