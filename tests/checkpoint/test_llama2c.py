import hashlib
import math
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_llama, small_tokenizer
from torch.testing import assert_close

from minillama import Llama, Tokenizer, generate, load
from minillama.checkpoint import CheckpointError, load_config, load_tokenizer
from minillama.checkpoint.llama2c import (
    load_tokenizer_bin,
    open_llama2c,
    quantised,
    save_llama2c,
    tokenizer_bin,
)
from minillama.checkpoint.weights import Checkpoint, Stored
from minillama.config import LlamaConfig
from minillama.tokenizer.vocabulary import Kind, Vocabulary

# --- The real stories260K ------------------------------------------------------------------------

STORY = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
STORY += [338, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282, 295, 433]
TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


@pytest.fixture(scope="module")
def stories(assets) -> Path:
    return assets / "stories260K"


@pytest.fixture(scope="module")
def weights_file(stories) -> Path:
    path = stories / "stories260K.bin"
    # Copies of another model under this name go around.
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("b0a507e7")
    return path


@pytest.fixture(scope="module")
def model(weights_file, stories) -> Llama:
    return load(weights_file, stories / "tok512.bin")[0]


@pytest.fixture(scope="module", params=["tok512.bin", "tok512.model"])
def tokenizer(request, stories) -> Tokenizer:
    return load_tokenizer(stories / request.param)


def test_the_sizes_of_stories260k(weights_file):
    config = load_config(weights_file)
    assert config == LlamaConfig(
        dim=64,
        n_layers=5,
        n_heads=8,
        n_kv_heads=4,
        hidden_dim=172,
        vocab_size=512,
        max_seq_len=512,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_embeddings=True,
    )
    assert config.n_parameters == 260_032


def test_it_has_260032_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == 260_032


@torch.inference_mode()
def test_the_likeliest_tokens_after_bos(model):
    logits, ids = model(torch.tensor([[1]]))[0, -1].topk(5)
    assert ids.tolist() == [403, 385, 410, 317, 407]
    expected = torch.tensor([17.0235, 15.4062, 13.1083, 12.7692, 12.4181])
    assert_close(logits, expected, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_the_likeliest_tokens_after_once_upon_a_time(model, tokenizer):
    ids = tokenizer.encode("Once upon a time", bos=True)
    assert ids == [1, 403, 407, 261, 378]
    logits, ids = model(torch.tensor([ids]))[0, -1].topk(2)
    assert ids.tolist() == [432, 383]
    assert_close(logits, torch.tensor([17.7994, 14.2813]), rtol=0, atol=1e-3)


def test_it_tells_the_story_of_lily(model, tokenizer):
    (completion,) = generate(model, tokenizer, "", max_new_tokens=200)
    assert completion.token_ids[:30] == STORY
    assert completion.text.startswith(TEXT)
    assert len(completion.token_ids) == 200
    assert completion.finish_reason == "length"


def test_both_tokenizers_tell_the_same(model, stories):
    one, other = (
        generate(model, load_tokenizer(stories / name), "", max_new_tokens=200)
        for name in ("tok512.bin", "tok512.model")
    )
    assert one == other


@torch.inference_mode()
def test_the_loss_on_the_first_two_sentences(model, tokenizer):
    ids = torch.tensor(tokenizer.encode(TEXT, bos=True))
    assert len(ids) == 32
    log_p = model(ids[None, :-1]).log_softmax(-1)[0]
    loss = -log_p.gather(1, ids[1:, None]).mean().item()
    assert loss == pytest.approx(0.18036, abs=1e-5)


def test_the_two_tokenizer_files_hold_the_same_pieces(stories):
    one, other = (load_tokenizer(stories / name) for name in ("tok512.bin", "tok512.model"))
    assert one.vocab_size == 512
    assert one.pieces == other.pieces
    assert one.scores == other.scores


@given(text=st.from_regex(r"(\w+[,.!?]? )*\w*", fullmatch=True))
@settings(deadline=None)
def test_the_two_tokenizer_files_encode_alike(stories, text):
    """As long as no spaces stand in a row: the .model squeezes them, which the .bin cannot say."""
    text = text.strip()
    one, other = (load_tokenizer(stories / name) for name in ("tok512.bin", "tok512.model"))
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == text == other.decode(one.encode(text))


def test_a_tokenizer_beside_the_weights_is_found(weights_file, stories, tmp_path):
    (tmp_path / "model.bin").write_bytes(weights_file.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"model\.bin holds no tokenizer, .* --tokenizer FILE"
    ):
        load(tmp_path / "model.bin")
    (tmp_path / "tokenizer.bin").write_bytes((stories / "tok512.bin").read_bytes())
    assert load(tmp_path / "model.bin")[1].vocab_size == 512


# --- A writer of its own -------------------------------------------------------------------------


MAGIC = 0x616B3432


def floats(*tensors: torch.Tensor) -> bytes:
    values = [value for tensor in tensors for value in tensor.flatten().tolist()]
    return struct.pack(f"<{len(values)}f", *values)


def file_of(model: Llama, version: int) -> bytes:
    """The model as llama2.c writes it: legacy (0) or version 1, statement by statement."""
    c = model.config
    layers = model.layers
    attention = [layer.attention for layer in layers]
    ffn = [layer.feed_forward for layer in layers]
    sizes = [c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads]
    attention_norms = floats(*(layer.attention_norm.weight for layer in layers))
    ffn_norms = floats(*(layer.ffn_norm.weight for layer in layers))
    final_norm = floats(model.norm.weight)
    embedding = floats(model.tok_embeddings.weight)
    qkvo = floats(*(a.wq.weight for a in attention)) + floats(*(a.wk.weight for a in attention))
    qkvo += floats(*(a.wv.weight for a in attention)) + floats(*(a.wo.weight for a in attention))
    w123 = floats(*(f.w1.weight for f in ffn)) + floats(*(f.w2.weight for f in ffn))
    w123 += floats(*(f.w3.weight for f in ffn))
    classifier = b"" if c.tie_embeddings else floats(model.output.weight)
    if version == 0:
        vocab_size = c.vocab_size if c.tie_embeddings else -c.vocab_size
        header = struct.pack("<7i", *sizes, vocab_size, c.max_seq_len)
        rope = struct.pack("<f", 0.5) * (2 * c.max_seq_len * (c.dim // c.n_heads // 2))
        body = [embedding, attention_norms, qkvo, ffn_norms, w123, final_norm, rope, classifier]
    else:
        sizes += [c.vocab_size, c.max_seq_len, c.tie_embeddings]
        header = struct.pack("<Ii7iB", MAGIC, version, *sizes).ljust(256, b"\0")
        body = [attention_norms, ffn_norms, final_norm, embedding, qkvo, w123, classifier]
    return header + b"".join(body)


def int8_of(*tensors: torch.Tensor, group: int) -> bytes:
    """Each tensor as int8 with the scales behind it, group by group, as Python counts."""
    parts = []
    for tensor in tensors:
        numbers, scales = [], []
        for values in tensor.flatten().view(-1, group).tolist():
            scale = max(abs(value) for value in values) / 127
            scales.append(scale)
            numbers += [round(value / scale) if scale else 0 for value in values]
        parts.append(struct.pack(f"<{len(numbers)}b", *numbers))
        parts.append(struct.pack(f"<{len(scales)}f", *scales))
    return b"".join(parts)


def int8_file_of(model: Llama, group: int) -> bytes:
    """The model as llama2.c's version 2, statement by statement."""
    c = model.config
    attention = [layer.attention for layer in model.layers]
    ffn = [layer.feed_forward for layer in model.layers]
    sizes = [c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len]
    header = struct.pack("<Ii7iBi", MAGIC, 2, *sizes, c.tie_embeddings, group).ljust(256, b"\0")
    norms = floats(*(layer.attention_norm.weight for layer in model.layers))
    norms += floats(*(layer.ffn_norm.weight for layer in model.layers), model.norm.weight)
    matrices = [model.tok_embeddings.weight]
    matrices += [a.wq.weight for a in attention] + [a.wk.weight for a in attention]
    matrices += [a.wv.weight for a in attention] + [a.wo.weight for a in attention]
    matrices += [f.w1.weight for f in ffn] + [f.w2.weight for f in ffn] + [f.w3.weight for f in ffn]
    matrices += [] if c.tie_embeddings else [model.output.weight]
    return header + norms + int8_of(*matrices, group=group)


def tokenizer_file(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as llama2.c writes it."""
    pieces = [piece.replace("▁", " ") for piece in tokenizer.pieces]
    pieces[1], pieces[2] = "\n<s>\n", "\n</s>\n"
    encoded = [piece.encode() for piece in pieces]
    entries = [
        struct.pack("<fI", score, len(piece)) + piece
        for piece, score in zip(encoded, tokenizer.scores, strict=True)
    ]
    return struct.pack("<I", max(map(len, encoded))) + b"".join(entries)


def varied(**changes) -> Llama:
    """No two tensors of it are alike, the norms' weights included."""
    model = small_llama(**changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def path(tmp_path) -> Path:
    """A model in the legacy format with its tokenizer beside it."""
    (tmp_path / "model.bin").write_bytes(file_of(small_llama(), 0))
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer_file(small_tokenizer()))
    return tmp_path / "model.bin"


@pytest.mark.parametrize("version", [0, 1], ids=["legacy", "v1"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_written_is_read(path, version, tied):
    model = varied(tie_embeddings=tied)
    path.write_bytes(file_of(model, version))
    loaded, tokenizer = load(path)
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert tokenizer.pieces == small_tokenizer().pieces


@pytest.mark.parametrize("group", [1, 8, 32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_int8_is_read(path, tied, group):
    model = varied(tie_embeddings=tied)
    path.write_bytes(int8_file_of(model, group))
    loaded, _ = load(path)
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        read = loaded.state_dict()[name]
        if weight.dim() == 1:
            assert torch.equal(read, weight)
            continue
        largest = weight.view(-1, group).abs().amax(1, keepdim=True)
        # Half a step, and what float32 loses on the way.
        assert ((read - weight).view(-1, group).abs() <= largest / 127 * 0.5001 + 1e-7).all(), name
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied


def test_groups_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    numbers, scales = quantised(weight, 2)
    assert_close(scales, torch.tensor([[2.0], [0.5], [0.0], [0.0]]) / 127)
    # 1 / (2 / 127) = 63.5 is rounded to the even neighbour.
    assert numbers.tolist() == [[64, -127], [127, 0], [0, 0], [0, 0]]


# --- Our own writer ------------------------------------------------------------------------------


def checkpoint_of(model: Llama) -> Checkpoint:
    weights = {
        name: Stored(tuple(weight.shape), weight.dtype, lambda weight=weight: weight)
        for name, weight in model.state_dict().items()
        if name != "output.weight" or not model.config.tie_embeddings
    }
    return Checkpoint(model.config, weights, None, Path("nowhere"))


@pytest.mark.parametrize("version", [0, 1], ids=["legacy", "v1"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_writes_the_bytes_of_llama2c(tmp_path, version, tied):
    model = varied(tie_embeddings=tied)
    save_llama2c(tmp_path / "new" / "m.bin", checkpoint_of(model), small_tokenizer(), version)
    ours, theirs = bytearray((tmp_path / "new" / "m.bin").read_bytes()), file_of(model, version)
    if version == 0:  # this file's writer fills the tables that nobody reads with one number
        n_bytes = 4 * 64 * 8
        start = len(ours) - n_bytes - (0 if tied else 4 * 300 * 32)
        cosines = struct.unpack_from("<2f", ours, start + 4 * 4)
        assert cosines == pytest.approx((math.cos(1), math.cos(0.1)), abs=1e-6)  # of position 1
        ours[start : start + n_bytes] = theirs[start : start + n_bytes]
    assert bytes(ours) == theirs
    assert (tmp_path / "new" / "tokenizer.bin").read_bytes() == tokenizer_file(small_tokenizer())
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_writes_the_int8_of_llama2c(tmp_path, tied):
    model = varied(tie_embeddings=tied)
    save_llama2c(tmp_path / "model.bin", checkpoint_of(model), small_tokenizer(), 2)
    ours, theirs = (tmp_path / "model.bin").read_bytes(), int8_file_of(model, 32)
    assert len(ours) == len(theirs)
    (tmp_path / "theirs.bin").write_bytes(theirs)
    for name, stored in open_llama2c(tmp_path / "model.bin").weights.items():
        other = open_llama2c(tmp_path / "theirs.bin").weights[name].read()
        assert_close(stored.read(), other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_written_twice_is_written_alike(tmp_path, version):
    path = tmp_path / "model.bin"
    save_llama2c(path, checkpoint_of(varied()), small_tokenizer(), version)
    first = path.read_bytes()
    save_llama2c(path, open_llama2c(path), small_tokenizer(), version)  # onto what is read
    assert path.read_bytes() == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_written_as_it_is(tmp_path, dtype):
    model = varied().to(dtype)
    save_llama2c(tmp_path / "model.bin", checkpoint_of(model), small_tokenizer())
    for name, stored in open_llama2c(tmp_path / "model.bin").weights.items():
        assert torch.equal(stored.read(), model.state_dict()[name].float())


def test_groups_divide_both_kinds_of_rows(tmp_path):
    model = varied(hidden_dim=172)  # as stories260K's: 4 * 43
    save_llama2c(tmp_path / "model.bin", checkpoint_of(model), small_tokenizer(), 2)
    assert struct.unpack_from("<i", (tmp_path / "model.bin").read_bytes(), 37) == (4,)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_stories260k_is_written_as_it_came(weights_file, stories, tmp_path, version):
    vocabulary = load_tokenizer(stories / "tok512.bin")
    save_llama2c(tmp_path / "model.bin", open_llama2c(weights_file), vocabulary, version)
    assert (tmp_path / "tokenizer.bin").read_bytes() == (stories / "tok512.bin").read_bytes()
    model, tokenizer = load(tmp_path / "model.bin")
    (completion,) = generate(model, tokenizer, "", max_new_tokens=30)
    assert completion.token_ids == STORY
    if version == 0:
        ours, theirs = (tmp_path / "model.bin").read_bytes(), weights_file.read_bytes()
        tables = 4 * 512 * 8  # at the end: rounded by another program
        assert ours[:-tables] == theirs[:-tables]
        ours, theirs = (torch.tensor(struct.unpack("<4096f", b[-tables:])) for b in (ours, theirs))
        assert_close(ours, theirs, rtol=0, atol=5e-5)


WRONG = {
    "eps": ({"norm_eps": 1e-6}, "eps of 1e-5 .* This model has 1e-06 and 10,000.0"),
    "theta": ({"rope_theta": 1e6}, "base 10,000, .* has 1e-05 and 1,000,000.0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_the_format_cannot_say_is_refused(tmp_path, changes, message):
    model = small_llama(**changes)
    with pytest.raises(ValueError, match=message):
        save_llama2c(tmp_path / "model.bin", checkpoint_of(model), small_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"no version 3 of llama2\.c's format"):
        save_llama2c(tmp_path / "m.bin", checkpoint_of(small_llama()), small_tokenizer(), 3)


def test_a_vocabulary_with_control_pieces_of_its_own_is_refused():
    tokenizer = small_tokenizer()
    kinds = (*tokenizer.kinds[:-1], Kind.CONTROL)
    vocabulary = Vocabulary(tokenizer.pieces, tokenizer.scores, kinds)
    with pytest.raises(ValueError, match=r"tokenizer\.bin holds .* without control pieces"):
        tokenizer_bin(Tokenizer(vocabulary.to_proto()))


def test_the_tokenizer_of_another_model_is_not_overwritten(path, tmp_path):
    path.with_name("tokenizer.bin").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin is the tokenizer of another model"):
        save_llama2c(tmp_path / "new.bin", checkpoint_of(small_llama()), small_tokenizer())
    assert not (tmp_path / "new.bin").exists()


def test_the_tokenizer_model_of_another_model_would_be_taken_for_its_own(path):
    beside = path.with_name("tokenizer.model")
    beside.write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is the tokenizer of another"):
        save_llama2c(path.with_name("new.bin"), checkpoint_of(small_llama()), small_tokenizer())
    assert not path.with_name("new.bin").exists()
    beside.write_bytes(small_tokenizer().to_bytes())
    save_llama2c(path.with_name("new.bin"), checkpoint_of(small_llama()), small_tokenizer())


def test_training_a_loaded_model_leaves_the_file_alone(path):
    before = path.read_bytes()
    model, _ = load(path)
    with torch.no_grad():
        model.norm.weight += 1
    assert path.read_bytes() == before


# --- Damage --------------------------------------------------------------------------------------


def refused(path: Path, message: str = "") -> None:
    """It is refused with a message that names it, and at once."""
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=rf"model\.bin .*{message}"):
        load(path)
    assert time.perf_counter() - start < 5  # seconds; on a busy machine, too


@pytest.mark.parametrize("version", [0, 1, 2], ids=["legacy", "v1", "v2"])
@pytest.mark.parametrize("change", ["cut off", "extended"])
@pytest.mark.parametrize("n", [1, 4, 1000])
def test_a_file_of_another_length(path, version, change, n):
    data = int8_file_of(small_llama(), 8) if version == 2 else file_of(small_llama(), version)
    path.write_bytes(data[:-n] if change == "cut off" else data + bytes(n))
    refused(path, rf"has \d+ bytes, but its header \(dim 32, .* makes {len(data)}: .* cut off")


@pytest.mark.parametrize("version", [0, 1], ids=["legacy", "v1"])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 27, 28, 40, 255, 256])
def test_a_file_that_ends_in_its_header(path, version, length):
    path.write_bytes(file_of(small_llama(), version)[:length])
    refused(path)


GARBAGE = {
    "a zip file": b"PK\x03\x04" * 100,
    "text": b"Once upon a time, there was a little girl named Lily." * 10,
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "huge sizes": struct.pack("<7i", *[2**31 - 1] * 7) + bytes(1000),
    "very deep": struct.pack("<7i", 2, 1, 2**31 - 1, 1, 1, 2**31 - 1, 1) + bytes(1000),
    "very wide": struct.pack("<7i", 2**30, 2**30, 2**30, 2**29, 2**29, -(2**31), 2**30)
    + bytes(1000),
    "no heads": struct.pack("<7i", 32, 64, 2, 0, 2, 300, 64) + bytes(1000),
    "heads that do not divide": struct.pack("<7i", 32, 64, 2, 4, 3, 300, 64) + bytes(1000),
    "negative layers": struct.pack("<7i", 32, 64, -2, 4, 2, 300, 64) + bytes(1000),
    "odd groups in v2": struct.pack("<Ii7iBi", MAGIC, 2, 32, 64, 2, 4, 2, 300, 64, 1, 7).ljust(999),
    "no groups in v2": struct.pack("<Ii7iBi", MAGIC, 2, 32, 64, 2, 4, 2, 300, 64, 1, 0).ljust(999),
    "huge sizes in v1": struct.pack("<Ii7iB", MAGIC, 1, *[2**31 - 1] * 7, 1) + bytes(1000),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(path, content):
    path.write_bytes(content)
    refused(path)


@given(start=st.sampled_from([b"", struct.pack("<Ii", MAGIC, 1)]), rest=st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_are_refused(tmp_path_factory, start, rest):
    path = tmp_path_factory.getbasetemp() / "model.bin"
    path.write_bytes(start + rest)
    with pytest.raises(CheckpointError, match=r"model\.bin "):
        open_llama2c(path)


def test_another_version_names_the_way_out(path):
    path.write_bytes(file_of(small_llama(), 3))
    refused(path, r"is llama2\.c version 3; .* export\.py --version 1")


def test_groups_that_do_not_divide_the_rows(path):
    path.write_bytes(int8_file_of(small_llama(), 64))
    refused(path, r"has int8 numbers in groups of 64, which do not divide its rows of 32")


def test_a_flipped_bit_in_a_legacy_header_is_noticed(path):
    data = path.read_bytes()
    for position in range(28):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            refused(path)


# --- Tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_is_read_as_it_was_written(path):
    tokenizer = load_tokenizer_bin(path.parent / "tokenizer.bin")
    assert tokenizer.pieces == small_tokenizer().pieces
    assert_close(tokenizer.scores, small_tokenizer().scores)
    text = "Ada had 3 of these: 日本 🦙\n"
    assert tokenizer.encode(text) == small_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999])
def test_a_tokenizer_that_is_cut_off(path, share):
    tokenizer = path.parent / "tokenizer.bin"
    data = tokenizer.read_bytes()
    tokenizer.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.bin is no whole tokenizer.bin .*Copy it"
    ):
        load(path)


def test_a_tokenizer_that_lost_its_last_piece(path):
    tokenizer = path.parent / "tokenizer.bin"
    last = small_tokenizer().pieces[-1].replace("▁", " ").encode()
    tokenizer.write_bytes(tokenizer.read_bytes()[: -8 - len(last)])
    with pytest.raises(CheckpointError, match="has 299 tokens and the model 300"):
        load(path)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_tokenizer_whose_scores_are_no_numbers(path, score):
    tokenizer = path.parent / "tokenizer.bin"
    data = bytearray(tokenizer.read_bytes())
    data[4:8] = struct.pack("<f", score)
    tokenizer.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin is no whole .*finite number"):
        load(path)


def test_the_weights_are_no_tokenizer(path):
    with pytest.raises(CheckpointError, match=r"model\.bin is no whole tokenizer\.bin"):
        load(path, tokenizer=path)


@pytest.mark.parametrize("name", ["nowhere.bin", "nowhere.model"])
def test_a_tokenizer_that_is_missing(path, name):
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        load(path, tokenizer=path.parent / name)


@given(content=st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_no_tokenizer(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "tokenizer.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin is no whole"):
        load_tokenizer_bin(path)
