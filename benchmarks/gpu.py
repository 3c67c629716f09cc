"""A GPU: training and decoding of models of real size, beside transformers, with random weights.

    python benchmarks/gpu.py train           # 1.1 billion parameters, rows of 2,048 tokens
    python benchmarks/gpu.py decode          # the shape of Llama 2 7B

Each contestant is a process of its own. Training is one full step in bfloat16 (weights, gradients
and moments in float32): forward, backward, clipping, AdamW; what is printed is the median of the
steps behind the first. The share is of the products' operations (6 per parameter and token, and
those of attention) in what the GPU's largest bfloat16 product reaches here. Decoding reads a prompt
of 128 tokens and writes behind it; the limit is reading every weight once for each row of tokens,
at the speed at which this GPU copies memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from peers import transformers_config

TRAINERS = ["transformers", "transformers compiled", "minillama", "minillama compiled"]
DECODERS = [
    "transformers bfloat16",
    "minillama bfloat16",
    "minillama bfloat16 compiled",
    "minillama int8 compiled",
    "minillama int4 compiled",
]
BITS = {"bfloat16": 16, "int8": 8, "int4": 5}
ROWS, SEQ = 4, 2048
N_PROMPT, N_NEW = 128, 128


def sizes(what: str):  # type: ignore[no-untyped-def]
    from minillama.config import LlamaConfig

    if what == "decode":
        return LlamaConfig.preset("llama2-7b")
    return LlamaConfig(
        dim=2048, n_layers=20, n_heads=16, n_kv_heads=16, hidden_dim=5632, vocab_size=32_000,
        max_seq_len=SEQ,
    )  # fmt: skip


def theirs(config, dtype):  # type: ignore[no-untyped-def]
    """transformers' model of these sizes."""
    import torch
    from transformers import LlamaForCausalLM

    shape = transformers_config(config, config.max_seq_len, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape)
    torch.set_default_dtype(before)
    return model


def ours(config, dtype):  # type: ignore[no-untyped-def]
    import torch

    from minillama import Llama

    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = Llama(config)
        torch.set_default_dtype(before)
    return model


def train(name: str, steps: int) -> dict[str, float]:
    import torch

    from minillama.config import TrainingConfig
    from minillama.data.packing import Batch
    from minillama.training import make_optimizer, train_step
    from minillama.training.step import compile_blocks

    config = sizes("train")
    who, compiled = name.split()[0], name.endswith("compiled")
    model = (ours if who == "minillama" else theirs)(config, torch.float32)
    if who == "minillama":
        if compiled:
            compile_blocks(model)
        optimizer = make_optimizer(model, TrainingConfig(learning_rate=3e-4))
    else:
        model.train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        call = torch.compile(model) if compiled else model

    def step() -> float:
        ids = torch.randint(config.vocab_size, (ROWS, SEQ + 1), device="cuda")
        if who == "minillama":
            batch = Batch(ids[:, :-1], ids[:, 1:])
            return train_step(model, [batch], optimizer, 1.0, dtype=torch.bfloat16).loss
        with torch.autocast("cuda", torch.bfloat16):
            logits = call(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(3):
        step()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "rate": ROWS * SEQ / statistics.median(seconds),
        "peak": torch.cuda.max_memory_allocated(),
    }


def decode(name: str, rows: int) -> dict[str, float]:
    import torch

    from minillama.adapt.quantize import quantize
    from minillama.generation import CompiledDecoder, Decoder

    torch.set_grad_enabled(False)
    config = sizes("decode")
    who, kind = name.split()[:2]
    prompts = torch.randint(config.vocab_size, (rows, N_PROMPT)).tolist()
    if who == "transformers":
        model = theirs(config, torch.bfloat16).eval()
        cache = None

        def read(ids):  # type: ignore[no-untyped-def]
            nonlocal cache
            tokens = torch.tensor(ids, device="cuda")
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            return output.logits[:, -1]

        def go_on(ids):  # type: ignore[no-untyped-def]
            return read([[token] for token in ids])

    else:
        model = ours(config, torch.bfloat16)
        if kind != "bfloat16":
            quantize(model, kind)
        make = CompiledDecoder if name.endswith("compiled") else Decoder
        decoder = make(model, rows, N_PROMPT + N_NEW + 32)

        def read(ids):  # type: ignore[no-untyped-def]
            return decoder.prefill(0, ids)

        go_on = decoder.step
    torch.cuda.synchronize()
    last = read(prompts).argmax(-1).tolist()
    for _ in range(5):
        last = go_on(last).argmax(-1).tolist()
    seconds = []
    for _ in range(N_NEW):
        start = time.perf_counter()
        last = go_on(last).argmax(-1).tolist()
        seconds.append(time.perf_counter() - start)
    return {
        "rate": rows / statistics.median(seconds),
        "peak": torch.cuda.max_memory_allocated(),
    }


def limits() -> dict[str, float]:
    """The largest product's operations, and bytes read and written, in a second."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    large = torch.empty(2**30, device="cuda", dtype=torch.int8)
    best = {"flops": 0.0, "bytes": 0.0}
    for _ in range(10):
        for name, work, amount in (
            ("flops", lambda: a @ a, 2 * 8192**3),
            ("bytes", large.clone, 2 * 2**30),
        ):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            best[name] = max(best[name], amount / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--steps", type=int, default=10, help="of training, that are timed")
    parser.add_argument("--rows", type=int, default=1, help="texts that are written at a time")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.name:
        work, number = (train, options.steps) if options.what == "train" else (decode, options.rows)
        print(json.dumps(limits() if options.name == "limits" else work(options.name, number)))
        return

    def ask(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, options.what, "--as", name]
        command += ["--steps", str(options.steps), "--rows", str(options.rows)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    import torch

    from minillama.plan import forward_flops

    config, best = sizes(options.what), ask("limits")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"{best['flops'] / 1e12:.0f} TFLOP/s, {best['bytes'] / 1e12:.2f} TB/s; "
        f"{config.n_parameters:,} parameters"
    )
    print("| | tokens/s | of the limit | against transformers | peak, GB |")
    print("|---|---|---|---|---|")
    first = None
    for name in options.only or (TRAINERS if options.what == "train" else DECODERS):
        found = ask(name)
        first = first or found["rate"]
        if options.what == "train":
            limit = best["flops"] / (3 * forward_flops(config, SEQ) / SEQ)
        else:
            numbers = config.n_parameters - config.vocab_size * config.dim
            limit = options.rows * best["bytes"] / (numbers * BITS[name.split()[1]] / 8)
        print(
            f"| {name} | {found['rate']:,.0f} | {found['rate'] / limit:.0%} "
            f"| {found['rate'] / first:.2f} | {found['peak'] / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
