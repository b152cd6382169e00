"""Run configurations: TOML in, resolved JSON kept with every result.

Each class is one stage of the loop. A key that does not exist is an error, and `digest` names the resolved
values, so two results with the same digest were made under the same settings.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hscr.errors import InvalidConfig


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a TOML file. Raises InvalidConfig that names the key and what was expected."""
        try:
            return cls.parse(tomllib.loads(path.read_text()))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InvalidConfig(
                f"{path}: {error}", remedy="Give the path of a readable TOML file."
            ) from error

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "configuration"
            raise InvalidConfig(
                f"{key}: {first['msg']}.",
                remedy=f"Known keys: {', '.join(cls.model_fields)}.",
            ) from error

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved values, hex."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


class DegradeConfig(Config):
    """HSCR §3.1: what the model is made to overlook."""

    rate: float = Field(default=0.7, ge=0, le=1, description="share of projected visual tokens dropped")
    mode: Literal["delete", "zero"] = "delete"


class SensitiveConfig(Config):
    """Which tokens of the preferred answer are visually sensitive (HSCR Eq. 4, first half)."""

    n: int = Field(default=10, ge=1)
    literal_n: bool = Field(
        default=False,
        description="up to n positions as printed, not at most half of them",
    )


class SubstituteConfig(Config):
    """What replaces a sensitive token (HSCR Eq. 3 and 4)."""

    negatives: Literal["hscr", "random"] = Field(
        default="hscr",
        description="`random` draws substitutes uniformly: the control of an honest report",
    )
    beta: float = Field(default=0.9, ge=0, description="contrast weight of Eq. 3")
    order: Literal["plausible", "pdiff_ascending"] = "plausible"
    top_m: int = Field(default=10, ge=1, description="candidates per position, from the dropped branch")
    plausibility: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="share of the dropped branch's top probability a substitute must reach, and of the full "
        "branch's the words after it; 0 is off",
    )
    full_plausibility: float = Field(
        default=0.0005, ge=0, le=1, description="the same in the full branch; 0 is off"
    )
    rounds: int = Field(
        default=3, ge=0, description="tokens after an edit that may be changed to agree with it"
    )
    min_probability: float = Field(
        default=0.01, ge=0, lt=1, description="floor on the mean token probability"
    )
    candidates: int = Field(default=8, ge=1, description="k of Eq. 4")


class RerankConfig(Config):
    """Levels of dispreference by semantic similarity (HSCR §3.2)."""

    similarity: Literal["token_f1", "corley_mihalcea"] = "corley_mihalcea"
    levels: int = Field(default=3, ge=1, description="j: dispreferred answers kept")
    gap: float = Field(default=0.1, ge=0, le=1)
    gap_mode: Literal["adjacent", "from_preferred"] = "adjacent"


class GenerateConfig(Config):
    """One run of preference generation."""

    seed: int = 0
    degrade: DegradeConfig = DegradeConfig()
    sensitive: SensitiveConfig = SensitiveConfig()
    substitute: SubstituteConfig = SubstituteConfig()
    rerank: RerankConfig = RerankConfig()


class FinetuneConfig(Config):
    """One LoRA fine-tune, always from the base model. Defaults suit the embedded model; the paper's are in
    docs/decisions."""

    objective: Literal["hscr", "sft"] = "hscr"
    seed: int = 0
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    gamma: float = Field(default=0.1, gt=0, description="γ of Eqs. 2, 5, 6; plays DPO's β")
    explicit_weight: float = Field(default=1.0, ge=0, description="of L_E, Eq. 5")
    implicit_weight: float = Field(default=1.0, ge=0, description="of L_I, Eq. 6")
    nll_weight: float = Field(default=5.0, ge=0, description="of the preferred answer's NLL; 0 in the paper")
    learning_rate: float = Field(default=2e-3, gt=0)
    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=16, ge=1, description="records per optimiser step")
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_records: int = Field(default=5000, ge=1, description="the newest live records, at most")


class GateConfig(Config):
    """When a candidate may serve. Margins and scores are fractions in [0, 1]; dependence is in nats."""

    target: str = "macro_score"
    min_questions: int = Field(default=300, ge=1)
    hallucination_margin: float = Field(default=0.03, ge=0)
    dependence_margin: float = Field(default=0.05, ge=0)
    resamples: int = Field(default=2000, ge=100, description="of the bootstrap over images")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class EvaluateConfig(Config):
    """One judgement of a candidate against the active version, through the serving engine."""

    suite: str = Field(default="phantom", description="`phantom`, or the path of a JSONL file")
    split: Literal["development", "test"] = "development"
    images: int = Field(default=120, ge=1)
    seed: int = 0
    concurrency: int = Field(default=8, ge=1, description="requests in flight at the engine")
    dependence_questions: int = Field(default=200, ge=1, description="scored for visual dependence")
    dependence_masks: int = Field(default=8, ge=1)
    drop_rate: float = Field(default=0.7, ge=0, le=1)
    gate: GateConfig = GateConfig()


class LoopConfig(Config):
    """One turn of the loop, as beat or a person starts it."""

    finetune: FinetuneConfig = FinetuneConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    auto_promote: bool = Field(default=False, description="release what passes without asking a person")
