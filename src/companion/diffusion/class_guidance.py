"""Class labels while sampling: the label is bound to the denoiser, with a guidance weight."""

from typing import Any

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import Denoiser


class ClassGuidance(nn.Module):
    """Denoiser of the class y: D_null + weight (D_y - D_null), D_null being that of no class.

    D: takes y=, as an EDMDenoiser around an EDMUNet with num_classes does. y: one label for all draws, or
    labels (batch,), or weights of the classes (batch or 1, num_classes). weight: 1 is the model as trained and
    0 ignores the label, at one evaluation of D each; above 1 classes are exaggerated, for which the network
    must have been trained with label dropout. null: the label that stands for no class in D's training (0 for MAISI);
    by default D is given none. Classifier-free guidance: [ho2022], whose weight is counted from 0, so that
    theirs is ours minus 1.
    """

    D: Any  # takes y= beside the arguments of a Denoiser

    def __init__(self, D: Denoiser, y: int | Tensor, weight: float = 1.0, null: int | None = None):
        super().__init__()
        self.D, self.weight, self.null = D, weight, null
        self.y = torch.tensor([y]) if isinstance(y, int) else y

    @property
    def denoiser_calls(self) -> int:
        """Evaluations of the network per call."""
        return 1 if self.weight in (0, 1) else 2

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        if self.weight == 0:
            return self._no_class(x, sigma, cond)
        x0_hat = self.D(x, sigma, cond, y=self.y.to(x.device))
        if self.weight == 1:
            return x0_hat
        return torch.lerp(self._no_class(x, sigma, cond), x0_hat, self.weight)

    def _no_class(self, x: Tensor, sigma: Tensor, cond: Tensor | None) -> Tensor:
        labels = {} if self.null is None else {"y": torch.tensor([self.null], device=x.device)}
        return self.D(x, sigma, cond, **labels)

    @property
    def moments(self):
        """moments(x, sigma, cond) -> (x0_hat, variance); exists with weight 1 if D has it."""
        if self.weight != 1 or not hasattr(self.D, "moments"):
            raise AttributeError("a guided denoiser has no moments unless weight is 1 and D has them")
        return lambda x, sigma, cond=None: self.D.moments(x, sigma, cond, y=self.y.to(x.device))
