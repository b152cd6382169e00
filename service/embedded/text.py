"""Token ids to text that never has to be taken back, and never shows a stop string."""

from collections.abc import Callable, Sequence


class TextStream:
    """Grows an answer's text token by token.

    What is given out is final: half a UTF-8 character and anything that may become a stop string are held
    back until the next token decides.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        self._text = self._decode(self._ids)
        found = [at for stop in self._stop if (at := self._text.find(stop, self._given)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(self._certain())

    def finish(self) -> str:
        """What was held back, once no further token will come."""
        return "" if self.stopped else self._give(len(self._text))

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _certain(self) -> int:
        whole = self._text.rstrip("\ufffd")
        return len(whole) - max((_overlap(whole, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
