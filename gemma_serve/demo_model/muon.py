"""Muon: momentum whose update is made orthogonal, for the matrices of hidden layers.

See https://kellerjordan.github.io/posts/muon/. torch's own runs in bfloat16, which most CPUs only emulate.
"""

from collections.abc import Iterable
from typing import Any

import torch


def _orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrix, about: Newton and Schulz's iteration with Keller Jordan's numbers."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(average, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.sub_(update, alpha=group["lr"] * scale)
