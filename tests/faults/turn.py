"""One turn of the whole loop as people make it over HTTP, and what must be true when it is over."""

import io
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select

from hscr.config import EvaluateConfig, FinetuneConfig
from hscr.models.phantom.anatomy import render
from hscr.models.phantom.data import TRAFFIC, Example, sample_examples
from hscr.records import Job, JobKind, JobState
from hscr.store.tables import (
    adapter_records,
    adapters,
    answer_dependence,
    answers,
    dependence_scores,
    evaluations,
    feedback,
    images,
    job_events,
    jobs,
    outbox,
    pointer_history,
    preference_sources,
    preferences,
    skipped_sources,
    version_leases,
)
from tests.faults.stand import SECONDS, Stand
from tests.stored import images_in
from tests.waiting import wait_until
from tests.workers.harness import RANDOM

ASKED, UPLOADED = 4, 64  # a third of them make a record, and eight are the fewest that train
EVALUATE = EvaluateConfig.parse(
    {
        "images": 4,
        "concurrency": 16,
        "dependence_questions": 4,
        "dependence_masks": 1,
        "gate": {"min_questions": 1, "resamples": 100},
    }
)
TRAINING = FinetuneConfig(rank=4, epochs=1, batch_size=8, learning_rate=5e-5)
TABLES = {
    "answers": answers, "feedback": feedback, "sources": preference_sources, "records": preferences,
    "skips": skipped_sources, "jobs": jobs, "adapters": adapters, "evaluations": evaluations,
    "scores": dependence_scores, "dependence": answer_dependence, "images": images,
}  # fmt: skip


@dataclass
class Turn:
    """Its own pictures and keys, so that many turns can follow one another on one stand."""

    stand: Stand
    number: int
    version: str = ""

    def __post_init__(self) -> None:
        seed = 1000 + self.number
        self.examples = list(sample_examples(TRAFFIC, "traffic", ASKED + UPLOADED, seed, 1))
        self.before = self._counted()

    # -- what people do ------------------------------------------------------------------------------------

    def run(self) -> None:
        self.ask()
        self.judge()
        self.generate()
        self.fail()
        self.score_answer()
        self.evaluate()
        self.release()
        self.roll_back()
        self.delete()

    def ask(self) -> None:
        """The reviewer's questions, the last one streamed; and somebody's who did not consent."""
        reviewer, asked = self.stand.reviewer, self.examples[:ASKED]
        self.answers = [
            self.stand.post(reviewer, "/v1/vqa", self._question(example), f"{self._key}-ask-{index}")
            for index, example in enumerate(asked[:-1])
        ]
        body = {**self._question(asked[-1]), "stream": True}
        self.answers.append(self.stand.streamed(reviewer, "/v1/vqa", body, f"{self._key}-stream"))
        passing = {
            "question": asked[0].question,
            "image": _png(asked[0], turned=True),
            "study": self._study("passing"),
        }
        self.stand.post(self.stand.passer_by, "/v1/vqa", passing, f"{self._key}-pass")

    def judge(self) -> None:
        for index, (answer, example) in enumerate(zip(self.answers, self.examples, strict=False)):
            given = (
                {"verdict": "accept"} if index % 2 else {"verdict": "correct", "correction": example.answer}
            )
            body = {"answer_id": answer["id"], **given}
            self.stand.post(self.stand.reviewer, "/v1/feedback", body, f"{self._key}-judge-{index}")

    def generate(self) -> None:
        """Records from uploads, then from the feedback, and a fine-tune on all of them."""
        rows = [{**self._question(example), "answer": example.answer} for example in self.examples[ASKED:]]
        config = RANDOM.resolved()
        upload = {"rows": rows, "consent": True, "config": config}
        self._succeeded(self._submit(self.stand.reviewer, "/v1/preference-jobs", upload, "upload"))
        then = {"config": TRAINING.resolved(), "method": "random", "evaluate": None}
        pending = {"config": config, "then": then}
        job = self._succeeded(self._submit(self.stand.operator, "/v1/preference-jobs", pending, "generate"))
        finetune = self._succeeded(self._child(job, JobKind.FINETUNE).id)
        self.version = (finetune.result or {})["adapter"]

    def fail(self) -> None:
        body = {"method": "nobody-made-any", "evaluate": None}
        job = self._ended(self._submit(self.stand.operator, "/v1/finetune-jobs", body, "fail"))
        assert job.state is JobState.FAILED
        assert "too few" in (job.error or {})["detail"]

    def score_answer(self) -> None:
        path = f"/v1/answers/{self.answers[0]['id']}/visual-dependence"
        self._succeeded(self._submit(self.stand.reviewer, path, {}, "score-answer"))

    def evaluate(self) -> None:
        body = {"adapter": self.version, "config": EVALUATE.resolved()}
        score = self._succeeded(self._submit(self.stand.operator, "/v1/evaluations", body, "evaluate"))
        self._succeeded(self._child(score, JobKind.EVALUATE).id)

    def release(self) -> None:
        """First to half of the traffic, which ends when it is made active."""
        given = {"reason": "a test", "override": True}
        for step, more in (("canary", {"share": 0.5}), ("promote", {})):
            path = f"/v1/adapters/{self.version}/{step}"
            self._succeeded(self._submit(self.stand.operator, path, {**given, **more}, step))
            self.stand.passed("canary.watched")  # by beat, which may be about to start again
        assert self.stand.store.releases.pointer().active == self.version
        self.answered_by(self.version)

    def roll_back(self) -> None:
        before = self.stand.store.releases.pointer()
        self.stand.post(
            self.stand.operator, "/v1/adapters/rollback", {"reason": "a test"}, f"{self._key}-back"
        )
        pointer = self.stand.store.releases.pointer()
        assert (pointer.active, pointer.previous) == (before.previous, before.active), "once"
        self.answered_by("base" if pointer.active is None else pointer.active)

    def answered_by(self, version: str) -> None:
        """The version is served by whatever its name is asked."""
        if version != "base":
            wait_until(lambda: version in self._models(), seconds=SECONDS, what=f"{version} being listed")
        asked = {**self._question(self.examples[0]), "adapter": version}
        key = f"{self._key}-{version}-{self.stand.store.releases.pointer().epoch}"
        answer = self.stand.post(self.stand.passer_by, "/v1/vqa", asked, key)
        assert (answer["provenance"]["adapter"] or "base") == version

    def delete(self) -> None:
        """Accepted work is counted before it is forgotten."""
        self.check_work()
        for study in [*(self._study(example.id) for example in self.examples), self._study("passing")]:
            self.stand.insist(lambda: self.stand.operator.delete(f"/v1/studies/{study}"))  # noqa: B023

    # -- what must be true ---------------------------------------------------------------------------------

    def check_work(self) -> None:
        """Everything that was accepted is there, and once."""
        sources = ASKED + UPLOADED
        found = self._counted() - self.before
        made = found["records"] + found["skips"]
        assert found["answers"] == ASKED + 3, "one by a passer-by, two of the versions"
        assert found["feedback"] == ASKED
        assert found["sources"] == sources == made
        assert found["evaluations"] == 1
        assert found["dependence"] == 1
        assert found["adapters"] == 1
        assert found["jobs"] == 9, "six submitted here, three by another"
        assert self.stand.store.releases.adapter(self.version).records == found["records"]
        with self.stand.store.database.read() as connection:
            twice = select(preferences.c.source).group_by(preferences.c.source).having(func.count() > 1)
            assert connection.execute(twice).all() == []
            linked = select(func.count()).where(adapter_records.c.adapter == self.version)
            assert connection.execute(linked).scalar_one() == found["records"]
        self._check_history()
        self._check_events()

    def _check_history(self) -> None:
        """The version was made active once, and left once."""
        with self.stand.store.database.read() as connection:
            rows = (
                connection.execute(select(pointer_history).order_by(pointer_history.c.epoch)).mappings().all()
            )
        epochs = [row["epoch"] for row in rows]
        assert epochs == list(range(epochs[0], epochs[0] + len(epochs)))
        acted = Counter(
            row["action"] for row in rows if row["reason"] == "a test" and row["action"] != "propose"
        )
        turns = self.number + 1
        assert acted == {"canary": turns, "promote": turns, "rollback": turns}

    def _check_events(self) -> None:
        """Each job tells its story without a gap, and one end of it."""
        with self.stand.store.database.read() as connection:
            rows = connection.execute(
                select(job_events).order_by(job_events.c.job_id, job_events.c.seq)
            ).all()
        stories: dict[str, list[Any]] = {}
        for row in rows:
            stories.setdefault(row.job_id, []).append(row)
        for story in stories.values():
            assert [row.seq for row in story] == list(range(1, len(story) + 1))
            states = [row.data["state"] for row in story if row.type == "state"]
            assert states[0] == "queued"
            assert sum(JobState(state).final for state in states) == 1
            assert JobState(states[-1]).final

    def check_rest(self) -> None:
        """At rest the rows, the files, the replica and its engine say the same."""
        wait_until(lambda: self._unrest() == {}, seconds=SECONDS, what=f"rest ({self._unrest()})")

    def _unrest(self) -> dict[str, Any]:
        store = self.stand.store
        pointer = store.releases.pointer()
        kept = {name for name in (pointer.active, pointer.previous) if name}
        live = store.releases.replicas(seen_within=timedelta(seconds=5))
        with store.database.read() as connection:
            held = set(connection.execute(select(images.c.digest)).scalars())
            digests = set(connection.execute(select(adapters.c.digest)).scalars())
            leases = connection.execute(select(version_leases)).all()
            unsent = connection.execute(select(outbox.c.id).where(outbox.c.sent_at.is_(None))).all()
        blobs = store.blobs
        found = {
            "jobs": store.jobs.count(JobState.QUEUED, JobState.RUNNING),
            "unsent": len(unsent),
            "leases": len(leases),
            "candidate": pointer.candidate,
            "replica": len(live) != 1 or not live[0].ready or set(live[0].loaded) != kept,
            "images": held ^ images_in(store),
            "folders": digests ^ {path.name for path in (blobs.root / "folders").iterdir()},
            "aside": [path.name for path in (blobs.root / "aside").iterdir()],
            "scratch": [path.name for path in (self.stand.home / "work").iterdir()],
        }
        return {name: value for name, value in found.items() if value}

    # -- parts ---------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"turn-{self.number}"

    def _study(self, name: str) -> str:
        return f"{self._key}-{name}"

    def _question(self, example: Example) -> dict[str, Any]:
        return {"image": _png(example), "question": example.question, "study": self._study(example.id)}

    def _models(self) -> list[str]:
        listed = self.stand.insist(lambda: self.stand.passer_by.get("/v1/models"))["data"]
        return [model["id"] for model in listed]

    def _submit(self, client: Any, path: str, body: dict[str, Any], step: str) -> str:
        return str(self.stand.post(client, path, body, f"{self._key}-{step}")["id"])

    def _ended(self, job_id: str) -> Job:
        job = self.stand.store.jobs.get
        wait_until(lambda: job(job_id).state.final, seconds=SECONDS, what=f"the end of {job(job_id)}")
        return job(job_id)

    def _succeeded(self, job_id: str) -> Job:
        job = self._ended(job_id)
        assert job.state is JobState.SUCCEEDED, job
        return job

    def _child(self, parent: Job, kind: JobKind) -> Job:
        (job,) = self.stand.store.jobs.page(parent=parent.id)
        assert job.kind is kind
        return job

    def _counted(self) -> Counter[str]:
        with self.stand.store.database.read() as connection:
            return Counter(
                {
                    name: connection.execute(select(func.count()).select_from(t)).scalar_one()
                    for name, t in TABLES.items()
                }
            )


def _png(example: Example, *, turned: bool = False) -> str:
    picture = render(example.phantom)
    buffer = io.BytesIO()
    (picture.transpose(0) if turned else picture).save(buffer, "PNG")
    return b64encode(buffer.getvalue()).decode()
