"""Who is asking, and whether they may: API keys with three roles, or the one person on a loopback."""

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from hscr.errors import Forbidden, NotFound, Unauthenticated
from hscr.records import Answer, ApiKey, Role
from hscr.store.store import Store
from service.settings import GatewaySettings
from service.threads import Threads, Together

_RANK = {Role.CLIENT: 0, Role.REVIEWER: 1, Role.OPERATOR: 2}

LOCAL = ApiKey(id="local", name="local operator", role=Role.OPERATOR)
"""Whoever sits at this machine, as long as no key exists and nobody else can connect."""

REMEDY = "Send `Authorization: Bearer hscr_sk_...`; `hscr keys create` makes a key."


class Authenticator:
    def __init__(
        self, known: Together[str, ApiKey | None], store: Store, threads: Threads, settings: GatewaySettings
    ) -> None:
        """`known` tells the live key with a secret."""
        self._known = known
        self._store = store
        self._threads = threads
        self._settings = settings

    async def caller(self, headers: Mapping[str, str]) -> ApiKey:
        """Raises Unauthenticated."""
        if "authorization" in headers:
            return await self._of_header(headers["authorization"])
        if self._settings.loopback and not await self._threads(self._store.keys.any):
            _require_local(headers)
            return LOCAL
        raise Unauthenticated("This gateway needs an API key.", remedy=REMEDY)

    async def _of_header(self, header: str) -> ApiKey:
        scheme, _, secret = header.partition(" ")
        bearer = scheme.lower() == "bearer"
        key = await self._known(secret.strip()) if bearer else None
        if key is None:
            raise Unauthenticated("The API key is unknown or revoked.", remedy=REMEDY)
        return key


def require_role(key: ApiKey, role: Role) -> None:
    """Raises Forbidden; each role may do what the roles below it may."""
    if _RANK[key.role] < _RANK[role]:
        raise Forbidden(
            f"This needs the role {role}; the key has the role {key.role}.",
            remedy=f"Ask an operator for a key: `hscr keys create --role {role}`.",
        )


def require_visible(key: ApiKey, answer: Answer) -> None:
    """Another project's answer does not exist for this key. Raises NotFound."""
    if key.role is not Role.OPERATOR and answer.project != key.project:
        raise NotFound(f"No answer {answer.id}.", remedy="Take the id from the answer's response body.")


def project_of(key: ApiKey) -> str | None:
    """What a listing is narrowed to; an operator sees every project."""
    return None if key.role is Role.OPERATOR else key.project


def _require_local(headers: Mapping[str, str]) -> None:
    """A web page elsewhere must not act as the local operator through a browser on this machine."""
    asked = [f"//{headers.get('host', '')}", headers.get("origin") or "//localhost"]
    if not all(_is_loopback(urlsplit(address).hostname or "") for address in asked):
        raise Unauthenticated("A request from another site needs an API key.", remedy=REMEDY)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
