"""A server under load: is every answer right, and how fast do the first word and the rest come?

    python benchmarks/serving.py                                    # data/toy/checkpoint
    python benchmarks/serving.py smollm2-135m-instruct --clients 16 --tokens 32
    python benchmarks/serving.py --rows 32 --clients 200

`minillama serve` runs in a process of its own on 127.0.0.1. First eight clients ask one after the
other, then the same eight at once, in turns; that is what continuous batching gives. Then all
clients ask at once, each for a stream. Half of them sample, with seeds of their own. Every answer
is compared with what the same request gave when nobody else was there; one that differs is an
error. Last, a few clients talk, turn after turn: of each turn the server has read all but the end.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOY = Path(__file__).parents[1] / "data" / "toy" / "checkpoint"
QUESTIONS = (
    "What do you see there in the morning, before the others wake up?",
    "And who goes with you? Tell me a little about each of them, please.",
    "What was the best day that you had there, and what made it so good?",
)
PROMPTS = ("One Sunday,", "There was a harbour.", "Clara had a birthday", "", "Finn and the goat")


@dataclass(frozen=True)
class Answer:
    text: str
    n_tokens: int
    n_prompt: int
    n_known: int  # tokens of the prompt that the server had read before
    first: float  # seconds from the question to the first piece of text
    last: float  # seconds from the question to the end


@contextmanager
def server(model: str, rows: int) -> Iterator[int]:
    """`minillama serve` until the end of the block, with the name "model"; its port."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minillama", "serve", model, "--name", "model"]
        command += [
            "--port",
            "0",
            "--rows",
            str(rows),
            "--data",
            str(Path(folder) / "data.sqlite3"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                line = process.stdout.readline()
                found = re.search(r":(\d+) ", line)
                if not found:
                    raise SystemExit(f"The server did not start: {line}")
                yield int(found[1])
            finally:
                process.terminate()


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """One streamed answer, over a connection of its own."""
    path = b"chat/completions" if "messages" in body else b"completions"
    content = json.dumps(body).encode()
    start, first = time.perf_counter(), None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path, len(content), content)
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status!r}: {(await reader.read())!r}")
    text, usage, done = "", {}, False
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            usage = event["usage"] or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if piece:
                    first = first or time.perf_counter() - start
                    text += piece
        done = done or line.strip() == b"data: [DONE]"
    writer.close()
    if not done:
        raise SystemExit(f"A stream broke off behind {text!r}.")
    last = time.perf_counter() - start
    known = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    n_tokens, n_prompt = usage["completion_tokens"], usage["prompt_tokens"]
    return Answer(text, n_tokens, n_prompt, known, first or last, last)


async def at_once(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    return await asyncio.gather(*(ask(port, body) for body in bodies))


async def one_by_one(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    return [await ask(port, body) for body in bodies]


async def talk(port: int, name: str, n_turns: int, n_tokens: int) -> list[Answer]:
    """A dialogue, each turn of which says all that was said before."""
    messages = [{"role": "system", "content": f"You are {name}, and you like to tell of the sea."}]
    answers = []
    for turn in range(n_turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        body = {"model": "model", "messages": messages, "max_tokens": n_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answers.append(await ask(port, body))
        messages.append({"role": "assistant", "content": answers[-1].text or "Well."})
    return answers


async def talks(port: int, n_talks: int, n_turns: int, n_tokens: int) -> list[list[Answer]]:
    names = ("Ada", "Ben", "Clara", "Dora", "Emil", "Finn", "Gus", "Hanna")
    return await asyncio.gather(
        *(talk(port, names[i % 8] + "!" * (i // 8), n_turns, n_tokens) for i in range(n_talks))
    )


def timed(port: int, bodies: Sequence[dict[str, Any]], how: Any) -> tuple[list[Answer], float]:
    start = time.perf_counter()
    answers = asyncio.run(how(port, bodies))
    return answers, time.perf_counter() - start


def requests(n: int, n_tokens: int) -> list[dict[str, Any]]:
    """Different prompts and lengths; every second one is sampled."""
    return [
        {
            "model": "model",
            "prompt": PROMPTS[number % len(PROMPTS)] * (1 + number % 3),
            "max_tokens": n_tokens - number % 5,
            "temperature": number % 2,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(n)
    ]


def report(model: str, rows: int, n_clients: int, n_tokens: int, rounds: int) -> None:
    with server(model, rows) as port:
        eight = requests(8, n_tokens)
        timed(port, eight, at_once)  # warm
        gains = []
        for _ in range(rounds):
            alone, slow = timed(port, eight, one_by_one)
            together, fast = timed(port, eight, at_once)
            assert [a.text for a in alone] == [a.text for a in together]
            written = sum(answer.n_tokens for answer in alone)
            gains.append(slow / fast)
            print(
                f"8 requests: {slow:.2f} s one after the other ({written / slow:,.0f} tokens/s), "
                f"{fast:.2f} s at once ({written / fast:,.0f} tokens/s): {slow / fast:.2f} times"
            )
        print(f"median: {statistics.median(gains):.2f} times as fast")

        bodies = requests(n_clients, n_tokens)
        expected, _ = timed(port, bodies, one_by_one)
        answers, seconds = timed(port, bodies, at_once)
        wrong = sum(a.text != e.text for a, e in zip(answers, expected, strict=True))
        firsts = sorted(answer.first for answer in answers)
        written = sum(answer.n_tokens for answer in answers)
        print(
            f"{n_clients} streams at once, {rows} rows: {n_clients - wrong} answers equal what "
            f"their prompts give alone, {wrong} differ\n"
            f"first text after {statistics.median(firsts):.2f} s (median), "
            f"{firsts[int(0.95 * len(firsts))]:.2f} s (95%); all after {seconds:.2f} s, "
            f"{written / seconds:,.0f} tokens/s together"
        )
        if wrong:
            raise SystemExit(1)

        for n_talks in (1, 4):
            turns = list(zip(*asyncio.run(talks(port, n_talks, 10, n_tokens)), strict=True))
            print(f"{n_talks} dialogues at once: first text (median), tokens known of those asked")
            for number in (0, 1, 4, 9):
                answers = turns[number]
                first = statistics.median(answer.first for answer in answers)
                known = sum(answer.n_known for answer in answers)
                asked = sum(answer.n_prompt for answer in answers)
                print(f"  turn {number + 1:2}: {first:.3f} s, {known:,} of {asked:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TOY))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report(options.model, options.rows, options.clients, options.tokens, options.rounds)
