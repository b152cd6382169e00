"""`hscr up`: the whole product on this machine."""

import json
import threading
from typing import Annotated, Any

import typer
from rich.table import Table

from hscr.cli.common import HOME, AsJson, Home, Model, console, terminable
from hscr.serving import EngineKind
from hscr.stack import PHANTOM, Ports, Stack


def _port(what: str) -> Any:
    return typer.Option(min=0, max=65535, metavar="PORT", help=what)


def up(
    *,
    home: Home = HOME,
    host: Annotated[str, typer.Option(help="To bind; needs keys off loopback.")] = "127.0.0.1",
    port: Annotated[int, _port("Of the gateway; 0 takes a free one.")] = 8080,
    engine_port: Annotated[int, _port("Of the engine; 0 takes a free one.")] = 0,
    redis_port: Annotated[int, _port("Of the embedded Redis; 0 takes a free one.")] = 0,
    model: Model = PHANTOM,
    engine: Annotated[EngineKind, typer.Option(help="What serves the model.")] = "embedded",
    as_json: AsJson = False,
) -> None:
    """Start everything on this machine and keep it running until Ctrl-C.

    Redis (unless HSCR_REDIS_URL names one), the engine with its agent, the gateway, the workers and the
    scheduler run as real processes. One that dies is started again. All state is in --home.

    Examples:

        hscr up                               the embedded model on port 8080
        hscr up --port 0 --json               a free port, told as JSON
        hscr up --engine vllm                 served by vLLM (`make .venv-vllm/ready` installs it)
        HSCR_FINETUNE_THRESHOLD=50 hscr up    settings reach every process
    """
    with terminable():
        try:
            _run(Stack(
                home, ports=Ports(port, engine_port, redis_port), host=host, model=model, engine=engine,
                on_change=lambda name, what: None if as_json else _tell(name, what),
            ), as_json=as_json)  # fmt: skip
        except KeyboardInterrupt:
            if not as_json:
                console.print("Everything is stopped.")


def _run(stack: Stack, *, as_json: bool) -> None:
    with stack:
        if as_json:
            typer.echo(json.dumps(stack.addresses()))
        else:
            console.print(_table(stack))
        threading.Event().wait()


def _tell(name: str, what: str) -> None:
    style = {"ready": "green", "restarted": "yellow"}.get(what, "dim")
    console.print(f"[{style}]{what:>9}[/]  {name}")


def _table(stack: Stack) -> Table:
    table = Table(title="hscr is up. Ctrl-C stops it.", show_header=False, title_justify="left")
    rows = {
        "Gateway": stack.url,
        "Engine": f"{stack.engine_url} ({stack.engine})",
        "Redis": stack.redis_url,
        "State": str(stack.home),
        "Logs": str(stack.home / "logs"),
        "Try": "hscr phantom sample && hscr ask samples/00.png 'Is there a nodule?'",
    }
    for row in rows.items():
        table.add_row(*row)
    return table
