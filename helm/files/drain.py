"""`python3 drain.py METRICS SETTLE DEADLINE`: returns when the engine has nothing left to answer.

Run before the engine is told to end. For SETTLE seconds the gateways may still send what they have just
chosen; then requests running and waiting are counted until there are none, for DEADLINE seconds at most. The
standard library only, because it runs in the engine's image.
"""

import re
import sys
import time
import urllib.request

_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([\d.e+]+)$", re.MULTILINE)


def left(metrics: str) -> float:
    """Requests running and waiting; 0 when the engine does not answer, since it then answers nobody."""
    try:
        with urllib.request.urlopen(metrics, timeout=5) as reply:  # noqa: S310
            text = reply.read().decode()
    except OSError:
        return 0
    return sum(float(count) for count in _REQUESTS.findall(text))


def main() -> None:
    metrics, settle, deadline = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    time.sleep(settle)
    end = time.monotonic() + deadline
    while left(metrics) and time.monotonic() < end:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
