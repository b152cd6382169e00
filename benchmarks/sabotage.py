"""`python -m benchmarks.sabotage KIND -m MODULE ...`: one of the product's processes with a promise broken.

`make bench-swap SABOTAGE=KIND` starts all processes this way, to prove that the benchmark would notice:

    reuse-name   every version is loaded under one and the same name in the engines
    no-drain     agents keep only the active version and the candidate, and unload whatever else at once
    flip-first   a release moves the pointer without waiting for the replicas
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

KINDS = ("reuse-name", "no-drain", "flip-first")
_SHARED = "shared"


def _reuse_name() -> None:
    import service.engines  # noqa: PLC0415
    from hscr.engine import ChatRequest, EngineClient  # noqa: PLC0415

    load, models, read = EngineClient.load_adapter, EngineClient.models, EngineClient.read
    current: dict[str, str] = {}

    async def load_over(self: EngineClient, name: str, path: Any) -> None:
        if any(model.id == _SHARED for model in await models(self)):  # not in one that was killed
            await unload(self, _SHARED)
        current.clear()
        current[_SHARED] = name
        await load(self, _SHARED, path)

    async def named(self: EngineClient) -> Any:
        listed = await models(self)
        return [m.but(id=current.get(_SHARED, m.id)) if m.id == _SHARED else m for m in listed]

    async def read_shared(self: EngineClient, request: ChatRequest) -> Any:
        shared = request.model_copy(update={"model": _SHARED}) if "@" in request.model else request
        return await read(self, shared)

    unload = EngineClient.unload_adapter
    EngineClient.load_adapter, EngineClient.models = load_over, named  # type: ignore[method-assign]
    EngineClient.read = read_shared  # type: ignore[method-assign]
    given = service.engines._named

    def shared(request: ChatRequest, replica: Any, version: str | None) -> ChatRequest:
        return given(request, replica, _SHARED if version else None)

    service.engines._named = shared


def _no_drain() -> None:
    from hscr.store import releases  # noqa: PLC0415
    from workers import agent  # noqa: PLC0415

    def wanted(connection: Any) -> list[str]:
        present = releases._pointer(connection)
        return [name for name in (present.active, present.candidate) if name]

    async def at_once(self: agent.Agent, undesired: set[str]) -> None:
        for name in sorted(undesired):
            await self._engine.unload_adapter(name)

    take_stock = agent.Agent._take_stock

    async def ready_with_active(self: agent.Agent, *, problem: str | None, answers: bool) -> None:
        active = self._store.releases.pointer().active
        # Not the previous one, too: it is never there to wait for.
        self._ready |= answers and active in {None, *self._probed}
        await take_stock(self, problem=problem, answers=answers)

    releases._desired_names = wanted
    agent.Agent._remove = at_once  # type: ignore[method-assign]
    agent.Agent._take_stock = ready_with_active  # type: ignore[method-assign]


def _flip_first() -> None:
    from hscr.store import releases  # noqa: PLC0415
    from workers import release  # noqa: PLC0415

    releases._check_loaded = lambda *_: None
    release.await_loaded = lambda *_: []


_BREAK: dict[str, Callable[[], None]] = {
    "reuse-name": _reuse_name,
    "no-drain": _no_drain,
    "flip-first": _flip_first,
}


def main() -> None:
    """Break the promise, then be the module."""
    kind, flag, module = sys.argv[1:4]
    assert flag == "-m"
    _BREAK[kind]()
    sys.argv = [module, *sys.argv[4:]]
    if module in sys.modules:
        sys.modules[module].main()  # runpy would make a second, unbroken copy of it
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
