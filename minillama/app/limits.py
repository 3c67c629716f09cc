"""How much the server takes from its clients."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What goes beyond one of these is refused with an error of the protocol, never cut silently.

    Raises ValueError for a limit below 1: nothing could be asked.
    """

    max_body: int = 2**20  # bytes of a request
    max_import: int = 2**24  # bytes of a conversation that the page sends to be kept
    max_messages: int = 1000  # of a dialogue; prompts of a completion
    max_characters: int = 500_000  # of all texts of a request
    max_tokens: int = 4096  # of an answer; also where the client does not say
    max_choices: int = 64  # answers to one request: prompts times n
    max_logprobs: int = 2**18  # of an answer to one request, the likeliest other tokens included
    max_requests: int = 256  # at the same time; they wait for a row, and read or write meanwhile
    max_seconds: float = 600.0  # from a request to the end of its answer
    body_seconds: float = 20.0  # within which a request must have come in

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 1:
                raise ValueError(f"{field.name} is {value}, but must be at least 1.")
