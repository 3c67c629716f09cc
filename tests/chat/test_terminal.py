"""`minillama chat`: fed with lines, commands, mistakes and Ctrl-C; and with a real model."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from small import small_llama, small_tokenizer

from minillama.chat import Conversation
from minillama.chat.terminal import HELP, chat
from minillama.checkpoint import save
from minillama.checkpoint.fetch import fetched
from minillama.cli import main
from minillama.config import Sampling

MODEL = small_llama(max_seq_len=256)


def conversation(tok) -> Conversation:
    return Conversation(MODEL, tok, max_new_tokens=12, sampling=Sampling())


def say(talk: Conversation, *lines: str | type[BaseException]) -> list[str]:
    """Prompts of the terminal, answered with these lines."""
    given: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(given)
        if not isinstance(line, str):
            raise line
        return line

    chat(talk, read)


def test_a_session_in_the_terminal(tok, tmp_path, capsys):
    talk, path = conversation(tok), tmp_path / "talk.json"
    expected = conversation(tok)
    answer = "".join(expected.ask("Ben?"))
    say(talk, "Ben?", "", f"/save {path}", "/reset", "/system Ada", f"/load {path}", "/help")
    assert capsys.readouterr().out.splitlines() == [
        *answer.splitlines(),
        "(Cut off at the limit of tokens: see --max-new-tokens.)",
        f"(Saved 2 messages to {path}.)",
        "(Forgotten.)",
        "(A new conversation, with this system message.)",
        f"(Loaded 2 messages from {path}.)",
        *HELP.splitlines(),
        "",
    ]
    assert talk.messages == expected.messages
    assert [m["role"] for m in json.loads(path.read_text())["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/dance", "There is no command /dance. /help lists them"),
        ("/save", "Name a file: /save FILE."),
        ("/load", "Name a file: /load FILE."),
        ("/load nowhere.json", "nowhere.json"),
        ("/save /nowhere/talk.json", "/nowhere/talk.json"),
        ("[INST]", "contains '[INST]'"),
        ("/system <s>", "contains '<s>'"),
        ("Ben " * 300, "there is room for 244"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_session_goes_on(tok, capsys, line, told):
    talk = conversation(tok)
    say(talk, line, "Ben?")
    assert told in capsys.readouterr().out.splitlines()[0]
    assert [m.role for m in talk.messages] == ["user", "assistant"]


def test_another_model_goes_on(tok, capsys):
    talk, other = conversation(tok), small_llama(1, max_seq_len=256)

    def opened(name: str):
        if name != "b":
            raise FileNotFoundError(f"There is no {name}.")
        return other, tok

    given = iter(["Ben?", "/model", "/model c", "/model b", "Jon?", EOFError])

    def read(prompt: str) -> str:
        line = next(given)
        if line is EOFError:
            raise EOFError
        return line

    chat(talk, read, opened)
    shown = capsys.readouterr().out
    for told in (
        "(Name a checkpoint, or a model that was fetched: /model NAME.)",
        "(There is no c.)",
        "(b goes on, in the chat format llama2.)",
    ):
        assert told in shown
    assert talk.model is other
    assert [m.role for m in talk.messages] == ["user", "assistant"] * 2


def test_slashes_are_sent_when_doubled_and_quit_leaves(tok, capsys):
    talk = conversation(tok)
    say(talk, "//Ben?", "/quit", "Jon?")
    assert [m.content for m in talk.messages[::2]] == ["/Ben?"]


def test_it_says_so_whenever_more_is_forgotten(tok, capsys):
    talk = conversation(tok)
    say(talk, *["Ben had 3 of these: a boat"] * 9)
    told = [line for line in capsys.readouterr().out.splitlines() if "context of 256" in line]
    assert told[0].startswith("(The context of 256 tokens is full: the oldest 2 messages are")
    assert len(told) == len(set(told))


def test_an_interrupt_ends_the_answer_and_not_the_session(tok, capsys, monkeypatch):
    talk = conversation(tok)
    real = talk.ask

    def interrupted(question: str):
        pieces = real(question)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "ask", interrupted)
    say(talk, "Ben?", KeyboardInterrupt, "/help")
    out = capsys.readouterr().out
    assert " (stopped)\n\n(/quit or Ctrl-D leaves)\n" in out
    assert HELP in out
    assert [m.role for m in talk.messages] == ["user", "assistant"]


# ------------------------------------------------------------------------------------ command line


@pytest.fixture
def feed(monkeypatch, capsys):
    """What the command prints when it is fed these lines."""

    def feed(*arguments: object, lines: list[str]) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", *map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out.splitlines()

    return feed


def test_a_session_with_a_checkpoint(feed, tmp_path):
    save(tmp_path / "model", MODEL, small_tokenizer())
    settings = ["--max-new-tokens", "5", "--seed", "1", "--system", "Ada"]
    first = feed(tmp_path / "model", *settings, lines=["Ben?", f"/save {tmp_path / 'talk.json'}"])
    assert first[0].endswith(
        "a context of 256 tokens, chat format llama2. /help lists the commands."
    )
    assert any("(Saved 3 messages to" in line for line in first)
    assert first[1].startswith("(That format is assumed: the vocabulary has no pieces of another")
    again = feed(tmp_path / "model", *settings, lines=["Ben?"])
    assert again[2] == first[2]  # the same seed
    save(tmp_path / "assistant", MODEL, small_tokenizer().for_chat("llama2"))
    known = feed(tmp_path / "assistant", *settings, lines=["Ben?"])
    assert known == [first[0], *again[2:]]
    settings += ["--chat-format", "llama2"]
    assert feed(tmp_path / "model", *settings, lines=["Ben?"])[1] == first[2]
    save(tmp_path / "other", small_llama(1, max_seq_len=64), small_tokenizer())
    both = feed(tmp_path / "model", *settings, lines=[f"/model {tmp_path / 'other'}", "Ben?"])
    assert both[1].endswith("other goes on, in the chat format llama2.)")
    assert both[2] != first[2]


def test_a_format_that_the_vocabulary_lacks_ends_with_one_text(feed, tmp_path, capsys):
    save(tmp_path / "model", MODEL, small_tokenizer())
    with pytest.raises(SystemExit, match="2"):
        feed(tmp_path / "model", "--chat-format", "chatml", lines=["Ben?"])
    told = capsys.readouterr().err
    assert told.startswith("minillama: The chat format chatml needs the piece <|im_end|>")
    assert told.count("\n") == 1


@pytest.mark.slow
def test_smollm2_knows_two_capitals():
    path = fetched("smollm2-135m-instruct")
    if path is None:
        pytest.skip("needs SmolLM2: minillama fetch smollm2-135m-instruct")
    command = [sys.executable, "-m", "minillama", "chat", path, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--temperature", "0"],
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "chat format chatml" in done.stdout
    assert "Paris" in done.stdout
    assert "Rome" in done.stdout
