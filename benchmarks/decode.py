"""Decoding and prefill, side by side with other implementations, on one machine.

    python benchmarks/decode.py S                # dim 288, 6 layers, vocabulary 32,000 (stories15M)
    python benchmarks/decode.py 110M             # dim 768, 12 layers, vocabulary 32,000
    python benchmarks/decode.py 135M             # SmolLM2: dim 576, 30 layers, vocabulary 49,152
    python benchmarks/decode.py S --batch 8

Each contestant is a process of its own with the same random weights. They take turns, so that a
machine that is busy for a while is busy for all; what is compared is the median over the rounds. A
turn reads prompts of 128 tokens, decodes greedily behind them (timed), and reads a prompt of 512
tokens (timed). minillama is measured as its users have it, through the engine. What has the same
numbers, float32, must write the same tokens as transformers; how many agree is printed.

The limit is reading all matrices of a float32 model once for each token, at the speed at which this
machine adds up a large tensor. litgpt takes part where it is installed (pip install litgpt);
llama.cpp with --llama-cpp PYTHON, an interpreter that has llama-cpp-python, and --tokenizer, Llama
2's tokenizer.model, which its file of the weights needs (S and 110M; one prompt).
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import bandwidth, litgpt_llama, transformers_llama, without_repacking

SHAPES = {
    "S": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "hidden_dim": 768},
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "hidden_dim": 2048},
    "135M": {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536},
}
VOCABULARY = {"S": 32_000, "110M": 32_000, "135M": 49_152}
PROMPT, LONG_PROMPT, CONTEXT = 128, 512, 1024
CONTESTANTS = [
    "transformers",
    "litgpt",
    "minillama",
    "minillama compiled",
    "minillama bfloat16",
    "minillama bfloat16 compiled",
    "minillama int8",
    "minillama int8 compiled",
    "minillama int4",
    "minillama int4 compiled",
    "llama.cpp F32",
    "llama.cpp Q8_0",
]


def config(shape: str):  # type: ignore[no-untyped-def]
    from minillama.config import LlamaConfig

    sizes = SHAPES[shape] | {"vocab_size": VOCABULARY[shape]}
    return LlamaConfig(**sizes, max_seq_len=CONTEXT, tie_embeddings=True)


def contestant(name: str, options: argparse.Namespace) -> None:
    """Each line read is a number of new tokens; each written how fast they and a prompt were."""
    import random

    # Every implementation needs the same prompts, and not all have torch.
    draw, size = random.Random(0), VOCABULARY[options.shape]
    prompts = [[draw.randrange(3, size) for _ in range(PROMPT)] for _ in range(options.batch)]
    long_prompt = [draw.randrange(3, size) for _ in range(LONG_PROMPT)]
    make = llama_cpp if name.startswith("llama.cpp") else with_torch
    run = make(name, options)
    run([prompts[0]] * options.batch, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        ids, _, seconds = run(prompts, int(line))
        _, prefill, _ = run([long_prompt], 1)
        print(json.dumps({"ids": ids, "decode": seconds, "prefill": prefill}), flush=True)


def with_torch(name: str, options: argparse.Namespace):  # type: ignore[no-untyped-def]
    """A function (prompts, n) -> (the first one's n + 1 new tokens, seconds of reading, of n)."""
    import torch

    from minillama.model import Llama

    llama = Llama(config(options.shape), torch.Generator().manual_seed(0)).requires_grad_(False)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 2:
                parameter *= 5  # so that the likeliest token is clearly so
    torch.set_grad_enabled(False)
    if name.startswith("minillama"):
        return minillama(name, llama)
    theirs = transformers_llama if name == "transformers" else litgpt_llama
    model = theirs(llama, CONTEXT).eval()

    def transformers(prompts: list[list[int]], n: int) -> tuple[list[int], float, float]:
        read = []

        def first(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            read or read.append(time.perf_counter())
            return logits

        start = time.perf_counter()
        ids = model.generate(
            torch.tensor(prompts),
            max_new_tokens=n + 1,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[first],
        )
        new_ids = ids[0, len(prompts[0]) :].tolist()
        return new_ids, read[0] - start, time.perf_counter() - read[0]

    def litgpt(prompts: list[list[int]], n: int) -> tuple[list[int], float, float]:
        length = len(prompts[0])
        model.set_kv_cache(len(prompts), max_seq_length=length + n + 1)
        start = time.perf_counter()
        newest = model(torch.tensor(prompts), torch.arange(length))[:, -1:].argmax(-1)
        new_ids, read = [newest[0].item()], time.perf_counter()
        for i in range(n):
            newest = model(newest, torch.tensor([length + i]))[:, -1:].argmax(-1)
            new_ids.append(newest[0].item())
        return new_ids, read - start, time.perf_counter() - read

    return transformers if name == "transformers" else litgpt


def minillama(name: str, llama):  # type: ignore[no-untyped-def]
    import torch

    from minillama.adapt.quantize import quantize
    from minillama.generation import Engine, Request

    for kind in ("int8", "int4"):
        if kind in name:
            quantize(llama.bfloat16(), kind)
    if "bfloat16" in name:
        llama.bfloat16()

    class NoText:
        """A tokenizer whose tokens mean nothing, and none of them ends a text."""

        vocab_size, bos_id, eos_id = llama.config.vocab_size, 1, -1

        def decoder(self) -> "NoText":
            return self

        def push(self, token: int) -> str:
            return ""

        def flush(self) -> str:
            return ""

    def run(prompts: list[list[int]], n: int) -> tuple[list[int], float, float]:
        length = len(prompts[0]) + n + 1
        engine = Engine(
            llama, NoText(), len(prompts), LONG_PROMPT, length, compile="compiled" in name
        )
        start = time.perf_counter()
        tickets = [engine.submit(Request(prompt, n + 1)) for prompt in prompts]
        while not all(ticket.token_ids for ticket in tickets):
            engine.step()
        read = time.perf_counter()
        done = sum(len(ticket.token_ids) for ticket in tickets)
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - read
        total = sum(len(ticket.token_ids) for ticket in tickets)
        assert total == len(prompts) * (n + 1)
        # Rows that were read first have a head start: count what was really decoded.
        return tickets[0].token_ids, read - start, seconds * len(prompts) * n / max(1, total - done)

    torch.manual_seed(0)
    return run


def llama_cpp(name: str, options: argparse.Namespace):  # type: ignore[no-untyped-def]
    import llama_cpp

    if options.no_repack:
        without_repacking()
    path = str(Path(options.folder) / f"{name.split()[1]}.gguf")
    threads = options.threads or None
    model = llama_cpp.Llama(
        path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(prompts: list[list[int]], n: int) -> tuple[list[int], float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompts[0])
        new_ids, read = [model.sample(temp=0.0)], time.perf_counter()
        for _ in range(n):
            model.eval(new_ids[-1:])
            new_ids.append(model.sample(temp=0.0))
        return new_ids, read - start, time.perf_counter() - read

    return run


def write_gguf(folder: str, options: argparse.Namespace) -> None:
    """The weights that `with_torch` makes, for llama.cpp."""
    import torch

    from minillama import Llama, Tokenizer, save

    llama = Llama(config(options.shape), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 2:
                parameter *= 5
    for kind in ("F32", "Q8_0"):
        path = Path(folder) / f"{kind}.gguf"
        save(path, llama, Tokenizer(options.tokenizer), format="gguf", kind=kind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of one turn")
    parser.add_argument("--threads", type=int, help="of llama.cpp; the others: OMP_NUM_THREADS")
    parser.add_argument("--only", nargs="*", default=CONTESTANTS)
    parser.add_argument("--llama-cpp", help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--tokenizer", help="Llama 2's tokenizer.model, for llama.cpp")
    parser.add_argument(
        "--no-repack",
        action="store_true",
        help="llama.cpp multiplies by its files as they are: for virtual machines in which its\n"
        "AMX kernels, which want them in another order, end with an illegal instruction",
    )
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.name:
        return contestant(options.name, options)

    with tempfile.TemporaryDirectory() as folder:
        native = bool(options.llama_cpp and options.tokenizer) and options.batch == 1
        if native:
            write_gguf(folder, options)
        names = [
            name
            for name in options.only
            if (name != "litgpt" or importlib.util.find_spec("litgpt"))
            and (native or not name.startswith("llama.cpp"))
        ]
        measure(names, folder, options)


def measure(names: list[str], folder: str, options: argparse.Namespace) -> None:
    children = {}
    for name in names:
        python = options.llama_cpp if name.startswith("llama.cpp") else sys.executable
        command = [python, __file__, options.shape, "--batch", str(options.batch)]
        command += ["--as", name, "--folder", folder]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += ["--no-repack"] * options.no_repack
        children[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children[name].stdout.readline()  # one at a time: compilers are busy
    tokens, rates, ids, prefills, limits = options.batch * options.tokens, {}, {}, {}, []
    sizes = config(options.shape)
    numbers = sizes.n_parameters - (0 if sizes.tie_embeddings else sizes.vocab_size * sizes.dim)
    for _ in range(options.rounds):
        limits.append(options.batch * bandwidth() / (4 * numbers))
        for name, child in children.items():
            child.stdin.write(f"{options.tokens}\n")
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
            ids[name] = answer["ids"]
            rates.setdefault(name, []).append(tokens / answer["decode"])
            prefills.setdefault(name, []).append(LONG_PROMPT / answer["prefill"])
    for child in children.values():
        child.stdin.close()
        child.wait()

    limit = statistics.median(limits)
    print(
        f"\nshape {options.shape}, {options.batch} at a time: "
        f"limit {limit:,.0f} tokens/s (float32, from memory)"
    )
    print("| | decoding, tokens/s (min to max) | against transformers | prefill of 512 ", end="")
    print("| against transformers | equal tokens |\n|---|---|---|---|---|---|")
    peer = "transformers" if "transformers" in names else names[0]
    for name in names:
        r, p = rates[name], prefills[name]
        same = zip(ids[name], ids[peer], strict=True)
        agree = next((i for i, (a, b) in enumerate(same) if a != b), len(ids[name]))
        print(
            f"| {name} | {statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f}) "
            f"| {statistics.median(r) / statistics.median(rates[peer]):.2f} "
            f"| {statistics.median(p):,.0f} "
            f"| {statistics.median(p) / statistics.median(prefills[peer]):.2f} "
            f"| {agree} of {len(ids[name])} |"
        )


if __name__ == "__main__":
    main()
