"""`python tether.py PARENT COMMAND...`: become COMMAND, which the kernel kills when the process PARENT dies.

The wish (PR_SET_PDEATHSIG, prctl(2)) outlives exec and needs no code between fork and exec, where a parent
with threads may not run Python safely. Where there is no prctl (macOS) the command runs untethered.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the wish was made
        raise SystemExit(f"{command[0]}: the parent is gone")
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
