"""One process of a run under FSDP or DeepSpeed: `… -m tests.learn.one_shard MODEL OUT KIND...`.

Both share a model out on CPUs as well, by gloo, but accelerate does not ask them to; here it does.
"""

from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from hscr.learn.preference_trainer import PreferenceTrainer
from hscr.models.vlm import VLM
from tests.learn.one_process import main

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` puts into the environment."""

ZERO = {
    stage: {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    for stage in ("2", "3")
}
"""The same for DeepSpeed, by ZeRO's stage."""


def shard_on_cpus() -> None:
    """Let accelerate's state become on CPUs what it becomes on GPUs."""
    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        fsdp, zero = options.get("fsdp_plugin"), options.get("deepspeed_plugin")
        if self.distributed_type != DistributedType.MULTI_CPU or fsdp is zero is None:
            return
        if fsdp is not None:
            self.fsdp_plugin = fsdp
            self.distributed_type = DistributedType.FSDP
        else:
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
            zero.set_mixed_precision("no")
            zero.select(_from_accelerator_state=True)
            self.deepspeed_plugins = {"default": zero}
            self.distributed_type = DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = begin_sharded


def note_sharding(told: set[str]) -> None:
    """Write down what the trainer's parameters are when it computes a loss."""
    compute = PreferenceTrainer.compute_loss

    def noted(self: PreferenceTrainer, *arguments: Any, **options: Any) -> Any:
        wrapped = type(self.model_wrapped).__name__
        told.update(f"{self.sharded}, {wrapped}, {type(p).__name__}" for p in self.model_wrapped.parameters())
        return compute(self, *arguments, **options)

    PreferenceTrainer.compute_loss = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    shard_on_cpus()
    sharded: set[str] = set()
    note_sharding(sharded)
    main(VLM.load, sharded)  # anew for each run: what was sharded once stays so
