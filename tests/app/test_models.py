"""Engines in threads: what clients get, whoever else asks, goes away or breaks something."""

import asyncio
import random
import time
from collections.abc import Callable

import pytest
import torch
from serving import MODEL, TOKENIZER, alone
from small import small_llama

from minillama.app.models import EngineThread, serve_model, text_of
from minillama.app.protocol import ApiError
from minillama.config import Sampling
from minillama.generation import Engine, Request


@pytest.fixture
def thread():
    engine_thread = EngineThread(lambda: Engine(MODEL, TOKENIZER, rows=4))
    yield engine_thread
    engine_thread.close()


async def read(thread: EngineThread, request: Request, n_updates: int = 10**9) -> str:
    """The text of an answer, or of its first updates: then the client goes."""
    text = ""
    async with thread.answering([request]) as job:
        async for update in job.updates():
            text += update.text
            n_updates -= 1
            if n_updates <= 0:
                break
    return text


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_whoever_comes_and_goes_each_answer_is_what_its_prompt_gives_alone(thread):
    dice = random.Random(0)
    cases = []
    for number in range(36):
        settings = {"temperature": dice.choice([0, 1]), "max_new_tokens": dice.randint(1, 25)}
        prompt = dice.choice(["Ada", "Ben had 3", "", "Clara took the kite home. " * 5])
        cases.append((prompt, settings, number))

    async def client(prompt: str, settings: dict, number: int) -> None:
        await asyncio.sleep(number % 7 / 100)
        request = Request(
            prompt,
            settings["max_new_tokens"],
            Sampling(temperature=settings["temperature"]),
            seed=number,
        )
        expected = alone(prompt, **settings, seed=number)
        if number % 3 == 0:  # this one goes away early
            assert expected.startswith(await read(thread, request, n_updates=2))
        else:
            assert await read(thread, request) == expected

    async def all_clients() -> None:
        await asyncio.gather(*(client(*case) for case in cases))

    asyncio.run(all_clients())
    until(lambda: thread.n_open == 0)


def test_several_requests_of_one_client_are_numbered(thread):
    async def ask() -> list[str]:
        texts = ["", "", ""]
        requests = [Request(prompt, n) for prompt, n in (("Ada", 9), ("Ben", 3), ("Ida", 6))]
        async with thread.answering(requests) as job:
            assert job.n_prompt == sum(len(TOKENIZER.encode(r.prompt, bos=True)) for r in requests)
            ends = []
            async for update in job.updates():
                texts[update.index] += update.text
                if update.finish_reason:
                    ends.append((update.index, update.n_tokens, update.finish_reason))
        assert sorted(ends) == [(0, 9, "length"), (1, 3, "length"), (2, 6, "length")]
        return texts

    expected = [
        alone(prompt, max_new_tokens=n) for prompt, n in (("Ada", 9), ("Ben", 3), ("Ida", 6))
    ]
    assert asyncio.run(ask()) == expected


def test_whoever_goes_frees_his_row_at_the_next_step(thread):
    async def ask() -> None:
        async with thread.answering([Request("Ada", 200)]) as job:
            await job.news()
            (ticket,) = job.tickets
        until(lambda: ticket.finish_reason is not None)
        assert ticket.finish_reason == "cancelled"
        assert len(ticket.token_ids) < 200
        until(lambda: thread.n_open == 0)
        assert not thread._engine.busy

    asyncio.run(ask())


def test_whoever_waits_for_a_row_can_go_too(thread):
    async def ask() -> None:
        async with thread.answering([Request("Ada", 200)] * 4) as running:
            await running.news()
            async with thread.answering([Request("Ben", 5)] * 9) as waiting:
                pass
            until(lambda: thread.n_open == 4)
            assert all(ticket.finish_reason == "cancelled" for ticket in waiting.tickets)
            assert running.tickets[0].finish_reason is None

    asyncio.run(ask())


def test_a_request_that_cannot_be_is_refused_and_none_of_its_job_runs(thread):
    async def ask() -> None:
        with pytest.raises(ValueError, match="the model's context holds 256"):
            async with thread.answering([Request("Ada"), Request("a " * 300)]):
                pytest.fail("it was taken")
        assert await read(thread, Request("Ada", 12)) == alone("Ada")
        assert thread.n_open == 0

    asyncio.run(ask())


def test_a_crash_in_the_engine_is_told_to_all_and_a_new_engine_goes_on(thread, caplog):
    async def ask() -> None:
        engine = thread._engine
        n_steps = 0

        def crash(*_: object) -> None:
            nonlocal n_steps
            n_steps += 1
            raise RuntimeError("a secret of the machine")

        async with thread.answering([Request("Ada", 200)]) as first:
            await first.news()
            async with thread.answering([Request("Ben", 200)]) as second:
                engine.step = crash
                for job in (first, second):
                    with pytest.raises(
                        ApiError, match=r"The engine failed \(RuntimeError\)"
                    ) as told:
                        async for _ in job.updates():
                            pass
                    assert (told.value.status, told.value.code) == (500, "engine_failure")
                    assert "secret" not in told.value.message
        assert n_steps == 1
        assert await read(thread, Request("Ada", 12)) == alone("Ada")
        assert thread._engine is not engine

    asyncio.run(ask())
    assert "a secret of the machine" in caplog.text


def test_an_engine_that_cannot_be_made_again_is_tried_for_each_request(caplog):
    engines = [Engine(MODEL, TOKENIZER)]

    def make() -> Engine:
        if not engines:
            raise MemoryError("no room for the cache")
        return engines.pop()

    thread = EngineThread(make)

    async def ask() -> None:
        thread._engine.step = lambda: 1 / 0
        for name in ("ZeroDivisionError", "MemoryError", "MemoryError"):
            with pytest.raises(ApiError, match=f"The engine failed .{name}."):
                await read(thread, Request("Ada", 5))
        engines.append(Engine(MODEL, TOKENIZER))
        assert await read(thread, Request("Ada", 12)) == alone("Ada")

    asyncio.run(ask())
    thread.close()


def test_a_row_that_breaks_is_told_and_its_neighbours_go_on():
    model = small_llama(max_seq_len=256)
    poison = TOKENIZER.encode("k")[-1]
    with torch.no_grad():
        model.tok_embeddings.weight[poison] = torch.nan
    thread = EngineThread(lambda: Engine(model, TOKENIZER, rows=4))

    async def ask() -> tuple[str, int]:
        engine = thread._engine
        async with thread.answering([Request("Ada", 30)]) as healthy:
            await healthy.news()
            with pytest.raises(ApiError, match="logits are no numbers") as told:
                await read(thread, Request([1, poison], 5))
            assert thread._engine is engine
            text = "".join([update.text async for update in healthy.updates()])
            (ticket,) = healthy.tickets
            assert ticket.completion().text.endswith(text)
            return ticket.completion().text, told.value.status

    expected = alone("Ada", max_new_tokens=30)
    assert "k" not in expected  # the healthy row never reads the broken embedding
    assert asyncio.run(ask()) == (expected, 500)
    thread.close()


def test_at_the_end_whoever_waits_is_told(thread):
    async def ask() -> None:
        async with thread.answering([Request("Ada", 200)] * 9) as job:
            await job.news()
            thread.interrupt(ApiError(503, "Closing", "closing"))
            with pytest.raises(ApiError, match="Closing"):
                async for _ in job.updates():
                    pass
        assert await read(thread, Request("Ada", 12)) == alone("Ada")
        thread.close()
        with pytest.raises(ApiError, match="shutting down") as told:
            await read(thread, Request("Ada", 12))
        assert told.value.status == 503

    asyncio.run(ask())


def test_a_format_or_length_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"needs the piece <\|im_end\|>"):
        serve_model("small", MODEL, TOKENIZER, chat_format="chatml")
    (model,) = serve_model("small", MODEL, TOKENIZER, max_len=40)
    assert model.card()["context"] == 40
    model.thread.close()


@pytest.mark.parametrize("text", ["Ada", " boat", "\n", "é", "🦙"])
def test_the_text_of_a_token_in_the_middle_of_a_text(text):
    ids = TOKENIZER.encode("a" + text)[len(TOKENIZER.encode("a")) :]
    said = [text_of(TOKENIZER, i) for i in ids]
    if text.isascii():
        assert "".join(said) == text
    else:
        assert said == ["\ufffd"] * len(text.encode())
