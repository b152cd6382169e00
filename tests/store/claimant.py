"""One worker among several: claims every job it is told of, as a message to a worker would have it do.

python claimant.py DATABASE_URL JOBS OWNER: JOBS has one id to a line. Says `ready`, begins when it is told a
line, and prints each id that was its own.
"""

import sys
from datetime import timedelta
from pathlib import Path

from hscr.store.database import Database
from hscr.store.jobs import Jobs


def main(url: str, jobs: str, owner: str) -> None:
    database = Database(url)
    store = Jobs(database)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for job_id in Path(jobs).read_text().split():
        if store.claim(job_id, owner, timedelta(minutes=10)) is not None:
            sys.stdout.write(f"{job_id}\n")
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
