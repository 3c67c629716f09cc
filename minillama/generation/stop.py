"""Stop strings, found in a stream of text pieces."""

from collections.abc import Sequence


class StopFilter:
    """Lets text through until a stop string is complete; gives none of the stop string away.

    The end of the text that could still become a stop string is held back until it is clear. The
    result does not depend on how the text is cut into pieces: generation ends at the first
    character that completes a stop string, and the text ends where that stop string starts (the
    longest, if several are completed at once).

    Raises ValueError for an empty stop string: it would stop before the first token.
    Shown in notebooks/00_tour.ipynb.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if not all(stops):
            raise ValueError("A stop string is empty, so nothing would be written. Leave it out.")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now certain. After a stop, `stopped` is true and nothing follows."""
        if self.stopped:
            return ""
        self._held += piece
        found = [
            (start + len(stop), start)
            for stop in self.stops
            if (start := self._held.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        certain = len(self._held) - self._undecided()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def flush(self) -> str:
        """The text still held back when nothing more comes."""
        text, self._held = self._held, ""
        return text

    def _undecided(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        return max(
            (
                length
                for stop in self.stops
                for length in range(1, len(stop))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )
