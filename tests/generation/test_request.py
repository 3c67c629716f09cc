import math

import pytest
import torch
from small import small_tokenizer

from minillama.generation import Request, Ticket
from minillama.tokenizer import Tokenizer

TOKENIZER = small_tokenizer()
LOGITS = torch.zeros(300)
TEXTS = [
    "日本語のモデルは🦙です。",
    "👩‍👩‍👧‍👦 と 🏳️‍🌈、👍🏽!",
    "naïve café — Ω≈ç√∫ and Ada",
    "  two  spaces\n\n\tand 3 lines\n",
]


def pieces_of(ids: list[int], n_prompt: int, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """What a reader sees who looks after every token behind the prompt."""
    request = Request(ids[:n_prompt], max_new_tokens=1000)
    ticket = Ticket(request, tokenizer, context=10_000)
    logits = LOGITS.new_zeros(tokenizer.vocab_size)
    pieces = []
    for token in ids[n_prompt:]:
        ticket.take(token, logits)
        pieces.append(ticket.read())
    ticket.take(tokenizer.eos_id, logits)
    pieces.append(ticket.read())
    assert "".join(pieces) == ticket.completion().text
    return pieces


def complete(ids: list[int], tokenizer: Tokenizer) -> str:
    """The characters that these ids spell to the end."""
    decoder = tokenizer.decoder()
    return "".join(map(decoder.push, ids))


def check_every_cut(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, bos=True)
    for n_prompt in range(1, len(ids)):
        pieces = pieces_of(ids, n_prompt, tokenizer)
        assert complete(ids[:n_prompt], tokenizer) + "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_wherever_the_answer_begins_no_piece_holds_half_a_character(text):
    check_every_cut(text, TOKENIZER)


def test_the_same_with_the_tokenizer_of_llama_2(assets):
    tokenizer = Tokenizer(assets / "llama2" / "tokenizer.model")
    for text in TEXTS:
        check_every_cut(text, tokenizer)


def test_a_character_comes_with_its_last_byte():
    ids = TOKENIZER.encode("a🦙b", bos=True)
    assert pieces_of(ids, 1)[-6:] == ["", "", "", "🦙", "b", ""]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bytes_that_spell_nothing_are_told_at_the_end(n):
    ids = TOKENIZER.encode("a🦙", bos=True)[: -4 + n]
    assert pieces_of(ids, 1)[-1] == "\ufffd" * n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"max_new_tokens": 5.5}, r"max_new_tokens is 5\.5, but must be a whole number"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"seed": 1.5}, r"seed is 1\.5, but must be a whole number"),
        ({"stop": ["a", ""]}, "stop string is empty"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_request_that_means_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        Request("Ada", **settings)


def test_the_likeliest_tokens_of_each_place_are_kept_with_their_logprobs():
    ticket = Ticket(Request("Ada", logprobs=True, top_logprobs=2), TOKENIZER, context=100)
    logits = torch.full((300,), -torch.inf)
    logits[[270, 280, 290]] = torch.tensor([0.5, 0.25, 0.25]).log()
    ticket.take(290, logits + 3)  # logits are probabilities up to a factor
    (top,) = ticket.top_logprobs
    assert [i for i, _ in top] == [270, 280]
    assert [logprob for _, logprob in top] == pytest.approx([math.log(0.5), math.log(0.25)])
    assert ticket.logprobs == pytest.approx([math.log(0.25)])


def test_fewer_than_no_likeliest_tokens():
    with pytest.raises(ValueError, match="top_logprobs is -1, but must be at least 0"):
        Request("Ada", top_logprobs=-1)


@pytest.mark.parametrize(
    ("stop", "with_space", "without"), [(" ", "", "b"), ("\n", " ", "b c"), ("b", " \n ", "")]
)
def test_stop_strings_are_not_found_in_the_white_space_that_is_left_out(stop, with_space, without):
    prompt, ids = [1], TOKENIZER.encode(" \n b c\n", bos=False)
    texts = []
    for lstrip in (False, True):
        ticket = Ticket(Request(prompt, 100, stop=stop, lstrip=lstrip), TOKENIZER, 1000)
        for token in ids:
            if ticket.finish_reason is None:
                ticket.take(token, LOGITS)
        assert ticket.finish_reason == "stop"
        texts.append(ticket.completion().text)
    assert texts == [with_space, without]


def test_an_answer_of_white_space_alone_is_empty():
    ticket = Ticket(Request([1], 100, lstrip=True), TOKENIZER, 1000)
    for token in TOKENIZER.encode(" \n ", bos=False):
        ticket.take(token, LOGITS)
    ticket.end("stop")
    assert ticket.completion().text == ""
