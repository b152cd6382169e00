"""What the vision tower is taught: to name, patch by patch, the study and the lesion that covers it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hscr.models.phantom.anatomy import (
    FINDINGS,
    IMAGE_SIZE,
    LOCATIONS,
    SIDES,
    SIZES,
    STUDIES,
    Phantom,
    Pixels,
)
from hscr.models.phantom.architecture import PATCH_SIZE

_PLACES = tuple(dict.fromkeys(place for places in LOCATIONS.values() for place in places))


def pixel_values(pictures: Sequence[Pixels]) -> Tensor:
    """Pictures [H, W] in [0, 1], as the processor would give them: float32 [B, 3, H, W] in [-1, 1]."""
    eight_bit = np.round(np.stack(pictures) * 255) / 255
    return torch.from_numpy(eight_bit.astype(np.float32) * 2 - 1)[:, None].expand(-1, 3, -1, -1)


class PatchHeads(nn.Module):
    """Auxiliary classifiers over patch tokens; used for training the vision tower and then thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.study = nn.Linear(width, len(STUDIES))
        self.lesion = nn.Linear(width, len(FINDINGS) + 1)
        self.side = nn.Linear(width, len(SIDES))
        self.size = nn.Linear(width, len(SIZES))
        self.location = nn.Linear(width, len(_PLACES))

    def loss(self, tokens: Tensor, facts: Tensor, covered: Tensor) -> Tensor:
        """Mean cross-entropies. `tokens` [B, P, D]; `facts` int64 [B, 5]; `covered` bool [B, P]."""
        studies = facts[:, :1].expand(covered.shape)
        lesions = torch.where(covered, facts[:, 1:2] + 1, 0)
        # Lesions cover two patches in a hundred: unweighted, "nothing here" would be learnt everywhere first.
        weight = torch.ones(len(FINDINGS) + 1)
        weight[1:] = 8
        total = cross_entropy(self.study(tokens).flatten(0, 1), studies.flatten())
        total = total + cross_entropy(self.lesion(tokens).flatten(0, 1), lesions.flatten(), weight)
        if covered.any():
            seen, image = tokens[covered], covered.nonzero()[:, 0]
            for column, head in enumerate((self.side, self.size, self.location), start=2):
                total = total + cross_entropy(head(seen), facts[image, column]) / 3
        return total


def fact_indices(phantoms: Sequence[Phantom]) -> Tensor:
    """Indices of study, finding, side, size and location, int64 [B, 5]; 0 where there is no finding."""
    return torch.tensor([_indices(phantom) for phantom in phantoms])


def _indices(phantom: Phantom) -> list[int]:
    study = list(STUDIES).index(phantom.study)
    if phantom.finding is None:
        return [study, 0, 0, 0, 0]
    assert phantom.side is not None
    assert phantom.size is not None
    assert phantom.location is not None
    return [
        study,
        FINDINGS.index(phantom.finding),
        SIDES.index(phantom.side),
        SIZES.index(phantom.size),
        _PLACES.index(phantom.location),
    ]


def covered_patches(opacities: Sequence[Pixels]) -> Tensor:
    """Which patches a lesion covers by an eighth or more, or most of all: bool [B, P] in reading order."""
    patches = IMAGE_SIZE // PATCH_SIZE
    grid = np.stack(opacities).reshape(-1, patches, PATCH_SIZE, patches, PATCH_SIZE)
    share = torch.from_numpy(grid.mean(axis=(2, 4))).flatten(1)
    peak = share.amax(1, keepdim=True)
    return (share > 0) & ((share >= 0.125) | (share == peak))
