"""How fast a run goes: for the progress bar, and for TensorBoard."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillama.config import LlamaConfig, TrainingConfig
from minillama.plan import forward_flops
from minillama.training.step import StepStats, precision


@dataclass(frozen=True)
class Speed:
    """What the machine makes of the run."""

    tokens_per_second: float
    utilisation: float  # of the fastest matrix product measured here, without recomputation
    peak_bytes: int  # memory, at most so far: the GPU's, or the process's

    def __str__(self) -> str:
        memory = f", {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes else ""
        return f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.utilisation:.0%}{memory}"


class Progress:
    """The speed of a run: call `update` after each step.

    The rate is averaged over the last ten seconds or so. The model-FLOP utilisation (MFU) compares
    the FLOPs that the model needs, forward and backward, with the rate of a large matrix product,
    measured here: 100% is the best that any implementation could do. Of many processes each counts
    its part of the FLOPs, and its own device. `lora_flops`, those of a token, are what frozen
    weights beside an adapter need instead.
    """

    def __init__(
        self,
        model_config: LlamaConfig,
        config: TrainingConfig,
        device: torch.device,
        lora_flops: float | None = None,
    ) -> None:
        rows = config.batch_size * config.accumulation
        self.device, self.tokens = device, rows * config.seq_len
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.flops = 3 * forward_flops(model_config, config.seq_len) * rows / world
        if lora_flops is not None:
            self.flops = lora_flops * self.tokens
        self.peak = product_rate(device, precision(config.precision, device))
        self.seconds, self.last = 0.0, time.perf_counter()

    def update(self) -> Speed:
        """The speed, now that one more step has been taken."""
        now = time.perf_counter()
        step, self.last = now - self.last, now
        weight = min(1.0, step / 10) if self.seconds else 1.0  # a running mean over 10 s
        self.seconds += weight * (step - self.seconds)
        return Speed(
            self.tokens / self.seconds,
            self.flops / self.seconds / self.peak,
            peak_memory(self.device),
        )


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few products of two square matrices."""
    size = size if device.type == "cpu" else 8 * size
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits until a GPU is done
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch has taken on this GPU, or the process in memory, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # Python has no call for it there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


@contextmanager
def curves(folder: Path, step: int, wanted: bool) -> Iterator[Callable[[StepStats, Speed], None]]:
    """A function that draws a step in TensorBoard's files in `folder`, or does nothing.

    Curves of an earlier run beyond `step` are hidden. Raises ValueError if TensorBoard is absent.
    """
    if not wanted:
        yield lambda stats, speed: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "TensorBoard is not installed, so no curves can be written. Leave --tensorboard out, "
            "or: pip install 'minillama[track]'"
        ) from None

    def draw(stats: StepStats, speed: Speed) -> None:
        for name, value in {**asdict(stats), **asdict(speed)}.items():
            if name != "step":
                writer.add_scalar(name, value, stats.step)

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:
        yield draw
