import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NAMES, small_llama, small_tokenizer
from torch.testing import assert_close

from minillama.config import Sampling
from minillama.generation import Completion, Decoder, Engine, Request, generate, sample, stream
from minillama.generation import engine as engine_module
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
        token = sample(logits, sampling or Sampling(), generator, ids + new)
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


@given(prompt=PROMPTS, limit=st.sampled_from([1, 10, 25, 70]), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=8)
def test_sampling_is_the_same_with_and_without_a_cache(prompt, limit, seed):
    how = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    (completion,) = generate(MODEL, TOKENIZER, prompt, limit, seed=seed, **how)
    assert completion == without_cache(prompt, limit, Sampling(**how), seed)


def test_the_end_of_the_text_is_no_part_of_it():
    completion = say(" had a kite.")
    assert completion.text == " had a kite."
    assert completion.finish_reason == "stop"
    assert TOKENIZER.eos_id not in completion.token_ids
    assert TOKENIZER.decode(TOKENIZER.encode("Ada") + completion.token_ids) == "Ada had a kite."


def test_other_ids_than_eos_may_end_the_text():
    """A chat's answer ends with a piece of its format, and EOS is then an id as any other."""
    ids = say(" had a kite.").token_ids

    def written(end_ids):
        engine = Engine(model_that_says(" had a kite."), TOKENIZER, rows=1)
        ticket = engine.submit(Request("Ada", 20, end_ids=end_ids))
        while engine.busy and ticket.finish_reason is None:
            engine.step()
            if len(ticket.token_ids) > len(ids):
                engine.cancel(ticket)
        return ticket.completion()

    assert written(None) == written((TOKENIZER.eos_id,)) == say(" had a kite.")
    cut = written((ids[2], TOKENIZER.eos_id))
    assert cut.finish_reason == "stop"
    assert cut.token_ids == ids[:2]
    assert written(()).token_ids == [*ids, TOKENIZER.eos_id]


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
    batch = generate(MODEL, TOKENIZER, prompts, 25, temperature=1.0, seed=3, stop=["the"])
    lengths = {len(completion.token_ids) for completion in batch}
    assert len(lengths) > 2
    assert {completion.finish_reason for completion in batch} == {"stop", "length"}
    for prompt, completion in zip(prompts, batch, strict=True):
        alone = generate(MODEL, TOKENIZER, prompt, 25, temperature=1.0, seed=3, stop=["the"])
        assert [completion] == alone


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=5),
    limit=st.integers(1, 16),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    stop=st.lists(st.sampled_from(["a", "e", "the", "\x05", "�"]), max_size=2),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=8)
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
    assert generate(MODEL, TOKENIZER, [], temperature=[], stop=[]) == []


def test_every_setting_is_one_for_all_or_one_for_each():
    each = {
        "max_new_tokens": [3, 12, 12, 12],
        "temperature": [0.0, 0.8, 1.2, 1.0],
        "top_k": [None, 5, None, 50],
        "top_p": [None, None, 0.8, 0.9],
        "min_p": [None, 0.1, 0.02, None],
        "repetition_penalty": [1.3, 1.0, 1.2, 1.0],
        "seed": [None, 1, 2, 3],
        "stop": ["a", [], ("t", "the"), ["e"]],
        "logprobs": [True, False, False, True],
    }
    prompts = ["Ada", "", "Ben had", [1, 20, 30]]
    batch = generate(MODEL, TOKENIZER, prompts, **each)
    for row, (prompt, completion) in enumerate(zip(prompts, batch, strict=True)):
        own = {name: values[row] for name, values in each.items()}
        (alone,) = generate(MODEL, TOKENIZER, prompt, **own)
        assert (alone.text, alone.token_ids) == (completion.text, completion.token_ids)
        assert alone.finish_reason == completion.finish_reason
        assert (completion.logprobs is None) == (not own["logprobs"])


@pytest.mark.parametrize("name", ["temperature", "max_new_tokens", "logprobs", "stop"])
def test_as_many_values_as_prompts(name):
    value = {"stop": ["a"], "logprobs": True}.get(name, 1)
    message = rf"2 prompts, but 3 values for {name}: give one each, or one for all"
    with pytest.raises(ValueError, match=message):
        generate(MODEL, TOKENIZER, ["a", "b"], **{name: [value] * 3})


@pytest.mark.usefixtures("as_users_run_it")
def test_a_string_is_no_list_of_values():
    with pytest.raises(ValueError, match=r"temperature is '0\.5', but must be a number"):
        generate(MODEL, TOKENIZER, ["a", "b"], temperature="0.5")


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_more_prompts_than_rows_wait_for_one(rows):
    prompts = [*NAMES, "", "x" * 30]
    together = generate(MODEL, TOKENIZER, prompts, 15, temperature=1.0, seed=1)
    assert generate(MODEL, TOKENIZER, prompts, 15, temperature=1.0, seed=1, rows=rows) == together


# --- Prompts as ids ------------------------------------------------------------------------------


def test_a_prompt_may_be_token_ids():
    ids = TOKENIZER.encode("Ada had", bos=True)
    of_text = generate(MODEL, TOKENIZER, "Ada had", 8)
    assert generate(MODEL, TOKENIZER, ids, 8) == of_text
    assert generate(MODEL, TOKENIZER, [ids, "Ada had", tuple(ids)], 8) == of_text * 3
    assert "".join(stream(MODEL, TOKENIZER, ids, 8)) == of_text[0].text


def test_ids_come_in_any_kind_of_list():
    ids = TOKENIZER.encode("Ada had", bos=True)
    of_text = generate(MODEL, TOKENIZER, "Ada had", 8)
    tensor = torch.tensor(ids)
    assert generate(MODEL, TOKENIZER, tensor, 8) == of_text
    assert generate(MODEL, TOKENIZER, list(tensor), 8) == of_text
    assert generate(MODEL, TOKENIZER, list(tensor.numpy()), 8) == of_text
    assert generate(MODEL, TOKENIZER, tensor.repeat(2, 1), 8) == of_text * 2
    assert generate(MODEL, TOKENIZER, [tensor, "Ada had"], 8) == of_text * 2
    assert "".join(stream(MODEL, TOKENIZER, tensor, 8)) == of_text[0].text
    engine = Engine(MODEL, TOKENIZER)
    assert engine.submit(Request(tensor)).ids == ids


def test_prompts_come_from_anything_that_gives_them():
    prompts = ["Ada", "Ben had"]
    expected = generate(MODEL, TOKENIZER, prompts, [3, 8])
    assert generate(MODEL, TOKENIZER, (prompt for prompt in prompts), [3, 8]) == expected
    assert generate(MODEL, TOKENIZER, dict.fromkeys(prompts), [3, 8]) == expected


def test_ids_are_taken_as_they_are():
    without_bos = TOKENIZER.encode("Ada")
    (completion,) = generate(MODEL, TOKENIZER, without_bos, 1, logprobs=True)
    log_p = MODEL(torch.tensor([without_bos]))[0, -1].log_softmax(-1)
    assert completion.logprobs == pytest.approx([log_p.max().item()], abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], r"prompt has no token, but a model needs one to go on from: \[1\] is BOS"),
        ([1, 300], "prompt has the token id 300, but the vocabulary has the ids 0 to 299"),
        ([1, -1], "prompt has the token id -1"),
        ([5] * 64, "prompt has 64 tokens"),
        (torch.tensor([1.5, 2.0]), r"prompt is 1\.5, but must be a text, or token ids"),
        (torch.ones(1, 1, 2).int(), r"prompt is \[\[1, 1\]\], but must be a text, or token ids"),
        (torch.tensor(3), "prompts are 3, but must be a text, token ids, or a list"),
        ([1, "Ada"], r"prompt is \[1, 'Ada'\], but must be a text, or token ids"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_ids_that_cannot_be_read(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, TOKENIZER, prompt)


class WithoutBos(type(TOKENIZER)):
    adds_bos = False


def test_the_tokenizer_says_whether_texts_start_with_bos():
    tokenizer = WithoutBos(TOKENIZER.to_bytes())
    ids = TOKENIZER.encode("Ada had")
    assert generate(MODEL, tokenizer, "Ada had", 8) == generate(MODEL, TOKENIZER, ids, 8)
    assert generate(MODEL, tokenizer, "", 8) == generate(MODEL, TOKENIZER, "", 8)


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
    with pytest.raises(
        ValueError, match=rf"2 prompts, but {len(seed)} values for seed: give one each"
    ):
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
@settings(deadline=None, max_examples=8)
def test_stopping_is_cutting_what_would_have_been_written(stop, seed):
    whole = generate(MODEL, TOKENIZER, "Ada", 20, temperature=1.0, seed=seed)[0]
    completion = generate(MODEL, TOKENIZER, "Ada", 20, temperature=1.0, seed=seed, stop=stop)[0]
    assert completion.text == whole.text.partition(stop)[0]
    assert whole.token_ids[: len(completion.token_ids)] == completion.token_ids


def test_a_stop_string_is_found_in_characters_of_several_tokens():
    """Kanji are spelled in three tokens each here."""
    text = " 日本の日本語です"
    assert say(text, stop="本語").text == " 日本の日"
    assert say(text, stop=["です", "の日本語で"]).text == " 日本"
    assert "".join(stream(model_that_says(text), TOKENIZER, "Ada", stop="本語")) == " 日本の日"


# --- Streaming -----------------------------------------------------------------------------------


@given(
    prompt=PROMPTS,
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.lists(st.sampled_from(["a", "th", "the", "\n"]), max_size=2),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=8)
def test_the_pieces_of_a_stream_are_the_text(prompt, temperature, stop, seed):
    arguments = {"max_new_tokens": 20, "temperature": temperature, "seed": seed, "stop": stop}
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


# --- The engine ----------------------------------------------------------------------------------


def run(engine: Engine, requests: list[Request]) -> list[Completion]:
    tickets = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    return [ticket.completion() for ticket in tickets]


def recorded(model: Llama) -> tuple[Llama, list[torch.Size]]:
    """A copy of the model, and the shapes of all that it reads."""
    copy, shapes = Llama(model.config).requires_grad_(False), []
    copy.load_state_dict(model.state_dict())
    hidden = copy.hidden

    def counted(tokens, cache=None):
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, cache)

    copy.hidden = counted
    return copy, shapes


SETTINGS = st.fixed_dictionaries(
    {
        "prompt": st.text(alphabet="Ada3 日", max_size=14),
        "max_new_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "seed": st.integers(0, 99),
        "stop": st.sampled_from(["a", ()]),
    }
)


@given(
    requests=st.lists(st.tuples(SETTINGS, st.integers(0, 8)), min_size=1, max_size=7),
    rows=st.integers(1, 3),
    prefill_chunk=st.integers(1, 50),
)
@settings(deadline=None, max_examples=8)
def test_whenever_requests_come_each_gets_what_it_gets_alone(requests, rows, prefill_chunk):
    engine = Engine(MODEL, TOKENIZER, rows, prefill_chunk)
    waiting = sorted(requests, key=lambda pair: pair[1])  # by the step at which they come
    tickets, step = [], 0
    while waiting or engine.busy:
        while waiting and waiting[0][1] <= step:
            how = dict(waiting.pop(0)[0])
            penalty = how.pop("repetition_penalty")
            sampling = Sampling(temperature=how.pop("temperature"), repetition_penalty=penalty)
            tickets.append(engine.submit(Request(sampling=sampling, **how)))
        engine.step()
        step += 1
    for ticket in tickets:
        (alone,) = run(Engine(MODEL, TOKENIZER, rows=1), [ticket.request])
        assert ticket.completion() == alone


@given(prefill_chunk=st.integers(1, 45), n_prompt=st.integers(1, 40))
@settings(deadline=None, max_examples=10)
def test_any_split_of_the_prompt_gives_the_same_answer(prefill_chunk, n_prompt):
    request = Request([1, *range(30, 30 + n_prompt - 1)], 6)
    whole = run(Engine(MODEL, TOKENIZER, 1), [request])
    assert run(Engine(MODEL, TOKENIZER, 1, prefill_chunk), [request]) == whole


def test_no_pass_reads_more_rows_or_tokens_than_allowed():
    model, shapes = recorded(MODEL)
    requests = [Request([1] + [40] * n, 5) for n in (3, 30, 1, 1, 1, 12, 7)]
    run(Engine(model, TOKENIZER, rows=3, prefill_chunk=10), requests)
    assert max(rows for rows, _ in shapes) == 3
    assert max(rows * seq for rows, seq in shapes) == 10
    assert (2, 2) in shapes  # short prompts are read together


def test_a_finished_row_goes_to_the_next_in_the_queue():
    model, shapes = recorded(MODEL)
    limits = [2, 9, 3, 3]  # the first, then the third, then the fourth share rows with the second
    run(Engine(model, TOKENIZER, rows=2), [Request("Ada", n) for n in limits])
    assert sum(rows for rows, seq in shapes if seq == 1) == sum(limits) - len(limits)
    assert sum(seq == 1 for _, seq in shapes) == max(limits) - 1  # nobody waited for the longest


def test_a_long_prompt_does_not_hold_up_the_others():
    engine = Engine(MODEL, TOKENIZER, rows=2, prefill_chunk=4)
    first = engine.submit(Request("Ada", 20))
    while not first.token_ids:
        engine.step()
    second = engine.submit(Request([1] + [40] * 30, 2))
    for n in range(7):
        assert engine.step() == [first]
        assert (len(first.token_ids), len(second.token_ids)) == (n + 2, 0)
    assert engine.step() == [first, second]


def test_step_tells_who_went_on():
    engine = Engine(MODEL, TOKENIZER, rows=1)
    assert engine.step() == []
    one, two = engine.submit(Request("Ada", 2)), engine.submit(Request("Ben", 1))
    assert engine.busy
    assert [engine.step() for _ in range(2)] == [[one], [one, two]]
    assert not engine.busy


def test_a_ticket_is_read_while_it_goes_on():
    engine = Engine(MODEL, TOKENIZER)
    ticket, pieces = engine.submit(Request("Ada", 12)), []
    with pytest.raises(ValueError, match=r"has 0 tokens and is not complete: call .* step\(\)"):
        ticket.completion()
    while engine.busy:
        engine.step()
        pieces.append(ticket.read())
    assert (
        "".join(pieces) == ticket.completion().text == generate(MODEL, TOKENIZER, "Ada", 12)[0].text
    )
    assert ticket.read() == ""
    assert len(pieces) == 12


def test_cancelling_frees_the_row():
    engine = Engine(MODEL, TOKENIZER, rows=2)
    one, two, three = (engine.submit(Request(name, 20)) for name in NAMES[:3])
    for _ in range(4):
        engine.step()
    engine.cancel(one)
    assert one.finish_reason == "cancelled"
    whole = generate(MODEL, TOKENIZER, NAMES[:3], 20)
    assert one.token_ids == whole[0].token_ids[:4]
    assert whole[0].text.startswith(one.completion().text)
    while engine.busy:
        engine.step()
    assert [two.completion(), three.completion()] == whole[1:]


def test_what_waits_or_is_being_read_can_be_cancelled():
    engine = Engine(MODEL, TOKENIZER, rows=2, prefill_chunk=4)
    running = engine.submit(Request("Ada", 20))
    while not running.token_ids:
        engine.step()
    long, waiting, last = (
        engine.submit(Request(prompt, 3)) for prompt in ([1] * 20, "Clara", "Emil")
    )
    engine.step()
    engine.cancel(waiting)
    engine.cancel(long)
    engine.cancel(long)
    assert (waiting.token_ids, long.token_ids) == ([], [])
    while engine.busy:
        engine.step()
    (ada, emil) = generate(MODEL, TOKENIZER, ["Ada", "Emil"], [20, 3])
    assert (running.completion(), last.completion()) == (ada, emil)
    engine.cancel(last)
    assert last.finish_reason == "length"


def test_the_room_can_be_less_than_the_context():
    engine = Engine(MODEL, TOKENIZER, max_len=10)
    (completion,) = run(engine, [Request([1, 40, 41, 42])])
    assert (len(completion.token_ids), completion.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="prompt has 10 tokens, but the model's context holds 10"):
        engine.submit(Request([1] * 10))


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("prefill_chunk", 0), ("max_len", -1)])
def test_an_engine_without_room(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be at least 1"):
        Engine(MODEL, TOKENIZER, **{name: value})


# --- Logits that are no numbers ------------------------------------------------------------------


def poisoned(value: float) -> Llama:
    """A model that knows one token, 250, by an embedding that is no number."""
    model = Llama(MODEL.config).requires_grad_(False)
    model.load_state_dict(MODEL.state_dict())
    model.tok_embeddings.weight[250] = value
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(value, temperature):
    with pytest.raises(ValueError, match=r"logits are no numbers .* in 1 of 2 rows.*float32"):
        generate(poisoned(value), TOKENIZER, ["Ada", [1, 250]], temperature=temperature, seed=0)


@pytest.mark.parametrize("rows", [2, 3])
def test_the_neighbours_of_a_broken_row_do_not_notice(rows):
    engine = Engine(poisoned(torch.nan), TOKENIZER, rows=rows)
    # The third takes the row of the second, and stands beside a longer text.
    prompts = [[1, *range(30, 50)], [1, 40, 41, 42, 250], "Ada", "Ben"]
    tickets = [engine.submit(Request(prompt, 12)) for prompt in prompts]
    with pytest.raises(ValueError, match="no numbers"):
        engine.step()
    while engine.busy:
        engine.step()
    assert tickets[1].finish_reason == "error"
    sound = generate(MODEL, TOKENIZER, [*prompts[:1], *prompts[2:]], 12)
    assert [tickets[i].completion() for i in (0, 2, 3)] == sound


# --- Rows that remember ---------------------------------------------------------------------------


@pytest.fixture
def all_is_kept(monkeypatch):
    monkeypatch.setattr(engine_module, "WORTH_KEEPING", 1)


@pytest.fixture
def read(monkeypatch) -> list[list[list[int]]]:
    """The chunks of prompts that are read: of each pass those of all rows."""
    passes = []
    prefill = Decoder.prefill

    def counted(self, first, ids):
        passes.append([list(row) for row in ids])
        return prefill(self, first, ids)

    monkeypatch.setattr(Decoder, "prefill", counted)
    return passes


def answers(engine: Engine, prompts: list[list[int]], limit: int = 6) -> list[list[int]]:
    """Each prompt continued after the one before has ended."""
    found = []
    for prompt in prompts:
        ticket = engine.submit(Request(prompt, limit))
        while engine.busy:
            engine.step()
        found.append(ticket.token_ids)
    return found


@given(
    prompts=st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=20), min_size=2, max_size=9),
    steps=st.lists(st.integers(0, 6), min_size=9, max_size=9),
    rows=st.integers(1, 4),
    chunk=st.sampled_from([1, 4, 512]),
)
@settings(max_examples=60)
def test_what_was_read_before_changes_no_answer(prompts, steps, rows, chunk):
    engine = Engine(MODEL, TOKENIZER, rows, chunk, keep=True)
    alone = [answers(Engine(MODEL, TOKENIZER, 1, chunk), [prompt])[0] for prompt in prompts]
    tickets = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WORTH_KEEPING", 1)
        for prompt, n_steps in zip(prompts, steps, strict=False):  # they come at any time
            tickets.append(engine.submit(Request(prompt, 6)))
            for _ in range(n_steps):
                engine.step()
        while engine.busy:
            engine.step()
    assert [ticket.token_ids for ticket in tickets] == alone


def test_only_what_is_new_is_read(all_is_kept, read):
    engine, prompt = Engine(MODEL, TOKENIZER, 1, keep=True), [5, 6, 7, 8]
    (answer,) = answers(engine, [prompt])
    longer = [*prompt, *answer, 9, 10]
    answers(engine, [longer, longer, [5, 6, 9], [4]])
    # The last token of an answer was drawn and never read; that of a prompt gives the logits.
    assert read == [[prompt], [[answer[-1], 9, 10]], [[10]], [[9]], [[4]]]


def test_each_of_many_dialogues_goes_on_in_its_row(all_is_kept, read):
    engine, talks = Engine(MODEL, TOKENIZER, 3, keep=True), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    n_kept = []
    for _turn in range(3):
        tickets = [engine.submit(Request(talk, 4)) for talk in talks]
        while engine.busy:
            engine.step()
        n_kept.append([ticket.n_kept for ticket in tickets])
        talks = [[*ticket.ids, 20] for ticket in tickets]
    assert n_kept == [[0, 0, 0], [6, 5, 7], [11, 10, 12]]
    assert sum(len(row) for each in read for row in each) == 9 + 2 * 3 * 2
    answers(engine, [[30, 31]])  # in the row that was left first
    tickets = []
    for talk in talks[::-1]:
        tickets.append(engine.submit(Request(talk, 4)))
        while engine.busy:
            engine.step()
    assert [ticket.n_kept for ticket in tickets] == [17, 15, 0]


def test_a_beginning_that_many_share_is_read_once(read):
    engine, system = Engine(MODEL, TOKENIZER, 4, keep=True), list(range(5, 25))
    first = engine.submit(Request([*system, 30], 20))
    engine.step()
    others = [engine.submit(Request([*system, 31 + i], 6)) for i in range(3)]
    while engine.busy:  # copied from a row that is still running
        engine.step()
    assert read == [[[*system, 30]], [[31]], [[32]], [[33]]]
    assert [ticket.n_kept for ticket in (first, *others)] == [0, 20, 20, 20]
    prompts = [[*system, 30], *([*system, 31 + i] for i in range(3))]
    expected = answers(Engine(MODEL, TOKENIZER, 1), prompts[:1], 20)
    expected += answers(Engine(MODEL, TOKENIZER, 1), prompts[1:], 6)
    assert [ticket.token_ids for ticket in (first, *others)] == expected
    # A new dialogue does not take the row of one that only begins as it does.
    long = [*system, *range(40, 61)]
    read.clear()
    answers(engine, [long, [*system, 34], [*long, 7]], 2)
    assert read == [[long[20:]], [[34]], [[7]]]


def test_short_prompts_are_read_together_though_they_begin_alike(read):
    engine, prompts = Engine(MODEL, TOKENIZER, 4, keep=True), [[*range(5, 20), i] for i in range(4)]
    answers(engine, prompts[:1])
    for prompt in prompts:
        engine.submit(Request(prompt, 6))
    while engine.busy:
        engine.step()
    assert read == [prompts[:1], prompts]


def test_a_cancelled_request_leaves_no_trace(all_is_kept):
    engine, prompt = Engine(MODEL, TOKENIZER, 1, prefill_chunk=4, keep=True), [5, 6, 7, 8, 9, 10]
    for n_steps in (1, 2, 4):  # half a prompt is read; it is read; the answer has begun
        ticket = engine.submit(Request([*prompt, n_steps + 20], 6))
        for _ in range(n_steps):
            engine.step()
        engine.cancel(ticket)
        assert answers(engine, [prompt]) == answers(Engine(MODEL, TOKENIZER, 1), [prompt])
    other = engine.submit(Request(prompt[::-1], 6))
    engine.step()  # half of it stands where `prompt` stood
    engine.cancel(other)
    assert answers(engine, [prompt]) == answers(Engine(MODEL, TOKENIZER, 1), [prompt])


def test_what_was_no_number_is_not_kept(all_is_kept):
    broken = small_llama()
    engine = Engine(broken, TOKENIZER, 1, keep=True)
    weight = broken.layers[0].attention.wv.weight
    sound = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="are no numbers"):
        answers(engine, [[5, 6, 7]])
    weight.copy_(sound)
    assert answers(engine, [[5, 6, 7]]) == answers(Engine(MODEL, TOKENIZER, 1), [[5, 6, 7]])


def test_a_draft_and_rows_that_remember_do_not_go_together():
    with pytest.raises(ValueError, match="A draft and keep do not go together"):
        Engine(MODEL, TOKENIZER, draft=MODEL, keep=True)
