"""Whoever is right and obeys gets all points; whoever holds on to instructions is seen."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from minillama import Llama, generate, load
from minillama.chat import Message, encode_dialog
from minillama.data.dialogues import dialogue, story_dialogue, telling
from minillama.evaluation import assistant
from minillama.evaluation.assistant import answers, examine

TOY = Path(__file__).parents[2] / "data" / "toy" / "checkpoint"
LISTS = ("facts", "about_tales", "tales", "named_tales", "told_now", "told_before")


@pytest.fixture(scope="module")
def toy():
    """The toy as pretraining left it, with a context that holds dialogues."""
    short, tokenizer = load(TOY)
    model = Llama(replace(short.config, max_seq_len=1024))
    model.load_state_dict(short.state_dict())
    return model.eval(), tokenizer


def test_a_perfect_assistant_is_right_and_obeys_what_it_was_told_just_now(toy, monkeypatch):
    def perfect(model, tokenizer, asked, temperature=0.0, seed=0):
        return [turns[-1].answer for turns in asked]

    monkeypatch.setattr(assistant, "answers", perfect)
    report = examine(*toy, n=50)
    assert [report.share(name) for name in LISTS[:5]] == [1.0] * 5
    assert report.share("told_before") < 0.1  # by chance alone
    assert all(len(getattr(report, name)) == 50 for name in LISTS)


def test_an_assistant_that_ignores_instructions_is_seen(toy, monkeypatch):
    def deaf(model, tokenizer, asked, temperature=0.0, seed=0):
        return ["The fox ran."] * len(asked)

    monkeypatch.setattr(assistant, "answers", deaf)
    report = examine(*toy, n=20)
    assert [report.share(name) for name in LISTS] == [0.0] * 6
    assert report.facts[0].answer == "The fox ran."
    assert not report.facts[0].ok


def test_a_model_that_only_read_tales_answers_nothing(toy):
    report = examine(*toy, n=1)
    assert report.share("facts") == report.share("about_tales") == 0.0


def test_questions_differ_from_seed_to_seed_and_not_otherwise(toy, monkeypatch):
    def deaf(model, tokenizer, asked, temperature=0.0, seed=0):
        return [""] * len(asked)

    monkeypatch.setattr(assistant, "answers", deaf)
    assert examine(*toy, n=5, seed=1) == examine(*toy, n=5, seed=1) != examine(*toy, n=5, seed=2)


def test_each_answer_goes_on_from_the_dialogue_alone(toy):
    model, tokenizer = toy
    rng = Random(3)
    asked = [dialogue(rng, 3), story_dialogue(rng, 2), dialogue(rng, 1), telling(rng)]
    for turns, answer in zip(
        asked, answers(model, tokenizer, asked, max_new_tokens=30), strict=True
    ):
        messages = [
            Message(role, text)
            for turn in turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        ids = encode_dialog(messages[:-1], tokenizer).ids
        (alone,) = generate(model, tokenizer, ids, max_new_tokens=30)
        assert answer == alone.text.strip()


def test_a_dialogue_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="Shorten the prompt"):
        answers(*load(TOY), [dialogue(Random(0), 20)])
