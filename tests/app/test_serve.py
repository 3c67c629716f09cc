"""`minillama serve` in a process of its own: flags, signals, and many clients at once."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import CHAT, MODEL, TEXT, TOKENIZER, alone, live, small_models
from small import STORIES

from minillama.adapt.lora import new_adapter
from minillama.checkpoint import save
from minillama.checkpoint.fetch import fetched
from minillama.checkpoint.peft import save_adapter
from minillama.cli import main
from minillama.config import LoRAConfig

TOY = Path(__file__).parents[2] / "data" / "toy" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "small" / "checkpoint"
    save(folder, MODEL, TOKENIZER)
    return folder


@contextmanager
def serving(folder: Path, *arguments: object, **variables: str) -> Iterator[tuple[Any, str]]:
    """The process, once it says where it is, and its URL."""
    command = ["-m", "minillama", "serve", *arguments, "--port", 0, "--data", folder / "a.sqlite3"]
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, re.search(r"http://[^ ]+", line)[0]
        finally:
            process.kill()


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["serve", *map(str, arguments)])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_models_and_adapters_are_called_as_told(tmp_path, checkpoint):
    adapter = new_adapter(MODEL.config, LoRAConfig(rank=2))
    save_adapter(tmp_path / "adapter", adapter, MODEL.config)
    arguments = [checkpoint, checkpoint, "--name", "a", "--name", "b", "--max-len", 100]
    arguments += ["--adapter", f"poet={tmp_path / 'adapter'}"]
    arguments += ["--adapter", f"b:clerk={tmp_path / 'adapter'}", "--chat-format", "b=alpaca"]
    with serving(tmp_path, *arguments, MINILLAMA_TOKEN="the-token") as (_, url):
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer the-token"}
        listed = httpx2.get(f"{url}/v1/models", headers=headers).json()["data"]
        fields = ("id", "parent", "context", "chat_format")
        assert [tuple(each[field] for field in fields) for each in listed] == [
            ("a", None, 100, "llama2"),
            ("poet", "a", 100, "llama2"),
            ("b", None, 100, "alpaca"),
            ("clerk", "b", 100, "alpaca"),
        ]
        for name in ("a", "poet", "b", "clerk"):  # B is 0: the adapters change nothing
            body = TEXT | {"model": name}
            answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers).json()
            assert answer["choices"][0]["text"] == alone("Ada had")


@pytest.mark.slow
def test_sigterm_lets_answers_end(tmp_path, checkpoint):
    body = TEXT | {"max_tokens": 200, "stream": True}
    with serving(tmp_path, checkpoint) as (process, url):
        with httpx2.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            said = [first, *filter(None, lines)]
        assert said[-1] == "data: [DONE]"
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in said[:-1]]
        assert "".join(texts) == alone("Ada had", max_new_tokens=200)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.sqlite3"]  # its log is closed


@pytest.mark.slow
def test_sigterm_cuts_off_what_takes_longer_and_says_so(tmp_path):
    arguments = [TOY, "--grace", 0, "--rows", 1]
    with serving(tmp_path, *arguments) as (process, url):
        body = {"model": "toy", "prompt": "One Sunday,", "max_tokens": 240, "n": 40}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last = filter(None, lines)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "closing")
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(tmp_path, checkpoint):
    with serving(tmp_path, checkpoint) as (process, url):
        assert httpx2.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "can be reached by others, so the server needs a token"),
        (["--token", "two words"], "letters, digits and signs"),
        (["--name", "a", "--name", "b"], "There are 1 models and 2 names"),
        (["--adapter", "poet"], "--adapter is 'poet', but must be a name and what it stands for"),
        (["--adapter", "other:poet=x"], "There is no model 'other'"),
        (["--adapter", "poet=nowhere"], "nowhere"),
        (["--endpoint", "far=ftp://a"], "The endpoint far has the URL 'ftp://a'"),
        (["--chat-format", "chatml"], "needs the piece <|im_end|>"),
        (["--chat-format", "nosuch=llama2"], "There is no model 'nosuch'"),
        (["--rows", "0"], "rows is 0, but must be at least 1"),
        (["--port", "70000"], "port is 70000"),
        (["--max-requests", "0"], "max_requests is 0, but must be at least 1"),
        (["--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_flags_that_cannot_be(capsys, tmp_path, checkpoint, arguments, told):
    flags = [] if "--port" in arguments else ["--port", 0]
    flags += ["--data", tmp_path / "a.sqlite3"]
    assert told in refused(capsys, checkpoint, *arguments, *flags)


def test_nothing_to_serve(capsys, tmp_path):
    told = refused(capsys, "--port", 0, "--data", tmp_path / "a.sqlite3")
    assert "There is nothing to serve" in told
    told = refused(capsys, "--adapter", "poet=x", "--port", 0, "--data", tmp_path / "a.sqlite3")
    assert "An adapter changes a model, and there is none" in told


def test_without_fastapi_it_says_what_to_install(capsys, checkpoint, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("minillama.app."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'minillama[serve]'" in refused(capsys, checkpoint)


# --- Under load ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_streams_at_once_each_say_what_their_prompt_gives_alone(tmp_path):
    cases = [
        TEXT
        | {
            "prompt": STORIES[number % len(STORIES)][: 20 + number % 50],
            "max_tokens": 5 + number % 20,
            "temperature": number % 2,
            "seed": number,
        }
        for number in range(200)
    ]

    async def ask(http: httpx2.AsyncClient, body: dict[str, Any]) -> str:
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            assert answer.status_code == 200
            *said, done = [line async for line in answer.aiter_lines() if line]
        assert done == "data: [DONE]"
        return "".join(json.loads(line[6:])["choices"][0]["text"] for line in said)

    async def all_at_once(url: str) -> list[str]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            return await asyncio.gather(*(ask(http, body) for body in cases))

    with live(tmp_path, small_models(rows=16)) as url:
        texts = asyncio.run(all_at_once(url))
    for body, text in zip(cases, texts, strict=True):
        settings = {name: body[name] for name in ("temperature", "seed")}
        assert text == alone(body["prompt"], max_new_tokens=body["max_tokens"], **settings)


@pytest.mark.slow
def test_a_real_model_answers(tmp_path):
    if fetched("smollm2-135m-instruct") is None:
        pytest.skip("needs SmolLM2: minillama fetch smollm2-135m-instruct")
    with serving(tmp_path, "smollm2-135m-instruct") as (_, url):
        body = CHAT | {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 20,
        }
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        (choice,) = answer["choices"]
        assert "Paris" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
