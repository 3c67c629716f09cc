"""What `minillama plan` predicts beside what the operating system says was resident.

    python benchmarks/plan_memory.py            # every case, about five minutes
    python benchmarks/plan_memory.py S T-full   # some of them

Each case is a process of its own, so that nobody else's memory is counted: resident bytes at the
peak of a training step, or of loading a checkpoint and writing a token with it, less those before
the model was made. S and T are the shapes of benchmarks/training.py. The bar is 10%.
Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "S": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 32_000},
    "T": {"dim": 256, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 2_048},
    "L": {"dim": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 16, "vocab_size": 1024},
}
HIDDEN = {"S": 768, "T": 768, "L": 2816}
FULL = {"checkpointing": "full"}
SELECTIVE = {"checkpointing": "selective"}
TRAINING = {  # shape, and settings
    "S": ("S", {"batch_size": 8, "seq_len": 256}),
    "S-selective": ("S", {"batch_size": 8, "seq_len": 256} | SELECTIVE),
    "S-full": ("S", {"batch_size": 8, "seq_len": 256} | FULL),
    "S-summed": ("S", {"batch_size": 8, "seq_len": 256, "accumulation": 2}),
    "T": ("T", {"batch_size": 16, "seq_len": 256}),
    "T-selective": ("T", {"batch_size": 16, "seq_len": 256} | SELECTIVE),
    "T-full": ("T", {"batch_size": 32, "seq_len": 256} | FULL),
    "T-summed": ("T", {"batch_size": 8, "seq_len": 256, "accumulation": 2}),
    "T-long": ("T", {"batch_size": 2, "seq_len": 2048}),
    "T-long-full": ("T", {"batch_size": 4, "seq_len": 2048} | FULL),
    "L-short": ("L", {"batch_size": 1, "seq_len": 16}),
}
LOADING = ("L-load",)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory: now, or at most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def train(config, training, n_steps: int) -> None:
    import torch

    from minillama.data.packing import Batch
    from minillama.model import Llama
    from minillama.training import make_optimizer, train_step
    from minillama.training.checkpointing import checkpoint_activations

    model = Llama(config, torch.Generator().manual_seed(0))
    checkpoint_activations(model, training.checkpointing)
    optimizer = make_optimizer(model, training)
    shape = (training.batch_size, training.seq_len + 1)
    for _ in range(n_steps):
        ids = [torch.randint(config.vocab_size, shape) for _ in range(training.accumulation)]
        train_step(model, [Batch(x[:, :-1], x[:, 1:]) for x in ids], optimizer, 1.0)


def use(checkpoint: str) -> None:
    from minillama import generate, load

    generate(*load(checkpoint), ["One"], max_new_tokens=1)


def measure(name: str, checkpoint: str) -> dict[str, float]:
    """Bytes planned and measured; to be called in a process of its own."""
    import torch

    from minillama.config import LlamaConfig, TrainingConfig
    from minillama.plan import InferencePlan, TrainingPlan

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    shape, settings = TRAINING.get(name, ("L", {}))
    config = LlamaConfig(
        **SHAPES[shape], hidden_dim=HIDDEN[shape], max_seq_len=2048, tie_embeddings=True
    )
    training = TrainingConfig(learning_rate=1e-4, precision="float32", **settings)
    # Libraries and threads start with a step, or a word, of a model that takes nothing.
    tiny = TrainingConfig(batch_size=1, seq_len=16, learning_rate=1e-4)
    train(LlamaConfig.preset("tiny"), tiny, 1)
    if name in LOADING:
        use(str(Path(__file__).parents[1] / "data" / "toy" / "checkpoint"))
    before = resident()
    forget_peak()
    if name in LOADING:
        plan = InferencePlan(config=config, seq_len=8, dtype="float32")
        use(checkpoint)
    else:
        plan = TrainingPlan(config=config, training=training, device="cpu")
        train(config, training, 4)
    return {"planned": plan.peak, "measured": resident("VmHWM") - before}


def save_checkpoint(folder: Path) -> Path:
    """A model of shape L, with random weights, and a tokenizer of its size."""
    from minillama import save
    from minillama.config import LlamaConfig
    from minillama.data import tales
    from minillama.model import Llama
    from minillama.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(tales.corpus("valid"), SHAPES["L"]["vocab_size"])
    config = LlamaConfig(
        **SHAPES["L"], hidden_dim=HIDDEN["L"], max_seq_len=2048, tie_embeddings=True
    )
    save(folder / "checkpoint", Llama(config), tokenizer)
    return folder / "checkpoint"


def in_a_process(name: str, checkpoint: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, str(checkpoint)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join([*TRAINING, *LOADING]))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    print(f"{'MB resident':<14}{'planned':>9}{'measured':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases or (*TRAINING, *LOADING):
            checkpoint = Path(folder) / "checkpoint"
            if name in LOADING and not checkpoint.exists():
                save_checkpoint(Path(folder))
            found = in_a_process(name, checkpoint)
            planned, measured = found["planned"] / 1e6, found["measured"] / 1e6
            ratio = planned / measured
            print(f"{name:<14}{planned:>9.0f}{measured:>10.0f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
