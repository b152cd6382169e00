"""Questions asked without pause while the adapter under them is replaced.

Which version made an answer is told by its text alone: only questions are asked to which the two versions
give different answers, computed beforehand by transformers and PEFT in this process, not by the engine under
test.
"""

import io
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from PIL import Image

from hscr.client import Client
from hscr.errors import HscrError
from hscr.imaging.decode import prepare
from hscr.imaging.guard import Limits
from hscr.models.phantom.anatomy import photograph
from hscr.models.phantom.data import Example
from hscr.records import Answer

if TYPE_CHECKING:
    from hscr.models.vlm import VLM

OLD, NEW, NEITHER = "old", "new", "neither"
STREAMS = 2


@dataclass(frozen=True)
class Telling:
    """A question that tells two versions apart by what they answer."""

    example: Example
    old: str
    new: str

    def version(self, text: str) -> str:
        return {self.old: OLD, self.new: NEW}.get(text, NEITHER)


def telling_questions(model: Path, adapter: Path, examples: Iterable[Example], wanted: int) -> list[Telling]:
    """The first `wanted` examples to which base and adapter answer differently, or fewer."""
    from hscr.models.vlm import VLM  # noqa: PLC0415 - torch is only needed here, minutes after the start

    vlm = VLM.load(model)
    vlm.load_adapter(adapter, "candidate")
    batches = iter(partial(_take, iter(examples), 32), [])
    answered = (telling for batch in batches for telling in _answer(vlm, batch))
    return list(islice((telling for telling in answered if telling.old != telling.new), wanted))


def _take(examples: Iterator[Example], count: int) -> list[Example]:
    return list(islice(examples, count))


def _answer(vlm: "VLM", examples: Sequence[Example]) -> list[Telling]:
    tokens = vlm.encode({str(example.phantom.seed): _as_served(example) for example in examples})
    prompts = [vlm.prompt_ids(example.question) for example in examples]
    prefix = vlm.embed(prompts, [tokens[str(example.phantom.seed)] for example in examples])
    old = vlm.generate_greedy(vlm.prefill(prefix))
    with vlm.use("candidate"):
        new = vlm.generate_greedy(vlm.prefill(prefix))
    return [Telling(*row) for row in zip(examples, old, new, strict=True)]


def _as_served(example: Example) -> Image.Image:
    prepared = prepare(photograph(example.phantom), limits=Limits())
    return Image.open(io.BytesIO(prepared.png))


@dataclass
class Streams:
    """Clients that stream answers from entering to leaving the block, one question after another."""

    url: str
    key: str
    questions: Sequence[Telling]
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    contradictions: int = 0
    """answers whose provenance names another version than their text"""
    last: Answer | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(STREAMS)
        self._changed = threading.Condition()

    @property
    def requests(self) -> int:
        return sum(self.versions.values()) + len(self.failures)

    @property
    def failed(self) -> int:
        """Broken streams, answers of neither version, and provenance that contradicts the text."""
        return len(self.failures) + self.versions[NEITHER] + self.contradictions

    def __enter__(self) -> Self:
        self._running = [self._pool.submit(self._ask, number) for number in range(STREAMS)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()
        if error is None:
            for stream in self._running:
                stream.result()

    def until_new(self, count: int, deadline_seconds: float) -> bool:
        """Wait until `count` answers were made by the new version; False past the deadline."""
        with self._changed:
            return self._changed.wait_for(lambda: self.versions[NEW] >= count, deadline_seconds)

    def _ask(self, number: int) -> None:
        questions = cycle([*self.questions[number:], *self.questions[:number]])
        with Client(self.url, self.key) as client:
            while not self._stop.is_set():
                self._one(client, next(questions))

    def _one(self, client: Client, question: Telling) -> None:
        try:
            *_, answer = client.ask_stream(photograph(question.example.phantom), question.example.question)
        except HscrError as error:
            with self._changed:
                self.failures.append(f"{error.slug}: {error.detail}")
            return
        assert isinstance(answer, Answer)
        version = question.version(answer.text)
        named = NEW if answer.provenance.adapter else OLD
        with self._changed:
            self.versions[version] += 1
            self.contradictions += version not in {named, NEITHER}
            self.last = answer
            self._changed.notify_all()
