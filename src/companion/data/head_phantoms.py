"""A known FDG-like activity for a head that has a T1-weighted image: what foreign heads are tested with.

Nothing is random but the lesions and a smooth regional variation, and nothing is warped: the anatomy is the person's.
Slices come finer than the pixels of a scan, so that a simulation sees structure inside them.

    head = flattened(active_head(prepare_head("name", signal, voxel_mm)))
    fine = fdg_slices(head, count=4)          # 256 x 256 pixels of 0.875 mm across 224 mm
    people = coarser(fine, 4)                 # what a scan of 64 x 64 is compared with
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter
from torch import Tensor

from companion.data.head_activity import ActiveHead
from companion.data.head_tissues import tissue_levels
from companion.data.heads import AIR, smooth_noise
from companion.data.pet import (
    LESION_CONTRAST,
    LESION_RADIUS_MM,
    MU_SKULL,
    MU_WATER,
    UPTAKE,
    Slices,
    _attenuation,
)

FIELD_MM = 224.0
FINE = 256  # pixels along y and x
REACH = (0.35, 0.85)  # of the brain's height, where slices lie
SCALP = {"soft": 2.75, "fat": 1.0}  # kBq/mL of muscle and skin, and of fat
REGIONAL = 0.08  # standard deviation of ln of the regional variation
TREND_MM = 18.0  # of the shading that is taken out
STRIPPED = 1.2  # area of the body over that of the brain, below which a head has no scalp


def fdg_slices(
    active: ActiveHead,
    count: int = 4,
    ratio: float = 4.0,
    scalp: bool = True,
    lesions: bool = True,
    seed: int = 0,
    step_mm: float | None = None,
) -> Slices:
    """Return axial slices of a head, `FINE` pixels across `FIELD_MM`: activity (kBq/mL), labels, lesions, attenuation.

    ratio: grey to white matter, grey being 22 kBq/mL. scalp: what is outside the brain takes up tracer too. lesions:
    one hot disc in every slice, or, with a step_mm (as for `heights`), a ball in the middle one. subject is the number
    of the slice, height_mm its distance from the head's middle.
    """
    places, parts = heights(active, count, step_mm), []
    middle, ball = count // 2, None
    if lesions and step_mm is not None:  # one lesion, through several slices
        inside = active.brain.at(plane(active, places[middle])).numpy() > 0.5
        ball = draw_lesion(inside, np.random.default_rng([seed, count]))
    for i, height in enumerate(places):
        rng = np.random.default_rng([seed, i])
        points = plane(active, height)
        signal, brain = active.head.at(points).numpy(), active.brain.at(points).numpy()
        hot = lesions if not lesions or step_mm is None else (ball, height - places[middle])
        parts.append(one_slice(active.levels, signal, brain, rng, ratio, scalp, hot))
    image, labels, found, mu = (torch.from_numpy(np.stack(v))[:, None] for v in zip(*parts, strict=True))
    where = torch.tensor(places, dtype=torch.float32)
    return Slices(image.float(), labels, found, mu.float(), torch.arange(count), where, FIELD_MM / FINE)


def mr_slices(active: ActiveHead, count: int = 4, step_mm: float | None = None) -> Tensor:
    """Return the T1-weighted signal (slice, 1, y, x) where `fdg_slices` makes activity: what a PET/MR scan brings.

    Its receive bias is taken out, as `active_head` does.
    """
    return torch.stack([active.head.at(plane(active, height)) for height in heights(active, count, step_mm)])[:, None]


def flattened(active: ActiveHead) -> ActiveHead:
    """Return a head whose signal is divided by its own smooth trend inside the brain, so that levels hold everywhere.

    The trend is a normalised convolution of the brain's signal with a Gaussian of `TREND_MM`.
    """
    brain, signal = active.brain.signal.numpy(), active.head.signal[::2, ::2, ::2].numpy()
    width = [TREND_MM / v for v in active.brain.voxel_mm]
    inside = np.where(brain > 0.5, 1.0, 1e-6).astype(np.float32)
    level = np.median(signal[brain > 0.5])
    values = np.where(brain > 0.5, signal.clip(0.4 * level), level * 1.0)
    trend = gaussian_filter(inside * values, width) / gaussian_filter(inside, width)
    trend = torch.from_numpy(trend.astype(np.float32) / level)
    full = F.interpolate(trend[None, None], active.head.signal.shape, mode="trilinear", align_corners=True)[0, 0]
    head = replace(active.head, signal=active.head.signal / full)
    _, grey, white = tissue_levels(signal / trend.numpy(), brain)
    return replace(active, head=head, levels=(max(0.1 * grey, grey - 1.3 * (white - grey)), grey, white))


def heights(active: ActiveHead, count: int, step_mm: float | None = None) -> list[float]:
    """The places of slices along z, mm from the head's middle, from the bottom up: spread over the brain, or with
    step_mm from each to the next around its middle."""
    share = active.brain.signal.mean((0, 1))
    filled = (share > 0.02 * share.max()).nonzero().flatten()
    low, high = filled.min().item(), filled.max().item()
    at = low + (high - low) * (np.linspace(*REACH, count) if count > 1 else np.array([np.mean(REACH)]))
    if step_mm is not None:
        at = np.mean(low + (high - low) * np.array(REACH)) + step_mm / active.brain.voxel_mm[2] * (
            np.arange(count) - (count - 1) / 2
        )
    return [float((z - (len(share) - 1) / 2) * active.brain.voxel_mm[2]) for z in at]


def plane(active: ActiveHead, height: float) -> Tensor:
    """The points (y, x, 3), mm, of a fine slice around the tissue at a height; row 0 in front, column 0 at small x."""
    near = active.head.tissue[(active.head.tissue[:, 2] - height).abs() < 15]
    low, high = near.quantile(0.01, 0), near.quantile(0.99, 0)
    line = (torch.arange(FINE, dtype=torch.float32) - (FINE - 1) / 2) * FIELD_MM / FINE
    y, x = torch.meshgrid(-line, line, indexing="ij")
    centre = (low + high) / 2
    return torch.stack([x + centre[0], y + centre[1], torch.full_like(x, height)], -1)


def one_slice(levels, signal, brain, rng, ratio: float, scalp: bool, lesions) -> tuple[np.ndarray, ...]:
    """Activity, labels, lesions and attenuation (y, x) of the signal and the share of brain there.

    lesions: whether there is one, drawn here, or the ball that `draw_lesion` gave and how far from its middle this is.
    """
    csf, grey, white = levels
    soft = 0.12 * (white - grey)
    is_white = sigmoid((signal - (grey + white) / 2) / soft)
    is_csf = sigmoid(((csf + grey) / 2 - signal) / soft)
    shares = np.stack([is_csf, (1 - is_csf) * (1 - is_white), (1 - is_csf) * is_white])
    values = np.array([UPTAKE["csf"], UPTAKE["grey"], UPTAKE["grey"] / ratio])
    inside = np.tensordot(values, shares, 1) * np.exp(REGIONAL * smooth_noise(FINE, rng, 6)[0].numpy())
    outside = np.where(signal > 0.9 * white, SCALP["fat"], SCALP["soft"]) * sigmoid((signal - 0.5 * grey) / soft)
    image = brain * inside + (1 - brain) * (outside if scalp else 0)
    labels = np.where(brain > 0.5, 1 + shares.argmax(0), 0).astype(np.uint8)
    body = np.asarray(binary_fill_holes((signal > AIR) | (brain > 0.5)))
    found = np.zeros_like(labels)
    if lesions:
        ball, away = (draw_lesion(brain > 0.5, rng), 0.0) if lesions is True else lesions
        image, found = with_lesion(image, ball, away)
    if body.sum() < STRIPPED * (brain > 0.5).sum():
        mu = _attenuation(torch.from_numpy(brain > 0.5)[None], FIELD_MM / FINE)[0].numpy()
    else:
        away = np.asarray(distance_transform_edt(brain <= 0.5)) * FIELD_MM / FINE
        bone = (away > 1) & (away < 12) & (signal < 0.5 * grey)
        mu = np.where(body, np.where(bone, MU_SKULL, MU_WATER), 0.0)
    return image.astype(np.float32), labels, found, mu.astype(np.float32)


def draw_lesion(brain: np.ndarray, rng) -> tuple[float, float, float, float] | None:
    """A ball deep in the brain of a slice: y, x (pixels), radius (mm), contrast to grey matter; None if none fits."""
    radius, contrast = rng.uniform(*LESION_RADIUS_MM), rng.uniform(*LESION_CONTRAST)
    places = np.argwhere(np.asarray(distance_transform_edt(brain)) * FIELD_MM / FINE > radius + 2)
    if not len(places):
        return None
    y, x = places[int(rng.integers(len(places)))]
    return y, x, radius, contrast


def with_lesion(image: np.ndarray, ball: tuple | None, away_mm: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The image with a ball whose middle lies `away_mm` from the slice, and its mask."""
    pixel = FIELD_MM / FINE
    if ball is None or abs(away_mm) >= ball[2]:
        return image, np.zeros(image.shape, np.uint8)
    y, x, radius, contrast = ball
    line = np.arange(FINE)
    far = np.hypot(line[:, None] - y, line - x) * pixel
    share = ((np.sqrt(radius**2 - away_mm**2) - far) / pixel + 0.5).clip(0, 1)
    return image * (1 - share) + share * contrast * UPTAKE["grey"], (share > 0.5).astype(np.uint8)


def coarser(fine: Slices, factor: int) -> Slices:
    """Slices of pixels `factor` times as wide: averages, and labels that most of the pixel has."""
    kinds = torch.stack([(fine.labels == k).float() for k in range(int(fine.labels.max()) + 1)], 1)[:, :, 0]
    labels = F.avg_pool2d(kinds, factor).argmax(1, keepdim=True).to(fine.labels.dtype)
    lesions = (F.avg_pool2d((fine.lesions > 0).float(), factor) > 0.5).to(fine.lesions.dtype)
    return replace(
        fine,
        image=F.avg_pool2d(fine.image, factor),
        labels=labels,
        lesions=lesions,
        mu=F.avg_pool2d(fine.mu, factor),
        pixel_mm=fine.pixel_mm * factor,
    )


def sigmoid(t: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-t)), safe for large t."""
    return 1 / (1 + np.exp(-np.clip(t, -40, 40)))
