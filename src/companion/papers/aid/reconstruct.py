"""AID for MRI: multi-coil volumes reconstructed slice by slice, each given the slices before it.

Protocol, honest unless a parameter says otherwise: coil maps come from a calibration scan or the centre lines, never
from fully sampled data; the intensity scale is found, not set; no slice is known beforehand; classical methods are
tuned on other people.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, fastmri
from companion.diffusion.covariance import Measured
from companion.diffusion.denoisers import AnySize, Denoiser
from companion.diffusion.guidance import Guidance, ddnm, dds, diffpir, dps, landweber, pigdm, posterior_mean
from companion.diffusion.langevin import langevin
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, Samples
from companion.diffusion.sequence import SequenceSamples, draw_sequence, reconstruct_sequence
from companion.diffusion.solvers import ddim
from companion.evaluation import metrics
from companion.files import atomic_write, project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import describe, load_denoiser
from companion.networks.causal_unet import CausalUNet
from companion.operators.mri import (
    CartesianMask,
    Sense,
    birdcage_maps,
    cartesian_mask,
    centre_lines,
    coil_maps,
    combine,
    estimate_noise,
    fft,
    ifft,
    low_pass,
    sense,
)
from companion.papers.aid.data import volume, volumes
from companion.papers.aid.sample import EMBEDDED
from companion.parameters import Parameters, param
from companion.randomness import randn
from companion.reconstruction import mri as baselines
from companion.reconstruction import nullspace

FIRST_SIGMA = 5.0  # noise level at which posterior draws begin: an image is invisible in it
FIT_SIGMAS = torch.logspace(-2, 1.3, 12)  # noise levels at which the error of a prior is measured
EMBEDDED_SINGLE = "brain/t1w"
METHODS = ("annealed_gibbs", "published", "dds", "ddnm", "diffpir", "pigdm", "dps")
MODELS = {"AID": "full", "AID, newest slice only": "last", "single image": None}  # name -> context
CONTEXT_ERROR = 0.05  # deviation of drawn slices from the truth, roughly
LEAST_CENTRE = 12  # lines of a k-space centre whose low-resolution image tells the brightness
REFERENCE_ACS = 24  # centre of fully sampled data from which the maps of the reference image come


@dataclass(frozen=True)
class Reconstruct(Parameters):
    """Parameters of aid/4_reconstruct.ipynb."""

    source: str = param("brain", "brain: held-out virtual people; else a fastMRI HDF5 file or a folder of them")
    weights: str = param(EMBEDDED, "sequence prior: an embedded or published name, a folder, hf:owner/name")
    single: str = param(EMBEDDED_SINGLE, "single-image prior to compare with")
    models: tuple[str, ...] = param(tuple(MODELS), "priors to use", choices=tuple(MODELS))
    image_size: int = param(64, "pixels along y and x of virtual people", minimum=16)
    frames: int = param(10, "slices of a volume, at most", minimum=1)
    spacing_mm: float = param(3.25, "distance of neighbouring slices of virtual people", minimum=0.1)
    subjects: int = param(2, "volumes to reconstruct", minimum=1)
    validation_subjects: int = param(2, "other volumes, to tune the classical methods", minimum=1)
    coils: int = param(8, "receive coils of virtual people", minimum=1)
    noise_std: float = param(0.01, "k-space noise per real component of virtual people, in image units", minimum=0)
    acceleration: float = param(8, "nominal acceleration R", minimum=1)
    mask: str = param("equispaced", "lines that are measured", choices=("equispaced", "random", "variable_density"))
    interleave: bool = param(True, "neighbouring slices measure different lines: context brings what is missing")
    acs: int = param(0, "fully sampled centre lines", minimum=0)
    maps: str = param(
        "calibration",
        "coil maps from: a low-resolution calibration scan; the acs lines; oracle, the "
        "true maps (the paper's protocol)",
        choices=("calibration", "acs", "oracle"),
    )
    calibration: int = param(16, "width of the calibration scan, samples", minimum=12)
    scale: float | None = param(
        None,
        "peak of the zero-filled image in units of the prior, by hand as in the paper; none: found from the data",
        minimum=1e-6,
    )
    start: str = param(
        "nothing",
        "what the first slice is given: nothing, or truth, the fully sampled slice (paper's protocol)",
        choices=("nothing", "truth"),
    )
    method: str = param(
        "annealed_gibbs", "posterior sampler; published: gradient steps, stochastic rule", choices=METHODS
    )
    draws: int = param(4, "posterior draws of a volume", minimum=2)
    evaluations: int = param(24, "network evaluations a draw and slice", minimum=2)
    last_sigma: float = param(0.04, "noise level of the last evaluation; about 4 noise_std", minimum=1e-4)
    refresh: float | None = param(
        10.0,
        "annealed_gibbs: how often the noise is renewed while sigma falls by e; none: "
        "in every evaluation, which drifts over hundreds of them",
        minimum=0,
    )
    langevin_steps: int = param(3, "Langevin steps a level of the CSGM baseline; 0 leaves it out", minimum=0)
    classical: bool = param(True, "compare with tuned classical methods too")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


# ------------------------------------------------------------------------------------------------------------- scans


@dataclass(frozen=True, eq=False)
class VolumeScan:
    """The data of one volume, in the intensity units of the prior: y = A x + noise, slice by slice."""

    name: str
    y: Tensor  # (frame, coil, y, x), zero where not measured
    maps: Tensor  # (frame, coil, y, x)
    mask: CartesianMask
    noise_std: float  # per real component
    scale: float  # multiplied raw data
    x: Tensor | None = None  # truth (frame, 1, y, x), if known, in the units of y
    voxel_mm: tuple[float, ...] | None = None  # (z, y, x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one slice: (1, y, x)."""
        return (1, *self.y.shape[-2:])

    def to(self, device: str) -> VolumeScan:
        """Return the same with its tensors on another device."""
        x = None if self.x is None else self.x.to(device)
        return replace(self, y=self.y.to(device), maps=self.maps.to(device), x=x)

    def operator(self, frame: int) -> Sense:
        """Return A of one slice."""
        lines = self.mask.mask
        return sense(self.maps[frame], lines if lines.ndim == 1 else lines[frame, 0, 0])


def simulate(p: Reconstruct, split: str, index: int, reference: float) -> VolumeScan:
    """Return the scan of a virtual person in raw units nobody knows, prepared as measured data would be.

    reference: magnitude that 99 % of a training volume's pixels do not exceed, see `examples`.
    """
    x = volume("brain", split, index, p.frames, p.image_size, p.spacing_mm)
    S = birdcage_maps(x.shape[-2:], p.coils)
    generator = torch.Generator().manual_seed(p.seed + 7919 * index + {"validation": 1, "test": 2}[split])
    gain = 10 ** (-3 - 3 * torch.rand((), generator=generator).item())
    mask = line_masks(p, x.shape[-1], len(x), p.seed + 1000 * index)
    scan, calibration = (
        gain * (fft(S * x) + p.noise_std * randn((len(x), *S.shape), x.dtype, generator)) for _ in range(2)
    )
    oracle = S.expand(len(x), *S.shape) if p.maps == "oracle" else None
    voxel_mm = (p.spacing_mm, *2 * (anatomy.FIELD_OF_VIEW_MM / p.image_size,))
    found = prepare(
        f"{split} {index}", scan, mask, calibration, gain * p.noise_std, p, reference, gain * x, oracle, voxel_mm
    )
    return replace(found, x=found.x * turn(S, found.maps))


def line_masks(p: Reconstruct, width: int, frames: int, seed: int) -> CartesianMask:
    """Return which lines are measured: (x,) for all slices, or with `p.interleave` (frame, 1, 1, x), others in each.

    Equispaced lines move on by about 0.38 R from slice to slice, so that neighbours share none and a few slices
    together measure all; those of the first slice hold the centre of k-space, without which contrast is anybody's
    guess. Random ones are drawn anew. The centre lines stay.
    """
    one = cartesian_mask(width, p.acceleration, p.mask, acs=p.acs, seed=seed)
    if not p.interleave or frames == 1:
        return one
    period = max(1, round(p.acceleration))
    step = next(s for s in range(round(0.38 * period) or 1, period + 1) if math.gcd(s, period) == 1)
    centre = slice(width // 2 - p.acs // 2, width // 2 - p.acs // 2 + p.acs)
    rows = []
    for n in range(frames):
        row = cartesian_mask(width, p.acceleration, p.mask, seed=seed + n).mask
        row = row.roll((width // 2 + n * step) % period) if p.mask == "equispaced" else row
        row[centre] = 1
        rows.append(row)
    masks = torch.stack(rows)[:, None, None]
    return replace(one, mask=masks, acceleration=masks.numel() / masks.sum().item(), lines=int(rows[0].sum()))


def turn(true: Tensor, found: Tensor) -> Tensor:
    """Return the phase factor, magnitude 1, by which images that belong to found maps differ from those of true maps.

    The phase of an image and that of its maps are exchangeable; ESPIRiT gives the first coil none.
    """
    common = (found.conj() * true).sum(-3, keepdim=True)
    return torch.where(common == 0, 1, common.sgn())


def prepare(
    name: str,
    kspace: Tensor,
    mask: CartesianMask,
    calibration: Tensor,
    noise_std: float,
    p: Reconstruct,
    reference: float,
    x: Tensor | None = None,
    oracle: Tensor | None = None,
    voxel_mm: tuple[float, ...] | None = None,
) -> VolumeScan:
    """Return raw k-space (frame, coil, y, x) undersampled by `mask`, with coil maps and in the units of the prior.

    calibration: k-space of the calibration scan, of which only the centre is read. oracle: maps to use as they are.
    """
    y = kspace * mask.mask
    if not y.any():
        raise ValueError(f"{name}: all measured samples are zero; check the file and its mask")
    centre, width = (calibration, p.calibration) if p.maps == "calibration" else (y, p.acs)
    width = min(width, *kspace.shape[-2:])
    try:
        maps = coil_maps(centre, width) if oracle is None else oracle
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    people = examples(y[::3].shape, p, reference)
    if p.scale is not None:
        scale = p.scale / peak(baselines.zero_filled(y, maps, mask))
    elif width >= LEAST_CENTRE:
        scale = intensity_scale(combine(low_pass(centre, width), maps), ifft(low_pass(fft(people), width)))
    else:
        some = mask.mask if mask.mask.ndim == 1 else mask.mask[::3]
        seen = torch.cat([baselines.cg_sense(fft(maps[::3] * x) * some, maps[::3], some) for x in people])
        scale = intensity_scale(baselines.cg_sense(y[::3] / peak(y), maps[::3], some), seen) / peak(y)
    return VolumeScan(name, scale * y, maps, mask, scale * noise_std, scale, None if x is None else scale * x, voxel_mm)


def peak(x: Tensor) -> float:
    """Return the largest magnitude of a volume."""
    return x.abs().max().item()


def intensity_scale(x: Tensor, like: Tensor) -> float:
    """Return the factor that makes images x as bright as images `like`: 99 % of the pixels are below the same value.

    `like` are other people in the units of the prior, seen with the same blur or folding as x, which cost brightness.
    """
    level, wanted = (torch.quantile(images.abs().flatten()[: 2**24], 0.99).item() for images in (x, like))
    if not level > 0:
        raise ValueError("the calibration image is empty, so the intensity scale cannot be found; give scale")
    return wanted / level


@lru_cache(maxsize=4)
def people_like(frames: int, p: Reconstruct, count: int = 3) -> Tensor:
    """Return validation people (person, frame, 1, y, x)."""
    return volumes("brain", "validation", count, frames, p.image_size, p.spacing_mm)


def examples(shape: tuple[int, ...], p: Reconstruct, reference: float) -> Tensor:
    """Return validation people (person, frame, 1, y, x) as large as k-space of `shape` (frame, coil, y, x).

    99 % of their pixels stay below `reference`, as in the training volumes.
    """
    x = people_like(shape[0], replace(p, out="", seed=0))
    parts = torch.view_as_real(x[:, :, 0]).movedim(-1, 2).flatten(0, 1)
    parts = torch.nn.functional.interpolate(parts, shape[-2:], mode="bilinear", antialias=True)
    x = torch.view_as_complex(parts.movedim(1, -1).contiguous()).unflatten(0, x.shape[:2])[:, :, None]
    return reference / torch.quantile(x.abs().flatten(), 0.99).item() * x


def read_scan(path: Path, p: Reconstruct, reference: float) -> VolumeScan:
    """Return the scan of a fastMRI file: fully sampled files are undersampled here, others taken as they are.

    The truth of a fully sampled file is its coil combination with maps from the centre of all the data.
    """
    file = fastmri.open_volume(path)
    raw = file.read(slice(0, p.frames))
    noise_std = estimate_noise(raw)
    kspace = file.crop(raw)
    width = kspace.shape[-1]
    if file.mask is not None:
        columns, acs, lines = file.mask, centre_lines(file.mask), int(file.mask.sum())
        mask = CartesianMask(columns, width / lines, width / lines, lines, acs, "as measured", p.seed)
        return prepare(
            path.stem,
            kspace,
            mask,
            kspace,
            noise_std,
            replace(p, maps="acs", acs=acs),
            reference,
            voxel_mm=file.voxel_mm,
        )
    mask = line_masks(p, width, len(kspace), p.seed)
    full = bool(file.columns.all())
    mask = mask if full else mask.within(file.columns)
    best = coil_maps(kspace, min(REFERENCE_ACS, kspace.shape[-2], width if full else centre_lines(file.columns)))
    return prepare(
        path.stem,
        kspace,
        mask,
        kspace,
        noise_std,
        p,
        reference,
        combine(kspace, best),
        best if p.maps == "oracle" else None,
        file.voxel_mm,
    )


def brightness_of(p: Reconstruct) -> float:
    """Return the magnitude that 99 % of the pixels of the prior's training volumes do not exceed; 1 if `p.scale` rules.

    Raises ValueError when the checkpoint does not say so, as published ones do not, and no scale is given.
    """
    reference = describe(p.weights, EMBEDDED)["data"].get("magnitude_q99")
    if reference is None and p.scale is None:
        raise ValueError(
            f"{p.weights} does not say how bright its training data are (data.magnitude_q99 in "
            "config.json), so no intensity scale can be found; give scale, or train with aid/2_train"
        )
    return reference or 1.0


def open_scans(p: Reconstruct) -> tuple[list[VolumeScan], list[VolumeScan]]:
    """Return the scans to reconstruct, and others to tune the classical methods on."""
    reference = brightness_of(p)
    few = replace(p, frames=min(p.frames, 3))  # slices enough to tune on
    validation = [simulate(few, "validation", 100 + i, reference) for i in range(p.validation_subjects)]
    if p.source == "brain":
        return [simulate(p, "test", i, reference) for i in range(p.subjects)], validation
    path = project_root() / p.source
    if not path.is_dir():
        return [read_scan(path, p, reference)], validation
    found = fastmri.scan(path)
    print(found)
    if not found.volumes:
        raise ValueError(f"{path} holds no fastMRI volume that can be read; see the reasons above")
    return [read_scan(v.path, p, reference) for v in found.volumes[: p.subjects]], validation


# ----------------------------------------------------------------------------------------------------- reconstruction


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser with what its errors look like: `alone` without context, `given` with a window of it."""

    D: Denoiser
    alone: Measured
    given: Measured | None
    window: int = 0
    start: str | None = None  # what the first slice sees, see `draw_sequence`

    @classmethod
    def load(cls, name: str, p: Reconstruct, people: int = 12, default: str = EMBEDDED) -> Prior:
        """Return a checkpoint's prior, its error measured on validation people; any image size will do.

        The context that it is measured with has errors, as draws have. default: what the name "embedded" means.
        """
        return measured_prior(name, default, p.device, p.autocast, p.image_size, p.spacing_mm, p.seed, people)


@lru_cache(maxsize=2)
def measured_prior(
    name: str,
    default: str,
    device: str,
    autocast: str | None,
    image_size: int,
    spacing_mm: float,
    seed: int,
    people: int,
) -> Prior:
    """Return what `Prior.load` does; the measurement takes longer than the loading, so the last two are kept."""
    D = load_denoiser(name, device, autocast, default=default)
    network = network_of(D)
    window = getattr(network, "seq_len", 0)
    D = AnySize(D, network.total_stride)
    x = volumes("brain", "validation", people, max(window, 3) + 1, image_size, spacing_mm).to(device)
    images = x[:, ::3].flatten(0, 1)
    blank = torch.zeros_like(images[:1, None]) if getattr(network, "concat_cond", False) else None
    alone = Measured.fit(D, images, FIT_SIGMAS, seed=seed, cond=blank)
    given = None
    if window:
        error = CONTEXT_ERROR * randn(x.shape, x.dtype, torch.Generator().manual_seed(seed), x.device)
        context = (x + error)[:, -1 - window : -1]
        given = Measured.fit(D, x[:, -1], FIT_SIGMAS, seed=seed, cond=context)
    return Prior(D, alone, given, window, "blank" if blank is not None else None)


def guidance(scan: VolumeScan, frame: int, p: Reconstruct, error: Measured) -> Guidance:
    """Return what data of one slice do to the prior, by the method of `p`."""
    A, y, s = scan.operator(frame), scan.y[frame : frame + 1], scan.noise_std
    if p.method == "annealed_gibbs":
        return posterior_mean(A, y, s, error)
    return {
        "published": lambda: landweber(A, y, s, scale=p.scale),
        "dds": lambda: dds(A, y, s),
        "ddnm": lambda: ddnm(A, y, s),
        "diffpir": lambda: diffpir(A, y, s),
        "pigdm": lambda: pigdm(A, y, s),
        "dps": lambda: dps(A, y, s),
    }[p.method]()


SOLVERS = {"annealed_gibbs": "annealed_gibbs", "published": "aid_stochastic"}  # the others: "ddim", stochastic


def reconstruct(
    prior: Prior, scan: VolumeScan, p: Reconstruct, context: str | None, seed: int, progress: bool = False
) -> SequenceSamples:
    """Return posterior draws (draw, frame, 1, y, x) of a volume, slice n given the draws of the slices before it.

    context: "full" or "last", see `CausalUNet`; None gives no slice any context, as a single-image prior works.
    """
    network, scan = network_of(prior.D), scan.to(p.device)
    sequence = isinstance(network, CausalUNet)
    given = scan.x[:1] if p.start == "truth" and scan.x is not None else None
    frames = range(0 if given is None else 1, len(scan.y))
    errors = [prior.alone if context is None or (n == 0 and given is None) else prior.given for n in frames]
    data = [guidance(scan, n, p, error) for n, error in zip(frames, errors, strict=True)]
    levels = noise_levels(prior, p)
    if sequence:
        network.context = context or "full"
    with network.caching() if sequence else contextlib.nullcontext():
        samples = reconstruct_sequence(
            prior.D,
            data,
            levels,
            seeds=range(seed, seed + p.draws),
            solver=SOLVERS.get(p.method, ddim(eta=1.0)),
            refresh=p.refresh,
            window=prior.window or None,
            context=None if given is None else given[None],
            start=prior.start,
            first_stage=context is None,
            device=p.device,
            progress=progress,
        )
    known = [] if given is None else [given[None].expand(p.draws, *[-1] * given.ndim)]
    return SequenceSamples(torch.cat([*known, samples.x], 1).cpu(), samples.bill)


def noise_levels(prior: Prior, p: Reconstruct) -> Tensor:
    """Return `p.evaluations` noise levels; for the published method those of the prior's schedule, if it has one."""
    inner = prior.D
    while hasattr(inner, "D"):
        inner = inner.D
    schedule = getattr(inner, "schedule", None)
    if p.method != "published" or schedule is None:
        return karras(p.evaluations, sigma_min=p.last_sigma, sigma_max=FIRST_SIGMA)
    return (schedule if p.evaluations == len(schedule) else schedule.respace(str(p.evaluations))).levels()


def csgm(prior: Prior, scan: VolumeScan, p: Reconstruct, seed: int) -> SequenceSamples:
    """Return draws (draw, frame, 1, y, x) by annealed Langevin dynamics, each slice by itself."""
    levels, scan = karras(p.evaluations, sigma_min=p.last_sigma, sigma_max=FIRST_SIGMA), scan.to(p.device)

    def draw_frame(n: int, cond: None, draws: list) -> Samples:
        G = posterior_mean(scan.operator(n), scan.y[n : n + 1], scan.noise_std)
        return langevin(prior.D, G, levels, seeds=draws, steps=p.langevin_steps, device=p.device)

    samples = draw_sequence(
        draw_frame,
        len(scan.y),
        shape=scan.shape,
        seeds=range(seed, seed + p.draws),
        first_stage=True,
        dtype=scan.y.dtype,
        device=p.device,
    )
    return SequenceSamples(samples.x.cpu(), samples.bill)


GRIDS = {  # searched on validation volumes
    "CG-SENSE": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "L1-wavelet": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "TV": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "BART l1-wavelet": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),  # where `bart` is installed
}


def tune_classical(validation: list[VolumeScan]) -> dict[str, float | None]:
    """Return the regularisation of each classical method with the best mean PSNR on other people's slices."""
    cases = [(s.y, s.maps, s.mask, s.x) for s in validation]
    methods = baselines.available_methods()
    tuned = {
        name: baselines.tune(methods[name], cases, grid).regularisation
        for name, grid in GRIDS.items()
        if name in methods
    }
    return {"zero-filled": None} | tuned


# ----------------------------------------------------------------------------------------------------------- scores


def score(x: Tensor, scan: VolumeScan, skip_first: bool) -> dict[str, float]:
    """Return PSNR (dB), SSIM and NRMSE of a volume x (frame, 1, y, x), of magnitudes after a least-squares scale.

    One scale and one peak for the volume; SSIM is the mean over slices.
    """
    first = int(skip_first)
    x, truth = x[first:].abs().double().cpu(), scan.x[first:].abs().double().cpu()
    x = x * ((x * truth).sum() / x.square().sum().clamp_min(1e-30))
    whole = [v.movedim(0, 1)[None] for v in (x, truth)]
    return {
        "PSNR": metrics.psnr(*whole).item(),
        "SSIM": metrics.ssim(x, truth, data_range=truth.max()).mean().item(),
        "NRMSE": metrics.nrmse(*whole).item(),
    }


@dataclass(frozen=True, eq=False)
class Study:
    """Every estimate of every volume: `rows` is a tidy table, `images` and `draws` hold the first volume's."""

    rows: list[dict]
    images: dict[str, Tensor]  # method -> (frame, 1, y, x)
    draws: dict[str, Tensor]  # model -> (draw, frame, 1, y, x)
    bills: dict[str, Bill]  # of one draw of a volume
    calibration: dict[str, float]  # variance of the draws over squared error of their mean, all volumes


def study(p: Reconstruct, scans: list[VolumeScan], validation: list[VolumeScan], progress: bool = True) -> Study:
    """Return the scores of all methods on all scans; a scan without truth is reconstructed and not scored."""
    single = Prior.load(p.single, p, default=EMBEDDED_SINGLE)
    priors = {name: single if context is None else None for name, context in MODELS.items() if name in p.models}
    if None in priors.values():
        aid = Prior.load(p.weights, p)
        priors = {name: prior or aid for name, prior in priors.items()}
    tuned = tune_classical(validation) if p.classical else {}
    methods = baselines.available_methods()
    rows, images, draws, bills, spread = [], {}, {}, {}, {}
    for i, scan in enumerate(tqdm(scans, desc="volumes", disable=not progress)):
        case = scan.y, scan.maps, scan.mask
        estimates = {name: methods[name](*case, value) for name, value in tuned.items()}
        seed = p.seed + i * p.draws
        runs = {name: reconstruct(prior, scan, p, MODELS[name], seed) for name, prior in priors.items()}
        if p.langevin_steps:
            runs["CSGM-Langevin"] = csgm(single, scan, p, seed)
        for name, samples in runs.items():
            estimates[name] = samples.x.mean(0)
            estimates[f"{name}, one draw"] = samples.x[0]
            bills[name] = samples.bill
            if scan.x is not None:
                spread.setdefault(name, []).append(calibration_terms(samples.x, scan))
        if i == 0:
            images, draws = estimates, {name: samples.x for name, samples in runs.items()}
        if scan.x is not None:
            setting = {
                "mask": f"{p.mask}, interleaved" if p.interleave else p.mask,
                "ACS": p.acs,
                "R": p.acceleration,
                "exact R": round(scan.mask.acceleration, 3),
            }
            rows += [
                {"volume": scan.name, **setting, "method": name} | score(x, scan, p.start == "truth")
                for name, x in estimates.items()
            ]
    calibration = {name: (sum(a for a, _ in pairs) / sum(b for _, b in pairs)) for name, pairs in spread.items()}
    return Study(rows, images, draws, bills, calibration)


def calibration_terms(draws: Tensor, scan: VolumeScan) -> tuple[float, float]:
    """Return the sums whose ratio over volumes is `metrics.calibration_ratio`, of magnitudes."""
    m, truth = draws.abs(), scan.x.abs()
    n = len(m)
    return ((1 + 1 / n) * m.var(0).sum()).item(), (m.mean(0) - truth).square().sum().item()


def summary(rows: list[dict], versus: str = "AID") -> list[dict]:
    """Return a table row for each method: mean and standard error over volumes, and the paired gain of `versus`.

    Of one volume there is no error, of none (no truth) no row.
    """
    if not rows:
        return []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    values = {
        m: {k: torch.tensor([row[k] for row in rows if row["method"] == m]) for k in ("PSNR", "SSIM", "NRMSE")}
        for m in methods
    }
    several = len(next(iter(values.values()))["PSNR"]) > 1
    table = []
    for method in methods:
        row = {"method": method}
        for name, unit in (("PSNR", " (dB)"), ("SSIM", ""), ("NRMSE", "")):
            v = values[method][name]
            row[name + unit] = metrics.mean_and_error(v) if several else v.item()
        if versus in values:
            for name, column in (("PSNR", f"{versus} gains (dB)"), ("SSIM", f"{versus} gains SSIM")):
                gain = values[versus][name], values[method][name]
                row[column] = metrics.mean_and_error(*gain) if several else (gain[0] - gain[1]).item()
        table.append(row)
    return table


# ------------------------------------------------------------------------------------------- measured and inferred


def measured_and_inferred(scan: VolumeScan, draws: Tensor, frame: int, prior_std: float = 0.34) -> dict[str, Tensor]:
    """Return maps of one slice, (1, y, x): what its data say and what the prior filled in.

    "measured": how much of each pixel the data determine, 0 to 1; "measured part" and "inferred part" of the mean of
    the draws (draw, frame, 1, y, x); "agreement" of the inferred part over the draws, 0 to 1; see `nullspace`.
    """
    A, weight = scan.operator(frame), (scan.noise_std / prior_std) ** 2
    x = draws[:, frame]
    inferred = x - nullspace.measured_part(A, x, weight)
    return {
        "measured": nullspace.measured_fraction(A, weight),
        "measured part": (x - inferred).mean(0),
        "inferred part": inferred.mean(0),
        "agreement": nullspace.agreement(inferred),
    }


def unfold(p: Reconstruct, frame: int = 4, acceleration: int = 2) -> dict[str, Tensor]:
    """Return the paper's single-coil unfolding: slice `frame` from every second line, the slice before it known.

    Keys "before", "truth", "zero-filled" (1, y, x) and "with", "without" context, p.draws draws (draw, 1, y, x) each.
    """
    prior, reference = Prior.load(p.weights, p), brightness_of(p)
    one = replace(
        p,
        acceleration=acceleration,
        acs=0,
        mask="equispaced",
        coils=1,
        frames=frame + 1,
        maps="oracle",
        scale=None,
        interleave=False,
    )
    full = simulate(one, "test", 0, reference)
    before, y, truth = full.x[frame - 1 : frame], full.y[frame:], full.x[frame]
    levels = karras(p.evaluations, sigma_min=p.last_sigma, sigma_max=FIRST_SIGMA)
    result = {"before": before[0], "truth": truth, "zero-filled": full.operator(frame).H(y)[0]}
    network_of(prior.D).context = "full"
    for name, context, error in (("with", before[None], prior.given), ("without", None, prior.alone)):
        G = posterior_mean(full.operator(frame), y, full.noise_std, error)
        result[name] = reconstruct_sequence(
            prior.D,
            [G],
            levels,
            seeds=range(p.seed, p.seed + p.draws),
            start=None,
            solver="annealed_gibbs",
            refresh=p.refresh,
            context=context,
            device=p.device,
        ).x[:, 0]
    return result


# ------------------------------------------------------------------------------------------------------------- grids


@dataclass(frozen=True)
class Grid(Parameters):
    """Parameters of aid/5_grid.ipynb."""

    runs: str = param("runs/aid/grid", "folder with a run of 4_reconstruct for each setting")
    methods: tuple[str, ...] = param(
        ("L1-wavelet", "TV", "single image", "AID, newest slice only", "AID"),
        "methods that the figure shows; the table has all",
    )


def average(value: float | tuple[float, float]) -> float:
    """Return the mean of a table cell, with or without its standard error."""
    return value[0] if isinstance(value, tuple) else value


SETTING = ("mask", "ACS", "R")


def gather(folder: Path) -> list[dict]:
    """Return the rows of all finished runs of 4_reconstruct below a folder: one tidy table, in the order of settings.

    Raises FileNotFoundError when there is none.
    """
    rows = [row for path in sorted(folder.glob("*/metrics.json")) for row in json.loads(path.read_text())["rows"]]
    if not rows:
        raise FileNotFoundError(f"{folder} holds no finished run of 4_reconstruct; do `companion batch aid_grid` first")
    return sorted(rows, key=lambda row: [row[name] for name in SETTING])


def settings(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Return the rows of each setting (mask, ACS, R)."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    return groups


def write_csv(path: Path, rows: list[dict]) -> Path:
    """Return the path of a CSV file of the rows, written whole."""
    with atomic_write(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
