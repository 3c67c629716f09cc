"""How fast a text becomes rows of token ids on the disk, beside the tokenizer alone.

    python benchmarks/packing.py                                       # the tales
    python benchmarks/packing.py --text book.txt --tokenizer tokenizer.model --megabytes 50

The text is repeated up to the size asked for. "sentencepiece" is the library's own encoder, on all
cores, given the lines of the text; its ids are counted and thrown away. "write_tokens" takes the
same text as a stream of documents, a page each, and ends with a file of ids that is on the disk;
"one document" takes it as a single one, which is encoded in parts. Each contestant is a process of
its own, and they take turns, so that a machine that is busy for a while is busy for all; what is
compared is the median over the rounds. Memory is the peak above what the process held before it
began, when it had the text, the tokenizer and a page encoded.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
CONTESTANTS = ["sentencepiece", "write_tokens", "one document"]
PAGE = 3000  # characters


def contestant(name: str, text: Path, model: Path, megabytes: float) -> None:
    """Encode the text as this contestant, and print how fast and in how much memory."""
    from sentencepiece import SentencePieceProcessor

    from minillama.data.packing import write_tokens
    from minillama.tokenizer import Tokenizer

    content = text.read_text()
    times = max(round(megabytes * 1e6 / len(content.encode())), 1)
    tokenizer, processor = Tokenizer(model), SentencePieceProcessor(model_file=str(model))
    lines = content.splitlines(keepends=True)
    pages = [content[start : start + PAGE] for start in range(0, len(content), PAGE)]
    documents = (
        [content * times]
        if name == "one document"
        else (page for _ in range(times) for page in pages)
    )
    processor.encode(pages[:2], num_threads=-1)
    with tempfile.TemporaryDirectory() as folder:
        before = peak()
        start = time.perf_counter()
        if name == "sentencepiece":
            n_ids = sum(
                len(i) for _ in range(times) for i in processor.encode(lines, num_threads=-1)
            )
        else:
            n_ids = write_tokens(Path(folder) / "ids", documents, tokenizer)
        seconds = time.perf_counter() - start
    megabytes = times * len(content.encode()) / 1e6
    print(json.dumps({"speed": megabytes / seconds, "n_ids": n_ids, "mib": peak() - before}))


def peak() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, default=DATA / "tales" / "train.txt")
    model = DATA / "toy" / "checkpoint" / "tokenizer.model"
    parser.add_argument("--tokenizer", type=Path, default=model, help="a tokenizer.model")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.contestant, arguments.text, arguments.tokenizer, arguments.megabytes)
        return

    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.rounds):
        for name, found in results.items():
            command = [sys.executable, *sys.argv, "--contestant", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout))

    print(f"{arguments.megabytes:g} MB of {arguments.text.name}, {arguments.rounds} rounds\n")
    print("| | MB/s, median (min to max) | of sentencepiece | peak memory, MiB | ids |")
    print("|---|---:|---:|---:|---:|")
    alone = statistics.median(found["speed"] for found in results["sentencepiece"])
    for name, found in results.items():
        speeds = [one["speed"] for one in found]
        median, mib = statistics.median(speeds), max(one["mib"] for one in found)
        print(
            f"| {name} | {median:.2f} ({min(speeds):.2f} to {max(speeds):.2f}) | "
            f"{median / alone:.0%} | {mib:.0f} | {found[0]['n_ids']:,} |"
        )


if __name__ == "__main__":
    main()
