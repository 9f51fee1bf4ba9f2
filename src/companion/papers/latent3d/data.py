"""Prepared volumes: virtual people, digits to check the code in 2D, and folders of brains; who is held out.

Synthetic brain volumes by latent diffusion follow DIPY's VQ-VAE and diffusion project of 2023, which ended in noise;
`failures.mistakes` shows why, by experiment. Here latents have mean 0 and standard deviation 1 in every channel over
the whole training set, these numbers travel with the prior, and a noise schedule that leaves part of the signal at its
end is refused before training.
"""

from __future__ import annotations

from dataclasses import dataclass

from companion.data import volumes
from companion.data.store import Prepared, prepare_once
from companion.data.volume_folder import (
    COHORT,
    PATIENTS,
    TEMPLATES,
    UNITS,
    Reading,
    digits,
    read_folder,
    virtual_people,
)
from companion.files import project_root
from companion.parameters import Parameters, param


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of latent3d/1_data.ipynb."""

    source: str = param(
        "cohort",
        "cohort: healthy virtual people of one template; patients: virtual ones of many sizes and ages, with lesions; "
        "digits: small 2D images, to check the code; else a folder of NIfTI volumes, such as NFBS or CC359",
    )
    heads: str | None = param(
        None, "of patients: folder of real heads (companion data get heads); none: the template alone"
    )
    more_heads: bool = param(False, "with those of companion data get more-heads")
    whole: float = param(
        0.0, "of patients: share shown as whole heads in any position, for an autoencoder", minimum=0, maximum=1
    )
    data: str = param("data/latent3d_64.h5", "where the prepared volumes go; kept when it is there already")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared volumes, made and stored once as HDF5.

    Arrays: image (person, 1, z, y, x) float16 on the scale of `data.volumes`; tissue_ml (person, 3) CSF, grey and white
    matter of virtual people; affine (person, 4, 4), scale (person,). Files that cannot be used are named with the
    reason in attrs["skipped"]. Raises ValueError when no file can be used, or `p.data` holds other volumes than the
    parameters ask for.
    """
    path, wanted = project_root() / p.data, p.pick("source", "shape", "subjects")
    if p.source == "digits" and tuple(p.shape) != (16, 16):
        raise ValueError(f"digits have the shape (16, 16), not {p.shape}; set shape to it")
    if p.source != "digits" and (len(p.shape) != 3 or (p.voxel_mm and len(p.voxel_mm) != 3)):
        raise ValueError(f"shape {p.shape} and voxel_mm {p.voxel_mm} must have three numbers each, for z, y and x")
    if p.source == "patients":
        wanted |= {"heads": p.heads} | {k: v for k, v in p.pick("more_heads", "whole").items() if v}
    elif p.source not in ("cohort", "digits"):
        wanted |= p.pick("validation_share", "test_share", "contrast", "strip", "people", "seed")
        wanted["voxel_mm"] = p.voxel_mm or volumes.spacing(p.shape)

    def make() -> dict:
        if p.source == "digits":
            made = digits(p.subjects)
        elif p.source in ("cohort", "patients"):
            heads = project_root() / p.heads if p.source == "patients" and p.heads else None
            of = COHORT if p.source == "cohort" else PATIENTS if heads else TEMPLATES
            made = virtual_people(of, p.subjects, p.shape, heads, progress, p.more_heads, p.whole)
        else:
            made = read_folder(project_root() / p.source, path.parent, p, p.seed, progress)
        names = made["arrays"]
        scale = {name: volumes.SCALE if name == "image" else "1" for name in names}
        return made | {"units": {name: UNITS[name] for name in names}, "scale": scale, "seed": p.seed}

    return prepare_once(path, wanted, make, ["image"])
