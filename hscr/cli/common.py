"""What every command shares: options, consoles, and how results and job progress are shown."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hscr.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from hscr.store.database import Database
    from hscr.store.store import Store

console = Console()
complaints = Console(stderr=True)

Home = Annotated[
    Path, typer.Option(envvar="HSCR_HOME", help="Folder of all state: database, images, adapters, logs.")
]
Url = Annotated[str, typer.Option(envvar="HSCR_URL", help="Address of the gateway.")]
Key = Annotated[
    str | None, typer.Option(envvar="HSCR_API_KEY", help="API key; not needed on a stack without keys.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

Model = Annotated[
    Path,
    typer.Option(envvar="HSCR_MODEL_PATH", help="Base model folder.", show_default="the phantom model"),
]

HOME = Path(".hscr")
URL = "http://127.0.0.1:8080"


def print_json(value: Any) -> None:
    """One JSON document on stdout, uncoloured and unwrapped."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


# Database drivers take a second to import; commands that only speak to the gateway need none.


def open_store(home: Path) -> "Store":
    """Raises SchemaOutdated, StoreError."""
    from hscr.store.settings import StoreSettings
    from hscr.store.store import Store

    return Store.open(StoreSettings(home=home))


def open_database(home: Path) -> "Database":
    """Of whatever revision it is."""
    from hscr.store.database import Database
    from hscr.store.settings import StoreSettings

    return Database(StoreSettings(home=home).database)


def read_bytes(path: Path) -> bytes:
    """Raises InvalidInput that says what is wrong with the path."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror}.", remedy="Give the path of an image file."
        ) from error


def empty_folder(path: Path) -> None:
    """Make it. Raises Conflict when it holds something, or cannot be made: a file is in its place, say."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Conflict(
            f"The folder {path} cannot be made: {error.strerror}.", remedy="Name a new folder with --out."
        ) from error
    if any(path.iterdir()):
        raise Conflict(f"{path} is not empty.", remedy="Name a new folder with --out.")


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP end the command as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
