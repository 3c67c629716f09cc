"""The training loop, as a generator: whoever iterates prints, plots, saves and stops."""

from collections.abc import Iterable, Iterator
from itertools import islice
from warnings import warn

import torch
import torch.distributed as dist

from minillama.config import TrainingConfig
from minillama.data.packing import Batch
from minillama.model import Llama
from minillama.training.loss import batch_loss
from minillama.training.parallel import add_up, reshard
from minillama.training.schedule import learning_rate
from minillama.training.step import NothingToLearn, StepStats, precision, train_step


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    config: TrainingConfig,
    start: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Iterator[StepStats]:
    """Optimiser steps `start` + 1 to `config.steps`, each on `accumulation` micro-batches.

    One step per iteration. The products are computed in `config.precision`; the weights, the loss
    and the update stay in float32. With many processes, `group` are those whose batches hold other
    rows: see `train_step`. A step none of whose targets counts is left out, with a warning.

    Raises ValueError if the batches run out, or Diverged (a ValueError) if training diverges.
    Source: Touvron et al. 2023a, sec. 2.3. Shown in notebooks/08_pretraining.ipynb.
    """
    device = model.tok_embeddings.weight.device
    source = iter(batches)
    for step in range(start + 1, config.steps + 1):
        micro_batches = [batch.to(device) for batch in islice(source, config.accumulation)]
        if len(micro_batches) < config.accumulation:
            raise ValueError(
                f"The batches ended in step {step} of {config.steps}; each step takes "
                f"{config.accumulation}. Give a source without end, or fewer steps."
            )
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, config)
        dtype = precision(config.precision, device)
        limit = config.max_grad_norm
        try:
            stats = train_step(model, micro_batches, optimizer, limit, step, dtype, group)
        except NothingToLearn as error:
            warn(f"{error} The step is left out.", stacklevel=2)
            continue
        yield stats


@torch.inference_mode()
def evaluate(
    model: Llama,
    batches: Iterable[Batch],
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> float:
    """The mean loss over all targets of finitely many batches, in nats per target.

    `dtype` is that of the products; the batches of all processes of `group` count together, of
    which each must have equally many. Raises ValueError if there is no target.
    """
    device = model.tok_embeddings.weight.device
    total, n_targets = 0.0, 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            batch = batch.to(device)
            total += batch_loss(model, batch).item()
            n_targets += batch.n_targets
    reshard(model)
    total, n_targets = add_up(torch.tensor([total, n_targets], dtype=torch.float64), group).tolist()
    if n_targets == 0:
        raise ValueError(
            "There is no target to evaluate on: the batches are empty, or every target is ignored."
        )
    return total / n_targets
