"""Eight processes at once claim jobs, of each of which two hear at about the same time.

HSCR_TEST_CLAIMS=10000 takes a minute on two cores.
"""

import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import func, insert, select

from hscr.records import Job, JobKind, JobState
from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from hscr.store.tables import job_events, jobs

PROCESSES = 8
CLAIMANT = Path(__file__).with_name("claimant.py")


def test_no_job_is_claimed_twice_and_none_is_left(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    # SQLite's writers queue up for each commit's fsync.
    wanted = int(os.environ.get("HSCR_TEST_CLAIMS", "2000")) // (1 if settings.database_url else 10)
    made = [Job(kind=JobKind.GENERATE) for _ in range(wanted)]
    with store.database.write() as connection:
        connection.execute(insert(jobs), [{**job.model_dump(), "last_event": 0} for job in made])
    ids = [job.id for job in made]
    heard: list[list[str]] = [[] for _ in range(PROCESSES)]
    for number, job_id in enumerate(ids):
        heard[number % PROCESSES].append(job_id)
        heard[(number + 1 + number // PROCESSES % (PROCESSES - 1)) % PROCESSES].append(job_id)

    running = []
    for number, told in enumerate(heard):
        messages = tmp_path / f"messages-{number}"
        messages.write_text("\n".join(told))
        command = [sys.executable, str(CLAIMANT), settings.database, str(messages), f"process-{number}"]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    assert [process.stdout.readline() for process in running] == ["ready\n"] * PROCESSES
    for process in running:
        process.stdin.write("begin\n")
        process.stdin.flush()
    claimed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES

    assert sorted(job_id for mine in claimed for job_id in mine) == sorted(ids)
    assert sum(map(bool, claimed)) > 1, "no process was alone; SQLite gives nobody a turn"
    with store.database.read() as connection:
        owners = dict(connection.execute(select(jobs.c.id, jobs.c.lease_owner)).tuples().all())
        states = connection.execute(select(jobs.c.state, jobs.c.attempt).distinct()).all()
        events = connection.execute(select(func.count()).select_from(job_events)).scalar_one()
    assert states == [(JobState.RUNNING, 1)]
    assert events == wanted
    for number, mine in enumerate(claimed):
        assert {owners[job_id] for job_id in mine} <= {f"process-{number}"}
