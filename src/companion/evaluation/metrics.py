"""Image quality and calibration, per image, with the scale, range and mask stated.

Images are `(batch, channel, *space)`; each function returns one value per batch item, float64. Errors of
complex images are taken between magnitudes (the phase of a reconstruction depends on the coil maps), except
where the docstring says otherwise. `mask` broadcasts to the images and selects the pixels that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Tensor

from companion.extras import extra
from companion.operators.linear import check_finite


def psnr(x: Tensor, reference: Tensor, data_range=None, mask=None, fit_scale: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB, (batch,): 10 log10(data_range^2 / mean squared error).

    data_range: a number or (batch,); by default the maximum of the reference magnitude inside the mask, per
    image. fit_scale: first multiply x by the number that fits the reference best (least squares, inside the
    mask).
    """
    x, reference, mask = _prepare(x, reference, mask, fit_scale)
    peak = _range(reference, mask, data_range)
    return 10 * torch.log10(peak**2 / _mean((x - reference) ** 2, mask))


def nrmse(x: Tensor, reference: Tensor, mask=None, fit_scale: bool = False) -> Tensor:
    """|x - reference| / |reference|, Euclidean norms inside the mask, (batch,). fit_scale as in `psnr`."""
    x, reference, mask = _prepare(x, reference, mask, fit_scale)
    return (_mean((x - reference) ** 2, mask) / _mean(reference**2, mask)).sqrt()


def ssim(x: Tensor, reference: Tensor, data_range=None, mask=None, fit_scale: bool = False) -> Tensor:
    """Structural similarity, (batch,), 2D or 3D: Gaussian window of 1.5 pixels, K = 0.01, 0.03 (Wang et al.
    2004).

    Computed by scikit-image on the whole image, channel by channel, then averaged inside the mask. data_range
    and fit_scale as in `psnr`. Raises ValueError for images smaller than the window, 11 pixels.
    """
    x, reference, mask = _prepare(x, reference, mask, fit_scale)
    peak = _range(reference, mask, data_range)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 pixels along each axis, got {tuple(x.shape[2:])}")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    maps = torch.empty_like(x)
    with extra("notebooks"):
        from skimage.metrics import structural_similarity
    for item, channel in np.ndindex(*x.shape[:2]):
        pair = reference[item, channel].numpy(), x[item, channel].numpy()
        maps[item, channel] = torch.from_numpy(structural_similarity(*pair, data_range=float(peak[item]), **options)[1])
    return _mean(maps, mask)


class Spread(NamedTuple):
    """What n draws say of their law: its variance, that of their mean, and the degrees of freedom of the former."""

    variance: Tensor
    of_mean: Tensor
    freedom: int

    @property
    def deviation(self) -> Tensor:
        return self.variance.sqrt()


def spread(draws: Tensor, paired: bool = False) -> Spread:
    """The `Spread` of draws (draw, *shape), real or complex; both variances are unbiased for independent draws.

    paired: draws 2k and 2k + 1 are antithetic (`randomness.antithetic`). With a and b of a pair, their half difference
    d = (a - b) / 2 and their mean m, the variance of a draw is E|d|^2 + var m whatever their correlation, and that of
    the overall mean var m over the pairs; one pair says nothing of var m, which is small, so 0.
    """
    n = len(draws)
    if not paired:
        variance = (draws - draws.mean(0)).abs().square().sum(0) / (n - 1)
        return Spread(variance, variance / n, n - 1)
    a, b = draws[::2], draws[1::2]
    within, middle = ((a - b) / 2).abs().square().mean(0), (a + b) / 2
    between = (middle - middle.mean(0)).abs().square().sum(0) / max(len(a) - 1, 1)
    return Spread(within + between, between / len(a), len(a))


def calibration_ratio(draws: Tensor, truth: Tensor, mask=None, paired: bool = False) -> Tensor:
    """Variance of the draws over squared error of their mean, (batch,): 1 calibrated, below 1 over-confident.

    draws `(draw, batch, channel, *space)`, truth `(batch, channel, *space)`, real or complex and compared as
    such (pass magnitudes for magnitudes); paired as in `spread`. The ratio is sum (var + var of the mean) / sum
    |mean - truth|^2 over the mask. Why both: for a perfect sampler the truth is one more draw, so the error of a mean
    of n independent draws has variance var + var / n; with it, numerator and denominator have the same expectation.
    Report the ratio of sums over subjects, or the mean over many: a single small image is noisy.
    """
    draws, truth, mask = _check_draws(draws, truth, mask)
    found = spread(draws, paired)
    return _mean(found.variance + found.of_mean, mask) / _mean((draws.mean(0) - truth).abs().square(), mask)


def calibration_terms(draws: Tensor, truth: Tensor, paired: bool = False) -> tuple[float, float]:
    """Numerator and denominator of `calibration_ratio` of one image, to be summed over images of any size.

    draws `(draw, *shape)`, truth `(*shape)`.
    """
    found = spread(draws, paired)
    return (found.variance + found.of_mean).sum().item(), (draws.mean(0) - truth).abs().square().sum().item()


def pooled_calibration(draws: Tensor, truth: Tensor, paired: bool = False) -> float:
    """`calibration_ratio` of all images together, as if they were one: a ratio of sums over subjects.

    draws `(draw, batch, channel, y, x)`, truth `(batch, channel, y, x)`.
    """
    rows = draws.movedim(1, 2).flatten(2, 3)[:, None]  # the images become rows of one
    return calibration_ratio(rows, truth.movedim(0, 1).flatten(1, 2)[None], paired=paired).item()


def coverage(
    draws: Tensor,
    truth: Tensor,
    levels: Sequence[float] = (0.5, 0.68, 0.8, 0.9, 0.95),
    mask=None,
    paired: bool = False,
) -> tuple[Tensor, Tensor]:
    """The levels, (level,), and the share of true pixels inside the central interval of each, (batch, level).

    draws `(draw, batch, channel, *space)`, truth `(batch, channel, *space)`; of complex images real and
    imaginary parts count as pixels of their own; paired as in `spread`. The interval is the Gaussian prediction
    interval from n draws, mean +- t std sqrt(1 + 1/n), t the Student quantile with n - 1 degrees of freedom (n / 2
    of paired draws, whose mean is known better): for Gaussian posteriors and a perfect sampler the share equals the
    level for any n >= 2; empirical quantiles of few draws could not do that.
    """
    draws, truth, mask = _check_draws(draws, truth, mask)
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels are shares between 0 and 1, got {tuple(levels)}")
    if draws.is_complex():
        draws, truth = torch.view_as_real(draws), torch.view_as_real(truth)
        mask = mask[..., None].expand(truth.shape)
    error, found = (draws.mean(0) - truth).abs(), spread(draws, paired)
    width = (found.variance + found.of_mean).sqrt()
    quantiles = stdtrit(found.freedom, (1 + np.asarray(levels)) / 2)  # of Student's t; scipy.stats takes a second more
    shares = [_mean((error <= q * width).to(torch.float64), mask) for q in quantiles]
    return torch.tensor(levels, dtype=torch.float64), torch.stack(shares, dim=-1)


def mean_and_error(values: Tensor, paired_with: Tensor | None = None) -> tuple[float, float]:
    """Mean over subjects and its standard error (std / sqrt(n)); with `paired_with`, of the differences.

    values: one number per subject. The error of the paired difference is the one to judge "A beats B" by,
    since subjects differ more than methods do.
    """
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    if paired_with is not None:
        other = torch.as_tensor(paired_with, dtype=torch.float64).flatten()
        if other.shape != values.shape:
            raise ValueError(f"paired values need the same subjects, got {len(values)} and {len(other)}")
        values = values - other
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least two subjects, got {len(values)}")
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def _prepare(x, reference, mask, fit_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes where complex, in float64 on the CPU, checked; the mask as 0 and 1 of the same shape."""
    x, reference = torch.as_tensor(x).detach().cpu(), torch.as_tensor(reference).detach().cpu()
    if x.shape != reference.shape or x.ndim < 3:
        raise ValueError(
            f"image {tuple(x.shape)} and reference {tuple(reference.shape)} must have the same shape "
            "(batch, channel, *space); add axes with x[None, None]"
        )
    check_finite(x, "image")
    check_finite(reference, "reference")
    x, reference = (v.abs() if v.is_complex() else v for v in (x, reference))
    x, reference = x.to(torch.float64), reference.to(torch.float64)
    mask = _as_mask(mask, x.shape)
    if fit_scale:
        power = _mean(x * x, mask)
        factor = _mean(x * reference, mask) / torch.where(power > 0, power, 1.0)
        x = x * factor.reshape(-1, *[1] * (x.ndim - 1))
    return x, reference, mask


def _check_draws(draws, truth, mask) -> tuple[Tensor, Tensor, Tensor]:
    draws, truth = torch.as_tensor(draws).detach().cpu(), torch.as_tensor(truth).detach().cpu()
    if draws.shape[1:] != truth.shape or truth.ndim < 3:
        raise ValueError(
            f"draws {tuple(draws.shape)} must be (draw, *truth) for truth {tuple(truth.shape)} = "
            "(batch, channel, *space); the draws of one image become draws[:, None]"
        )
    if len(draws) < 2:
        raise ValueError("spread needs at least two draws, got one")
    if draws.is_complex() != truth.is_complex():
        raise TypeError(f"draws are {draws.dtype} but the truth is {truth.dtype}; compare like with like")
    check_finite(draws, "draws")
    check_finite(truth, "truth")
    wide = torch.complex128 if truth.is_complex() else torch.float64
    return draws.to(wide), truth.to(wide), _as_mask(mask, truth.shape)


def _as_mask(mask, shape) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.float64)
    mask = (torch.as_tensor(mask).detach().cpu() > 0).to(torch.float64)
    try:
        mask = mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to images {tuple(shape)}") from error
    if (mask.flatten(1).sum(1) == 0).any():
        raise ValueError("the mask of at least one image is empty")
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def _range(reference: Tensor, mask: Tensor, data_range) -> Tensor:
    if data_range is None:
        data_range = (reference * mask).flatten(1).amax(1)
    peak = torch.as_tensor(data_range, dtype=torch.float64).cpu().expand(len(reference))
    if not (peak > 0).all():
        raise ValueError(f"data_range must be positive, got {peak.tolist()}; give data_range=... for this reference")
    return peak


# ------------------------------------------------------------------------------------------- emission tomography


def region_bias(x: Tensor, reference: Tensor, labels: Tensor, values: Sequence[int] = (1, 2, 3)) -> Tensor:
    """(mean of x - mean of reference) / mean of reference in each region, (batch, region); NaN where there is none.

    labels broadcast to the images; a region is where they equal one of `values`. Over repeated scans, the mean of
    this is the bias of a method and its standard deviation the spread of regional values.
    """
    x, reference, _ = _prepare(x, reference, None, False)
    columns = []
    for mask in _regions(labels, values, x.shape):
        truth = _mean(reference, mask)
        columns.append((_mean(x, mask) - truth) / truth)
    return torch.stack(columns, -1)


def region_noise(x: Tensor, reference: Tensor, labels: Tensor, values: Sequence[int] = (1, 2, 3)) -> Tensor:
    """Standard deviation of (x - reference) inside each region / mean of reference, (batch, region).

    What is left of the error once the region's bias is taken out: noise, and blur of the region's texture.
    """
    x, reference, _ = _prepare(x, reference, None, False)
    columns = []
    for mask in _regions(labels, values, x.shape):
        error = x - reference
        centred = error - _mean(error, mask).reshape(-1, *[1] * (x.ndim - 1))
        columns.append(_mean(centred**2, mask).sqrt() / _mean(reference, mask))
    return torch.stack(columns, -1)


def lesion_recovery(x: Tensor, reference: Tensor, lesions: Tensor, background: Tensor) -> Tensor:
    """Contrast recovery: (lesion / background - 1) of x over that of the reference, (batch,); 1 is perfect.

    lesions, background: masks that broadcast to the images; means over each are compared. NaN for an image without
    lesion or background. Raises ValueError for a lesion that has no contrast in the reference.
    """
    x, reference, _ = _prepare(x, reference, None, False)
    (inside,), (outside,) = _regions(lesions > 0, (1,), x.shape), _regions(background > 0, (1,), x.shape)
    found = _mean(x, inside) / _mean(x, outside) - 1
    true = _mean(reference, inside) / _mean(reference, outside) - 1
    if (true.abs() < 1e-6).any():
        raise ValueError("a lesion has the activity of its background in the reference, so no contrast to recover")
    return found / true


def linearity(measured: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the least-squares line measured = slope * true + intercept.

    Of activities at several doses or of several regions: a quantitative method has slope 1 and intercept 0.
    """
    measured, true = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (measured, true))
    if measured.shape != true.shape or len(true) < 3 or true.std() == 0:
        raise ValueError(f"a line needs at least 3 pairs of differing values, got {len(measured)} and {len(true)}")
    deviation = true - true.mean()
    slope = (deviation * measured).sum() / (deviation**2).sum()
    intercept = measured.mean() - slope * true.mean()
    residual = ((measured - slope * true - intercept) ** 2).sum()
    total = ((measured - measured.mean()) ** 2).sum()
    return slope.item(), intercept.item(), (1 - residual / total).item()


def _regions(labels: Tensor, values: Sequence[int], shape) -> list[Tensor]:
    """A mask (batch, ...) of 0 and 1 for each value; NaN for all of an item where the region is empty."""
    labels = torch.as_tensor(labels).detach().cpu()
    try:
        labels = labels.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"labels {tuple(labels.shape)} do not broadcast to the images {tuple(shape)}") from error
    masks = []
    for value in values:
        mask = (labels == value).to(torch.float64)
        empty = mask.flatten(1).sum(1) == 0
        masks.append(torch.where(empty.reshape(-1, *[1] * (len(shape) - 1)), torch.nan, mask))
    return masks


# ------------------------------------------------------------------------------------------- images of two kinds


def mae(x: Tensor, reference: Tensor, mask=None) -> Tensor:
    """Mean absolute difference inside the mask, (batch,), in units of the images."""
    x, reference, mask = _prepare(x, reference, mask, False)
    return _mean((x - reference).abs(), mask)


def nmi(x: Tensor, reference: Tensor, mask=None, bins: int = 64) -> Tensor:
    """Normalised mutual information inside the mask, (batch,): 2 I / (H1 + H2), 0 for unrelated images, 1 for equal.

    From a joint histogram of `bins` equal bins between the extremes of each image inside the mask. Both images are
    told apart by how they depend on each other, not by how they look: a recoloured image keeps a high value.
    """
    x, reference, mask = _prepare(x, reference, mask, False)
    values = []
    for a, b, inside in zip(x, reference, mask > 0, strict=True):
        counts, _, _ = np.histogram2d(a[inside].numpy(), b[inside].numpy(), bins=bins)
        p = counts / counts.sum()
        h1, h2, h12 = (-(q[q > 0] * np.log(q[q > 0])).sum() for q in (p.sum(1), p.sum(0), p))
        values.append(2 * (h1 + h2 - h12) / (h1 + h2) if h1 + h2 > 0 else 1.0)
    return torch.tensor(values, dtype=torch.float64)


def dice(labels: Tensor, reference: Tensor, values: Sequence[int] = (1, 2, 3)) -> Tensor:
    """2 |A and B| / (|A| + |B|) of each label, (batch, value); NaN where neither image has it.

    labels, reference: integers of one shape (batch, ...).
    """
    labels, reference = (torch.as_tensor(v).detach().cpu() for v in (labels, reference))
    if labels.shape != reference.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and reference {tuple(reference.shape)} differ in shape")
    columns = []
    for value in values:
        a, b = ((v == value).flatten(1).double() for v in (labels, reference))
        columns.append(2 * (a * b).sum(1) / (a.sum(1) + b.sum(1)))  # 0 / 0 is NaN
    return torch.stack(columns, -1)


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first: Wang et al. 2003


def ms_ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Multi-scale structural similarity, (batch,), 2D or 3D: Wang et al. 2003.

    a, b: real (batch, channel, *space). Gaussian window of 11 pixels and standard deviation 1.5, K = 0.01, 0.03; pixels
    nearer to the border than half a window do not count. Five scales need 176 pixels along each axis; smaller images
    take as many scales as fit (64 pixels: three), their weights normalised to the sum 1, so compare values of one image
    size only. data_range: the peak signal, one for all images. Raises ValueError for images smaller than the window.
    """
    a, b, _ = _prepare(a, b, None, False)
    side = min(a.shape[2:])
    scales = next((n for n in range(5, 0, -1) if side // 2 ** (n - 1) >= 11), 0)
    if not scales:
        raise ValueError(f"MS-SSIM needs at least 11 pixels along each axis, got {tuple(a.shape[2:])}")
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=torch.float64)
    halve = F.avg_pool2d if a.ndim == 4 else F.avg_pool3d
    product = torch.ones(len(a), dtype=torch.float64)
    for scale, weight in enumerate(weights / weights.sum()):
        luminance, structure = _similarity(a, b, float(data_range))
        similarity = structure if scale < scales - 1 else luminance * structure
        product *= similarity.flatten(1).mean(1).clamp(min=0) ** weight
        a, b = halve(a, 2), halve(b, 2)
    return product


def _similarity(a: Tensor, b: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms of SSIM at the pixels around which the window fits."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b, aa, bb, ab = (_windowed(v) for v in (a, b, a * a, b * b, a * b))
    mean_ab = mean_a * mean_b
    spread = aa - mean_a**2 + bb - mean_b**2
    luminance = (2 * mean_ab + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * (ab - mean_ab) + c2) / (spread + c2)


def _windowed(x: Tensor) -> Tensor:
    """Gaussian averages of x (batch, channel, *space) where the window of 11 pixels fits, axis by axis."""
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    for axis in range(2, x.ndim):
        x = x.unfold(axis, len(window), 1) @ (window / window.sum())
    return x


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features, (n, d) and (m, d).

    |mean difference|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)), in float64. This is a FID only for features of the Inception
    network that FID is defined with; say which network the features come from and how many there are. Finite samples
    bias it upwards, the more the fewer there are: compare sets of one size. Raises ValueError for fewer than two
    samples, other shapes, or NaN.
    """
    a, b = (torch.as_tensor(v).detach().cpu().to(torch.float64) for v in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (n, d), (m, d) with n, m >= 2, got {tuple(a.shape)}, {tuple(b.shape)}")
    check_finite(a, "features_a")
    check_finite(b, "features_b")
    (centre_a, spread_a), (centre_b, spread_b) = _root_of_covariance(a), _root_of_covariance(b)
    # tr (Ca Cb)^(1/2) is the sum of the singular values of a product of any square roots of Ca and Cb.
    overlap = torch.linalg.svdvals(spread_a @ spread_b.T).sum()
    distance = (centre_a - centre_b).square().sum() + spread_a.square().sum() + spread_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)


def _root_of_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R (at most n or d, d) with R^T R the unbiased covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
