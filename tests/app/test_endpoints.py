"""Models of other servers, through this one: another of ours, and some that misbehave."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from serving import CHAT, TEXT, Held, alone, client, dialog, live, small_models

from minillama.app import endpoints as module
from minillama.app.endpoints import Endpoint
from minillama.app.limits import Limits

TOKEN = "the-token-of-the-other-server"


@contextmanager
def stranger(status: int = 200, body: bytes = b"{}", **headers: str):
    """A server that answers everything alike; yields its URL and what it was asked."""
    asked: list[tuple[str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            asked.append((self.path, dict(self.headers), self.rfile.read(length)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()


def test_another_server_answers_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLAMA_KEY_OTHER", TOKEN)
    other_models = small_models()
    with (
        live(tmp_path, other_models, token=TOKEN) as url,
        client(tmp_path, endpoints=[Endpoint("other", f"{url}/v1/")]) as http,
    ):
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card["owned_by"]) for card in cards] == [
            ("small", "minillama"),
            ("other/small", "other"),
        ]
        body = CHAT | {"model": "other/small"}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == alone(dialog("Ben?")).strip()
        response = http.post(
            "/v1/completions", json=TEXT | {"model": "other/small", "stream": True}
        )
        assert response.headers["Content-Type"].startswith("text/event-stream")
        *said, done = response.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        texts = [json.loads(each.removeprefix("data: "))["choices"][0]["text"] for each in said]
        assert "".join(texts) == alone("Ada had")
        refused = http.post("/v1/completions", json=TEXT | {"model": "other/large"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        shown = http.post("/api/prompt", json=body)
        assert (shown.status_code, shown.json()["error"]["code"]) == (400, "not_here")


def test_whoever_leaves_is_not_answered_by_the_other_server_either(tmp_path):
    held = Held()
    with (
        live(tmp_path, held.models) as url,
        live(tmp_path, endpoints=[Endpoint("other", f"{url}/v1")]) as near,
    ):
        body = TEXT | {"model": "other/small", "max_tokens": 240, "stream": True}
        with httpx2.stream("POST", f"{near}/v1/completions", json=body):
            held.wait_for(1)
        held.wait_for(0)
        assert [ticket.finish_reason for ticket in held.tickets] == ["cancelled"]


def test_an_answer_that_nobody_reads_is_given_up(tmp_path):
    held = Held()

    async def ask(url: str) -> None:
        endpoint = Endpoint("other", f"{url}/v1")
        body = TEXT | {"model": "other/small", "stream": True}
        async with endpoint.asking("completions", body) as (status, _, _):
            assert status == 200
            await asyncio.to_thread(held.wait_for, 1)
        await asyncio.to_thread(held.wait_for, 0)
        await endpoint.close()

    with live(tmp_path, held.models) as url:
        asyncio.run(ask(url))


def test_what_is_sent_on_and_what_is_not(tmp_path):
    with (
        stranger(body=b'{"a": 1}', Content_Type="application/json", Set_Cookie="a=1") as (
            url,
            asked,
        ),
        client(tmp_path, endpoints=[Endpoint("other", url)], token=TOKEN, hosts=None) as http,
    ):
        headers = {"Authorization": f"Bearer {TOKEN}", "Cookie": "b=2"}
        body = CHAT | {"model": "other/a/b", "tools": [{"type": "function"}]}
        response = http.post("/v1/chat/completions?x=1", json=body, headers=headers)
    ((path, sent, content),) = asked
    assert path == "/v1/chat/completions"
    assert not {"Authorization", "Cookie"} & {name.title() for name in sent}
    assert json.loads(content) == body | {"model": "a/b"}  # its fields are its own business
    assert response.json() == {"a": 1}
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize("kind", ["text/html", "application/javascript", ""])
def test_nothing_that_a_browser_would_run(tmp_path, kind):
    with (
        stranger(body=b"<script>", Content_Type=kind) as (url, _),
        client(tmp_path, endpoints=[Endpoint("other", url)]) as http,
    ):
        response = http.post("/v1/completions", json=TEXT | {"model": "other/a"})
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_redirects_are_not_followed(tmp_path):
    with stranger() as (target, asked_there), stranger(307, Location=target) as (url, asked):
        with client(tmp_path, endpoints=[Endpoint("other", url)]) as http:
            response = http.post("/v1/completions", json=TEXT | {"model": "other/a"})
            assert response.status_code == 307
            assert "Location" not in response.headers
            assert len(asked) == 1
            assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["small"]
        assert not asked_there


def test_a_server_that_is_not_there(tmp_path, caplog):
    with stranger() as (url, _):
        pass
    with client(tmp_path, endpoints=[Endpoint("other", url)]) as http:
        response = http.post("/v1/completions", json=TEXT | {"model": "other/a"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "unreachable")
        assert "The server other cannot be reached" in error["message"]
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["small"]
    assert "does not list its models" in caplog.text


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"data": 1}', b'{"data": [{}]}', b'{"data": ["a"]}', b"\xff"]
)
def test_a_list_of_models_that_is_none(tmp_path, body, caplog):
    with (
        stranger(body=body) as (url, _),
        client(tmp_path, endpoints=[Endpoint("other", url)]) as http,
    ):
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["small"]
    assert "does not list its models" in caplog.text


def test_a_server_that_wants_a_key_says_where_it_goes(tmp_path, caplog):
    with (
        stranger(status=401) as (url, _),
        client(tmp_path, endpoints=[Endpoint("far-away", url)]) as http,
    ):
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["small"]
        error = http.post("/v1/completions", json=TEXT | {"model": "nope"}).json()["error"]
        assert "Known are: small, and of other servers: far-away/..." in error["message"]
        chat = {"model": "far-away/x", "messages": [{"role": "user", "content": "Hi"}]}
        assert http.post("/api/prompt", json=chat).json()["error"]["code"] == "not_here"
    assert "put it into the environment, as MINILLAMA_KEY_FAR_AWAY" in caplog.text


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("key", "wanted"), [(None, "a key"), ("stale", "another key")])
def test_a_key_that_another_server_refuses_is_not_asked_of_the_client(
    tmp_path, monkeypatch, status, key, wanted
):
    if key:
        monkeypatch.setenv("MINILLAMA_KEY_FAR_AWAY", key)
    refusal = b'{"error": {"message": "Incorrect API key provided"}}'
    with (
        stranger(status, refusal, Content_Type="application/json") as (url, _),
        client(tmp_path, endpoints=[Endpoint("far-away", url)]) as http,
    ):
        response = http.post("/v1/completions", json=TEXT | {"model": "far-away/x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (502, "endpoint_key")
    assert error["message"] == (
        f"The server far-away wants {wanted}: put it into the environment, as "
        f"MINILLAMA_KEY_FAR_AWAY, and start this server again."
    )


def test_a_stream_that_breaks_off_says_so(tmp_path):
    length = {"Content_Type": "text/event-stream", "Content_Length": "1000"}
    with (
        stranger(body=b'data: {"a": 1}\n\n', **length) as (url, _),
        client(tmp_path, endpoints=[Endpoint("other", url)]) as http,
    ):
        response = http.post("/v1/completions", json=TEXT | {"model": "other/a", "stream": True})
        first, last = response.text.strip().split("\n\n")
        assert first == 'data: {"a": 1}'
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unreachable"


def test_a_server_that_says_nothing(tmp_path):
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            writer.close()

    async def ask() -> httpx2.Response:
        async with await asyncio.start_server(nothing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint("other", f"http://127.0.0.1:{port}/v1")
            limits = Limits(max_seconds=1)
            with live(tmp_path, endpoints=[endpoint], limits=limits) as url:
                async with httpx2.AsyncClient(timeout=20) as http:
                    body = TEXT | {"model": "other/a"}
                    return await http.post(f"{url}/v1/completions", json=body)

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")


def test_one_that_says_nothing_is_not_waited_for_each_time(monkeypatch):
    monkeypatch.setattr(module, "LISTING", 0.05)
    n_asked, models = 0, b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "a"}]}'

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_asked
        n_asked += 1
        await reader.readuntil(b"\r\n\r\n")
        if n_asked > 1:
            writer.write(models)
        else:
            await reader.read()  # until the other side gives up
        writer.close()

    async def listings() -> list[int]:
        async with await asyncio.start_server(late, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint("other", f"http://127.0.0.1:{port}/v1")
            found = [len(await endpoint.models()) for _ in range(3)]
            assert n_asked == 1
            monkeypatch.setattr(endpoint, "_silent_until", 0.0)  # later
            found.append(len(await endpoint.models()))
            await endpoint.close()
        return found

    assert asyncio.run(listings()) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "url", "told"),
    [
        ("a/b", "http://127.0.0.1/v1", "'a/b' must consist of letters"),
        ("", "http://127.0.0.1/v1", "must consist of letters"),
        ("other", "127.0.0.1/v1", "needs one such as"),
        ("other", "file:///etc/passwd", "needs one such as"),
        ("other", "http:///v1", "needs one such as"),
        ("other", "http://127.0.0.1/v1?a=b", "needs one such as"),
    ],
)
def test_endpoints_that_cannot_be(name, url, told):
    with pytest.raises(ValueError, match=told):
        Endpoint(name, url)
