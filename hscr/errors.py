"""Every error this project raises on purpose.

HscrError
├── InvalidInput                 the caller sent something that cannot be used
│   ├── InvalidImage             bytes that are no readable image
│   │   ├── UnsupportedImage     a format or transfer syntax we do not decode
│   │   └── ImageTooLarge        more bytes or pixels than allowed
│   ├── InvalidQuestion          empty, too long, or carrying model control tokens
│   ├── InvalidConfig            a run configuration with an unknown key or a value out of range
│   ├── InvalidCheckpoint        model weights that are not what they are said to be
│   └── InvalidRecord            a preference record that cannot be trained on
├── Unauthenticated              no key, or an unknown one
├── Forbidden                    the key's role does not allow this
├── ConsentMissing               training on material whose owner did not agree
├── NotFound                     no such row, blob, adapter or job
├── Gone                         it existed and has expired or was deleted
├── Conflict                     the request contradicts the present state
│   ├── NotLoaded                a version that cannot serve yet, or a replica that fell silent
│   ├── IdempotencyConflict      one idempotency key with two different bodies
│   └── LeaseLost                another attempt owns this job: write nothing more
├── GateRefused                  the evaluation did not pass and nobody overrode it
├── AdapterRefused               adapter weights that must never reach an engine
├── Overloaded                   a bound is reached: try again later
├── EngineError
│   ├── EngineUnavailable        no replica answered
│   ├── EngineRejected           a replica answered with a client error
│   └── EngineInterrupted        a replica went away in the middle of a stream
├── StoreError
│   ├── StoreFull                no space is left for rows or bytes: everything goes on when there is
│   ├── StoreReadOnly            the disk of rows or bytes was made read-only
│   ├── DatabaseUnavailable      the database is away or did not answer: nothing was kept, try again
│   ├── ObjectStoreUnavailable   the bucket of the bytes is away or refuses: nothing was kept, try again
│   └── SchemaOutdated           the database's revision is not the code's
├── JobCancelled                 somebody asked the job to stop
└── DependencyMissing            an optional package or program is not installed
"""

from typing import ClassVar


class HscrError(Exception):
    """Base of all deliberate errors.

    `slug` is the stable last part of the problem type (RFC 9457); `detail` says what is wrong with this
    very input and never carries patient data; `remedy` says what to do about it.
    """

    slug: ClassVar[str] = "error"
    title: ClassVar[str] = "Something went wrong"

    def __init__(self, detail: str, *, remedy: str = "") -> None:
        super().__init__(f"{detail} {remedy}".strip())
        self.detail = detail
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        # The default would pass the joined message alone, so a copy made in another process lost its remedy.
        return (_rebuild, (type(self), self.detail, self.remedy))


def _rebuild(kind: type[HscrError], detail: str, remedy: str) -> HscrError:
    return kind(detail, remedy=remedy)


class InvalidInput(HscrError):
    slug = "invalid-input"
    title = "The input cannot be used"


class InvalidImage(InvalidInput):
    slug = "invalid-image"
    title = "The image cannot be read"


class UnsupportedImage(InvalidImage):
    slug = "unsupported-image"
    title = "This image format is not supported"


class ImageTooLarge(InvalidImage):
    slug = "image-too-large"
    title = "The image is too large"


class InvalidQuestion(InvalidInput):
    slug = "invalid-question"
    title = "The question cannot be used"


class InvalidConfig(InvalidInput):
    slug = "invalid-config"
    title = "The configuration is not valid"


class InvalidCheckpoint(InvalidInput):
    slug = "invalid-checkpoint"
    title = "The checkpoint cannot be used"


class InvalidRecord(InvalidInput):
    slug = "invalid-record"
    title = "The preference record cannot be used"


class Unauthenticated(HscrError):
    slug = "unauthenticated"
    title = "An API key is required"


class Forbidden(HscrError):
    slug = "forbidden"
    title = "This key may not do that"


class ConsentMissing(HscrError):
    slug = "consent-missing"
    title = "No consent to train on this"


class NotFound(HscrError):
    slug = "not-found"
    title = "Not found"


class Gone(HscrError):
    slug = "gone"
    title = "No longer available"


class Conflict(HscrError):
    slug = "conflict"
    title = "The request contradicts the present state"


class NotLoaded(Conflict):
    """A version cannot serve yet, or a replica fell silent: to be waited for."""


class IdempotencyConflict(Conflict):
    slug = "idempotency-conflict"
    title = "This idempotency key was used for another request"


class LeaseLost(Conflict):
    slug = "lease-lost"
    title = "Another attempt owns this job"


class GateRefused(HscrError):
    slug = "gate-refused"
    title = "The evaluation gate did not pass"


class AdapterRefused(HscrError):
    slug = "adapter-refused"
    title = "The adapter is not safe to load"


class Overloaded(HscrError):
    """`retry_after` is in whole seconds."""

    slug = "overloaded"
    title = "Too many requests at once"

    def __init__(self, detail: str, *, remedy: str = "", retry_after: int = 1) -> None:
        super().__init__(detail, remedy=remedy)
        self.retry_after = retry_after


class EngineError(HscrError):
    slug = "engine-error"
    title = "The inference engine failed"


class EngineUnavailable(EngineError):
    slug = "engine-unavailable"
    title = "No inference engine is available"


class EngineRejected(EngineError):
    slug = "engine-rejected"
    title = "The inference engine refused the request"

    def __init__(self, detail: str, *, remedy: str = "", status: int = 400) -> None:
        super().__init__(detail, remedy=remedy)
        self.status = status


class EngineInterrupted(EngineError):
    slug = "engine-interrupted"
    title = "The inference engine went away in the middle of the answer"


class StoreError(HscrError):
    slug = "store-error"
    title = "The database failed"


class StoreFull(StoreError):
    """Nothing half-written is kept, and what was accepted goes on by itself once there is space again."""

    slug = "store-full"
    title = "No space is left on the store's disk"


class StoreReadOnly(StoreError):
    """As with a full disk, everything goes on by itself once the store can be written again."""

    slug = "store-read-only"
    title = "The store's disk cannot be written to"


class DatabaseUnavailable(StoreError):
    """What was begun may have been kept only if the connection broke in the middle of its commit."""

    slug = "database-unavailable"
    title = "The database is away or did not answer"


class ObjectStoreUnavailable(StoreError):
    slug = "object-store-unavailable"
    title = "The object store is away, did not answer or refused"


class SchemaOutdated(StoreError):
    slug = "schema-outdated"
    title = "The database has another revision than the code"


class JobCancelled(HscrError):
    slug = "job-cancelled"
    title = "The job was cancelled"


class DependencyMissing(HscrError):
    slug = "dependency-missing"
    title = "Something that this needs is not installed"
