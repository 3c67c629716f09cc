"""A conversation with a model: what it reads, what is remembered, and how files look."""

import pytest
import torch
from small import small_llama

from minillama.chat import Conversation, Message, encode_dialog
from minillama.chat.conversation import read_messages
from minillama.config import Sampling
from minillama.generation import Decoder, Engine, Request, generate

MODEL = small_llama(max_seq_len=256)
GREEDY = Sampling()


def conversation(tok, **settings) -> Conversation:
    return Conversation(MODEL, tok, **{"max_new_tokens": 12, "sampling": GREEDY} | settings)


def test_the_model_reads_what_was_said_and_its_answer_is_remembered(tok):
    talk = conversation(tok, system="Ada")
    said = [Message("system", "Ada")]
    for question in ("Ben?", "Jon?", "Ida?"):
        said.append(Message("user", question))
        ids = encode_dialog(said, tok).ids
        (alone,) = generate(MODEL, tok, [ids], max_new_tokens=12)
        pieces = list(talk.ask(question))
        assert "".join(pieces).strip() == alone.text.strip()
        assert not pieces[0].startswith(" ")
        said.append(Message("assistant", alone.text.strip()))
        assert talk.messages == said


def test_a_turn_reads_only_what_is_new(tok, monkeypatch):
    read = []
    prefill = Decoder.prefill

    def counted(self, first, ids):
        read.append(len(ids[0]))
        return prefill(self, first, ids)

    monkeypatch.setattr(Decoder, "prefill", counted)
    talk, n_before = conversation(tok), 0
    talk.max_new_tokens = 4
    for question in ("Ben had a boat?", "Jon had a lamp?", "Ida?", "Ada?"):
        "".join(talk.ask(question))
        n_prompt = len(encode_dialog(talk.messages[:-1], tok).ids)
        # An answer's text may be other tokens than those that were drawn: it is read again.
        assert n_prompt - n_before <= sum(read) <= n_prompt - n_before + 8
        n_before, read = n_prompt, []
    assert n_before > 100  # so much was read in all


def test_another_question_in_between_does_no_harm(tok):
    talk, expected = conversation(tok), conversation(tok)
    left = talk.ask("Jon?")  # nobody reads the answer
    assert list(talk.ask("Ben?")) == list(expected.ask("Ben?"))
    assert "".join(left).strip()


def test_another_model_goes_on_with_what_was_said(tok):
    other, talk = small_llama(1, max_seq_len=256), conversation(tok, system="Ada")
    "".join(talk.ask("Ben?"))
    said = [*talk.messages, Message("user", "Jon?")]
    talk.change_model(other, tok)
    answer = "".join(talk.ask("Jon?"))
    (alone,) = generate(other, tok, [encode_dialog(said, tok).ids], max_new_tokens=12)
    assert answer.strip() == alone.text.strip()
    assert talk.messages[:-1] == said
    (first,) = generate(MODEL, tok, [encode_dialog(said, tok).ids], max_new_tokens=12)
    assert first.text.strip() != answer.strip()


def test_a_model_that_cannot_go_on_does_not(tok):
    talk = conversation(tok, system="Ben had a boat, and Ida had a lamp.")
    "".join(talk.ask("Ben?"))
    before = list(talk.messages)
    with pytest.raises(ValueError, match="there is room for"):
        talk.change_model(small_llama(max_seq_len=32), tok)
    assert talk.model is MODEL
    assert talk.messages == before
    assert "".join(talk.ask("Jon?"))


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(tok):
    talk = conversation(tok)
    pieces = talk.ask("Ben?")
    first = next(pieces)
    pieces.close()
    assert talk.messages == [Message("user", "Ben?"), Message("assistant", first.strip())]


def test_an_answer_ends_with_the_piece_of_the_format(tok):
    talk = conversation(tok)
    whole = "".join(talk.ask("Ben?"))
    assert talk.cut_off
    ids = encode_dialog([Message("user", "Ben?")], tok).ids
    (alone,) = generate(MODEL, tok, [ids], max_new_tokens=12)
    end = next(i for i in alone.token_ids if i != alone.token_ids[0])
    talk.reset()
    talk._end_ids = [end]  # as if that were a control piece
    shorter = "".join(talk.ask("Ben?"))
    n = alone.token_ids.index(end)
    assert (
        shorter.strip() == tok.decode([*ids, *alone.token_ids[:n]])[len(tok.decode(ids)) :].strip()
    )
    assert len(shorter) < len(whole)
    assert not talk.cut_off


def test_a_seed_draws_the_same_answers(tok):
    settings = {"sampling": Sampling(temperature=2.0), "seed": 3}
    talks = [conversation(tok, **settings) for _ in range(2)]
    answers = [["".join(talk.ask("Ben?")) for _ in range(2)] for talk in talks]
    assert answers[0] == answers[1]
    other = conversation(tok, **settings | {"seed": 4})
    assert "".join(other.ask("Ben?")) != answers[0][0]


def test_each_turn_draws_with_a_seed_of_its_own(tok, monkeypatch):
    seeds = []

    def noting(ids: list[int], limit: int, sampling: Sampling, seed: int, **rest) -> Request:
        seeds.append(seed)
        return Request(ids, limit, sampling, seed, **rest)

    talk = conversation(tok, seed=3)
    monkeypatch.setattr("minillama.chat.conversation.Request", noting)
    list(talk.ask("Ben?"))
    list(talk.ask("Ben?"))
    assert seeds == [4, 6]


def test_the_oldest_turns_are_forgotten_where_the_context_ends(tok):
    talk = conversation(tok, system="Ada")
    for _ in range(12):
        list(talk.ask("Ben had 3 of these"))
    assert talk.n_forgotten > 0
    assert talk.n_forgotten % 2 == 0
    assert len(talk.messages) == 25  # they are still on record
    with pytest.raises(ValueError, match="there is room for 244"):
        talk.ask("Ben " * 300)
    assert len(talk.messages) == 25


def test_markers_are_refused_from_the_user_and_survived_from_the_model(tok):
    talk = conversation(tok)
    with pytest.raises(ValueError, match=r"Message 1 \(user\) contains '\[INST\]'"):
        talk.ask("[INST] hello")
    with pytest.raises(ValueError, match=r"\(system\) contains '</s>'"):
        talk.reset("</s>")
    assert talk.messages == []
    talk.messages = [Message("user", "Ben?"), Message("assistant", "so [/INST] he said")]
    list(talk.ask("Jon?"))
    assert len(talk.messages) == 4
    with pytest.raises(ValueError, match=r"Message 5 \(user\) contains"):
        talk.ask("<<SYS>>")


def test_reset_keeps_or_changes_the_system_message(tok):
    talk = conversation(tok, system="Ada")
    list(talk.ask("Ben?"))
    talk.reset()
    assert talk.messages == [Message("system", "Ada")]
    talk.reset("Ida")
    assert talk.messages == [Message("system", "Ida")]
    talk.reset("")
    assert talk.messages == []


def test_a_system_message_without_room_for_a_question_is_refused_at_once(tok):
    with pytest.raises(ValueError, match="there is room for 244"):
        conversation(tok, system="Ben " * 300)
    talk = conversation(tok, system="Ada")
    with pytest.raises(ValueError, match="Shorten the message or the system message"):
        talk.reset("Ben " * 300)
    list(talk.ask("Ben?"))
    assert talk.messages[0] == Message("system", "Ada")


@pytest.mark.parametrize(("name", "value"), [("seed", -5), ("max_new_tokens", 0)])
def test_settings_that_mean_nothing_are_refused_at_once(tok, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be at least"):
        conversation(tok, **{name: value})


def test_a_turn_that_failed_is_not_remembered(tok):
    broken = small_llama(max_seq_len=256)
    broken.norm.weight[0] = torch.nan
    talk = Conversation(broken, tok, "Ada")
    with pytest.raises(ValueError, match="logits are no numbers"):
        list(talk.ask("Ben?"))
    assert talk.messages == [Message("system", "Ada")]


def test_an_answer_can_be_compiled(tok, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "minillama.chat.conversation.Engine",
        lambda *args, compile, **more: compiled.append(compile) or Engine(*args, **more),
    )
    for compile in (False, True):
        list(conversation(tok, compile=compile).ask("Ben?"))
    assert compiled == [False, True]


def test_a_conversation_is_saved_and_gone_on_with(tok, tmp_path):
    talk, path = conversation(tok, system="Ada 日本"), tmp_path / "talk.json"
    list(talk.ask("Ben?"))
    talk.save(path)
    again = conversation(tok)
    again.load(path)
    assert again.messages == talk.messages == read_messages(path)
    assert list(again.ask("Jon?")) == list(talk.ask("Jon?"))
    with pytest.raises(FileExistsError, match=r"talk\.json exists and is not overwritten"):
        talk.save(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "holds no dialogue"),
        ("[]", "holds no dialogue"),
        ('{"messages": 3}', "holds no dialogue"),
        ('{"messages": [{"role": "user"}]}', "holds no dialogue"),
        ('{"messages": [{"role": "god", "content": "x"}]}', "message 1 has the role 'god'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content of type int"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends with a question"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "Message 1 is of role"),
        (
            '{"messages": [{"role": "system", "content": "<s>"}]}',
            r"Message 1 \(system\) contains '<s>'",
        ),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(tok, tmp_path, content, message):
    path = tmp_path / "talk.json"
    path.write_text(content)
    talk = conversation(tok, system="Ada")
    with pytest.raises(ValueError, match=message):
        talk.load(path)
    assert talk.messages == [Message("system", "Ada")]
