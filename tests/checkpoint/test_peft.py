"""Adapters on disk: the format by hand, against peft itself where it is installed, and damaged."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import small_config, small_llama, small_tokenizer
from torch.testing import assert_close
from transformers_llama import transformers_copy

from minillama.adapt.lora import Adapter, adapter_of, attach, merge, new_adapter
from minillama.adapt.quantize import quantize
from minillama.checkpoint import CheckpointError, load, save
from minillama.checkpoint.huggingface import halves_from_pairs
from minillama.checkpoint.native import open_native, save_native
from minillama.checkpoint.peft import CONFIG, WEIGHTS, load_adapter, merged, save_adapter
from minillama.checkpoint.weights import checkpoint_of, llama_from
from minillama.config import ADAPTABLE, LoRAConfig
from minillama.model import Llama

TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
EVERYTHING = LoRAConfig(rank=3, alpha=7.5, dropout=0.1, targets=ADAPTABLE)
KINDS = {
    "everything": EVERYTHING,
    "usual": LoRAConfig(rank=8, alpha=16, targets=("wq", "wv")),
    "stabilised": replace(EVERYTHING, rank_stabilized=True),
}
MODELS = {
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "multi-head": {"n_heads": 4, "n_kv_heads": 4},
    "multi-query, tied": {"n_heads": 2, "n_kv_heads": 1, "tie_embeddings": True},
}
each_kind = pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
each_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)


def trained(config=None, lora: LoRAConfig = EVERYTHING, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(config or small_config(), lora, generator)
    for low in adapter.layers.values():
        low.b.normal_(0, 0.05, generator=generator)
    return adapter


@torch.no_grad()
def logits(model: Llama, adapter: Adapter) -> torch.Tensor:
    attach(model, adapter)
    return model(TOKENS)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(tmp_path / "adapter", trained(), small_config())
    return tmp_path / "adapter"


def change(folder: Path, **values) -> None:
    """As peft would have written it: other settings, and no sums."""
    settings = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(settings))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def rewrite(folder: Path, act) -> None:
    tensors = load_file(folder / WEIGHTS)
    act(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / "SHA256SUMS").unlink(missing_ok=True)


# --- The format ----------------------------------------------------------------------------------


@each_kind
@each_model
def test_written_and_read_is_the_same_to_the_bit(tmp_path, lora, sizes):
    config = small_config(**sizes)
    adapter = trained(config, lora)
    save_adapter(tmp_path / "adapter", adapter, config)
    back = load_adapter(tmp_path / "adapter", config)
    assert set(back.config.targets) == set(lora.targets)
    assert replace(back.config, targets=lora.targets) == lora
    assert back.layers.keys() == adapter.layers.keys()
    for name, low in adapter.layers.items():
        assert torch.equal(back.layers[name].a, low.a), name
        assert torch.equal(back.layers[name].b, low.b), name


def test_the_files_by_hand(tmp_path):
    config = small_config(n_layers=1)
    adapter = trained(config, LoRAConfig(rank=2, alpha=4, targets=("wk", "w2", "output")))
    save_adapter(tmp_path / "a", adapter, config, base="meta-llama/Llama-2-7b-hf")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS, "SHA256SUMS"}
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": ["down_proj", "k_proj", "lm_head"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    layer = "base_model.model.model.layers.0."
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{layer}self_attn.k_proj.lora_A.weight": (2, 32),
        f"{layer}self_attn.k_proj.lora_B.weight": (16, 2),
        f"{layer}mlp.down_proj.lora_A.weight": (2, 64),
        f"{layer}mlp.down_proj.lora_B.weight": (32, 2),
        "base_model.model.lm_head.lora_A.weight": (2, 32),
        "base_model.model.lm_head.lora_B.weight": (300, 2),
    }
    b = adapter.layers["layers.0.attention.wk"].b  # 2 heads of 8 channels: evens, then odds
    rows = [head * 8 + i for head in (0, 1) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert torch.equal(tensors[f"{layer}self_attn.k_proj.lora_B.weight"], b[rows])
    unchanged = adapter.layers["layers.0.feed_forward.w2"].b
    assert torch.equal(tensors[f"{layer}mlp.down_proj.lora_B.weight"], unchanged)


@each_model
@torch.no_grad()
def test_what_the_files_say_makes_transformers_model_ours(tmp_path, sizes):
    """The format in one line: the weight of each layer there grows by alpha / r * B A."""
    model = small_llama(**sizes, max_seq_len=64)
    adapter = trained(model.config, replace(EVERYTHING, targets=ADAPTABLE[:-1]))
    save_adapter(tmp_path / "a", adapter, model.config)
    theirs, tensors = transformers_copy(model), load_file(tmp_path / "a" / WEIGHTS)
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        change = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        theirs.get_submodule(name.removeprefix("base_model.model.")).weight += 7.5 / 3 * change
    assert_close(theirs(TOKENS).logits, logits(model, adapter), rtol=1e-5, atol=1e-5)


# --- peft itself ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # theirs
@each_kind
@each_model
def test_an_adapter_of_ours_gives_equal_logits_in_peft(tmp_path, lora, sizes):
    peft = pytest.importorskip("peft", reason="compares with peft: pip install peft")
    model = small_llama(**sizes)
    adapter = trained(model.config, lora)
    save_adapter(tmp_path / "a", adapter, model.config)
    theirs = peft.PeftModel.from_pretrained(transformers_copy(model), tmp_path / "a")
    with torch.no_grad():
        found = theirs(TOKENS).logits
    assert_close(found, logits(model, adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # theirs
@each_kind
@each_model
def test_an_adapter_of_peft_gives_equal_logits_here(tmp_path, lora, sizes):
    peft = pytest.importorskip("peft", reason="compares with peft: pip install peft")
    model = small_llama(**sizes)
    modules = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    modules |= {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "output": "lm_head"}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=[modules[name] for name in lora.targets],
        init_lora_weights=False,  # B is not 0
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(transformers_copy(model), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter *= 0.2  # which keeps the logits of order 1
        expected = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "a")
    found = logits(model, load_adapter(tmp_path / "a", model.config))
    assert (found - small_llama(**sizes)(TOKENS)).abs().max() > 0.01
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_settings_of_peft_that_choose_what_the_weights_say_change_nothing(tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft: pip install peft")
    model = small_llama()
    config = peft.LoraConfig(
        target_modules=["q_proj", "up_proj", "lm_head"],
        exclude_modules=["lm_head"],
        layers_to_transform=[0, 1],
        alpha_pattern={"embed_tokens": 4},
        init_lora_weights=False,  # B is not 0
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(transformers_copy(model), config).eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "a")
    change(tmp_path / "a", eva_config={"rho": 1.0})
    adapter = load_adapter(tmp_path / "a", model.config)
    assert set(adapter.config.targets) == {"wq", "w3"}
    assert_close(logits(model, adapter), expected, rtol=1e-5, atol=1e-5)


# --- Merging -------------------------------------------------------------------------------------


@each_model
def test_a_merged_checkpoint_is_the_merged_model(tmp_path, sizes):
    model, tokenizer = small_llama(**sizes), small_tokenizer()
    adapter = trained(model.config)
    save(tmp_path / "base", model, tokenizer)
    save_native(tmp_path / "new", merged(open_native(tmp_path / "base"), adapter), tokenizer)
    back, _ = load(tmp_path / "new")
    attach(model, adapter)
    with torch.no_grad():
        expected = model(TOKENS)
        assert_close(back(TOKENS), expected, rtol=0, atol=1e-5)
    merge(model)
    assert back.config == model.config
    assert not back.config.tie_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_tied_head_that_is_not_adapted_stays_tied():
    model = small_llama(tie_embeddings=True)
    adapter = trained(model.config, LoRAConfig(targets=("wq",)))
    checkpoint = merged(checkpoint_of(model, Path("here")), adapter)
    assert "output.weight" not in checkpoint.weights
    assert llama_from(checkpoint).config.tie_embeddings


def test_weights_in_16_bits_are_added_up_in_32():
    model = small_llama().bfloat16()
    adapter = trained(lora=LoRAConfig(targets=("wo",)))
    stored = merged(checkpoint_of(model, Path("here")), adapter).weights
    low = adapter.layers["layers.0.attention.wo"]
    exact = model.layers[0].attention.wo.weight.float() + 2 * low.b @ low.a
    assert torch.equal(stored["layers.0.attention.wo.weight"].read(), exact.bfloat16())


def test_quantised_weights_are_not_merged_into():
    model = quantize(small_llama(dim=64, hidden_dim=128), "nf4")
    with pytest.raises(CheckpointError, match="rounded to their few levels"):
        merged(checkpoint_of(model, Path("here")), trained(model.config))


# --- Bad files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "kind 'IA3', but minillama knows LORA alone"),
        ({"use_dora": True}, "use_dora is True, which may change what the adapter computes"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"rank_pattern": 4}, "rank_pattern is 4, which gives some layers another rank"),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 4}}, "which gives some layers another alpha"),
        ({"alpha_pattern": {"embed.*": 4}}, "alpha_pattern is"),  # may be that of no layer
        ({"layers_to_transform": [0]}, "layers_to_transform is .*, which adapts some of the block"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0"),
        ({"exclude_modules": ["lm_head"]}, "exclude_modules is .*, which leaves out layers that"),
        ({"exclude_modules": ["self_attn.o_proj"]}, "exclude_modules is"),
        ({"exclude_modules": 1}, "exclude_modules is 1"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'.*merge_and_unload"),
        ({"a_setting_of_next_year": 1}, "a_setting_of_next_year is 1"),
        ({"r": None}, "r is None, but must be int"),
        ({"r": 3.0}, "r is 3.0, but must be int"),
        ({"r": True}, "r is True, but must be int"),
        ({"r": 0}, "rank is 0, but must be at least 1"),
        ({"r": 4}, r"have the shapes \(\(3, 32\), \(16, 3\)\), but .* need \(\(4, 32\), \(16, 4\)"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', but must be float"),
        ({"lora_alpha": 10**400}, "no adapter's config: int too large"),
        ({"lora_alpha": -1}, "alpha is -1.0, but must be above 0"),
        ({"lora_dropout": 2}, "dropout is 2.0"),
        ({"target_modules": ["q_proj"]}, "that the layers q_proj have adapters, but .* of q_proj,"),
        ({"target_modules": ["embed_tokens"]}, "layers embed_tokens have adapters"),
    ],
)
def test_a_setting_that_matters_is_honoured_or_refused(saved, values, message):
    change(saved, **values)
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(saved, small_config())
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"bias": "none", "use_dora": False, "rank_pattern": {}, "modules_to_save": None},
        {"base_model_name_or_path": "some/model", "revision": "main", "peft_version": "0.99"},
        {"init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": None},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "tau": 0.99}},
        {"target_modules": "all-linear", "exclude_modules": ["embed_tokens", "d_proj"]},
        {"exclude_modules": r"embed.*"},
        {"layers_to_transform": [1, 0], "layers_pattern": "layers"},
        {"alpha_pattern": {"embed_tokens": 4, "model.layers.7.self_attn.q_proj": 4, "proj": 4}},
        {"alpha_pattern": {"q_proj": 7.5}, "rank_pattern": {"model.layers.0.mlp.up_proj": 3}},
    ],
)
def test_a_setting_that_changes_nothing_is_read(saved, values):
    change(saved, **values)
    back = load_adapter(saved, small_config())
    for name, low in trained().layers.items():
        assert torch.equal(back.layers[name].b, low.b)


def test_a_head_that_peft_kept_a_copy_of_is_passed_over_if_it_is_the_models(saved):
    name = "base_model.model.lm_head.base_layer.weight"
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(300, 32)}))
    assert load_adapter(saved, small_config()).layers.keys() == trained().layers.keys()
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(301, 32)}))  # with new words
    with pytest.raises(CheckpointError, match="no A or B"):
        load_adapter(saved, small_config())


def rename(old: str, new: str):
    def act(tensors):
        name = next(name for name in tensors if old in name)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return act


def spoil(value: float):
    def act(tensors):
        next(iter(tensors.values()))[0, 0] = value

    return act


def cut(tensors):
    name = next(name for name in tensors if "v_proj.lora_B" in name)
    tensors[name] = tensors[name][:-1].clone()


def whole_numbers(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].int()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (rename("q_proj", "qkv_proj"), "holds .*qkv_proj.* which is no A or B of a linear layer"),
        (rename("lora_A", "lora_embedding_A"), "no A or B"),
        (rename("lora_B.weight", "lora_B.bias"), "no A or B"),
        (rename("base_model.model.", "model."), "no A or B"),
        (rename("self_attn.q_proj", "input_layernorm"), "no A or B"),
        (rename("layers.1", "layers.7"), "holds one of A and B of layers.* and not the other"),
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), "holds one of A and B"),
        (lambda t: [t.pop(n) for n in list(t) if "1.self_attn.v" in n], r"wv .*of none.*need"),
        (lambda t: [t.pop(n) for n in list(t) if "v_proj" in n], "that the layers .* v_proj.* but"),
        (lambda t: t.clear(), "holds those of none"),
        (cut, r"have the shapes \(\(3, 32\), \(15, 3\)\), but .* another model"),
        (spoil(float("nan")), "holds inf or NaN"),
        (spoil(float("inf")), "holds inf or NaN"),
        (whole_numbers, "is of torch.int32"),
    ],
)
def test_weights_that_cannot_be_are_refused(saved, act, message):
    rewrite(saved, act)
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(saved, small_config())
    assert str(saved) in str(error.value)


def test_the_adapter_of_another_model_is_refused(saved):
    for changes in ({"dim": 48}, {"n_layers": 3}, {"n_layers": 1}, {"vocab_size": 301}):
        with pytest.raises(CheckpointError, match="made for another model"):
            load_adapter(saved, small_config(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", r"holds '\[\]' in place of named settings"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "kind None"),
        ("\xff\xfe", "is no JSON"),
    ],
)
def test_a_damaged_config_is_named(saved, text, message):
    (saved / CONFIG).write_text(text)
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(saved, small_config())


def test_a_config_that_is_no_text_is_named(saved):
    (saved / CONFIG).write_bytes(b"\xff\xfe\x00")
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="is no JSON"):
        load_adapter(saved, small_config())


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), file=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_bit_that_was_changed_is_noticed(tmp_path_factory, place, bit, file):
    folder = tmp_path_factory.mktemp("bits") / "adapter"
    save_adapter(folder, trained(lora=LoRAConfig(rank=1)), small_config())
    path = folder / (CONFIG if file else WEIGHTS)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged or was changed"):
        load_adapter(folder, small_config())
    rmtree(folder)


@given(size=st.integers(0, 4000))
@settings(max_examples=20, deadline=None)
def test_a_file_that_was_cut_off_is_refused(tmp_path_factory, size):
    folder = tmp_path_factory.mktemp("cut") / "adapter"
    save_adapter(folder, trained(lora=LoRAConfig(rank=1)), small_config())
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: min(size, len(data) - 1)])
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_adapter(folder, small_config())


def test_what_is_no_adapter_is_told(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere is no adapter: that is a folder with"):
        load_adapter(tmp_path / "nowhere", small_config())
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no adapter.* {saved} is one"):
        load_adapter(tmp_path, small_config())
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle: load and save"):
        load_adapter(saved, small_config())
    saved.rename(tmp_path / ".adapter.old")
    with pytest.raises(FileNotFoundError, match="last save was cut off"):
        load_adapter(saved, small_config())


def test_an_adapter_replaces_an_adapter_and_nothing_else(saved):
    save_adapter(saved, trained(seed=1), small_config())
    back = load_adapter(saved, small_config())
    assert torch.equal(back.layers["output"].a, trained(seed=1).layers["output"].a)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt, which would be lost"):
        save_adapter(saved, trained(), small_config())
    with pytest.raises(CheckpointError, match="it is a file"):
        save_adapter(saved / "notes.txt", trained(), small_config())


def test_equal_adapters_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        save_adapter(tmp_path / name, trained(), small_config())
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saving_a_trained_model_saves_what_it_trained(tmp_path):
    model = small_llama()
    attach(model, trained())
    with torch.no_grad():
        model.layers[0].attention.wq.b += 1
        expected = model(TOKENS)
    save_adapter(tmp_path / "a", adapter_of(model), model.config)
    found = logits(small_llama(), load_adapter(tmp_path / "a", model.config))
    assert torch.equal(found, expected)


def test_b_is_reordered_by_the_heads_of_its_own_matrix(tmp_path):
    """With n_heads for wk the shapes fit, too."""
    config, adapter = small_config(), trained()
    save_adapter(tmp_path / "a", adapter, config)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for ours, theirs, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        b = tensors[f"base_model.model.model.layers.1.self_attn.{theirs}.lora_B.weight"]
        assert torch.equal(
            b, halves_from_pairs(adapter.layers[f"layers.1.attention.{ours}"].b, heads)
        )
