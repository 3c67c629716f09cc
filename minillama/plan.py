"""Say before you fail: bytes, FLOPs, time and energy of any config on any machine.

Every number is a formula of the config, and is checked against what PyTorch really does: what
autograd saves, what the FLOP counter counts, what the operating system says was resident.
Used in notebooks/08_pretraining.ipynb and 19_distributed.ipynb.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minillama.config import CHECKPOINTING, PRESETS, LlamaConfig, TrainingConfig, known_name

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number
OPTIMIZERS = {"adamw": 2, "sgd": 0}  # float32 numbers that are kept for each trained one
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # of a block
LOSS_ROWS = 512  # the fused loss holds the logits of so many tokens at a time
# What glibc's malloc leaves unused between what a training step on a CPU allocates and frees, as
# a share of it: measured (benchmarks/plan_memory.py). Gradients that stay between micro-batches lie
# in its way. With checkpointing, `return_freed_memory` leaves no holes.
HOLES, HOLES_AROUND_GRADIENTS = 0.22, 0.5
# Bytes that a CPU's matrix products, the larger ones, load and pack their factors into (the same).
KERNELS = 32 * 2**20

PARTS = {  # of a plan, and what they are where the name does not say it
    "weights": "",
    "copies": "of weights: in bfloat16, or gathered from other devices",
    "gradients": "",
    "optimizer": "AdamW's two moments",
    "activations": "what the backward pass needs of the forward pass",
    "loss": "logits of 512 tokens, and the first gradients",
    "holes": "what malloc leaves unused in between",
    "kernels": "what matrix products load and pack into",
    "cache": "keys and values",
    "working": "while the prompt is read",
}
MOMENTS = {
    "loss": "when the loss is computed",
    "last block": "when the backward pass begins",
    "first block": "when the backward pass ends",
    "update": "when all gradients are there",
}

# --- Parameters and weights ----------------------------------------------------------------------


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the seven linear layers of a block."""
    dim, hidden_dim, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    return {
        "wq": (dim, dim),
        "wk": (kv_dim, dim),
        "wv": (kv_dim, dim),
        "wo": (dim, dim),
        "w1": (hidden_dim, dim),
        "w2": (dim, hidden_dim),
        "w3": (hidden_dim, dim),
    }


def block_matrix_parameters(config: LlamaConfig) -> int:
    """Numbers in the matrices of all blocks: all of a model but embeddings, head and norms."""
    return config.n_layers * sum(d_out * d_in for d_out, d_in in linear_shapes(config).values())


def lora_parameters(config: LlamaConfig, rank: int, targets: tuple[str, ...]) -> int:
    """n_layers * sum over the targets of rank * (d_in + d_out): A is (rank, d_in), B (d_out, rank).

    Source: Hu et al. 2021, sec. 4.1 (arXiv:2106.09685).
    """
    shapes = linear_shapes(config)
    return config.n_layers * sum(rank * sum(shapes[name]) for name in targets)


def quantized_bytes(kind: str, d_out: int, d_in: int) -> int:
    """Bytes of a (d_out, d_in) matrix in few bits, with its scales.

    int8   d_out * (d_in + 2): one 16-bit scale for each row
    int4   d_out * groups * (32 / 2 + 4): a 16-bit scale and zero for each group of 32 in a row
    nf4    blocks * (64 / 2 + 1) + 4 * constants + 4: an 8-bit scale for each block of 64, a float32
           constant for 256 such scales, and their mean (double quantisation)

    So a weight takes 8, 5 and 4.127 bits, and a little more where the shape does not divide.
    Source: Dettmers et al. 2023, sec. 3 (arXiv:2305.14314), for NF4.
    Raises ValueError for another kind.
    """
    groups, blocks = math.ceil(d_in / 32), math.ceil(d_out * d_in / 64)
    kinds = {
        "int8": d_out * (d_in + 2),
        "int4": d_out * groups * (32 // 2 + 4),
        "nf4": blocks * (64 // 2 + 1) + 4 * math.ceil(blocks / 256) + 4,
    }
    return kinds[known_name("quantisation", kind, kinds)]


def weight_bytes(config: LlamaConfig, dtype: str, quantize: str | None = None) -> int:
    """Bytes of all weights: n_parameters * BYTES[dtype].

    Quantised are the matrices of the blocks and the head; embeddings and norms stay in `dtype`.
    """
    if quantize is None:
        return config.n_parameters * BYTES[dtype]
    shapes = linear_shapes(config).values()
    blocks = sum(quantized_bytes(quantize, d_out, d_in) for d_out, d_in in shapes)
    head = quantized_bytes(quantize, config.vocab_size, config.dim)
    kept = config.vocab_size * config.dim + (2 * config.n_layers + 1) * config.dim
    return config.n_layers * blocks + head + kept * BYTES[dtype]


def cache_bytes(config: LlamaConfig, batch_size: int, seq_len: int, dtype: str) -> int:
    """Bytes of the KV cache: batch * seq * (2 * n_layers * n_kv_heads * head_dim) * BYTES[dtype].

    A key and a value for each token, layer and key/value head. Built in
    notebooks/05_gqa_attention.ipynb.
    """
    return batch_size * seq_len * config.cache_elements_per_token * BYTES[dtype]


# --- Activations ---------------------------------------------------------------------------------


def block_activations(
    config: LlamaConfig,
    dtype: str,
    lora: int = 0,
    targets: tuple[str, ...] = (),
    tensor_parallel: int = 1,
) -> dict[str, float]:
    """Bytes per token that autograd keeps of one block for its backward pass, by what they are.

    With d = dim, k = n_kv_heads * head_dim, f = hidden_dim, h = n_heads, s = BYTES[dtype],
    r = `lora` (0: every weight is trained) and T = tensor_parallel:

    stream      2 * 4d           the residual stream before both norms, always in float32
    norms       2 * 4 + 2 * 4d   1/rms, and x / rms for the gradient of the norm's weight
    inputs      5sd              what wq, wk, wv, w1, w3 read: under autocast each casts its own
                2sd              in float32 they share it
    attention   s(d + 2k) + 4h   the turned q and k, v; the logarithms of the softmax's sums
                sd               attention's output, which wo reads as it is
    gate        4sf              w1 x, silu(w1 x), w3 x, and their product

    A frozen weight needs no gradient, so its input is not kept unless an adapter reads it: LoRA
    keeps 2 * 4 of the norms, inputs and the product of what is adapted only, and sr per adapter.
    Tensor parallelism with sequence parallelism divides everything by T but the inputs, which every
    rank gathers.

    Scores are never kept (memory-efficient attention). Source: counted, with PyTorch's hooks on
    saved tensors (tests/test_plan.py). Shown in notebooks/08_pretraining.ipynb.
    """
    size, dim, hidden_dim = BYTES[dtype], config.dim, config.hidden_dim
    kv_dim = config.n_kv_heads * config.head_dim
    groups = [("wq", "wk", "wv"), ("w1", "w3")]  # each reads one normalised input
    if lora:
        normalised = 0
        inputs = sum(any(name in targets for name in group) for group in groups)
        read_by_w2 = "w2" in targets
    else:
        normalised = 2
        inputs = 2 if dtype == "float32" else 5
        read_by_w2 = True
    kept = {
        "stream": 2 * 4 * dim,
        "norms": 2 * 4 + normalised * 4 * dim,
        "inputs": tensor_parallel * inputs * size * dim,
        "attention": size * (2 * dim + 2 * kv_dim) + 4 * config.n_heads,
        "gate": size * (3 + read_by_w2) * hidden_dim,
        "adapters": size * lora * len(targets),
    }
    return {name: n_bytes / tensor_parallel for name, n_bytes in kept.items()}


def checkpointed_bytes(config: LlamaConfig, dtype: str, kind: str) -> int:
    """Bytes per token that an activation checkpoint keeps of one block instead of everything.

    full        4d                     the block's input alone
    selective   4d + s(3d + 2k + 2f)   and the outputs of the seven linear layers
    """
    kv_dim = config.n_kv_heads * config.head_dim
    outputs = 3 * config.dim + 2 * kv_dim + 2 * config.hidden_dim
    return 4 * config.dim + (BYTES[dtype] * outputs if kind == "selective" else 0)


# --- FLOPs, time, energy -------------------------------------------------------------------------


def forward_flops(
    config: LlamaConfig, seq_len: int, lora_numbers: int = 0, causal: bool = True
) -> int:
    """FLOPs of the forward pass of one row: 2 * matrices * seq + 4 * n_layers * dim * pairs.

    A matrix product takes a multiplication and an addition per weight and token: `matrices` counts
    blocks and head (the embedding is a look-up) and `lora_numbers` of adapters. Each pair of a
    query and a key that it sees takes 2 * dim for the score and 2 * dim for the value; there are
    seq * (seq + 1) / 2 pairs. `causal=False` counts the whole square, as PyTorch's FLOP counter
    and many papers do.

    "2 FLOPs per parameter" (6 with the backward pass, which takes twice the forward's) is this
    without attention. Norms, RoPE and softmax are left out: they take next to nothing.
    Source: Kaplan et al. 2020, sec. 2.1 (arXiv:2001.08361).
    """
    matrices = block_matrix_parameters(config) + config.vocab_size * config.dim + lora_numbers
    return 2 * matrices * seq_len + _attention_flops(config, seq_len, causal)


def training_flops(
    config: LlamaConfig,
    seq_len: int,
    checkpointing: str = "none",
    lora_numbers: int = 0,
    causal: bool = True,
) -> int:
    """FLOPs that training spends on one row: forward, backward, and what is computed again.

    The backward pass multiplies by every matrix twice (for the gradients of its input and of its
    weight), and attention's makes five products where the forward pass makes two, because the
    scores were not kept. Checkpointing "selective" repeats attention's two products, "full" all
    matrices of the blocks but w2, whose output nobody needs again, and attention's. With adapters
    of `lora_numbers` the matrices are frozen and have no gradient of their own.

    Of these, 3 * forward_flops are the model's own: what model-FLOP utilisation counts.
    """
    attention = _attention_flops(config, seq_len, causal)
    blocks = block_matrix_parameters(config)
    w2 = config.n_layers * config.dim * config.hidden_dim
    again = {
        "none": 0,
        "selective": attention,
        "full": attention + 2 * (blocks - w2) * seq_len,
    }[checkpointing]
    matrices = 2 * (blocks + config.vocab_size * config.dim) * seq_len
    if lora_numbers:
        return 2 * matrices + 3 * 2 * lora_numbers * seq_len + 7 * attention // 2 + again
    return 3 * matrices + 7 * attention // 2 + again


def _attention_flops(config: LlamaConfig, seq_len: int, causal: bool) -> int:
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    return 4 * config.n_layers * config.dim * pairs


@dataclass(frozen=True)
class Energy:
    """What computing cost outside the computer."""

    gpu_hours: float
    megawatt_hours: float
    tonnes_co2: float  # CO2 equivalents


def energy(gpu_hours: float, watts: float, pue: float = 1.1, kg_per_kwh: float = 0.385) -> Energy:
    """MWh = GPU-hours * watts * PUE / 10^6; tCO2eq = MWh * kg_per_kwh.

    `watts` is the power of one GPU, `pue` (power usage effectiveness) what its data centre draws
    for each watt that reaches it, `kg_per_kwh` the carbon intensity of the grid: 0.385 is the
    average of the United States, which the papers take for everybody; 0.057 is where BLOOM was
    trained. Making the machines is not counted.

    Source: Touvron et al. 2023a, sec. 6 (arXiv:2302.13971).
    """
    megawatt_hours = gpu_hours * watts * pue / 1e6
    return Energy(gpu_hours, megawatt_hours, megawatt_hours * kg_per_kwh)


def run_tokens(training: TrainingConfig) -> int:
    """Tokens that a whole run reads."""
    return training.steps * training.accumulation * training.batch_size * training.seq_len


def training_hours(tokens: float, tokens_per_second: float) -> float:
    """Hours that `tokens` take; of one GPU, if the speed is that of one GPU."""
    return tokens / tokens_per_second / 3600


# --- Plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """Bytes on one device for a model that reads and writes `batch_size` texts of `seq_len` tokens.

    Raises ValueError for settings that cannot be.
    """

    config: LlamaConfig
    batch_size: int = 1
    seq_len: int  # tokens of prompt and answer together
    dtype: str = "bfloat16"
    quantize: str | None = None
    tensor_parallel: int = 1  # devices that share every matrix

    def __post_init__(self) -> None:
        known_name("dtype", self.dtype, BYTES)
        _check_counts(self, "batch_size", "seq_len", "tensor_parallel")
        _check_tensor_parallel(self.config, self.tensor_parallel)
        _check_context(self.config, self.seq_len)
        weight_bytes(self.config, self.dtype, self.quantize)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the worst moment, by what takes them; their sum is the peak.

        weights   `weight_bytes`
        cache     `cache_bytes`
        working   what a block needs to read the whole prompt, for each token the larger of
                  s(3d + 3f)                          three streams, three of the width of w1
                  s(3d + 2k) + max(rd, sd + rk)       q, k, v, and one of q and k being turned:
                                                      r = 12 bytes, or 8 where s is float32's
        """
        config, size = self.config, BYTES[self.dtype]
        dim, kv_dim = config.dim, config.n_kv_heads * config.head_dim
        turning = 8 if self.dtype == "float32" else 12
        feed_forward = size * 3 * (dim + config.hidden_dim)
        attention = size * (3 * dim + 2 * kv_dim)
        attention += max(turning * dim, size * dim + turning * kv_dim)
        working = self.batch_size * self.seq_len * max(feed_forward, attention)
        parts = {
            "weights": weight_bytes(config, self.dtype, self.quantize),
            "cache": cache_bytes(config, self.batch_size, self.seq_len, self.dtype),
        }
        shares = {name: n_bytes // self.tensor_parallel for name, n_bytes in parts.items()}
        return shares | {"working": working}

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    @property
    def rows(self) -> int:
        """Texts at a time."""
        return self.batch_size

    def changed(self, **changes: Any) -> "InferencePlan":
        """The plan with other settings."""
        return replace(self, **changes)

    def families(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Ways to need less, each from the mildest change to the strongest."""
        yield ({"seq_len": n} for n in _halves(self.seq_len, least=128))
        yield ({"batch_size": n} for n in _halves(self.batch_size))
        if self.quantize is None:
            yield ({"quantize": kind} for kind in ("int8", "int4", "nf4"))
            yield (
                {"quantize": kind, "seq_len": n}
                for kind in ("int8", "int4", "nf4")
                for n in _halves(self.seq_len, least=128)
            )
        yield (
            {"tensor_parallel": n}
            for n in _doubles(self.tensor_parallel, self.config.n_kv_heads)
            if self.config.n_kv_heads % n == 0
        )


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Bytes on one device, and FLOPs, of `training` applied to a model of `config`.

    Any of four moments can be the worst one (`moments`): it depends on how long the rows are.
    On GPUs (`device` "cuda") the products run in bfloat16 and read bfloat16 copies of float32
    weights; on CPUs everything is float32.

    `data_parallel` devices share the rows of a batch and, by FSDP, weights, gradients and moments:
    each gathers one block at a time, and the next one. `lora` is the rank of adapters to `targets`:
    then all else is frozen, is held in the dtype of the products, and may be quantised.

    Raises ValueError for settings that cannot be. Used in notebooks/08_pretraining.ipynb.
    """

    config: LlamaConfig
    training: TrainingConfig
    device: str = "cuda"
    optimizer: str = "adamw"
    data_parallel: int = 1
    lora: int = 0
    targets: tuple[str, ...] = ("wq", "wv")
    quantize: str | None = None

    def __post_init__(self) -> None:
        known_name("optimizer", self.optimizer, OPTIMIZERS)
        _check_counts(self, "data_parallel")
        _check_tensor_parallel(self.config, self.tensor_parallel)
        _check_context(self.config, self.training.seq_len)
        if self.lora < 0:
            raise ValueError(f"lora is {self.lora}, but must be at least 0: it is a rank.")
        for name in self.targets:
            known_name("linear layer", name, LINEARS)
        if self.quantize and not self.lora:
            raise ValueError(
                f"Weights in {self.quantize} cannot be trained: a gradient's step is smaller than "
                f"the distance of two of their values. Train adapters on top of them: lora=16."
            )
        if self.training.batch_size % self.data_parallel:
            raise ValueError(
                f"batch_size is {self.training.batch_size}, but must be a multiple of "
                f"data_parallel ({self.data_parallel}): each takes equally many rows."
            )
        weight_bytes(self.config, self.dtype, self.quantize)

    @property
    def dtype(self) -> str:
        """Of the matrix products."""
        if self.training.precision == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self.training.precision

    @property
    def tensor_parallel(self) -> int:
        """Devices that share every matrix."""
        return self.training.tensor_parallel

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.data_parallel * self.tensor_parallel

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        if self.lora:
            return lora_parameters(self.config, self.lora, self.targets)
        return self.config.n_parameters

    @property
    def rows(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.training.batch_size

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.training.batch_size // self.data_parallel * self.training.seq_len

    @property
    def weights(self) -> int:
        """Bytes of this device's share of the weights: float32 where they are trained."""
        dtype = self.dtype if self.lora else "float32"
        adapters = 4 * self.trained if self.lora else 0
        return (weight_bytes(self.config, dtype, self.quantize) + adapters) // self.ranks

    @property
    def gradients(self) -> int:
        """Bytes of this device's share of the gradients: a float32 for each trained number."""
        return 4 * self.trained // self.ranks

    @property
    def optimizer_state(self) -> int:
        """Bytes of this device's share of AdamW's two moments, both in float32."""
        return OPTIMIZERS[self.optimizer] * self.gradients

    @property
    def copies(self) -> int:
        """Bytes of the weights in the form in which the products read them.

        Under autocast a bfloat16 copy of every matrix stays from the forward to the backward pass.
        FSDP gathers embeddings and head in float32, two blocks in the dtype of the products (the
        one that runs, the one that comes), and one block's gradients, added up in float32. Float32
        weights on one device are read as they are.
        """
        config, size = self.config, BYTES[self.dtype]
        blocks = block_matrix_parameters(config) // self.tensor_parallel
        head = config.vocab_size * config.dim // self.tensor_parallel
        if self.data_parallel > 1:
            ends = head * (1 if config.tie_embeddings else 2)
            return 4 * ends + (2 * size + 4) * blocks // config.n_layers
        return 0 if self.lora or self.dtype == "float32" else size * (blocks + head)

    @property
    def activations(self) -> int:
        """Bytes that the forward pass keeps for the backward pass.

        n_layers * tokens * (`block_activations`, or `checkpointed_bytes`), and 12d + 4 per token
        for the last norm and the stream that it gives.
        """
        ends = self.tokens * (12 * self.config.dim + 4)
        return self.config.n_layers * self._kept + ends

    @property
    def _kept(self) -> int:
        """Bytes that the forward pass keeps of one block."""
        kind = self.training.checkpointing
        if kind == "none":
            return self._block
        kept = checkpointed_bytes(self.config, self.dtype, kind)
        return self.tokens * kept // self.tensor_parallel

    @property
    def _block(self) -> int:
        """Bytes that one block keeps for its own backward pass.

        RoPE's cosines and sines of q and k, 8 * head_dim for each position, serve all rows.
        """
        rope = 8 * self.config.head_dim * self.training.seq_len
        kept = block_activations(
            self.config, self.dtype, self.lora, self.targets, self.tensor_parallel
        )
        return round(self.tokens * sum(kept.values())) + rope

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """Bytes at the four moments that can be the worst, by what takes them.

        loss         All activations are there, and the fused loss works on the logits of 512
                     tokens (turned into their exponentials in place) beside the gradients of the
                     head, unless it is frozen, and of the stream.
        last block   Its backward pass has begun: the gradients of the head and of the stream, what
                     a checkpoint has the block compute again, and two tensors of the feed-forward
                     layer's width; or, before it, seven of the stream's for the last norm.
        first block  The same, when all other blocks have their gradients and no activations.
        update       All gradients are there, and no activation is left.

        Where several micro-batches add up, the gradients stay throughout, and new ones vanish in
        them; those of tied embeddings wait for each other, and with FSDP the head's for the end. On
        CPUs, a share of all that comes and goes lies unused in between (`HOLES`).
        """
        config, training = self.config, self.training
        size, ranks = BYTES[self.dtype], self.tensor_parallel
        stream = 4 * config.dim * self.tokens
        head = config.vocab_size * config.dim // ranks  # numbers; then bytes of its gradient
        dequantized = size * head if self.quantize else 0
        head = 0 if self.lora else 4 * head
        first = min(LOSS_ROWS, self.tokens)
        logits = 4 * first * config.vocab_size // ranks
        if size < 4:  # a copy for the product, and the product that is added to the gradient
            logits += logits // 2 + head // 2
        wide = 2 * size * config.hidden_dim * self.tokens // ranks
        w2_output = size * config.dim * self.tokens if training.checkpointing == "selective" else 0

        grown, embeddings, block, w2 = self.gradients, 0, 0, 0
        if not self.lora:
            block = 4 * block_matrix_parameters(config) // (config.n_layers * self.ranks)
            w2 = 4 * config.dim * config.hidden_dim // self.ranks
            embeddings = head // self.data_parallel
        summed = grown if training.accumulation > 1 else 0
        waiting = head if self.data_parallel > 1 else embeddings * config.tie_embeddings
        added = embeddings * (config.tie_embeddings + (summed > 0))

        again = 0
        if training.checkpointing != "none":
            again = self._block + w2_output - self._kept
        moments = {
            "loss": {
                "gradients": summed,
                "activations": self.activations,
                "loss": head + dequantized + stream + logits + 2 * 4 * first * config.dim,
            },
            "last block": {
                "gradients": summed + waiting if summed else head + w2,
                "activations": config.n_layers * self._kept
                + max(7 * stream, stream + wide + again),
            },
            "first block": {
                "gradients": summed + waiting
                if summed
                else grown - block - embeddings + waiting + w2,
                "activations": self._block + w2_output + stream + wide,
            },
            "update": {"gradients": grown + added, "activations": stream},
        }
        always = {
            "weights": self.weights,
            "copies": self.copies,
            "optimizer": self.optimizer_state,
            "kernels": KERNELS if self.device == "cpu" else 0,
        }
        holes = HOLES_AROUND_GRADIENTS if summed else HOLES
        if self.device != "cpu" or training.checkpointing != "none":
            holes = 0.0
        return {
            name: always | parts | {"holes": round(holes * sum(parts.values()))}
            for name, parts in moments.items()
        }

    @property
    def worst(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the worst moment, by what takes them; their sum is the peak."""
        return self.moments[self.worst]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    @property
    def flops_per_token(self) -> float:
        """What the devices compute for each token, forward, backward and again."""
        seq_len, lora = self.training.seq_len, self.trained if self.lora else 0
        return training_flops(self.config, seq_len, self.training.checkpointing, lora) / seq_len

    @property
    def model_flops_per_token(self) -> float:
        """The model's own part of it, 3 * forward_flops: what utilisation is a share of."""
        if self.lora:
            return self.changed(checkpointing="none").flops_per_token
        seq_len = self.training.seq_len
        return 3 * forward_flops(self.config, seq_len) / seq_len

    def changed(self, **changes: Any) -> "TrainingPlan":
        """The plan with other settings, of its own or of its TrainingConfig."""
        names = {field.name for field in fields(TrainingConfig)}
        training = replace(self.training, **{k: v for k, v in changes.items() if k in names})
        own = {k: v for k, v in changes.items() if k not in names}
        return replace(self, training=training, **own)

    def families(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Ways to need less, each from the mildest change to the strongest."""
        training = self.training
        # Half the rows, twice the micro-batches: the update stays the same.
        smaller = [
            {"batch_size": n, "accumulation": training.accumulation * training.batch_size // n}
            for n in _halves(training.batch_size, least=self.data_parallel)
            if n % self.data_parallel == 0
        ]
        stronger = CHECKPOINTING[CHECKPOINTING.index(training.checkpointing) + 1 :]
        kinds = [{"checkpointing": kind} for kind in stronger]
        milder: list[dict[str, Any]] = [
            {},
            *kinds,
            *([smaller[-1]] if smaller else []),
            *[kind | smaller[-1] for kind in kinds if smaller],
        ]
        yield iter(kinds)
        yield iter(smaller)
        yield (kind | rows for kind in kinds for rows in smaller)
        yield ({"seq_len": n} for n in _halves(training.seq_len, least=128))
        if not self.lora:
            yield ({"lora": 16} | change for change in milder)
        if self.quantize is None:
            adapters: dict[str, Any] = {"quantize": "nf4"} | ({} if self.lora else {"lora": 16})
            yield (adapters | change for change in milder)
        yield (
            {"data_parallel": n, "batch_size": max(n, training.batch_size)} | change
            for n in _doubles(self.data_parallel, 4096)
            if max(n, training.batch_size) % n == 0
            for change in ({}, *kinds)
        )


def _halves(n: int, least: int = 1) -> Iterator[int]:
    while n % 2 == 0 and n // 2 >= least:
        n //= 2
        yield n


def _doubles(n: int, most: int) -> Iterator[int]:
    while 2 * n <= most:
        n *= 2
        yield n


# --- The verdict ---------------------------------------------------------------------------------

Plan = InferencePlan | TrainingPlan


def ways_out(plan: Plan, available_bytes: float) -> list[tuple[dict[str, Any], int]]:
    """Changes of settings with which the plan fits, and the peak then: the mildest of each kind.

    Kinds are a shorter context, a smaller batch, checkpointing, low precision, adapters, more
    devices. One that only adds to another of the same precision is left out.
    """
    found: list[tuple[dict[str, Any], int]] = []
    for family in plan.families():
        for changes in family:
            if any(
                known.items() <= changes.items()
                and known.get("quantize") == changes.get("quantize")
                for known, _ in found
            ):
                break
            peak = plan.changed(**changes).peak
            if peak <= available_bytes:
                found.append((changes, peak))
                break
    return found


def check_fits(plan: Plan, available_bytes: float | None) -> None:
    """Raises ValueError, with the plan's numbers and with ways out, unless the peak is available.

    None, where a machine cannot tell, refuses nothing. To be called before anything is allocated:

        check_fits(TrainingPlan(config=config, training=training, device="cpu"), free_memory("cpu"))
    """
    if available_bytes is None or plan.peak <= available_bytes:
        return
    verb = "Training" if isinstance(plan, TrainingPlan) else "Running"
    parts = ", ".join(
        f"{name} {gib(n_bytes)}"
        for name, n_bytes in plan.parts.items()
        if n_bytes > plan.peak / 100
    )
    ways = [
        f"{', '.join(f'{name}={value!r}' for name, value in changes.items())} ({gib(peak)})"
        for changes, peak in ways_out(plan, available_bytes)
    ]
    advice = f"What fits: {'; '.join(ways)}." if ways else largest_that_fits(plan, available_bytes)
    raise ValueError(
        f"{verb} this model takes {gib(plan.peak)} ({parts}), but only {gib(available_bytes)} of "
        f"memory are free. {advice}"
    )


def largest_that_fits(plan: Plan, available_bytes: float) -> str:
    """The largest preset that does, in a sentence."""
    fitting = [
        name
        for name, config in PRESETS.items()
        if config.max_seq_len >= _seq_len(plan)
        and config.n_kv_heads % plan.tensor_parallel == 0
        and plan.changed(config=config).peak <= available_bytes
    ]
    if not fitting:
        return "No preset fits either."
    largest = max(fitting, key=lambda name: PRESETS[name].n_parameters)
    return f"No setting of it fits; the largest preset that does is {largest}."


def gib(n_bytes: float) -> str:
    """Bytes as a person reads them: GiB, or MiB below a tenth of one."""
    if n_bytes < GIB / 10:
        return f"{n_bytes / 2**20:.1f} MiB"
    return f"{n_bytes / GIB:.1f} GiB"


def _seq_len(plan: Plan) -> int:
    return plan.training.seq_len if isinstance(plan, TrainingPlan) else plan.seq_len


def _check_counts(plan: object, *names: str) -> None:
    for name in names:
        if getattr(plan, name) < 1:
            raise ValueError(f"{name} is {getattr(plan, name)}, but must be at least 1.")


def _check_tensor_parallel(config: LlamaConfig, tensor_parallel: int) -> None:
    if config.n_kv_heads % tensor_parallel:
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}, but must divide n_kv_heads "
            f"({config.n_kv_heads}): every rank takes whole key/value heads."
        )


def _check_context(config: LlamaConfig, seq_len: int) -> None:
    if seq_len > config.max_seq_len:
        raise ValueError(
            f"seq_len ({seq_len}) is longer than the model's context ({config.max_seq_len} tokens)."
        )


# --- This machine --------------------------------------------------------------------------------


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that this machine can still give to tensors on `device`; None where it cannot tell.

    On Linux, what the kernel calls available, or less where a control group (a container, a batch
    system) sets a limit. For "cuda" and "mps", what their drivers say.
    """
    if device.startswith("cuda"):
        import torch

        return (
            torch.cuda.mem_get_info(torch.device(device))[0] if torch.cuda.is_available() else None
        )
    if device.startswith("mps"):
        import torch

        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device != "cpu":
        return None
    try:
        if sys.platform == "linux":
            return _free_on_linux(Path("/"))
        if sys.platform == "darwin":
            return _free_on_macos(subprocess.check_output(["vm_stat"], text=True))
        if sys.platform == "win32":
            return _free_on_windows()
    except (OSError, ValueError, subprocess.SubprocessError):
        pass  # a kernel that keeps it to itself
    return None


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed, for this process: training asks for the same again.

    It gives back the top of its heap otherwise, after each step, and takes it anew, page by page:
    up to four times as many page faults, and 2% of a small model's step. Elsewhere than on Linux
    with glibc this does nothing. `return_freed_memory` is the opposite, and undoes it.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**25)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Have glibc's malloc return what is freed to the system, from 1 MiB on, for this process.

    It keeps it otherwise, and fills it badly: activation checkpointing then saves next to nothing
    on a CPU (measured: 920 MB resident where 390 are used). Returning costs system time, a third of
    a small model's step. Elsewhere than on Linux with glibc this does nothing.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**20)
    _mallopt(M_TRIM_THRESHOLD, 2**17)  # glibc's own


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(option, value)


def _free_on_linux(root: Path) -> int:
    """The least of what the kernel has and what each control group above this process leaves."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":") for line in lines)
    free = [1024 * int(meminfo["MemAvailable"].split()[0])]
    groups = (root / "proc/self/cgroup").read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers == "":  # version 2
            top, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, used, cached = names
        # In a container the path may be the host's: then only the top is there.
        for folder in (root / top / path.lstrip("/"), *(root / top / path.lstrip("/")).parents):
            if (folder / limit).is_file() and (
                text := (folder / limit).read_text().strip()
            ) != "max":
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
                in_use = int((folder / used).read_text()) - int(stat.get(cached, 0))
                free.append(max(int(text) - in_use, 0))
    return min(free)


def _free_on_macos(vm_stat: str) -> int:
    """Pages that are free, or hold only what can be read again, times their size."""
    first, *lines = vm_stat.splitlines()
    page = int(first.split("page size of ")[1].split()[0])
    pages = {
        name: int(n.rstrip(".")) for name, n in (line.rsplit(None, 1) for line in lines if line)
    }
    kinds = ("Pages free:", "Pages inactive:", "Pages speculative:", "Pages purgeable:")
    return page * sum(pages.get(kind, 0) for kind in kinds)


def _free_on_windows() -> int:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "free", "page_total", "page_free", "virtual", "virtual_free", "_")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.free
