"""A web server on this machine that a test starts and stops; it can be as bad as the real ones."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Page:
    """What a path of the site answers."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True  # False: whatever part is asked for, all of it is sent
    cuts: list[int] = field(default_factory=list)  # each answer ends after so many bytes; then none
    silent: float = 0.0  # seconds without a byte, before the end of an answer that is cut


class Site:
    """Pages by path, and what was asked: (method, path, range, authorization)."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str, str | None, str | None]] = []
        self.closing = threading.Event()
        self.url = ""

    def add_json(self, path: str, value: Any, **more: Any) -> None:
        self.pages[path] = Page(json.dumps(value).encode(), **more)


@contextmanager
def serve() -> Iterator[Site]:
    """A site of its own, at a port that was free."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range")
            site.asked.append((self.command, path, asked, self.headers.get("Authorization")))
            page = site.pages.get(path, Page(b"not here", 404))
            status, body, headers = page.status, page.body, dict(page.headers)
            if asked and page.ranges and status == 200:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                status, body = 206, body[start:]
                size = len(page.body)
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if page.cuts:
                self.wfile.write(body[: page.cuts.pop(0)])
                self.wfile.flush()
                site.closing.wait(page.silent)
                self.close_connection = True
            else:
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            site.closing.set()
            server.shutdown()
            thread.join()
