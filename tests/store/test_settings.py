"""Where settings come from: the environment first, then a file for each secret."""

import os
import subprocess
import sys
from pathlib import Path

SHOW = "from hscr.store.settings import StoreSettings; print(StoreSettings().database)"
URL = "postgresql+psycopg://hscr:secret@db/hscr"


def database(**environment: str) -> str:
    """As a new process reads it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HSCR_")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=inherited | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_secret_is_read_from_its_file_and_the_environment_goes_before(tmp_path: Path) -> None:
    (tmp_path / "hscr_database_url").write_text(URL + "\n")
    assert database(HSCR_SECRETS_DIR=str(tmp_path)) == URL
    other = "sqlite:///other.db"
    assert database(HSCR_SECRETS_DIR=str(tmp_path), HSCR_DATABASE_URL=other) == other
    assert database(HSCR_SECRETS_DIR=str(tmp_path / "none")).startswith("sqlite:///")
