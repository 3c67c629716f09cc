"""Many processes train one model, with PyTorch's own engines.

`torchrun --nproc-per-node N -m minillama pretrain ...` starts N processes, called ranks. They stand
in a grid with two axes:

    tp   `tensor_parallel` neighbours read the same rows, and share every matrix
    dp   the others read different rows (data parallelism), and share what is left of the weights,
         gradients and moments: each is gathered when it is needed (FSDP)

On CPUs they talk by gloo, on GPUs by NCCL. A single process has no grid, and pays nothing.
Source: Touvron et al. 2023a, sec. 2.4 (arXiv:2302.13971); Rajbhandari et al. 2019
(arXiv:1910.02054). Built in notebooks/19_distributed.ipynb.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minillama.adapt.tensor_parallel import check_shareable, tensor_parallel
from minillama.config import LlamaConfig, TrainingConfig
from minillama.data.packing import IGNORE, Batch
from minillama.model import Llama

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    device: torch.device  # of this process
    mesh: DeviceMesh | None = None  # axes dp and tp; None for a single process

    @property
    def n_data(self) -> int:
        """How many parts a batch is dealt out in."""
        return self.mesh["dp"].size() if self.mesh else 1

    @property
    def data_rank(self) -> int:
        """Which of them is this process's."""
        return self.mesh["dp"].get_local_rank() if self.mesh else 0

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """Those that hold the other parts: what sums over a batch are added up over."""
        return self.mesh["dp"].get_group() if self.mesh else None

    def part(self, batch: Batch) -> Batch:
        """This process's rows of a batch; rows without a target make the last parts full."""
        size, n_rows = -(-len(batch.tokens) // self.n_data), len(batch.tokens)
        rows = torch.arange(self.data_rank * size, (self.data_rank + 1) * size)
        missing = rows >= n_rows
        rows[missing] = 0
        targets = batch.targets[rows]
        targets[missing] = IGNORE
        positions = None if batch.positions is None else batch.positions[rows]
        return Batch(batch.tokens[rows], targets, positions)

    def whole(self, batch: Batch) -> Batch:
        """The batch of which each process has its part; `part` backwards."""
        if self.mesh is None:
            return batch
        from torch.distributed.tensor import DTensor, Replicate, Shard

        def whole(part: Tensor) -> Tensor:
            return DTensor.from_local(part, self.mesh, (Shard(0), Replicate()))

        positions = None if batch.positions is None else whole(batch.positions)
        return Batch(whole(batch.tokens), whole(batch.targets), positions)


def meet(device: str | torch.device, model: LlamaConfig, training: TrainingConfig) -> Ranks:
    """Join the other processes that torchrun started, if it did.

    "cuda" becomes the GPU of this process's own. Raises ValueError, on every process, if they
    cannot share the model or a batch.
    """
    device, world = torch.device(device), int(os.environ.get("WORLD_SIZE", 1))
    _check_grid(device, model, training, world)
    if world == 1:
        return Ranks(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Rank 0 may take hours to encode a text; that a rank has died is torchrun's to notice.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    # It warns that the norm of all gradients takes two small messages where one would do.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    grid = (world // training.tensor_parallel, training.tensor_parallel)
    return Ranks(device, dist.init_device_mesh(device.type, grid, mesh_dim_names=("dp", "tp")))


def _check_grid(
    device: torch.device, model: LlamaConfig, training: TrainingConfig, world: int
) -> None:
    n_tensor = training.tensor_parallel
    if world % n_tensor:
        raise ValueError(
            f"tensor_parallel is {n_tensor}, but must divide the number of processes ({world}): "
            f"each group of {n_tensor} shares the matrices of one model. Start a multiple of "
            f"{n_tensor} processes (torchrun --nproc-per-node), or set another --tensor-parallel."
        )
    check_shareable(model, n_tensor)
    n_data = world // n_tensor
    if training.batch_size % n_data:
        raise ValueError(
            f"batch_size is {training.batch_size}, but must be a multiple of {n_data}: {world} "
            f"processes, in groups of {n_tensor} (tensor_parallel), deal out the rows of each "
            f"micro-batch in {n_data} equal parts. Choose a multiple, or another number of "
            f"processes."
        )
    if world > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"The device is {device}, but {world} processes can talk to each other on cpu or cuda "
            f"only. Choose one of these with --device, or start a single process."
        )
    if world > 1 and device.type == "cuda":
        here, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > n_gpus:
            raise ValueError(
                f"There are {here} processes on this machine, but {n_gpus} GPUs: each takes one of "
                f"its own. Start at most {n_gpus} (torchrun --nproc-per-node {n_gpus})."
            )


def shard(model: Llama, ranks: Ranks, dtype: torch.dtype, first: Callable[[], Llama]) -> None:
    """Deal `model` out among the ranks, in place; its weights become those of `first()`.

    `model` need not have memory yet (device "meta"): each rank makes room for its own part only.
    `first` is called on rank 0 alone, which hands its weights on, one at a time.

    With `dtype` bfloat16 the blocks travel in it, half as many bytes; the sums of their gradients
    do not, and embeddings, head and residual stream stay in float32, as in one process.

    Activation checkpointing and compilation of the blocks come before this.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    assert ranks.mesh is not None
    if ranks.mesh["tp"].size() > 1:
        tensor_parallel(model, ranks.mesh["tp"])
    if ranks.n_data > 1:
        policy = MixedPrecisionPolicy(
            None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False
        )
        for layer in model.layers:
            fully_shard(layer, mesh=ranks.mesh["dp"], mp_policy=policy)
        fully_shard(model, mesh=ranks.mesh["dp"])
        register_fsdp_forward_method(model, "hidden")  # the loss calls it instead of forward
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The sum: the loss is divided by the targets of all ranks, not by ranks.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=ranks.device)
    whole = first().state_dict() if is_main() else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


def reshard(model: nn.Module) -> None:
    """Let go of the weights that FSDP gathers for the loss, where no backward pass does it."""
    if dist.is_initialized() and hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def whole_weights(model: Llama) -> dict[str, Tensor]:
    """The weights as one process has them, on rank 0's CPU; no GPU ever holds them all.

    On the other ranks, which must call it too, there is nothing.
    """
    if not dist.is_initialized():
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def is_main() -> bool:
    """Is this the one process that writes files and prints?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main(make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, where alone it is called; or its error, for every rank."""
    if not dist.is_initialized():
        return make()
    outcome: list[T | Exception | None] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


@contextmanager
def all_or_none() -> Iterator[None]:
    """Where another rank is lost, ConnectionError (an OSError) that points to that rank's error."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(
            "Another process of this run has stopped, so this one stops as well: the error of that "
            "one is the one to mend. Then resume the run from its newest state."
        ) from error


def add_up(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `value` over a group of ranks, in place; `value` itself where there is none."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
