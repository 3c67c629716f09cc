"""Ghost Attention: who is told what, what is learned, and how far a model obeys."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from small import small_llama
from torch.testing import assert_close
from transformers_llama import transformers_copy

from minillama.chat import Message, encode_dialog
from minillama.chat.gatt import (
    Rule,
    Talk,
    draw_rules,
    examples,
    ghost,
    hold,
    instructed,
    obedience,
    read_instructions,
    strongest_attention,
    toy_talks,
    turns_of,
)
from minillama.chat.sft import batches, pack, tokenise
from minillama.checkpoint import load, save
from minillama.cli import main
from minillama.config import Sampling, TrainingConfig
from minillama.data.dialogues import KINDS, combine, instructions
from minillama.data.packing import IGNORE
from minillama.generation import generate
from minillama.training import make_optimizer, train
from minillama.training.loss import next_token_loss

FORMS = ("text", "short")
TOY_CHAT = Path(__file__).parents[2] / "data" / "toy" / "chat"
MODEL = small_llama(max_seq_len=512)
DIALOGUE = [
    Message("user", "Ada?"),
    Message("assistant", "Ada had a kite."),
    Message("user", "Ben?"),
    Message("assistant", "Ben had a lamp."),
]


@dataclass(frozen=True)
class Ends:
    """Answers are to end with a word."""

    word: str
    kind: str = "end"

    @property
    def text(self) -> str:
        return f"Always end with a {self.word}."

    @property
    def short(self) -> str:
        return f"End: {self.word}."

    def obeys(self, answer: str) -> bool:
        return answer.endswith(self.word)


def ends(word: str) -> Rule:
    return Rule(f"End with {word}.", (Ends(word),))


BOAT = ends("boat")


# ------------------------------------------------------------------------ dialogues under a rule


def test_the_instruction_stands_in_front_of_the_first_question_or_of_each():
    system = Message("system", "Be brief.")
    first = instructed([system, *DIALOGUE], "Sing.")
    assert [message.content for message in first] == [
        "Be brief.", "Sing. Ada?", "Ada had a kite.", "Ben?", "Ben had a lamp."
    ]  # fmt: skip
    every = instructed([system, *DIALOGUE], "Always sing.", reminder="Sing!")
    assert [message.content for message in every] == [
        "Be brief.", "Always sing. Ada?", "Ada had a kite.", "Sing! Ben?", "Ben had a lamp."
    ]  # fmt: skip
    assert [message.role for message in every] == ["system", *(m.role for m in DIALOGUE)]


def answered_alone(tok, questions: list[str], told: str, reminder: str) -> list[str]:
    """One dialogue, and each of its prompts read from its beginning."""
    said = []
    for question in questions:
        said.append(Message("user", question))
        ids = encode_dialog(instructed(said, told, reminder), tok).ids
        (answer,) = generate(MODEL, tok, [ids], max_new_tokens=9)
        said.append(Message("assistant", answer.text.strip()))
    return [message.content for message in said[1::2]]


@pytest.mark.parametrize("every_turn", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_each_dialogue_is_answered_as_it_would_be_alone(tok, rows, every_turn):
    questions = [["Ada?"], ["Ben?", "Ida had a drum. Who?", "Jon?"], ["Clara?", "Emil?"]]
    rules = [ends(word) for word in ("kite", "lamp", "boat")]
    talks = hold(MODEL, tok, questions, rules, every_turn, max_new_tokens=9, rows=rows)
    for asked, rule, talk in zip(questions, rules, talks, strict=True):
        assert talk.rule is rule
        assert [message.content for message in talk.messages[::2]] == asked
        alone = answered_alone(tok, asked, rule.text, rule.short if every_turn else "")
        assert [message.content for message in talk.messages[1::2]] == alone
    assert len({talk.messages[1].content for talk in talks}) == 3  # the model does look at them


def test_where_the_instruction_stands_changes_what_is_answered(tok):
    answers = [
        hold(MODEL, tok, [["Ada?", "Ben?", "Jon?"]], [BOAT], every, max_new_tokens=9)[0].messages
        for every in (True, False)
    ]
    assert answers[0][:2] == answers[1][:2]
    assert answers[0] != answers[1]


def test_a_dialogue_draws_with_a_seed_of_its_own(tok):
    questions, rules = [["Ada?", "Ben?"]] * 3, [BOAT] * 3
    hot = Sampling(temperature=2.0)
    talks = hold(MODEL, tok, questions, rules, sampling=hot, seed=5, max_new_tokens=9)
    assert len({talk.messages[1].content for talk in talks}) == 3
    second = hold(MODEL, tok, questions[:1], rules[:1], sampling=hot, seed=6, max_new_tokens=9)
    assert second[0].messages == talks[1].messages


def test_an_answer_that_met_its_limit_is_not_finished_and_does_not_obey(tok):
    (whole,) = hold(MODEL, tok, [["Ada?"]], [ends("")], max_new_tokens=9)
    assert whole.finished == [False]
    assert whole.obeyed == [False]  # "" ends any answer, but this one did not end


def test_an_answer_ends_with_the_piece_of_the_format(tok, monkeypatch):
    (whole,) = hold(MODEL, tok, [["Ada?"]], [BOAT], max_new_tokens=9)
    ids = encode_dialog(instructed([Message("user", "Ada?")], BOAT.text), tok).ids
    (alone,) = generate(MODEL, tok, [ids], max_new_tokens=9)
    end = next(i for i in alone.token_ids if i != alone.token_ids[0])
    monkeypatch.setattr("minillama.chat.gatt.end_of_answer", lambda *_: end)
    any_end = Rule(BOAT.text, (Ends(""),))
    (shorter,) = hold(MODEL, tok, [["Ada?"]], [any_end], max_new_tokens=9)
    assert shorter.finished == shorter.obeyed == [True]
    n = alone.token_ids.index(end)
    assert shorter.messages[1].content == tok.decode(alone.token_ids[:n]).strip()
    assert len(shorter.messages[1].content) < len(whole.messages[1].content)


def test_markers_that_the_model_writes_itself_do_not_end_the_dialogue(tok, monkeypatch):
    decode = type(tok).decode
    monkeypatch.setattr(type(tok), "decode", lambda self, ids: decode(self, ids) + " [INST] Ada")
    (talk,) = hold(MODEL, tok, [["Ada?", "Ben?"]], [BOAT], max_new_tokens=5)
    assert talk.messages[1].content.endswith("[ INST] Ada")
    assert len(talk.finished) == 2


def test_a_dialogue_ends_where_its_next_turn_would_not_fit(tok):
    long = ["Ada had a kite, and Ben had a lamp. Who had what, and where did Ida put the drum?"] * 9
    short = ["Ada?"] * 6
    hot = Sampling(temperature=2.0)
    talks = hold(MODEL, tok, [long, short], [BOAT, BOAT], True, 9, hot, seed=5)
    assert [len(talk.finished) for talk in talks] == [4, 6]
    (alone,) = hold(MODEL, tok, [short], [BOAT], True, 9, hot, seed=6)
    assert alone.messages == talks[1].messages  # whose row it took over
    (longer,) = hold(MODEL, tok, [long[:5]], [BOAT], max_new_tokens=9, context=700)
    assert len(longer.finished) == 5
    asked = instructed([*talks[0].messages, Message("user", long[0])], BOAT.text, BOAT.short)
    assert len(encode_dialog(asked, tok).ids) > 512 - 9 >= len(encode_dialog(asked[:-2], tok).ids)


def test_what_cannot_be_held_is_refused_with_numbers(tok):
    with pytest.raises(ValueError, match=r"takes \d+ tokens .* room for 12 beside the 500"):
        hold(MODEL, tok, [["Ada?"]], [BOAT], max_new_tokens=500)
    with pytest.raises(ValueError, match="2 dialogues and 1 rules"):
        hold(MODEL, tok, [["Ada?"], ["Ben?"]], [BOAT])


def test_a_first_turn_that_does_not_fit_is_named_before_any_answer(tok, monkeypatch):
    monkeypatch.setattr("minillama.chat.gatt._Reader", None)  # nobody answers
    questions, long = [["Ada?"], ["Ada? " * 200], ["Ben?"]], "Sing. " * 200
    with pytest.raises(ValueError, match="2 dialogues cannot be used") as found:
        hold(MODEL, tok, questions, [BOAT, BOAT, Rule(long, ())], rows=1)
    lines = str(found.value).splitlines()
    assert lines[1].startswith("Dialogue 2: A first question takes ")
    assert lines[2].startswith("Dialogue 3: A first question takes ")


def test_of_dialogues_the_questions_and_the_answers_are_taken(tok):
    places = {"a, line 1": DIALOGUE, "a, line 2": DIALOGUE[:1]}
    assert turns_of(places, tok, "llama2") == (
        [["Ada?", "Ben?"], ["Ada?"]],
        [["Ada had a kite.", "Ben had a lamp."], []],
    )
    told = [Message("system", "Be brief."), *DIALOGUE]
    with pytest.warns(UserWarning, match="Of 3 dialogues, 1 have a system message.* in b, line 9"):
        found = turns_of(places | {"b, line 9": told}, tok, "llama2")
    assert found[0][2] == ["Ada?", "Ben?"]


def test_of_dialogues_out_of_turn_or_with_markers_the_places_are_named(tok):
    bad = {
        "a, line 1": [DIALOGUE[1], *DIALOGUE],
        "a, line 2": DIALOGUE,
        "a, line 3": [DIALOGUE[0], *DIALOGUE],
        "a, line 4": [*DIALOGUE, Message("user", "[INST] Jon?")],
        "a, line 5": [*DIALOGUE[:3], Message("assistant", "</s>")],
    }
    with pytest.raises(ValueError, match="4 dialogues cannot be used") as found:
        turns_of(bad, tok, "llama2")
    assert [line[:32] for line in str(found.value).splitlines()[1:]] == [
        "a, line 1: Message 1 is of role ",
        "a, line 3: Message 2 is of role ",
        "a, line 4: Message 5 (user) cont",
        "a, line 5: Message 4 (assistant)",
    ]
    with pytest.raises(ValueError, match=r"^The chat format chatml needs the piece"):
        turns_of(bad, tok, "chatml")


def test_the_toy_worlds_dialogues_are_held_in_the_format_that_is_asked_for(tok, monkeypatch):
    seen = []

    def recorded(messages, tokenizer, chat_format):
        seen.append(chat_format)
        return encode_dialog(messages, tokenizer, chat_format)

    monkeypatch.setattr("minillama.chat.gatt.encode_dialog", recorded)
    hot = small_llama(max_seq_len=1536)
    toy_talks(hot, tok, 1, n_turns=1, chat_format="alpaca")
    assert set(seen) == {"alpaca"}


def test_dialogues_of_the_toy_world_have_as_many_turns_as_was_asked():
    model, tokenizer = load(TOY_CHAT)
    talks = toy_talks(model, tokenizer, 12, n_turns=4, shortest=2)
    assert {len(talk.finished) for talk in talks} == {2, 3, 4}
    told = toy_talks(model, tokenizer, 3, n_turns=2)
    assert [len(talk.finished) for talk in told] == [2, 2, 2]
    assert all(all(talk.obeyed) for talk in told)
    (short,) = toy_talks(model, tokenizer, 1, n_turns=1, shortest=2)
    assert len(short.finished) == 1


def test_rules_are_drawn_by_kind_half_of_them_short_and_some_of_two():
    toy = instructions("train")
    rules = draw_rules(toy, 1200, Random(0))
    single = [rule for rule in rules if len(rule.instructions) == 1]
    assert 800 < len(single) < 1000
    kinds = Counter(rule.instructions[0].kind for rule in single)
    assert set(kinds) == set(KINDS)
    assert all(200 < n < 400 for n in kinds.values())  # although there are many words to end with
    for rule in rules:
        long, short = (" ".join(getattr(i, form) for i in rule.instructions) for form in FORMS)
        assert rule.text in (long, short)
        joined = combine(*rule.instructions) if rule not in single else rule.instructions[0]
        assert joined.text == long  # in the order in which the toy world says them
        assert rule.obeys(joined.apply("It was here."))
        assert not rule.obeys("It was here.")
    assert 500 < sum(rule.text == rule.instructions[0].short for rule in single) * 4 / 3 < 700
    assert draw_rules(toy, 9, Random(1)) == draw_rules(toy, 9, Random(1))
    assert {len(rule.instructions) for rule in draw_rules(toy, 50, Random(0), combined=0.0)} == {1}


def test_instructions_are_read_out_of_a_file_and_nobody_can_check_them(tmp_path):
    file = tmp_path / "instructions.txt"
    file.write_text("Act as Napoleon.\tFigure: Napoleon.\n\nSing.\t Sing. \n", encoding="utf-8")
    napoleon, sing = read_instructions(file)
    assert (napoleon.text, napoleon.short) == ("Act as Napoleon.", "Figure: Napoleon.")
    assert (napoleon.kind, sing.kind, sing.short) == ("Figure", "Sing.", "Sing.")
    assert napoleon.obeys("I am Ada.")
    texts = {rule.text for rule in draw_rules([napoleon, sing], 90, Random(0))}
    assert texts == {
        "Act as Napoleon.", "Figure: Napoleon.", "Sing.",
        "Act as Napoleon. Sing.", "Figure: Napoleon. Sing.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Sing.\tS.\nDance.\n", r"line 2: 'Dance.' is not an instruction, a tab and the same"),
        (b"Sing.\t\n", "line 1"),
        (b"\n", "has no instruction"),
        (b"\xff\tS.\n", "is no text in UTF-8"),
    ],
)
def test_a_file_of_instructions_says_what_is_wrong_and_where(tmp_path, content, message):
    file = tmp_path / "instructions.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_instructions(file)
    assert str(file) in str(raised.value)


# --------------------------------------------------------------------------------- training data


def test_by_hand_the_last_answer_and_its_end_are_learned_and_nothing_else(tok):
    tokens = ghost(DIALOGUE, "Sing.", tok)
    first = tok.encode("[INST] Sing. Ada? [/INST] Ada had a kite. ")
    second = tok.encode("[INST] Ben? [/INST]")
    answer = tok.encode("[INST] Ben? [/INST] Ben had a lamp. ")[len(second) :]
    assert tokens.ids == [1, *first, 2, 1, *second, *answer, 2]
    n_context = len(first) + len(second) + 3
    assert tokens.learned == [False] * n_context + [True] * (len(answer) + 1)


@pytest.mark.parametrize("chat_format", ["llama2", "chatml", "code-llama-70b"])
def test_in_every_format_only_the_last_answer_is_learned(request, chat_format):
    fixtures = {"llama2": "tok", "chatml": "chatml_tok", "code-llama-70b": "step_tok"}
    tok = request.getfixturevalue(fixtures[chat_format])
    dialogue = [Message("system", "Be brief."), *DIALOGUE, Message("user", "Jon?")]
    dialogue.append(Message("assistant", "Jon had two."))
    tokens = ghost(dialogue, "Sing.", tok, chat_format=chat_format)
    whole = encode_dialog(instructed(dialogue, "Sing."), tok, chat_format)
    assert (tokens.ids, tokens.roles) == (whole.ids, whole.roles)
    before = encode_dialog(instructed(dialogue[:-2], "Sing."), tok, chat_format)
    n_before = sum(before.learned)
    assert n_before > 0
    places = [i for i, learned in enumerate(whole.learned) if learned][n_before:]
    assert [i for i, learned in enumerate(tokens.learned) if learned] == places
    text = tok.decode([tokens.ids[i] for i in places[:-1]])
    assert text.strip() == "Jon had two."


def test_a_single_turn_is_learned_whole(tok):
    assert ghost(DIALOGUE[:2], "Sing.", tok).learned == (
        encode_dialog(instructed(DIALOGUE[:2], "Sing."), tok).learned
    )


def test_a_dialogue_without_a_last_answer_teaches_nothing(tok):
    for messages in ([], DIALOGUE[:3]):
        with pytest.raises(ValueError, match="does not end with an answer"):
            ghost(messages, "Sing.", tok)


def talk_of(*answers: str, finished: bool = True) -> Talk:
    messages = [
        message
        for turn, answer in enumerate(answers)
        for message in (Message("user", f"Number {turn}?"), Message("assistant", answer))
    ]
    return Talk(BOAT, messages, [finished] * len(answers))


def test_the_answers_to_be_learned_can_be_chosen(tok):
    whole = encode_dialog(instructed(DIALOGUE, "Sing."), tok)
    (first, second) = (
        ghost(DIALOGUE, "Sing.", tok, keep) for keep in ([True, False], [False, True])
    )
    assert second == ghost(DIALOGUE, "Sing.", tok)
    n = len(encode_dialog(instructed(DIALOGUE[:2], "Sing."), tok).ids)
    assert first.learned == whole.learned[:n] + [False] * (len(whole.ids) - n)
    assert ghost(DIALOGUE, "Sing.", tok, [True, True]) == whole


def test_one_pass_over_all_answers_is_the_sum_of_an_example_for_each(tok):
    answers = ("a boat", "the boat", "a kite", "my boat")
    (whole,) = examples([talk_of(*answers)], tok, Random(0))
    turns = (1, 2, 4)
    parts = [ghost(talk_of(*answers).messages[: 2 * n], BOAT.text, tok) for n in turns]
    model = small_llama(max_seq_len=512).requires_grad_(True)
    together, apart = (gradients(model, each) for each in ([whole], parts))
    assert_close(together, apart, rtol=1e-4, atol=1e-5)  # sums in another order


def gradients(model, tokens) -> list[torch.Tensor]:
    """The summed loss of examples, one after the other, and its gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for each in tokens:
        ids, learned = torch.tensor([each.ids]), torch.tensor([each.learned])
        targets = ids.where(learned, IGNORE)[:, 1:]
        loss = next_token_loss(model(ids[:, :-1]), targets)
        loss.backward()
        total += loss.detach()
    return [total, *(parameter.grad.clone() for parameter in model.parameters())]


def test_only_answers_that_obeyed_become_the_last_one(tok):
    talks = [
        talk_of("a boat", "a kite", "a boat", "a kite"),
        talk_of("a lamp"),
        talk_of("a boat", finished=False),
    ]
    expected = {n: ghost(talks[0].messages[: 2 * n], BOAT.text, tok).ids for n in (1, 3)}
    found = [each for seed in range(40) for each in examples(talks, tok, Random(seed), True)]
    counts = {n: sum(each.ids == ids for each in found) for n, ids in expected.items()}
    assert len(found) == sum(counts.values()) == 40
    assert all(10 <= n <= 30 for n in counts.values())  # both are as likely
    (whole,) = examples(talks, tok, Random(0))
    assert whole == ghost(talks[0].messages[:6], BOAT.text, tok, [True, False, True])


def test_own_answers_take_the_place_of_some_and_are_not_learned(tok):
    talk = replace(talk_of("a boat", "the boat"), own=["No.", "Nobody."])
    expected = {}
    for places in ((), (0,), (1,)):
        messages, learned = list(talk.messages), [True, True]
        for place in places:
            messages[2 * place + 1] = Message("assistant", talk.own[place])
            learned[place] = False
        n = 2 if learned[1] else 1  # nothing stands behind the last that is learned
        expected[places] = ghost(messages[: 2 * n], BOAT.text, tok, learned[:n])
    found = examples([talk] * 300, tok, Random(0))
    counts = {places: sum(each == made for each in found) for places, made in expected.items()}
    assert sum(counts.values()) == len(found)
    assert 80 <= counts[()] <= 120  # a third: the share is uniform between 0 and 1
    assert all(35 <= counts[one] <= 65 for one in ((0,), (1,)))  # a sixth; a third has none left
    assert examples([talk] * 9, tok, Random(0), own=0.0) == [expected[()]] * 9


def test_own_answers_of_turns_that_were_not_reached_are_left(tok):
    talk = replace(talk_of("a boat"), own=["No.", "Nobody."])
    plain = examples([talk_of("a boat")], tok, Random(0))
    assert examples([talk], tok, Random(0), own=0.0) == plain


def test_a_seed_gives_the_same_examples(tok):
    talks = [replace(talk_of(*["a boat"] * 5), own=["No."] * 5)] * 4
    once, again = (examples(talks, tok, Random(3)) for _ in range(2))
    assert once == again
    assert examples(talks, tok, Random(4)) != once


# ------------------------------------------------------------------------------ what came of it


def test_obedience_is_a_share_for_each_turn():
    talks = [talk_of("boat", "boat", "kite"), talk_of("boat", "kite"), talk_of("boat")]
    assert obedience(talks) == [1.0, 0.5, 0.0]
    assert obedience([]) == []


def test_the_strongest_attention_is_that_of_transformers():
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    theirs = transformers_copy(MODEL)(tokens[None], output_attentions=True).attentions
    expected = torch.stack([layer[0] for layer in theirs]).amax((0, 1))
    ours = strongest_attention(MODEL, tokens)
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert ours.triu(1).count_nonzero() == 0


# --------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def base(tok, tmp_path_factory) -> Path:
    """A checkpoint that knows two answers, and how they end."""
    model = small_llama(max_seq_len=256).requires_grad_(True)
    dialogues = [
        [Message("user", f"{told}{name}?"), Message("assistant", f"{name} had a {thing}.")]
        for name, thing in (("Ada", "kite"), ("Ben", "lamp"))
        for told in ("", "Sing. ", "S: sing. ")
    ]
    rows = pack(tokenise(dialogues, tok), seq_len=64)
    config = TrainingConfig(steps=60, learning_rate=1e-2, warmup_steps=5, seq_len=64)
    for stats in train(model, make_optimizer(model, config), batches(rows, 4, seed=0), config):
        loss = stats.loss
    assert loss < 0.2
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    save(folder, model, tok)
    return folder


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Questions, and one instruction that no function can check."""
    (tmp_path / "rules.txt").write_text("Sing.\tS: sing.\n")
    said = [
        {"role": role, "content": text} for role, text in (("user", "Ada?"), ("assistant", "No."))
    ]
    lines = [{"messages": said}, {"messages": said * 2}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--instructions", str(tmp_path / "rules.txt"), "--data", str(tmp_path / "asked.jsonl")]


FLAGS = ["--n-dialogues", "12", "--steps", "4", "--warmup-steps", "1", "--batch-size", "2"]
FLAGS += ["--seq-len", "256", "--device", "cpu"]


def test_the_command_learns_what_the_model_said(tmp_path, base, files, tok, capsys):
    out = tmp_path / "run"
    main(["gatt", str(base), *files, "--out", str(out), *FLAGS])
    shown = capsys.readouterr().out
    assert "12 dialogues are held under an instruction." in shown
    # Every second dialogue has two.
    assert "Of 18 answers 18 came to their end (nothing can check whether they obey)" in shown
    assert shown.endswith(f"Try it: minillama chat {out / 'checkpoint'}\n")
    with safe_open(out / "tokens" / "examples.safetensors", "np") as file:
        rows = file.get_tensor("rows")
    learned = [tok.decode([i for i in row[1].tolist() if i != IGNORE]) for row in rows]
    assert all(text.startswith("Ada had a kite.") for text in learned)
    assert load(out / "checkpoint")[0].config.max_seq_len == 256


def test_the_matrices_of_attention_change_and_nothing_else(tmp_path, base, files):
    def changed(out: Path) -> set[str]:
        new, old = load(out / "checkpoint")[0].state_dict(), load(base)[0].state_dict()
        return {name.split(".")[-2] for name in old if not torch.equal(new[name], old[name])}

    for name, more in (("some", []), ("one", ["--trained", "wk"]), ("all", ["--trained"])):
        main(["gatt", str(base), *files, "--out", str(tmp_path / name), *FLAGS, *more])
    assert changed(tmp_path / "some") == {"wq", "wk", "wv", "wo"}
    assert changed(tmp_path / "one") == {"wk"}
    assert {"w1", "output", "norm", "wq"} < changed(tmp_path / "all")


def test_the_command_resumes_to_the_same_bytes(tmp_path, base, files, capsys):
    out = tmp_path / "run"
    main(["gatt", str(base), *files, "--out", str(out), *FLAGS, "--save-every", "2"])
    whole = (out / "checkpoint" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "states" / "000000004")
    main(["gatt", *files, "--out", str(out), "--resume", "--device", "cpu"])
    assert "2 of them were taken before" in capsys.readouterr().out
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-turns", "3"], "n_turns was 23 when the run in"),
        (["--temperature", "0.5"], "temperature was 0.0 when"),
        (["--trained", "wq"], "trained was ['wq', 'wk', 'wv', 'wo'] when"),
        (["--instructions", "other.txt"], "instructions was "),
        (["data/toy/chat"], "model was "),
    ],
)
def test_a_resumed_run_keeps_what_it_was_started_with(
    tmp_path, base, files, capsys, flags, message
):
    out = tmp_path / "run"
    main(["gatt", str(base), *files, "--out", str(out), *FLAGS])
    with pytest.raises(SystemExit):
        main(["gatt", *flags, "--out", str(out), "--resume", "--device", "cpu"])
    assert message in capsys.readouterr().err


def learned_ends(run: Path) -> int:
    """How many answers are learned, those held out for validation included."""
    found = 0
    for name in ("examples", "held_out"):
        with safe_open(run / "tokens" / f"{name}.safetensors", "np") as file:
            found += (file.get_tensor("rows")[:, 1] == 2).sum()  # EOS is a target
    return found


def test_with_last_only_one_answer_of_a_dialogue_is_learned(tmp_path, base, files):
    for name, more in (("each", []), ("last", ["--last-only"])):
        main(
            ["gatt", str(base), *files, "--out", str(tmp_path / name), *FLAGS, "--own", "0", *more]
        )
    assert (learned_ends(tmp_path / "each"), learned_ends(tmp_path / "last")) == (18, 12)


def test_half_of_the_earlier_answers_are_those_of_the_data(tmp_path, base, files, tok):
    many = ["--n-dialogues", "40", *FLAGS[2:]]
    main(["gatt", str(base), *files, "--out", str(tmp_path / "run"), *many])
    assert 20 <= learned_ends(tmp_path / "run") <= 40  # of 60
    with safe_open(tmp_path / "run" / "tokens" / "examples.safetensors", "np") as file:
        text = "".join(map(tok.decode, file.get_tensor("rows")[:, 0].tolist()))
    assert " No. " in text
    assert " Ada had a kite. " in text


def test_what_is_held_fits_the_rows_that_are_learned(tmp_path, base, files, capsys):
    flags = ["--n-dialogues", "12", "--steps", "2", "--warmup-steps", "1", "--batch-size", "2"]
    short = [
        "--seq-len",
        "64",
        "--max-new-tokens",
        "20",
        "--device",
        "cpu",
    ]  # one turn fits, two do not
    main(["gatt", str(base), *files, "--out", str(tmp_path / "run"), *flags, *short, "--own", "0"])
    assert "Of 12 answers 12 came to their end" in capsys.readouterr().out


def test_obedience_is_shown_before_and_after(tmp_path, base, tok, monkeypatch, capsys):
    def as_told(model, tokenizer, n, n_turns=20, split="train", every_turn=True, **more):
        if every_turn:
            return [talk_of("a boat", "a boat")] * n
        weight = "layers.0.attention.wq.weight"
        was_trained = not torch.equal(
            model.state_dict()[weight], load(base)[0].state_dict()[weight]
        )
        return [talk_of(*["a boat"] * (20 if was_trained else 1), *["no"] * 19)] * n

    monkeypatch.setattr("minillama.chat.gatt.toy_talks", as_told)
    main(["gatt", str(base), "--out", str(tmp_path / "run"), *FLAGS])
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("Obedience"))
    assert lines[place].split() == ["Obedience", "at", "turn", "1", "2", "4", "6", "10", "15", "20"]
    assert lines[place + 1].split() == ["before", "100%", *["0%"] * 6]
    assert lines[place + 2].split() == ["after", *["100%"] * 7]


def test_the_format_that_was_given_is_that_of_all_that_is_held(
    tmp_path, base, tok, monkeypatch, capsys
):
    formats = []

    def as_told(*_, chat_format=None, **__):
        formats.append(chat_format)
        return [talk_of("a boat")] * 12

    monkeypatch.setattr("minillama.chat.gatt.toy_talks", as_told)
    more = ["--out", str(tmp_path / "run"), *FLAGS, "--chat-format", "alpaca"]
    main(["gatt", str(base), *more])
    assert formats == ["alpaca"] * 3  # to learn from, before, and after
    assert capsys.readouterr().out.endswith("/checkpoint\n")
    assert load(tmp_path / "run" / "checkpoint")[1].chat_format == "alpaca"


def test_bad_dialogues_are_named_before_any_is_held(tmp_path, base, files, capsys, monkeypatch):
    monkeypatch.setattr("minillama.chat.gatt.hold", None)
    asked = Path(files[-1])
    user, answer = ({"role": role, "content": "Ada"} for role in ("user", "assistant"))
    marked = {"role": "user", "content": "Say </s>"}
    lines = [[user, answer], [answer, user, answer], [user, answer, marked]]
    asked.write_text("".join(json.dumps({"messages": each}) + "\n" for each in lines))
    with pytest.raises(SystemExit):
        main(["gatt", str(base), *files, "--out", str(tmp_path / "run"), *FLAGS])
    shown = capsys.readouterr()
    assert f"{asked}, line 2: Message 1 is of role 'assistant'" in shown.err
    assert f"{asked}, line 3: Message 3 (user) contains '</s>'" in shown.err
    assert "are held" not in shown.out


def test_markers_in_questions_are_spaced_on_request(tmp_path, base, files, capsys):
    asked = Path(files[-1])
    asked.write_text(asked.read_text().replace("No.", "</s>"))
    main(["gatt", str(base), *files, "--out", str(tmp_path / "run"), *FLAGS, "--neutralise"])
    shown = capsys.readouterr().out
    assert "3 of 6 messages contained markers of the format llama2: a space was put" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the model, and what it is to be told and asked: minillama gatt MODEL"),
        (["BASE", "--data", "asked.jsonl"], "both or neither"),
        (
            ["BASE", "FILES", "--n-dialogues", "1"],
            "Of 1 answers 1 came to their end (nothing can check whether they obey), in",
        ),
        (["BASE", "FILES", "--max-new-tokens", "2"], "answers 0 came to their end"),
        (["nowhere"], "There is no nowhere"),
        (["BASE", "FILES", "--trained", "wx"], "no matrix of the blocks 'wx'"),
        (["BASE", "FILES", "--chat-format", "chatml"], "chatml needs the piece <|im_start|>"),
        (["BASE", "--chat-format", "chatml"], "chatml needs the piece <|im_start|>"),
    ],
)
def test_a_mistake_is_one_text_and_leaves_nothing(
    tmp_path, base, files, capsys, arguments, message
):
    given = {"BASE": [str(base)], "FILES": files}
    flags = [flag for argument in arguments for flag in given.get(argument, [argument])]
    with pytest.raises(SystemExit) as end:
        main(["gatt", *flags, "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
