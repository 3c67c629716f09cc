import math
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_llama, small_tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformers_llama import transformers_llama

from minillama.checkpoint import CheckpointError
from minillama.checkpoint.fetch import fetched
from minillama.checkpoint.gguf import KINDS, open_gguf, save_gguf
from minillama.checkpoint.huggingface import to_huggingface
from minillama.checkpoint.llama2c import load_tokenizer_bin, open_llama2c
from minillama.checkpoint.weights import Checkpoint, Stored, empty_llama
from minillama.model import Llama

gguf = pytest.importorskip("gguf")

# --- A writer of its own -------------------------------------------------------------------------

U32, F32_VALUE, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9  # GGUF's types of values
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30  # of tensors
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: object) -> bytes:
    """A key with its value."""
    number = {U32: "<I", F32_VALUE: "<f", BOOL: "<?"}.get(kind)
    return (
        text(key)
        + struct.pack("<I", kind)
        + (struct.pack(number, value) if number else text(value))
    )


def sizes(**changes) -> dict[str, bytes]:
    """The header of `small_config`, key by key; None leaves a key out."""
    entries = {
        "general.architecture": (STRING, "llama"),
        "llama.context_length": (U32, 64),
        "llama.embedding_length": (U32, 32),
        "llama.block_count": (U32, 2),
        "llama.feed_forward_length": (U32, 64),
        "llama.attention.head_count": (U32, 4),
        "llama.attention.head_count_kv": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32_VALUE, 1e-5),
    }
    entries |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: entry(key, *value) for key, value in entries.items() if value is not None}


def packed(tensor: Tensor, kind: int) -> bytes:
    if kind == BF16:
        return tensor.bfloat16().view(torch.int16).numpy().tobytes()
    return tensor.to({F32: torch.float32, F16: torch.float16}[kind]).numpy().tobytes()


def listed(model: Llama, kind: int = F32) -> list[tuple[str, int, tuple[int, ...], bytes]]:
    """(name, type, shape, bytes) of all tensors of a model; those of one axis are float32."""
    tensors = []
    for name, weight in model.state_dict().items():
        if name == "output.weight" and model.config.tie_embeddings:
            continue
        parts = name.split(".")
        stem = NAMES[".".join(parts[2:-1] if parts[0] == "layers" else parts[:-1])]
        name = f"blk.{parts[1]}.{stem}.weight" if parts[0] == "layers" else f"{stem}.weight"
        of = F32 if weight.dim() == 1 else kind
        tensors.append((name, of, tuple(weight.shape), packed(weight, of)))
    return tensors


def file_of(entries: dict[str, bytes], tensors: list, start: bytes | None = None) -> bytes:
    if start is None:
        start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    infos, body = b"", b""
    for name, kind, shape, data in tensors:
        infos += text(name) + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", axis) for axis in reversed(shape))
        infos += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % 32)
    head = start + b"".join(entries.values()) + infos
    return head + bytes(-len(head) % 32) + body


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.gguf"


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in checkpoint.weights.items()}


def checkpoint_of(model: Llama) -> Checkpoint:
    weights = {
        name: Stored(tuple(weight.shape), weight.dtype, lambda weight=weight: weight)
        for name, weight in model.state_dict().items()
        if name != "output.weight" or not model.config.tie_embeddings
    }
    return Checkpoint(model.config, weights, None, Path("nowhere"))


def varied(**changes) -> Llama:
    """No two tensors of it are alike, the norms' weights included."""
    model = small_llama(**changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


# --- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(F32, torch.float32), (F16, torch.float16), (BF16, torch.bfloat16)]
)
def test_what_is_written_by_hand_is_read(path, tied, kind, dtype):
    model = varied(tie_embeddings=tied)
    path.write_bytes(file_of(sizes(), listed(model, kind)))
    checkpoint = open_gguf(path)
    assert checkpoint.config == model.config
    assert checkpoint.tokenizer is None
    assert ("output.weight" in checkpoint.weights) == (not tied)
    for name, stored in checkpoint.weights.items():
        weight = model.state_dict()[name]
        weight = weight if weight.dim() == 1 else weight.to(dtype)
        assert stored.dtype == weight.dtype
        assert torch.equal(stored.read(), weight), name


def block_values(kind: int) -> tuple[bytes, list[float]]:
    """One block of 32 numbers, and what they are, worked out by hand."""
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))  # 0 to 15, then 15 to 0
    counted = [*range(16), *reversed(range(16))]
    if kind == Q8_0:
        return struct.pack("<e32b", 0.5, *range(-16, 16)), [q / 2 for q in range(-16, 16)]
    if kind == Q4_0:
        return struct.pack("<e", -0.25) + nibbles, [-0.25 * (q - 8) for q in counted]
    return struct.pack("<2e", 0.25, -2.0) + nibbles, [0.25 * q - 2 for q in counted]


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_blocks_by_hand(path, kind):
    tensors = listed(small_llama(tie_embeddings=True))
    block, values = block_values(kind)
    at = [name for name, *_ in tensors].index("blk.1.ffn_down.weight")  # 32 rows of two blocks
    tensors[at] = ("blk.1.ffn_down.weight", kind, (32, 64), block * 64)
    path.write_bytes(file_of(sizes(), tensors))
    stored = open_gguf(path).weights["layers.1.feed_forward.w2.weight"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored.read(), torch.tensor(values * 2).expand(32, 64))


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_other_blocks_are_what_the_library_says(path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    numbers, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    config = small_config(dim=256, tie_embeddings=True)
    tensors = listed(Llama(config))
    at = [name for name, *_ in tensors].index("blk.0.attn_k.weight")
    blocks = np.random.default_rng(0).integers(60, size=(128, 256 // numbers * n_bytes))
    blocks = blocks.astype(np.uint8)  # small bytes: no scale is infinite
    tensors[at] = ("blk.0.attn_k.weight", int(kind), (128, 256), blocks.tobytes())
    path.write_bytes(file_of(sizes(llama__embedding_length=(U32, 256)), tensors))
    weight = open_gguf(path).weights["layers.0.attention.wk.weight"].read()
    assert_close(weight.numpy(), gguf.quants.dequantize(blocks, kind), rtol=0, atol=0)
    assert weight.unique().numel() > 100


def test_what_a_header_leaves_out_is_as_in_llama_cpp(path):
    model = small_llama(n_kv_heads=4)
    path.write_bytes(file_of(sizes(llama__attention__head_count_kv=None), listed(model)))
    config = open_gguf(path).config
    assert (config.n_kv_heads, config.rope_theta, config.vocab_size) == (4, 10_000.0, 300)
    assert config.norm_eps == 1e-5  # and not the float32 that is nearest to it


def test_a_header_may_say_what_changes_nothing(path):
    entries = sizes(
        llama__rope__freq_base=(F32_VALUE, 500_000.0),
        llama__rope__dimension_count=(U32, 8),
        llama__attention__key_length=(U32, 8),
        llama__expert_count=(U32, 0),
        llama__rope__scaling__type=(STRING, "linear"),
        llama__rope__scaling__factor=(F32_VALUE, 1.0),
        tokenizer__chat_template=(STRING, "{{ messages }}"),
    )
    path.write_bytes(file_of(entries, listed(small_llama())))
    assert open_gguf(path).config == small_config(rope_theta=500_000.0)


def test_a_changed_weight_leaves_the_file_alone(path):
    path.write_bytes(file_of(sizes(), listed(small_llama())))
    before = path.read_bytes()
    open_gguf(path).weights["norm.weight"].read().add_(1)
    assert path.read_bytes() == before


def test_opening_reads_no_weights(path):
    path.write_bytes(file_of(sizes(), listed(small_llama(vocab_size=100_000))))
    open_gguf(path)  # imports stay in memory
    tracemalloc.start()
    open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 25e6
    assert peak < 1e6


# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_to_the_bit(path, dtype, tied):
    model = varied(tie_embeddings=tied, rope_theta=123_456.0, norm_eps=1e-6).to(dtype)
    save_gguf(path, checkpoint_of(model), small_tokenizer())
    checkpoint = open_gguf(path)
    assert checkpoint.config == model.config
    for name, stored in checkpoint.weights.items():
        weight = model.state_dict()[name]
        assert stored.dtype == (torch.float32 if weight.dim() == 1 else dtype)
        assert torch.equal(stored.read().to(dtype), weight), name
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.to_bytes() == small_tokenizer().to_bytes() or (
        tokenizer.pieces == small_tokenizer().pieces
    )
    assert tokenizer.encode("Ada had 3: 日本 🦙\n") == small_tokenizer().encode(
        "Ada had 3: 日本 🦙\n"
    )
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_reads_what_is_written(path, kind):
    model = varied()
    save_gguf(path, checkpoint_of(model), small_tokenizer(), kind)
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == 2 * 9 + 3
    for tensor in reader.tensors:
        is_norm = "norm" in tensor.name
        assert tensor.tensor_type.name == ("F32" if is_norm else kind)
        assert tensor.data_offset % 32 == 0
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["llama.rope.dimension_count"] == 8
    assert keys["tokenizer.ggml.tokens"] == list(small_tokenizer().pieces)
    types = {name: field.types[0].name for name, field in reader.fields.items()}
    assert {types[f"llama.{key}"] for key in ("block_count", "vocab_size")} == {"UINT32"}
    assert types["tokenizer.ggml.bos_token_id"] == "UINT32"


def test_q8_0_is_off_by_half_a_step_at_most(path):
    model = varied()
    save_gguf(path, checkpoint_of(model), small_tokenizer(), "Q8_0")
    for name, stored in open_gguf(path).weights.items():
        weight, read = model.state_dict()[name], stored.read()
        if weight.dim() == 1:
            assert torch.equal(read, weight)
            continue
        largest = weight.view(-1, 32).abs().amax(1, keepdim=True)
        # Half a step, and the rounding of the step to float16 127 times.
        error = (read - weight).view(-1, 32).abs()
        assert (error <= largest * (0.5 / 127 + 2**-11)).all()
        assert error.max() > 0


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_written_twice_is_written_alike(path, kind):
    save_gguf(path, checkpoint_of(small_llama()), small_tokenizer(), kind)
    first = path.read_bytes()
    save_gguf(path, open_gguf(path), small_tokenizer(), kind)  # onto the file that is read
    assert path.read_bytes() == first


def test_a_kind_that_is_none(path):
    with pytest.raises(ValueError, match=r"no kind of GGUF tensors 'Q8'\. Did you mean 'Q8_0'\?"):
        save_gguf(path, checkpoint_of(small_llama()), small_tokenizer(), "Q8")


def test_rows_that_blocks_do_not_divide(path):
    model = small_llama(hidden_dim=40)
    with pytest.raises(ValueError, match=r"row of this model has 40 numbers, .* 32, .* Write F16"):
        save_gguf(path, checkpoint_of(model), small_tokenizer(), "Q8_0")
    assert not path.exists()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("value", [1e5, -1e5, math.nan, math.inf])
def test_numbers_that_a_kind_does_not_hold(path, kind, value):
    model = small_llama()
    model.layers[1].attention.wo.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"blk\.1\.attn_output.* beyond .* Write BF16 or F32"):
        save_gguf(path, checkpoint_of(model), small_tokenizer(), kind)
    assert list(path.parent.iterdir()) == []


def test_an_error_on_the_way_leaves_the_earlier_file(path):
    save_gguf(path, checkpoint_of(small_llama()), small_tokenizer())
    before = path.read_bytes()
    checkpoint = checkpoint_of(small_llama(seed=1))

    def fails() -> Tensor:
        raise OSError("the disk is gone")

    weights = dict(checkpoint.weights)
    weights["norm.weight"] = Stored((32,), torch.float32, fails)
    with pytest.raises(OSError, match="the disk is gone"):
        save_gguf(path, Checkpoint(checkpoint.config, weights, None, path), small_tokenizer())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_without_the_library_the_error_says_how_to_get_it(path, monkeypatch):
    path.write_bytes(file_of(sizes(), listed(small_llama())))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"gguf, which is not installed: pip install 'minillama\["):
        open_gguf(path)


# --- Damage --------------------------------------------------------------------------------------


def refused(path: Path, content: bytes, message: str) -> None:
    """It is refused by name, at once, and without much memory."""
    path.write_bytes(content)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=rf"(?s)model\.gguf.*{message}"):
        open_gguf(path)
    assert time.perf_counter() - began < 5  # seconds; on a busy machine, too
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


UNKNOWN = {
    "architecture": (sizes(general__architecture=(STRING, "falcon")), "architecture is 'falcon'"),
    "no architecture": (sizes(general__architecture=None), "architecture is None"),
    "no layers": (sizes(llama__block_count=None), r"lacks llama\.block_count"),
    "no eps": (sizes(llama__attention__layer_norm_rms_epsilon=None), "lacks .*rms_epsilon"),
    "part of a model": (sizes(split__count=(U32, 3)), "one of 3 parts; .*--merge"),
    "yarn": (sizes(llama__rope__scaling__type=(STRING, "yarn")), "scaling.type is 'yarn', which"),
    "scaled": (sizes(llama__rope__scaling__factor=(F32_VALUE, 4.0)), "scaling.factor is 4.0"),
    "scaled as of old": (sizes(llama__rope__scale_linear=(F32_VALUE, 2.0)), "scale_linear is 2"),
    "experts": (sizes(llama__expert_count=(U32, 8)), "expert_count is 8, which .* not have"),
    "half-turned heads": (sizes(llama__rope__dimension_count=(U32, 4)), "is 4, but must be .* 8"),
    "wide heads": (sizes(llama__attention__key_length=(U32, 16)), "key_length is 16, but must"),
    "a key of tomorrow": (sizes(llama__attention__sinks=(BOOL, True)), "sinks is True, which"),
    "other layers": (sizes(llama__block_count=(U32, 3)), "disagree about layers.2"),
    "endless layers": (sizes(llama__block_count=(U32, 2**32 - 1)), "4294967295 layers, but"),
    "wide": (sizes(llama__embedding_length=(U32, 2**20)), "disagree about"),
    "no heads": (sizes(llama__attention__head_count=(U32, 0)), "n_heads is 0"),
    "odd alignment": (sizes(general__alignment=(U32, 24)), "alignment is 24, .* power of two"),
    "no alignment": (sizes(general__alignment=(U32, 0)), "alignment is 0"),
}


@pytest.mark.parametrize(("entries", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_header_that_is_not_of_our_llama(path, entries, message):
    refused(path, file_of(entries, listed(small_llama())), message)


def changed(tensors: list, at: str, **changes) -> list:
    """The list of tensors with one entry that says something else."""
    fields = ("name", "kind", "shape", "data")
    return [
        tuple(changes.get(field, value) for field, value in zip(fields, entry, strict=True))
        if entry[0] == at
        else entry
        for entry in tensors
    ]


TENSORS = listed(small_llama())
WV = "blk.0.attn_v.weight"  # (16, 32)
WRONG_TENSORS = {
    "missing": ([t for t in TENSORS if t[0] != WV], "layers.0.attention.wv.weight"),
    "twice": ([*TENSORS, TENSORS[0]], "token_embd.weight stands there twice"),
    "a bias": (
        [*TENSORS, ("blk.0.attn_q.bias", F32, (32,), bytes(128))],
        r"tensor blk\.0\.attn_q\.bias, which .* not have",
    ),
    "scaled RoPE": (
        [*TENSORS, ("rope_freqs.weight", F32, (4,), bytes(16))],
        r"tensor rope_freqs\.weight, which .* not have",
    ),
    "another shape": (changed(TENSORS, WV, shape=(32, 16)), "layers.0.attention.wv.weight"),
    "a shape of 2**64 numbers": (changed(TENSORS, WV, shape=(2**62, 32)), "cut off|overlaps"),
    "no numbers": (changed(TENSORS, WV, shape=(16, 0)), "no whole rows"),
    "no axes": (changed(TENSORS, WV, shape=()), "no whole rows"),
    "five axes": (changed(TENSORS, WV, shape=(1, 1, 1, 16, 32)), "no whole rows"),
    "half a block": (changed(TENSORS, WV, kind=Q8_0, shape=(16, 33)), "no whole rows of Q8_0"),
    "I32": (changed(TENSORS, WV, kind=26), "is of type I32, .* Q8_0"),
    "IQ2_XXS": (changed(TENSORS, WV, kind=16), "is of type IQ2_XXS, .*llama-quantize"),
    "a type of tomorrow": (changed(TENSORS, WV, kind=2**32 - 1), "is of type 4294967295"),
    "smaller than said": (changed(TENSORS, WV, data=bytes(64)), "it overlaps them, or leaves"),
    "larger than said": (changed(TENSORS, WV, data=bytes(4096)), "it overlaps them, or leaves"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_a_tensor_that_is_not_of_our_llama(path, tensors, message):
    refused(path, file_of(sizes(), tensors), message)


def test_tensors_that_lie_on_each_other(path):
    content = bytearray(file_of(sizes(), TENSORS))
    info = content.index(text(WV)) + len(text(WV)) + 4 + 16 + 4
    (offset,) = struct.unpack_from("<Q", content, info)
    for other in (0, offset - 32, offset + 1, offset + 32, 2**64 - 32):
        struct.pack_into("<Q", content, info, other)
        refused(path, content, rf"{WV} starts at byte {other} of the data, but .* it overlaps")


def head(version: int = 3, n_tensors: int = 21, n_keys: int = 8) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


ENTRIES = b"".join(sizes().values())
ABSURD = {
    "empty": (b"", "announces 4 bytes, and 0"),
    "no GGUF": (b"PK\x03\x04" * 20, "starts with b'PK"),
    "version 1": (head(version=1), "GGUF's version 1, and 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 21, 8), "version 50331648, .*little-endian"),
    "2**63 keys": (head(n_keys=2**63), "announces 8 bytes, and 0"),
    "2**63 tensors": (head(n_tensors=2**63) + ENTRIES, "announces 8 bytes, and 0"),
    "a long key": (head() + struct.pack("<Q", 2**63), "announces 9223372036854775816 bytes"),
    "a long list": (
        head() + text("k") + struct.pack("<IIQ", ARRAY, U32, 2**62),
        "announces 18446744073709551616 bytes",
    ),
    "a long list of texts": (
        head() + text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**62) + bytes(8000),
        "announces 8 bytes, and 0",
    ),
    "a list of lists": (
        head() + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 9) * 1000,
        "of type 9, which GGUF does not know",
    ),
    "a value of type 13": (head() + text("k") + struct.pack("<I", 13), "is of type 13"),
    "a key twice": (head() + entry("k", U32, 1) * 2, "key 'k' stands there twice"),
    "no UTF-8": (head() + struct.pack("<Q", 1) + b"\xff", "can't decode"),
    "2**32 axes": (
        head(n_tensors=1) + ENTRIES + text(WV) + struct.pack("<I", 2**32 - 1),
        "announces 34359738360 bytes",
    ),
}


@pytest.mark.parametrize(("content", "message"), ABSURD.values(), ids=ABSURD.keys())
def test_an_absurd_header(path, content, message):
    refused(path, content, message)
    refused(path, content + bytes(1_000_000) if content else content, "")


def test_a_count_in_a_large_file_allocates_nothing(path):
    """One flipped bit turns a list of a few numbers into one as long as the file."""
    start = head() + text("k") + struct.pack("<IIQ", ARRAY, U32, 2**26)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(2**28 + 100)  # a hole: it takes no disk
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="announces 268435456 bytes"):
        open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("n", [1, 31, 1000])
def test_a_file_that_is_cut_off(path, n):
    refused(path, file_of(sizes(), TENSORS)[:-n], r"weight ends at byte \d+, .* it is cut off")


@given(length=st.integers(0, 2000))
@settings(deadline=None)
def test_a_header_that_is_cut_off(tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "model.gguf"
    refused(path, file_of(sizes(), TENSORS)[: min(length, 1500)], "announces|cut off")


def test_a_scale_that_is_infinite_is_read_without_a_warning(path):
    blocks = struct.pack("<e32b", math.inf, *range(32)) * 16
    path.write_bytes(file_of(sizes(), changed(TENSORS, WV, kind=Q8_0, data=blocks)))
    weight = open_gguf(path).weights["layers.0.attention.wv.weight"].read()
    assert not weight.isfinite().any()


# --- Real models ---------------------------------------------------------------------------------


def llama_of(checkpoint: Checkpoint) -> Llama:
    model, state = empty_llama(checkpoint.config), state_of(checkpoint)
    if checkpoint.config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_stories260k_still_tells_its_story(assets, path, kind):
    original = open_llama2c(assets / "stories260K" / "stories260K.bin")
    vocabulary = load_tokenizer_bin(assets / "stories260K" / "tok512.bin")
    save_gguf(path, original, vocabulary, kind)
    checkpoint = open_gguf(path)
    model, tokenizer = llama_of(checkpoint).float(), checkpoint.tokenizer()
    ids = [tokenizer.bos_id]
    for _ in range(30):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids).startswith("Once upon a time, there was a little girl named Lily.")


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    path = fetched("smollm2-135m-instruct")
    if path is None:
        pytest.skip("needs SmolLM2: minillama fetch smollm2-135m-instruct")
    return open_gguf(path)


def test_smollm2_is_what_its_header_says(smollm2):
    config = smollm2.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (576, 30, 9, 3)
    assert (config.vocab_size, config.rope_theta, config.norm_eps) == (49_152, 100_000.0, 1e-5)
    assert config.tie_embeddings
    assert config.n_parameters == 134_515_008


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_says_what_transformers_says(smollm2):
    """The capital of France, and the same logits on the same dequantised weights."""
    ours, tokenizer = llama_of(smollm2), smollm2.tokenizer()
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    logits = ours(tokens)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"

    c = smollm2.config
    with torch.device("meta"):
        theirs = transformers_llama(c)
    theirs.load_state_dict(to_huggingface(ours.state_dict(), c), assign=True, strict=False)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    assert_close(theirs.eval()(tokens).logits, logits, rtol=0, atol=1e-4)
