"""Ghost Attention on the toy: how many dialogues obey at which turn, before and after.

    python benchmarks/gatt.py [--seeds 3] [--dialogues 1024] [--measured 128] [--variants]
                              [--assistant data/toy/chat] [--out data/toy/obedience.json]

From one assistant; of each seed are the dialogues, the rules, the training, and
the dialogues that are measured, whose rules and questions no training has seen. With --variants
the first seed is also trained in other ways. With --out the shares of all seeds are kept, for the
figure of notebooks/11_gatt.ipynb. Minutes for each training, on one core.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch

from minillama import load
from minillama.chat.gatt import Talk, examples, obedience, toy_talks
from minillama.chat.sft import SftRun
from minillama.cli import GATT_TRAINING, TURNS, Gatt
from minillama.config import RunConfig
from minillama.data.dialogues import is_right
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

CHAT = Path(__file__).resolve().parents[1] / "data" / "toy" / "chat"


def trained(base: Path, data, tok: Tokenizer, seed: int, whole: bool = False, **changes) -> Llama:
    """The assistant after Ghost Attention on these examples."""
    recipe = replace(GATT_TRAINING, seed=seed, **changes)
    with TemporaryDirectory() as folder:
        run = SftRun(
            Path(folder) / "run",
            data[10:],
            data[:10],
            tok,
            base,
            recipe,
            saving=RunConfig(save_every=0),
            trained=() if whole else Gatt().trained,
        )
        for _ in run:
            pass
        return run.model


def measured(model: Llama, tok: Tokenizer, n: int, seed: int) -> tuple[list[float], list[float]]:
    """For each turn: the share that obeys, and the share that is right as well."""
    talks = toy_talks(model, tok, n, 20, "held-out", False, 1000 + seed)
    return obedience(talks), [mean(_right(talk, turn) for talk in talks) for turn in range(20)]


def _right(talk: Talk, turn: int) -> bool:
    question, answer = talk.messages[2 * turn], talk.messages[2 * turn + 1].content
    return talk.rule.obeys(answer) and is_right(question.content, plain(talk, answer))


def plain(talk: Talk, answer: str) -> str:
    """The answer without what an instruction put there, if it is there in the right form."""
    for instruction in reversed(talk.rule.instructions):
        marked = instruction.apply("|.")
        before, _, after = marked.partition("|")
        if answer.startswith(before) and answer.endswith(after):
            answer = answer[len(before) : len(answer) - len(after)] + "."
    return answer


def row(name: str, shares: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{shares[turn - 1]:.2f}" for turn in TURNS) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dialogues", type=int, default=Gatt().n_dialogues)
    parser.add_argument("--measured", type=int, default=128)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--assistant", type=Path, default=CHAT)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = options.assistant
    chat, tok = load(base)
    results: dict[str, list[list[float]]] = {}
    print("| seed, model: obeys at turn | " + " | ".join(map(str, TURNS)) + " |")
    print("|---|" + "---:|" * len(TURNS))
    for seed in range(options.seeds):
        n_turns, shortest = Gatt().n_turns, Gatt().shortest
        talks = toy_talks(chat, tok, options.dialogues, n_turns, seed=seed, shortest=shortest)
        models = {
            "without": chat,
            "with": trained(base, examples(talks, tok, Random(seed)), tok, seed),
        }
        for name, model in models.items():
            obeys, right = measured(model, tok, options.measured, seed)
            for what, shares in (("obeys", obeys), ("obeys and is right", right)):
                results.setdefault(f"{name} GAtt: {what}", []).append(shares)
                print(row(f"{seed}, {name} GAtt: {what}", shares), flush=True)
        if seed == 0 and options.variants:
            variants(talks, tok, options)
    print("\nMean and standard deviation over the seeds:\n")
    for name, runs in results.items():
        cells = [[run[turn - 1] for run in runs] for turn in TURNS]
        spread = [stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
        text = [f"{mean(cell):.3f} ± {s:.3f}" for cell, s in zip(cells, spread, strict=True)]
        print(f"| {name} | " + " | ".join(text) + " |")
    if options.out:
        shares = {
            name: [[run[turn - 1] for turn in TURNS] for run in results[name]] for name in results
        }
        options.out.write_text(json.dumps({"turns": TURNS, **shares}, indent=1) + "\n")


def variants(talks: list[Talk], tok: Tokenizer, options: argparse.Namespace) -> None:
    """Other ways to train, each for as many steps on rows of as many tokens."""
    base, data = options.assistant, examples(talks, tok, Random(0))
    n_turns = Gatt().n_turns
    long = examples(toy_talks(load(base)[0], tok, len(talks) // 2, n_turns), tok, Random(0))
    last = [each for seed in range(4) for each in examples(talks, tok, Random(seed), True)]
    tried = {
        "dialogues of 23 turns, half as many": lambda: trained(base, long, tok, 0),
        "a learning rate half as high": lambda: trained(base, data, tok, 0, learning_rate=1e-3),
        "all answers the model's": lambda: trained(
            base, examples(talks, tok, Random(0), own=0), tok, 0
        ),
        "every weight trained": lambda: trained(base, data, tok, 0, whole=True),
        "the last answer alone, of 4 cuts of each": lambda: trained(base, last, tok, 0),
        "a quarter of the dialogues": lambda: trained(base, data[: len(data) // 4], tok, 0),
        "four rows a step, a quarter of the steps": lambda: trained(
            base, data, tok, 0, batch_size=4, steps=GATT_TRAINING.steps // 4
        ),
    }
    for name, make in tried.items():
        print(row(f"0, {name}", measured(make(), tok, options.measured, 0)[0]), flush=True)


if __name__ == "__main__":
    main()
