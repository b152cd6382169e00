"""A LLaVA-1.5-shaped vision-language model: prompt, projected visual tokens, log-probs, greedy answers.

One instance serves one thread at a time, because activating an adapter changes the shared layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

from hscr.config import FinetuneConfig
from hscr.errors import InvalidCheckpoint, NotFound
from hscr.models.adapters import Adapters
from hscr.models.attention import NAME as ROWS
from hscr.models.chat import Chat, context_length
from hscr.models.digest import model_digest, template_digest
from hscr.models.language import Context, Language, Prompts, View
from hscr.models.processor import read_processor
from hscr.models.quantize import nf4
from hscr.models.sight import Sight, numeric_mode
from hscr.models.vision import Vision
from hscr.models.vocabulary import Vocabulary


class VLM(Chat, Language, Sight):
    """Model, tokenizer and processor of one folder, with the adapters loaded beside them."""

    def __init__(self, model: Any, processor: Any, digest: str, template_digest: str) -> None:
        Language.__init__(self, model)
        self.vision = Vision.of(model)
        self.context = context_length(model.config)
        Chat.__init__(self, processor, model.config.image_token_id, self.image_token_count, self.context)
        self.digest = digest
        self.template_digest = template_digest
        self.adapters = Adapters(model)
        self.numeric_mode = numeric_mode(model.device, model.dtype)
        if getattr(model, "is_loaded_in_4bit", False):
            self.numeric_mode += "/nf4"

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        quantize: Literal["nf4"] | None = None,
    ) -> Self:
        """Read a model folder in the hub's layout; frozen, in evaluation mode.

        `quantize` holds the language model's weights in four bits (QLoRA).
        Raises NotFound for a folder that lacks something, InvalidCheckpoint for damaged weights or a damaged
        configuration, DependencyMissing.
        """
        four_bits = nf4(getattr(torch, dtype), device) if quantize else {}
        logging.disable_progress_bar()
        with _reading(path):
            digest, template = model_digest(path), template_digest(path)
            processor = read_processor(path)
            model, report = LlavaForConditionalGeneration.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
                output_loading_info=True,
                **four_bits,
            )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise NotFound(
                f"{path} lacks weights: {sorted(report['missing_keys'])[:3]}.",
                remedy="Give the folder of a LLaVA saved with its vision tower and projector.",
            )
        model.set_attn_implementation({"text_config": ROWS})
        if not quantize:  # four-bit weights are packed on the device that they were loaded to
            model.to(device)
        model.eval().requires_grad_(False)
        return cls(model, processor, digest, template)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each id of the logits' axis says."""
        return Vocabulary.read(self.tokenizer, self.model.lm_head.out_features)

    # Text

    def embed(self, prompts: Sequence[Sequence[int]], views: Sequence[View | Tensor | None]) -> Prompts:
        """Put each row's visual tokens in the place of its image placeholder.

        A bare tensor [N, d] is shown whole; None fits a prompt without an image.
        """
        rows = [self._row(ids, view) for ids, view in zip(prompts, views, strict=True)]
        return Prompts(*(list(column) for column in zip(*rows, strict=True)))

    @torch.no_grad()
    def generate_greedy(self, context: Context, max_tokens: int = 64) -> list[str]:
        """The most probable continuation of each row, up to end-of-sequence or `max_tokens`."""
        order = torch.tensor([row for part in context.parts for row in part.rows], device=self.device)
        memories = [part.memory.copy() for part in context.parts]
        positions, hidden = torch.tensor(context.ends, device=self.device)[order], context.last[order]
        done = torch.zeros(len(order), dtype=torch.bool, device=self.device)
        chosen: list[Tensor] = []
        while True:
            token = torch.where(done, self.eos_id, self.logits(hidden).argmax(-1))
            done |= token == self.eos_id
            chosen.append(token)
            if len(chosen) == max_tokens or done.all():
                break
            hidden = self.step(memories, token, positions)
            positions = positions + 1
        answers = torch.stack(chosen, dim=1)[order.argsort()]
        return [self.text(row) for row in answers.tolist()]

    # Adapters

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Attach a saved adapter, inactive. Raises AdapterRefused, Conflict."""
        self.adapters.load(path, name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises NotFound, Conflict while it is active."""
        self.adapters.unload(name)

    def use(self, adapter: str | None) -> AbstractContextManager[None]:
        """Answer with this adapter inside the block; None is the base model. Raises NotFound."""
        return self.adapters.use(adapter)

    def with_lora(
        self, config: FinetuneConfig, name: str = "trainee"
    ) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """A fresh trainable adapter inside the block; yields its parameters by name."""
        return self.adapters.train(name, config)

    def _row(self, ids: Sequence[int], view: View | Tensor | None) -> tuple[Tensor, Tensor, int]:
        tokens, count = self.embed_ids(torch.tensor(ids)), torch.arange(len(ids), device=self.device)
        if view is None:
            return tokens, count, len(ids)
        shown = View.whole(view) if isinstance(view, Tensor) else view
        at, further = list(ids).index(self.image_token_id), shown.span - 1
        embeds = torch.cat([tokens[:at], shown.tokens, tokens[at + 1 :]])
        positions = torch.cat([count[:at], at + shown.at, count[at + 1 :] + further])
        return embeds, positions, len(ids) + further


@contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise InvalidCheckpoint(
            f"{folder} cannot be loaded: {error}.",
            remedy="Delete that folder and convert or download the model again.",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(
            f"{folder} holds no whole model: {error}",
            remedy="Give a folder with the model's weights, configuration, tokenizer and image processor.",
        ) from error
