"""Class labels as all networks of this project take them: class indices, or -1 for a dropped label."""

import torch
from torch import Tensor

NULL_LABEL = -1  # ∅, the dropped label of classifier-free guidance


def class_rows(table: Tensor, y: Tensor) -> Tensor:
    """Rows (B, …) of `table` (classes + 1, …) for labels y (B,). A dropped label (< 0) gets the last row.

    It does not make the CPU wait for the GPU.
    """
    return table[torch.where(y < 0, len(table) - 1, y)]


def drop_labels(y: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Labels y (B,) with each replaced by ∅ with probability p (NFM paper section 3.2), which guidance needs."""
    dropped = torch.rand(y.shape, generator=generator).to(y.device) < p
    return torch.where(dropped, NULL_LABEL, y)
