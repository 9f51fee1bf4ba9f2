"""The study of real_scan: one slice of a raw file, or of a head that is scanned here, from k-space to an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from companion.acquisition.measurement import LEAST, Measurement, prepare_scan, reference_image
from companion.acquisition.redundancy import with_real_noise
from companion.acquisition.slices import centred_affine, scan_of, simulated
from companion.data import anatomy
from companion.data.dicom.write import write_dicom
from companion.data.nifti import save_nifti
from companion.data.raw.scan import RawScan, gapless
from companion.data.virtual import slices
from companion.diffusion.denoisers import AnySize, Denoiser
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sets import EachSet
from companion.files import project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.models.errors import for_pixels, load_errors
from companion.models.general import BY_PIXELS
from companion.operators.masks import cartesian_mask
from companion.parameters import Parameters, param
from companion.reconstruction.held_out import Classical
from companion.reconstruction.trust import Trust
from companion.reconstruction.whole_scan import Volume, reconstruct_slices

VIRTUAL = "virtual"
FULL = 0.6  # share of k-space above which a scan without gaps counts as fully sampled: it may be undersampled here


@dataclass(frozen=True)
class RealScan(Parameters, out="runs/general/real_scan/notebook"):
    """Parameters of real_scan.ipynb."""

    source: str = param(
        VIRTUAL,
        "a raw file or folder of any format that `companion look` knows; a head as NIfTI or DICOM is scanned here",
    )
    axes: str | None = param(None, "names of the stored axes of arrays that do not tell them, as in 'coil y x'")
    which: str | None = param(
        None, "of several repetitions, contrasts or frames: which of them, as in 'repetition 0, frame 3'"
    )
    slice: int | None = param(None, "which slice; none: the middle one", minimum=0)
    acceleration: float | None = param(4.0, "R of the lines kept of fully sampled data; none: all that was measured")
    mask: str = param("equispaced", "kind of the lines kept", choices=("equispaced", "random", "poisson_disc"))
    acs: int = param(24, "centre lines that coil maps are made from", minimum=8)
    coils: int = param(8, "receive coils of a head that is scanned here", minimum=1)
    noise_std: float = param(0.01, "its k-space noise per real component; bright tissue is 1", minimum=1e-5)
    image_size: int = param(256, "pixels along y and x of a virtual head", minimum=64)
    weights: str = param(BY_PIXELS, "checkpoint of complex images of any size; general: the one for such pixels")
    draws: int = param(4, "posterior draws", minimum=2)
    evaluations: int = param(30, "network evaluations a draw", minimum=LEAST)
    seconds: float | None = param(
        None, "time for draws and trial, which then says how many evaluations; none: as many as given", minimum=1
    )
    all_slices: bool = param(False, "reconstruct every slice of the scan, as this one; a run that was stopped goes on")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))

    def before_start(self) -> None:
        """Raise for a source that is not there."""
        if self.source != VIRTUAL and not (project_root() / Path(self.source).expanduser()).exists():
            raise FileNotFoundError(f"there is no source {self.source}; name a file or folder, or {VIRTUAL}")


@dataclass(frozen=True, eq=False)
class Case:
    """One slice: its data y = A x + n, and the image of all of k-space, where all of it was measured.

    scan: as it came, and what it says of itself. lines: (*space) those kept of fully sampled data, None: all that was
    measured. kept: the samples that are used, (*space). m: the measurement of those. reference: (1, 1, y, x) magnitudes
    in the units of m.
    """

    name: str
    scan: RawScan
    lines: Tensor | None
    kept: Tensor
    m: Measurement
    reference: Tensor | None

    @property
    def pixel_mm(self) -> float | None:
        """The smaller side of a pixel, where the file says it."""
        return None if self.scan.voxel_mm is None else min(self.scan.voxel_mm[-2:])


def prepare(p: RealScan) -> Case:
    """The slice that the notebook is about.

    A 3D scan falls into slices along its readout. Raises FileNotFoundError or Unreadable for a source that cannot be
    read, ValueError for several scans, a slice that is not there, and data without a fully sampled centre.
    """
    if p.source == VIRTUAL:
        pixel = anatomy.FIELD_OF_VIEW_MM / p.image_size
        scan = simulated(slices("test", 1, p.image_size), p.coils, p.noise_std, (pixel,) * 3, p.seed)
        name, i = "a virtual head", 0
    else:
        path = (project_root() / Path(p.source).expanduser()).resolve()
        name, scan, i = scan_of(path, p.axes, p.slice, p.coils, p.noise_std, p.seed, p.which)
    if not 0 <= i < len(scan.kspace):
        raise ValueError(f"slice={i}: {name} has slices 0 to {len(scan.kspace) - 1}")
    kept = scan.mask[min(i, len(scan.mask) - 1), 0] != 0
    full = kept.float().mean().item() > FULL and gapless(kept)
    lines = None
    if full and p.acceleration is not None:
        acs = min(p.acs, kept.shape[-1])
        lines = cartesian_mask(tuple(kept.shape), p.acceleration, p.mask, acs=acs, seed=p.seed).mask.expand(kept.shape)
        kept = kept & (lines != 0)
    m = with_real_noise(prepare_scan(scan, slice(i, i + 1), mask=kept.float()).to(p.device))
    reference = reference_image(scan.kspace[i].to(p.device), m) if full and m.y.shape[2:] == kept.shape else None
    return Case(name, scan, lines, kept, m, reference)


def prior(
    weights: str, device: str = "cpu", autocast: str | None = None, pixel_mm: float | None = None
) -> tuple[Denoiser, Mapping[str, ErrorModel]]:
    """The denoiser, for any size and number of sets of coil maps, and the models of its error at such pixels first."""
    D = load_denoiser(weights, device=device, autocast=autocast)
    return EachSet(AnySize(D, network_of(D).total_stride)), for_pixels(load_errors(weights), pixel_mm)


def study_all(
    p: RealScan,
    case: Case,
    D: Denoiser,
    found: Trust,
    classical: Classical,
    evaluations: int,
    progress: bool = True,
) -> Volume:
    """All slices of the scan as the one that was asked; those that are done are kept under `p.out`."""
    m = case.m.one(0)
    each = m.cost(D, p.draws, evaluations)
    print(f"{len(case.scan.kspace)} slices, {each} for each")
    return reconstruct_slices(
        D, case.scan, case.lines, m, found, classical,
        seeds=range(p.seed, p.seed + p.draws), evaluations=evaluations, folder=project_root() / p.out / "slices",
        progress=progress,
    )  # fmt: skip


def write(case: Case, folder: Path, **images: Tensor) -> list[Path]:
    """Each of the magnitudes (slice, y, x) as a NIfTI file and as a DICOM series; all files."""
    paths = []
    for name, image in images.items():
        array = image.abs().cpu().numpy()
        affine = centred_affine(case.scan.voxel_mm, array.shape)
        paths.append(save_nifti(folder / f"{name}.nii.gz", array, affine=affine))
        paths += write_dicom(folder / f"dicom_{name}", array, affine, f"companion: {name}")
    return paths
