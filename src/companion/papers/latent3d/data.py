"""Synthetic brain volumes by latent diffusion, after DIPY's VQ-VAE and diffusion project of 2023: data and training.

An autoencoder makes of a volume of 64^3 voxels a small one of 16^3 cells with a few channels, a prior learns these
latents, and the decoder turns what the prior draws into brains:

    prior = load_latent("latent3d/prior")
    z = sample(prior.D, karras(20), shape=prior.latent_shape, seeds="0-15").x
    volumes = prior.decode(z)                    # (16, 1, z, y, x) at prior.affine

The original ended in noise; latent3d_sample.py shows why, by experiment. Here the latents have mean 0 and standard
deviation 1 in every channel over the whole training set, these numbers travel with the prior, and a noise schedule that
leaves part of the signal at its end is refused before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, volumes
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.extras import extra
from companion.files import project_root
from companion.parameters import Parameters, param
from companion.training.loop import TrainResult

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of latent3d/1_data.ipynb."""

    source: str = param(
        "cohort",
        "cohort: the embedded one; digits: small 2D images, to check the code; else a folder "
        "of NIfTI volumes, such as NFBS or CC359",
    )
    data: str = param("data/latent3d_64.h5", "where the prepared volumes go; kept when it is there already")
    shape: tuple[int, ...] = param((64, 64, 64), "voxels along z, y and x (of digits: 16 16)", minimum=16)
    voxel_mm: tuple[float, ...] | None = param(
        None, "of files: voxel size along z, y and x; none: as for the cohort", minimum=0.1
    )
    subjects: int = param(1500, "virtual people to learn from, or at most so many files", minimum=1)
    validation_share: float = param(0.1, "of files: share of the people to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of files: share of the people kept for tests", minimum=0, maximum=1)
    contrast: str | None = param(None, "of files: the one to take, as in T1w; none: T1w where there are several")
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


FILES = ("voxel_mm", "validation_share", "test_share", "contrast", "people", "seed")
COHORT = "virtual cohort of companion.data.anatomy (ICBM 152), T1w"


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the prepared volumes, made and stored once as HDF5.

    Arrays: image (person, 1, z, y, x) float16 on the scale of `data.volumes`; tissue_ml (person, 3) CSF, grey and white
    matter of virtual people; affine (person, 4, 4), scale (person,). Files that cannot be used are named with the
    reason in attrs["skipped"]. Raises ValueError when no file can be used, or `p.data` holds other volumes than the
    parameters ask for.
    """
    make = {"cohort": _cohort, "digits": _digits}.get(p.source, _files)
    if make is not _digits and (len(p.shape) != 3 or (p.voxel_mm and len(p.voxel_mm) != 3)):
        raise ValueError(f"shape {p.shape} and voxel_mm {p.voxel_mm} must have three numbers each, for z, y and x")
    path, wanted = project_root() / p.data, {"source": p.source, "shape": list(p.shape), "subjects": p.subjects}
    if make is _files:
        wanted |= {name: getattr(p, name) for name in FILES}
        wanted["voxel_mm"] = list(p.voxel_mm or volumes.spacing(p.shape))
    if not path.exists():
        arrays, people, split, about = make(p, progress)
        units = {"image": "1", "tissue_ml": "mL", "affine": "mm", "scale": "as in the file"}
        write_dataset(
            path,
            arrays,
            units={name: units[name] for name in arrays},
            subjects=people,
            split=split,
            seed=p.seed,
            scale={name: volumes.SCALE if name == "image" else "1" for name in arrays},
            source=about.pop("source"),
            attrs=about | {"parameters": wanted},
        )
    prepared = open_dataset(path, require=["image"])
    made = prepared.attrs.get("parameters", {})
    if made != wanted:
        differ = ", ".join(f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        raise ValueError(f"{path} was prepared with {differ}; delete the file, or give another data file")
    return prepared


def _cohort(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return arrays, subjects, split and facts of virtual people, all for training: others are drawn when needed."""
    image, tissue = np.empty((p.subjects, 1, *p.shape), np.float16), np.empty((p.subjects, 3), np.float32)
    people = anatomy.cohort("train", p.subjects)
    for i, subject in enumerate(tqdm(people, desc="people", disable=not progress)):
        person = volumes.virtual(subject, p.shape)
        image[i, 0], tissue[i], affine = person.image, person.tissue_ml, person.affine
    seeds = [str(subject.seed) for subject in people]
    arrays = {"image": image, "tissue_ml": tissue, "affine": np.repeat(affine[None], p.subjects, 0)}
    return arrays, seeds, {"train": seeds}, {"source": COHORT, "voxel_mm": list(volumes.spacing(p.shape))}


def _files(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return arrays, subjects, split and facts of the volumes of a folder that can be used, read one at a time."""
    voxel_mm, folder = p.voxel_mm or volumes.spacing(p.shape), (project_root() / p.data).parent
    scans = volumes.find_scans(project_root() / p.source, p.contrast, p.people and project_root() / p.people)
    arrays, used, skipped = {name: Rows(folder) for name in ("image", "affine", "scale")}, {}, dict(scans.left)
    for scan in tqdm(scans, desc="files", disable=not progress):
        if len(used) == p.subjects:
            break
        try:
            volume, scale = volumes.load_scan(scan, p.shape, voxel_mm)
        except (ValueError, OSError) as error:
            skipped[scan.name] = str(error)
            continue
        arrays["image"].append(volume.array[None].astype(np.float16))
        arrays["affine"].append(volume.affine)
        arrays["scale"].append(np.float32(scale))
        used[scan.name] = scan
    if not used:
        raise ValueError("\n  ".join([f"no file of {p.source} can be used:", *skipped.values()]))
    shares = (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)
    people = split_people([scan.subject for scan in used.values()], shares, p.seed, scans.split)
    split = {part: [name for name, scan in used.items() if scan.subject in who] for part, who in people.items()}
    if progress:
        files = {who: [n for n, s in used.items() if s.subject == who] for part in people.values() for who in part}
        print(split_table(people, files))
    about = {
        "source": f"NIfTI volumes of {Path(p.source).name}",
        "voxel_mm": list(voxel_mm),
        "skipped": skipped,
        "people": {name: scan.subject for name, scan in used.items()},
        "about": {name: scan.about for name, scan in used.items()},
    }
    return arrays, list(used), split, about


def _digits(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 16 x 16; the last 297 for tests."""
    with extra("notebooks"):
        from sklearn.datasets import load_digits  # comes with nilearn

    if tuple(p.shape) != (16, 16):
        raise ValueError(f"digits have the shape (16, 16), not {p.shape}; set shape to it")
    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear").clamp(0, 1).numpy().astype(np.float16)
    names = [str(i) for i in range(len(images))]
    train = names[:1500][: p.subjects]
    return (
        {"image": images},
        names,
        {"train": train, "test": names[1500:]},
        {"source": "handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998)", "voxel_mm": [1.0, 1.0]},
    )


def held_out(prepared: Prepared, split: str, count: int) -> Tensor:
    """Return volumes (person, 1, z, y, x) of people that training never sees, the first `count` of a split.

    Of the cohort they are drawn now. Of files, where the split is empty: of the other held-out one. Raises ValueError
    where both are empty: people of the training set are never taken for others.
    """
    if prepared.source == COHORT:
        shape = prepared.shapes["image"][2:]
        return torch.stack([volumes.virtual(one, shape).image[None] for one in anatomy.cohort(split, count)])
    others = [name for name in (split, "test", "validation") if prepared.split.get(name)]
    if not others:
        raise ValueError(
            f"{prepared.path.name} holds nobody for validation or tests; prepare it again with a validation_share or "
            "test_share above 0"
        )
    items = prepared.sequences("image", others[0], 1)
    return torch.stack([items[i].float() for i in range(min(count, len(items)))])


def planes(x: Tensor) -> dict[str, Tensor]:
    """Return the middle axial, coronal and sagittal slice of a volume (1, z, y, x), head up; an image as it is."""
    if x.ndim == 3:
        return {"image": x}
    k, j, i = (n // 2 for n in x.shape[1:])
    return {"axial": x[:, k], "coronal": x[:, :, j].flip(1), "sagittal": x[..., i].flip(1)}


def histograms(x: list[Tensor], bins: int = 30) -> dict[str, tuple[list, list]]:
    """Return, for `figures.curves`, the histogram of the values above 0 of each volume, in shares of them."""
    edges = torch.linspace(0.02, volumes.CEILING, bins + 1)
    curves = {}
    for i, one in enumerate(x):
        counts = torch.histogram(one[one > 0.02].flatten(), edges).hist
        curves[f"person {i + 1}"] = ((edges[1:] + edges[:-1]) / 2).tolist(), (counts / counts.sum()).tolist()
    return curves


def mean_and_spread(prepared: Prepared, most: int = 100) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, z, y, x), voxel by voxel, of the first training volumes."""
    items = prepared.sequences("image", "train", 1)
    x = torch.stack([items[i].float() for i in range(min(most, len(items)))])
    return x.mean(0), x.std(0, correction=0)


def loss_curve(result: TrainResult, points: int = 60) -> tuple[list[float], list[float]]:
    """Return (items seen, mean loss) of a training in about `points` pieces of its log, for `figures.curves`."""
    lines = [line for line in result.stats if "loss" in line]
    width = max(1, len(lines) // points)
    pieces = [lines[i : i + width] for i in range(0, len(lines), width)]
    return [piece[-1]["images"] for piece in pieces], [sum(v["loss"] for v in piece) / len(piece) for piece in pieces]
