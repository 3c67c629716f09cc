"""`minillama chat`: a conversation in the terminal, a line a turn, and commands behind a slash."""

from collections.abc import Callable, Generator
from contextlib import suppress

from minillama.chat.conversation import Conversation
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

Open = Callable[[str], tuple[Llama, Tokenizer]]

HELP = """\
/system TEXT   say how the model is to behave, and start anew (without TEXT: without such a message)
/reset         forget what was said; the system message stays
/model NAME    go on with another model: a checkpoint, or a name that `minillama fetch` lists
/save FILE     write the conversation to a new file
/load FILE     go on with a conversation that was saved
/help          this list
/quit          leave (as Ctrl-D does)
Ctrl-C stops an answer. A line that starts with // is sent with one slash less."""


def chat(
    conversation: Conversation,
    read: Callable[[str], str] | None = None,
    open_model: Open | None = None,
) -> None:
    """Read questions and commands until the input ends, and print the answers as they come.

    What cannot be done is said, and the conversation goes on. ``read`` gets the prompt and returns
    a line, or raises EOFError, as `input` does, which is the default. ``open_model`` opens the
    models that /model names; without it there is no such command.
    """
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (arrow keys edit the line and bring back earlier ones)
    forgotten = 0
    while True:
        try:
            line = (read or input)("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                command, _, argument = line[1:].partition(" ")
                if command in ("quit", "exit"):
                    return
                print(obey(conversation, command, argument.strip(), open_model))
                forgotten = 0
            elif line.strip():
                pieces = conversation.ask(line.removeprefix("/"))
                if conversation.n_forgotten > forgotten:
                    context = conversation.model.config.max_seq_len
                    print(
                        f"(The context of {context} tokens is full: the oldest "
                        f"{conversation.n_forgotten} messages are forgotten. /reset starts anew.)"
                    )
                forgotten = conversation.n_forgotten
                answer(pieces)
                if conversation.cut_off:
                    print("(Cut off at the limit of tokens: see --max-new-tokens.)")
        except (ValueError, OSError) as error:
            print(f"({error})")


def answer(pieces: Generator[str, None, None]) -> None:
    """Print an answer as it comes; Ctrl-C ends it where it is."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" (stopped)", end="")
    print()


def obey(
    conversation: Conversation, command: str, argument: str, open_model: Open | None = None
) -> str:
    """Do what a command says, and tell what was done. Raises ValueError for an unknown one."""
    if command == "help":
        return HELP
    if command == "reset":
        conversation.reset()
        return "(Forgotten.)"
    if command == "system":
        conversation.reset(argument)
        return (
            "(A new conversation, with this system message.)"
            if argument
            else "(A new conversation.)"
        )
    if command == "model" and open_model:
        if not argument:
            raise ValueError("Name a checkpoint, or a model that was fetched: /model NAME.")
        conversation.change_model(*open_model(argument))
        return f"({argument} goes on, in the chat format {conversation.chat_format}.)"
    if command in ("save", "load") and not argument:
        raise ValueError(f"Name a file: /{command} FILE.")
    if command == "save":
        conversation.save(argument)
        return f"(Saved {len(conversation.messages)} messages to {argument}.)"
    if command == "load":
        conversation.load(argument)
        return f"(Loaded {len(conversation.messages)} messages from {argument}.)"
    raise ValueError(f"There is no command /{command}. /help lists them; // sends a slash.")
