"""Models of other servers of the same protocol, which a client reaches through this one.

Only the base URLs that were named at the start are ever asked; redirects are not followed, and what
a client sends of his own authorisation stays here.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2

from minillama.app.protocol import EVENTS, ApiError, as_json, event

log = logging.getLogger(__name__)
LISTING = 3.0  # seconds that a server has to list its models
PAUSE = 15.0  # seconds for which one that did not is not asked again: others wait for it


class Endpoint:
    """Another server: its models are called NAME/ID here.

    The key that it asks for, if any, stands in the environment, as MINILLAMA_KEY_NAME.
    Raises ValueError for a name or URL that cannot be one.
    """

    def __init__(self, name: str, url: str) -> None:
        parts = urlsplit(url)
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ValueError(
                f"The endpoint's name {name!r} must consist of letters, digits, - and _: its "
                f"models are called NAME/MODEL."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(
                f"The endpoint {name} has the URL {url!r}, but needs one such as "
                f"http://127.0.0.1:9000/v1, to which /chat/completions is added."
            )
        self.name, self.url = name, url.rstrip("/")
        self._variable = f"MINILLAMA_KEY_{name.upper().replace('-', '_')}"
        key = os.environ.get(self._variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The time limit of the request ends what takes too long.
        self._silent_until = 0.0  # on the clock of time.monotonic
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, follow_redirects=False)

    async def models(self) -> list[dict[str, Any]]:
        """What it offers now; nothing, and a line in the log, where it does not say."""
        if time.monotonic() < self._silent_until:
            return []
        try:
            async with asyncio.timeout(LISTING):
                answer = await self._client.get(f"{self.url}/models")
            if answer.status_code in (401, 403):
                log.warning("%s (%s) %s.", self.name, self.url, self._wants_key())
                return []
            found = [str(each["id"]) for each in answer.raise_for_status().json()["data"]]
        except (httpx2.HTTPError, TimeoutError, ValueError, KeyError, TypeError) as error:
            log.warning("%s (%s) does not list its models: %r", self.name, self.url, error)
            if isinstance(error, TimeoutError):
                self._silent_until = time.monotonic() + PAUSE
            return []
        return [
            {"id": f"{self.name}/{i}", "object": "model", "created": 0, "owned_by": self.name}
            for i in found
        ]

    @asynccontextmanager
    async def asking(
        self, path: str, fields: Mapping[str, Any]
    ) -> AsyncIterator[tuple[int, str, AsyncIterator[bytes]]]:
        """Status, content type and body of its answer; at the end of the block it may stop.

        Raises ApiError where it cannot be reached, or refuses the key of this server.
        """
        try:
            content = as_json({**fields, "model": fields["model"].removeprefix(f"{self.name}/")})
        except ValueError:
            raise ApiError(400, "A number of the body is infinite.", "invalid_json") from None
        request = self._client.build_request(
            "POST",
            f"{self.url}/{path}",
            content=content.encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise self._lost(error) from None
        if answer.status_code in (401, 403):
            # Not passed on: a client takes a 401 for this server's, and asks for its token.
            await answer.aclose()
            said = f"The server {self.name} {self._wants_key()}, and start this server again."
            raise ApiError(502, said, "endpoint_key")
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        # Nothing that a browser would run or render.
        kind = kind if kind in ("application/json", EVENTS) else "text/plain"

        async def body() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_bytes():
                    yield part
            except httpx2.HTTPError as error:
                if kind != EVENTS:
                    raise  # the length tells the client that something is missing
                yield event(self._lost(error).body()).encode()

        try:
            yield answer.status_code, kind, body()
        finally:
            await answer.aclose()

    def _wants_key(self) -> str:
        wanted = "another" if "Authorization" in self._client.headers else "a"
        return f"wants {wanted} key: put it into the environment, as {self._variable}"

    def _lost(self, error: Exception) -> ApiError:
        return ApiError(
            503,
            f"The server {self.name} cannot be reached ({type(error).__name__}). Does it run?",
            "unreachable",
        )

    async def close(self) -> None:
        await self._client.aclose()
