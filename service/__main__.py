"""`python -m service --host 127.0.0.1 --port 8080`: one copy of the gateway."""

import argparse
import signal
import sys
from collections.abc import Sequence

import uvicorn

from hscr.errors import HscrError, Unauthenticated
from hscr.store.store import Store
from service.app import create_app
from service.logs import configure
from service.server import Server
from service.settings import GatewaySettings
from service.state import Leaving


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns 2, after saying why on stderr, when it must not start."""
    settings = _settings(arguments)
    try:
        check_bind(settings)
    except HscrError as error:
        print(f"{error.detail} {error.remedy}", file=sys.stderr)  # noqa: T201
        return 2
    configure(settings.log_level)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn raises it again once it has shut down in good order
        signal.signal(number, lambda *_: sys.exit(0))
    leaving = Leaving()
    config = uvicorn.Config(
        create_app(settings, leaving),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=settings.drain_grace,
    )
    Server(config, leaving, notice=settings.drain_notice).run()
    return 0


def check_bind(settings: GatewaySettings) -> None:
    """Raises Unauthenticated when others could connect and no key exists; SchemaOutdated, StoreError."""
    with Store.open(settings) as store:
        if not settings.loopback and not store.keys.any():
            raise Unauthenticated(
                f"Refusing to listen on {settings.host}: others could connect and there is no API key.",
                remedy="Create one with `hscr keys create`, or bind to 127.0.0.1.",
            )


def _settings(arguments: Sequence[str] | None) -> GatewaySettings:
    settings = GatewaySettings()
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("--host", default=settings.host)
    parser.add_argument("--port", type=int, default=settings.port)
    return settings.model_copy(update=vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
