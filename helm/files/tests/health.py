"""The gateway is ready: its pointer is fresh and a replica serves the active version."""

import os
import urllib.request

with urllib.request.urlopen(f"{os.environ['HSCR_URL']}/readyz", timeout=10) as reply:  # noqa: S310
    print(reply.read().decode())  # noqa: T201
