"""Answers, the images they are about, and what people said of them."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, case, delete, insert, or_, select

from hscr.errors import Gone, NotFound
from hscr.records import (
    Answer,
    Dropping,
    Feedback,
    PreferenceSource,
    Verdict,
    VisualDependence,
    now,
)
from hscr.store.database import Database
from hscr.store.keys import claim_idempotency, find_idempotency
from hscr.store.preferences import add_source
from hscr.store.tables import answer_dependence, answers, feedback, images, tombstones
from hscr.store.writers import put, referring, removing, upsert


class Answers:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, answer: Answer, *, image_ttl: timedelta | None, idempotency: tuple[str, str] | None = None
    ) -> Answer:
        """Keep an answer; its image expires after `image_ttl`; None keeps it (consent to train).

        `idempotency` is (key, request digest), scoped to the answer's API key: the answer that the same
        request got first is returned instead. Raises IdempotencyConflict; Gone for a deleted study.
        """
        with self._database.write() as connection:
            known = _claim(connection, answer.key_id, idempotency, answer.id)
            if known is not None:
                return _get(connection, known)
            _require_study(connection, answer.study)
            hold_image(connection, answer.image.digest, answer.study, image_ttl)
            connection.execute(
                insert(answers).values(
                    id=answer.id,
                    project=answer.project,
                    study=answer.study,
                    adapter=answer.provenance.adapter,
                    created_at=answer.created_at,
                    body=answer.model_dump(mode="json"),
                )
            )
        return answer

    def repeated(self, owner: str, key: str, request_digest: str) -> Answer | None:
        """The answer this request got before under its idempotency key. Raises IdempotencyConflict."""
        with self._database.read() as connection:
            known = find_idempotency(connection, owner, key, request_digest)
            return None if known is None else _get(connection, known)

    def buried(self, study: str) -> bool:
        """Whether the study was deleted."""
        with self._database.read() as connection:
            return _buried(connection, study)

    def upload(self, sources: Sequence[PreferenceSource]) -> None:
        """Keep sources whose answers are known to be right, and hold their images. Raises Gone."""
        with self._database.write() as connection:
            # In one order, so that two uploads of the same sources do not wait for each other.
            for source in sorted(sources, key=lambda source: (source.study, source.image_digest, source.id)):
                _require_study(connection, source.study)
                hold_image(connection, source.image_digest, source.study, None)
                add_source(connection, source)

    def get(self, answer_id: str) -> Answer:
        with self._database.read() as connection:
            return _get(connection, answer_id)

    def page(
        self, *, project: str | None = None, limit: int = 50, before: datetime | None = None
    ) -> list[Answer]:
        """Newest first."""
        query = select(answers.c.body).order_by(answers.c.created_at.desc()).limit(limit)
        if project is not None:
            query = query.where(answers.c.project == project)
        if before is not None:
            query = query.where(answers.c.created_at < before)
        with self._database.read() as connection:
            return [Answer.model_validate(body) for body in connection.execute(query).scalars()]

    def judge(self, judgement: Feedback, *, idempotency: tuple[str, str] | None = None) -> Feedback:
        """Keep feedback. Trainable feedback that names a right answer becomes a source of preferences.

        Returns the earlier feedback when the same request came before. Raises IdempotencyConflict.
        """
        with self._database.write() as connection:
            known = _claim(connection, judgement.key_id, idempotency, judgement.id)
            if known is not None:
                body = connection.execute(select(feedback.c.body).where(feedback.c.id == known)).scalar_one()
                return Feedback.model_validate(body)
            referring(connection)
            answer = _get(connection, judgement.answer_id)
            connection.execute(
                insert(feedback).values(
                    id=judgement.id,
                    answer_id=judgement.answer_id,
                    verdict=judgement.verdict,
                    created_at=judgement.created_at,
                    body=judgement.model_dump(mode="json"),
                )
            )
            source = _source(judgement, answer)
            if source is not None:
                hold_image(connection, answer.image.digest, answer.study, None)
                add_source(connection, source)
        return judgement

    def feedback(self, answer_id: str) -> list[Feedback]:
        query = (
            select(feedback.c.body).where(feedback.c.answer_id == answer_id).order_by(feedback.c.created_at)
        )
        with self._database.read() as connection:
            return [Feedback.model_validate(body) for body in connection.execute(query).scalars()]

    def require_image(self, answer: Answer) -> None:
        """Raises Gone unless the answer's study still holds its image."""
        query = select(images.c.digest).where(
            images.c.digest == answer.image.digest,
            images.c.study == answer.study,
            or_(images.c.expires_at.is_(None), images.c.expires_at > now()),
        )
        with self._database.read() as connection:
            if connection.execute(query).first() is None:
                raise image_gone()

    def dependence(self, answer_id: str, dropping: Dropping | None = None) -> VisualDependence | None:
        """The newest result for an answer; the one under these settings, if any are given."""
        query = select(answer_dependence.c.body).where(answer_dependence.c.answer_id == answer_id)
        if dropping is not None:
            query = query.where(answer_dependence.c.dropping == dropping.digest)
        with self._database.read() as connection:
            newest = query.order_by(answer_dependence.c.created_at.desc()).limit(1)
            body = connection.execute(newest).scalar_one_or_none()
        return None if body is None else VisualDependence.model_validate(body)

    def expire_images(self) -> list[str]:
        """Drop references past their time. Returns the digests that nothing refers to any more."""
        with self._database.write() as connection:
            removing(connection)
            query = delete(images).where(images.c.expires_at < now()).returning(images.c.digest)
            dropped = set(connection.execute(query).scalars())
            kept = set(
                connection.execute(select(images.c.digest).where(images.c.digest.in_(dropped))).scalars()
            )
        return sorted(dropped - kept)


def hold_image(connection: Connection, digest: str, study: str, ttl: timedelta | None) -> None:
    """Count a study's reference to an image; a reference without end replaces one with an end."""
    referring(connection)
    expires = None if ttl is None else now() + ttl
    new = upsert(connection, images).values(digest=digest, study=study, created_at=now(), expires_at=expires)
    present, wanted = images.c.expires_at, new.excluded.expires_at
    later = case((or_(wanted.is_(None), wanted > present), wanted), else_=present)
    connection.execute(
        new.on_conflict_do_update(index_elements=list(images.primary_key), set_={"expires_at": later})
    )


def add_answer_dependence(connection: Connection, found: VisualDependence) -> None:
    """Keep a result in a worker's fenced transaction, instead of one of the same settings. Raises Gone."""
    referring(connection)
    study = _get(connection, found.answer_id).study
    key = {"answer_id": found.answer_id, "dropping": found.dropping.digest}
    body = found.model_dump(mode="json")
    put(connection, answer_dependence, **key, study=study, created_at=found.created_at, body=body)


def image_gone() -> Gone:
    return Gone(
        "The image of this answer has expired or was deleted.",
        remedy="Ask the question again with the image, and have the new answer scored in time.",
    )


def _claim(
    connection: Connection, key_id: str | None, idempotency: tuple[str, str] | None, resource: str
) -> str | None:
    if idempotency is None:
        return None
    return claim_idempotency(connection, key_id or "local", *idempotency, resource)


def _buried(connection: Connection, study: str) -> bool:
    query = select(tombstones.c.study).where(tombstones.c.study == study)
    return connection.execute(query).first() is not None


def _require_study(connection: Connection, study: str) -> None:
    referring(connection)
    if _buried(connection, study):
        raise Gone("This study was deleted.", remedy="Use another name for a new study.")


def _source(judgement: Feedback, answer: Answer) -> PreferenceSource | None:
    if not judgement.trainable or judgement.verdict is Verdict.REJECT:
        return None
    right = judgement.correction if judgement.verdict is Verdict.CORRECT else answer.text
    return PreferenceSource(
        id=judgement.id,
        image_digest=answer.image.digest,
        study=answer.study,
        project=answer.project,
        question=answer.question,
        chosen=right or "",
        consent=True,
    )


def _get(connection: Connection, answer_id: str) -> Answer:
    body = connection.execute(select(answers.c.body).where(answers.c.id == answer_id)).scalar_one_or_none()
    if body is None:
        raise NotFound(f"No answer {answer_id}.", remedy="Take the id from the answer's response body.")
    answer = Answer.model_validate(body)
    if _buried(connection, answer.study):
        raise Gone("The study this answer belongs to was deleted.")
    return answer
