"""What every training loop of a converted model needs: parameter groups and distillation from the float model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .conversion.converted import range_parameters

__all__ = ["distillation_loss", "parameter_groups"]


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Soft cross-entropy :math:`-T^2 \sum_c p_c \log q_c` of two ``[N, C]`` logits, mean over nodes.

    Its gradient is that of the Kullback-Leibler divergence (Hinton et al., 2015); no label enters.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Expected teacher logits of shape {list(student.shape)} (got {list(teacher.shape)})")
    target = (teacher / temperature).softmax(-1)
    return -(target * (student / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, range_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: weights, and ranges with their own rate (default ``lr``) and no decay.

    Works for plain models too (one group).
    """
    ranges = range_parameters(model)
    learned = {id(p) for p in ranges}
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in model.parameters() if p.requires_grad and id(p) not in learned],
            "lr": lr,
            "weight_decay": weight_decay,
        }
    ]
    free = [p for p in ranges if p.requires_grad]
    if free:
        groups.append({"params": free, "lr": lr if range_lr is None else range_lr, "weight_decay": 0.0})
    return groups
