"""Quantised products beside float32's: how fast, how many bytes, and where kernels stop paying.

    python benchmarks/quantization.py                 # 576 x 1536 (SmolLM2) and 4096 x 4096 (7B)
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python ...
    python benchmarks/quantization.py --loss CHECKPOINT --text FILE    # bits against loss

The tables are milliseconds for one product of so many rows, the best of many (the machine may be
shared), with one thread: through the layer's kernel, and by restoring a few rows of the matrix at a
time. `kernel_rows` in adapt/quantize.py lies where the two meet. The second line is what an older
processor does. On a machine with CUDA, --device cuda measures there.

--loss prints bits a weight, bytes, seconds to load, and the loss on a text's first 4,096 tokens.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from minillama import load
from minillama.adapt.quantize import (
    KINDS,
    QuantizedLinear,
    dequantized_product,
    quantize_linear,
)
from minillama.data.packing import Batch
from minillama.training import evaluate

SHAPES = [(1536, 576), (4096, 4096)]
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)


def best_of(function: Callable[[], object], device: str, seconds: float = 0.3) -> float:
    """Milliseconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


@torch.inference_mode()
def products(device: str) -> None:
    print(torch.backends.cpu.get_cpu_capability())
    for d_out, d_in in SHAPES:
        weight = 0.02 * torch.randn(d_out, d_in, device=device)
        layers = {kind: quantize_linear(weight, kind) for kind in KINDS}
        n_bytes = {kind: sum(b.nbytes for b in layer.buffers()) for kind, layer in layers.items()}
        sizes = ", ".join(f"{kind} {n / 2**20:.2f}" for kind, n in n_bytes.items())
        print(f"\n{d_out} x {d_in}; MiB: float32 {weight.nbytes / 2**20:.2f}, {sizes}")
        heads = [f"{kind} {way}" for kind in ("int8", "int4") for way in ("kernel", "restored")]
        print("".join(f"{head:>15}" for head in ("rows", "float32", *heads, "nf4 restored")))
        for n in ROWS:
            x = torch.randn(n, d_in, device=device)
            ways: list[Callable[[], object]] = [partial(linear, x, weight)]
            for kind in ("int8", "int4"):
                ways.append(partial(layers[kind]._product, x))
                ways.append(partial(dequantized_product, x, layers[kind]))
            ways.append(partial(dequantized_product, x, layers["nf4"]))
            found = [best_of(way, device) for way in ways]
            print(f"{n:>15}" + "".join(f"{milliseconds:>15.2f}" for milliseconds in found))


def losses(checkpoint: str, text: Path) -> None:
    print(f"{'':9}{'bits':>7}{'MiB':>8}{'load s':>8}{'loss':>9}{'change':>9}")
    rows, before = None, 0.0
    for kind in (None, *KINDS):
        start = time.perf_counter()
        model, tok = load(checkpoint, dtype=torch.float32, quantize=kind)
        seconds = time.perf_counter() - start
        if rows is None:
            seq = min(512, model.config.max_seq_len)
            ids = tok.encode(text.read_text(encoding="utf-8")[:40_000], bos=tok.adds_bos)
            rows = torch.tensor(ids[:4097]).unfold(0, seq + 1, seq)
        batches = [Batch(row[None, :-1], row[None, 1:]) for row in rows]
        loss = evaluate(model, batches)
        before = before or loss
        linears = [m for m in model.modules() if isinstance(m, QuantizedLinear | torch.nn.Linear)]
        n_weights = sum(layer.in_features * layer.out_features for layer in linears)
        n_bytes = sum(t.nbytes for layer in linears for t in layer.state_dict().values())
        print(
            f"{kind or 'float32':9}{8 * n_bytes / n_weights:7.3f}{n_bytes / 2**20:8.1f}"
            f"{seconds:8.1f}{loss:9.4f}{loss / before - 1:+9.2%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loss", metavar="CHECKPOINT", help="a folder, a file or a name")
    parser.add_argument("--text", type=Path, help="UTF-8; of at least 4,097 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.loss:
        products(arguments.device)
    elif not arguments.text:
        parser.error("--loss needs --text")
    else:
        losses(arguments.loss, arguments.text)


if __name__ == "__main__":
    main()
