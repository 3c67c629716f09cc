import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from minillama.config import (
    PRESETS,
    TRAINING_PRESETS,
    LlamaConfig,
    RunConfig,
    TrainingConfig,
    override,
    swiglu_hidden_dim,
)
from minillama.model import Llama

# Touvron et al. 2023a, table 2; 2023b, table 1; Rozière et al. 2023. All of them: head_dim 128.
#                dim  layers heads kv    FFN   eps  context  parameters
PUBLISHED = {
    "llama-7b": (4096, 32, 32, 32, 11008, 1e-6, 2048, 6_738_415_616),
    "llama-13b": (5120, 40, 40, 40, 13824, 1e-6, 2048, 13_015_864_320),
    "llama-33b": (6656, 60, 52, 52, 17920, 1e-6, 2048, 32_528_943_616),
    "llama-65b": (8192, 80, 64, 64, 22016, 1e-6, 2048, 65_285_660_672),
    "llama2-7b": (4096, 32, 32, 32, 11008, 1e-5, 4096, 6_738_415_616),
    "llama2-13b": (5120, 40, 40, 40, 13824, 1e-5, 4096, 13_015_864_320),
    "llama2-34b": (8192, 48, 64, 8, 22016, 1e-5, 4096, 33_743_970_304),
    "llama2-70b": (8192, 80, 64, 8, 28672, 1e-5, 4096, 68_976_648_192),
    "codellama-7b": (4096, 32, 32, 32, 11008, 1e-5, 16384, 6_738_546_688),
    "codellama-13b": (5120, 40, 40, 40, 13824, 1e-5, 16384, 13_016_028_160),
    "codellama-34b": (8192, 48, 64, 8, 22016, 1e-5, 16384, 33_743_970_304),
    "codellama-70b": (8192, 80, 64, 8, 28672, 1e-5, 16384, 68_976_910_336),
}
TINY = LlamaConfig.preset("tiny")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = LlamaConfig.preset(name)
    assert (
        config.dim,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        config.hidden_dim,
        config.norm_eps,
        config.max_seq_len,
        config.n_parameters,
    ) == PUBLISHED[name]
    assert config.head_dim == 128
    assert not config.tie_embeddings
    code = name.startswith("codellama")
    assert config.rope_theta == (1e6 if code else 1e4)
    infilling = code and name != "codellama-34b"
    assert config.vocab_size == (32_016 if infilling else 32_000)


def test_every_preset_is_checked():
    assert set(PRESETS) == {*PUBLISHED, "tiny", "toy", "stories15m"}
    assert PRESETS["stories15m"].n_parameters == 15_191_712


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_has_the_parameters_that_its_config_counts(name):
    config = LlamaConfig.preset(name)
    with torch.device("meta"):  # shapes without memory: 70B takes no longer than 7B
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "hidden_dim"),
    [
        (4096, 256, 1.0, 11008),  # 10922
        (5120, 256, 1.0, 13824),  # 13653
        (6656, 256, 1.0, 17920),  # 17749
        (8192, 256, 1.0, 22016),  # 21845
        (8192, 4096, 1.3, 28672),  # 21845 -> 28398.5 -> 28398
        (8192, 1, 1.3, 28398),
        (4096, 1, 1.0, 10922),
        (64, 4, 1.0, 172),  # 170
    ],
)
def test_the_width_of_the_feed_forward_layer(dim, multiple_of, multiplier, hidden_dim):
    assert swiglu_hidden_dim(dim, multiple_of, multiplier) == hidden_dim


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama2-7b", 524_288),
        ("llama2-13b", 819_200),
        ("llama2-34b", 196_608),
        ("llama2-70b", 327_680),
    ],
)
def test_bytes_of_the_kv_cache(name, bytes_per_token):  # float16: 2 bytes a number
    assert 2 * LlamaConfig.preset(name).cache_elements_per_token == bytes_per_token


def test_multi_head_attention_would_cost_70b_eight_times_the_cache():
    config = LlamaConfig.preset("llama2-70b")
    assert 2 * replace(config, n_kv_heads=64).cache_elements_per_token == 2_621_440


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'llama2-7'.*Did you mean 'llama2-7b'\?"):
        LlamaConfig.preset("llama2-7")
    with pytest.raises(ValueError, match=r"no preset 'xyzzy'\. Known are: tiny, toy, "):
        LlamaConfig.preset("xyzzy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0, but must be a whole number of at least 1"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"norm_eps": 0.0}, r"norm_eps is 0\.0, but must be a finite number above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"dim": 50}, r"dim \(50\) must be n_heads \(6\) times an even number"),
        ({"dim": 42}, r"dim \(42\) must be n_heads \(6\) times an even number"),
        ({"n_kv_heads": 4}, r"n_heads \(6\) must be a multiple of n_kv_heads \(4\).*n_kv_heads=6"),
        ({"n_kv_heads": 12}, r"n_heads \(6\) must be a multiple of n_kv_heads \(12\)"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_what_json_can_hold_is_refused_by_name():
    # In a process of its own: here the type checker of the tests would speak first.
    code = """if True:
        from minillama.config import LlamaConfig
        values = LlamaConfig.preset("tiny").to_dict()
        wrong = {"dim": 48.0, "max_seq_len": "512", "n_kv_heads": None, "norm_eps": [],
                 "rope_theta": "1e4", "tie_embeddings": 1}
        for name, value in wrong.items():
            try:
                LlamaConfig.from_dict(values | {name: value})
            except ValueError as error:
                print(error)
    """
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.splitlines() == [
        "dim is 48.0, but must be a whole number of at least 1.",
        "max_seq_len is '512', but must be a whole number of at least 1.",
        "n_kv_heads is None, but must be a whole number of at least 1.",
        "norm_eps is [], but must be a finite number above 0.",
        "rope_theta is '1e4', but must be a finite number above 0.",
        "tie_embeddings is 1, but must be true or false.",
    ]


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        TINY.dim = 64


@pytest.mark.parametrize("name", PRESETS)
def test_through_json_and_back(name):
    config = LlamaConfig.preset(name)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        TINY.to_dict() | {"dropout": 0.0},
        {name: value for name, value in TINY.to_dict().items() if name != "rope_theta"},
    ],
)
def test_missing_and_unknown_keys_are_refused(values):
    with pytest.raises(ValueError, match=r"exactly the keys \['dim', 'n_layers'"):
        LlamaConfig.from_dict(values)


def test_the_training_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.beta1, config.beta2, config.eps) == (0.9, 0.95, 1e-5)
    assert (config.weight_decay, config.max_grad_norm, config.min_lr_ratio) == (0.1, 1.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0, but must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"eps": 0.0}, r"eps is 0\.0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
        ({"min_lr_ratio": 1.1}, r"min_lr_ratio is 1\.1"),
        ({"beta1": 1.0}, r"beta1 is 1\.0"),
        ({"beta2": -0.1}, r"beta2 is -0\.1"),
        ({"steps": 10, "warmup_steps": 10}, r"warmup_steps \(10\) .* less than steps \(10\)"),
        ({"warmup_steps": -1}, r"warmup_steps \(-1\)"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"seed": -1}, "seed is -1, but must be from 0"),
        ({"seed": 2**70}, "seed is 1180591620717411303424, but must be from 0 to"),
        ({"precision": "float16"}, "no precision 'float16'.*Known are: auto, float32, bfloat16"),
        ({"checkpointing": "ful"}, "checkpointing 'ful'. Did you mean 'full'"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0, but must be at least 1"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_a_config_does_not_start_torch():
    code = "import sys, minillama.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- How the presets are trained -----------------------------------------------------------------


def test_every_preset_says_how_it_is_trained():
    assert list(TRAINING_PRESETS) == list(PRESETS)
    for name, training in TRAINING_PRESETS.items():
        assert training.seq_len <= PRESETS[name].max_seq_len


@pytest.mark.parametrize(
    ("name", "rate", "steps"),  # 4M tokens a step, 1.0, 1.4 and 2.0T in all
    [
        ("llama-7b", 3e-4, 238_419),
        ("llama-13b", 3e-4, 238_419),
        ("llama-33b", 1.5e-4, 333_786),
        ("llama-65b", 1.5e-4, 333_786),
        ("llama2-7b", 3e-4, 476_837),
        ("llama2-13b", 3e-4, 476_837),
        ("llama2-34b", 1.5e-4, 476_837),
        ("llama2-70b", 1.5e-4, 476_837),
        ("codellama-7b", 3e-4, 119_209),
        ("codellama-70b", 1.5e-4, 238_419),
    ],
)
def test_the_papers_hyperparameters(name, rate, steps):
    training = TrainingConfig.preset(name)
    assert (training.learning_rate, training.steps) == (rate, steps)
    assert training.batch_size * training.accumulation * training.seq_len == 4_194_304
    assert training.seq_len == (2048 if name.startswith("llama-") else 4096)
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.95, 0.1)
    assert training.max_grad_norm == 1.0
    code = name.startswith("code")
    assert training.warmup_steps == (1000 if code else 2000)
    assert training.min_lr_ratio == pytest.approx(1 / 30 if code else 0.1)


def test_a_preset_of_training_that_does_not_exist():
    with pytest.raises(ValueError, match=r"no preset 'llama2-7'\. Did you mean 'llama2-7b'"):
        TrainingConfig.preset("llama2-7")


# --- Tables of settings --------------------------------------------------------------------------


def test_a_table_overrides_the_fields_that_it_names():
    config = TrainingConfig()
    assert override(config, {}, "x") == config
    changed = override(config, {"steps": 70, "learning_rate": 1, "precision": "float32"}, "x")
    assert changed == replace(config, steps=70, learning_rate=1.0, precision="float32")
    assert isinstance(changed.learning_rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, r"my\.toml: There is no setting 'stpes'\. Did you mean 'steps'"),
        ({"steps": 3.0}, r"my\.toml: steps is 3\.0, but must be int"),
        ({"steps": True}, "steps is True, but must be int"),
        ({"compile": 1}, "compile is 1, but must be bool"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', but must be float"),
        ([], r"my\.toml is \[\], but must be a table"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
    ],
)
def test_a_table_that_fits_no_settings(values, message):
    with pytest.raises(ValueError, match=message):
        override(TrainingConfig(), values, "my.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"save_every": -1}, "save_every is -1, but must be at least 0"),
        ({"keep": 0}, "keep is 0, but must be at least 1"),
        ({"eval_every": -5}, "eval_every is -5"),
    ],
)
def test_how_often_a_run_saves_makes_sense(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("steps", "given", "every"),
    [(200, 500, 20), (7, 500, 1), (4999, 500, 499), (10**6, 500, 500), (200, 150, 150), (9, 0, 0)],
)
def test_short_runs_save_a_state_every_tenth_of_their_steps(steps, given, every):
    assert RunConfig(save_every=given).of_steps(steps).save_every == every
