"""Where an engine is not what the suite describes, by name. docs/vllm.md says the same to people."""

from hscr.serving import EngineKind
from tests.serving import EngineProcess

DIFFERENCES: dict[EngineKind, dict[str, str]] = {
    "embedded": {
        "no prefix cache": "every prompt is read anew",
    },
    "vllm": {
        "states only its version": "neither model nor template nor numeric mode: the agent tells them",
        "checks no adapter": "NaN, wrong shapes, missing halves and layers that do not exist get 200; DoRA, "
        "modules_to_save and unreadable files 500",
        "always room for an adapter": "beyond --max-loras the least recently used makes room, and is read "
        "from its folder again when it is asked for",
        "ignores unknown options": "where the embedded engine refuses them",
        "takes any number of visual tokens": "and makes the prompt that long; two numbers in one step "
        "end the engine",
        "answers unreadable visual tokens with 500": "none of their code is run, though",
        "obeys control tokens in a text": "only the gateway keeps them out",
        "accepts any role": "the chat template decides what it means",
        "answers a file's URL with 500": "it is not read, though",
        "does not count aborted requests": "vllm:request_success_total knows no finished_reason abort",
    },
}


def differs(engine: EngineProcess, name: str) -> bool:
    """Whether this engine differs in the way called `name`, which must be listed."""
    assert any(name in named for named in DIFFERENCES.values()), f"{name} is not listed"
    return name in DIFFERENCES[engine.kind]
