from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_config, small_llama, small_tokenizer

from minillama.config import Sampling
from minillama.generation import Engine, Request, generate, stream, verify
from minillama.generation.sampling import distribution, draw
from minillama.model import Llama

MODEL, TOKENIZER = small_llama(), small_tokenizer()


def related(noise: float, seed: int = 1) -> Llama:
    """A draft: the model with noise on its weights. Without noise it is always right."""
    draft = small_llama()
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


DRAFTS = {
    "the same": MODEL,
    "a relative": related(0.03),
    "a stranger": small_llama(seed=5, n_layers=1, dim=16, hidden_dim=32),
}


def chi_square(counts: Counter, expected: dict, n: int) -> float:
    assert counts.keys() <= expected.keys()
    return sum((counts[x] - n * p) ** 2 / (n * p) for x, p in expected.items())


# --- One round, on distributions small enough to count -------------------------------------------

P1, Q1 = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
P2 = torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4]])  # behind each first token
Q2 = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
PLAIN = Sampling(temperature=1.0)


def test_what_comes_out_is_distributed_as_the_target_says():
    """The first two tokens: 8 degrees of freedom, so 26.1 is exceeded once in a thousand times."""
    generator, n, counts, accepted = torch.Generator().manual_seed(0), 4000, Counter(), 0
    for _ in range(n):
        first = draw(Q1, generator)
        proposed = [first, draw(Q2[first], generator)]
        logits = torch.stack([P1, P2[proposed[0]], torch.ones(3) / 3]).log()
        tokens = verify(proposed, [Q1, Q2[first]], logits, PLAIN, generator)
        accepted += len(tokens) > 1
        if len(tokens) == 1:  # the next round begins behind the replacement
            tokens.append(draw(P2[tokens[0]], generator))
        counts[tuple(tokens[:2])] += 1
    exact = {(a, b): float(P1[a] * P2[a, b]) for a, b in product(range(3), repeat=2)}
    assert chi_square(counts, exact, n) < 26.1
    # A proposal stands with probability sum(min(p, q)) = 0.2 + 0.3 + 0.1.
    assert abs(accepted / n - 0.6) < 4 * (0.6 * 0.4 / n) ** 0.5


@pytest.mark.parametrize("proposed", [[], [0], [0, 1], [1, 2, 0]])
def test_a_proposal_that_the_target_would_draw_anyway_stands(proposed):
    logits = torch.full((len(proposed) + 1, 3), -1e9)
    for i, token in enumerate([*proposed, 2]):
        logits[i, token] = 0
    certain = [torch.eye(3)[token] for token in proposed]
    generator = torch.Generator()
    assert verify(proposed, certain, logits, PLAIN, generator) == [*proposed, 2]
    assert verify(proposed, [], logits, Sampling(), generator) == [*proposed, 2]


def test_what_follows_a_rejected_proposal_is_dropped():
    logits = torch.tensor([[0, 5.0, 0], [0, 0, 5.0], [5.0, 0, 0]])
    assert verify([1, 0], [], logits, Sampling(), torch.Generator()) == [1, 2]
    assert verify([0, 2], [], logits, Sampling(), torch.Generator()) == [1]


def test_a_token_that_the_target_cuts_off_never_stands():
    top_1 = Sampling(temperature=1.0, top_k=1)
    logits = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.0]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert verify([0], [torch.tensor([0.9, 0.05, 0.05])], logits, top_1, generator) == [1]


# --- Greedy: the same text -----------------------------------------------------------------------


@given(
    prompts=st.lists(st.text(alphabet="Ada3 日", max_size=12), min_size=1, max_size=4),
    limits=st.lists(st.integers(1, 16), min_size=4, max_size=4),
    draft=st.sampled_from(list(DRAFTS.values())),
    n_draft=st.integers(1, 6),
    rows=st.integers(1, 3),
    penalty=st.sampled_from([1.0, 1.5]),
    stop=st.sampled_from([(), "a", "he"]),
)
@settings(deadline=None, max_examples=8)
def test_greedy_text_is_that_of_the_target_alone(
    prompts, limits, draft, n_draft, rows, penalty, stop
):
    how = {"max_new_tokens": limits[: len(prompts)], "repetition_penalty": penalty, "stop": stop}
    alone = generate(MODEL, TOKENIZER, prompts, **how)
    faster = generate(MODEL, TOKENIZER, prompts, **how, draft=draft, n_draft=n_draft, rows=rows)
    for one, other in zip(alone, faster, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize(("name", "n_draft"), [*zip(DRAFTS, (20, 1, 4), strict=True)])
def test_up_to_the_end_of_the_context(name, n_draft):
    model = small_llama(max_seq_len=24)
    prompts = ["Ada", [1, *[40] * 21], [1, *[40] * 22], "", [1, *[50] * 15]]
    alone = generate(model, TOKENIZER, prompts, 100)
    faster = generate(model, TOKENIZER, prompts, 100, draft=DRAFTS[name], n_draft=n_draft)
    assert [one.token_ids for one in alone] == [other.token_ids for other in faster]
    assert all(one.finish_reason == "length" for one in alone)


def test_the_text_streams_in_runs_of_tokens():
    (whole,) = generate(MODEL, TOKENIZER, "Ada", 21)
    pieces = list(stream(MODEL, TOKENIZER, "Ada", 21, draft=MODEL, n_draft=4))
    assert "".join(pieces) == whole.text
    assert len(pieces) <= 5  # one token, then five at a time


# --- Sampled: the same distribution --------------------------------------------------------------


@torch.inference_mode()
def exact(prompt: list[int], sampling: Sampling, n_tokens: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of this many tokens."""
    if n_tokens == 0:
        return {(): 1.0}
    p = distribution(MODEL(torch.tensor([prompt]))[0, -1], sampling, prompt)
    return {
        (token, *rest): p[token].item() * q
        for token in p.nonzero()[:, 0].tolist()
        for rest, q in exact([*prompt, token], sampling, n_tokens - 1).items()
    }


@pytest.mark.parametrize("name", ["a relative", "a stranger"])
def test_samples_are_distributed_as_those_of_the_target_alone(name):
    """Three tokens out of the likeliest two, the last two by speculation: at most 7 degrees of
    freedom, so 24.3 is exceeded once in a thousand times.
    """
    sampling = Sampling(temperature=2.0, top_k=2, repetition_penalty=1.1)
    prompt, n = [1, 40, 41], 600
    engine = Engine(MODEL, TOKENIZER, rows=64, max_len=12, draft=DRAFTS[name], n_draft=2)
    tickets = [engine.submit(Request(prompt, 3, sampling, seed)) for seed in range(n)]
    while engine.busy:
        engine.step()
    expected = exact(prompt, sampling, 3)
    assert TOKENIZER.eos_id not in {token for tokens in expected for token in tokens}
    assert len(expected) == 8
    counts = Counter(tuple(ticket.token_ids) for ticket in tickets)
    assert chi_square(counts, expected, n) < 24.3
    n_accepted = sum(ticket.n_accepted for ticket in tickets)
    assert n_accepted < 2 * n
    assert n_accepted > 0 or name == "a stranger"


@given(
    prompts=st.lists(st.text(alphabet="Ada3", max_size=8), min_size=2, max_size=4),
    limits=st.lists(st.integers(1, 15), min_size=4, max_size=4),
    rows=st.integers(1, 3),
)
@settings(deadline=None, max_examples=6)
def test_a_row_draws_as_it_would_alone(prompts, limits, rows):
    how = {"temperature": 1.0, "seed": 3, "draft": DRAFTS["a relative"], "n_draft": 3}
    limits = limits[: len(prompts)]
    batch = generate(MODEL, TOKENIZER, prompts, limits, **how, rows=rows)
    for prompt, limit, completion in zip(prompts, limits, batch, strict=True):
        assert generate(MODEL, TOKENIZER, prompt, limit, **how) == [completion]


# --- Acceptance ----------------------------------------------------------------------------------


def test_a_perfect_draft_saves_four_passes_of_five():
    passes = 0
    target = small_llama()
    hidden = target.hidden

    def counted(tokens, cache=None):
        nonlocal passes
        passes += 1
        return hidden(tokens, cache)

    target.hidden = counted
    (completion,) = generate(target, TOKENIZER, "Ada", 26, draft=MODEL, n_draft=4)
    assert len(completion.token_ids) == 26
    assert completion.acceptance == 1.0
    assert passes == 1 + 25 / 5  # the prompt gives the first token


def test_the_acceptance_is_that_of_the_row():
    better, worse = (
        generate(MODEL, TOKENIZER, "Ada", 30, draft=DRAFTS[name])[0].acceptance
        for name in ("a relative", "a stranger")
    )
    assert 0 <= worse < better < 1
    assert generate(MODEL, TOKENIZER, "Ada", 30)[0].acceptance is None


@torch.inference_mode()
def test_logprobs_are_those_of_the_target():
    draft = DRAFTS["a relative"]
    (completion,) = generate(
        MODEL, TOKENIZER, "Ada", 20, temperature=1.3, seed=1, logprobs=True, draft=draft
    )
    prompt = TOKENIZER.encode("Ada", bos=True)
    ids = torch.tensor([prompt + completion.token_ids])
    log_p = MODEL(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_cancelled_row_leaves_the_others_as_they_were():
    engine = Engine(MODEL, TOKENIZER, rows=2, draft=DRAFTS["a relative"])
    one, two, three = (engine.submit(Request(name, 20)) for name in ("Ada", "Ben", "Emil"))
    engine.step()
    engine.step()
    engine.cancel(one)
    while engine.busy:
        engine.step()
    alone = generate(MODEL, TOKENIZER, ["Ben", "Emil"], 20)
    assert [two.token_ids, three.token_ids] == [completion.token_ids for completion in alone]


# --- What cannot be ------------------------------------------------------------------------------


def test_a_draft_of_another_tokenizer():
    draft = Llama(small_config(vocab_size=320))
    message = r"tokenizer has 300 tokens and the draft model 320: they do not belong together"
    with pytest.raises(ValueError, match=message):
        generate(MODEL, TOKENIZER, "Ada", draft=draft)


@pytest.mark.parametrize("draft", [MODEL, None])
@pytest.mark.parametrize("n_draft", [0, -1, -1000])
def test_a_number_of_proposals_below_one(n_draft, draft):
    with pytest.raises(ValueError, match=rf"n_draft is {n_draft}, but must be at least 1"):
        generate(MODEL, TOKENIZER, "Ada", 12, draft=draft, n_draft=n_draft)


def test_more_proposals_than_the_context_holds():
    with pytest.raises(ValueError, match="n_draft is 64, but must be less than the 64 tokens"):
        generate(MODEL, TOKENIZER, "Ada", draft=MODEL, n_draft=64)
    assert generate(MODEL, TOKENIZER, "Ada", 3, n_draft=64) == generate(MODEL, TOKENIZER, "Ada", 3)


def test_the_context_is_the_smaller_one():
    draft = small_llama(max_seq_len=16)
    (completion,) = generate(MODEL, TOKENIZER, "Ada", draft=draft)
    whole = generate(MODEL, TOKENIZER, "Ada", 16)[0].token_ids
    assert completion.token_ids == whole[: 16 - len(TOKENIZER.encode("Ada", bos=True))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_whose_logits_are_no_numbers(temperature):
    draft = small_llama()
    draft.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="draft model's logits are no numbers"):
        generate(MODEL, TOKENIZER, "Ada", temperature=temperature, draft=draft, seed=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_draft_ends_the_rows_that_need_it_and_no_others(temperature):
    draft = related(0.03)
    draft.tok_embeddings.weight[250] = torch.nan
    engine = Engine(MODEL, TOKENIZER, rows=2, draft=draft)
    sampling = Sampling(temperature=temperature)
    prompts = [[1, 30, 250], "Ada", "Ben"]  # the third takes the row of the first
    tickets = [engine.submit(Request(prompt, 12, sampling, 0)) for prompt in prompts]
    engine.step()
    with pytest.raises(ValueError, match=r"in 1 of 3 rows.*minillama verify PATH"):
        engine.step()
    while engine.busy:
        engine.step()
    assert tickets[0].finish_reason == "error"
    for ticket, prompt in zip(tickets[1:], prompts[1:], strict=True):
        settings = {"temperature": temperature, "seed": 0}
        (alone,) = generate(MODEL, TOKENIZER, prompt, 12, draft=related(0.03), **settings)
        assert ticket.token_ids == alone.token_ids


def test_a_target_whose_logits_are_no_numbers_ends_its_row_alone():
    target = small_llama()
    engine = Engine(target, TOKENIZER, rows=2, draft=DRAFTS["a relative"])
    one, two = engine.submit(Request("Ada", 12)), engine.submit(Request("Ben", 12))
    engine.step()
    output = target.output.forward
    target.output.forward = lambda x: output(x).index_fill(0, torch.tensor([0]), torch.nan)
    with pytest.raises(ValueError, match="in 1 of 2 rows"):
        engine.step()
    target.output.forward = output
    while engine.busy:
        engine.step()
    assert one.finish_reason == "error"
    assert two.token_ids == generate(MODEL, TOKENIZER, "Ben", 12)[0].token_ids
