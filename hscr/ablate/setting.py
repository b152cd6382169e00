"""How large an ablation is, and what its arms share; its digest names what a cached arm was made under."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from hscr.ablate.suites import Arm
from hscr.config import Config, FinetuneConfig, LoopConfig
from hscr.errors import InvalidConfig


class Setting(Config):
    """Every arm is trained on dispreferred answers to the same questions, for as many steps."""

    records: int = Field(default=800, ge=1, description="questions with their right answers, per seed")
    mix: Literal["training", "traffic", "balanced"] = Field(
        default="training",
        description="facts in those images as the model was trained on them (the paper's setting), as a "
        "hospital sends them, or balanced as in the evaluation",
    )
    questions: int = Field(default=3, ge=1, le=9, description="per image")
    steps: int = Field(default=90, ge=1, description="optimiser steps of every trained arm")
    loop: LoopConfig = Field(default=LoopConfig(), description="what the arms change one thing of")

    def arm(self, arm: Arm, seed: int) -> LoopConfig:
        """The arm's whole configuration under one seed, which draws data, masks, weights and order.

        Raises InvalidConfig.
        """
        if self.loop.evaluate.suite != "phantom":
            raise InvalidConfig(
                "evaluate.suite: ablations ask about phantoms.",
                remedy="Leave it out; docs/reproduce.md shows how to ablate with other data.",
            )
        loop = arm.config(self.loop)
        generate = loop.generate.model_copy(update={"seed": seed})
        finetune = loop.finetune.model_copy(update={"seed": seed})
        return loop.model_copy(update={"generate": generate, "finetune": finetune})

    def finetune(self, config: FinetuneConfig, records: int) -> FinetuneConfig:
        """Epochs that make `steps` steps of so many records."""
        per_epoch = -(-records // config.batch_size)
        # The trainer rounds epochs * per_epoch up; half a step less keeps float error from adding one.
        return config.model_copy(update={"epochs": (self.steps - 0.5) / per_epoch})


def digest(identity: dict[str, Any]) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
