"""API keys, hashed at rest, and idempotency keys."""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, String, bindparam, func, insert, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from hscr.errors import Conflict, IdempotencyConflict, InvalidInput, NotFound
from hscr.records import ApiKey, Role, new_id, now
from hscr.store.database import Database
from hscr.store.tables import api_keys, idempotency_keys
from hscr.store.writers import add_new, ensuring

PREFIX = "hscr_sk_"
_SECRET = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43,}}")
_NEW_SECRET = "`echo hscr_sk_$(openssl rand -hex 32)` makes a secret."
_LIVE = select(api_keys).where(api_keys.c.revoked_at.is_(None))
_FIND_LIVE = _LIVE.where(api_keys.c.hash.in_(bindparam("hashes", expanding=True)))
FIND_LIVE = _LIVE.where(api_keys.c.hash == func.any(bindparam("hashes", type_=ARRAY(String))))
"""For PostgreSQL: the rows of the live keys with these hashes."""


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, name: str, role: Role, *, project: str = "default", train_consent: bool = False
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is shown once and never stored.

        The secret has 256 random bits, so a plain SHA-256 of it cannot be guessed back.
        """
        secret = PREFIX + secrets.token_urlsafe(32)
        key = ApiKey(id=new_id("key"), name=name, role=role, project=project, train_consent=train_consent)
        with self._database.write() as connection:
            connection.execute(insert(api_keys).values(hash=_hash(secret), **key.model_dump()))
        return key, secret

    def ensure(
        self,
        name: str,
        role: Role,
        secret: str,
        *,
        project: str = "default",
        train_consent: bool = False,
        replace: bool = False,
    ) -> tuple[ApiKey, bool]:
        """The key of this name and secret, and whether anything had to be changed.

        However often it is asked for there is one, and one that was revoked stays so. With `replace` the key
        takes the place of others of its name, which are revoked, and of its own former terms.

        Raises InvalidInput for a secret that `create` would not have made, Conflict.
        """
        _check_secret(secret)
        wanted = ApiKey(id=new_id("key"), name=name, role=role, project=project, train_consent=train_consent)
        mine = api_keys.c.hash == _hash(secret)
        namesakes = (api_keys.c.name == name) & api_keys.c.revoked_at.is_(None)
        with self._database.write() as connection:
            ensuring(connection)
            holder = _first(connection, mine)
            if holder is not None and _terms(holder) == _terms(wanted):
                return holder, False
            _check_unused(holder, name)
            if not replace:
                _check_free(_first(connection, namesakes))
            connection.execute(update(api_keys).where(namesakes, ~mine).values(revoked_at=now()))
            if holder is None:
                connection.execute(insert(api_keys).values(hash=_hash(secret), **wanted.model_dump()))
                return wanted, True
            connection.execute(update(api_keys).where(mine).values(**_terms(wanted)))
            return holder.but(**_terms(wanted)), True

    def verify(self, secret: str) -> ApiKey | None:
        """The live key with this secret, or None."""
        return self.verify_all([secret])[0]

    def verify_all(self, secrets: Sequence[str]) -> list[ApiKey | None]:
        """`verify` for each, by one query."""
        hashes = hashes_of(secrets)
        with self._database.look() as connection:
            rows = connection.execute(_FIND_LIVE, {"hashes": sorted(set(hashes))}).mappings().all()
        return in_order(hashes, rows)

    def page(self) -> list[ApiKey]:
        with self._database.read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at)).mappings()
            return [_key(dict(row)) for row in rows]

    def revoke(self, key_id: str) -> None:
        query = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self._database.write() as connection:
            if connection.execute(query.values(revoked_at=now())).rowcount == 0:
                raise NotFound(f"No live key {key_id}.", remedy="`hscr keys list` shows them.")

    def any(self) -> bool:
        with self._database.look() as connection:
            query = select(api_keys.c.id).where(api_keys.c.revoked_at.is_(None)).limit(1)
            return connection.execute(query).first() is not None


class Claim(NamedTuple):
    """An idempotency key for the resource that its request is about to make."""

    owner: str
    key: str
    request_digest: str
    resource: str


def claim_idempotency(
    connection: Connection, owner: str, key: str, request_digest: str, resource: str
) -> str | None:
    """Bind a key to the resource its request made, in the caller's transaction.

    Returns None when the key is new, else the id of the resource that the first request made.
    Raises IdempotencyConflict when the first request had another body.
    """
    if claim_new(connection, [Claim(owner, key, request_digest, resource)]):
        return None
    return find_idempotency(connection, owner, key, request_digest)


def claim_new(connection: Connection, claims: Sequence[Claim]) -> Set[str]:
    """Bind each key that is new, in the caller's transaction; the resources of those that were.

    In the order of the keys, so that two writers with the same ones do not wait for each other.
    """
    for claim in claims:
        check_length(claim.key)
    rows = [{**claim._asdict(), "created_at": now()} for claim in sorted(claims)]
    return add_new(connection, idempotency_keys, idempotency_keys.c.resource, rows)


def find_idempotency(connection: Connection, owner: str, key: str, request_digest: str) -> str | None:
    check_length(key)
    query = select(idempotency_keys).where(idempotency_keys.c.owner == owner, idempotency_keys.c.key == key)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    if row["request_digest"] != request_digest:
        raise IdempotencyConflict(
            "This Idempotency-Key came with another request body before.",
            remedy="Use a new key for a new request, or repeat the first body exactly.",
        )
    return str(row["resource"])


def check_length(key: str) -> None:
    """Raises Conflict."""
    if len(key) > 200:
        raise Conflict("The Idempotency-Key is longer than 200 characters.", remedy="Send a UUID.")


def _check_secret(secret: str) -> None:
    if _SECRET.fullmatch(secret) is None:
        raise InvalidInput(
            f"The secret is not `{PREFIX}` and 43 or more letters, digits, hyphens or underscores.",
            remedy=_NEW_SECRET,
        )


def _check_unused(holder: ApiKey | None, name: str) -> None:
    if holder is not None and (holder.name != name or holder.revoked_at is not None):
        state = "is revoked" if holder.revoked_at is not None else "has another name"
        raise Conflict(f"The secret is that of {holder.id}, which {state}.", remedy=_NEW_SECRET)


def _check_free(namesake: ApiKey | None) -> None:
    if namesake is not None:
        raise Conflict(
            f"{namesake.id} has this name, but another secret, role, project or consent.",
            remedy="Give those it was made with, or another name; `--replace` ends what it has now.",
        )


def _terms(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(include={"name", "role", "project", "train_consent"})


def _first(connection: Connection, condition: ColumnElement[bool]) -> ApiKey | None:
    row = connection.execute(select(api_keys).where(condition).limit(1)).mappings().first()
    return None if row is None else _key(dict(row))


def hashes_of(secrets: Sequence[str]) -> list[str]:
    return [_hash(secret) for secret in secrets]


def in_order(hashes: Sequence[str], rows: Iterable[Mapping[Any, Any]]) -> list[ApiKey | None]:
    """For each hash the key among the rows of live ones, or None."""
    live = {row["hash"]: _key(dict(row)) for row in rows}
    return [live.get(each) for each in hashes]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: dict[str, str | bool | datetime | None]) -> ApiKey:
    return ApiKey.model_validate({name: value for name, value in row.items() if name != "hash"})
