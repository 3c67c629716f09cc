"""Quality per second: how well is a text predicted after so many seconds of training on two cores?

    python benchmarks/quality.py tinyshakespeare.txt

The last tenth of the text is held out, and predicted as a whole at the end. Losses are in nats per
*character*, so that models with different tokenizers can be compared: what the model pays for all
tokens of the held-out text, its end included, divided by the characters.

minillama: the preset toy with a tokenizer of its own. What counts is the time from the raw text on:
learning the tokenizer, encoding, training; the number of steps is fixed from the speed of the first
ones, so that the schedule ends with the time.
nanoGPT: its recipe for a laptop's CPU, stated again: characters as tokens, 4 layers, 4 heads, width
128, context 64, 12 rows a step, 2,000 steps; what counts is the training alone.
Source of the recipe: the README of karpathy/nanoGPT.
"""

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import LlamaConfig, TrainingConfig
from minillama.data.corpora import hold_out, read_documents
from minillama.data.packing import IGNORE, Batch, batches, pack
from minillama.model import Llama
from minillama.tokenizer import train_tokenizer
from minillama.training import evaluate, make_optimizer, train

Curve = list[tuple[float, float]]  # seconds of training, loss in nats per character


# --- minillama ------------------------------------------------------------------------------------


def minillama(text: str, held_out: str, seed: int, seconds: float, vocab_size: int) -> Curve:
    clock = Clock()
    tokenizer = train_tokenizer(text, vocab_size)
    config = replace(LlamaConfig.preset("toy"), vocab_size=vocab_size)
    ids = tokenizer.encode_batch([text], bos=True, eos=True)
    rows = pack(ids, config.max_seq_len, vocab_size)
    training = TrainingConfig.preset("toy")
    model = Llama(config, torch.Generator().manual_seed(seed), training.init_std)
    optimizer = make_optimizer(model, training)
    source = batches(rows, training.batch_size, seed)

    # The warm-up does not depend on the number of steps: take it, and see how long it takes.
    before, warmup = clock.seconds(), training.warmup_steps
    for stats in train(model, optimizer, source, training):
        if stats.step == warmup:
            break
    rate = warmup / (clock.seconds() - before)
    steps = warmup + max(1, int((seconds - clock.seconds()) * rate * 0.97))
    training, curve = replace(training, steps=steps), Curve()

    def measure() -> None:
        with clock.stopped():
            loss = loss_per_character(model, tokenizer, held_out, config.max_seq_len)
            curve.append((clock.seconds(), loss))

    for stats in train(model, optimizer, source, training, start=warmup):
        if stats.step % max(steps // 5, 1) == 0 and stats.step < steps:
            measure()
        if clock.seconds() > seconds:
            break  # the machine has become slower: the time is over all the same
    measure()
    return curve


def loss_per_character(model: Llama, tokenizer, text: str, seq_len: int) -> float:  # type: ignore[no-untyped-def]
    """What all tokens of the text cost, the last ones in a row that is padded."""
    ids = torch.tensor(tokenizer.encode(text, bos=True, eos=True))
    n_targets = len(ids) - 1
    padding = -n_targets % seq_len
    tokens = F.pad(ids[:-1], (0, padding)).reshape(-1, seq_len)
    targets = F.pad(ids[1:], (0, padding), value=IGNORE).reshape(-1, seq_len)
    parts = zip(tokens.split(16), targets.split(16), strict=True)
    return evaluate(model, (Batch(*part) for part in parts)) * n_targets / len(text)


# --- nanoGPT's recipe -----------------------------------------------------------------------------


class GPT(nn.Module):
    """GPT-2 without biases, as nanoGPT trains it on characters."""

    def __init__(self, vocab: int, dim: int = 128, n_layers: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(GPTBlock(dim) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * n_layers) if residual else 1))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPTBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int = 4) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.project = nn.Linear(dim, 3 * dim, False), nn.Linear(dim, dim, False)
        self.up, self.down = nn.Linear(dim, 4 * dim, False), nn.Linear(4 * dim, dim, False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def nanogpt(text: str, held_out: str, seed: int, steps: int = 2000) -> Curve:
    torch.manual_seed(seed)
    letters = {letter: n for n, letter in enumerate(sorted(set(text + held_out)))}
    data, valid = (torch.tensor([letters[c] for c in part]) for part in (text, held_out))
    model, context, curve = GPT(len(letters)), 64, Curve()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    @torch.inference_mode()
    def loss_of_all() -> float:
        rows = valid[: (len(valid) - 1) // context * context + 1].unfold(0, context + 1, context)
        losses = [model(part[:, :-1], part[:, 1:]) * len(part) for part in rows.split(256)]
        return float(sum(losses) / len(rows))

    clock = Clock()
    for step in range(steps):
        rate = 1e-3 * (step + 1) / 101
        if step >= 100:
            progress = (step - 100) / (steps - 100)
            rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * (1e-3 - 1e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(data) - context, (12,))
        rows = torch.stack([data[start : start + context + 1] for start in starts])
        model(rows[:, :-1], rows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % (steps // 5) == 0:
            with clock.stopped():
                curve.append((clock.seconds(), loss_of_all()))
    return curve


# --- Both -----------------------------------------------------------------------------------------


class Clock:
    """Seconds since the start, without those spent in `with clock.stopped():`."""

    def __init__(self) -> None:
        self.start, self.pause = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.pause

    def stopped(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self.stopped_at, self.shown = time.perf_counter(), self.seconds()
        self.seconds = lambda: self.shown  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.seconds
        self.pause += time.perf_counter() - self.stopped_at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--only", choices=["minillama", "nanogpt"])
    options = parser.parse_args()
    (text,), (held_out,) = hold_out(read_documents([options.text]))
    contestants = {
        "minillama": lambda seed: minillama(
            text, held_out, seed, options.seconds, options.vocab_size
        ),
        "nanogpt": lambda seed: nanogpt(text, held_out, seed),
    }
    last: dict[str, Curve] = {}
    for seed in options.seeds:
        for name, run in contestants.items():
            if options.only in (None, name):
                curve = run(seed)
                last.setdefault(name, []).append(curve[-1])
                shown = "  ".join(f"{seconds:.0f} s {loss:.3f}" for seconds, loss in curve)
                print(f"{name}, seed {seed}: {shown}", flush=True)
    print("\n| | seconds of training | nats per character, median (min to max) |\n|---|---|---|")
    for name, ends in last.items():
        seconds, losses = zip(*ends, strict=True)
        print(
            f"| {name} | {statistics.median(seconds):.0f} | {statistics.median(losses):.3f} "
            f"({min(losses):.3f} to {max(losses):.3f}) |"
        )


if __name__ == "__main__":
    main()
