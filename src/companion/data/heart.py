"""A virtual cohort of beating hearts: short-axis cine of the whole chest, seeded, complex, in millimetres.

Heart *i* has its own build, ventricles, slice level, volume curve, breathing, tissue parameters, phase and bias field.
Images are (frame, y, x) as a reader hangs them: anterior wall up, right ventricle on the left, diaphragm and liver
below, left lung on the right. Everything is defined in mm with edges as soft as the voxels, so one heart is the same
at every matrix size. The magnitude is relative to the signal of blood, which is 1.

The left ventricle contracts in polar coordinates about its centre: the cavity's area follows the volume curve, and
r_epi^2 - r_endo^2 stays constant at every angle, so the myocardium thickens and its area is conserved. The slice moves
with the heart along its long axis; its twist only turns the papillary muscles.

Water and fat signals have opposite signs, as between the pass bands of bSSFP: where they share a voxel they cancel,
which draws the dark lines at fat borders. The phase of the image is of the receiver only, smooth in space and time.

Sources
    bSSFP signal: Scheffler and Lehnhardt, European Radiology 2003
    relaxation at 1.5 T: blood, heart, muscle, Stanisz et al., MRM 2005; fat, liver, spleen, marrow, de Bazelaire et
        al., Radiology 2004
    breathing curve: Lujan et al., Medical Physics 1999; heart follows diaphragm: Wang et al., MRM 1995
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.heart_canvas import POINT_SPREAD, Canvas
from companion.data.heart_parts import Heart, _chest, _ventricles

RESOLUTION_MM = 1.8  # edges are at least this soft, as through the thickness of a slice

FIELD_OF_VIEW_MM = 280.0
PHASE_RAD = 0.6  # standard deviation of the smooth phase, on top of a uniformly random constant
PHASE_DRIFT_RAD = 0.12  # of the part that changes during the cycle
FIELD_MM = 110.0  # distance between control points of the phase and the bias


def cohort(split: str, count: int) -> list[Heart]:
    """Return the first `count` hearts of a split ("train", "validation" or "test"); splits share nobody."""
    return [Heart(subject.seed) for subject in anatomy.cohort(split, count)]


@dataclass(frozen=True)
class Rendered:
    """A cine: `image` complex64 and `labels` uint8 (`LABELS`), both (frame, y, x), and when each frame was.

    The cavities are labelled with their papillary muscles and trabeculae, the myocardium is the left ventricle's.
    `times_ms` (frame,) from the first frame; `cycle` (frame,) in heart cycles, 0, 1, ... at end diastole; `volume`
    (frame,) of the left ventricle relative to end diastole; `voxel_mm` along y and x.
    """

    image: Tensor
    labels: Tensor
    voxel_mm: float
    times_ms: Tensor
    cycle: Tensor
    volume: Tensor


def render(
    subject: Heart,
    frames: int = 12,
    shape: tuple[int, int] = (64, 64),
    voxel_mm: float | None = None,
    *,
    cycles: float = 1.0,
    level: float | None = None,
    breathing: float = 1.0,
    phase_rad: float = PHASE_RAD,
    bias: float = 0.12,
) -> Rendered:
    """Return a cine of a subject from end diastole on, with the labels it came from.

    frames     at equal times over `cycles` heart cycles, the end of the last one excluded, so the cine loops
    shape      (y, x), any sizes; `voxel_mm` defaults to filling the field of view with the larger one
    level      slice position from 0 (base) to 1 (apex), by default the subject's own
    breathing  multiplies the subject's breathing; 0 is a breath-hold at expiration
    phase_rad  standard deviation of the smooth phase, on top of one uniformly random constant
    bias       relative standard deviation of the smooth receive bias
    Magnitudes are relative to blood, before the bias. Noise belongs to the measurement, not here.
    Raises ValueError for sizes or levels that cannot be.
    """
    if len(shape) != 2 or min(*shape, frames) < 1 or not cycles > 0:
        raise ValueError(f"need positive frames, cycles and shape (y, x), got {frames}, {cycles}, {shape}")
    level = subject.build.level if level is None else level
    if not 0 <= level <= 1:
        raise ValueError(f"level must lie between 0 (base) and 1 (apex), got {level}")
    voxel_mm = FIELD_OF_VIEW_MM / max(shape) if voxel_mm is None else voxel_mm
    if not voxel_mm > 0:
        raise ValueError(f"voxel_mm must be positive, got {voxel_mm}")
    cycle = torch.arange(frames, dtype=torch.float32) * (cycles / frames)
    times_ms = cycle * subject.build.cycle_ms
    y, x = ((torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * voxel_mm for n in shape)
    down = breathing * subject.diaphragm_mm(times_ms)
    canvas = Canvas(y, x, y[:, None], x, edge=math.hypot(POINT_SPREAD * voxel_mm, RESOLUTION_MM))
    chest, inside = _chest(subject, canvas, down, level)
    signal, labels = _ventricles(subject, canvas, chest, inside, cycle, down, level)
    magnitude = signal.abs() * (bias * canvas.field(subject.generator("bias"), FIELD_MM)).exp()
    generator = subject.generator("phase")
    constant = 2 * math.pi * torch.rand((), generator=generator)
    still, rise, fall = (canvas.field(generator, FIELD_MM) for _ in range(3))
    angle = 2 * math.pi * cycle[:, None, None]
    drift = (rise * angle.cos() + fall * angle.sin()) * PHASE_DRIFT_RAD / PHASE_RAD
    phase = constant + phase_rad * (still + drift)
    return Rendered(torch.polar(magnitude, phase), labels, voxel_mm, times_ms, cycle, subject.volume(cycle))
