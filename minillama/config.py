"""Sizes and settings: what a Llama is made of (`LlamaConfig`) and how it is trained.

Plain frozen dataclasses that import nothing, so that the command line can show them without
starting torch. Every size is final: nothing is derived later, nothing is None.
"""

import difflib
import math
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, TypeVar


def swiglu_hidden_dim(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """The width of the feed-forward layer, by the rule of Meta's release.

    A SwiGLU layer has three matrices where a ReLU layer has two, so 2/3 of the usual 4 * dim keeps
    the number of parameters; the result is rounded *up* to a multiple that hardware likes. Both
    truncations matter: 8192 -> 21845 -> int(28398.5) = 28398 -> 28672 for Llama 2 70B.

    Source: Shazeer 2020, sec. 2 (arXiv:2002.05202). Built in notebooks/04_swiglu.ipynb.
    """
    hidden_dim = int(multiplier * int(2 * (4 * dim) / 3))
    return -(-hidden_dim // multiple_of) * multiple_of


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model, in the names of Meta's params.json.

    Raises ValueError, with the way out, for sizes that cannot make a model.
    Built in notebooks/06_llama.ipynb.
    """

    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; n_heads = multi-head, 1 = multi-query attention
    hidden_dim: int  # width of the feed-forward layer
    vocab_size: int
    max_seq_len: int  # tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False  # one matrix for tok_embeddings and output

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "tie_embeddings":
                valid, needed = isinstance(value, bool), "true or false"
            elif field.type is int:
                valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
                needed = "a whole number of at least 1"
            else:
                valid = isinstance(value, int | float) and not isinstance(value, bool)
                valid, needed = valid and 0 < value < float("inf"), "a finite number above 0"
            if not valid:
                raise ValueError(f"{field.name} is {value!r}, but must be {needed}.")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim ({self.dim}) must be n_heads ({self.n_heads}) times an even number: "
                f"every head has dim / n_heads channels, and RoPE rotates them in pairs."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads}): "
                f"every key/value head serves equally many query heads. "
                f"Plain multi-head attention is n_kv_heads={self.n_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Distinct parameters: what `sum(p.numel() for p in Llama(config).parameters())` gives.

        2*V*d + L*(2*d^2 + 2*d*d_kv + 3*d*f + 2*d) + d; a tied output matrix is counted once.
        """
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim**2 + 2 * self.dim * kv_dim  # wq, wo; wk, wv
        feed_forward = 3 * self.dim * self.hidden_dim  # w1, w2, w3
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * (attention + feed_forward + 2 * self.dim) + self.dim

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers in the KV cache for one token: a key and a value per layer and KV head."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """A published size by name, e.g. "llama2-7b". Raises ValueError with the nearest name."""
        return PRESETS[known_name("preset", name, PRESETS)]

    @classmethod
    def from_dict(cls, values: Any) -> "LlamaConfig":
        """A config out of the JSON that `to_dict` wrote; no key may be missing or unknown."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            found = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"A model's config has exactly the keys {names}; these are {found}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, as they stand in params.json."""
        return asdict(self)


Config = TypeVar("Config")


def override(config: Config, values: Any, where: str) -> Config:
    """A dataclass with some fields replaced by those of a table, as TOML or JSON gives it.

    Raises ValueError, naming `where` and the key, for a key that is no field or a value of another
    kind than the field's.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}, but must be a table of settings.")
    changes = {}
    for key, value in values.items():
        try:
            now = getattr(config, known_name("setting", key, [f.name for f in fields(config)]))  # type: ignore[arg-type]
            if isinstance(now, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(now):
                raise ValueError(f"{key} is {value!r}, but must be {type(now).__name__}.")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        changes[key] = value
    return replace(config, **changes)  # type: ignore[type-var]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises OSError or ValueError, naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no config {path}.") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path} is no TOML file: {error}") from None


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError unless this is a whole number: an int, or what NumPy has for one."""
    try:
        index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, but must be a whole number.") from None


def known_name(kind: str, name: str, names: Any) -> str:
    """`name` if it is one of `names`; otherwise a ValueError that suggests the nearest."""
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"There is no {kind} {name!r}.{hint} Known are: {', '.join(names) or 'none'}.")


def _published(dim: int, n_layers: int, n_heads: int, **changes: Any) -> LlamaConfig:
    """One row of the papers' tables: a 32k vocabulary, and what the other sizes share."""
    sizes = {
        "n_kv_heads": n_heads,
        "hidden_dim": swiglu_hidden_dim(dim),
        "vocab_size": 32_000,
    }
    return LlamaConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, **(sizes | changes))


_LLAMA_1: dict[str, Any] = {"max_seq_len": 2048, "norm_eps": 1e-6}
_LLAMA_2: dict[str, Any] = {"max_seq_len": 4096, "norm_eps": 1e-5}
# Rozière et al. 2023 (arXiv:2308.12950), sec. 2.4: RoPE's base is raised and the context is 16k.
_CODE: dict[str, Any] = {"max_seq_len": 16_384, "norm_eps": 1e-5, "rope_theta": 1_000_000.0}
# The 16 infilling tokens; 34B was released without them.
_INFILLING: dict[str, Any] = {"vocab_size": 32_016}
_70B: dict[str, Any] = {
    "n_kv_heads": 8,
    "hidden_dim": swiglu_hidden_dim(8192, multiple_of=4096, multiplier=1.3),
}

PRESETS: dict[str, LlamaConfig] = {
    # Ours. tiny: for tests. toy: what `minillama demo` trains in minutes on a laptop.
    "tiny": LlamaConfig(
        dim=48,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        hidden_dim=128,
        vocab_size=512,
        max_seq_len=512,
    ),
    "toy": LlamaConfig(
        dim=96,
        n_layers=4,
        n_heads=3,
        n_kv_heads=1,
        hidden_dim=256,
        vocab_size=1024,
        max_seq_len=256,
        tie_embeddings=True,
    ),
    # The size of the smallest TinyStories model of karpathy/llama2.c.
    "stories15m": _published(
        288, 6, 6, hidden_dim=768, max_seq_len=256, norm_eps=1e-5, tie_embeddings=True
    ),
    # Touvron et al. 2023a (arXiv:2302.13971), table 2. The 33B's folder is called "30B".
    "llama-7b": _published(4096, 32, 32, **_LLAMA_1),
    "llama-13b": _published(5120, 40, 40, **_LLAMA_1),
    "llama-33b": _published(6656, 60, 52, **_LLAMA_1),
    "llama-65b": _published(8192, 80, 64, **_LLAMA_1),
    # Touvron et al. 2023b (arXiv:2307.09288), table 1: 4k context; grouped-query attention from
    # 34B on. The 34B was trained and never released: its width is that of Code Llama 34B.
    "llama2-7b": _published(4096, 32, 32, **_LLAMA_2),
    "llama2-13b": _published(5120, 40, 40, **_LLAMA_2),
    "llama2-34b": _published(8192, 48, 64, n_kv_heads=8, **_LLAMA_2),
    "llama2-70b": _published(8192, 80, 64, **_70B, **_LLAMA_2),
    "codellama-7b": _published(4096, 32, 32, **_INFILLING, **_CODE),
    "codellama-13b": _published(5120, 40, 40, **_INFILLING, **_CODE),
    "codellama-34b": _published(8192, 48, 64, n_kv_heads=8, **_CODE),
    "codellama-70b": _published(8192, 80, 64, **_70B, **_INFILLING, **_CODE),
}


PRECISIONS = ("auto", "float32", "bfloat16")
CHECKPOINTING = ("none", "selective", "full")  # of activations, from the most memory to the least
ADAPTABLE = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")  # linear layers, for LoRA


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained: the papers' values, at the toy's sizes."""

    # Source: Touvron et al. 2023a, sec. 2.3, and 2023b, sec. 2.2 (AdamW's eps).
    # Shown in notebooks/08_pretraining.ipynb.
    steps: int = 2200  # optimiser steps
    batch_size: int = 8  # rows in one micro-batch, over all processes
    accumulation: int = 1  # micro-batches in one step; the update equals that of one big batch
    seq_len: int = 256  # tokens in a row
    learning_rate: float = 3e-3  # the peak; the papers' 3e-4 is for 7B, small models take more
    warmup_steps: int = 50  # the papers: 2,000
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    max_grad_norm: float = 1.0
    init_std: float = 0.1  # of the weights: 0.02 is for widths of thousands, small models need more
    seed: int = 0  # of the weights and of the order of the rows
    precision: str = "auto"  # of the products: float32, bfloat16; auto is bfloat16 on GPUs alone
    checkpointing: str = "none"  # of activations: none, selective, full
    compile: bool = False  # torch.compile each block: half a minute first, faster steps then
    tensor_parallel: int = 1  # processes that share every matrix; the others share rows (torchrun)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "seq_len", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("learning_rate", "eps", "max_grad_norm", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}, but must be within [0, 1].")
        for name in ("beta1", "beta2"):  # 1 would average for ever and never start
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be within [0, 1).")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be at least 0 and less than steps "
                f"({self.steps}): after the warm-up the cosine needs steps to fall."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, but must not be negative.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to 2**63 - 1.")
        known_name("precision", self.precision, PRECISIONS)
        known_name("kind of activation checkpointing", self.checkpointing, CHECKPOINTING)

    @classmethod
    def preset(cls, name: str) -> "TrainingConfig":
        """How the preset of this name was, or is to be, trained. Raises ValueError if unknown."""
        return TRAINING_PRESETS[known_name("preset", name, TRAINING_PRESETS)]


def _papers(
    learning_rate: float, tokens: float, seq_len: int, min_lr_ratio: float = 0.1, warmup: int = 2000
) -> TrainingConfig:
    """One row of the papers' tables: steps of 4M (2**22) tokens, until `tokens` are seen."""
    return TrainingConfig(
        steps=round(tokens / 2**22),
        batch_size=64,  # rows of one micro-batch, over all GPUs: a row each on 64
        accumulation=2**22 // (64 * seq_len),
        seq_len=seq_len,
        learning_rate=learning_rate,
        min_lr_ratio=min_lr_ratio,
        warmup_steps=warmup,
        init_std=0.02,
        precision="bfloat16",
        checkpointing="selective",
    )


TRAINING_PRESETS: dict[str, TrainingConfig] = {
    "tiny": TrainingConfig(),
    "toy": TrainingConfig(),
    # Ours: 131,072 tokens a step, 13 billion in all; the rate lies between the toy's and the 7B's.
    "stories15m": TrainingConfig(
        steps=100_000,
        batch_size=32,
        accumulation=16,
        seq_len=256,
        learning_rate=5e-4,
        warmup_steps=1000,
        init_std=0.02,
    ),
    # Touvron et al. 2023a, table 2 and sec. 2.3.
    "llama-7b": _papers(3e-4, 1.0e12, 2048),
    "llama-13b": _papers(3e-4, 1.0e12, 2048),
    "llama-33b": _papers(1.5e-4, 1.4e12, 2048),
    "llama-65b": _papers(1.5e-4, 1.4e12, 2048),
    # Touvron et al. 2023b, table 1 and sec. 2.2.
    "llama2-7b": _papers(3e-4, 2.0e12, 4096),
    "llama2-13b": _papers(3e-4, 2.0e12, 4096),
    "llama2-34b": _papers(1.5e-4, 2.0e12, 4096),
    "llama2-70b": _papers(1.5e-4, 2.0e12, 4096),
    # Rozière et al. 2023, sec. 2.5: the code stage, from Llama 2's weights. Not long context.
    "codellama-7b": _papers(3e-4, 0.5e12, 4096, 1 / 30, 1000),
    "codellama-13b": _papers(3e-4, 0.5e12, 4096, 1 / 30, 1000),
    "codellama-34b": _papers(1.5e-4, 0.5e12, 4096, 1 / 30, 1000),
    "codellama-70b": _papers(1.5e-4, 1.0e12, 4096, 1 / 30, 1000),
}


SFT_PRESETS: dict[str, TrainingConfig] = {
    # Touvron et al. 2023b, sec. 3.1: 64 rows a step, here on one device; `epochs` give the steps.
    # Where the cosine ends is not said: as in pretraining.
    "llama2": TrainingConfig(
        batch_size=1,
        accumulation=64,
        seq_len=4096,
        learning_rate=2e-5,
        warmup_steps=0,
        checkpointing="selective",
    ),
    # Ours, for the toy world. One row a step: two, in half as many steps, learn less.
    "toy": TrainingConfig(
        batch_size=1, seq_len=1024, learning_rate=3e-3, warmup_steps=20, min_lr_ratio=0.03
    ),
}
SFT_EPOCHS = 2.0  # the paper's, too


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How often a pretraining run saves and measures; the model does not depend on it."""

    # Shown in notebooks/08_pretraining.ipynb.
    # Steps between two states to resume from; 0 saves none; 500, where the run takes fewer than
    # 5,000, means a tenth of them.
    save_every: int = 500
    keep: int = 2  # how many of these states stay
    eval_every: int = 0  # steps between two validation losses; 0 measures at the end alone

    def __post_init__(self) -> None:
        for name, least in (("save_every", 0), ("keep", 1), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}.")

    def of_steps(self, steps: int) -> "RunConfig":
        """The same for a run of so many steps: short ones leave states on their way, too."""
        if self.save_every != RunConfig.save_every:
            return self
        return replace(self, save_every=min(self.save_every, max(steps // 10, 1)))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is: low-rank changes of some linear layers, trained on frozen weights."""

    # Source: Hu et al. 2021 (arXiv:2106.09685). Built in notebooks/18_lora.ipynb.
    rank: int = 8  # columns of B, rows of A
    alpha: float = 16.0  # the change is multiplied by alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs that are left out in training
    targets: tuple[str, ...] = ("wq", "wv")  # of wq wk wv wo w1 w2 w3 output
    rank_stabilized: bool = False  # divide alpha by the root of the rank: rsLoRA

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but must be at least 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}, but must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"targets are {self.targets}, but must name at least one linear layer, each once."
            )
        for name in self.targets:
            known_name("linear layer", name, ADAPTABLE)

    @property
    def scale(self) -> float:
        """What B A is multiplied by.

        With alpha / rank the change gets smaller as the rank grows, with alpha / sqrt(rank) it
        stays as large. Source: Kalajdzievski 2023 (arXiv:2312.03732), for the root.
        """
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the model's distribution."""

    # Built in notebooks/09_generation.ipynb.
    temperature: float = 0.0  # 0 takes the likeliest token, 1 the model's own distribution
    top_k: int | None = None  # keep only this many of the likeliest tokens
    top_p: float | None = None  # keep only the likeliest tokens of together this probability
    min_p: float | None = None  # keep only tokens at least this times as probable as the likeliest
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there; 1 is none

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not (isinstance(value, Real) or (value is None and name in ("top_p", "min_p"))):
                raise ValueError(f"{name} is {value!r}, but must be a number.")
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}, but must be at least 0: 0 takes the likeliest "
                f"token, 1 the model's own distribution, more flattens it."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k is {self.top_k}, but must be at least 1: it is how many tokens stay. "
                f"Leave it out to keep all."
            )
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}, but must be within [0, 1]: it is a probability, not a "
                f"percentage."
            )
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p is {self.min_p}, but must be within [0, 1]: it is a share of the likeliest "
                f"token's probability."
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}, but must be above 0: 1 changes "
                f"nothing, 1.2 avoids repetitions, less than 1 asks for them."
            )


LLAMA_2_CHAT = Sampling(temperature=0.6, top_p=0.9)  # what its chat_completion draws with
