"""What an adapter changes, for an engine that serves it to be checked against."""

from collections.abc import Sequence
from typing import Any

import torch

from hscr.learn.examples import Pair, openers
from hscr.models.vlm import VLM

ITEMS = 4
_CANDIDATES = 16
_MAX_TOKENS = 32


def probe_adapter(vlm: VLM, adapter: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """`{"items": [...]}`: at most four questions of training images where the adapter changes most.

    Each item has image_digest, question, completion (the adapter's own greedy answer), its token ids as
    completion_ids, and the fp32 log-prob of each of them as token_logprobs_base and token_logprobs_adapter;
    all three without end-of-sequence.
    """
    by_image = {record.image_digest: record for record, _ in sorted(pairs, key=lambda pair: pair[0].id)}
    tried = list(by_image.values())[:_CANDIDATES]
    opened = openers(pairs)
    tokens = vlm.encode({record.image_digest: opened[record.image_digest]() for record in tried})
    visual = [tokens[record.image_digest] for record in tried]
    prompts = [vlm.prompt_ids(record.question) for record in tried]
    with torch.inference_mode():
        prefix = vlm.embed(prompts, visual)
        with vlm.use(adapter):
            context = vlm.prefill(prefix)
            spoken = vlm.generate_greedy(context, _MAX_TOKENS)
            texts = [text or record.chosen for text, record in zip(spoken, tried, strict=True)]
            completions = [[ids[:-1]] for ids in vlm.completions_ids(texts)]
            changed = [row for (row,) in vlm.completion_logprobs(context, completions)]
        with vlm.use(None):
            base = [row for (row,) in vlm.completion_logprobs(vlm.prefill(prefix), completions)]
    shifts = [float((a - b).abs().mean()) for a, b in zip(changed, base, strict=True)]
    largest = sorted(range(len(tried)), key=lambda index: -shifts[index])[:ITEMS]
    return {
        "items": [
            {
                "image_digest": tried[index].image_digest,
                "question": tried[index].question,
                "completion": texts[index],
                "completion_ids": completions[index][0],
                "token_logprobs_base": [round(value, 6) for value in base[index].tolist()],
                "token_logprobs_adapter": [round(value, 6) for value in changed[index].tolist()],
            }
            for index in largest
        ]
    }
