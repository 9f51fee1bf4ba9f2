"""Two volumes of one head brought together: rigid between contrasts, affine to the cohort's template.

The metric is Mattes' mutual information, which asks for no equal greys (Mattes et al., IEEE TMI 2003); the search is
SimpleITK's, on grids of a few millimetres, coarse to fine, always the same for the same volumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from companion.data import anatomy
from companion.data.alignment import resample
from companion.data.head_tissues import brain_mask
from companion.data.intensity import FOREGROUND, percentile_scale
from companion.data.nifti import Volume
from companion.extras import extra

STEP_MM = 3.0  # of the grids on which volumes are compared
BINS = 32
BRAIN_MM = 1.0  # grid on which a brain is looked for
WHOLE = 0.2  # share of the foreground outside of the brain from which a head is whole, not skull-stripped
SIZES_ML = (500.0, 3400.0)  # of a brain that fits the template, with its fluid; a fifth larger than the template: 3200
REACH_MM = 9.0  # around the template's brain, within which a head is compared with it
SIZES = (1.0, 0.72, 0.8, 0.9, 1.1, 1.22, 1.35)  # of a head beside the template, tried before the search
KINDS = {"rigid": "Euler3DTransform", "similarity": "Similarity3DTransform", "affine": "AffineTransform"}


@dataclass(frozen=True)
class Registration:
    """How one volume lies to another: `matrix` leads from mm in the world of the fixed one to mm in the moving one's.

    kind: rigid, similarity or affine. information: Mattes' mutual information in nats before and after. shift_mm: how
    far the matrix moves the points of the fixed head, root mean square. All fields can be stored as JSON.
    """

    matrix: tuple[tuple[float, ...], ...]
    kind: str
    information: tuple[float, float]
    shift_mm: float

    def __post_init__(self):
        object.__setattr__(self, "matrix", tuple(tuple(float(v) for v in row) for row in self.matrix))
        object.__setattr__(self, "information", tuple(self.information))

    @property
    def array(self) -> np.ndarray:
        """The matrix (4, 4)."""
        return np.array(self.matrix)

    @property
    def scale(self) -> float:
        """How much larger the moving head is than the fixed one, as a ratio of lengths."""
        return float(abs(np.linalg.det(self.array[:3, :3])) ** (1 / 3))

    def __str__(self) -> str:
        before, after = self.information
        size = "" if self.kind == "rigid" else f", {100 * self.scale:.0f} % of its size"
        return f"{self.kind}: {self.shift_mm:.1f} mm{size} (mutual information {before:.2f}, then {after:.2f})"


def moved(volume: Volume, found: Registration) -> Volume:
    """The volume in the world of the fixed one: its affine changes, no voxel is resampled."""
    return Volume(volume.array, np.linalg.inv(found.array) @ volume.affine)


def register(
    moving: Volume,
    fixed: Volume,
    kind: str = "rigid",
    *,
    inside: np.ndarray | None = None,
    centred: bool = False,
    first: Registration | None = None,
) -> Registration:
    """How `moving` lies to `fixed`, of one head or one kind of head in any contrasts.

    inside: mask (z, y, x) on the grid of `fixed`, in which they are compared. centred: begin with the centres of mass
    on one another, not with the worlds as the files give them. first: where an affine search begins. Raises ValueError
    for other kinds, or a failed search.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown registration {kind!r}; use {', '.join(KINDS)}")
    with extra("formats"):
        import SimpleITK as sitk
    target, source = (_image(sitk, upright(v)) for v in (fixed, moving))
    search = _search(sitk, fixed, inside)
    start = _affine(sitk, first) if first else _start(sitk, search, target, source, kind, centred)
    search.SetOptimizerAsRegularStepGradientDescent(2.0, 0.02, 120, relaxationFactor=0.6)
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel([4, 2, 1])
    search.SetSmoothingSigmasPerLevel([2, 1, 0])
    try:
        before = _information(search, target, source, sitk.Transform(3, sitk.sitkIdentity))
        search.SetInitialTransform(start, inPlace=True)
        search.Execute(target, source)
        after = -search.GetMetricValue()
    except RuntimeError as error:
        said = " ".join(str(error).split())[-160:]
        raise ValueError(f"the volumes could not be registered ({said}); do they show one part of a head?") from error
    matrix = np.eye(4)
    origin = np.array(start.TransformPoint((0.0, 0.0, 0.0)))
    matrix[:3, :3] = np.stack([np.array(start.TransformPoint(tuple(e))) - origin for e in np.eye(3)], 1)
    matrix[:3, 3] = origin
    return Registration(tuple(map(tuple, matrix.tolist())), kind, (before, after), _shift(matrix, fixed))


def _search(sitk, fixed: Volume, inside: np.ndarray | None):
    """SimpleITK's registration by mutual information, in a mask (z, y, x) on the grid of `fixed`."""
    search = sitk.ImageRegistrationMethod()
    search.SetNumberOfThreads(1)  # sums in another order would end elsewhere
    search.SetMetricAsMattesMutualInformation(BINS)
    search.SetMetricSamplingStrategy(search.REGULAR)
    search.SetMetricSamplingPercentagePerLevel([1.0, 0.5, 0.35])
    search.SetInterpolator(sitk.sitkLinear)
    if inside is not None:
        mask = upright(Volume(inside.astype(np.float32), fixed.affine))
        search.SetMetricFixedMask(_image(sitk, Volume((mask.array > 0.5).astype(np.uint8), mask.affine)))
    return search


def _start(sitk, search, target, source, kind: str, centred: bool):
    """Where the search begins: at the identity, or centre of mass on centre of mass, in the size that fits best."""
    make = getattr(sitk, KINDS[kind])
    if not centred:
        middle = target.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in target.GetSize()])
        start = make(3) if kind == "affine" else make()
        start.SetCenter(middle)
        return start
    empty = make(3) if kind == "affine" else make()
    placed = sitk.CenteredTransformInitializer(target, source, empty, sitk.CenteredTransformInitializerFilter.MOMENTS)
    starts = [make(placed) for _ in (SIZES if kind != "rigid" else (1.0,))]
    for start, size in zip(starts, SIZES, strict=False):
        if kind == "affine":
            start.SetMatrix((size * np.eye(3)).ravel().tolist())
        elif kind == "similarity":
            start.SetScale(size)
    return max(starts, key=lambda start: _information(search, target, source, start))


def _information(search, target, source, transform) -> float:
    search.SetInitialTransform(transform, inPlace=False)
    return -search.MetricEvaluate(target, source)


def to_template(volume: Volume) -> Registration:
    """How a head, stripped or whole, in any contrast, lies to the template of the virtual cohort (MNI), affine.

    The template has a brain only. A whole head would gladly be shrunk until its scalp lies where that brain ends, for
    outlines are most of the mutual information. So the head's brain alone is tried, too (`head_tissues.brain_mask`),
    and what counts is how much both tell of each other *inside* the brain. Raises ValueError where neither can be
    registered, and for brains of impossible size.
    """
    fixed, far = template()
    options = {"inside": far <= REACH_MM, "centred": True}
    found, failed = [], None
    for shown in (volume, brain_alone(volume)):
        if shown is None:
            continue
        try:
            first = None if shown is volume else register(shown, fixed, "similarity", **options)
            place = register(shown, fixed, "affine", first=first, **options)
            found.append((information(volume, fixed, place, far <= 0), place))
        except ValueError as error:
            failed = error
    if failed and not found:
        raise failed
    best = max(found, key=lambda pair: pair[0])[1]
    brain_ml = (far <= 0).sum() * STEP_MM**3 / 1e3 * best.scale**3
    if not SIZES_ML[0] < brain_ml < SIZES_ML[1]:
        raise ValueError(
            f"registered to the template, this brain would have {brain_ml:.0f} mL, expected {SIZES_ML[0]:g} to "
            f"{SIZES_ML[1]:g}: it lies wrong; give the brain alone (skull-stripped), or keep the volume's own grid"
        )
    return best


def brain_alone(volume: Volume) -> Volume | None:
    """A whole head with all but its brain set to 0; None where none is found, or where there is nothing else."""
    step = Volume(np.abs(volume.array), volume.affine)
    head = upright(step, BRAIN_MM)
    try:
        brain = brain_mask(head.array.transpose(2, 1, 0), (BRAIN_MM,) * 3).transpose(2, 1, 0)
    except ValueError:
        return None
    filled = percentile_scale(head.array).apply(head.array) > FOREGROUND
    if (filled & (brain < 0.5)).sum() < WHOLE * filled.sum():
        return None
    return Volume(head.array * (brain > 0.3), head.affine)


def information(moving: Volume, fixed: Volume, found: Registration, inside: np.ndarray) -> float:
    """Mattes' mutual information, nats, of two volumes that lie as `found`, in a mask (z, y, x) of the fixed one."""
    with extra("formats"):
        import SimpleITK as sitk
    target, source = (_image(sitk, upright(v)) for v in (fixed, moving))
    return _information(_search(sitk, fixed, inside), target, source, _affine(sitk, found))


def _affine(sitk, found: Registration):
    """A registration as SimpleITK's affine transform."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(found.array[:3, :3].ravel().tolist())
    transform.SetTranslation(found.array[:3, 3].tolist())
    return transform


@lru_cache(maxsize=1)
def template() -> tuple[Volume, np.ndarray]:
    """The cohort's template as a T1w volume of `STEP_MM`, and how far (z, y, x) its voxels are from its brain, mm."""
    from scipy.ndimage import distance_transform_edt

    z, y, x = (round(mm / STEP_MM) for mm in (190.0, 220.0, 190.0))
    shape = z, y, x
    maps = anatomy.tissue_maps(None, anatomy.grid_mm(shape, STEP_MM), STEP_MM)
    values = {t: anatomy.signal("T1w", *anatomy.RELAXATION[t]) for t in anatomy.TISSUES}
    image = torch.tensordot(torch.tensor([values[t] for t in anatomy.TISSUES]), maps[:3], 1) * maps[3]
    far = np.asarray(distance_transform_edt(maps[:3].sum(0).numpy() < 0.5, sampling=STEP_MM))
    return Volume(image.numpy(), anatomy.affine(shape, STEP_MM)), far


def upright(volume: Volume, step_mm: float = STEP_MM) -> Volume:
    """The volume on a grid of equal steps along x, y and z of its world, which holds all of it."""
    ends = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    size = np.array([*volume.array.shape[::-1], 1])
    corners = (ends * (size - [1, 1, 1, 0])) @ volume.affine.T
    low, high = corners[:, :3].min(0), corners[:, :3].max(0)
    count = np.maximum(np.ceil((high - low) / step_mm).astype(int) + 1, 2)
    affine = np.diag([step_mm, step_mm, step_mm, 1.0])
    affine[:3, 3] = (low + high) / 2 - step_mm * (count - 1) / 2
    return resample(volume, Volume(np.empty(count[::-1], np.bool_), affine))


def _image(sitk, volume: Volume):
    """The volume for SimpleITK, in its own world; greys cut at their percentiles."""
    array = volume.array
    if array.dtype != np.uint8:
        array = percentile_scale(array).apply(array.astype(np.float32))
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetOrigin(tuple(map(float, volume.affine[:3, 3])))
    image.SetSpacing(tuple(map(float, np.diag(volume.affine)[:3])))
    return image


def _shift(matrix: np.ndarray, fixed: Volume) -> float:
    """Root mean square distance in mm by which the matrix moves the foreground of a volume."""
    grid = upright(fixed)
    at = np.argwhere(grid.array > grid.array.mean())[:, ::-1]
    points = at @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return float(np.sqrt((((points @ matrix[:3, :3].T + matrix[:3, 3]) - points) ** 2).sum(1).mean()))
