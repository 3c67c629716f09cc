"""A model of the shape of Llama 2 7B: how long it takes to open, its memory, and its speed.

    python benchmarks/seven_b.py FOLDER --tokenizer tokenizer.model --llama-cpp PYTHON

FOLDER gets 13.5 GB of random weights in bfloat16 as transformers writes them, the same in
minillama's own format, and with --llama-cpp (an interpreter that has llama-cpp-python) two GGUF
files of 7.2 and 3.8 GB: the first is minillama's conversion, the second llama.cpp's of that. What
is there already is kept; delete FOLDER when you are done. --tokenizer is Llama 2's.

Every contestant opens its files in a fresh process, reads a prompt and writes greedily behind it.
The peak is the process's resident memory as the system counts it, which includes what is mapped
from files. The limit is reading the weights once for each token, at the speed at which this machine
adds up a large tensor. `--layers 2` tries it all out on a small scale.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from peers import bandwidth, without_repacking

PROMPT = list(range(100, 108))
BITS = {"bfloat16": 16, "float16": 16, "int8": 8, "int4": 5, "Q8_0": 8.5, "Q4_0": 4.5}
CONTESTANTS = [
    "transformers bfloat16",
    "minillama bfloat16",
    "minillama bfloat16, transformers' folder",
    "minillama float16",
    "minillama int8",
    "minillama int4",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
]
MODULES = {
    "minillama": ["minillama.checkpoint", "minillama.generation"],
    "transformers": ["transformers.models.llama.modeling_llama"],
    "llama.cpp": ["llama_cpp"],
}


def shape(layers: int):  # type: ignore[no-untyped-def]
    from minillama.config import LlamaConfig

    return replace(LlamaConfig.preset("llama2-7b"), n_layers=layers)


def write(options: argparse.Namespace) -> None:
    """Every file that is not there yet."""
    import torch
    from torch import Tensor

    from minillama import Llama, Tokenizer
    from minillama.checkpoint import convert
    from minillama.checkpoint.huggingface import save_huggingface
    from minillama.checkpoint.weights import Checkpoint, Stored

    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "transformers"
    if not source.exists():
        config = shape(options.layers)
        with torch.device("meta"):
            empty = Llama(config).state_dict()
        drawn: dict[tuple[int, ...], Tensor] = {}  # layers may be alike: nobody looks at the text

        def draw(size: tuple[int, ...]) -> Tensor:
            if size not in drawn:
                drawn[size] = torch.empty(size).normal_(0, 0.02).bfloat16()
            return drawn[size]

        weights = {
            name: Stored(tuple(t.shape), torch.bfloat16, lambda size=tuple(t.shape): draw(size))
            for name, t in empty.items()
        }
        tokenizer = Tokenizer(options.tokenizer)
        save_huggingface(source, Checkpoint(config, weights, None, source), tokenizer)
    if not (options.folder / "native").exists():
        convert(source, options.folder / "native", "native")
    eight, four = options.folder / "Q8_0.gguf", options.folder / "Q4_0.gguf"
    if options.llama_cpp and not eight.exists():
        convert(source, eight, "gguf", quantize="q8_0")
    if options.llama_cpp and not four.exists():
        subprocess.run([options.llama_cpp, "-c", TO_Q4_0, str(eight), str(four)], check=True)


TO_Q4_0 = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
source, target = (path.encode() for path in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, target, options))
"""


def contestant(name: str, options: argparse.Namespace) -> None:
    """Open the weights, read the prompt, write; then print what that took."""
    who, kind = name.split(",")[0].split()
    for module in MODULES[who]:  # what is timed is opening the files
        importlib.import_module(module)
    if options.no_repack and who == "llama.cpp":
        without_repacking()
    start = time.perf_counter()
    read, next_token = {
        "minillama": minillama,
        "transformers": transformers,
        "llama.cpp": llama_cpp,
    }[who](kind, options.folder / ("transformers" if "," in name else "native"))
    opened = time.perf_counter()
    token = read(PROMPT)
    prompt = time.perf_counter()
    token = next_token(token)  # the first one prepares what is prepared once
    begin = time.perf_counter()
    for _ in range(options.tokens):
        token = next_token(token)
    end = time.perf_counter()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak, too
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(
        json.dumps(
            {
                "load": opened - start,
                "prompt": prompt - opened,
                "token": (end - begin) / options.tokens,
                "peak": peak,
            }
        )
    )


def minillama(kind: str, folder: Path):  # type: ignore[no-untyped-def]
    import torch

    from minillama import load
    from minillama.generation import Decoder

    torch.set_grad_enabled(False)
    quantize = kind if kind.startswith("int") else None
    model, _ = load(folder, dtype=None if quantize else getattr(torch, kind), quantize=quantize)
    decoder = Decoder(model, rows=1, max_len=64)
    return (
        lambda ids: int(decoder.prefill(0, [ids]).argmax()),
        lambda token: int(decoder.step([token]).argmax()),
    )


def transformers(kind: str, folder: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    folder = folder.parent / "transformers"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind))
    cache = None

    def go_on(ids: list[int]) -> int:
        nonlocal cache
        output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return go_on, lambda token: go_on([token])


def llama_cpp(kind: str, folder: Path):  # type: ignore[no-untyped-def]
    import llama_cpp

    model = llama_cpp.Llama(str(folder.parent / f"{kind}.gguf"), n_ctx=64, verbose=False)

    def go_on(ids: list[int]) -> int:
        model.eval(ids)
        return model.sample(temp=0.0)

    return go_on, lambda token: go_on([token])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="Llama 2's tokenizer.model")
    parser.add_argument("--llama-cpp", help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=CONTESTANTS)
    parser.add_argument(
        "--no-repack",
        action="store_true",
        help="llama.cpp multiplies by its files as they are: for virtual machines in which its\n"
        "AMX kernels, which want them in another order, end with an illegal instruction",
    )
    parser.add_argument("--as", dest="name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.name:
        return contestant(options.name, options)

    write(options)
    config, rate = shape(options.layers), bandwidth()
    numbers = config.n_parameters - config.vocab_size * config.dim  # the embeddings are looked up
    print(f"{config.n_parameters:,} parameters; this machine reads {rate / 1e9:.0f} GB/s")
    print("| | opened, s | prompt of 8, s | a token, s | limit, s | of the limit | peak, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.only:
        if name.startswith("llama.cpp") and not options.llama_cpp:
            continue
        python = options.llama_cpp if name.startswith("llama.cpp") else sys.executable
        command = [python, __file__, str(options.folder), "--as", name]
        command += ["--tokens", str(options.tokens), *["--no-repack"] * options.no_repack]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"| {name} | ended with {done.returncode} | | | | | |", flush=True)
            continue
        took = json.loads(done.stdout.splitlines()[-1])
        limit = numbers * BITS[name.split(",")[0].split()[1]] / 8 / rate
        print(
            f"| {name} | {took['load']:.1f} | {took['prompt']:.2f} | {took['token']:.3f} "
            f"| {limit:.3f} | {limit / took['token']:.0%} | {took['peak'] / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
