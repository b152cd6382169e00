"""One process of a run under FSDP: `python -m torch.distributed.run … -m tests.learn.one_shard MODEL OUT`.

torch shards on CPUs as well, by gloo, but accelerate does not ask it to; here it does.
"""

from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from hscr.learn.preference_trainer import PreferenceTrainer
from hscr.models.vlm import VLM
from tests.learn.one_process import main

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` puts into the environment."""


def shard_on_cpus() -> None:
    """Let accelerate's state become on CPUs what it becomes on GPUs."""
    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if options.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = options["fsdp_plugin"]
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


def note_sharding(told: set[str]) -> None:
    """Write down what the trainer's parameters are when it computes a loss."""
    compute = PreferenceTrainer.compute_loss

    def noted(self: PreferenceTrainer, *arguments: Any, **options: Any) -> Any:
        told.update(f"{self.sharded}, {type(each).__name__}" for each in self.model_wrapped.parameters())
        return compute(self, *arguments, **options)

    PreferenceTrainer.compute_loss = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    shard_on_cpus()
    sharded: set[str] = set()
    note_sharding(sharded)
    main(VLM.load, sharded)  # anew for each run: what was sharded once stays so
