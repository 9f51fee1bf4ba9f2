"""3D sinograms to slices, so that 2D methods and 2D priors can have them: single-slice rebinning."""

from __future__ import annotations

import torch
from torch import Tensor

from companion.operators.cylinder import Cylinder
from companion.operators.linear import Diagonal, LinearOperator
from companion.operators.pet import ParallelBeam, Projector


def ssrb(y: Tensor, scanner: Cylinder) -> Tensor:
    """Slices (..., 1, 2 rings - 1, angle, bin) of 3D counts (..., 1, [tof,] plane, angle, bin): sums, so Poisson still.

    A line between two rings counts for the slice half-way (Daube-Witherspoon and Muehllehner 1987), which blurs what is
    far from the axis along z; the slices are half a ring apart. TOF bins are added up.
    """
    if tuple(y.shape[-len(scanner.sinogram_shape) :]) != scanner.sinogram_shape:
        raise ValueError(f"counts {tuple(y.shape)}, but the scanner measures (..., {scanner.sinogram_shape})")
    y = y.sum(-4) if scanner.tof_bins > 1 else y
    middles = torch.tensor([sum(plane[0]) for plane in scanner.planes], device=y.device)
    slices = y.new_zeros(*y.shape[:-3], 2 * scanner.rings - 1, *y.shape[-2:])
    return slices.index_add_(-3, middles, y)


def rebinned_model(scanner: Cylinder) -> LinearOperator:
    """The model of `ssrb` of a scan: pairs of rings per slice times a stack of slices (2 rings - 1, y, x).

    As if all lines lay in the slices; attenuation and calibration are further factors.
    """
    pairs = torch.zeros(2 * scanner.rings - 1)
    for plane in scanner.planes:
        pairs[sum(plane[0])] += len(plane)
    shape = (2 * scanner.rings - 1, *scanner.shape[1:])
    ring = None if scanner.arc_corrected else scanner.radius_mm
    beam = ParallelBeam(shape, scanner.angles, scanner.bins, scanner.voxel_mm[1], scanner.bin_mm, radius_mm=ring)
    return Diagonal(pairs[:, None, None], beam.sinogram_shape) @ Projector(beam)
