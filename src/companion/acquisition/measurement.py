"""y = A x + n from raw k-space: whitened, compressed, with coil maps, in known units, and what was found on the way.

`prepare_kspace` takes what a scanner stores on a Cartesian grid; `trajectory.prepare_trajectory` takes samples anywhere
in k-space. Both give a `Measurement`: everything that a reconstruction needs, and nothing that fully sampled data told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from companion.acquisition.maps import CROP, Box, Maps, centre_of_mask, echo_of, espirit, low_resolution
from companion.acquisition.noise import Noise, mix, noise_of_edges, noise_of_scan
from companion.data.raw.scan import RawScan
from companion.operators.linear import LinearOperator, check_finite
from companion.operators.masks import CartesianMask
from companion.operators.mri import Sense, Shape, centre_crop, crop_kspace, ifft
from companion.operators.soft_sense import soft_sense

KEPT_ENERGY = 0.999  # of the signal, by the virtual coils that coil compression keeps
LEAST = 8  # evaluations of a draw, below which it is too rough to look at
MOST_SLICES = 8  # of a volume, that noise and coil compression are measured on
BRIGHTNESS_QUANTILE = 0.99  # share of the object's pixels in the low-resolution image below the stated brightness


@dataclass(frozen=True, eq=False)
class Found:
    """What the data said of themselves.

    coils, virtual: receive coils, and those left by compression, which hold the share `kept` of the signal's energy.
    echo: index of the peak of energy, None off the grid; centre: the fully sampled box around it, None when not used.
    folded: share of the energy where two tissues share a pixel; sets: of coil maps; measured: share of k-space.
    matrix: (virtual, coil) whitens and compresses raw data.
    """

    noise: Noise
    coils: int
    virtual: int
    kept: float
    echo: Shape | None
    centre: Box | None
    folded: float
    sets: int
    measured: float
    matrix: Tensor = field(repr=False)

    def __str__(self) -> str:
        std = self.noise.std
        lines = [
            f"noise       {std.min():.3g} to {std.max():.3g} per real component, correlation up to "
            f"{self.noise.correlation:.2f}, from {self.noise.source} ({self.noise.samples} samples)",
            f"coils       {self.coils}, as {self.virtual} virtual ones with {self.kept:.2%} of the signal's energy",
            f"measured    {self.measured:.1%} of k-space, R = {1 / self.measured:.2f}, echo at {self.echo}"
            if self.echo is not None
            else f"measured    {self.measured:.2f} samples a pixel, off the grid",
        ]
        if self.centre is not None:
            wide = " x ".join(str(last - first) for first, last in self.centre)
            folds = f"; two tissues share pixels with {self.folded:.1%} of the energy" if self.sets > 1 else ""
            lines.append(f"coil maps   {self.sets} set{'s' * (self.sets > 1)} from a centre of {wide}{folds}")
        if self.noise.slope is not None and self.noise.slope < 0.8:
            lines.append(
                f"warning     k-space still falls off at its edges ({self.noise.slope:.2f}): the noise is "
                "overestimated; give a noise scan"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Cost:
    """What a reconstruction will take: seconds and bytes (peak, beyond what the weights need)."""

    seconds: float
    bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        took = f"{minutes} min {seconds} s" if minutes else f"{self.seconds:.1f} s"
        return f"about {took} and {self.bytes / 2**30:.2f} GiB"


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = A x + n, with n of deviation noise_std per real component, independent between coils.

    y: (slice, virtual coil, *k-space) complex64, zero where not measured; a single image is one slice.
    A: from images (slice, set, *space); `one(i)` is the measurement of slice i alone.
    scale: multiplied the whitened data, so that the image has the stated brightness. maps: (slice, set, coil, *space).
    """

    y: Tensor
    A: LinearOperator
    noise_std: float
    scale: float
    maps: Tensor = field(repr=False)
    found: Found

    def __len__(self) -> int:
        return len(self.y)

    def one(self, i: int) -> Measurement:
        """The measurement of slice i, whose operator fits any number of draws."""
        A = self.A
        if isinstance(A, Sense):
            mask = A.mask.mask
            mask = mask[i, 0] if mask.ndim > A.coils.ndim else mask
            A = soft_sense(self.maps[i], mask, A.coils.ndim)
        return replace(self, y=self.y[i : i + 1], A=A, maps=self.maps[i : i + 1])

    def with_noise(self, noise_std: float) -> Measurement:
        """The same with another deviation of the noise, in the units of y; see `redundancy`."""
        return replace(self, noise_std=noise_std)

    def raw_to_data(self, kspace: Tensor) -> Tensor:
        """k-space (..., coil, *space) of the same coils in the units and virtual coils of y."""
        return self.scale * mix(self.found.matrix, kspace, self.y.ndim - 2)

    def magnitude(self, x: Tensor) -> Tensor:
        """Root sum of squares over sets of images (batch, set, *space) of one slice, (batch, 1, *space).

        A set counts where it has a coil vector: elsewhere the data say nothing of it, and draws show what priors like.
        """
        seen = (self.maps != 0).any(2)  # (slice, set, *space)
        return (x.abs() * seen).square().sum(1, keepdim=True).sqrt()

    def to(self, device: str) -> Measurement:
        """The same with its tensors on another device."""
        return replace(self, y=self.y.to(device), A=self.A.to(device), maps=self.maps.to(device))

    def cost(self, D: Callable | None = None, draws: int = 1, evaluations: int = 50, iterations: int = 30) -> Cost:
        """What `draws` of `evaluations` network evaluations, with `iterations` CG steps in each, will take.

        Times one application of A^H A and of the denoiser D (x, sigma), which is called once, and counts the images
        that conjugate gradients and the data term hold.
        """
        single = self.one(0)
        x = torch.randn(
            draws, *single.A.domain_shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)
        )
        x = x.to(self.y.device)
        seconds = iterations * _seconds(lambda: single.A.normal(x))
        if D is not None:
            sigma = torch.full((draws,), 0.1, device=x.device)
            with torch.no_grad():
                seconds += _seconds(lambda: D(x, sigma))
        image, data = x.nbytes, draws * self.y[:1].nbytes
        return Cost(len(self) * evaluations * seconds, 8 * image + 4 * data + self.maps.nbytes + self.y.nbytes)

    def affordable(self, seconds: float, D: Callable, draws: int, extra: float = 0.5, most: int = 100) -> int:
        """How many evaluations a draw fit into so many seconds, with `extra` of their work for the scan's own trial.

        As `cost` times it now; at most `most`, for more bring nothing. Raises ValueError where not even `LEAST` fit.
        """
        each = self.cost(D, draws, 1).seconds * (1 + extra)
        if seconds < LEAST * each:
            raise ValueError(
                f"{seconds:g} s are too few: {draws} draws of {LEAST} evaluations take {LEAST * each:.0f} s here; "
                "allow for more, or for fewer draws"
            )
        return min(int(seconds / each), most)


def prepare_kspace(
    kspace: Tensor,
    mask: Tensor | CartesianMask | None = None,
    *,
    ndim: int = 2,
    noise: Noise | Tensor | None = None,
    coils: int | None = None,
    sets: int | None = None,
    calibration: Tensor | None = None,
    maps: Tensor | None = None,
    oversampling: tuple[float, ...] | None = None,
    brightness: float | None = 1.0,
    kernel: int | None = None,
    crop: float = CROP,
) -> Measurement:
    """The measurement that raw Cartesian k-space is: `(coil, *space)`, or `(slice, coil, *space)` of several slices.

    mask: what was measured, broadcastable to (*space) or (slice, 1, *space); what it leaves out of fuller data is not
    looked at. None: samples where some coil is not exactly zero, which covers partial Fourier, elliptical and
    zero-filled k-space. ndim: axes of space, 2 or 3, all of them possibly undersampled.
    noise: `Noise`, a noise scan (coil, ...), or None: from the edges of k-space.
    coils: virtual coils to keep; None: the fewest with KEPT_ENERGY of the signal. sets: of coil maps, 1 or 2; None: 2
    where the field of view folds, see `espirit`. calibration: fully sampled centre of a scan of its own, (coil, *box)
    or (slice, coil, *box), instead of this one's. maps: (coil, *space) in raw coils, instead of any estimate.
    oversampling: of each axis of space; the field of view is cut by it, along fully sampled axes only, and that of the
    calibration, which is sampled as densely.
    brightness: what 99 % of the object's pixels in the low-resolution image shall not exceed; None: units of the noise.

    Raises ValueError for data that are not finite or all zero, an oversampled axis that is undersampled, and when no
    noise, centre or maps can be found; the texts say what to give.
    """
    kspace, mask = _with_slices(kspace, mask, ndim)
    if oversampling is not None:
        if calibration is not None:
            calibration = calibration_without_oversampling(calibration, tuple(kspace.shape[-ndim:]), oversampling)
        kspace, mask = remove_oversampling(kspace, mask, oversampling)
    space = tuple(kspace.shape[-ndim:])
    echo = echo_of(kspace, ndim)
    some = kspace[:: -(-len(kspace) // MOST_SLICES)]  # enough to know the noise and the coils, of a large volume
    if not isinstance(noise, Noise):
        noise = noise_of_edges(some, ndim, echo) if noise is None else noise_of_scan(noise)
    matrix, kept = compression(some, noise, coils, ndim)
    y = mix(matrix, kspace, ndim) * mask
    centre, estimates = None, []
    if maps is not None:
        shape = (len(y), 1, kspace.shape[1], *space)
        maps = mix(matrix, maps.to(y).expand(shape) if maps.ndim == ndim + 1 else maps.to(y).reshape(shape), ndim)
        image = (maps[:, 0].conj() * ifft(y, ndim)).sum(1)
    else:
        if calibration is None:
            centre = centre_of_mask(mask[:, 0].amin(0), echo)
            part = tuple(slice(first, last) for first, last in centre)
            boxes, first = y[(..., *part)], tuple(f - n // 2 for (f, _), n in zip(centre, space, strict=True))
        else:
            boxes, first = mix(matrix, calibration.reshape(-1, *calibration.shape[-ndim - 1 :]), ndim), None
        estimates = [espirit(box, space, sets, kernel, crop, noise_std=1.0, first=first) for box in boxes]
        if len({len(e.maps) for e in estimates}) > 1:  # one slice folds: all get a second set
            estimates = [espirit(box, space, 2, kernel, crop, noise_std=1.0, first=first) for box in boxes]
        maps = torch.stack([e.maps for e in estimates])
        image = torch.stack([_low_resolution_image(box, m, first) for box, m in zip(boxes, estimates, strict=True)])
    scale = 1.0 if brightness is None else brightness / bright(image)
    found = Found(
        noise,
        kspace.shape[1],
        len(matrix),
        kept,
        echo,
        centre,
        max((e.folded for e in estimates), default=0.0),
        maps.shape[1],
        mask.mean().item(),
        matrix,
    )
    A = soft_sense(maps if len(maps) > 1 else maps[0], mask if len(mask) > 1 else mask[0, 0], ndim)
    return Measurement(scale * y, A, scale, scale, maps, found)


def prepare_scan(scan: RawScan, slices: slice | None = None, **options) -> Measurement:
    """The measurement that a raw file holds: its mask, noise and calibration scans and oversampling are used.

    slices: which of them. options: of `prepare_kspace`, before what the file says. The field of view is cut along fully
    sampled axes only.
    """
    part = slice(None) if slices is None else slices
    kspace, mask = scan.kspace[part], scan.mask[part] if len(scan.mask) > 1 else scan.mask
    factors = _removable(scan.oversampling, mask)
    told = {"mask": mask, "noise": scan.noise, "ndim": scan.ndim, "oversampling": factors if factors else None}
    if scan.calibration is not None:
        told["calibration"] = scan.calibration[part]
    return prepare_kspace(kspace, **told | options)


def reference_image(kspace: Tensor, m: Measurement) -> Tensor:
    """The image (1, 1, *space) of fully sampled k-space (coil, *space) in the units of m, maps from all of its centre.

    What a reconstruction of the part that m holds is judged by. Nothing of it is in m.
    """
    full = m.raw_to_data(kspace)
    box = centre_of_mask((full != 0).any(0), echo_of(full))
    centre = full[(slice(None), *(slice(first, last) for first, last in box))]
    first = tuple(f - n // 2 for (f, _), n in zip(box, full.shape[1:], strict=True))
    maps = espirit(centre, tuple(full.shape[1:]), m.maps.shape[1], air=0.8, first=first, noise_std=m.noise_std).maps
    return (maps.conj() * ifft(full)).sum(1).abs().square().sum(0).sqrt()[None, None].to(torch.complex64)


def compression(kspace: Tensor, noise: Noise, coils: int | None = None, ndim: int = 2) -> tuple[Tensor, float]:
    """The matrix (virtual coil, coil) that whitens and compresses, and the share of the signal's energy it keeps.

    coils: how many to keep; None: the fewest that hold KEPT_ENERGY. The energy of noise is taken off: each singular
    value holds that of the signal and of white noise. The rows stay orthonormal after whitening, so the noise stays
    white. Raises ValueError for more coils than there are. Huang et al. 2008.
    """
    present = kspace.shape[-ndim - 1]
    if coils is not None and not 1 <= coils <= present:
        raise ValueError(f"cannot compress {present} coils to {coils}; use 1 to {present}")
    whitening = noise.whitening
    samples = kspace.movedim(-ndim - 1, 0).flatten(1)
    measured, scale = (samples != 0).any(0).sum(), samples.abs().max()
    samples = samples / scale  # sums of squares of raw numbers could leave single precision
    gram = (samples @ samples.mH).to(torch.complex128) * scale.double() ** 2 / measured
    whitening = whitening.to(samples.device)
    values, vectors = torch.linalg.eigh(whitening @ gram @ whitening.mH)
    energy = (values.flip(0) - 2).clamp_min(0)  # white noise of deviation 1 per real component has 2
    if not energy.any():
        raise ValueError("k-space holds nothing but noise; check the file, or the noise that was given")
    share = energy.cumsum(0) / energy.sum()
    coils = int((share < KEPT_ENERGY).sum()) + 1 if coils is None else coils
    return vectors.flip(1)[:, :coils].mH @ whitening, share[coils - 1].item()


def remove_oversampling(kspace: Tensor, mask: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """k-space and mask of the field of view cut to 1 / factor along each space axis, at the same resolution.

    Raises ValueError for a factor below 1 and for an oversampled axis that is not fully sampled: there the cut would
    mix what was measured with what was not.
    """
    ndim = len(factors)
    if ndim > mask.ndim - 2 or min(factors) < 1:
        raise ValueError(f"oversampling {factors}: need a factor of 1 or more for each axis of {tuple(mask.shape[2:])}")
    for axis, factor in zip(range(-ndim, 0), factors, strict=True):
        if factor == 1:
            continue
        if not torch.equal(mask, mask.narrow(axis, 0, 1).expand_as(mask)):
            raise ValueError(
                f"axis {axis} is oversampled by {factor} but not fully sampled, so its field of view cannot be cut "
                "from k-space; leave its oversampling at 1"
            )
        width = round(kspace.shape[axis] / factor)
        kspace = crop_kspace(kspace.movedim(axis, -1), (width,)).movedim(-1, axis)
        mask = mask.narrow(axis, 0, width)
    return kspace * mask, mask


def calibration_without_oversampling(calibration: Tensor, space: Shape, factors: tuple[float, ...]) -> Tensor:
    """A calibration scan (..., *box) of a grid `space`, its field of view cut as `remove_oversampling` cuts others.

    The box is put among zeros, cut in image space, and taken out again; it has fewer samples then, which lie as far
    apart as those of the image.
    """
    for axis, (n, factor) in zip(range(-len(factors), 0), zip(space, factors, strict=True), strict=True):
        if factor == 1:
            continue
        box = calibration.movedim(axis, -1)
        have, width = box.shape[-1], round(n / factor)
        before = n // 2 - have // 2
        cut = crop_kspace(torch.nn.functional.pad(box, (before, n - have - before)), (width,))
        calibration = centre_crop(cut, (min(width, round(have / factor)),)).movedim(-1, axis)
    return calibration


def without_oversampling(scan: RawScan) -> RawScan:
    """A scan of slices whose field of view is cut along its fully sampled axes, noise and voxels unchanged."""
    factors = _removable(scan.oversampling, scan.mask)
    if all(f == 1 for f in factors):
        return scan
    space, masks = tuple(scan.kspace.shape[2:]), scan.mask.expand(len(scan.kspace), -1, -1, -1)
    pairs = [remove_oversampling(k[None], m[None], factors) for k, m in zip(scan.kspace, masks, strict=True)]
    calibration = scan.calibration
    return replace(
        scan,
        kspace=torch.cat([k for k, _ in pairs]),
        mask=torch.cat([m for _, m in pairs[: len(scan.mask)]]),
        calibration=calibration
        if calibration is None
        else calibration_without_oversampling(calibration, space, factors),
        oversampling=tuple(f if cut == 1 else 1.0 for f, cut in zip(scan.oversampling, factors, strict=True)),
    )


def _removable(oversampling: tuple[float, ...], mask: Tensor) -> tuple[float, ...]:
    """The oversampling (y, x) of fully sampled axes, 1 of others, where a cut would mix what was not measured."""
    axes = range(-len(oversampling), 0)
    full = [torch.equal(mask, mask.narrow(a, 0, 1).expand_as(mask)) for a in axes]
    return tuple(f if whole else 1.0 for f, whole in zip(oversampling, full, strict=True))


def hybrid_slices(kspace: Tensor, axis: int = -3) -> Tensor:
    """(slice, coil, y, x) of 3D k-space `(coil, z, y, x)`, by an inverse transform along its fully sampled readout.

    What remains is a 2D problem with two phase encodes for each position along the readout; noise keeps its deviation.
    """
    return ifft(kspace.movedim(axis, -1), 1).movedim(-1, 0)


def _with_slices(kspace: Tensor, mask, ndim: int) -> tuple[Tensor, Tensor]:
    """(slice, coil, *space) complex64, zero where not measured, and its float mask (slice or 1, 1, *space)."""
    check_finite(kspace, "kspace")
    if ndim not in (2, 3) or kspace.ndim not in (ndim + 1, ndim + 2) or not kspace.is_complex():
        raise ValueError(
            f"kspace must be complex (coil, *space) or (slice, coil, *space) with {ndim} axes of space, got "
            f"{tuple(kspace.shape)} {kspace.dtype}"
        )
    kspace = (kspace if kspace.ndim == ndim + 2 else kspace[None]).to(torch.complex64)
    mask = mask.mask if isinstance(mask, CartesianMask) else mask
    if mask is None:
        mask = (kspace != 0).any(1, keepdim=True)
        mask = mask if not torch.equal(mask, mask[:1].expand_as(mask)) else mask[:1]
    else:
        mask = (mask != 0).to(kspace.device)
        mask = mask if mask.ndim == ndim + 2 else mask.expand(1, 1, *kspace.shape[-ndim:])
    mask = mask.expand(len(mask), 1, *kspace.shape[-ndim:]).float()
    kspace = kspace * mask
    if not kspace.any():
        raise ValueError("all measured samples are zero; check the file and its mask")
    return kspace, mask


def _low_resolution_image(centre: Tensor, found: Maps, first: Shape | None) -> Tensor:
    """The image (*space) of the centre (coil, *box) alone, combined with its first set of maps."""
    return (found.maps[0].conj() * low_resolution(centre, found.maps.shape[2:], first)).sum(0)


def bright(image: Tensor) -> float:
    """The magnitude that BRIGHTNESS_QUANTILE of an object's pixels do not exceed.

    The object: pixels above a tenth of the magnitude that 99 % of all pixels do not exceed, so that air does not count.
    """
    magnitude = image.abs().flatten()[: 2**24]
    level = torch.quantile(magnitude, 0.99)
    if not level > 0:
        raise ValueError("the image of the calibration centre is empty, so it has no scale; give brightness=None")
    return torch.quantile(magnitude[magnitude > 0.1 * level], BRIGHTNESS_QUANTILE).item()


def _seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
