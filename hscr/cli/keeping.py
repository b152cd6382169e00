"""`hscr studies` and `hscr store`: forgetting an examination, and whether rows and files agree."""

from datetime import timedelta
from typing import Annotated

import typer

from hscr.cli.common import HOME, URL, AsJson, Home, Key, Url, console, open_store, print_json
from hscr.client import Client

studies = typer.Typer(no_args_is_help=True, help="Studies: delete one, and see what a deletion concerned.")
store = typer.Typer(no_args_is_help=True, help="Rows and files: whether they agree, and what to do if not.")

Study = Annotated[str, typer.Argument(help="As the answer names it.", show_default=False)]


@studies.command()
def delete(study: Study, *, url: Url = URL, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a study's images, judgements and records for good. Nothing new is taken under its name.

    Example:

        hscr studies delete study_9c1f
    """
    with Client(url, key) as client:
        done = client.delete_study(study)
    if as_json:
        print_json(done)
        return
    console.print(f"{study} is deleted, with {done['images_deleted']} images that no other study has.")
    _say_trained(done["adapters_trained_on_it"])


@studies.command()
def show(study: Study, *, url: Url = URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show who deleted a study, when, and which adapters were trained on it.

    Example:

        hscr studies show study_9c1f
    """
    with Client(url, key) as client:
        left = client.tombstone(study)
    if as_json:
        print_json(left.model_dump(mode="json"))
        return
    console.print(f"{study} was deleted by {left.actor} at {left.created_at:%Y-%m-%d %H:%M} UTC.")
    _say_trained(left.adapters)


@store.command()
def check(
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Throw away files that no row names.")] = False,
    minutes: Annotated[
        float, typer.Option(help="Younger files may be waiting for their row and are left alone.", min=0)
    ] = 24 * 60,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Compare all files with all rows. Exit code 1 if a row's file is gone: only a backup has it.

    Examples:

        hscr store check
        hscr store check --repair
    """
    from hscr.store import check as checking

    with open_store(home) as opened:
        found = checking.check(opened, older_than=timedelta(minutes=minutes))
        if repair:
            checking.repair(opened, found)
            checking.keep_findings(opened, found)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _tell("Images that no study holds", found.unheld_images, "thrown away" if repair else "--repair")
        _tell("Folders of no adapter", found.unknown_folders, "thrown away" if repair else "--repair")
        _tell("Images that a study holds and that are gone", found.lost_images, "restore them from a backup")
        _tell("Adapters whose files are gone", found.lost_adapters, "restore or train them again")
    if found.lost:
        raise typer.Exit(1)


def _tell(what: str, names: tuple[str, ...], remedy: str) -> None:
    console.print(f"{what}: {len(names)}" + (f" ({remedy})" if names else ""))
    for name in names:
        console.print(f"    {name}", markup=False, highlight=False, soft_wrap=True)


def _say_trained(adapters: "list[str] | tuple[str, ...]") -> None:
    if adapters:
        console.print(f"Trained on it: {', '.join(adapters)}. Only training again leaves it out.")
    else:
        console.print("No adapter was trained on it.")
