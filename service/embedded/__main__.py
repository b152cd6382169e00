"""`python -m service.embedded --model DIR`: serve one small LLaVA until SIGTERM.

When it listens, one JSON line on stdout says where: {"address": "http://127.0.0.1:8100", "model": "..."}.
On SIGTERM or SIGINT it accepts nothing more, finishes what runs within --grace seconds, and exits with 0.
"""

import argparse
import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import torch
import uvicorn

from hscr.errors import HscrError
from hscr.models.vlm import VLM
from service.embedded.app import create_app


class Server(uvicorn.Server):
    """Tells its address once it accepts connections."""

    def __init__(self, config: uvicorn.Config, model: str) -> None:
        super().__init__(config)
        self._model = model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and then one line on stdout."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        line = {"address": f"http://{host}:{port}", "host": host, "port": port, "model": self._model}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Load the model and serve it."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        vlm = VLM.load(options.model)
    except HscrError as error:
        sys.exit(str(error))
    name = options.served_model_name or options.model.resolve().name
    app = create_app(
        vlm,
        name=name,
        root=str(options.model),
        max_batch=options.max_batch,
        max_loras=options.max_loras,
        max_rank=options.max_lora_rank,
    )
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=options.grace,
    )
    # uvicorn raises the signal again once it has shut down in good order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    asyncio.run(Server(config, name).serve())


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m service.embedded", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a LLaVA in the hub's layout")
    parser.add_argument("--host", default="127.0.0.1", help="it knows no keys: keep it on a private network")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one")
    parser.add_argument("--served-model-name", help="default: the folder's name")
    parser.add_argument("--max-loras", type=int, default=8, help="adapters in memory at once")
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=16, help="requests decoded together")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--grace", type=int, default=30, help="seconds to finish running requests")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
