"""Inside a build, `python finish.py FOLDER`: installed packages without ballast, and the same in every build.

What goes changes nothing that runs here: symbols of extension modules that no loader reads, packages' own
tests and programs, what only builds other packages, image formats that are never decoded, fonts, codes of
structured reports, colours for source code that is not Python's, and copies of one library under several
names, which wheels hold because they cannot hold links.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SECONDS = int(os.environ["SOURCE_DATE_EPOCH"])
# numpy.testing imports one module of its tests.
KEPT_TESTS = {"_natype.py"}
UNUSED = (
    *("numpy/f2py", "numpy/distutils", "numpy/_core/include", "numpy/_core/lib", "numpy/random/lib"),
    *("numpy/_core/_simd.*", "numpy/_core/_*_tests.*"),
    *("PIL/_avif.*", "PIL/_webp.*", "PIL/_imagingft.*"),
    *("pillow.libs/lib" + name for name in ("avif*", "webp*", "sharpyuv*", "freetype*", "harfbuzz*")),
    *("pydicom/data/test_files", "pydicom/data/charset_files", "pydicom/sr", "_gdcm/XML", "_gdcm/gdcm*[!y]"),
    *("pygments/lexers/[!_p]*", "pygments/lexers/_[!_m]*", "sqlalchemy/testing", "wcwidth/_wcwidth_c.*"),
    *("**/*.pyi", "**/*.pyx", "**/*.pxd"),
)


def main(root: Path) -> None:
    (packages,) = root.glob("lib/python3.*/site-packages")
    for tests in sorted(packages.glob("**/tests")):
        _empty(tests)
    for pattern in UNUSED:
        for path in sorted(packages.glob(pattern)):
            _remove(path)
    found = sorted(packages.glob("**/*.so*"))
    libraries = [path for path in found if path.is_file() and not path.is_symlink()]
    for library in libraries:
        # Bundled ones were changed by tools that strip does not know.
        if "cpython" in library.name or "abi3" in library.name:
            subprocess.run(["strip", "--strip-unneeded", library], check=True)
    _link_copies(libraries)
    set_times(root)


def set_times(root: Path) -> None:
    """One time for everything: bytecode stays valid, and layers are the same in every build."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (SECONDS, SECONDS), follow_symlinks=False)


def _empty(tests: Path) -> None:
    for path in tests.iterdir():
        if path.name not in KEPT_TESTS:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _link_copies(libraries: list[Path]) -> None:
    """The longest name holds the bytes, as with an installed library."""
    first: dict[tuple[Path, str], Path] = {}
    for library in sorted(libraries, key=lambda path: (-len(path.name), path.name)):
        with library.open("rb") as file:
            key = (library.parent, hashlib.file_digest(file, "sha256").hexdigest())
        if key in first:
            library.unlink()
            library.symlink_to(first[key].name)
        else:
            first[key] = library


if __name__ == "__main__":
    main(Path(sys.argv[1]))
