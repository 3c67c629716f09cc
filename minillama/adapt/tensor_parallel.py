"""Tensor parallelism with sequence parallelism: a few processes share every matrix of a model."""

from torch.distributed.device_mesh import DeviceMesh

from minillama.config import LlamaConfig
from minillama.model import Llama


def tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Share every matrix of `model` among the processes of `mesh`, which has one axis, in place.

    column-wise   wq, wk, wv, w1, w3: a process computes some of the outputs, its own heads and
                  hidden units; output: its own words
    row-wise      wo, w2: it multiplies these by its rows, which gives one term of the sum;
                  tok_embeddings: it knows its own words, and all others as zeros
    by position   the norms and the residual stream between the sub-layers

    So a sub-layer begins with one all-gather, which brings the positions together, and ends with
    one reduce-scatter, which adds up the terms and deals out the positions: together the bytes of
    the one all-reduce that it would take to keep the whole stream on every process.

    The model's code is the same: attention reads the number of heads off its tensors, and the
    stream is a DTensor, whose shape is that of the whole. All processes get equal logits.

    Raises ValueError for a model that so many processes cannot share.
    Source: Shoeybi et al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198); used
    in Touvron et al. 2023a, sec. 2.4. Built in notebooks/19_distributed.ipynb.
    """
    from torch.distributed.tensor import Placement, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    check_shareable(model.config, mesh.size())
    whole, positions = Replicate(), Shard(1)  # of (batch, seq, dim)

    def gather(n_inputs: int) -> PrepareModuleInput:
        rest = (None,) * (n_inputs - 1)
        return PrepareModuleInput(
            input_layouts=(positions, *rest), desired_input_layouts=(whole, *rest)
        )

    def add_up(**layouts: Placement) -> RowwiseParallel:
        return RowwiseParallel(output_layouts=positions, use_local_output=False, **layouts)

    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": add_up(input_layouts=whole),
            "layers.*.attention_norm": SequenceParallel(),
            "layers.*.attention": gather(4),  # x, angles, visible, cache
            **{f"layers.*.attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
            "layers.*.attention.wo": add_up(),
            "layers.*.ffn_norm": SequenceParallel(),
            "layers.*.feed_forward": gather(1),
            **{f"layers.*.feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
            "layers.*.feed_forward.w2": add_up(),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=positions, output_layouts=whole),
        },
    )
    if model.config.tie_embeddings:  # each was shared by itself, and both by words
        model.output.weight = model.tok_embeddings.weight


def check_shareable(config: LlamaConfig, n: int) -> None:
    """Raises ValueError unless n processes can take equally many heads, hidden units and words."""
    for name in ("n_kv_heads", "hidden_dim", "vocab_size"):
        if getattr(config, name) % n:
            raise ValueError(
                f"tensor_parallel is {n}, but must divide {name} ({getattr(config, name)}): each "
                f"of the {n} processes that share a matrix takes equally many of them, whole. "
                f"Choose a divisor, or share the rows of a batch only (tensor_parallel 1)."
            )
