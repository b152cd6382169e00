"""Which adapters have a name, and which are still needed by a request under way.

All methods belong to the event loop; what touches the model goes through the batcher, between two steps.
"""

import asyncio
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from hscr.errors import AdapterRefused, Conflict, NotFound
from hscr.faults import fault_point
from hscr.models.adapters import read_adapter
from hscr.models.vlm import VLM
from service.embedded.batching import Batcher

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Adapter:
    """A loaded adapter. `key` names these very weights: a name may come back with others, a key never."""

    name: str
    path: str
    key: str
    leases: int = 0
    listed: bool = True


class AdapterRegistry:
    """At most `max_loras` adapters in memory, of rank `max_rank` or less; `base` is the model's own name."""

    def __init__(self, vlm: VLM, batcher: Batcher, *, base: str, max_loras: int, max_rank: int) -> None:
        self.max_loras = max_loras
        self._vlm = vlm
        self._batcher = batcher
        self._base = base
        self._max_rank = max_rank
        self._serial = count(1)
        self._adapters: dict[str, Adapter] = {}
        self._resident: set[str] = set()
        self._reserved: set[str] = set()

    @property
    def listed(self) -> list[Adapter]:
        return list(self._adapters.values())

    def lease(self, name: str) -> Adapter | None:
        """The adapter called `name`, kept in memory until `release`; None is the base. Raises NotFound."""
        if name == self._base:
            return None
        if name not in self._adapters:
            raise NotFound(f"The model `{name}` does not exist.", remedy="GET /v1/models lists what does.")
        adapter = self._adapters[name]
        adapter.leases += 1
        return adapter

    def release(self, adapter: Adapter | None) -> None:
        """Give a lease back; the last one of an unloaded adapter frees its memory."""
        if adapter is None:
            return
        adapter.leases -= 1
        if not adapter.listed and adapter.leases == 0 and self._batcher.alive:
            self._forget(adapter).add_done_callback(_log_failure)

    async def load(self, name: str, path: str) -> None:
        """Raises Conflict (used name, no room), NotFound (no such folder), AdapterRefused (unfit weights)."""
        self._require_room(name)
        if not (Path(path) / "adapter_config.json").is_file():
            raise NotFound(f"No adapter found for {path}.", remedy="Give the folder of a saved PEFT adapter.")
        adapter = Adapter(name, path, f"{name}#{next(self._serial)}")
        self._reserved.add(name)
        self._resident.add(adapter.key)
        try:
            await asyncio.wrap_future(self._batcher.between_steps(partial(self._attach, adapter)))
        except BaseException:
            self._resident.remove(adapter.key)
            raise
        finally:
            self._reserved.remove(name)
        self._adapters[name] = adapter
        fault_point("engine.loaded")

    async def unload(self, name: str) -> None:
        """Take the name away at once, and the weights when no request needs them. Raises NotFound."""
        if name not in self._adapters:
            raise NotFound(
                f"The lora adapter '{name}' cannot be found.", remedy="GET /v1/models lists what is loaded."
            )
        fault_point("engine.unload")
        adapter = self._adapters.pop(name)
        adapter.listed = False
        if adapter.leases == 0:
            await asyncio.wrap_future(self._forget(adapter))

    def _require_room(self, name: str) -> None:
        if name == self._base or name in self._adapters or name in self._reserved:
            raise Conflict(
                f"The lora adapter '{name}' has already been loaded.",
                remedy="Give the new weights a name of their own; nothing is replaced in place.",
            )
        if len(self._resident) >= self.max_loras:
            raise Conflict(
                f"{self.max_loras} adapters are in memory, which is the limit.",
                remedy="Unload one, or start the engine with a larger --max-loras.",
            )

    def _attach(self, adapter: Adapter) -> None:
        fault_point("engine.load")
        check_adapter(adapter.path, self._vlm, self._max_rank)
        self._vlm.load_adapter(adapter.path, adapter.key)

    def _forget(self, adapter: Adapter) -> Future[Any]:
        return self._batcher.between_steps(partial(self._detach, adapter))

    def _detach(self, adapter: Adapter) -> None:
        self._vlm.unload_adapter(adapter.key)
        self._resident.remove(adapter.key)


def adapter_name(key: str) -> str:
    """The name under which the adapter with this key was loaded."""
    return key.rpartition("#")[0]


def check_adapter(path: str, vlm: VLM, max_rank: int) -> None:
    """Refuse weights that would not be served as they were trained.

    Raises AdapterRefused for what `read_adapter` finds (kind, shapes, NaN), for a rank above `max_rank`, and
    when the layers that the configuration targets are not exactly those that have weights: PEFT would drop
    weights without a target, and invent some for a target without weights.
    """
    config, weights = read_adapter(path, vlm.model)
    if config.r > max_rank:
        raise AdapterRefused(f"The adapter has rank {config.r}.", remedy=f"At most {max_rank} can be served.")
    stored = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in weights}
    targeted = {name for name, _ in vlm.model.named_modules() if check_target_module_exists(config, name)}
    if stray := sorted(stored ^ targeted):
        problem = "has weights but is no target" if stray[0] in stored else "is a target without weights"
        raise AdapterRefused(
            f"{stray[0]} {problem}.",
            remedy="Save the adapter again with PEFT, so that its configuration and weights agree.",
        )


def _log_failure(future: Future[Any]) -> None:
    if error := future.exception():
        log.error("an unloaded adapter could not be freed", exc_info=error)
