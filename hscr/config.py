"""Run configurations: TOML in, resolved JSON kept with every result.

Each class is one stage of the loop. A key that does not exist is an error, and `digest` names the resolved
values, so two results with the same digest were made under the same settings.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hscr.errors import InvalidConfig
from hscr.recipes import read_settings

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""what every random generator takes"""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
            raise InvalidConfig(f"{key}: {first['msg']}.", remedy=_remedy(cls, first)) from error

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved values, hex."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def _remedy(kind: type[Config], error: ErrorDetails) -> str:
    if error["type"] != "extra_forbidden":
        return "Correct the value, or leave the key out to get its default."
    for part in error["loc"][:-1]:
        inner = kind.model_fields[str(part)].annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            kind = inner
    return f"Known keys there: {', '.join(kind.model_fields)}."


class DegradeConfig(Config):
    """HSCR §3.1 and its ablations: what the model is made to overlook."""

    kind: Literal["visual_token", "pixel", "patch", "latent"] = Field(
        default="visual_token",
        description="what is dropped: `visual_token`, projected visual tokens (the paper); `pixel`, the "
        "image but for a random crop; `patch`, patches before the vision tower; `latent`, attention in it",
    )
    rate: float = Field(default=0.7, ge=0, le=1, description="share dropped; 0 drops nothing, bit for bit")
    mode: Literal["delete", "zero", "attn_mask"] = Field(
        default="delete",
        description="of dropped visual tokens: taken out, replaced by zeros, or hidden from attention, which "
        "is to be taken out while the others keep their positions",
    )
    positions: Literal["reindex", "keep_original"] = Field(
        default="reindex",
        description="of the tokens left by `delete` and by `patch`: closed up, or where they were",
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.mode != "delete" and self.kind != "visual_token":
            raise InvalidConfig(
                f"degrade: {self.kind} has no mode {self.mode}.",
                remedy="Leave degrade.mode out, or set degrade.kind to visual_token.",
            )
        if self.mode == "attn_mask" and self.positions == "reindex":
            raise InvalidConfig(
                "degrade: attn_mask hides tokens and moves none.",
                remedy="Set degrade.positions to keep_original, or degrade.mode to delete.",
            )
        if self.positions == "keep_original" and (self.mode == "zero" or self.kind in {"pixel", "latent"}):
            raise InvalidConfig(
                "degrade: positions say nothing where every token stays.",
                remedy="Leave degrade.positions out.",
            )
        return self


class SensitiveConfig(Config):
    """Which tokens of the preferred answer are visually sensitive (HSCR Eq. 4, first half)."""

    score: Literal["gold_logprob_abs", "gold_abs", "max_abs", "js"] = Field(
        default="gold_logprob_abs",
        description="of a position, between the branches: difference of the answer's token in log-prob or in "
        "logit, the vocabulary's largest difference in logit, or Jensen-Shannon divergence",
    )
    n: int = Field(default=10, ge=1)
    literal_n: bool = Field(
        default=False,
        description="up to n positions as printed, not at most half of them",
    )
    content_only: bool = Field(
        default=True, description="false lets punctuation be replaced too; the end never is"
    )


class SubstituteConfig(Config):
    """What replaces a sensitive token (HSCR Eq. 3 and 4)."""

    negatives: Literal["hscr", "random"] = Field(
        default="hscr",
        description="`random` draws substitutes uniformly: the control of an honest report",
    )
    mode: Literal["teacher_forced", "autoregressive", "decoded"] = Field(
        default="teacher_forced",
        description="every substitute is chosen beside the preferred answer's own words, or, left to right, "
        "after those already substituted; or nothing is substituted and whole answers are drawn from P_diff "
        "(Eq. 4 as a distribution over answers)",
    )
    beta: float = Field(default=0.9, ge=0, description="contrast weight of Eq. 3")
    source: Literal["drop", "full", "union"] = Field(
        default="drop", description="the branch whose most probable tokens may be substitutes"
    )
    order: Literal["plausible", "pdiff_ascending", "weighted", "sample_pdiff"] = Field(
        default="plausible",
        description="in which candidates take them: those below the answer's own P_diff, most probable in "
        "the dropped branch first; lowest P_diff first (Eq. 4 as printed); drawn in proportion to 1 / "
        "P_diff; or drawn from P_diff over all tokens allowed (Eq. 4 as a distribution)",
    )
    top_m: int = Field(default=10, ge=1, description="candidates per position and branch")
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
        default=0.01, ge=0, lt=1, description="floor on the mean token probability; 0 is off"
    )
    candidates: int = Field(default=8, ge=1, le=64, description="k of Eq. 4")
    max_tokens: int = Field(
        default=64, ge=1, description="of a decoded answer; longer ones are no candidates"
    )
    vary_count: bool = Field(
        default=True, description="candidates with n, 3n/4, n/2 and n/4 tokens replaced, not all with n"
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.negatives == "random" and self.mode != "teacher_forced":
            raise InvalidConfig(
                "substitute: random negatives look at no prefix.",
                remedy="Set substitute.mode to teacher_forced.",
            )
        return self


class RerankConfig(Config):
    """Levels of dispreference by semantic similarity (HSCR §3.2)."""

    similarity: Literal["corley_mihalcea", "sentence_embedding", "token_f1"] = Field(
        default="corley_mihalcea",
        description="the measure the paper cites, without a lexicon; the cosine of sentence embeddings, "
        "which needs a model of its own; or word F1",
    )
    embedder: str = Field(
        default="all-MiniLM-L6-v2",
        description="of `sentence_embedding`: this packaged model, or the folder of another in the layout of "
        "sentence-transformers",
    )
    levels: int = Field(default=3, ge=1, description="j: dispreferred answers kept")
    gap: float = Field(default=0.1, ge=0, le=1)
    gap_mode: Literal["adjacent", "from_preferred"] = Field(
        default="adjacent", description="what a level keeps its distance from"
    )


class GenerateConfig(Config):
    """One run of preference generation."""

    seed: Seed = 0
    degrade: DegradeConfig = DegradeConfig()
    sensitive: SensitiveConfig = SensitiveConfig()
    substitute: SubstituteConfig = SubstituteConfig()
    rerank: RerankConfig = RerankConfig()


class FinetuneConfig(Config):
    """One LoRA fine-tune, always from the base model. Defaults suit the embedded model; the paper's are in
    docs/decisions."""

    objective: Literal["hscr", "sft"] = "hscr"
    seed: Seed = Field(default=0, description="of the adapter's first weights and of its dropout")
    data_seed: Seed | None = Field(default=None, description="of the records' order; by default `seed`")
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of LoRA; the model's own is always off")
    gamma: float = Field(default=0.1, gt=0, description="γ of Eqs. 2, 5, 6; plays DPO's β")
    explicit_weight: float = Field(default=1.0, ge=0, description="of L_E, Eq. 5")
    implicit_weight: float = Field(default=1.0, ge=0, description="of L_I, Eq. 6")
    implicit_detach_winner: bool = Field(
        default=False, description="L_I only lowers the less similar answer and never raises the other"
    )
    pair_reduction: Literal["sum", "mean"] = Field(
        default="sum", description="over a record's pairs: as printed, or divided by their number as in TRL"
    )
    nll_weight: float = Field(default=5.0, ge=0, description="of the preferred answer's NLL; 0 in the paper")
    reference: Literal["cached", "online"] = Field(
        default="cached",
        description="the base model's log-probs: computed once before training, or again at each step",
    )
    learning_rate: float = Field(default=2e-3, gt=0)
    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=16, ge=1, description="records per optimiser step, of all processes")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="records per forward pass; by default a process's whole share"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for a second forward pass")
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_gradient_norm: float = Field(default=1.0, gt=0, description="larger gradients are scaled down to it")
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a prompt, its image and an answer; longer records are refused, never cut. By "
        "default, and at most, the model's context",
    )
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
    seed: Seed = 0
    concurrency: int = Field(default=8, ge=1, description="requests in flight at the engine")
    dependence_questions: int = Field(default=200, ge=1, description="scored for visual dependence")
    dependence_masks: int = Field(default=8, ge=1)
    drop_rate: float = Field(default=0.7, ge=0, le=1)
    gate: GateConfig = GateConfig()


class LoopConfig(Config):
    """One turn of the loop, as beat or a person starts it."""

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a TOML file, or a recipe by its name (`hscr recipes`). Raises InvalidConfig."""
        return cls.parse(read_settings(path))

    finetune: FinetuneConfig = FinetuneConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    auto_promote: bool = Field(default=False, description="release what passes without asking a person")
