import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NAMES, small_llama, small_tokenizer
from torch.testing import assert_close

from minillama.config import Sampling
from minillama.generation import Completion, generate, sample, stream
from minillama.model import Llama
from minillama.tokenizer import StreamDecoder

MODEL, TOKENIZER = small_llama(), small_tokenizer()
PROMPTS = st.text(alphabet="Ada3 日🦙", max_size=12)


@torch.inference_mode()
def without_cache(prompt: str, limit: int, sampling=None, seed=0, model=MODEL) -> Completion:
    """The definition: the whole text goes through the model for each token."""
    generator = torch.Generator().manual_seed(seed)
    ids, new = TOKENIZER.encode(prompt, bos=True), []
    while len(new) < limit and len(ids) + len(new) < model.config.max_seq_len:
        logits = model(torch.tensor([ids + new]))[0, -1]
        token = sample(logits, sampling or Sampling(), generator)
        if token == TOKENIZER.eos_id:
            return Completion(text_of(ids, new), new, "stop")
        new.append(token)
    return Completion(text_of(ids, new), new, "length")


def text_of(ids: list[int], new: list[int]) -> str:
    """The text of the new ids, as it goes on behind that of the others."""
    before = StreamDecoder(TOKENIZER)
    for token in ids:
        before.push(token)
    return "".join(map(before.push, new)) + before.flush()


class Scripted(Llama):
    """A model that says what it is told: token i of the script behind i tokens."""

    def __init__(self, script: list[int], n_prompt: int, max_seq_len: int = 64) -> None:
        super().__init__(small_llama(max_seq_len=max_seq_len).config)
        self.requires_grad_(False)
        self.script = [0] * n_prompt + script
        # The hidden state says which token comes next, in base 20; the head reads it off.
        digits = torch.arange(300)
        one_hot = torch.nn.functional.one_hot
        code = torch.cat([one_hot(digits // 20, 15), one_hot(digits % 20, 20)], dim=1)
        self.output = torch.nn.Linear(35, 300, bias=False)
        self.output.weight = torch.nn.Parameter(code.float(), requires_grad=False)

    def hidden(self, tokens, cache=None):
        starts = cache.lengths if cache else [0] * len(tokens)
        seq = tokens.shape[1]
        if cache:
            cache.advance(seq)
        code = self.output.weight
        rows = [[self.script[start + i + 1] for i in range(seq)] for start in starts]
        return code[torch.tensor(rows)]


def say(text: str, **settings) -> Completion:
    """What generate makes of a model that writes `text` behind the prompt "Ada", then EOS."""
    return generate(model_that_says(text), TOKENIZER, "Ada", **settings)[0]


def model_that_says(text: str) -> Scripted:
    prompt = TOKENIZER.encode("Ada", bos=True)
    whole = TOKENIZER.encode("Ada" + text, bos=True)
    assert whole[: len(prompt)] == prompt
    return Scripted([*whole[len(prompt) :], TOKENIZER.eos_id], len(prompt))


# --- One prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "Ada", "Ada had 3 of these", "日本 🦙"])
def test_greedy_is_argmax_without_a_cache(prompt):
    (completion,) = generate(MODEL, TOKENIZER, prompt, max_new_tokens=30)
    assert completion == without_cache(prompt, 30)


@given(prompt=PROMPTS, limit=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=15)
def test_sampling_is_the_same_with_and_without_a_cache(prompt, limit, seed):
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.95)
    (completion,) = generate(
        MODEL, TOKENIZER, prompt, limit, temperature=0.8, top_k=50, top_p=0.95, seed=seed
    )
    assert completion == without_cache(prompt, limit, sampling, seed)


def test_the_end_of_the_text_is_no_part_of_it():
    completion = say(" had a kite.")
    assert completion.text == " had a kite."
    assert completion.finish_reason == "stop"
    assert TOKENIZER.eos_id not in completion.token_ids
    assert TOKENIZER.decode(TOKENIZER.encode("Ada") + completion.token_ids) == "Ada had a kite."


def test_the_first_space_of_the_answer_stays():
    assert say(" had").text == " had"
    assert generate(model_that_says(""), TOKENIZER, "Ada")[0].text == ""


@pytest.mark.parametrize("n", [1, 2, 5])
def test_max_new_tokens(n):
    completion = say(" had a kite.", max_new_tokens=n)
    assert (len(completion.token_ids), completion.finish_reason) == (n, "length")


def test_the_last_token_may_be_the_last_one_allowed():
    n = len(say(" had a kite.").token_ids)
    assert say(" had a kite.", max_new_tokens=n).finish_reason == "length"
    assert say(" had a kite.", max_new_tokens=n + 1).finish_reason == "stop"


@pytest.mark.parametrize("n_prompt", [1, 5, 15])
def test_a_full_context_ends_the_text(n_prompt):
    model = Scripted([10] * 16, n_prompt, max_seq_len=16)
    (completion,) = generate(model, TOKENIZER, "\x00" * (n_prompt - 2) if n_prompt > 1 else "")
    assert (len(completion.token_ids), completion.finish_reason) == (16 - n_prompt, "length")


# --- Many prompts --------------------------------------------------------------------------------


def test_rows_of_one_batch_end_at_different_times_and_for_different_reasons():
    prompts = [*NAMES, "", "x" * 40, "日本"]
    batch = generate(MODEL, TOKENIZER, prompts, 40, temperature=1.0, seed=3, stop=["the"])
    lengths = {len(completion.token_ids) for completion in batch}
    assert len(lengths) > 2
    assert {completion.finish_reason for completion in batch} == {"stop", "length"}
    for prompt, completion in zip(prompts, batch, strict=True):
        alone = generate(MODEL, TOKENIZER, prompt, 40, temperature=1.0, seed=3, stop=["the"])
        assert [completion] == alone


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=5),
    limit=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    stop=st.lists(st.sampled_from(["a", "e", "the", "\x05", "�"]), max_size=2),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_a_batch_gives_what_each_prompt_gives_alone(prompts, limit, temperature, stop, seed):
    sampling = {"temperature": temperature, "max_new_tokens": limit, "stop": stop}
    seeds = [seed + i for i in range(len(prompts))]
    batch = generate(MODEL, TOKENIZER, prompts, seed=seeds, **sampling, logprobs=True)
    for prompt, own_seed, completion in zip(prompts, seeds, batch, strict=True):
        (alone,) = generate(MODEL, TOKENIZER, prompt, seed=own_seed, **sampling, logprobs=True)
        assert completion.text == alone.text
        assert completion.token_ids == alone.token_ids
        assert completion.finish_reason == alone.finish_reason
        assert_close(completion.logprobs, alone.logprobs, rtol=1e-4, atol=1e-4)


def test_no_prompts_no_completions():
    assert generate(MODEL, TOKENIZER, []) == []


# --- Seeds ---------------------------------------------------------------------------------------


def drawn(prompts, **arguments) -> list[list[int]]:
    completions = generate(MODEL, TOKENIZER, prompts, 20, temperature=1.0, **arguments)
    return [completion.token_ids for completion in completions]


def test_one_seed_serves_every_prompt():
    assert drawn(["Ada", "Ada"], seed=5) == [drawn("Ada", seed=5)[0]] * 2


def test_a_seed_for_each():
    one, two, three = drawn(["Ada"] * 3, seed=[5, 6, 5])
    assert one == three != two
    assert drawn("Ada", seed=6) == [two]


def test_without_a_seed_every_draw_is_fresh():
    one, two = drawn(["Ada", "Ada"])
    assert one != two
    assert drawn("Ada") != drawn("Ada")


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    random.seed(0)
    first = drawn("Ada", seed=1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert drawn("Ada", seed=1) == first


@pytest.mark.parametrize("seed", [[1], [1, 2, 3], []])
def test_as_many_seeds_as_prompts(seed):
    with pytest.raises(ValueError, match=rf"2 prompts, but {len(seed)} seeds: give one each"):
        generate(MODEL, TOKENIZER, ["a", "b"], seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}, but must be at least 0"):
        generate(MODEL, TOKENIZER, "a", seed=seed)
    generate(MODEL, TOKENIZER, "a", max_new_tokens=1, seed=2**63 - 1)


# --- Stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("kite", " had a "),
        (["lamp", "a ki"], " had "),
        (["."], " had a kite"),
        ([" had"], ""),
        (["Ada"], " had a kite."),  # it stands in the prompt, not in the answer
        (["kites"], " had a kite."),
        (["e.", "kite."], " had a "),
    ],
)
def test_the_text_ends_before_a_stop_string(stop, text):
    completion = say(" had a kite.", stop=stop)
    assert completion.text == text
    assert completion.finish_reason == "stop"


def test_a_stop_string_that_is_complete_with_the_last_token():
    n = len(say(" had a kite.").token_ids)
    completion = say(" had a kite.", stop="kite.", max_new_tokens=n)
    assert (completion.text, completion.finish_reason) == (" had a ", "stop")


def test_a_stop_string_that_is_begun_at_the_end_is_text():
    completion = say(" had a kite.", stop="kite. The")
    assert (completion.text, completion.finish_reason) == (" had a kite.", "stop")
    completion = say(" had a kite.", stop="kite. The", max_new_tokens=8)
    assert completion.finish_reason == "length"
    assert " had a kite.".startswith(completion.text)


def test_generation_goes_no_further_than_the_stop_string():
    completion = say(" had a kite. The end.", stop="kite")
    assert "The end" not in TOKENIZER.decode(completion.token_ids)


@given(stop=st.text("Ada hk", min_size=1, max_size=3), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=12)
def test_stopping_is_cutting_what_would_have_been_written(stop, seed):
    whole = generate(MODEL, TOKENIZER, "Ada", 40, temperature=1.0, seed=seed)[0]
    completion = generate(MODEL, TOKENIZER, "Ada", 40, temperature=1.0, seed=seed, stop=stop)[0]
    assert completion.text == whole.text.partition(stop)[0]
    assert whole.token_ids[: len(completion.token_ids)] == completion.token_ids


# --- Streaming -----------------------------------------------------------------------------------


@given(
    prompt=PROMPTS,
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.lists(st.sampled_from(["a", "th", "the", "\n"]), max_size=2),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_the_pieces_of_a_stream_are_the_text(prompt, temperature, stop, seed):
    arguments = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, "stop": stop}
    (completion,) = generate(MODEL, TOKENIZER, prompt, **arguments)
    assert "".join(stream(MODEL, TOKENIZER, prompt, **arguments)) == completion.text


def test_no_piece_holds_half_a_character():
    """Kanji and emoji are spelled in bytes here: three and four tokens each."""
    text = " 日本の🦙です🏳️‍🌈."
    assert len(TOKENIZER.encode(text)) > 30
    pieces = [piece for piece in stream(model_that_says(text), TOKENIZER, "Ada") if piece]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert "🦙" in pieces
    assert len(pieces) > 8  # they come one by one, not all at the end


def test_a_character_that_is_cut_off_is_told_at_the_end():
    assert say("🦙", max_new_tokens=3).text == "���"
    assert "".join(stream(model_that_says("🦙"), TOKENIZER, "Ada", 3)) == "���"


def test_a_piece_comes_as_soon_as_it_is_certain():
    model = model_that_says(" had a kite.")
    calls = 0
    hidden = model.hidden

    def counted(tokens, cache=None):
        nonlocal calls
        calls += 1
        return hidden(tokens, cache)

    model.hidden = counted
    pieces = stream(model, TOKENIZER, "Ada")
    assert calls == 0
    while not next(pieces):
        pass
    assert calls < 3  # the prompt and at most one token more


def test_a_stream_can_be_left():
    pieces = stream(MODEL, TOKENIZER, "Ada")
    next(pieces)
    pieces.close()
    with pytest.raises(StopIteration):
        next(pieces)


def test_a_stream_leaves_gradients_to_its_reader():
    for _ in stream(MODEL, TOKENIZER, "Ada", 3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


# --- Log-probabilities ---------------------------------------------------------------------------


@torch.inference_mode()
def test_logprobs_are_those_of_the_model_itself():
    """Before temperature, top-k and top-p."""
    (completion,) = generate(
        MODEL, TOKENIZER, "Ada", 20, temperature=1.3, top_p=0.9, top_k=40, seed=1, logprobs=True
    )
    prompt = TOKENIZER.encode("Ada", bos=True)
    ids = torch.tensor([prompt + completion.token_ids])
    log_p = MODEL(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert len(completion.logprobs) == len(completion.token_ids) == 20
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_logprobs_come_on_request_only():
    assert generate(MODEL, TOKENIZER, "Ada", 3)[0].logprobs is None


# --- What cannot be ------------------------------------------------------------------------------

GENERATORS = pytest.mark.parametrize("function", [generate, stream])


@GENERATORS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "\x00" * 62}, r"prompt has 64 tokens, .* context holds 64, .* less than 64"),
        ({"prompt": "\x00" * 100}, "prompt has 102 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"stop": ["x", ""]}, "stop string is empty"),
        ({"stop": ""}, "stop string is empty"),
        ({"tokenizer": small_tokenizer(320)}, "tokenizer has 320 tokens and the model 300"),
        ({"tokenizer": small_tokenizer(295)}, "tokenizer has 295 tokens and the model 300"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_token(function, arguments, message):
    arguments = {"tokenizer": TOKENIZER, "prompt": "Ada"} | arguments
    tokenizer, prompt = arguments.pop("tokenizer"), arguments.pop("prompt")
    with pytest.raises(ValueError, match=message):
        function(MODEL, tokenizer, prompt, **arguments)


def test_the_longest_prompt_that_leaves_room():
    (completion,) = generate(MODEL, TOKENIZER, "\x00" * 61)
    assert len(completion.token_ids) <= 1


def test_one_bad_prompt_among_many_is_refused():
    with pytest.raises(ValueError, match="prompt has 102 tokens"):
        generate(MODEL, TOKENIZER, ["Ada", "\x00" * 100])
