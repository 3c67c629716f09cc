"""Activation checkpointing: forget activations in the forward pass, compute them again later."""

from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minillama.config import CHECKPOINTING, known_name
from minillama.model import Llama
from minillama.plan import keep_freed_memory, return_freed_memory


def checkpoint_activations(model: Llama, kind: str) -> None:
    """Have every block of `model` keep less for the backward pass, in place.

    "none"       keeps every activation that a gradient needs: the most memory, no extra work.
    "full"       keeps the input of each block, and runs its forward pass again: one block's
                 activations at a time, for one more forward pass.
    "selective"  keeps the outputs of the linear layers, which cost the most to compute, and runs
                 the rest again (norms, RoPE, attention, SwiGLU's product). This is the papers' way.

    The gradients are the same to the last bit: the same operations run on the same numbers.
    `minillama.plan` says how much each keeps. Raises ValueError for an unknown kind.
    Source: Touvron et al. 2023a, sec. 2.4; Chen et al. 2016 (arXiv:1604.06174).
    Built in notebooks/08_pretraining.ipynb.
    """
    known_name("kind of activation checkpointing", kind, CHECKPOINTING)
    if kind == "none":
        keep_freed_memory()
        return
    return_freed_memory()  # else the process keeps what the blocks have forgotten
    run = partial(checkpoint, use_reentrant=False)
    if kind == "selective":
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    for layer in model.layers:
        layer.forward = partial(run, layer.forward)


def _policy(
    context: SelectiveCheckpointContext, operation: object, *args: object, **kwargs: object
) -> CheckpointPolicy:
    # A linear layer without bias is one matrix product; attention's own are inside a fused kernel.
    linear = operation is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if linear else CheckpointPolicy.PREFER_RECOMPUTE
