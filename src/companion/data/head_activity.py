"""Activity of heads that nobody has: real anatomies warped, with a random uptake in every structure.

A slice begins as the T1-weighted signal along a warped plane of a real head, finer than the pixels asked for, and the
share of brain there (`companion.data.head_tissues`). A random tracer then says what each signal takes up, inside the
brain and outside; regions, asymmetries, lesions and texture follow, and last the pixels: averages, often blurred as
scanners and reconstructions blur. Domain randomisation (Billot et al. 2023, SynthSeg, arXiv 2107.09559) of PET.

    heads = [active_head(head) for head in load_heads("data/heads", "train")]
    image = activity_image(heads[0], np.random.default_rng(0), size=64)     # (64, 64), 1 is `SCALE_KBQ` kBq/mL
    activity, mr = activity_and_mr(heads[0], np.random.default_rng(0), size=64)   # the same, and an MR of that slice

Activity is not negative; air is 0 but for the blur. The MR (`companion.data.head_mr`) is of another contrast, bias and
noise every time, lies some millimetres off in half of the images, and shows few of the lesions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from companion.data import anatomy
from companion.data import heads as mri
from companion.data import pet as cohort
from companion.data.anatomy import SLAB_MM, Subject
from companion.data.head_mr import OFF, SHIFT_MM, mr_condition, mr_image, noisy
from companion.data.head_tissues import even_brain, fluid_level, tissue_levels
from companion.data.heads import Head, draw_contrast, draw_plane, rotation, smooth_noise, texture

SCALE_KBQ = 25.0  # kBq/mL that are 1 here
GREY = 0.88  # 22 kBq/mL of FDG, the middle of what is drawn
PIXEL_MM = (1.0, 4.0)
PEOPLE_MM = (3.5, 3.5, 1.75, 2.5)  # pixel sizes of virtual people
BORDER = 6  # pixels around an image that are thrown away: the blur does not end there
FINEST_MM = 1.1  # distance of the points of the anatomy, at most


@dataclass(frozen=True)
class ActiveHead:
    """A head, its share of brain on the same places, and the signal of CSF, grey and white matter."""

    head: Head
    brain: Head
    levels: tuple[float, float, float]


def active_head(head: Head) -> ActiveHead:
    """Return a head with its brain found and its receive bias gone. Raises ValueError where there is no brain."""
    x, y, z = head.voxel_mm
    signal, voxel_mm = head.signal[::2, ::2, ::2].numpy(), (2 * x, 2 * y, 2 * z)
    mask, bias = even_brain(signal, voxel_mm)
    _, grey, white = tissue_levels(signal / bias, mask)
    csf = fluid_level(grey, white)
    field = torch.from_numpy(bias.astype(np.float32))[None, None]
    field = F.interpolate(field, size=head.signal.shape, mode="trilinear", align_corners=True)[0, 0]
    even = replace(head, signal=head.signal / field)
    brain = Head("brain", torch.from_numpy(mask), voxel_mm, head.tissue, head.levels)
    return ActiveHead(even, brain, (csf, grey, white))


def activity_image(
    active: ActiveHead, rng: np.random.Generator, size: int = 64, pixel_mm: float | None = None
) -> np.ndarray:
    """Return the activity (size, size) float32 of a warped head with a random tracer, plane, pixel and blur."""
    return _activity(active, rng, size, pixel_mm)[0]


def activity_and_mr(
    active: ActiveHead, rng: np.random.Generator, size: int = 64, pixel_mm: float | None = None
) -> np.ndarray:
    """Return `activity_image`, and a random MR of the same slice: (2, size, size) float32."""
    activity, plane, seen, pixel = _activity(active, rng, size, pixel_mm)
    fine = len(plane.points) // (size + 2 * BORDER)
    points = plane.shifted(rng.normal(0, SHIFT_MM) if rng.random() < OFF else 0.0)
    signal = active.head.at(points).numpy()
    if rng.random() < 0.2:  # a brain that somebody has cut out
        signal = signal * active.brain.at(points).numpy()
    for weight in seen if rng.random() < 0.3 else ():
        signal = signal * (1 - weight) + weight * rng.uniform(0, 1.2)
    return paired(activity, averages(mr_image(signal, rng, pixel / fine, active.head.levels.numpy()), fine), rng)


def paired(activity: np.ndarray, mr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return activity and MR (2, size, size): the MR without its border, noisy, and in the scale of a condition."""
    size = len(activity)
    border = (len(mr) - size) // 2
    image = noisy(mr[border : border + size, border : border + size], rng)
    scaled = mr_condition(torch.from_numpy(image.astype(np.float32))[None, None])[0, 0]
    return np.stack([activity, scaled.numpy()])


def _activity(active: ActiveHead, rng: np.random.Generator, size: int, pixel_mm: float | None):
    """An activity, the plane that it lies in, the lesions in it as weights on the points of the plane, its pixels."""
    pixel = draw_pixel_mm(rng) if pixel_mm is None else pixel_mm
    fine = math.ceil(pixel / FINEST_MM)
    n, spacing = (size + 2 * BORDER) * fine, pixel / fine
    plane = draw_plane(active.head, rng, n, spacing, draw_axes(rng))
    tracer = draw_tracer(active.levels, rng)
    thickness = pixel * rng.uniform(0.6, 1.4)
    steps = 2 if thickness > 2 else 1
    image = np.zeros((n, n), np.float32)
    for i in range(steps):
        points = plane.shifted(thickness * ((i + 0.5) / steps - 0.5))
        image += tracer(active.head.at(points).numpy(), active.brain.at(points).numpy()) / steps
    image, lesions = add_lesions(image * regions(n, rng), rng, spacing)
    image = image * texture(n, rng)
    return to_pixels(image, rng, size, fine, pixel), plane, lesions, pixel


def draw_pixel_mm(rng: np.random.Generator) -> float:
    """Return a pixel size in `PIXEL_MM`: a third about 3.5 mm, a third about 1.75 mm, as 224 mm fill 64 or 128."""
    kind = rng.random()
    low, high = (3.0, 4.0) if kind < 0.35 else (1.5, 2.1) if kind < 0.65 else PIXEL_MM
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def draw_axes(rng: np.random.Generator) -> np.ndarray:
    """Return orthonormal rows as `heads.rotation` does, but two of three axial, as brains are scanned."""
    axes = rotation(rng)
    for _ in range(8):
        if abs(axes[2, 2]) > 0.8 or rng.random() < 0.25:
            break
        axes = rotation(rng)
    return axes


# ----------------------------------------------------------------------------------------------------------
# What takes it up


def draw_tracer(levels: tuple[float, float, float], rng: np.random.Generator) -> Callable:
    """Return a function (signal, share of brain) -> activity: FDG-like, with bright white matter, or arbitrary.

    Outside the brain, muscle, fat, glands and skin take up what they like; a quarter of the people have none of it.
    """
    csf, grey, white = levels
    strong = GREY * math.exp(rng.normal(0, 0.35))
    kind = rng.random()
    ratio = math.exp(rng.uniform(math.log(1.5), math.log(8)))
    uptake = {"grey": strong, "white": strong / ratio, "csf": strong * rng.uniform(0, 0.5 / ratio + 0.05)}
    if kind > 0.85:
        uptake = {"grey": strong * rng.uniform(0.3, 0.9), "white": strong, "csf": strong * rng.uniform(0, 0.3)}
    half = 0.5 * (white - grey) * rng.uniform(0, 0.85)  # of the plateaus: how sharp the tissues part
    knots = [0.0, csf, grey - half, grey + half, white - half, 3.0]
    values = [0.6 * uptake["csf"], uptake["csf"], *[uptake["grey"]] * 2, *[uptake["white"]] * 2]
    if 0.75 < kind < 0.85:  # any tissue anything
        knots, values = [0.0, *np.sort(rng.uniform(0.3 * csf, 1.1 * white, 4)), 3.0], strong * rng.uniform(0, 1.2, 6)
    edges = np.array([0, mri.AIR, 1.5 * mri.AIR, 0.8 * grey, white, 1.3 * white, 3.0])
    outside = strong * rng.uniform(0, 1, 7) ** 2 * rng.choice([0.15, 0.5, 0.9], p=[0.5, 0.35, 0.15])
    outside[0], outside[1] = 0, outside[1] * (rng.random() < 0.3)
    outside *= rng.random() > 0.25

    def tracer(signal: np.ndarray, brain: np.ndarray) -> np.ndarray:
        inside = np.interp(signal, knots, values)
        return (brain * inside + (1 - brain) * np.interp(signal, edges, outside)).astype(np.float32)

    return tracer


def regions(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return factors (n, n) about 1: smooth differences and asymmetries, and regions with edges."""
    smooth = smooth_noise(n, rng, int(rng.integers(4, 9)), channels=2).numpy()
    field = abs(rng.normal(0, 0.12)) * smooth[0]
    if rng.random() < 0.6:
        parts = np.floor(smooth[1] * rng.uniform(1, 3)).astype(int).clip(-8, 8) + 8
        field = field + (abs(rng.normal(0, 0.15)) * rng.normal(size=17))[parts]
    return np.exp(field.clip(-1.2, 1.0)).astype(np.float32)


def add_lesions(image: np.ndarray, rng: np.random.Generator, spacing_mm: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the image with hot and cold spots and masses where there is activity, in half of the images, and them.

    A lesion is its weight (y, x), 1 inside.
    """
    if rng.random() < 0.5:
        return image, []
    n, line = len(image), np.arange(len(image), dtype=np.float32)
    ragged = smooth_noise(n, rng, max(6, min(40, round(n * spacing_mm / 8))))[0].numpy()
    hot = float(np.percentile(image[image > 0.05], 90)) if (image > 0.05).any() else 0.0
    places, lesions = np.argwhere(image[::4, ::4] > 0.1 * hot) * 4, []
    for _ in range(int(rng.integers(1, 6)) if len(places) else 0):
        y, x = places[int(rng.integers(len(places)))] + rng.uniform(0, 4, 2)
        radius = math.exp(rng.uniform(math.log(2.5), math.log(16)))
        stretch = np.exp(rng.normal(0, 0.25))
        far = np.hypot((line[:, None] - y) * stretch, (line - x) / stretch) * spacing_mm / radius
        far += rng.uniform(0, 0.25) * ragged
        soft = rng.uniform(0.02, 0.3)
        weight = 1 / (1 + np.exp(((far - 1) / (0.25 * soft)).clip(-30, 30)))
        value = hot * rng.uniform(1.2, 3.5) if rng.random() < 0.6 else image * rng.uniform(0, 0.7)
        image = image * (1 - weight) + weight * value
        lesions.append(weight.astype(np.float32))
    return image.astype(np.float32), lesions


def to_pixels(image: np.ndarray, rng: np.random.Generator, size: int, fine: int, pixel_mm: float) -> np.ndarray:
    """Return (size, size) averages over pixels of a finer image with a border, a third of them blurred first."""
    image = averages(image, fine)
    if rng.random() < 0.35:
        image = gaussian_filter(image, rng.uniform(2, 7) / 2.355 / pixel_mm)
    return np.ascontiguousarray(image[BORDER : BORDER + size, BORDER : BORDER + size].clip(0, 6), np.float32)


def averages(image: np.ndarray, fine: int) -> np.ndarray:
    """Return averages over pixels of `fine` x `fine` points."""
    n = len(image) // fine
    return image.reshape(n, fine, n, fine).mean((1, 3))


# ----------------------------------------------------------------------------------------------------------
# Other images


def leaves_image(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Return dead leaves (size, size) as activity, half of them inside an ellipse with air around it."""
    image = mri.dead_leaves(rng, size).clip(0, 3) * GREY * math.exp(rng.normal(0.2, 0.35))
    if rng.random() < 0.5:
        y, x = np.mgrid[:size, :size] - (size - 1) / 2
        half = size * rng.uniform(0.25, 0.55, 2)
        image = image * ((y / half[0]) ** 2 + (x / half[1]) ** 2 < 1)
    return image.astype(np.float32)


def virtual_pairs(seed: int, rng: np.random.Generator, size: int = 64, count: int = 8) -> np.ndarray:
    """Return axial slices of virtual training person `seed` and a random MR of each: (count, 2, size, size) float32.

    Half of the people have lesions, which the MR does not show.
    """
    subject, pixel = Subject(seed), float(rng.choice(PEOPLE_MM))
    heights = torch.from_numpy(np.sort(rng.uniform(*SLAB_MM, count)).astype(np.float32))
    lesions = cohort.place_lesions(subject, 3, heights) if rng.random() < 0.5 else []
    activity = cohort.render(subject, (count, size, size), pixel, heights, lesions).image.numpy() / SCALE_KBQ
    points = anatomy.grid_mm((count, size, size), pixel, heights)
    signal = anatomy.image_from_tissue(subject, anatomy.tissue_maps(subject, points, pixel), "T1w").numpy().clip(0)
    levels = signal[signal > mri.AIR]
    pairs = zip(activity, signal, strict=True)
    return np.stack([paired(one, mr_image(its, rng, pixel, levels), rng) for one, its in pairs])


def leaves_pair(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Return `leaves_image`, and what an MR of them might be: (2, size, size); half of the MR shows other leaves."""
    activity = leaves_image(rng, size)
    signal = activity / max(float(np.percentile(activity, mri.BRIGHT)), 1e-3)
    if rng.random() < 0.5:
        other = mri.dead_leaves(rng, size).clip(0, 3)
        signal = np.where(mri.smooth_noise(size, rng, 6)[0].numpy() > rng.normal(), signal, other)
    tissue = signal[signal > mri.AIR]
    mr = draw_contrast(tissue if len(tissue) else np.ones(1), rng)(signal)
    return paired(activity, mr_image(mr, rng, 3.5, tissue), rng) if len(tissue) else np.stack([activity, 0 * activity])
