"""Adam (Kingma and Ba, ICLR 2015): the first use of ``torch.optim`` imports PyTorch's compiler, for a second."""

import torch
from torch import Tensor

DAMPING = 1e-3  # Adam's epsilon, for gradients a voxel: where the images are flat, as in air, nearly nothing moves


class Adam:
    """Moves a parameter against its gradients."""

    def __init__(self, parameter: Tensor, rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameter, self.rate, self.betas, self.steps = parameter, rate, betas, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        unbiased, unbiased_square = (1 - beta**self.steps for beta in self.betas)
        self.mean.lerp_(gradient, 1 - self.betas[0])
        self.square.lerp_(gradient.square_(), 1 - self.betas[1])
        size = self.square.sqrt().div_(unbiased_square**0.5).add_(DAMPING)
        self.parameter.addcdiv_(self.mean, size, value=-self.rate / unbiased)
