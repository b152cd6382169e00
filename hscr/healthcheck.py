"""`python -m hscr.healthcheck URL|FILE`: whether a container does its work, as its exit status.

A URL must answer 2xx. A file must have been touched in the last 30 seconds: a process that serves no port
touches the one that HSCR_HEALTH_FILE names while its work goes on. The standard library only, because it runs
every few seconds.
"""

import sys
import time
import urllib.request
from pathlib import Path

SILENCE_SECONDS = 30.0
_TIMEOUT_SECONDS = 3.0


def trouble(what: str) -> str | None:
    """Why it is not healthy; None when it is."""
    try:
        if what.startswith(("http://", "https://")):
            urllib.request.urlopen(what, timeout=_TIMEOUT_SECONDS).close()  # noqa: S310
            return None
        silent = time.time() - Path(what).stat().st_mtime
    except OSError as error:  # URLError and HTTPError among them
        return f"{what}: {error}"
    return None if silent < SILENCE_SECONDS else f"{what}: silent for {silent:.0f} s"


if __name__ == "__main__":
    sys.exit(trouble(sys.argv[1]))
