"""How an engine is started: one base model at one address, as the command line of either engine.

Nothing of an engine is imported. vLLM pins other releases of its dependencies than the workers use, so it
lives in an environment of its own; docs/vllm.md says how production runs it.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from hscr.errors import DependencyMissing

EngineKind = Literal["embedded", "vllm"]
VLLM = Path(__file__).parent.parent / ".venv-vllm"


class VllmSettings(BaseSettings):
    """Read from the environment, prefix `HSCR_`."""

    model_config = SettingsConfigDict(env_prefix="HSCR_", extra="ignore")

    vllm_command: str = Field(
        default=f"{shlex.quote(str(VLLM / 'bin' / 'python'))} -m vllm.entrypoints.openai.api_server",
        description="what starts a vLLM server; its arguments follow",
        examples=["vllm serve"],
    )
    vllm_arguments: str = Field(
        default="", description="further ones, as in a shell", examples=["--tensor-parallel-size 2"]
    )
    vllm_kv_cache_bytes: int = Field(
        default=256 << 20, ge=1, description="keys and values of all requests and the prefix cache, on a CPU"
    )


class Command(NamedTuple):
    """`environment` is to be added to the starting process's own."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Serving:
    """A base model and where it answers.

    `device` and `dtype` are torch's names; the embedded engine knows float32 on a CPU only. `max_loras`
    adapters of rank `max_lora_rank` or less fit in at once. On a CPU, `threads` compute, and `max_batch`
    requests are decoded together; on a GPU vLLM chooses.
    """

    model: Path
    name: str
    port: int
    host: str = "127.0.0.1"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    max_loras: int = 8
    max_lora_rank: int = 64
    max_batch: int = 16

    def command(self, engine: EngineKind) -> Command:
        """Raises DependencyMissing when the program to start is not installed."""
        return self._embedded() if engine == "embedded" else self._vllm(VllmSettings())

    def _embedded(self) -> Command:
        options = {"--max-batch": self.max_batch, "--threads": self.threads}
        return Command((sys.executable, "-m", "service.embedded", *_flags(self._common() | options)), {})

    def _vllm(self, settings: VllmSettings) -> Command:
        program, *rest = shlex.split(settings.vllm_command)
        if shutil.which(program) is None:
            raise DependencyMissing(
                f"vLLM is not installed: there is no {program}.",
                remedy="`make .venv-vllm/ready` installs its CPU build; HSCR_VLLM_COMMAND names another.",
            )
        options = self._common() | {
            "--dtype": self.dtype,
            "--generation-config": "vllm",  # the model's own would cap every answer's length
            "--chat-template-content-format": "openai",  # parts reach the template, as in training
            "--limit-mm-per-prompt": '{"image": 1}',
            "--mm-processor-kwargs": '{"backend": "pil"}',  # as the trainer: torchvision resizes otherwise
            "--allowed-media-domains": "none.invalid",  # images come in the request, nothing is fetched
        }
        switches = (*_SWITCHES, *shlex.split(settings.vllm_arguments))
        environment = dict(_ENVIRONMENT)
        if self.device == "cpu":
            options |= {"--max-num-seqs": self.max_batch, **_CPU_OPTIONS}
            options |= {"--kv-cache-memory-bytes": settings.vllm_kv_cache_bytes}
            switches = ("--enforce-eager", *switches)
            environment |= _CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(self.threads)}
        return Command((program, *rest, *_flags(options), *switches), environment)

    def _common(self) -> dict[str, object]:
        return {
            "--model": self.model,
            "--served-model-name": self.name,
            "--host": self.host,
            "--port": self.port,
            "--max-loras": self.max_loras,
            "--max-lora-rank": self.max_lora_rank,
        }


_SWITCHES = (
    "--enable-lora",
    # Otherwise vLLM wraps the head as well, and `prompt_logprobs` ends the engine (vllm#29955).
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "--enable-mm-embeds",  # projected visual tokens as input: how visual dependence is scored
    "--enable-prefix-caching",
    "--disable-uvicorn-access-log",
)
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # started with `-m`, Python would also import from the working directory
}
_CPU_OPTIONS: dict[str, object] = {"--distributed-executor-backend": "uni", "--mm-processor-cache-gb": 0.25}
_CPU_ENVIRONMENT = {
    # The worker in the engine's own process: less memory, and it starts in half the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Bound threads of two engines would queue for the same core while others idle.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def _flags(options: dict[str, object]) -> list[str]:
    return [word for flag, value in options.items() for word in (flag, str(value))]
