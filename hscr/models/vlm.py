"""A LLaVA-1.5-shaped vision-language model: prompt, projected visual tokens, log-probs, greedy answers.

One instance serves one thread at a time, because activating an adapter changes the shared layers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.utils import logging

from hscr.config import FinetuneConfig
from hscr.errors import NotFound
from hscr.models.adapters import Adapters
from hscr.models.branches import branch_attention, pack, prefix_attention
from hscr.models.chat import Chat
from hscr.models.digest import model_digest, template_digest
from hscr.models.vocabulary import Vocabulary


class Prefix(NamedTuple):
    """A batch of embedded prompts, padded on the left to one length L."""

    embeds: Tensor
    """[B, L, d]"""
    mask: Tensor
    """[B, L] bool, False on padding"""

    @property
    def positions(self) -> Tensor:
        """[B, L]: 0 at the first real token, so that padding changes no rotary angle."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)


class Context(NamedTuple):
    """A batch of prompts the model has read."""

    mask: Tensor
    """[B, L] bool, False on padding"""
    cache: Any
    """keys and values of exactly the prompts"""
    last: Tensor
    """[B, d]: hidden state of each prompt's last token, which predicts the first of any answer"""

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.mask.sum(-1).tolist()


class VLM(Chat):
    """Model, tokenizer and processor of one folder, with the adapters loaded beside them."""

    def __init__(self, model: Any, processor: Any, digest: str, template_digest: str) -> None:
        self.model = model
        self.device = model.device
        self.context: int = model.config.text_config.max_position_embeddings
        super().__init__(processor, model.config.image_token_id, self.image_token_count, self.context)
        self.digest = digest
        self.template_digest = template_digest
        self.adapters = Adapters(model)
        self.numeric_mode = f"{model.device.type}/{str(model.dtype).removeprefix('torch.')}"

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: str = "float32") -> Self:
        """Read a model folder in the hub's layout; frozen, in evaluation mode. Raises NotFound."""
        digest, template = model_digest(path), template_digest(path)
        logging.disable_progress_bar()
        model, report = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise NotFound(
                f"{path} lacks weights: {sorted(report['missing_keys'])[:3]}.",
                remedy="Give the folder of a LLaVA saved with its vision tower and projector.",
            )
        model.to(device).eval().requires_grad_(False)
        return cls(model, AutoProcessor.from_pretrained(path), digest, template)

    @property
    def image_token_count(self) -> int:
        """N: visual tokens of one image after the projector."""
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (self.model.config.vision_feature_select_strategy == "full")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each id of the logits' axis says."""
        return Vocabulary.read(self.tokenizer, self.model.lm_head.out_features)

    # Images

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, 3, H, W], resized and normalised as the model's processor says."""
        rgb = [image.convert("RGB") for image in images]
        pixels = self.processor.image_processor(images=rgb, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.model.dtype)

    @torch.no_grad()
    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, N, d]: visual tokens after the projector, where HSCR drops them (HSCR §3.1)."""
        return torch.stack(list(self.model.model.get_image_features(pixel_values=pixel_values).pooler_output))

    def encode(self, images: Mapping[str, Image.Image], batch_size: int = 32) -> dict[str, Tensor]:
        """Visual tokens [N, d] of each image, by the images' own keys."""
        found: dict[str, Tensor] = {}
        keys = list(images)
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            tokens = self.visual_tokens(self.pixel_values([images[key] for key in batch]))
            found |= dict(zip(batch, tokens, strict=True))
        return found

    # Forward passes

    def embed(self, prompts: Sequence[Sequence[int]], visual: Sequence[Tensor | None]) -> Prefix:
        """Put each row's visual tokens [n, d] in the place of its image placeholder; pad on the left.

        n may differ by row: deleted tokens shorten it. None fits a prompt without an image.
        """
        rows = [self._row(ids, tokens) for ids, tokens in zip(prompts, visual, strict=True)]
        length = max(len(row) for row in rows)
        embeds = torch.stack([nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return Prefix(embeds, torch.arange(length, device=self.device) >= length - lengths[:, None])

    def hidden(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """[B, L, d]: the language model's last hidden states.

        mask: [B, cached + L] of real tokens, or [B, 1, L, cached + L] added to the attention scores.
        """
        return self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden states [..., d]."""
        return self.model.lm_head(hidden).float()

    def prefill(self, prefix: Prefix) -> Context:
        """Forward the prompts once, for any number of completions."""
        cache = DynamicCache()
        attention = prefix_attention(prefix.mask, prefix.embeds.dtype)
        hidden = self.hidden(prefix.embeds, attention, prefix.positions, cache)
        return Context(prefix.mask, cache, hidden[:, -1])

    def completion_logits(
        self, context: Context, completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """fp32 logits [T, V] before each token of each completion; completions[b] follow row b's prompt."""
        packed = pack(context.lengths, completions, self.device)
        hidden = context.last[:, None]
        if packed.tokens.numel():
            attention = branch_attention(context.mask, packed.branch, hidden.dtype)
            embeds = self._embed_ids(packed.tokens)
            suffix = self.hidden(embeds, attention, packed.positions, context.cache)
            context.cache.crop(-packed.tokens.shape[1])
            hidden = torch.cat([hidden, suffix], dim=1)
        logits = self.logits(hidden[packed.rows, packed.columns])
        parts = iter(torch.split(logits, [len(y) for row in completions for y in row]))
        return [[next(parts) for _ in row] for row in completions]

    def completion_logprobs(
        self, context: Context, completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """fp32 log-prob [T] of each token of each completion, end-of-sequence included."""
        logits = self.completion_logits(context, completions)
        return [
            [gather_logprobs(z, y) for z, y in zip(*pair, strict=True)]
            for pair in zip(logits, completions, strict=True)
        ]

    @torch.no_grad()
    def generate_greedy(self, context: Context, max_tokens: int = 64) -> list[str]:
        """The most probable continuation of each row, up to end-of-sequence or `max_tokens`."""
        mask, positions, hidden = (
            context.mask,
            torch.tensor(context.lengths, device=self.device),
            context.last,
        )
        done = torch.zeros(len(mask), dtype=torch.bool, device=self.device)
        chosen: list[Tensor] = []
        while True:
            token = torch.where(done, self.eos_id, self.logits(hidden).argmax(-1))
            done |= token == self.eos_id
            chosen.append(token)
            if len(chosen) == max_tokens or done.all():
                break
            mask = nn.functional.pad(mask, (0, 1), value=True)
            hidden = self.hidden(self._embed_ids(token[:, None]), mask, positions[:, None], context.cache)[
                :, -1
            ]
            positions = positions + 1
        context.cache.crop(1 - len(chosen))
        return [self.text(row) for row in torch.stack(chosen, dim=1).tolist()]

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

    def _embed_ids(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def _row(self, ids: Sequence[int], visual: Tensor | None) -> Tensor:
        tokens = self._embed_ids(torch.tensor(ids))
        if visual is None:
            return tokens
        at = list(ids).index(self.image_token_id)
        return torch.cat([tokens[:at], visual, tokens[at + 1 :]])


def gather_logprobs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """fp32 log-prob [T] of each id under logits [T, V]."""
    index = torch.tensor(ids, device=logits.device)
    return logits.float().log_softmax(-1).gather(-1, index[:, None])[:, 0]
