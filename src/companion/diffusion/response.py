"""What operators do to real images, nearly: a filter between two maps of sensitivity, which preconditions systems.

A^H A of a projector blurs everywhere alike, by about 1 / |k|, and what varies, the dose, attenuation and the counts'
weights, does so slowly; coils and a mask of k-space do to volumes much the same. L^H A^H A L + noise^2 of a prior's
covariance L L^H varies by orders of magnitude from pixel to pixel, though, as the prior's variance does. So its
inverse is taken for a few of these variances, for each of which it is a filter, and pixels lie between them
[fessler1999]. A preconditioner changes how fast conjugate gradients converge, never to what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.diffusion.covariance import Factor
from companion.operators.linear import LinearOperator

LEVELS = 4  # variances for which the inverse is a filter
LEAST = 0.05  # of the noise: a signal below it leaves the system what it is without one
WINDOW = 5  # pixels over which variances are averaged: filters do not follow them from one pixel to the next
RINGS = 24  # of spatial frequencies within a slice, in which the filter is measured
FLOOR = 0.02  # of the mean of the filter: frequencies that the data do not see


@dataclass(frozen=True, eq=False)
class Response:
    """A^H A, nearly: w F^H diag(k) F w, for images (..., 1, [z,] y, x).

    weight: w (batch of A or 1, *A.domain_shape), positive, 1 on average. spectrum: k, of as many items, its last axis
    that of a real FFT.
    """

    weight: Tensor
    spectrum: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, A: LinearOperator, like: Tensor) -> Response:
        """Measured by two products with A^H A, of ones and of random signs; in the precision and place of `like`.

        The filter is the same on rings within a slice, and for each frequency along z.
        """
        shape, batch = tuple(A.domain_shape), tuple(A.batch_shape) or (1,)
        axes = tuple(range(1 - len(shape), 0))
        sums = A.normal(like.new_ones(*batch, *shape)).clamp(min=0)
        level = sums.mean((-len(shape), *axes), keepdim=True).clamp(min=torch.finfo(like.dtype).tiny)
        weight = (sums / level).clamp(min=1e-3).sqrt()
        signs = 2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) - 1
        signs = signs.to(like).expand(*batch, *shape)
        seen = torch.fft.rfftn(A.normal(signs / weight) / weight, dim=axes, norm="ortho")
        power = (torch.fft.rfftn(signs, dim=axes, norm="ortho").conj() * seen).real
        ring = _rings(shape[1:]).flatten()
        count = torch.bincount(ring).clamp(min=1).to(power.device)
        rows, ring = power.reshape(-1, len(ring)), ring.to(power.device)
        mean = rows.new_zeros(len(rows), len(count)).index_add_(1, ring, rows) / count
        spectrum = mean[:, ring].reshape(power.shape)
        return cls(weight, torch.maximum(spectrum, FLOOR * spectrum.mean(axes, keepdim=True)))

    def inverse(self, C: Factor, noise: float) -> Callable[[Tensor], Tensor] | None:
        """A positive map near (L^H A^H A L + noise^2)^-1 for C = L L^H; None if C does not say its parts."""
        if C.variance is None or C.spectrum is None:
            return None
        shape = self.spectrum.shape[2:]
        axes = tuple(range(-len(shape), 0))
        size = self.weight.shape[2:]
        k = self.spectrum * C.spectrum[..., : shape[-1]] / noise**2
        middle = k.mean((-len(shape) - 1, *axes), keepdim=True)
        signal = _smooth(C.variance.expand(len(C.variance), *self.weight.shape[1:]) * self.weight.square()) * middle
        top = signal.amax((-len(shape) - 1, *axes), keepdim=True).clamp(min=2 * LEAST)
        step = (top / LEAST).log() / (LEVELS - 1)
        place = (signal.clamp(min=LEAST) / LEAST).log() / step
        parts = []
        for i in range(LEVELS):
            share = (1 - (place.clamp(max=LEVELS - 1) - i).abs()).clamp(min=0).sqrt()
            parts.append((share, 1 / (1 + LEAST * (i * step).exp() / middle * k)))

        def apply(r: Tensor) -> Tensor:
            total = torch.zeros_like(r)
            for share, gain in parts:
                total += share * torch.fft.irfftn(gain * torch.fft.rfftn(share * r, dim=axes), s=size, dim=axes)
            return total / noise**2

        return apply


def _rings(size: tuple[int, ...]) -> Tensor:
    """The number of the ring, and of the frequency along z, of each frequency of a real FFT."""
    *z, y, x = size
    radius = torch.hypot(torch.fft.fftfreq(y)[:, None], torch.fft.rfftfreq(x)) / math.sqrt(0.5)
    ring = (radius * RINGS).long().clamp(max=RINGS - 1)
    for n in z:
        up = torch.arange(n)
        ring = RINGS * torch.minimum(up, n - up)[:, None, None] + ring
    return ring


def _smooth(x: Tensor) -> Tensor:
    """The mean over a window within each slice."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.avg_pool2d(flat, WINDOW, 1, WINDOW // 2, count_include_pad=False).reshape(x.shape)
