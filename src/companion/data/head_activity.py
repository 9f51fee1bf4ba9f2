"""Activity of heads that nobody has: real anatomies warped, with a random uptake in every structure.

A slice begins as the T1-weighted signal along a warped plane of a real head, finer than the pixels asked for, and the
share of brain there (`companion.data.head_tissues`). A random tracer then says what each signal takes up, inside the
brain and outside; regions, asymmetries, lesions and texture follow, and last the pixels: averages, often blurred as
scanners and reconstructions blur. Domain randomisation (Billot et al. 2023, SynthSeg, arXiv 2107.09559) of PET.

    heads = [active_head(head) for head in load_heads("data/heads", "train")]
    image = activity_image(heads[0], np.random.default_rng(0), size=64)     # (64, 64), 1 is `SCALE_KBQ` kBq/mL

Images are not negative; air is 0 but for the blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from companion.data import heads as mri
from companion.data import pet as cohort
from companion.data.anatomy import SLAB_MM, Subject
from companion.data.head_tissues import brain_mask, fluid_level, tissue_levels
from companion.data.heads import Head, draw_plane, rotation, smooth_noise, texture

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
    """Return a head with its brain found. Raises ValueError where there is none."""
    x, y, z = head.voxel_mm
    signal, voxel_mm = head.signal[::2, ::2, ::2].numpy(), (2 * x, 2 * y, 2 * z)
    mask = brain_mask(signal, voxel_mm)
    _, grey, white = tissue_levels(signal, mask)
    csf = fluid_level(grey, white)
    return ActiveHead(
        head, Head("brain", torch.from_numpy(mask), voxel_mm, head.tissue, head.levels), (csf, grey, white)
    )


def activity_image(
    active: ActiveHead, rng: np.random.Generator, size: int = 64, pixel_mm: float | None = None
) -> np.ndarray:
    """Return the activity (size, size) float32 of a warped head with a random tracer, plane, pixel and blur."""
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
    image = add_lesions(image * regions(n, rng), rng, spacing)
    image = image * texture(n, rng)
    return to_pixels(image, rng, size, fine, pixel)


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


def add_lesions(image: np.ndarray, rng: np.random.Generator, spacing_mm: float) -> np.ndarray:
    """Return the image with hot and cold spots and masses where there is activity, in half of the images."""
    if rng.random() < 0.5:
        return image
    n, line = len(image), np.arange(len(image), dtype=np.float32)
    ragged = smooth_noise(n, rng, max(6, min(40, round(n * spacing_mm / 8))))[0].numpy()
    hot = float(np.percentile(image[image > 0.05], 90)) if (image > 0.05).any() else 0.0
    places = np.argwhere(image[::4, ::4] > 0.1 * hot) * 4
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
    return image.astype(np.float32)


def to_pixels(image: np.ndarray, rng: np.random.Generator, size: int, fine: int, pixel_mm: float) -> np.ndarray:
    """Return (size, size) averages over pixels of a finer image with a border, a third of them blurred first."""
    n = len(image) // fine
    image = image.reshape(n, fine, n, fine).mean((1, 3))
    if rng.random() < 0.35:
        image = gaussian_filter(image, rng.uniform(2, 7) / 2.355 / pixel_mm)
    return np.ascontiguousarray(image[BORDER : BORDER + size, BORDER : BORDER + size].clip(0, 6), np.float32)


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


def virtual_images(seed: int, rng: np.random.Generator, size: int = 64, count: int = 8) -> np.ndarray:
    """Return axial slices (count, size, size) of virtual training person `seed`; half of the people have lesions."""
    subject, pixel = Subject(seed), float(rng.choice(PEOPLE_MM))
    heights = torch.from_numpy(np.sort(rng.uniform(*SLAB_MM, count)).astype(np.float32))
    lesions = cohort.place_lesions(subject, 3, heights) if rng.random() < 0.5 else []
    image = cohort.render(subject, (count, size, size), pixel, heights, lesions).image
    return image.numpy() / SCALE_KBQ
