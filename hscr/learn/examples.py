"""Preference records as tokens and images, and the order in which a run takes them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hscr.config import FinetuneConfig
from hscr.errors import ConsentMissing, InvalidConfig, InvalidInput, InvalidRecord
from hscr.models.vlm import VLM
from hscr.records import PreferenceRecord

Opener = Callable[[], Image.Image]
Pair = tuple[PreferenceRecord, Image.Image | Opener]
"""A record and its image, or what opens it, so that not all images need be in memory at once"""


@dataclass(frozen=True)
class Example:
    """A record as tokens: completions[0] is the preferred answer, then the dispreferred by similarity."""

    record: PreferenceRecord
    prompt: list[int]
    """as many placeholders as the image has visual tokens"""
    completions: list[list[int]]


def prepare(vlm: VLM, pairs: Sequence[Pair], config: FinetuneConfig) -> list[Example]:
    """The examples in the order of their records' ids.

    Raises ConsentMissing, and InvalidRecord that names the record, also when it is longer than the model can
    read: an image cut short would train the model to answer without seeing.
    """
    if not pairs:
        raise InvalidRecord("There is nothing to train on.", remedy="Collect consented preferences first.")
    limit = _limit(vlm, config)
    records = sorted((record for record, _ in pairs), key=lambda record: record.id)
    for one, next_one in pairwise(records):
        if one.id == next_one.id:
            raise InvalidRecord(
                f"{one.id} is there more than once.",
                remedy="Keep one of them: an id names one record, and one reference is kept for it.",
            )
    return [_example(vlm, record, config, limit) for record in records]


def openers(pairs: Sequence[Pair]) -> dict[str, Opener]:
    """What opens each image, by its digest."""
    return {record.image_digest: _opener(image) for record, image in pairs}


def digest(examples: Sequence[Example]) -> str:
    """SHA-256, hex, of the records' ids, images and tokens."""
    content = [[e.record.id, e.record.image_digest, e.prompt, e.completions] for e in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Pictures:
    """Visual tokens of the records' images, kept in memory up to a number of bytes.

    The vision tower is frozen, so an image's tokens never change. Each image is encoded alone: its tokens
    then do not depend, not even in their last bit, on which other images a batch happened to hold.
    """

    def __init__(self, vlm: VLM, opened: Mapping[str, Opener], limit: int = 2**29) -> None:
        self._vlm, self._openers = vlm, opened
        self._kept: dict[str, Tensor] = {}
        self._free = limit

    def tokens(self, examples: Sequence[Example]) -> list[Tensor]:
        """[N, d] of each example's image."""
        digests = [example.record.image_digest for example in examples]
        absent = [digest for digest in dict.fromkeys(digests) if digest not in self._kept]
        fresh = self._vlm.encode({digest: self._openers[digest]() for digest in absent}, batch_size=1)
        for digest, tokens in fresh.items():
            if tokens.nbytes <= self._free:
                self._kept[digest] = tokens
                self._free -= tokens.nbytes
        known = self._kept | fresh
        return [known[digest] for digest in digests]

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """[B, 3, H, W] of each example's image."""
        return self._vlm.pixel_values([self._openers[e.record.image_digest]() for e in examples])


class Examples(Dataset[tuple[Example, bool]]):
    """What a data loader draws from; indices are those of `Order`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: tuple[int, bool]) -> tuple[Example, bool]:
        return self.examples[index[0]], index[1]


def collate(drawn: Sequence[tuple[Example, bool]]) -> dict[str, Any]:
    """A micro-batch: `examples`, and in `counts` [B] which of them do, and do not only fill it up."""
    return {
        "examples": [example for example, _ in drawn],
        "counts": torch.tensor([counts for _, counts in drawn]),
    }


class Order(Sampler[tuple[int, bool]]):
    """A permutation of the examples for each epoch, a function of the seed and the epoch alone.

    It is filled up to a multiple of `share`, the records that all processes together forward at once, by
    examples that do not count: processes work in step, and none may come away empty-handed.
    """

    def __init__(self, count: int, seed: int, share: int, epoch: Callable[[], int]) -> None:
        self._count, self._seed, self._epoch = count, seed, epoch
        self._filling = -count % share

    def __len__(self) -> int:
        return self._count + self._filling

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        generator = torch.Generator().manual_seed(self._seed + (self._epoch() << 32))
        order = torch.randperm(self._count, generator=generator).tolist()
        yield from ((index, True) for index in order)
        yield from ((order[at % self._count], False) for at in range(self._filling))


def _example(vlm: VLM, record: PreferenceRecord, config: FinetuneConfig, limit: int) -> Example:
    rejected = [] if config.objective == "sft" else [response.text for response in record.rejected]
    try:
        completions = vlm.completions_ids([record.chosen, *rejected])
        prompt = _with_image(vlm, vlm.prompt_ids(record.question))
    except InvalidInput as error:
        raise InvalidRecord(f"{record.id}: {error.detail}", remedy="Correct or delete the record.") from error
    if not record.consent:
        raise ConsentMissing(
            f"{record.id} is not to be trained on: its row says `consent: false`.",
            remedy="Leave the record out.",
        )
    length = len(prompt) + max(map(len, completions))
    if length > limit:
        raise InvalidRecord(
            f"{record.id}: prompt, image and answer have {length} tokens; at most {limit} are trained on.",
            remedy="Shorten or delete the record, or raise max_length if the model's context allows it.",
        )
    return Example(record, prompt, completions)


def _with_image(vlm: VLM, ids: Sequence[int]) -> list[int]:
    at = list(ids).index(vlm.image_token_id)
    return [*ids[:at], *[vlm.image_token_id] * vlm.image_token_count, *ids[at + 1 :]]


def _limit(vlm: VLM, config: FinetuneConfig) -> int:
    if config.max_length is not None and config.max_length > vlm.context:
        raise InvalidConfig(
            f"max_length: {config.max_length} is more than the model's context of {vlm.context} tokens.",
            remedy=f"Set max_length to {vlm.context} or less, or leave it out.",
        )
    return config.max_length or vlm.context


def _opener(image: Image.Image | Opener) -> Opener:
    return (lambda: image) if isinstance(image, Image.Image) else image
