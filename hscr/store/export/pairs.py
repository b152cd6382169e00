"""Preference pairs as the other trainers define them: one model per form, which checks their rules.

The rules were read in the trainers' loaders. A row that breaks one is dropped by LLaMA-Factory and ms-swift
with a warning at most, so it is refused here, by id, before anything is written.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hscr.errors import InvalidRecord
from hscr.parquet import Image
from hscr.runs.canonical import Stored
from hscr.store.export.read import image_path

Text = Annotated[str, Field(min_length=1)]
Model = TypeVar("Model", bound=BaseModel)
PLACEHOLDER = "<image>"
_MEDIA = (PLACEHOLDER, "<video>", "<audio>")


class Pair(BaseModel):
    """What all forms are made from: one preferred and one dispreferred answer."""

    id: str
    image: Image
    question: Text
    chosen: Text
    rejected: Text


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Message(_Row):
    role: Literal["user", "assistant"]
    content: Text


class TrlRow(_Row):
    """TRL 1.16, `trl/trainer/dpo_trainer.py` (DataCollatorForVisionPreference) and `trl/data_utils.py`
    (prepare_multimodal_messages): string contents, into which TRL puts the one image placeholder itself."""

    images: list[Image] = Field(min_length=1)
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1, max_length=1)
    rejected: list[Message] = Field(min_length=1, max_length=1)

    @classmethod
    def of(cls, pair: Pair) -> Self:
        return cls(
            images=[pair.image],
            prompt=[Message(role="user", content=pair.question)],
            chosen=[Message(role="assistant", content=pair.chosen)],
            rejected=[Message(role="assistant", content=pair.rejected)],
        )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _require(self.prompt[-1].role == "user", "the prompt must end with the user's turn")
        _require(
            {m.role for m in [*self.chosen, *self.rejected]} == {"assistant"}, "answers are the assistant's"
        )
        texts = [message.content for message in [*self.prompt, *self.chosen, *self.rejected]]
        _require_placeholders(texts, 0)
        _require_different(self.chosen[0].content, self.rejected[0].content)
        return self


class Turn(_Row):
    sender: Literal["human", "gpt"] = Field(alias="from")
    value: Text


class LlamaFactoryRow(_Row):
    """LLaMA-Factory 0.9.5, `src/llamafactory/data/converter.py` (SharegptDatasetConverter: turns alternate
    from `human`, an odd number of them when ranking, both answers by `gpt`) and `mm_plugin.py` (as many
    placeholders as images, over all turns)."""

    conversations: list[Turn]
    chosen: Turn
    rejected: Turn
    images: list[str] = Field(min_length=1)

    @classmethod
    def of(cls, pair: Pair) -> Self:
        return cls(
            conversations=[Turn(sender="human", value=PLACEHOLDER + pair.question)],
            chosen=Turn(sender="gpt", value=pair.chosen),
            rejected=Turn(sender="gpt", value=pair.rejected),
            images=[pair.image.path],
        )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        senders = [turn.sender for turn in self.conversations]
        _require(len(senders) % 2 == 1, "a ranked conversation has an odd number of turns")
        _require(senders == [("human", "gpt")[n % 2] for n in range(len(senders))], "turns must alternate")
        _require({self.chosen.sender, self.rejected.sender} == {"gpt"}, "both answers are by `gpt`")
        asked = [turn.value for turn in self.conversations]
        _require_placeholders([*asked, self.chosen.value], len(self.images))
        _require_placeholders([*asked, self.rejected.value], len(self.images))
        _require_different(self.chosen.value, self.rejected.value)
        return self


class SwiftRow(_Row):
    """ms-swift 4.6, `swift/dataset/preprocessor/core.py` (RowPreprocessor: roles, a `rejected_response`
    that is text and differs from the last message; a list would be one trajectory of several messages)."""

    messages: list[Message] = Field(min_length=2)
    rejected_response: Text
    images: list[str] = Field(min_length=1)

    @classmethod
    def of(cls, pair: Pair) -> Self:
        return cls(
            messages=[
                Message(role="user", content=PLACEHOLDER + pair.question),
                Message(role="assistant", content=pair.chosen),
            ],
            rejected_response=pair.rejected,
            images=[pair.image.path],
        )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _require(self.messages[-1].role == "assistant", "the last message is the preferred answer")
        texts = [message.content for message in self.messages]
        _require_placeholders(texts, len(self.images))
        _require_placeholders([self.rejected_response], 0)
        _require_different(texts[-1], self.rejected_response)
        return self


class RlaifvRow(_Row):
    """RLAIF-V, `muffin/data/datasets.py` (RLAIFVDataset puts the placeholder before the question) and
    `muffin/eval/muffin_inference_logp.py` (adds the reference log-probs `logps`, which an export does not
    know, and reads `origin_split` as JSON)."""

    image: Image
    question: Text
    chosen: Text
    rejected: Text
    idx: int = Field(ge=0)
    origin_dataset: Text
    origin_split: Text
    image_path: Text

    @classmethod
    def of(cls, pair: Pair, idx: int) -> Self:
        return cls(
            **pair.model_dump(include={"image", "question", "chosen", "rejected"}),
            idx=idx,
            origin_dataset="hscr",
            origin_split=json.dumps({"record": pair.id}),
            image_path=pair.image.path,
        )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _require_placeholders([self.question, self.chosen, self.rejected], 0)
        _require_different(self.chosen, self.rejected)
        _require(isinstance(json.loads(self.origin_split), dict), "origin_split is a JSON object")
        return self


def pairs(stored: Stored) -> Iterator[Pair]:
    """One per dispreferred answer. Texts are stripped, as our own tokenisation strips them."""
    record = stored.record
    image = Image(bytes=stored.png, path=image_path(record.image_digest))
    shared = {"id": record.id, "image": image, "question": record.question.strip()}
    for response in record.rejected:
        texts = {"chosen": record.chosen.strip(), "rejected": response.text.strip()}
        yield _named(record.id, partial(Pair.model_validate, {**shared, **texts}))


def checked(pair: Pair, make: Callable[[Pair], BaseModel]) -> dict[str, Any]:
    """The pair as a row. Raises InvalidRecord that names the record and the rule it breaks."""
    return _named(pair.id, partial(make, pair)).model_dump(by_alias=True)


def _named(identity: str, make: Callable[[], Model]) -> Model:
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidRecord(
            f"{identity} cannot be exported in this form: {f'{place}: ' if place else ''}{first['msg']}.",
            remedy="Correct or leave out the record; --format jsonl and parquet keep it as it is.",
        ) from error


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _require_placeholders(texts: Sequence[str], count: int) -> None:
    found = sum(text.count(PLACEHOLDER) for text in texts)
    _require(found == count, f"{found} times {PLACEHOLDER} in the texts, where {count} stand for the images")
    other = [media for media in _MEDIA[1:] if any(media in text for text in texts)]
    _require(not other, f"the text holds {', '.join(other)}, which would be read as media")


def _require_different(chosen: str, rejected: str) -> None:
    _require(chosen != rejected, "the preferred and the dispreferred answer are the same text")
