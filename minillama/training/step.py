"""One optimiser step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama
from minillama.training.loss import batch_loss
from minillama.training.parallel import add_up


@dataclass(frozen=True)
class StepStats:
    """What one optimiser step did."""

    step: int  # 1, 2, ...
    loss: float  # nats per target, before the update
    grad_norm: float  # before clipping
    learning_rate: float
    n_targets: int


class NothingToLearn(ValueError):
    """No target of a step counts."""


class Diverged(ValueError):
    """The loss or a gradient was not finite; `micro_batches` are those of the step."""

    def __init__(self, message: str, micro_batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.micro_batches = micro_batches


def compile_blocks(model: Llama) -> None:
    """Have torch.compile fuse what lies between the matrix products of each block.

    One block is compiled and serves all. Whatever takes more than one operation is computed once
    and stored: inductor would else put the cosines of RoPE's angles into every loop that reads
    them, anew for each head (4% of a small model's step).
    """
    for layer in model.layers:
        layer.compile(options={"realize_opcount_threshold": 1})


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> StepStats:
    """Gradients of all micro-batches, one division by all their targets, clipping, one update.

    The update equals that of one big batch, however it is cut. `dtype` is that of the matrix
    products; with bfloat16 they run under autocast, and everything else stays in float32.

    With many processes each gives its own rows, and `group` are those that read different ones: the
    targets of all are counted before the division, so the update is the same again, however many
    they are. All return equal stats.

    Raises NothingToLearn, before anything is updated, if no target counts, and Diverged if the loss
    or the gradient is not finite; both are ValueErrors.
    """
    device = micro_batches[0].tokens.device
    n_own = torch.tensor(sum(batch.n_targets for batch in micro_batches), device=device)
    n_targets = int(add_up(n_own, group))
    if n_targets == 0:
        raise NothingToLearn(
            f"Step {step} has no target: every target of its {len(micro_batches)} micro-batches is "
            f"{IGNORE} (ignored), so there is nothing to learn from. Check the masks."
        )
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = batch_loss(model, batch) / n_targets
        loss.backward()
        total += loss.detach()
    total = add_up(total, group)
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)
    if group is not None:  # DTensors have one norm, of which each rank holds a term
        grad_norm = grad_norm.full_tensor()  # type: ignore[attr-defined]
    stats = StepStats(
        step, total.item(), grad_norm.item(), optimizer.param_groups[0]["lr"], n_targets
    )
    if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise Diverged(
            f"Step {step}: the loss is {stats.loss} and the gradient norm {stats.grad_norm}, so "
            f"training has diverged; the weights are as before this step. Lower the learning rate "
            f"(now {stats.learning_rate:g}) or warm up longer.",
            micro_batches,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats


def precision(name: str, device: torch.device) -> torch.dtype:
    """The type that `TrainingConfig.precision` means on this device.

    "auto" is bfloat16 on GPUs that have it and float32 elsewhere: bfloat16 has float32's range, so
    gradients need no scaling, and most CPUs have no fast products for it.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
