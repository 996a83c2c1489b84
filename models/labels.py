"""Class labels as every network here understands them."""

import torch
from torch import Tensor

NULL_LABEL = -1  # ∅, the dropped label of classifier-free guidance


def class_rows(table: Tensor, y: Tensor) -> Tensor:
    """Rows of `table` (classes + 1, …) for labels y (B,): a dropped label (< 0) takes the last row. No host sync."""
    return table[torch.where(y < 0, len(table) - 1, y)]


def drop_labels(y: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Replace each label by ∅ with probability p (NFM paper section 3.2), so that guidance works."""
    dropped = torch.rand(y.shape, generator=generator).to(y.device) < p
    return torch.where(dropped, NULL_LABEL, y)
