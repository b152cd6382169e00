"""`hscr keys` and `hscr db`: what only somebody at the machine with the database may do."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hscr.cli.common import HOME, AsJson, Home, console, open_database, open_store, print_json
from hscr.errors import InvalidInput, SchemaOutdated
from hscr.records import Role

keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway: make, ensure, list, revoke.")
db = typer.Typer(no_args_is_help=True, help="The database's tables: bring them up to date, check them.")


Name = Annotated[str, typer.Option(help="Who or what will use it.")]
WithRole = Annotated[Role, typer.Option(help="Each may do what the ones before it may.")]
Project = Annotated[str, typer.Option(help="Keys of one project see one another's answers.")]
TrainConsent = Annotated[bool, typer.Option("--train-consent", help="What it sends may be trained on.")]


@keys.command()
def create(
    name: Name,
    *,
    role: WithRole = Role.CLIENT,
    project: Project = "default",
    train_consent: TrainConsent = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Make an API key and show its secret, once. From then on the gateway asks for keys.

    Examples:

        hscr keys create --name ward-3
        hscr keys create --name "Dr. No" --role reviewer --train-consent
    """
    with open_store(home) as store:
        key, secret = store.keys.create(name, role, project=project, train_consent=train_consent)
    if as_json:
        print_json({**key.model_dump(mode="json"), "secret": secret})
        return
    console.print(f"{key.id}: role {key.role}, project {key.project}, training {_yes(key.train_consent)}")
    console.print("The secret is shown only now:")
    typer.echo(secret)


@keys.command()
def ensure(
    name: Name,
    *,
    secret_file: Annotated[Path, typer.Option(help="Holds the secret, `hscr_sk_…`; `-` is standard input.")],
    role: WithRole = Role.CLIENT,
    project: Project = "default",
    train_consent: TrainConsent = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="End what a key of this name has instead, at once.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Make an API key with a secret of yours, unless it is there: for installations without a person.

    A key that was revoked stays so. The secret is at least as long as those of `hscr keys create`.

    Examples:

        echo hscr_sk_$(openssl rand -hex 32) > first-key
        hscr keys ensure --name first-key --role operator --secret-file first-key
        vault read -field=key hscr | hscr keys ensure --name ward-3 --secret-file - --replace
    """
    secret = _secret(secret_file)
    with open_store(home) as store:
        key, changed = store.keys.ensure(
            name, role, secret, project=project, train_consent=train_consent, replace=replace
        )
    if as_json:
        print_json({**key.model_dump(mode="json"), "changed": changed})
        return
    state = "there now" if changed else "revoked, and stays so" if key.revoked_at else "there already"
    console.print(f"{key.id}: role {key.role}, project {key.project}: {state}.")


@keys.command("list")
def list_(*, home: Home = HOME, as_json: AsJson = False) -> None:
    """Show all keys. Secrets are not stored, so they cannot be shown."""
    with open_store(home) as store:
        found = store.keys.page()
    if as_json:
        print_json([key.model_dump(mode="json") for key in found])
        return
    table = Table("key", "name", "role", "project", "may train", "made", "revoked")
    for key in found:
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
        made = f"{key.created_at:%Y-%m-%d %H:%M}"
        table.add_row(key.id, key.name, key.role, key.project, _yes(key.train_consent), made, revoked)
    console.print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `hscr keys list` shows it.", show_default=False)],
    *,
    home: Home = HOME,
) -> None:
    """Make a key useless, at once and for good."""
    with open_store(home) as store:
        store.keys.revoke(key_id)
    console.print(f"{key_id} is revoked.")


@db.command()
def upgrade(*, home: Home = HOME) -> None:
    """Create the tables or bring them up to date. Nothing else ever does.

    Examples:

        hscr db upgrade
        HSCR_DATABASE_URL=postgresql://user@host/name hscr db upgrade
    """
    database = open_database(home)
    before = database.revision()
    database.upgrade()
    console.print(f"The database has revision {database.revision()} (before: {before or 'none'}).")
    database.close()


@db.command()
def check(*, home: Home = HOME) -> None:
    """Say whether the tables are this code's. Exit code 1 if not."""
    database = open_database(home)
    try:
        database.check_revision()
    except SchemaOutdated as error:
        console.print(f"{error.detail} {error.remedy}")
        raise typer.Exit(1) from error
    else:
        console.print(f"The database has revision {database.revision()}, as this code needs.")
    finally:
        database.close()


def _secret(path: Path) -> str:
    """Raises InvalidInput that says what is wrong with the path."""
    try:
        return (sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()).decode().strip()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror}.",
            remedy="Give the path of a file that holds the secret.",
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no text.", remedy="Give a file that holds nothing else.") from error


def _yes(value: bool) -> str:
    return "yes" if value else "no"
