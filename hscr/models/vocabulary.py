"""What each token id of a vocabulary says on its own."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Vocabulary(NamedTuple):
    """As wide as the model's logits: V entries."""

    normal: tuple[str, ...]
    """lower-cased text without surrounding space: equal for variants of one word"""
    content: Tensor
    """[V] bool: not special, holds a letter or digit, and is no part of a character"""
    by_text: dict[str, list[int]]
    """ids of each normal text"""

    @classmethod
    def read(cls, tokenizer: Any, width: int) -> Self:
        """Decode every id. Ids beyond the tokenizer's last are padding of the head and say nothing."""
        special = set(tokenizer.all_special_ids)
        known = min(width, len(tokenizer))
        texts = [tokenizer.decode([token]) if token < known else "" for token in range(width)]
        content = [
            token not in special and any(map(str.isalnum, text)) and "�" not in text
            for token, text in enumerate(texts)
        ]
        normal = tuple(text.strip().lower() for text in texts)
        by_text: dict[str, list[int]] = {}
        for token, text in enumerate(normal):
            by_text.setdefault(text, []).append(token)
        return cls(normal, torch.tensor(content), by_text)

    def variants(self, token: int) -> list[int]:
        """Ids that differ from `token` in case and space at most, itself included."""
        return self.by_text[self.normal[token]]
