"""Speculative decoding: how many guesses stand, and whether they save time.

    python benchmarks/speculative.py smollm2-135m-instruct     # the same model in int4 guesses
    python benchmarks/speculative.py MODEL --draft SMALL_MODEL_OF_THE_SAME_TOKENIZER

A model in float32 writes behind four prompts, one after the other, alone and with drafts that make
2, 4 and 6 guesses. All take turns; the speeds are medians over the rounds, in tokens a second, the
prompt included. Greedy text must be the same with and without a draft, and is compared.
"""

import argparse
import statistics
import time

import torch

from minillama import generate, load
from minillama.adapt.quantize import KINDS

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "The most important thing about water is that",
)
GUESSES = (0, 2, 4, 6)  # 0: without a draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a checkpoint, or a name of `minillama fetch`")
    parser.add_argument("--draft", default="int4", help=f"a checkpoint, or {', '.join(KINDS)}")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens behind each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the steps of both models")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, dtype=torch.float32)
    if options.draft in KINDS:
        draft, _ = load(options.model, quantize=options.draft)
    else:
        draft, _ = load(options.draft, dtype=torch.float32)

    for temperature in (0.0, 0.8):
        speeds: dict[int, list[float]] = {n: [] for n in GUESSES}
        acceptance: dict[int, float] = {}
        texts: dict[int, list[str]] = {}
        for turn in range(options.rounds + 1):  # the first is not counted
            for n in GUESSES:
                start, n_tokens, shares, texts[n] = time.perf_counter(), 0, [], []
                for prompt in PROMPTS:
                    (completion,) = generate(
                        model,
                        tokenizer,
                        prompt,
                        options.tokens,
                        temperature=temperature,
                        seed=turn,
                        draft=draft if n else None,
                        n_draft=n or 1,
                        compile=options.compile,
                    )
                    n_tokens += len(completion.token_ids)
                    shares.append(completion.acceptance or 0.0)
                    texts[n].append(completion.text)
                if turn:
                    speeds[n].append(n_tokens / (time.perf_counter() - start))
                acceptance[n] = statistics.mean(shares)
        print(f"temperature {temperature}, draft {options.draft}")
        alone = statistics.median(speeds[0])
        for n in GUESSES:
            speed = statistics.median(speeds[n])
            same = sum(a == b for a, b in zip(texts[0], texts[n], strict=True))
            print(
                f"  {n} guesses: {acceptance[n]:4.0%} stand, {1 + n * acceptance[n]:.1f} tokens "
                f"a pass, {speed:6.1f} tokens/s ({speed / alone:.2f}x)"
                + f", {same} of {len(PROMPTS)} texts the same"
                * (temperature == 0)
            )


if __name__ == "__main__":
    main()
