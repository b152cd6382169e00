"""The process that owns torch, the model and the GPU's memory; `workers.gpu` starts and kills it.

Standard input brings one JSON object per line, `{"id", "task", "arguments"}` or `{"stop": id}`; `--events` is
the file descriptor that takes its answers: `progress`, `record` and `skip` events, closed by one `result` or
`error`. The end of standard input means that the parent is dead: nothing may outlive it.
"""

import argparse
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from hscr.errors import HscrError
from hscr.faults import fault_point
from workers.logs import configure

log = logging.getLogger("workers.gpu_child")


class Channel:
    """The way back to the parent for one task, and the parent's wish that it stop."""

    def __init__(self, number: int, events: int, stops: set[int]) -> None:
        self._number = number
        self._events = events
        self._stops = stops

    def send(self, event: str, **data: Any) -> None:
        line = json.dumps({"id": self._number, "event": event, **data}).encode() + b"\n"
        while line:
            line = line[os.write(self._events, line) :]
        fault_point("child.told")

    def stopped(self) -> bool:
        return self._number in self._stops


def main() -> None:
    options = _options()
    configure()
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    stops: set[int] = set()
    threading.Thread(target=_listen, args=(requests, stops), daemon=True).start()

    from workers.gpu_work import Workbench  # noqa: PLC0415  torch takes seconds, in which a stop must be heard

    bench = Workbench(options.model, options.device, options.dtype, options.blobs, options.threads)
    while True:
        request = requests.get()
        _serve(bench, request, Channel(request["id"], options.events, stops))


def _listen(requests: "queue.Queue[dict[str, Any]]", stops: set[int]) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "stop" in message:
            stops.add(message["stop"])
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
    except Exception as error:  # noqa: BLE001  the next task deserves a living child
        # The message may quote what the task was about, so only the place is logged.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("unexpected %s\n%s", type(error).__name__, frames)
        channel.send(
            "error",
            kind="HscrError",
            detail=f"The {request['task']} task met an unexpected {type(error).__name__}.",
            remedy="The worker's log shows where; submit the job again once the cause is gone.",
        )
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
    parser.add_argument("--blobs", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
