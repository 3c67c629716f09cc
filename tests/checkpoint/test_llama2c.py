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
from minillama.checkpoint.llama2c import load_llama2c, load_tokenizer_bin
from minillama.config import LlamaConfig

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


@pytest.mark.parametrize("version", [0, 1], ids=["legacy", "v1"])
@pytest.mark.parametrize("change", ["cut off", "extended"])
@pytest.mark.parametrize("n", [1, 4, 1000])
def test_a_file_of_another_length(path, version, change, n):
    data = file_of(small_llama(), version)
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
        load_llama2c(path)


def test_another_version_names_the_way_out(path):
    path.write_bytes(file_of(small_llama(), 2))
    refused(path, r"is llama2\.c version 2; .* export\.py --version 1")


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
