import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_config, small_llama, small_tokenizer
from torch.testing import assert_close
from transformers_llama import transformers_llama

from minillama import load, save
from minillama.checkpoint import CheckpointError
from minillama.checkpoint.huggingface import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    halves_from_pairs,
    huggingface_name,
    our_name,
    pairs_from_halves,
    read_config,
    to_huggingface,
    tokenizer_json,
)
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, Vocabulary


def numbered_rows(n_rows: int) -> torch.Tensor:
    return torch.arange(float(n_rows))[:, None].expand(n_rows, 3)


def test_by_hand():  # two heads of six channels; the pairs were (0, 1), (2, 3), (4, 5)
    reordered = halves_from_pairs(numbered_rows(12), n_heads=2)
    assert reordered[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_llama_head_goes_to_evens_then_odds():
    rows = halves_from_pairs(numbered_rows(128), n_heads=1)[:, 0].tolist()
    assert rows == [*range(0, 128, 2), *range(1, 128, 2)]


def test_the_wrong_number_of_heads_fits_and_is_wrong():
    weight = numbered_rows(16)
    assert not torch.equal(halves_from_pairs(weight, 2), halves_from_pairs(weight, 4))


@given(n_heads=st.integers(1, 6), half=st.integers(1, 8))
@settings(deadline=None)
def test_there_and_back_is_the_identity(n_heads, half):
    weight = numbered_rows(n_heads * half * 2)
    assert torch.equal(pairs_from_halves(halves_from_pairs(weight, n_heads), n_heads), weight)
    assert torch.equal(halves_from_pairs(pairs_from_halves(weight, n_heads), n_heads), weight)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("tok_embeddings", "model.embed_tokens"),
        ("layers.3.attention_norm", "model.layers.3.input_layernorm"),
        ("layers.3.attention.wq", "model.layers.3.self_attn.q_proj"),
        ("layers.3.attention.wk", "model.layers.3.self_attn.k_proj"),
        ("layers.3.attention.wv", "model.layers.3.self_attn.v_proj"),
        ("layers.3.attention.wo", "model.layers.3.self_attn.o_proj"),
        ("layers.3.ffn_norm", "model.layers.3.post_attention_layernorm"),
        ("layers.31.feed_forward.w1", "model.layers.31.mlp.gate_proj"),
        ("layers.31.feed_forward.w2", "model.layers.31.mlp.down_proj"),
        ("layers.31.feed_forward.w3", "model.layers.31.mlp.up_proj"),
        ("norm", "model.norm"),
        ("output", "lm_head"),
    ],
)
def test_names(ours, theirs):
    assert huggingface_name(f"{ours}.weight") == f"{theirs}.weight"


def test_only_wq_and_wk_are_reordered_each_by_its_own_heads():
    config = LlamaConfig(
        dim=64, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=32, vocab_size=16, max_seq_len=8
    )
    ours = Llama(config).state_dict()
    theirs = to_huggingface(ours, config)
    assert len(theirs) == len(ours)
    for name, weight in ours.items():
        if name.endswith("wq.weight"):
            weight = halves_from_pairs(weight, 8)
        elif name.endswith("wk.weight"):
            weight = halves_from_pairs(weight, 2)
        assert torch.equal(theirs[huggingface_name(name)], weight), name


def test_names_lead_back():
    for name in Llama(small_config()).state_dict():
        assert our_name(huggingface_name(name)) == name
    for strange in ("lm_head.bias", "model.layers.0.mlp.experts.weight", "transformer.h.0.weight"):
        assert our_name(strange) is None


# --- Folders: transformers as the judge ----------------------------------------------------------

TOKENS = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "multi-head": {"n_heads": 4, "n_kv_heads": 4},
    "grouped": {"n_heads": 8, "n_kv_heads": 2},  # groups of 4: 8 / 2 is not 2
    "tied": {"n_heads": 8, "n_kv_heads": 2, "tie_embeddings": True},
    "multi-query": {"n_heads": 4, "n_kv_heads": 1, "rope_theta": 1e6, "norm_eps": 1e-2},
}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def sensible_llama(dtype: torch.dtype = torch.float32, **shape) -> Llama:
    """Logits of order 1, of which float32 keeps five digits."""
    model = small_llama(**shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5 if parameter.dim() == 1 else 1.0
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder in Hugging Face's format."""
    save(tmp_path / "hf", sensible_llama(), small_tokenizer(), format="huggingface")
    return tmp_path / "hf"


def change_config(folder: Path, **changes) -> None:
    """None takes a setting away."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(kept))


@over_shapes
@torch.no_grad()
def test_transformers_loads_what_we_save(tmp_path, shape):
    import transformers

    model = sensible_llama(**shape)
    save(tmp_path / "hf", model, small_tokenizer(), format="huggingface")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-5, atol=1e-5)
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_embeddings


@pytest.fixture(scope="module", params=["as it is", "squeezed", "without a prefix"])
def tokenizers(request, tmp_path_factory) -> tuple[Tokenizer, Any]:
    """One of ours, and the same in transformers."""
    import transformers

    changes = {"squeezed": {"squeeze_spaces": True}, "without a prefix": {"dummy_prefix": False}}
    small = small_tokenizer()
    vocabulary = Vocabulary(
        small.pieces, small.scores, small.kinds, **changes.get(request.param, {})
    )
    ours, path = Tokenizer(vocabulary.to_proto()), tmp_path_factory.mktemp("hf") / "x"
    save(path, sensible_llama(), ours, format="huggingface")
    return ours, transformers.AutoTokenizer.from_pretrained(path)


@given(text=st.text("adeh \n\t▁<s>é🦙", max_size=20))
@settings(deadline=None, max_examples=100)
@example(text="Ada had a kite.")
@example(text="two  spaces\n")
@example(text=" two")
@example(text="  ")
@example(text="<s>x</s>")
@example(text="日本語")
def test_transformers_makes_the_same_ids(tokenizers, text):
    ours, theirs = tokenizers
    made = theirs(text, split_special_tokens=True)
    assert set(made) == {"input_ids", "attention_mask"}
    assert made.input_ids == ours.encode(text, bos=True)


@pytest.mark.parametrize("text", ["Ada had a kite.", " two  spaces\n", "日本語 🦙"])
def test_transformers_reads_them_back(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours.encode(text, bos=True, eos=True)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "stories260K/tok512.model"])
def test_real_vocabularies_as_a_tokenizer_json(assets, name):
    import tokenizers

    ours = Tokenizer(assets / name)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    text = (assets / "tinyshakespeare.txt").read_text()[:20_000]
    for some in (text, f"  {text}  ", " two", "a  b\n  c", "日本語 🦙\t\0"):
        assert theirs.encode(some).ids == ours.encode(some, bos=True)


@over_shapes
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["whole", "sharded"])
@torch.no_grad()
def test_we_load_what_transformers_saves(tmp_path, shape, shard_size):
    config = small_config(**shape)
    theirs = transformers_llama(config, initializer_range=0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > (shard_size == "20KB")
    small_tokenizer().save(tmp_path / "hf" / "tokenizer.model")
    model, _ = load(tmp_path / "hf")
    assert model.config == config
    assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_old_pickles_are_read(folder, shards):
    model, _ = load(folder)
    state = to_huggingface(model.state_dict(), model.config)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old folders have
    (folder / WEIGHTS).unlink()
    places = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({n: w for n, w in state.items() if places[n] == file}, folder / file)
    if shards == 1:
        (folder / "pytorch_model-0.bin").rename(folder / "pytorch_model.bin")
    else:
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again, _ = load(folder)
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_before_archives_there_were_plain_pickles(folder):
    model, _ = load(folder)
    state = to_huggingface(model.state_dict(), model.config)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / PICKLE, _use_new_zipfile_serialization=False)
    assert torch.equal(load(folder)[0](TOKENS), model(TOKENS))


def test_two_saves_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, small_llama(), small_tokenizer(), format="huggingface")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_files_grow_to_a_limit(tmp_path):
    model = small_llama()
    save(tmp_path / "hf", model, small_tokenizer(), format="huggingface", shard_bytes=30_000)
    sizes = [path.stat().st_size for path in (tmp_path / "hf").glob("model-*.safetensors")]
    assert len(sizes) == 5  # two matrices of 38,400 bytes, and 74,000 bytes of others
    assert max(sizes) < 40_000
    index = json.loads((tmp_path / "hf" / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.config.n_parameters


# --- config.json ---------------------------------------------------------------------------------


def test_what_an_old_config_leaves_out(folder):
    absent = ("num_key_value_heads", "rope_theta", "rope_parameters", "rms_norm_eps", "head_dim")
    absent += ("tie_word_embeddings", "architectures", "max_position_embeddings", "hidden_act")
    change_config(folder, **dict.fromkeys(absent))
    config = read_config(folder / CONFIG)
    assert config.n_kv_heads == config.n_heads == 4
    assert (config.rope_theta, config.norm_eps) == (10_000.0, 1e-6)  # not 1e-5
    assert (config.tie_embeddings, config.max_seq_len) == (False, 2048)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5e5, "rope_parameters": None},  # transformers 4
        {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},  # 5
        {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_base_of_rope_is_found_wherever_it_stands(folder, settings):
    change_config(folder, **settings)
    assert read_config(folder / CONFIG).rope_theta == 5e5


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": LINEAR}, "rope_scaling is .* stretches RoPE's positions"),
        ({"rope_parameters": LLAMA3}, "rope_parameters is .*llama3.* stretches"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "stretches"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "stretches"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
        ({"model_type": "mistral"}, "model_type is 'mistral', but .* needs 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but .* 'silu' or 'swish'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096, but .* needs absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* needs absent"),
        ({"head_dim": 16}, "head_dim is 16, but .* needs 8, dim / n_heads"),
        ({"hidden_size": None}, "says no hidden_size"),
        ({"hidden_size": "32"}, "is no config of a model: dim is '32'"),
        ({"num_attention_heads": 0}, "is no config of a model: n_heads is 0"),
        ({"num_attention_heads": 3}, "is no config of a model: dim .* must be n_heads"),
        ({"num_key_value_heads": 3}, "is no config of a model: n_heads .* multiple"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": "x", "rope_parameters": None}, "rope_theta is 'x'"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers, but there are only"),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+: .* the file has none"),
        ({"intermediate_size": 96}, r"feed_forward\.w1\.weight: the config needs \(96, 32\)"),
        ({"num_key_value_heads": 4}, r"wk\.weight: the config needs \(32, 32\)"),
        ({"vocab_size": 301}, "301"),
    ],
)
def test_a_config_that_is_not_ours_to_read_is_refused_with_the_reason(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"hidden_size": 1e999}', "\x00"])
def test_a_config_that_is_none(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


# --- Bad folders ---------------------------------------------------------------------------------


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"norm\.weight: .* the file has none"),
        (lambda w: w.update({"model.norm.bias": torch.ones(32)}), r"model\.norm\.bias, which no"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), r"norm\.weight: .* \(31,\)"),
        (lambda w: w.update({"model.norm.weight": torch.ones(32).int()}), r"int32, which no"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(7, 5)}),
            r"wq\.weight: .* \(7, 5\)",
        ),
    ],
    ids=["missing", "extra", "shape", "integers", "wq"],
)
def test_weights_of_another_model(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_head_beside_tied_embeddings_is_left_aside_as_transformers_does(tmp_path):
    model = small_llama(tie_embeddings=True)
    save(tmp_path / "hf", model, small_tokenizer(), format="huggingface")
    change_weights(tmp_path / "hf", lambda w: w.update({"lm_head.weight": torch.ones(300, 32)}))
    assert torch.equal(load(tmp_path / "hf")[0](TOKENS), model(TOKENS))


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load(folder)


def test_weights_without_a_config(folder):
    (folder / WEIGHTS).rename(folder / PICKLE)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"There is no .*config\.json"):
        load(folder)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder in parts."""
    save(
        tmp_path / "sharded",
        sensible_llama(),
        small_tokenizer(),
        format="huggingface",
        shard_bytes=60_000,
    )
    return tmp_path / "sharded"


INDEX = f"{WEIGHTS}.index.json"


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_parts_are_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors missing, 1 of 3"):
        load(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/x.safetensors", "..", ".", ""])
def test_an_index_that_leads_out_of_its_folder(sharded, name):
    (sharded / "model-00001-of-00003.safetensors").rename(sharded.parent / "outside.safetensors")
    change_index(sharded, lambda places: places.update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"index\.json names the file .* outside"):
        load(sharded)


def test_an_absolute_name_in_an_index(sharded):
    outside = sharded.parent / "outside.safetensors"
    (sharded / "model-00001-of-00003.safetensors").rename(outside)
    change_index(sharded, lambda places: places.update({"lm_head.weight": str(outside)}))
    with pytest.raises(CheckpointError, match=r"names the file .* outside"):
        load(sharded)


def test_a_link_that_leads_out_of_the_folder(sharded):
    part = sharded / "model-00001-of-00003.safetensors"
    part.rename(sharded.parent / "outside.safetensors")
    part.symlink_to(sharded.parent / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"names the file .* outside"):
        load(sharded)


def test_the_links_of_a_download_cache_are_followed(sharded, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0123abcd", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(index)))
    assert torch.equal(load(snapshot)[0](TOKENS), sensible_llama()(TOKENS))


@pytest.mark.parametrize(
    "change",
    [
        lambda places: places.pop("model.norm.weight"),
        lambda places: places.update({"more": places["lm_head.weight"]}),
        lambda places: places.update({"lm_head.weight": places["model.norm.weight"]}),
    ],
    ids=["too few", "too many", "elsewhere"],
)
def test_an_index_that_lies(sharded, change):
    change_index(sharded, change)
    with pytest.raises(CheckpointError, match=r"index\.json disagree about"):
        load(sharded)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 7}}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json "):
        load(sharded)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "download failed"),
        (b"<!DOCTYPE html><html>Not found</html>", "message or a pointer"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "message or a pointer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS"),
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
def test_a_failed_download_is_called_so(folder, name, content, reason):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is no .*{reason}"):
        load(folder)


def test_of_two_tokenizers_the_one_that_fits_is_taken(folder):
    assert load(folder)[1].file_name == "tokenizer.model"
    (folder / "tokenizer.json").write_text("{}")  # in place of the one for transformers
    assert load(folder)[1].file_name == "tokenizer.model"
    small_tokenizer(295).save(folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(folder)
