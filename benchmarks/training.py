"""Training speed and memory, side by side with other implementations, on one machine.

    python benchmarks/training.py S          # dim 288, 6 layers, vocabulary 32,000; 8 rows of 256
    python benchmarks/training.py T          # dim 256, 8 layers, vocabulary 2,048; 16 rows of 256

Each contestant is a process of its own that trains the same model from the same weights on the same
batches, one full step (forward, backward, clipping, AdamW) at a time. They take turns, a few steps
each, so that a machine that is busy for a while is busy for all; what is compared is the median
over the rounds. The limit is what the matrix products alone would take at the speed of the best
one measured here. litgpt takes part where it is installed (pip install litgpt).
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

from peers import litgpt_llama, transformers_llama

from minillama.config import LlamaConfig
from minillama.plan import forward_flops

SHAPES = {
    "S": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 32_000},
    "T": {"dim": 256, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 2_048},
}
BATCH = {"S": 8, "T": 16}
SEQ, HIDDEN = 256, 768
CONTESTANTS = ["minillama", "minillama compiled", "transformers", "litgpt"]


def config(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], hidden_dim=HIDDEN, max_seq_len=SEQ, tie_embeddings=True)


def contestant(name: str, shape: str) -> None:
    """Train as this contestant: each line read is a number of steps, each written its seconds."""
    import torch

    from minillama.config import TrainingConfig
    from minillama.data.packing import Batch
    from minillama.model import Llama
    from minillama.training import make_optimizer, train_step
    from minillama.training.checkpointing import checkpoint_activations
    from minillama.training.step import compile_blocks

    sizes = config(shape)
    training = TrainingConfig(learning_rate=3e-4)
    generator = torch.Generator().manual_seed(0)
    llama = Llama(sizes, generator)

    def batch() -> Batch:
        ids = torch.randint(sizes.vocab_size, (BATCH[shape], SEQ + 1), generator=generator)
        return Batch(ids[:, :-1], ids[:, 1:])

    start = time.perf_counter()
    if name.startswith("minillama"):
        if name.endswith("compiled"):
            compile_blocks(llama)
        checkpoint_activations(llama, training.checkpointing)  # none
        optimizer = make_optimizer(llama, training)

        def step() -> float:
            return train_step(llama, [batch()], optimizer, 1.0).loss

    else:
        model = peer(name, llama)
        del llama
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

        def step() -> float:
            taken = batch()
            logits = model(taken.tokens)
            logits = getattr(logits, "logits", logits)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), taken.targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

    losses = [step() for _ in range(3)]
    print(json.dumps({"losses": losses, "first": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
        print(json.dumps({"seconds": seconds, "peak_mib": peak}), flush=True)


def peer(name: str, llama):  # type: ignore[no-untyped-def]
    """The same model, with the same weights, in another implementation."""
    import torch
    from torch import nn

    if name == "transformers":
        return transformers_llama(llama, SEQ, use_cache=False)
    model = litgpt_llama(llama, SEQ)
    with torch.no_grad():
        for parameter in model.parameters():  # speed does not depend on the weights' values
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
    return model


def limit() -> None:
    """The best rate of a float32 matrix product, in FLOP/s, asked for line by line."""
    import torch

    a, b = torch.randn(2048, 1024), torch.randn(1024, 2048)
    for _ in sys.stdin:
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5):
                a @ b
            best = max(best, 5 * 2 * 2048 * 1024 * 2048 / (time.perf_counter() - start))
        print(best, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of one turn")
    parser.add_argument("--only", nargs="*", default=CONTESTANTS)
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.name:
        return limit() if options.name == "limit" else contestant(options.name, options.shape)

    names = [n for n in options.only if n != "litgpt" or importlib.util.find_spec("litgpt")]
    children = {}
    for name in [*names, "limit"]:
        command = [sys.executable, __file__, options.shape, "--as", name]
        children[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if name != "limit":
            started = json.loads(children[name].stdout.readline())
            losses = " ".join(f"{loss:.4f}" for loss in started["losses"])
            print(f"{name:<20} first losses {losses}, first 3 steps {started['first']:.1f} s")

    def ask(name: str, line: str):  # type: ignore[no-untyped-def]
        children[name].stdin.write(f"{line}\n")
        children[name].stdin.flush()
        return json.loads(children[name].stdout.readline())

    flops_per_token = 3 * forward_flops(config(options.shape), SEQ) / SEQ
    tokens = options.steps * BATCH[options.shape] * SEQ
    rates: dict[str, list[float]] = {name: [] for name in names}
    peaks, limits = {}, []
    for _ in range(options.rounds):
        limits.append(ask("limit", "go") / flops_per_token)
        for name in names:
            answer = ask(name, str(options.steps))
            rates[name].append(tokens / answer["seconds"])
            peaks[name] = answer["peak_mib"]
    for child in children.values():
        child.stdin.close()
        child.wait()

    best = statistics.median(limits)
    against = statistics.median(rates["transformers"]) if "transformers" in rates else None
    print(f"\nshape {options.shape}: limit {best:,.0f} tokens/s (matrix products alone)")
    print("| | tokens/s, median (min to max) | of the limit | against transformers | peak MiB |")
    print("|---|---|---|---|---|")
    for name in names:
        r = rates[name]
        ratio = f"{statistics.median(r) / against:.2f}" if against else ""
        print(
            f"| {name} | {statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f}) "
            f"| {statistics.median(r) / best:.0%} | {ratio} | {peaks[name]:,.0f} |"
        )


if __name__ == "__main__":
    main()
