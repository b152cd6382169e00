"""The model card of a converted folder."""

from typing import Any

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {source}, converted

The weights of `{source}` in the layout of `LlavaForConditionalGeneration`, made by `hscr convert`.
Nothing was trained: {tensors} tensors, {parameters:,} parameters, {dtype}, in {shards} file(s).
Embeddings and head grew by rows for `<image>`, and for `<pad>` where none was. Licence and terms are the
original's; its own card, where there was one, is `ORIGINAL-README.md`.

## Intended use

Research only, not for clinical use: not in clinical care, nor for any clinical decision. The original model's
own limits on use hold as well.

## What was checked

| check | result |
|---|---|
| tensors that equal their source, none missing, unexpected, misshapen or not finite | {tensors} |
| vision tower, trained and loaded: SHA-256 of its first and last layer | {vision} |
| text-only logits against the original language model, largest difference | {logits_difference:.2g} |
| prompts that become the ids of the original code (template `{template}`) | {prompts} |
| canary: noise for a drawn radiograph changes an answer by, nats per token | {change:.3g} |

Asked what the drawn radiograph shows, the model answers: {answer}
"""


def card(source: str, facts: dict[str, Any]) -> str:
    """Markdown; its section `Intended use` is what a deployment states about the model."""
    vision = ", ".join(f"{layer} `{digest[:16]}…`" for layer, digest in facts["vision"].items())
    return _CARD.format(
        **{name: value for name, value in facts.items() if name != "vision"},
        source=source,
        vision=vision,
        change=facts["canary"].change,
        answer=repr(facts["canary"].answer),
    )
