"""Images of heads that nobody has: real anatomies warped, cut in any plane and given a random contrast.

A slice begins as the T1-weighted signal of a real head (`companion.data.heads_download`) along a warped plane, finer
than the pixels asked for. There it gets its contrast, lesions, texture and bias, and only then the resolution of a
scanner: truncated k-space, with its ringing, or averages over pixels. So one head shows ever new images. The recipe is
domain randomisation (Billot et al. 2023, SynthSeg, arXiv 2107.09559), here for image priors.

    heads = load_heads("data/heads", "train")          # of companion.data.heads_download
    image = head_image(heads[0], np.random.default_rng(0), size=128)   # (128, 128), 1 is bright tissue
    image = dead_leaves(np.random.default_rng(0), size=128)

Images are real and signed, as ringing makes them; `companion.data.phase` makes them complex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from scipy.ndimage import gaussian_filter
from torch import Tensor

BRIGHT = 99.0  # percentile of the tissue's signal that is called 1
AIR = 0.08  # signal below which nothing is tissue, of bright tissue
PIXEL_MM = (0.6, 4.0)  # range of pixel sizes
MARGIN = 8  # pixels around an image that are thrown away: ringing of the border is not anatomy


@dataclass(frozen=True)
class Head:
    """A real head: `signal` (x, y, z) float32 towards right, front and top; 1 is bright tissue; `voxel_mm` (3,)."""

    name: str
    signal: Tensor
    voxel_mm: tuple[float, float, float]
    tissue: Tensor  # (n, 3) places of tissue, mm from the middle of the array; of these, planes are cut
    levels: Tensor  # (n,) the signal there

    @property
    def size_mm(self) -> Tensor:
        """Distance between the centres of the first and the last voxel (3,)."""
        return (torch.tensor(self.signal.shape) - 1) * torch.tensor(self.voxel_mm)

    def at(self, points: Tensor) -> Tensor:
        """Return the signal (*space) at points (*space, 3), mm from the middle; 0 outside."""
        unit = (points / (self.size_mm / 2)).flip(-1)  # grid_sample wants the last axis first
        flat = unit.reshape(1, 1, 1, -1, 3)
        return F.grid_sample(self.signal[None, None], flat, align_corners=True).reshape(points.shape[:-1])


def prepare_head(name: str, signal: np.ndarray, voxel_mm) -> Head:
    """Return a head from its image (x, y, z) in RAS order: scaled, and interpolated by cubic splines to half voxels.

    Linear interpolation between the finer voxels, which is what `Head.at` does, then blurs little.
    """
    signal = np.asarray(signal, np.float32)
    signal = signal / np.percentile(signal[signal > AIR * signal.max()], BRIGHT)
    coarse = torch.from_numpy(np.argwhere(signal[::3, ::3, ::3] > AIR).astype(np.float32) * 3)
    centre = (torch.tensor(signal.shape, dtype=torch.float32) - 1) / 2
    tissue = (coarse - centre) * torch.tensor([float(v) for v in voxel_mm])
    levels = torch.from_numpy(signal[::3, ::3, ::3][signal[::3, ::3, ::3] > AIR])
    finer = torch.from_numpy(signal)
    for axis, n in enumerate(signal.shape):
        finer = torch.tensordot(spline_matrix(n, 2 * n - 1), finer.movedim(axis, 0), 1).movedim(0, axis)
    x, y, z = (float(v) / 2 for v in voxel_mm)
    return Head(name, finer.clamp(0, 3).contiguous(), (x, y, z), tissue, levels)


@lru_cache(maxsize=64)
def spline_matrix(n: int, points: int) -> Tensor:
    """Return the matrix (points, n) from n samples to the values of their cubic spline, from the first to the last."""
    spline = make_interp_spline(np.arange(n), np.eye(n), k=3)
    return torch.from_numpy(spline(np.linspace(0, n - 1, points)).astype(np.float32))


def head_image(head: Head, rng: np.random.Generator, size: int = 128, pixel_mm: float | None = None) -> np.ndarray:
    """Return one image (size, size) float32 of a warped head in a new contrast, plane, pixel size and resolution.

    1 is the 99th percentile of the tissue's signal. Noise-free, but for what noise the head's own scan had.
    """
    pixel = draw_pixel_mm(rng) if pixel_mm is None else pixel_mm
    fine = math.ceil(pixel / 1.1)  # points along a pixel, so that contrast and structure come before resolution
    n = (size + 2 * MARGIN) * fine
    plane = draw_plane(head, rng, n, pixel / fine)
    thickness = pixel * rng.uniform(0.5, 1.5) if rng.random() < 0.7 else rng.uniform(pixel, max(5.0, pixel))
    image = section(head, plane, draw_contrast(head.levels.numpy(), rng), thickness)
    image = add_lesions(image, rng, pixel / fine)
    image = image * texture(n, rng) * bias_field(n, rng)
    return resolution(image, rng, size, fine)


def section(head: Head, plane: Plane, tone: Callable, thickness_mm: float, height_mm: float = 0.0) -> np.ndarray:
    """Return the signal (n, n) of a slice of a head, `tone` of it, `height_mm` away from a plane."""
    steps = min(3, max(1, round(thickness_mm / 1.0)))
    heights = [height_mm + thickness_mm * ((i + 0.5) / steps - 0.5) for i in range(steps)]
    return np.asarray(np.mean([tone(head.at(plane.shifted(h)).numpy()) for h in heights], 0, dtype=np.float32))


def draw_pixel_mm(rng: np.random.Generator) -> float:
    """Return a pixel size: four of ten about 1 mm, four of 2 to 4 mm, the others anywhere in `PIXEL_MM`."""
    kind = rng.random()
    low, high = (0.75, 1.3) if kind < 0.4 else (2.0, 4.0) if kind < 0.8 else PIXEL_MM
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


# ----------------------------------------------------------------------------------------------------------
# Where


@dataclass(frozen=True)
class Plane:
    """Points (n, n, 3) of a warped plane through a head, mm from its middle, and the step (3,) across it."""

    points: Tensor
    normal: Tensor

    def shifted(self, mm: float) -> Tensor:
        """Return the points of the plane `mm` further on."""
        return self.points + mm * self.normal


def draw_plane(
    head: Head, rng: np.random.Generator, n: int, spacing_mm: float, axes: np.ndarray | None = None
) -> Plane:
    """Return n x n points about `spacing_mm` apart: sagittal, coronal, axial or oblique, of a head of any size.

    axes: rows (3, 3) as of `rotation`, which draws them by default.
    """
    turned = rotation(rng) if axes is None else axes
    size = np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.05, 3))  # children to large heads, long and short ones
    centre = draw_centre(head, rng, n * spacing_mm)
    line = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * spacing_mm
    y, x = torch.meshgrid(line, line, indexing="ij")
    down, across, normal = torch.from_numpy((turned / size).astype(np.float32))
    points = centre + y[..., None] * down + x[..., None] * across
    return Plane(points + bulges(points, rng) + waves(n, rng, n * spacing_mm), normal)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """Return orthonormal rows (3, 3): down, right and across the image, in head axes. A quarter are arbitrary."""
    if rng.random() < 0.25:
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        return (q * np.sign(np.diag(r))).T
    sagittal, coronal = [[0, 0, -1], [0, 1, 0], [1, 0, 0]], [[0, 0, -1], [1, 0, 0], [0, 1, 0]]
    axial = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    tilt = np.radians(rng.normal(0, 10, 3))
    turn = np.eye(3)
    for i, angle in enumerate(tilt):
        j, k = (i + 1) % 3, (i + 2) % 3
        one = np.eye(3)
        one[[j, j, k, k], [j, k, j, k]] = [math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)]
        turn = turn @ one
    return np.array((sagittal, coronal, axial)[int(rng.integers(3))], float) @ turn


def draw_centre(head: Head, rng: np.random.Generator, field_mm: float) -> Tensor:
    """Return the middle (3,) of an image: any tissue for a small field of view, the head's middle for a large one."""
    middle = head.tissue.mean(0)
    anywhere = head.tissue[int(rng.integers(len(head.tissue)))]
    share = min(1.0, max(0.15, (300 - field_mm) / 180))
    across = torch.from_numpy(rng.normal(0, 25, 3).astype(np.float32))
    return middle + share * (anywhere - middle) + (1 - share) * across


def waves(n: int, rng: np.random.Generator, field_mm: float) -> Tensor:
    """Return smooth random displacements (n, n, 3), mm: of some millimetres over some centimetres."""
    total = torch.zeros(n, n, 3)
    for length, amplitude in ((60.0, 3.0), (25.0, 1.0), (12.0, 0.4)):
        field = smooth_noise(n, rng, max(4, round(field_mm / length) + 3), channels=3)
        total += amplitude * abs(rng.normal()) * field.movedim(0, -1)
    return total


def bulges(points: Tensor, rng: np.random.Generator) -> Tensor:
    """Return displacements (n, n, 3), mm, that widen or narrow up to two round regions: ventricles, sulci, masses."""
    total = torch.zeros_like(points)
    n = len(points)
    for _ in range(int(rng.integers(3))):
        at = points[int(rng.integers(n)), int(rng.integers(n))]
        radius, strength = rng.uniform(8, 40), rng.uniform(-0.35, 0.4)
        away = points - at
        total -= strength * away * torch.exp(-away.square().sum(-1, keepdim=True) / (2 * radius**2))
    return total


def smooth_noise(n: int, rng: np.random.Generator, controls: int, channels: int = 1) -> Tensor:
    """Return fields (channels, n, n) of about unit variance, smooth between `controls` random values a side."""
    noise = torch.from_numpy(rng.normal(size=(channels, controls, controls)).astype(np.float32))
    between = spline_matrix(controls, n)
    return between @ noise @ between.T


# ----------------------------------------------------------------------------------------------------------
# How it looks


def draw_contrast(levels: np.ndarray, rng: np.random.Generator):
    """Return a function from T1-weighted signal to the signal of a random contrast, air to 0, bright tissue to 1.

    Kinds: T1-weighted itself, T2-like (fluid bright), any curve, any tissues (steps). `levels`: signals of tissue.
    """
    knots = np.array([0, 0.04, 0.1, 0.18, 0.28, 0.4, 0.52, 0.64, 0.76, 0.88, 1.0, 1.3, 3.0])
    kind = rng.random()
    if kind < 0.5:
        values = knots ** np.exp(rng.normal(0, 0.2))
    elif kind < 0.7:
        values = (1.05 - knots.clip(0, 1)) ** np.exp(rng.normal(0.2, 0.4)) * np.exp(rng.normal(0, 0.15, len(knots)))
        values[1] *= rng.uniform(0, 0.6)
    elif kind < 0.9:
        knots = np.sort(np.concatenate([[0, 3], rng.uniform(0.05, 1.2, 4)]))
        values = rng.uniform(0.05, 1, len(knots))
    else:
        edges = np.sort(rng.uniform(0.05, 1.1, int(rng.integers(3, 9))))
        width = rng.uniform(0.005, 0.03)
        knots = np.sort(np.concatenate([[0, 3], edges - width, edges + width]).clip(0, 3))
        values = np.repeat(rng.uniform(0, 1, len(knots) // 2), 2)
    values = np.where(knots <= 0, 0, values)
    scale = max(np.percentile(np.interp(levels, knots, values), BRIGHT), 1e-3)

    def tone(signal: np.ndarray) -> np.ndarray:
        return np.interp(signal, knots, values / scale).astype(np.float32)

    return tone


def add_lesions(
    image: np.ndarray, rng: np.random.Generator, spacing_mm: float, height_mm: float | None = None, span_mm: float = 0.0
) -> np.ndarray:
    """Return the image with spots, masses with rings, oedema or cavities, in one image of three.

    height_mm: of this slice of a stack `span_mm` high, from its middle; lesions then are balls that each slice cuts
    anew, the same ones where generators of one seed are given.
    """
    if rng.random() > 0.33:
        return image
    n = len(image)
    line = np.arange(n, dtype=np.float32)
    ragged = smooth_noise(n, rng, max(6, round(n * spacing_mm / 8)))[0].numpy()
    tissue = np.clip(image / 0.1, 0, 1)
    many = rng.random() < 0.5
    for _ in range(int(rng.integers(3, 20)) if many else 1):
        radius = rng.uniform(1, 4) if many else rng.uniform(6, 30)
        y, x = rng.uniform(0.1, 0.9, 2) * n
        stretch = np.exp(rng.normal(0, 0.3))
        far = np.hypot((line[:, None] - y) * stretch, (line - x) / stretch) * spacing_mm / radius
        if height_mm is not None:
            far = np.hypot(far, (height_mm - rng.uniform(-0.5, 0.5) * (span_mm + radius)) / radius)
        far = far + 0.25 * ragged
        for reach in (1.0,) if many else (rng.uniform(1.3, 2.2), 1.0, rng.uniform(0.4, 0.8)):  # oedema, rim, core
            soft = rng.uniform(0.03, 0.4)
            weight = tissue / (1 + np.exp(np.clip((far - reach) / (0.25 * soft), -30, 30)))
            if rng.random() < 0.75:
                image = image * (1 - weight) + weight * rng.uniform(0, 1.2)
            else:
                image = image * (1 + weight * rng.uniform(-0.6, 0.6))
    return image.astype(np.float32)


def texture(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return factors (n, n) about 1 whose variation has a power law spectrum, mostly of a few per cent."""
    return textures(n, rng, [])[0]


def textures(n: int, rng: np.random.Generator, gaps: Sequence[float]) -> np.ndarray:
    """Return the factors (1 + gaps, n, n) of `texture` in slices so many points apart: what is fine changes soonest."""
    amplitude = abs(rng.normal(0, 0.04))
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)) + 1 / n
    spectra = [np.fft.rfft2(rng.normal(size=(n, n)))]
    law = frequency ** -rng.uniform(0.5, 1.6)
    for gap in gaps:
        alike = np.exp(-2 * math.pi * gap * frequency)
        spectra.append(alike * spectra[-1] + np.sqrt(1 - alike**2) * np.fft.rfft2(rng.normal(size=(n, n))))
    noise = np.stack([np.fft.irfft2(spectrum * law, s=(n, n)) for spectrum in spectra])
    return (1 + amplitude * noise / noise.std((1, 2), keepdims=True)).clip(0.2, 3).astype(np.float32)


def bias_field(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return smooth factors (n, n) about 1, as receive coils leave them."""
    return bias_fields(n, rng, [0.0])[0]


def bias_fields(n: int, rng: np.random.Generator, turns: Sequence[float]) -> np.ndarray:
    """Return the factors (turns, n, n) of `bias_field` of slices; two that are a quarter turn apart have nothing in
    common. turns: radians, one for each slice."""
    strength = abs(rng.normal(0, 0.2))
    one, *other = smooth_noise(n, rng, int(rng.integers(4, 6)), channels=1 if len(turns) == 1 else 2)
    fields = [math.cos(turn) * one + (math.sin(turn) * other[0] if other else 0) for turn in turns]
    return (strength * torch.stack(fields)).exp().clamp(0.3, 2).numpy()


def dead_leaves(
    rng: np.random.Generator, size: int = 128, height: float | None = None, span: float = 0.0
) -> np.ndarray:
    """Return an image (size, size) float32 of textured discs and polygons that hide each other, of all sizes.

    Radii follow r^-3, the law that makes the image look alike at every scale (Lee, Mumford and Huang 2001).
    height: of this slice of a stack `span` high, pixels from its middle; leaves then are balls that each slice cuts
    anew, the same ones where generators of one seed are given.
    """
    fine = 2 if rng.random() < 0.7 else 1
    n = (size + 2 * MARGIN) * fine
    line = np.arange(n, dtype=np.float32)
    low, high = rng.uniform(1.5, 6) * fine, n * rng.uniform(0.15, 0.6)
    image = np.full((n, n), rng.uniform(0, 0.6) * (rng.random() < 0.5), np.float32)
    for _ in range(int(rng.integers(20, 160))):
        radius = (low**-2 + rng.random() * (high**-2 - low**-2)) ** -0.5
        y, x = rng.uniform(0, n, 2)
        cut = 1.0
        if height is not None:
            cut = 1 - ((height * fine - rng.uniform(-0.5, 0.5) * (span * fine + 2 * radius)) / radius) ** 2
        reach = 1.6 * radius
        rows = slice(max(0, int(y - reach)), min(n, int(y + reach) + 2))
        columns = slice(max(0, int(x - reach)), min(n, int(x + reach) + 2))
        dy, dx = line[rows, None] - y, line[columns] - x
        angle, stretch = rng.uniform(0, math.pi), np.exp(rng.normal(0, 0.3))
        a = (dx * math.cos(angle) + dy * math.sin(angle)) * stretch
        b = (dy * math.cos(angle) - dx * math.sin(angle)) / stretch
        edge_at = radius * math.sqrt(max(cut, 0.0))
        inside = np.maximum(abs(a), abs(b)) < 0.8 * edge_at if rng.random() < 0.3 else np.hypot(a, b) < edge_at
        slope = rng.normal(0, 0.15, 2) / radius
        value = rng.random() * (rng.random() > 0.1) * (1 + slope[0] * a + slope[1] * b)
        part = image[rows, columns]
        image[rows, columns] = np.where(inside, value, part)
    image = gaussian_filter(image, rng.uniform(0, 1.2) * fine) if rng.random() < 0.5 else image
    return resolution(image * texture(n, rng) * bias_field(n, rng), rng, size, fine)


# ----------------------------------------------------------------------------------------------------------
# As a scanner resolves it


def resolution(image: np.ndarray, rng: np.random.Generator, size: int, fine: int) -> np.ndarray:
    """Return (size, size) pixels of a finer image with a margin: k-space cut off, often filtered, or averaged.

    Some images then lose more of their k-space along one or both axes, which leaves them interpolated.
    """
    n = len(image) // fine
    if fine > 1 and rng.random() < 0.4:
        image = image.reshape(n, fine, n, fine).mean((1, 3))
        fine = 1
    keep = np.array([0.5, 0.5])
    if rng.random() < 0.35:
        keep *= rng.uniform(0.55, 1, 2) if rng.random() < 0.5 else rng.permutation([1, rng.uniform(0.5, 1)])
    if fine > 1 or keep.min() < 0.5:
        spectrum = np.fft.fftshift(np.fft.fft2(image, norm="forward"))
        low = (len(image) - n) // 2
        spectrum = spectrum[low : low + n, low : low + n]
        soft = rng.uniform(0.03, 0.4) if rng.random() < 0.5 else 0.0
        for axis, cut in enumerate(keep):
            window = edge(np.abs(np.arange(n) - n // 2) / n, cut, soft)
            spectrum = spectrum * (window[:, None] if axis == 0 else window)
        image = np.fft.ifft2(np.fft.ifftshift(spectrum), norm="forward").real
    return np.ascontiguousarray(image[MARGIN : MARGIN + size, MARGIN : MARGIN + size], np.float32)


def edge(frequency: np.ndarray, cut: float, soft: float) -> np.ndarray:
    """Return a window of frequencies, 1 inside and 0 beyond `cut`; a Tukey window whose slope is `soft` of it."""
    if not soft:
        return (frequency <= cut).astype(float)
    position = ((frequency / cut - (1 - soft)) / soft).clip(0, 1)
    return 0.5 + 0.5 * np.cos(math.pi * position)
