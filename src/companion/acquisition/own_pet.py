"""A PET scan of one's own: read with its geometry and units, reconstructed on a grid of one's choice, and written back.

    own = OwnScan.read("my_scan.npz", image_size=64, pixel_mm=3.5)
    x = map_rdp(own.scan.y, own.scan.A, own.scan.background).x  # (slice, 1, y, x), kBq/mL
    own.write("results", "MAP", x, "SUV")  # MAP.nii.gz and MAP_dicom/

`write_example` writes such a scan of a virtual person.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.acquisition.pet import Scan, acquire, scanner
from companion.data import anatomy
from companion.data.alignment import resample
from companion.data.dicom.write import write_dicom
from companion.data.intake.look import find
from companion.data.intensity import magnitudes
from companion.data.nifti import Volume, centred_affine, save_nifti
from companion.data.pet import FIELD_MM, Slices, place_lesions, render
from companion.data.scan_geometry import BY_DOSE, UNITS, Dosage, Geometry
from companion.data.sinograms import Sinograms, read_sinograms, write_sinograms
from companion.operators.pet import ParallelBeam, attenuation_factors
from companion.parameters import param

RESULT_UNITS = ("kBq/mL", "Bq/mL", "SUV")


@dataclass(frozen=True)
class Lines:
    """The part of a form that says how one's own sinograms lie in space; what is None is as the file says."""

    geometry: str | None = param(None, "JSON file of the scan's geometry and units; none: the .json beside the scan")
    angles: int | None = param(None, "of the sinogram; none: as its geometry file says", minimum=1)
    bins: int | None = param(None, "of the sinogram, per angle", minimum=1)
    bin_mm: float | None = param(None, "distance of the bins, mm", minimum=1e-3)
    bin_offset: float | None = param(None, "bins by which the axis of rotation lies behind the middle of the bins")
    radius_mm: float | None = param(None, "of the ring, for bins that are not arc corrected, mm", minimum=1)
    pixel_mm: float | None = param(None, "of the image; none: 224 mm over image_size", minimum=1e-2)

    @property
    def placed(self) -> dict:
        """What the form says of the geometry."""
        return {name: getattr(self, name) for name in ("angles", "bins", "bin_mm", "bin_offset", "radius_mm")}


@dataclass(frozen=True)
class Placing(Lines):
    """The same of an emission scan, and the units of its activity."""

    units: str | None = param(
        None, "of the activity that the scan's factors are for, where its file is silent", choices=(*UNITS, None)
    )
    result_units: str = param("kBq/mL", "of the NIfTI and DICOM written", choices=RESULT_UNITS)


@dataclass(frozen=True, eq=False)
class OwnScan:
    """Scans of slices in kBq/mL (relative activity where not `calibrated`), and how to write what comes out."""

    scan: Scan
    beam: ParallelBeam
    file: Sinograms
    calibrated: bool = True

    @classmethod
    def read(
        cls,
        path: str | os.PathLike,
        image_size: int,
        pixel_mm: float | None = None,
        *,
        about: str | os.PathLike | None = None,
        placed: Mapping | None = None,
        units: str | None = None,
    ) -> OwnScan:
        """The scan of an .npz, of a JSON file that names arrays, or of an Interfile header, see `data.sinograms`.

        image_size, pixel_mm: of the image, by default FIELD_MM wide. about: the geometry file, by default the one
        beside it. placed: names of `Geometry` with values that go before the file's, None for those that do not.
        Without any, the geometry is twice as many angles as pixels, and one bin a pixel. units: of the activity that
        its factors are for, where the file is silent. Raises FileNotFoundError, or ValueError for what cannot be used.
        """
        file = read_sinograms(Path(path), about)
        pixel_mm = FIELD_MM / image_size if pixel_mm is None else pixel_mm
        beam = placing(file, image_size, pixel_mm, placed or {}).beam(image_size, pixel_mm)
        P = scanner(beam.shape, beam.pixel_mm, beam=beam)
        step = None if file.slice_mm is None else file.slice_mm / pixel_mm
        scan = Scan(None, *file.emission(P, units), step=step)
        return cls(scan, beam, file, (file.units or units) != "counts")

    @property
    def affine(self) -> np.ndarray:
        """From (x, y, z) indices to mm, the axis of rotation and the middle slice at 0: rows run from +y to -y.

        The patient is taken to lie on the back, head first: +x to the right hand, +y to the nose (RAS+).
        """
        shape = (len(self.scan.y), *self.beam.slice_shape)
        affine = centred_affine(shape, (self.file.slice_mm or self.beam.pixel_mm, *[self.beam.pixel_mm] * 2))
        return np.diag([1.0, -1.0, 1.0, 1.0]) @ affine

    def with_mr(self, path: str | os.PathLike) -> OwnScan:
        """The same with the MR of `mr` beside its counts."""
        return replace(self, scan=replace(self.scan, mr=self.mr(path)))

    def mr(self, path: str | os.PathLike) -> Tensor:
        """An MR image of the same person (NIfTI, a DICOM series, ...) on the grid of this scan, (slice, 1, y, x).

        It must be registered to the activity that `write` writes: worlds are taken to be the same, nothing is moved.
        Raises FileNotFoundError, or ValueError where there is not one volume of magnitudes, or it lies beside the scan.
        """
        items = find(path).items
        if len(items) != 1:
            raise ValueError(f"{path} holds {len(items)} images; name the file or series of the MR")
        volume = items[0].read()
        array = magnitudes(volume.array, str(path))
        grid = Volume(np.empty((len(self.scan.y), *self.beam.slice_shape), bool), self.affine)
        try:
            found = resample(Volume(array, volume.affine), grid)
        except ValueError as error:
            raise ValueError(
                f"{path} does not lie where the scan does ({error}); reconstruct without it first, and register it to "
                "the NIfTI that comes out"
            ) from None
        return torch.from_numpy(found.array)[:, None].float()

    def write(self, folder: str | os.PathLike, name: str, x: Tensor, units: str = "kBq/mL") -> list[Path]:
        """The paths of activity x (slice, 1, y, x), kBq/mL, written as NIfTI and as a DICOM series of PET.

        units: "kBq/mL", "Bq/mL" or "SUV"; DICOM has Bq/mL for the first two. A scan without calibration is written in
        relative numbers, as NIfTI only. Raises ValueError where the SUV is not known.
        """
        folder, values = Path(folder), x.detach().cpu().double().numpy()[:, 0]
        if not self.calibrated:
            return [
                save_nifti(folder / f"{name}.nii.gz", values.astype(np.float32), affine=self.affine, units="counts")
            ]
        per = {"kBq/mL": 1.0, "Bq/mL": 1e-3}.get(units) or self.kbq_per_suv()
        shown = values / per
        nifti = save_nifti(folder / f"{name}.nii.gz", shown.astype(np.float32), affine=self.affine, units=units)
        stored = shown if units == "SUV" else 1000 * values
        files = write_dicom(
            folder / f"{name}_dicom", stored, self.affine, f"PET {name}",
            units="g/mL" if units == "SUV" else "Bq/mL", modality="PT",
        )  # fmt: skip
        return [nifti, *files]

    def kbq_per_suv(self) -> float:
        """The kBq/mL of an SUV of 1; ValueError where the file does not say weight and dose."""
        try:
            return self.file.dosage.kbq_per_suv()
        except ValueError:
            raise ValueError(f"{self.file.path}: no SUV can be written: {BY_DOSE}, in its geometry file") from None


def example_people(slices: int, image_size: int) -> Slices:
    """Slices of a virtual person of the test set that follow one another at the size of a pixel, with a lesion."""
    subject, pixel_mm = anatomy.cohort("test", 1)[0], FIELD_MM / image_size
    heights = sum(anatomy.SLAB_MM) / 2 + pixel_mm * (torch.arange(slices) - (slices - 1) / 2)
    one = render(subject, (slices, image_size, image_size), pixel_mm, heights, place_lesions(subject, 1, heights))
    image, labels, lesions, mu = (one.slices(name) for name in ("image", "labels", "lesions", "mu"))
    return Slices(image, labels, lesions, mu, torch.full((slices,), subject.seed), heights, pixel_mm)


def write_example(
    path: str | os.PathLike,
    geometry: Geometry,
    slices: int = 2,
    counts: float = 1e6,
    image_size: int = 64,
    seed: int = 0,
) -> Path:
    """The path of an example scan, .npz and .json, of a virtual person: what a file of one's own has to hold.

    counts: true ones of a slice; as many randoms and scattered ones together as a quarter of them come on top. The
    person weighs 70 kg and got 200 MBq of F-18 an hour before.
    """
    people = example_people(slices, image_size)
    beam = geometry.beam(image_size, people.pixel_mm)
    seeds = [seed + i for i in range(slices)]
    physics = {"randoms": 0.15, "scatter": 0.1, "pixel_mm": people.pixel_mm, "beam": beam}
    scan = acquire(people.image, people.mu, counts, seeds, **physics)
    assert scan.background is not None  # of randoms and scatter
    # A = calibration x attenuation x line integrals: the first two are the factors
    attenuated = scanner(beam.shape, beam.pixel_mm, people.mu, beam=beam)(people.image)
    calibration = counts / attenuated.sum((1, 2, 3), keepdim=True)
    factors = calibration * attenuation_factors(scanner(beam.shape, beam.pixel_mm, beam=beam), people.mu)
    return write_sinograms(
        path, scan.y[:, 0].numpy(), geometry=geometry, units="kBq/mL", factors=factors[:, 0].numpy(),
        background=scan.background[:, 0].numpy(), slice_mm=people.pixel_mm,
        dosage=Dosage(weight_kg=70, dose_MBq=200, uptake_min=60, half_life_min=109.77),
    )  # fmt: skip


def write_example_mr(path: str | os.PathLike, slices: int = 2, image_size: int = 64) -> Path:
    """The path of a T1-weighted MR of the person of `write_example`, beside that scan: <stem>_mr.nii.gz.

    Pixels are half as wide as those of the image, and lie where the result will; it does not show the lesion.
    """
    people = example_people(slices, image_size)
    subject, n, pixel = anatomy.Subject(int(people.subject[0])), 2 * image_size, people.pixel_mm / 2
    maps = anatomy.tissue_maps(subject, anatomy.grid_mm((slices, n, n), pixel, people.height_mm), pixel)
    affine = np.diag([1.0, -1.0, 1.0, 1.0]) @ centred_affine((slices, n, n), (people.pixel_mm, pixel, pixel))
    image = anatomy.image_from_tissue(subject, maps, "T1w").numpy()
    return save_nifti(Path(path).with_name(f"{Path(path).stem}_mr.nii.gz"), image, affine=affine)


def placing(file: Sinograms, image_size: int, pixel_mm: float, placed: Mapping) -> Geometry:
    """The geometry of a scan: the file's, with the values of `placed` that are not None; the default one if none is."""
    if file.geometry is not None:
        return file.geometry.changed(placed)
    given = {name: value for name, value in placed.items() if value is not None}
    return Geometry.of(given) if given else Geometry.published(image_size, pixel_mm)


def check_pixels(stated, pixel_mm: float, name: str, least: float = 0.9) -> None:
    """Raise ValueError where a network was trained for other pixels: `stated` mm, a number, a range or "1 to 4".

    Pixels may differ by the factor `least` and its inverse.
    """
    if isinstance(stated, str):
        stated = [float(number) for number in re.findall(r"\d+\.?\d*", stated)]
    low, high = (min(stated), max(stated)) if isinstance(stated, list | tuple) else (stated, stated)
    if not low * least <= pixel_mm <= high / least:
        said = f"{low:g} mm" if low == high else f"{low:g} to {high:g} mm"
        raise ValueError(
            f"{name} was trained for pixels of {said}, and the image has {pixel_mm:.4g} mm; set image_size or pixel_mm "
            f"so that they agree (224 mm over image_size by default), or give weights for {pixel_mm:.4g} mm"
        )
