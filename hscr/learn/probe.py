"""What an adapter changes, for an engine that serves it to be checked against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hscr.learn.examples import Pair, openers
from hscr.models.language import gather_logprobs
from hscr.models.vlm import VLM

ITEMS = 4
_CANDIDATES = 16
_MAX_TOKENS = 32


def probe_adapter(vlm: VLM, adapter: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """`{"items": [...]}`: at most four questions of training images where the adapter changes most.

    Each item has image_digest, question, completion (the adapter's own greedy answer, so that an engine at
    temperature 0 must say it), and the fp32 log-prob of each of its tokens, end-of-sequence included, as
    token_logprobs_base and token_logprobs_adapter.
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
            completions = [[ids] for ids in vlm.completions_ids(texts)]
            logits = [row for (row,) in vlm.completion_logits(context, completions)]
            changed = [gather_logprobs(z, ids) for z, (ids,) in zip(logits, completions, strict=True)]
        with vlm.use(None):
            base = [row for (row,) in vlm.completion_logprobs(vlm.prefill(prefix), completions)]
    shifts = [float((a - b).abs().mean()) for a, b in zip(changed, base, strict=True)]
    said = [_said(z, ids) for z, (ids,) in zip(logits, completions, strict=True)]
    # No engine can be held to an answer that is not read back into the tokens that were said.
    fit = [index for index in range(len(tried)) if said[index]] or range(len(tried))
    largest = sorted(fit, key=lambda index: -shifts[index])[:ITEMS]
    return {
        "items": [
            {
                "image_digest": tried[index].image_digest,
                "question": tried[index].question,
                "completion": texts[index],
                "token_logprobs_base": [round(value, 6) for value in base[index].tolist()],
                "token_logprobs_adapter": [round(value, 6) for value in changed[index].tolist()],
            }
            for index in largest
        ]
    }


def _said(logits: Tensor, ids: Sequence[int]) -> bool:
    """Whether greedy decoding says these very tokens, as far as it may go."""
    return logits.argmax(-1).tolist()[:_MAX_TOKENS] == list(ids)[:_MAX_TOKENS]
