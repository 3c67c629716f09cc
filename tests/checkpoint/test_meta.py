"""Meta's format, against a release that the test cuts by hand."""

import hashlib
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_llama, small_tokenizer

from minillama import Llama, load, save
from minillama.checkpoint import CheckpointError, load_config
from minillama.checkpoint.meta import CHECKLIST, EXTRAS, PARAMS, open_meta
from minillama.config import LlamaConfig, swiglu_hidden_dim

# Everything divides by 8, and no two sizes are the same.
SIZES = {"dim": 64, "n_heads": 16, "n_kv_heads": 8, "hidden_dim": 176, "vocab_size": 304}
TOKENS = torch.arange(40)[None]


def release(folder: Path, model: Llama, shards: int, **changes) -> None:
    """What Meta's training program leaves: each GPU's own rows or columns, written down by hand."""
    config, state = model.config, model.state_dict()
    folder.mkdir(parents=True)
    for gpu in range(shards):
        heads = slice(
            gpu * config.n_heads // shards * config.head_dim,
            (gpu + 1) * config.n_heads // shards * config.head_dim,
        )
        kv_heads = slice(
            gpu * config.n_kv_heads // shards * config.head_dim,
            (gpu + 1) * config.n_kv_heads // shards * config.head_dim,
        )
        width = slice(gpu * config.hidden_dim // shards, (gpu + 1) * config.hidden_dim // shards)
        words = slice(gpu * config.vocab_size // shards, (gpu + 1) * config.vocab_size // shards)
        features = slice(gpu * config.dim // shards, (gpu + 1) * config.dim // shards)
        part = {
            "tok_embeddings.weight": state["tok_embeddings.weight"][:, features],
            "norm.weight": state["norm.weight"],
            "output.weight": state["output.weight"][words],
            "rope.freqs": torch.ones(4),
        }
        for i in range(config.n_layers):
            block = f"layers.{i}"
            attention, feed_forward = f"{block}.attention", f"{block}.feed_forward"
            part[f"{attention}.wq.weight"] = state[f"{attention}.wq.weight"][heads]
            part[f"{attention}.wk.weight"] = state[f"{attention}.wk.weight"][kv_heads]
            part[f"{attention}.wv.weight"] = state[f"{attention}.wv.weight"][kv_heads]
            part[f"{attention}.wo.weight"] = state[f"{attention}.wo.weight"][:, heads]
            part[f"{feed_forward}.w1.weight"] = state[f"{feed_forward}.w1.weight"][width]
            part[f"{feed_forward}.w2.weight"] = state[f"{feed_forward}.w2.weight"][:, width]
            part[f"{feed_forward}.w3.weight"] = state[f"{feed_forward}.w3.weight"][width]
            part[f"{block}.attention_norm.weight"] = state[f"{block}.attention_norm.weight"]
            part[f"{block}.ffn_norm.weight"] = state[f"{block}.ffn_norm.weight"]
            part[f"{attention}.inner_attention.rope.freqs"] = torch.ones(4)  # as LLaMA 1 has
        part = {name: tensor.clone() for name, tensor in part.items()}
        torch.save(part, folder / f"consolidated.{gpu:02d}.pth")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"norm_eps": config.norm_eps, "vocab_size": -1, "multiple_of": config.hidden_dim}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params = {k: v for k, v in (params | changes).items() if v is not None}
    (folder / PARAMS).write_text(json.dumps(params))


def varied(**changes) -> Llama:
    model = small_llama(**(SIZES | {"max_seq_len": 4096} | changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def assert_same(one: Llama, other: Llama) -> None:
    assert one.config == other.config
    for name, weight in one.state_dict().items():
        assert weight.dtype == other.state_dict()[name].dtype
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A release for two GPUs, with the tokenizer in the folder above."""
    release(tmp_path / "7B", varied(), 2)
    small_tokenizer(304).save(tmp_path / "tokenizer.model")
    return tmp_path / "7B"


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("n_kv_heads", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_release_is_merged_to_the_bit(tmp_path, shards, n_kv_heads, dtype):
    model = varied(n_kv_heads=n_kv_heads).to(dtype)
    release(tmp_path / "7B", model, shards)
    small_tokenizer(304).save(tmp_path / "tokenizer.model")
    loaded, _ = load(tmp_path / "7B")
    assert_same(loaded, model)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_what_we_write_is_what_meta_writes(tmp_path, shards):
    model = varied().bfloat16()
    release(tmp_path / "theirs", model, shards)
    save(tmp_path / "ours", model, small_tokenizer(304), format="meta", shards=shards)
    for path in sorted((tmp_path / "theirs").glob("*.pth")):
        theirs, ours = (
            torch.load(tmp_path / side / path.name, weights_only=True)
            for side in ("theirs", "ours")
        )
        theirs = {name: tensor for name, tensor in theirs.items() if "rope" not in name}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((tmp_path / "ours").glob("*.pth"))) == shards
    assert_same(load(tmp_path / "ours")[0], model)


def test_saved_files_are_whole_archives_and_equal_bytes(tmp_path):
    import zipfile

    for name in ("one", "two"):
        save(tmp_path / name, varied(), small_tokenizer(304), format="meta", shards=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for path in (tmp_path / "one").glob("*.pth"):
        assert zipfile.ZipFile(path).testzip() is None


def test_tied_embeddings_are_written_twice_and_known_again(tmp_path):
    model = varied(tie_embeddings=True)
    save(tmp_path / "meta", model, small_tokenizer(304), format="meta", shards=2)
    part = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert part["output.weight"].shape == (152, 64)
    assert part["tok_embeddings.weight"].shape == (304, 32)
    loaded, _ = load(tmp_path / "meta")
    assert_same(loaded, model)
    assert loaded.output.weight is loaded.tok_embeddings.weight


def test_the_checklist_has_the_sums_that_md5sum_has(tmp_path):
    save(tmp_path / "meta", varied(), small_tokenizer(304), format="meta", shards=2)
    lines = (tmp_path / "meta" / CHECKLIST).read_text().splitlines()
    assert [line.split()[1] for line in lines] == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        EXTRAS,
        PARAMS,
    ]
    for line in lines:
        digest, name = line.split()
        content = (tmp_path / "meta" / name).read_bytes()
        assert hashlib.md5(content).hexdigest() == digest


# --- params.json ---------------------------------------------------------------------------------


def test_the_params_of_the_release(tmp_path):
    """Those of Llama 2 70B, in small: the widths are what the multiples and the multiplier make."""
    hidden_dim = swiglu_hidden_dim(64, multiple_of=32, multiplier=1.3)
    assert hidden_dim == 224  # 170 * 1.3 = 221
    release(
        tmp_path / "x",
        varied(hidden_dim=hidden_dim),
        1,
        multiple_of=32,
        ffn_dim_multiplier=1.3,
    )
    assert load_config(tmp_path / "x").hidden_dim == 224


@pytest.mark.parametrize(
    ("changes", "max_seq_len"),
    [({}, 4096), ({"norm_eps": 1e-6}, 2048), ({"rope_theta": 1e6}, 16_384)],
    ids=["Llama 2", "LLaMA 1", "Code Llama"],
)
def test_the_context_follows_from_the_generation(tmp_path, changes, max_seq_len):
    release(tmp_path / "x", varied(**changes), 1, **changes)
    assert load_config(tmp_path / "x") == small_config(
        **(SIZES | {"max_seq_len": max_seq_len} | changes)
    )


@given(dim=st.integers(1, 200), hidden_dim=st.integers(1, 2000))
@settings(deadline=None, max_examples=300)
def test_any_width_can_be_said_in_metas_words(dim, hidden_dim):
    from minillama.checkpoint.meta import _params

    config = LlamaConfig(
        dim=2 * dim,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        hidden_dim=hidden_dim,
        vocab_size=9,
        max_seq_len=9,
    )
    params = _params(config)
    multiplier = params.get("ffn_dim_multiplier", 1.0)
    assert swiglu_hidden_dim(2 * dim, params["multiple_of"], multiplier) == hidden_dim


def test_the_params_of_llama_2_are_metas():
    from minillama.checkpoint.meta import _params

    assert _params(LlamaConfig.preset("llama2-7b")) == {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-05,
        "vocab_size": 32_000,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scaled_rope": True}, "settings use_scaled_rope, which no Llama of the papers has"),
        ({"lora_args": {}}, "lora_args"),
        ({"dim": "64"}, "dim is '64', but must be a whole number"),
        ({"dim": None}, "dim is None"),
        ({"n_heads": 16.0}, "n_heads is 16.0"),
        ({"n_heads": True}, "n_heads is True"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"ffn_dim_multiplier": float("nan")}, "ffn_dim_multiplier is nan"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"n_layers": 10**8}, "layers, but there are only"),
        ({"n_layers": 3}, r"layers\.2\."),
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 16}, r"wk\.weight: the config needs \(64, 64\), the file has \(32, 64\)"),
        ({"multiple_of": 512}, r"feed_forward\.w1\.weight: the config needs \(512, 64\)"),
        ({"vocab_size": 300}, "vocab_size 300, but the embeddings have 304 rows"),
        ({"dim": 32}, "layers|needs"),
    ],
)
def test_params_of_another_model(folder, changes, message):
    params = json.loads((folder / PARAMS).read_text()) | changes
    (folder / PARAMS).write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_setting_that_is_switched_off_changes_nothing(folder):
    params = json.loads((folder / PARAMS).read_text()) | {"use_scaled_rope": False}
    (folder / PARAMS).write_text(json.dumps(params))
    assert load_config(folder).dim == 64


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
@pytest.mark.parametrize("name", [PARAMS, EXTRAS])
def test_settings_that_are_none(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=name):
        load(folder)


# --- Bad folders ---------------------------------------------------------------------------------


def test_missing_params(folder):
    (folder / PARAMS).unlink()
    with pytest.raises(CheckpointError, match=r"There is no .*params\.json, which says how many"):
        load(folder)


@pytest.mark.parametrize(("gone", "left"), [(0, "01"), (1, "00")])
def test_a_missing_part_is_named(folder, gone, left):
    (folder / f"consolidated.{gone:02d}.pth").unlink()
    with pytest.raises(CheckpointError, match=rf"consolidated\.{gone:02d}\.pth (is )?missing"):
        load(folder)


def test_parts_of_two_models(folder, tmp_path):
    release(tmp_path / "other", varied(n_layers=3), 2)
    (tmp_path / "other" / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth does not hold the same"):
        load(folder)


def test_no_tokenizer_far_and_wide(folder):
    (folder.parent / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"7B holds no tokenizer.*--tokenizer FILE"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "download failed"), (b"<html>403 Forbidden</html>", "message or a pointer")],
)
def test_a_failed_download_is_called_so(folder, content, reason):
    (folder / "consolidated.01.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"consolidated\.01\.pth is no whole .*{reason}"):
        load(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_part_that_is_cut_off(folder, share):
    path = folder / "consolidated.01.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is no whole file"):
        load(folder)


class Canary:
    """Unpickled, it sings: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, partial(pickle.dump, protocol=2)], ids=["archive", "plain"]
)
@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "among tensors"])
def test_a_pickle_that_would_execute_code_does_not(folder, tmp_path, write, hidden):
    song = tmp_path / "song"
    pickle.loads(pickle.dumps(Canary(song)))
    assert song.exists()  # the canary can sing
    song.unlink()
    content = Canary(song)
    if hidden:
        content = torch.load(folder / "consolidated.00.pth") | {"norm.weight": Canary(song)}
    with (folder / "consolidated.00.pth").open("wb") as file:
        write(content, file)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth would execute code"):
        load(folder)
    assert not song.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [torch.ones(3)],
        {"norm.weight": 3},
        {3: torch.ones(3)},
        {"norm.weight": torch.ones(3).to_sparse()},
        {"norm.weight": torch.ones(3, device="meta")},
    ],
    ids=["tensor", "list", "number", "no name", "sparse", "no numbers"],
)
def test_a_pickle_of_something_else(folder, content):
    torch.save(content, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load(folder)


def test_a_tensor_that_claims_more_numbers_than_there_are(folder):
    """Strides of 0 make a large matrix of one number: its shape fits, and it is what it says."""
    part = torch.load(folder / "consolidated.00.pth")
    part["norm.weight"] = torch.full((), 2.0).expand(64)
    torch.save(part, folder / "consolidated.00.pth")
    stored = open_meta(folder).weights["norm.weight"]
    assert stored.read().is_contiguous()  # a copy: 64 numbers do not lie in the file to release
    assert stored.read().tolist() == [2.0] * 64


# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [0, 3, 16, -1])
def test_a_number_of_parts_that_does_not_divide(tmp_path, shards):
    with pytest.raises(ValueError, match=rf"split into {shards} parts: .* Possible are 1, 2, 4, 8"):
        save(tmp_path / "x", varied(), small_tokenizer(304), format="meta", shards=shards)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        save(tmp_path, varied(), small_tokenizer(304), format="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
