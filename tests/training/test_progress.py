import math
import sys

import pytest
import torch
from small import small_config

from minillama.config import TrainingConfig
from minillama.plan import forward_flops
from minillama.training import progress
from minillama.training.progress import Progress, Speed, curves, peak_memory, product_rate
from minillama.training.step import StepStats

CPU = torch.device("cpu")


TRAINING = TrainingConfig(batch_size=4, accumulation=2, seq_len=16)  # 128 tokens a step


def test_the_speed_by_hand(monkeypatch):
    """Steps of 2 s: 128 tokens in 2 s, and 8 rows' FLOPs in 2 s against 1e9 FLOP/s."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "product_rate", lambda *_: 1e9)
    watch = Progress(small_config(), TRAINING, CPU)
    for _ in range(5):
        speed = watch.update()
    assert speed.tokens_per_second == pytest.approx(64)
    flops = 3 * forward_flops(small_config(), 16) * 8
    assert speed.utilisation == pytest.approx(flops / 2 / 1e9)


def test_one_slow_step_does_not_decide_the_speed(monkeypatch):
    times = iter([0.0, *(0.1 * n for n in range(1, 200)), 21.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(progress, "product_rate", lambda *_: 1e9)
    watch = Progress(small_config(), TRAINING, CPU)
    for _ in range(199):
        before = watch.update()
    after = watch.update()  # a step of 1.1 s among those of 0.1 s
    assert before.tokens_per_second == pytest.approx(1280)
    assert 0.4 * 1280 < after.tokens_per_second < 0.6 * 1280


def test_the_machines_rate_is_that_of_its_products():
    small, large = (product_rate(CPU, torch.float32, size) for size in (16, 512))
    assert 0 < small < large < 1e15  # small matrices never reach it
    assert math.isfinite(large)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_memory_is_what_the_process_takes():
    before = peak_memory(CPU)
    assert before > 50 * 2**20  # torch alone is more
    block = torch.ones(64 * 2**20 // 4 + before // 4)  # at least 64 MiB more than ever
    assert peak_memory(CPU) > before + 32 * 2**20
    del block


def test_it_reads_well():
    assert str(Speed(12_345.6, 0.4321, 3 * 2**29)) == "12,346 tokens/s, MFU 43%, 1.50 GiB"
    assert str(Speed(9.0, 0.01, 0)) == "9 tokens/s, MFU 1%"


def test_curves_that_nobody_wants_are_not_written(tmp_path):
    with curves(tmp_path / "tensorboard", 0, wanted=False) as draw:
        draw(StepStats(1, 2.0, 1.0, 1e-3, 64), Speed(1.0, 0.5, 1))
    assert list(tmp_path.iterdir()) == []
