"""Named run configurations that come with the package: `hscr/configs/*.toml`, torch-free."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from hscr.errors import InvalidConfig

_SUFFIX = ".toml"
_EXTENDS = "extends"


class Recipe(NamedTuple):
    name: str
    about: str
    """the file's first line of comment"""


def recipes() -> list[Recipe]:
    """All recipes by name."""
    return [Recipe(name, _about(file)) for name, file in sorted(_files().items())]


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file, or of the recipe that `path` names where there is no such file.

    `extends = NAME` at the top starts from that recipe and replaces single keys of it. Raises InvalidConfig.
    """
    known = _files()
    return _extended(known[str(path)] if str(path) in known and not path.is_file() else path)


def read_recipe(name: object) -> dict[str, Any]:
    """Settings of a recipe, whatever files of that name there are. Raises InvalidConfig."""
    known = _files()
    if not isinstance(name, str) or name not in known:
        raise InvalidConfig(
            f"extends: there is no recipe {name}.", remedy=f"The recipes are {', '.join(sorted(known))}."
        )
    return _extended(known[name])


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, table by table."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = merged(inner, value)  # noqa: PLW2901
        result[key] = value
    return result


def _extended(file: Path | Traversable) -> dict[str, Any]:
    values = _parse(file)
    base = values.pop(_EXTENDS, None)
    return values if base is None else merged(read_recipe(base), values)


def _parse(file: Path | Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(
            f"{file}: {error}",
            remedy=f"Give the path of a readable TOML file, or a recipe: {', '.join(sorted(_files()))}.",
        ) from error


def _files() -> dict[str, Traversable]:
    folder = files("hscr") / "configs"
    return {file.name.removesuffix(_SUFFIX): file for file in folder.iterdir() if file.name.endswith(_SUFFIX)}


def _about(file: Traversable) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
