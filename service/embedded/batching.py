"""The model's one thread: admit what waits, decode every running row one token further, repeat.

Rows that share an adapter share a forward pass. A row's next token depends on its own log-probabilities and
its own generator, so its batch mates can change it by no more than floating-point noise.
"""

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hscr.errors import EngineUnavailable
from hscr.models.vlm import VLM
from service.embedded.rows import Rows
from service.embedded.sequences import Piece, Sequence

log = logging.getLogger(__name__)


class Batcher:
    """Runs sequences on one VLM, at most `max_batch` at a time, first come first served.

    `observe(sequence, piece)` hears of every piece just before it is delivered.
    """

    def __init__(self, vlm: VLM, max_batch: int, observe: Callable[[Sequence, Piece], None]) -> None:
        self._vlm = vlm
        self._max_batch = max_batch
        self._observe = observe
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._admitted: set[Sequence] = set()
        self._rows: dict[str | None, Rows] = {}
        self._adapter: str | None = None
        self._activation = ExitStack()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> list[Sequence]:
        with self._wake:
            return list(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        with self._wake:
            return list(self._admitted)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises EngineUnavailable when the model's thread has ended."""
        with self._wake:
            self._require_alive()
            self._waiting.append(sequence)
            self._wake.notify()

    def between_steps(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` on the model's thread while no forward pass is under way and no adapter is active."""
        future: Future[Any] = Future()
        with self._wake:
            self._require_alive()
            self._tasks.append((work, future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """End the thread after the present step; what has not finished gets an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _require_alive(self) -> None:
        if not self.alive:
            raise EngineUnavailable("The engine's model loop has ended.", remedy="Restart the engine.")

    def _run(self) -> None:
        error: Exception = EngineUnavailable("The engine is shutting down.", remedy="Ask another replica.")
        try:
            with torch.no_grad():
                self._loop()
        except Exception as failure:
            log.exception("the model loop died")
            error = failure
        self._fail_everything(error)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._tasks or self._admitted)
                if self._closed:
                    return
                tasks, self._tasks = self._tasks, deque()
            # In this order: a task may unload the adapter of a row that was cancelled before it was queued.
            self._drop_cancelled()
            for work, future in tasks:
                self._perform(work, future)
            self._admit()
            for rows in list(self._rows.values()):
                self._step(rows)

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in (*self.waiting, *self.running) if s.cancelled]:
            self._deliver(sequence, Piece(finish_reason="abort"))
        for adapter, rows in list(self._rows.items()):
            self._hold(adapter, self._unfinished(rows))

    def _perform(self, work: Callable[[], Any], future: Future[Any]) -> None:
        self._activate(None)
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  it is raised to whoever waits for the future
            future.set_exception(error)

    def _admit(self) -> None:
        groups: defaultdict[str | None, list[Sequence]] = defaultdict(list)
        with self._wake:
            while self._waiting and len(self._admitted) < self._max_batch:
                sequence = self._waiting.popleft()
                self._admitted.add(sequence)
                groups[sequence.adapter].append(sequence)
        for adapter, sequences in groups.items():
            self._activate(adapter)
            rows, logprobs = Rows.prefill(self._vlm, sequences, self._visual_tokens(sequences))
            fresh = self._advance(rows, logprobs)
            present = self._rows.get(adapter)
            self._hold(adapter, present.join(fresh) if present and fresh else present or fresh)

    def _step(self, rows: Rows) -> None:
        adapter = rows.sequences[0].adapter
        self._activate(adapter)
        self._hold(adapter, self._advance(rows, rows.step(self._vlm)))

    def _advance(self, rows: Rows, logprobs: Tensor) -> Rows | None:
        for sequence, row in zip(rows.sequences, logprobs, strict=True):
            self._deliver(sequence, sequence.advance(row))
        return self._unfinished(rows)

    def _unfinished(self, rows: Rows) -> Rows | None:
        kept = [i for i, sequence in enumerate(rows.sequences) if sequence in self._admitted]
        if len(kept) == len(rows.sequences):
            return rows
        return rows.keep(kept) if kept else None

    def _hold(self, adapter: str | None, rows: Rows | None) -> None:
        if rows is None:
            self._rows.pop(adapter, None)
        else:
            self._rows[adapter] = rows

    def _deliver(self, sequence: Sequence, piece: Piece) -> None:
        if piece.last:
            with self._wake:
                self._admitted.discard(sequence)
                if sequence in self._waiting:
                    self._waiting.remove(sequence)
        self._observe(sequence, piece)
        sequence.deliver(piece)

    def _visual_tokens(self, sequences: list[Sequence]) -> list[Tensor | None]:
        """[N, d] of each sequence's image; one pass of the vision tower over those it has not seen."""
        pictures = [sequence.prompt.picture for sequence in sequences]
        fresh = {picture: picture.pixels for picture in pictures if picture and picture.pixels is not None}
        if fresh:
            encoded = self._vlm.visual_tokens(torch.cat(list(fresh.values())))
            for picture, tokens in zip(fresh, encoded, strict=True):
                picture.tokens, picture.pixels = tokens, None
        return [picture.tokens if picture else None for picture in pictures]

    def _activate(self, adapter: str | None) -> None:
        # Switching walks over every layer, so an adapter stays active until another one is wanted.
        if adapter == self._adapter:
            return
        self._activation.close()
        self._adapter = None
        if adapter is not None:
            self._activation.enter_context(self._vlm.use(adapter))
            self._adapter = adapter

    def _fail_everything(self, error: Exception) -> None:
        with self._wake:
            self._closed = True
            tasks, self._tasks = self._tasks, deque()
        for _, future in tasks:
            future.set_exception(error)
        for sequence in (*self.waiting, *self.running):
            self._deliver(sequence, Piece(error=error))
