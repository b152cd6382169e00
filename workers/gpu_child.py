"""The process that owns torch, the model and the GPU's memory; `workers.gpu` starts and kills it.

Standard input brings one JSON object per line, `{"id", "task", "arguments"}` or `{"stop": id, "checkpoint"}`;
`--events` is the file descriptor that takes its answers: `progress`, `record` and such events, `alive` among
them, closed by one `result` or `error`. The end of standard input means that the parent is dead: nothing may
outlive it.
"""

import argparse
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from hscr.errors import HscrError
from hscr.faults import fault_point
from hscr.store.blobs import open_blobs
from hscr.store.settings import StoreSettings
from workers.logs import configure

log = logging.getLogger("workers.gpu_child")

_ALIVE_SECONDS = 1.0


class Channel:
    """The way back to the parent for one task, and the parent's wish that it stop."""

    def __init__(self, number: int, events: int, stops: dict[int, bool]) -> None:
        """stops: the tasks that shall stop, and whether to write a checkpoint before."""
        self._number = number
        self._events = events
        self._stops = stops
        self._told = 0.0

    def send(self, event: str, **data: Any) -> None:
        line = json.dumps({"id": self._number, "event": event, **data}).encode() + b"\n"
        while line:
            line = line[os.write(self._events, line) :]
        fault_point("child.told")

    def stopped(self) -> bool:
        """Asked at every step of a task, it is also how the parent learns that the task advances."""
        if time.monotonic() - self._told > _ALIVE_SECONDS:
            self._told = time.monotonic()
            self.send("alive")
        return self._number in self._stops

    def checkpoint_wanted(self) -> bool:
        return self._stops.get(self._number, False)


def main() -> None:
    options = _options()
    configure()
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    stops: dict[int, bool] = {}
    threading.Thread(target=_listen, args=(requests, stops), daemon=True).start()

    gc.disable()  # modules are no garbage: to look for some is a fifth of the time that they take
    from workers.gpu_work import Workbench  # noqa: PLC0415  torch takes seconds, in which a stop must be heard

    gc.freeze()
    gc.enable()
    blobs = open_blobs(StoreSettings(home=options.home))
    bench = Workbench(options.model, options.device, options.dtype, blobs, options.threads)
    while True:
        request = requests.get()
        _serve(bench, request, Channel(request["id"], options.events, stops))


def _listen(requests: "queue.Queue[dict[str, Any]]", stops: dict[int, bool]) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "stop" in message:
            stops[message["stop"]] = message["checkpoint"]
        else:
            requests.put(message)
    # This process leads its group, so whatever it started goes with it.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _serve(bench: Any, request: dict[str, Any], channel: Channel) -> None:
    fault_point("child.asked", request["task"])
    try:
        result = bench.run(request["task"], request["arguments"], channel)
    except HscrError as error:
        kind = type(error).__name__
        channel.send("error", kind=kind, detail=error.detail, remedy=error.remedy)
    except Exception as error:  # noqa: BLE001  the parent decides what becomes of job and child
        # The message may quote what the task was about, so only the place is logged.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("unexpected %s\n%s", type(error).__name__, frames)
        detail = f"the GPU child met an unexpected {type(error).__name__}"
        channel.send("error", unforeseen=True, detail=detail)
    else:
        fault_point("child.done", request["task"])
        channel.send("result", result=result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--home", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
