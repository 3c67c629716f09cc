"""A server to test: in this process, and on a socket of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from small import small_llama, small_tokenizer

from minillama.app.models import ServedModel, serve_model
from minillama.app.server import create_app, listen, server_of
from minillama.chat import Message, encode_dialog
from minillama.config import Sampling
from minillama.generation import Request, Ticket, generate

MODEL, TOKENIZER = small_llama(max_seq_len=256), small_tokenizer()
URL = "http://127.0.0.1"
CHAT: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "Ben?"}],
    "max_tokens": 12,
    "temperature": 0,
}
TEXT: dict[str, Any] = {"model": "small", "prompt": "Ada had", "max_tokens": 12, "temperature": 0}


def small_models(**changes: Any) -> list[ServedModel]:
    """One model, "small", whose default is the likeliest token."""
    settings = {"sampling": Sampling(), "rows": 4} | changes
    return serve_model("small", MODEL, TOKENIZER, **settings)


def page(folder: Path) -> Path:
    path = folder / "page.html"
    path.write_text("<!doctype html><style>p {}</style><script>let a = 1</script>")
    return path


@contextmanager
def client(
    folder: Path, models: list[ServedModel] | None = None, **app: Any
) -> Iterator[TestClient]:
    """A client without a socket."""
    app = {"page": page(folder), "models": models or small_models()} | app
    with TestClient(create_app(**app), base_url=URL, raise_server_exceptions=True) as test_client:
        yield test_client


@contextmanager
def live(folder: Path, models: list[ServedModel] | None = None, **app: Any) -> Iterator[str]:
    """The URL of a server in a thread."""
    app = {"page": page(folder), "models": models or small_models()} | app
    listening = listen("127.0.0.1", 0)
    server = server_of(create_app(**app), grace=5)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"{URL}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Held:
    """Models whose engine takes requests, and takes no step until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.models = small_models()
        self.thread = self.models[0].thread
        self.tickets: list[Ticket] = []
        step, submit = self.thread._step, self.thread._engine.submit

        def held_step() -> None:
            if self.go.wait(0.005):
                step()

        def noted_submit(request: Request) -> Ticket:
            self.tickets.append(submit(request))
            return self.tickets[-1]

        self.thread._step, self.thread._engine.submit = held_step, noted_submit

    def wait_for(self, n_open: int) -> None:
        deadline = time.monotonic() + 10
        while self.thread.n_open != n_open:
            assert time.monotonic() < deadline, f"{self.thread.n_open} are open, not {n_open}"
            time.sleep(0.002)


def alone(prompt: str | list[int], **settings: Any) -> str:
    """What the prompt gives without a server, or neighbours."""
    (completion,) = generate(MODEL, TOKENIZER, [prompt], **({"max_new_tokens": 12} | settings))
    return completion.text


def dialog(*contents: str) -> list[int]:
    """The ids of a dialogue that begins with a user."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return encode_dialog(messages, TOKENIZER).ids
