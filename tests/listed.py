"""A small PETSIRD file of a ring scanner, written with the package petsird, and what is true of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import petsird
from petsird.helpers.create import initialize_scanner_information_dimensions

RADIUS, DEPTH, PITCH, AXIAL = 60.0, 4.0, 3.6, 5.0  # mm: to the face of the crystals, their depth, their distances
MODULES, ACROSS, RINGS, ENERGIES = 28, 4, 3, 2  # around; crystals of a module across and along; energy windows
PLACES = MODULES * ACROSS
MIDDLE = RADIUS + DEPTH / 2
TOF = (5, 30.0, 40.0)  # bins, their width and the resolution, mm


def scanner(
    *, clockwise=False, tof=True, shift=0.0, layers=1, efficiencies=None, calibration=1.0, rings=RINGS, skip=()
):
    """A scanner of one type of modules, each ACROSS x rings crystals on a flat block."""
    low, high = (0.0, -PITCH / 2, -AXIAL / 2), (DEPTH, PITCH / 2, AXIAL / 2)
    corners = [[(low, high)[k][i] for i, k in enumerate(pick)] for pick in np.ndindex(2, 2, 2)]
    crystal = petsird.BoxSolidVolume(
        shape=petsird.BoxShape(corners=[petsird.Coordinate(c=np.array(c, np.float32)) for c in corners])
    )
    block = petsird.ReplicatedBoxSolidVolume(object=crystal)
    for layer in range(layers):
        for across in range(ACROSS):
            for along in range(rings):
                place = RADIUS + layer * DEPTH, (across - (ACROSS - 1) / 2) * PITCH, (along - (rings - 1) / 2) * AXIAL
                block.transforms.append(_transform(0.0, place))
    modules = petsird.ReplicatedDetectorModule(object=petsird.DetectorModule(detecting_elements=block))
    for k in range(MODULES):
        angle = (-1 if clockwise else 1) * 2 * math.pi * k / MODULES + 0.3
        modules.transforms.append(_transform(angle, (shift, 0.0, 7.0)))
    info = petsird.ScannerInformation(
        model_name="ring", scanner_geometry=petsird.ScannerGeometry(replicated_modules=[modules])
    )
    initialize_scanner_information_dimensions(info, 1, False, False)
    bins, width, resolution = TOF if tof else (1, 150.0, 0.0)
    info.tof_bin_edges[0][0] = petsird.BinEdges(edges=np.float32((np.arange(bins + 1) - bins / 2) * width))
    info.tof_resolution[0][0] = resolution
    info.event_energy_bin_edges[0] = petsird.BinEdges(edges=np.linspace(430, 650, ENERGIES + 1, dtype=np.float32))
    info.energy_resolution_at_511[0] = 0.1
    info.prompt_event_policy = petsird.CoincidencePolicy.REJECT_HIGHER_MULTIPLES
    info.detection_efficiencies = efficiencies or petsird.DetectionEfficiencies()
    info.detection_efficiencies.calibration_factor = calibration
    return info


def _transform(angle: float, place) -> petsird.RigidTransformation:
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.array([[c, -s, 0, place[0]], [s, c, 0, place[1]], [0, 0, 1, place[2]]], np.float32)
    return petsird.RigidTransformation(matrix=matrix)


def centres(info) -> np.ndarray:
    """The middles of the crystals (module * element, 3), by the package's own helper."""
    from petsird.helpers.geometry import get_detecting_box

    modules = info.scanner_geometry.replicated_modules[0]
    found = []
    for m in range(len(modules.transforms)):
        for e in range(len(modules.object.detecting_elements.transforms)):
            box = get_detecting_box(info, 0, petsird.ExpandedDetectionBin(module_index=m, element_index=e))
            found.append(np.mean([corner.c for corner in box.corners], 0))
    return np.array(found, np.float64)


def write(path: Path, info, prompts, delayeds=None, *, blocks=3, extra=(), patient="", binary=True) -> Path:
    """The file of events (event, 3): two detection bins, the first the larger, and a TOF bin; over blocks of time."""

    def listed(events):
        return [petsird.CoincidenceEvent(detection_bins=[int(a), int(b)], tof_idx=int(t)) for a, b, t in events]

    exam = petsird.ExamInformation(patient=petsird.DICOMPatientInformation(patient_id=patient)) if patient else None
    parts = [np.array_split(np.asarray(e), blocks) if e is not None else None for e in (prompts, delayeds)]
    times = list(extra)
    for k in range(blocks):
        times.append(
            petsird.TimeBlock.EventTimeBlock(
                petsird.EventTimeBlock(
                    time_interval=petsird.TimeInterval(start=1000 * k, stop=1000 * (k + 1)),
                    prompt_events=[[listed(parts[0][k])]],
                    delayed_events=[] if parts[1] is None else [[listed(parts[1][k])]],
                )
            )
        )
    kind = petsird.BinaryPETSIRDWriter if binary else petsird.NDJsonPETSIRDWriter
    with kind(str(path)) as writer:
        writer.write_header(petsird.Header(scanner=info, exam=exam))
        writer.write_time_blocks(times)
    return path


def ordered(first, second, tof, bins: int = TOF[0], *, rng=None) -> np.ndarray:
    """Events of detectors as the format orders them: the larger detection bin first, TOF turned with it."""
    energy = np.zeros((2, len(first)), int) if rng is None else rng.integers(ENERGIES, size=(2, len(first)))
    a, b = first * ENERGIES + energy[0], second * ENERGIES + energy[1]
    swap = a < b
    return np.stack([np.where(swap, b, a), np.where(swap, a, b), np.where(swap, bins - 1 - tof, tof)], 1)


def decays(info, place, count: int, rng, *, tof: bool = True, spread: float = 1.0) -> np.ndarray:
    """Events of `count` pairs of opposite photons from a Gaussian around a point (mm), found by ray tracing alone."""
    where = centres(info)
    middle = where.mean(0)
    start = middle + np.asarray(place) + rng.normal(size=(count, 3)) * spread
    flat = rng.uniform(0, 2 * math.pi, count)
    tilt = rng.uniform(-0.2, 0.2, count)  # more would leave the rings
    along = np.stack([np.cos(flat) * np.cos(tilt), np.sin(flat) * np.cos(tilt), np.sin(tilt)], 1)
    radius = np.hypot(*(where - middle)[:, :2].T).mean()
    p, d = (start - middle)[:, :2], along[:, :2]
    b, c = (p * d).sum(1), (p * p).sum(1) - radius**2
    root = np.sqrt(b**2 - (d * d).sum(1) * c)
    ends = [(start + along * ((-b + sign * root) / (d * d).sum(1))[:, None]) for sign in (1, -1)]
    found = []
    for end in ends:
        apart = ((end[:, None, :] - where[None]) ** 2).sum(2)
        found.append((apart.argmin(1), np.sqrt(apart.min(1))))
    hit = (found[0][1] < 4.5) & (found[1][1] < 4.5)
    first, second = found[0][0], found[1][0]
    # (t1 - t2) c / 2: how much farther the first end is than the second, halved
    late = (np.linalg.norm(ends[0] - start, axis=1) - np.linalg.norm(ends[1] - start, axis=1)) / 2
    bins, width, resolution = TOF if tof else (1, 1.0, 0.0)
    late = late + rng.normal(size=count) * resolution / 2.3548
    index = np.clip(np.floor(late / width + bins / 2), 0, bins - 1).astype(int)
    return ordered(first[hit], second[hit], index[hit], bins, rng=rng)
