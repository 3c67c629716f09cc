"""The toy world's dialogues: whatever is right is found right, and nothing else; so for obeying."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minillama.data import dialogues, tales
from minillama.data.dialogues import (
    ABOUT,
    FACTS,
    FILLINGS,
    HELD_OUT,
    KINDS,
    SIZES,
    SPLITS,
    WORDS,
    Exchange,
    as_messages,
    combine,
    corpus,
    dialogue,
    instructions,
    is_right,
    story_dialogue,
    telling,
    under,
)

ROOT = Path(__file__).parents[2]
SEEDS = st.integers(0, 10**6)
SPLIT = st.sampled_from(SPLITS)
TOLD = st.sampled_from(instructions())
ONE = st.sampled_from(dialogue(Random(1), 300))

RESCUE = (
    "One Friday, one cold Friday, Leo walked to the river. The river was dark, and in a hole sat a "
    "goat. The goat could not get out and looked at Leo. Leo could not reach it, and so he ran to "
    'Nora. Nora had a rope. The rope was long. "The goat needs it!" cried Leo. So Leo ran, and '
    "Nora ran, back to the river. Leo held the rope, and Nora pulled out the goat. The goat often "
    "met Leo and Nora at the river after that Friday."
)


def asked_in(split):
    return {question for kind in dialogues._facts(split) for question, _ in kind}


# --- Questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("Mia had a kite, and Tom had a ring. Who had the ring?", "Tom had the ring.",
         "Mia had the ring."),
        ("Ben went to the beach, and Nora to the mill. Where is Nora?", "Nora is at the mill.",
         "Nora is at the beach."),
        ("The cup is red, the book is new. What is red?", "The cup is red.", "The book is red."),
        ("What can run, a boat or a fox?", "A fox can run.", "A boat can run."),
        ("What can we eat, the pie or the drum?", "We can eat the pie.", "We can eat the drum."),
        ("Who is Hugo?", "Hugo is a boy.", "Hugo is a girl."),
        ("Hello, I am Ada.", "Hello, Ada.", "Hello, Ida."),
    ],
)  # fmt: skip
def test_questions_about_facts_are_judged_by_hand(question, right, wrong):
    assert is_right(question, right)
    assert not is_right(question, wrong)
    assert not is_right(question, f"{right} {right}")
    assert not is_right(question, "")


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("Who needed help?", "The goat needed help."),
        ("Where was the goat?", "The goat was at the river."),
        ("What did Nora have?", "Nora had a rope."),
        ("Who found the goat?", "Leo found the goat."),
    ],
)
def test_questions_about_a_tale_are_judged_by_hand(question, right):
    assert is_right(question, right, RESCUE)
    assert is_right(f"{RESCUE} {question}", right)
    assert is_right(f"{RESCUE} {question}", right, RESCUE)
    assert not is_right(question, right.replace("goat", "dog").replace("Nora", "Rosa"), RESCUE)


def test_a_tale_on_request_must_be_consistent_and_about_its_hero():
    assert is_right("Tell a story.", RESCUE)
    assert is_right("Tell a story about Leo.", RESCUE)
    assert not is_right("Tell a story about Nora.", RESCUE)  # she is the friend
    for request in ("Tell a story.", "Tell a story about Leo."):
        assert not is_right(request, RESCUE.replace("goat often", "dog often"))


@pytest.mark.parametrize(
    ("question", "story"),
    [
        ("What is the meaning of life?", ""),
        ("Who lost the kite?", RESCUE),  # of another plot
        ("Who needed help?", ""),  # of which tale?
        ("Who needed help?", RESCUE.replace("goat often", "dog often")),
        (f"{RESCUE} And who needed help?", ""),
    ],
)
def test_a_question_that_nobody_can_judge_is_refused(question, story):
    with pytest.raises(ValueError, match="does not have the question"):
        is_right(question, "The goat needed help.", story)


@settings(deadline=None)  # the first one fills all wordings
@given(SEEDS, st.integers(1, 5))
def test_every_answer_that_the_dialogues_give_is_right(seed, n):
    rng = Random(seed)
    made = [*dialogue(rng, n), *story_dialogue(rng, n), *telling(rng), *telling(rng, named=True)]
    for exchange in made:
        assert is_right(exchange.question, exchange.answer, exchange.story)


@settings(deadline=None)
@given(SEEDS, st.data())
def test_an_answer_with_one_word_changed_is_wrong(seed, data):
    make = data.draw(st.sampled_from([dialogue, story_dialogue]))
    (exchange,) = make(Random(seed), 1)
    words = [str(word) for slot in FILLINGS.values() for word in slot]
    mentions = list(re.finditer(rf"\b({'|'.join(words)})\b", exchange.answer))
    assume(mentions)
    mention, other = data.draw(st.sampled_from(mentions)), data.draw(st.sampled_from(words))
    changed = exchange.answer[: mention.start()] + other + exchange.answer[mention.end() :]
    assert is_right(exchange.question, changed, exchange.story) == (changed == exchange.answer)


@pytest.mark.parametrize("kind", ["having", "going", "looking"])
def test_an_answer_says_what_the_question_says_of_what_it_asks_for(kind):
    content = {str(word) for slot in FILLINGS.values() for word in slot}
    (pairs,) = [
        each for each, name in zip(dialogues._facts("test"), FACTS, strict=True) if name == kind
    ]
    for question, answer in pairs:
        *facts, asked = (set(re.findall(r"\w+", part)) for part in re.split("[.,]", question))
        said = content & set(re.findall(r"\w+", answer))
        assert said & asked
        assert len(said) == 2
        assert any(said <= fact for fact in facts), (question, answer)


def test_a_question_has_one_answer():
    pairs = [pair for split in SPLITS for kind in dialogues._facts(split) for pair in kind]
    assert len({question for question, _ in pairs}) == len(pairs) > 10_000


@pytest.mark.parametrize("plot", tales.PLOTS)
def test_what_is_asked_about_a_plot_can_be_known_from_it(plot):
    known = tales.slots(tales.PLOTS[plot])
    for question, answer in ABOUT[plot]:
        asked = {slot for slot, _ in tales.FIELD.findall(question + answer)}
        assert asked <= set(known), question


def test_a_dialogue_of_twenty_turns_is_short_enough_for_the_toy():
    from minillama.chat import Message, encode_dialog
    from minillama.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "data/toy/checkpoint/tokenizer.model")
    for seed in range(20):
        messages = [Message(**each) for each in as_messages(dialogue(Random(seed), 20))]
        assert len(encode_dialog(messages, tokenizer).ids) < 850
    for made in corpus("train", 500):
        messages = [Message(**each) for each in as_messages(made)]
        assert len(encode_dialog(messages, tokenizer).ids) <= 1024


def test_the_split_of_the_questions_is_by_tenths_of_every_kind():
    train, valid, test = (dialogues._facts(split) for split in SPLITS)
    for kind, *parts in zip(FACTS, train, valid, test, strict=True):
        n = sum(map(len, parts))
        assert len(parts[0]) == pytest.approx(0.8 * n, abs=5), kind
        assert min(len(parts[1]), len(parts[2])) == n // 10 > 0, kind
    assert not asked_in("train") & asked_in("test")
    assert not asked_in("train") & asked_in("valid")
    assert not asked_in("valid") & asked_in("test")


@given(SPLIT, SEEDS)
def test_a_dialogue_asks_what_its_split_has(split, seed):
    asked = dialogue(Random(seed), 5, split)
    assert {exchange.question for exchange in asked} <= asked_in(split)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'dev' of the dialogues: it is train, valid, test"):
        dialogue(Random(0), 1, "dev")
    with pytest.raises(ValueError, match="'dev' of the dialogues"):
        corpus("dev")
    with pytest.raises(ValueError, match="'test' of the instructions: it is train or held-out"):
        instructions("test")
    with pytest.raises(ValueError, match="no kind of instruction 'haiku': it is first name, love"):
        instructions(kind="haiku")


# --- Instructions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "word", "text", "short", "obeying", "disobeying"),
    [
        ("first name", "Rosa", "Always begin your answers with the name Rosa.", "First: Rosa.",
         "Rosa. The fox ran.", "The fox ran. Rosa."),
        ("love", "fox", "Always say that you love the fox.", "Love: fox.",
         "The fox ran. I love the fox.", "The fox ran. I love the goat."),
        ("last word", "tree", "Always end your answers with the word tree.", "Last: tree.",
         "The fox ran, tree.", "The tree ran."),
    ],
)  # fmt: skip
def test_instructions_by_hand(kind, word, text, short, obeying, disobeying):
    (one,) = [each for each in instructions("held-out", kind) if each.parts[0][1] == word]
    assert (one.kind, one.text, one.short) == (kind, text, short)
    assert one.apply("The fox ran.") == obeying
    assert one.obeys(obeying)
    assert not one.obeys(disobeying)
    assert not one.obeys("")


def test_other_ways_to_obey_count_too():  # a real model does not know our wording
    first, love, last = (instructions("held-out", kind)[0] for kind in KINDS)
    start, noun, word = (one.parts[0][1] for one in (first, love, last))
    assert first.obeys(f'"{start}, it was red!"')
    assert love.obeys(f"It was red, and I really love the {noun} very much")
    assert last.obeys(f'It was red... "{word}!"\n')
    assert not first.obeys(f"{start}ly, it was red.")
    assert not love.obeys(f"I love the {noun}s.")
    assert not last.obeys(f"It was un{word}.")


@settings(deadline=None)
@given(ONE, TOLD, TOLD)
def test_two_instructions_are_obeyed_together_or_refused(exchange, one, other):
    if one.kind == other.kind:
        with pytest.raises(ValueError, match="cannot both be obeyed"):
            combine(one, other)
        return
    both = combine(one, other)
    assert both == combine(other, one)
    answer = both.apply(exchange.answer)
    assert both.obeys(answer)
    assert one.obeys(answer)
    assert other.obeys(answer)
    assert both.kind in {f"{one.kind} + {other.kind}", f"{other.kind} + {one.kind}"}
    assert one.text in both.text
    assert other.short in both.short
    assert not both.obeys(one.apply(exchange.answer)) or other.obeys(one.apply(exchange.answer))


@settings(deadline=None)
@given(ONE, TOLD, TOLD)
def test_who_obeys_one_word_does_not_obey_another(exchange, one, other):
    assume(one.kind == other.kind and one != other)
    assert not other.obeys(one.apply(exchange.answer))


def test_plain_answers_hardly_ever_obey():
    pairs = [
        (one, exchange)
        for one in instructions("held-out")
        for exchange in dialogue(Random(0), 100, "test")
    ]
    assert sum(one.obeys(exchange.answer) for one, exchange in pairs) < 0.02 * len(pairs)


@given(ONE, TOLD, st.booleans())
def test_an_instruction_stands_in_front_of_the_question_that_it_rules(exchange, one, short):
    ruled = under(exchange, one, short)
    assert ruled.question == f"{one.short if short else one.text} {exchange.question}"
    assert one.obeys(ruled.answer)
    assert not is_right(exchange.question, ruled.answer) or ruled.answer == exchange.answer


def test_held_out_words_are_in_no_instruction_for_training():
    for kind, words in WORDS.items():
        train, held_out = (
            {each.parts[0][1] for each in instructions(split, kind)}
            for split in ("train", "held-out")
        )
        assert train | held_out == set(words)
        assert len(held_out) >= 4
        assert held_out <= HELD_OUT
        assert not train & HELD_OUT
    told = set(re.findall(r"\w+", " ".join(each.text for each in instructions("train"))))
    assert not told & HELD_OUT
    assert {word for words in WORDS.values() for word in words} >= HELD_OUT


def test_every_word_of_an_instruction_occurs_in_the_tales():
    told = set(re.findall(r"\w+", " ".join(tales.corpus("train"))))
    assert {word for words in WORDS.values() for word in words} <= told
    assert len(WORDS["last word"]) > 150


# --- The corpus -----------------------------------------------------------------------------------


def test_the_corpus_asks_held_out_questions_in_no_other_split():
    for split, others in (("train", ("valid", "test")), ("test", ("train", "valid"))):
        asked = {exchange.question for made in corpus(split) for exchange in made}
        for other in others:
            known = asked_in(other)
            assert not asked & known
            # An instruction may stand in front.
            assert not {re.sub(r"^.*?\. (?=[A-Z])", "", question) for question in asked} & known
    assert asked_in("test") & {each.question for made in corpus("test") for each in made}


def test_no_tale_of_one_split_is_told_in_another():
    told = {
        split: {e.story or e.answer for made in corpus(split) for e in made if len(e.answer) > 200}
        | {e.story for made in corpus(split) for e in made if e.story}
        for split in SPLITS
    }
    assert min(map(len, told.values())) > 10
    assert not told["train"] & told["test"]
    assert not told["train"] & told["valid"]
    assert not told["valid"] & told["test"]


def test_an_instruction_of_the_corpus_rules_its_own_answer_alone():
    n_ruled, n_free = 0, 0
    for made in corpus("train", 150):
        for exchange in made:
            told = [
                one
                for one in instructions()
                if one.text in exchange.question
                or re.search(rf"(^|\. ){re.escape(one.short)} ", exchange.question)
            ]
            if told:
                assert all(one.obeys(exchange.answer) for one in told)
                n_ruled += 1
            else:
                assert is_right(exchange.question, exchange.answer, exchange.story)
                n_free += 1
    assert 0.6 < n_ruled / n_free < 1.7


def test_more_dialogues_begin_with_those_of_the_files():
    assert corpus("train", 30) == corpus("train")[:30]
    assert corpus("valid", 60)[:50] == corpus("valid")
    assert [len(corpus(split)) for split in SPLITS] == list(SIZES.values())


def test_messages_take_turns():
    assert as_messages([Exchange("Who is Mia?", "Mia is a girl.")]) == [
        {"role": "user", "content": "Who is Mia?"},
        {"role": "assistant", "content": "Mia is a girl."},
    ]


def test_the_files_are_what_the_command_writes(tmp_path):
    command = [sys.executable, "-m", "minillama.data.dialogues", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    written, kept = tmp_path / "dialogues", ROOT / "data" / "dialogues"
    for name in (*(f"{split}.jsonl" for split in SPLITS), "README.md"):
        assert (written / name).read_bytes() == (kept / name).read_bytes()
    lines = (written / "valid.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"] for line in lines] == list(
        map(as_messages, corpus("valid"))
    )
    assert sum(path.stat().st_size for path in kept.iterdir()) < 1_000_000


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "dialogues").write_text("a file where the folder should be")
    command = [sys.executable, "-m", "minillama.data.dialogues", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "the dialogues cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
