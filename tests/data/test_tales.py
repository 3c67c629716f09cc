"""The toy world: what is told is read back, and whatever is changed in a story is noticed."""

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minillama.data import tales
from minillama.data.tales import PLOTS, SLOTS, Person, check, corpus, slots, stories, tell

ROOT = Path(__file__).parents[2]
TOLD = st.sampled_from(list(stories(1000, seed=1)))

BY_HAND = (
    "One Friday, one cold Friday, Leo walked to the river. The river was dark, and in a hole sat a "
    "goat. The goat could not get out and looked at Leo. Leo could not reach it, and so he ran to "
    'Nora. Nora had a rope. The rope was long. "The goat needs it!" cried Leo. So Leo ran, and '
    "Nora ran, back to the river. Leo held the rope, and Nora pulled out the goat. The goat often "
    "met Leo and Nora at the river after that Friday."
)


def steps_of(story: str) -> list[str]:
    """The sentences of a story, cut where the steps of its plot meet."""
    cuts, text = [], story + " "
    for step in PLOTS[check(story).plot]:
        end = max(m.end() for way in step if (m := tales._pattern(way).match(text)))
        cuts.append(text[: end - 1])
        text = text[end:]
    return cuts


def swaps(story: str) -> list[tuple[str, str, str]]:
    """(slot, story with one mention swapped, what was swapped in), for every mention and word."""
    verdict, changed = check(story), []
    for slot, word in verdict.cast.items():
        for mention in re.finditer(rf"\b{word}\b", story):
            changed += [
                (slot, f"{story[: mention.start()]}{other}{story[mention.end() :]}", str(other))
                for other in SLOTS[slot]
                if other != word
            ]
    return changed


def test_a_story_is_read_back_by_hand():
    verdict = check(BY_HAND)
    assert verdict
    assert verdict.ok
    assert (verdict.plot, verdict.problem) == ("rescue", "")
    assert {slot: str(word) for slot, word in verdict.cast.items()} == {
        "hero": "Leo",
        "day": "Friday",
        "place": "river",
        "animal": "goat",
        "friend": "Nora",
        "tool": "rope",
    }


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD)
def test_every_story_passes(story):
    verdict = check(story)
    assert verdict, verdict.problem
    assert verdict.read == len(story) + 1
    assert set(verdict.cast) == set(slots(PLOTS[verdict.plot]))
    assert "\n" not in story
    assert story.isascii()


def test_every_wording_of_every_plot_passes():
    cast = {slot: words[0] for slot, words in SLOTS.items()}
    for name, plot in PLOTS.items():
        for number, step in enumerate(plot):
            for wording in step:
                told = [wordings[0] for wordings in plot]
                told[number] = wording
                verdict = check(" ".join(told).format(**cast))
                assert (verdict.plot, verdict.problem) == (name, "")


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD, st.data())
def test_any_word_swapped_for_another_of_its_kind_is_noticed(story, data):
    slot, changed, other = data.draw(st.sampled_from(swaps(story)))
    verdict = check(changed)
    assert not verdict
    assert slot in verdict.problem or other in verdict.problem


def test_every_swap_in_one_story_of_each_plot_is_noticed():
    one_each = {check(story).plot: story for story in stories(100, seed=1)}
    assert set(one_each) == set(PLOTS)
    for story in one_each.values():
        for _, changed, _ in swaps(story):
            assert not check(changed), changed


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD, st.data())
def test_a_pronoun_of_the_wrong_person_is_noticed(story, data):
    wrong = {"he": "she", "she": "he", "his": "her", "him": "her", "boy": "girl", "girl": "boy"}
    wrong |= {"He": "She", "She": "He", "His": "Her", "Her": "His", "her": "his"}
    pronouns = list(re.finditer(rf"\b({'|'.join(wrong)})\b", story))
    assume(pronouns)
    one = data.draw(st.sampled_from(pronouns))
    assert not check(story[: one.start()] + wrong[one[0]] + story[one.end() :])


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD, st.data())
def test_a_missing_doubled_or_moved_step_is_noticed(story, data):
    steps = steps_of(story)
    assert " ".join(steps) == story
    i, j = sorted(data.draw(st.sets(st.integers(0, len(steps) - 1), min_size=2, max_size=2)))
    assert not check(" ".join(steps[:i] + steps[i + 1 :]))
    assert not check(" ".join(steps[: i + 1] + steps[i:]))
    assert not check(" ".join([*steps[:i], steps[j], *steps[i + 1 : j], steps[i], *steps[j + 1 :]]))


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD, st.data())
def test_a_cut_story_is_noticed(story, data):
    assert not check(story[: data.draw(st.integers(0, len(story) - 1))])


@settings(deadline=None)  # the first story compiles all patterns
@given(TOLD, st.one_of(st.text(min_size=1), TOLD))
def test_what_follows_the_end_is_noticed(story, more):
    assert "has ended" in check(story + " " + more).problem
    assert not check(story + more)


@settings(deadline=None)  # the first story compiles all patterns
@given(st.text())
def test_any_text_gets_a_verdict(text):
    assert check(text).problem


@pytest.mark.parametrize(
    ("was", "now", "problem"),
    [
        ("Nora pulled", "Rosa pulled",
         'step 8, "Leo held the rope, and Rosa pulled out the goat.": '
         'the friend is Nora, so "Nora" was to be said, not "Rosa"'),
        ("so he ran", "so she ran", 'the hero is Leo, so "he" was to be said, not "she"'),
        (" Nora had a rope.", "", "step 5 of the plot 'rescue' reads \"The rope was long."),
        ("The goat could not get out", "The goat got out", 'reads "The goat got out and looked'),
        (" The goat often met Leo and Nora at the river after that Friday.", "",
         "step 9 of the plot 'rescue' is missing"),
        ("after that Friday.", "after that Friday. The end.", 'has ended, but "The end." follows'),
    ],
)  # fmt: skip
def test_the_problem_says_what_is_wrong_and_where(was, now, problem):
    assert BY_HAND.count(was) == 1
    assert problem in check(BY_HAND.replace(was, now)).problem


@pytest.mark.parametrize("plot", PLOTS)
def test_every_slot_is_named_in_two_steps_whatever_the_wordings(plot):
    # Otherwise a word could be exchanged and nothing in the story would disagree.
    for slot in slots(PLOTS[plot]):
        naming = [all(f"{{{slot}}}" in wording for wording in step) for step in PLOTS[plot]]
        assert sum(naming) >= 2, slot


def test_no_word_fits_two_slots():  # so that the hero cannot be the friend
    words = [str(word) for kind in SLOTS.values() for word in kind]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("slot", ["hero", "friend", "owner"])
def test_people_of_every_role_are_girls_and_boys(slot):
    assert {person.they for person in SLOTS[slot] if isinstance(person, Person)} == {"he", "she"}


def test_a_seed_fixes_the_stories():
    assert tell(Random(7)) == tell(Random(7))
    assert list(stories(50, seed=3)) == list(stories(50, seed=3))
    assert list(stories(50, seed=3)) == list(stories(90, seed=3))[:50]
    assert not set(stories(50, seed=3)) & set(stories(50, seed=4))


def test_no_story_is_told_twice(monkeypatch):
    # In the real world a repeat is too rare to be seen: here there are only three stories.
    monkeypatch.setattr(tales, "tell", lambda rng: f"story {int(3 * rng.random())}")
    assert sorted(stories(3, seed=0)) == ["story 0", "story 1", "story 2"]


def test_the_corpus_is_large_and_its_splits_are_disjoint():
    train, valid = corpus("train"), corpus("valid")
    assert len({*train, *valid}) == len(train) + len(valid)
    assert 2.0e6 < sum(len(story) + 1 for story in train) < 2.3e6  # bytes: the text is ASCII
    assert 0.9e5 < sum(len(story) + 1 for story in valid) < 1.2e5
    assert {check(story).plot for story in valid} == set(PLOTS)


def test_the_vocabulary_is_small():
    words = set(re.findall(r"\w+", " ".join(corpus("train")).lower()))
    assert 200 < len(words) < 300
    assert words == set(re.findall(r"\w+", " ".join(corpus("valid")).lower()))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test' of the tales: it is train or valid"):
        corpus("test")


def test_the_files_are_what_the_command_writes(tmp_path):
    command = [sys.executable, "-m", "minillama.data.tales", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    for name in ("train.txt", "valid.txt", "README.md"):
        assert (tmp_path / "tales" / name).read_bytes() == (ROOT / "data/tales" / name).read_bytes()
    assert (tmp_path / "tales/valid.txt").read_text().splitlines() == corpus("valid")


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "tales").write_text("a file where the folder should be")
    command = [sys.executable, "-m", "minillama.data.tales", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "the corpus cannot be written" in result.stderr
    assert str(tmp_path / "tales") in result.stderr
    assert "Traceback" not in result.stderr
