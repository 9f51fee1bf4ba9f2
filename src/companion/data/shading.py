"""Slow shading of grey images (slice, 1, y, x), and grey levels freed from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.information.pairs import grey

AIR = 0.02  # values up to this are air
FAINT = 0.05  # in images that may be noisy, up to this
DARKEST = 0.1  # tissue, in equalised images


def local_mean(x: Tensor) -> Tensor:
    """The mean of the tissue around each pixel (Gaussian, std a tenth of the image), its brightest made 1; 1 in air."""
    tissue = (x > AIR).to(x)
    std = x.shape[-1] / 10
    at = torch.arange(-round(2.5 * std), round(2.5 * std) + 1, device=x.device)
    weight = torch.exp(-0.5 * (at / std) ** 2).to(x)

    def blurred(v: Tensor) -> Tensor:
        rows = F.conv2d(v, weight.view(1, 1, 1, -1), padding=(0, len(weight) // 2))
        return F.conv2d(rows, weight.view(1, 1, -1, 1), padding=(len(weight) // 2, 0))

    mean = torch.where(tissue > 0, blurred(x * tissue) / blurred(tissue).clamp(min=1e-6), 0)
    top = mean.amax((1, 2, 3), keepdim=True).clamp(min=AIR)
    return torch.where(tissue > 0, (mean / top).clamp(min=0.1), 1)


def equalised(image: Tensor) -> Tensor:
    """Images (batch, 1, y, x) as ranks of their tissue, freed from slow shading: 0 in air, DARKEST to 1 in tissue.

    Does not change with the gain, nor, but for the shading, with any rising map of grey levels: as little as mutual
    information does. So the bins of the histograms hold equal shares of the tissue, however faint the contrast.
    """
    tissue = (image > FAINT).flatten(1)
    values = (image / local_mean(image)).flatten(1).masked_fill(~tissue, -1)
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    count = tissue.sum(1, keepdim=True)
    rank = ((below + upto) / 2 - (values.shape[1] - count)) / count.clamp(min=1)
    return torch.where(tissue, DARKEST + (1 - DARKEST) * rank, 0).view_as(image).to(image)


KNOTS, ROUNDS = 5, 5  # of the map from ranks to grey levels; of reweighting
FLAT = 0.03  # share of the pixels that speak for no shading, from the border: composition is not the same everywhere


def shaded_like(source: Tensor, x: Tensor) -> Tensor:
    """Images x (image, 1 or 3, y, x) with the shading of their sources (image, 1 or 3, y, x) for their own.

    A receive coil shades all contrasts of a sitting alike, but ranks are free of shading, and a network that is told
    them makes some up. Only the linear part, exp(slope . position), can be told from anatomy. The mean of log x stays.
    """
    given, made = grey(source), grey(x)
    tissue = (given > FAINT) & (made > FAINT)
    pairs = (given, equalised(made), made, equalised(given), tissue)
    change = torch.cat(
        [
            slope(a, rank_b, inside) - slope(b, rank_a, inside)  # one by one, which bounds the memory
            for a, rank_b, b, rank_a, inside in zip(*(v.split(1) for v in pairs), strict=True)
        ]
    )
    shading = torch.einsum("nc,cyx->nyx", change, positions(x))[:, None]
    shading = shading - (shading * tissue).sum((2, 3), True) / tissue.sum((2, 3), True).clamp(min=1)
    return x * shading.exp()


def slope(image: Tensor, rank: Tensor, tissue: Tensor) -> Tensor:
    """The slopes (image, 2) along y and x, over half the field of view, of log image = f(rank) + slope position.

    f is piecewise linear in the ranks of the other contrast. Least squares over the `tissue` with Cauchy weights.
    """
    at = (rank.flatten(1).double() - DARKEST).clamp(min=0) / (1 - DARKEST) * (KNOTS - 1)
    hats = (1 - (at[..., None] - torch.arange(KNOTS).to(at)).abs()).clamp(min=0)
    place = positions(image).flatten(1).T.double().expand(len(image), -1, -1)
    M, v = torch.cat([hats, place], -1), image.flatten(1).double().clamp(min=1e-6).log()
    inside = tissue.flatten(1)
    flat = FLAT * inside.sum(1, keepdim=True).clamp(min=1) * torch.ones(2).to(M)
    prior = torch.cat([torch.full_like(M[:, 0, :KNOTS], 1e-6), flat], 1).diag_embed()
    weight, found = inside.double(), torch.zeros_like(M[:, 0, :, None])
    for _ in range(ROUNDS):
        weighted = (M * weight[..., None]).mT
        found = torch.linalg.solve(weighted @ M + prior, weighted @ v[..., None])
        residual = v - (M @ found)[..., 0]
        width = 1.48 * residual.abs().masked_fill(~inside, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
        weight = inside / (1 + (residual / (2 * width).clamp(min=1e-6)).square())
    return found[:, KNOTS:, 0].to(image)


def positions(x: Tensor) -> Tensor:
    """The coordinates (2, y, x) of the pixels of x, from -1 to 1 across the field of view."""
    return torch.stack(torch.meshgrid(*((2 * torch.arange(n).to(x) + 1) / n - 1 for n in x.shape[2:]), indexing="ij"))
