"""A wall clock that a test moves while processes live by it."""

import mmap
import os
import shutil
import struct
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("wall_clock.c")


class WallClock:
    """The time of day for all processes with this `environment`."""

    def __init__(self, folder: Path) -> None:
        _require_compiler()
        self.ahead = timedelta(0)
        library, file = folder / "wall_clock.so", folder / "wall_clock"
        subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
        file.write_bytes(struct.pack("q", 0))
        with file.open("r+b") as opened:
            self._seconds = mmap.mmap(opened.fileno(), 0)
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(file)}

    def jump(self, by: timedelta) -> None:
        """For all of them at once."""
        self.ahead += by
        self._seconds[:] = struct.pack("q", int(self.ahead.total_seconds()))


def _require_compiler() -> None:
    """Skips the test where there is none; fails it where HSCR_REQUIRE_COMPILER is set, as in CI."""
    if shutil.which("cc") is None:
        missing = "No C compiler (Debian: apt install gcc libc6-dev)."
        if os.environ.get("HSCR_REQUIRE_COMPILER"):
            pytest.fail(f"Must be tested here, and cannot: {missing}")
        pytest.skip(missing)
