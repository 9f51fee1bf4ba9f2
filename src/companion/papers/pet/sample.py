"""PET's sampling: activity drawn from a prior, or given the MLEM images of a low-dose scan; and how it is kept.

Parameters and assembling functions of notebooks/pet/3_sample; the loop is `companion.diffusion.sampling.sample`. What
is written keeps all that a metric will ask for: seeds, whose slice it was, true activity, counts and scale, in kBq/mL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from companion.acquisition.pet import acquire, as_condition, iterates, mean_sensitivity
from companion.data.nifti import save_nifti
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.class_guidance import ClassGuidance
from companion.diffusion.denoisers import Denoiser, EDMDenoiser
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, find_solver, sample
from companion.diffusion.solvers import SOLVERS, HeunChurn, Solver
from companion.evaluation import metrics
from companion.files import atomic_write, project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import describe, load_denoiser
from companion.papers.pet.data import PEOPLE, held_out
from companion.parameters import Parameters, param
from companion.randomness import parse_seeds

EMBEDDED = "pet/prior"
FORMATS = ("npz", "hdf5", "nifti", "png")
SEED_STEP = 1_000_000  # draw s of scan i has the seed s + i * SEED_STEP, so that no two scans share their noise
GREY = 65535  # levels of a 16-bit PNG


@dataclass(frozen=True)
class SampleModel(Parameters):
    """Parameters of pet/3_sample.ipynb."""

    weights: str = param(EMBEDDED, "what to draw from: an embedded name or a folder; conditional or not")
    seeds: str = param("0-15", 'draws, of each scan if conditional: "0-63,80" or a list')
    label: int | None = param(None, "class label, if the network was trained with them; none: of no class", minimum=0)
    guidance: float = param(1.0, "weight of the class label; 1 as trained, above 1 exaggerates", minimum=0)
    source: str = param("cohort", "of scans: cohort, held-out virtual people; else a prepared file with a test split")
    subjects: int = param(16, "held-out slices: to scan if conditional, else to compare with", minimum=2)
    lesions: int = param(1, "of each held-out virtual person", minimum=0)
    counts: float = param(
        2.5e5, "true counts of each scan of virtual people; 2.5e5 is the published low dose", minimum=1
    )
    solver: str = param("heun", "any of companion.diffusion.SOLVERS", choices=tuple(SOLVERS))
    steps: int = param(18, "steps from first_sigma to 0", minimum=1)
    first_sigma: float = param(40.0, "highest noise level, in network units", minimum=1e-3)
    last_sigma: float = param(0.01, "lowest noise level above 0", minimum=1e-5)
    S_churn: float = param(5.0, "heun_churn: noise added and removed over all steps; published: 40", minimum=0)
    S_min: float = param(0.05, "heun_churn: lowest noise level with churn", minimum=0)
    S_max: float = param(50.0, "heun_churn: highest noise level with churn", minimum=0)
    S_noise: float = param(1.003, "heun_churn: size of added noise", minimum=0)
    batch_size: int = param(16, "images at a time", minimum=1)
    formats: tuple[str, ...] = param(FORMATS, "files to write", choices=FORMATS)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


@dataclass(frozen=True, eq=False)
class Cases:
    """What conditional draws are given: slices of held-out people and their scans. Images in kBq/mL.

    name (slice): subject and height or number. truth (slice, 1, y, x), mlem (slice, iterate, y, x), counts (slice,)
    measured, sensitivity (slice,), see `pet.mean_sensitivity`.
    """

    name: list[str]
    truth: Tensor
    mlem: Tensor
    counts: Tensor
    sensitivity: Tensor

    def condition(self, data: dict) -> Tensor:
        """What the network of a checkpoint whose config says `data` is given."""
        cond = as_condition(self.mlem, self.sensitivity, data["scale_kbq"])
        return cond if data["dose_channel"] else cond[:, :-1]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Drawn activity x (slice, draw, 1, y, x) in kBq/mL, one slice if unconditional; what it was given; its bill."""

    x: Tensor
    seeds: list[int]
    cases: Cases | None
    bill: Bill
    about: dict  # weights, solver and scale, for files


def load_model(p: SampleModel) -> tuple[EDMDenoiser, dict]:
    """Return the denoiser of a checkpoint and the "data" of its config.

    Raises ValueError for weights that were not trained by pet/2_train.
    """
    data = describe(p.weights, EMBEDDED).get("data", {})
    if missing := {"scale_kbq", "task", "image_size", "pixel_mm"} - data.keys():
        raise ValueError(
            f"the config of {p.weights} does not state {', '.join(sorted(missing))} of its data, so its "
            "activity has no units; give weights made by pet/2_train"
        )
    return load_denoiser(p.weights, p.device, p.autocast, EMBEDDED), data


def held_out_cases(data: dict, p: SampleModel) -> Cases:
    """Return the slices that `p.source` holds out, with scans of the geometry that the network knows.

    Virtual people are scanned with `p.counts`; a prepared file has its own scans. Raises ValueError for a file without
    test split, or prepared with other MLEM iterates than the network was trained on.
    """
    iterations = data.get("iterations", [15])
    if p.source == "cohort":
        s = held_out("test", p.subjects, data["image_size"][-1], lesions=p.lesions)
        mu = s.mu if data.get("attenuation", True) else None
        scan = acquire(s.image, mu, p.counts, range(p.seed, p.seed + len(s.image)), pixel_mm=s.pixel_mm)
        names = [f"subject {i}, {z:.0f} mm" for i, z in zip(s.subject.tolist(), s.height_mm.tolist(), strict=True)]
        return Cases(names, s.image, iterates(scan, iterations), scan.y.flatten(1).sum(1), mean_sensitivity(scan.A))
    prepared = open_dataset(project_root() / p.source, require=["activity", "mlem", "sensitivity", "counts"])
    if not prepared.split.get("test"):
        raise ValueError(f"{p.source} has no test split; prepare it with a held_out_share")
    made = prepared.attrs["parameters"]["iterations"]
    if made != list(iterations):
        raise ValueError(
            f"{p.source} was prepared with MLEM iterates {made}, but {p.weights} was trained on "
            f"{iterations}; prepare it with those"
        )
    return _prepared_cases(prepared, p.subjects)


def _prepared_cases(prepared: Prepared, count: int) -> Cases:
    """`count` slices spread over all test slices of a file."""
    arrays = [torch.from_numpy(prepared.read(n, "test")) for n in ("activity", "mlem", "counts", "sensitivity")]
    depth, total = arrays[0].shape[1], arrays[0].shape[:2].numel()
    at = torch.linspace(0, total - 1, min(count, total)).round().long()
    names = [f"{prepared.split['test'][i // depth]}, slice {i % depth}" for i in at.tolist()]
    return Cases(names, *(array.flatten(0, 1)[at] for array in arrays))


def chosen_solver(p: SampleModel) -> Solver:
    """Return the solver that parameters ask for; heun_churn with its own numbers."""
    if p.solver == HeunChurn.name:
        return HeunChurn(p.S_churn, p.S_min, p.S_max, p.S_noise)
    return find_solver(p.solver)


def with_label(D: EDMDenoiser, p: SampleModel) -> Denoiser:
    """Return D bound to the class label, if there is one. Raises ValueError for labels that D does not know."""
    classes = network_of(D).num_classes
    if p.label is None:
        if p.guidance != 1:
            raise ValueError(f"guidance {p.guidance} has no label to weigh; give a label, or guidance 1")
        return D
    if classes is None or p.label >= classes:
        knows = "no classes" if classes is None else f"classes 0 to {classes - 1}"
        raise ValueError(f"label {p.label}: {p.weights} knows {knows}")
    return ClassGuidance(D, p.label, p.guidance)


def draw(D: EDMDenoiser, data: dict, p: SampleModel, cases: Cases | None = None, progress: bool = True) -> Drawn:
    """Return one draw per seed: from the prior, or of each case if the network is conditional.

    A seed gives the same bits in the same batch, and the same image to rounding in any other. Warns when churn
    saturates. Raises ValueError for a conditional network without cases.
    """
    seeds, conditional = parse_seeds(p.seeds), data["task"] == "conditional"
    if conditional and cases is None:
        raise ValueError(f"{p.weights} is conditional; give the cases that it should enhance (held_out_cases)")
    cond = cases.condition(data).to(p.device).repeat_interleave(len(seeds), 0) if conditional else None
    count = len(cases.truth) if conditional else 1
    samples = sample(
        with_label(D, p),
        karras(p.steps, p.last_sigma, p.first_sigma),
        shape=(1, *data["image_size"]),
        seeds=[s + i * SEED_STEP for i in range(count) for s in seeds],
        solver=chosen_solver(p),
        device=p.device,
        cond=cond,
        batch_size=p.batch_size,
        progress=progress,
    )
    x = (samples.x * data["scale_kbq"]).cpu().unflatten(0, (count, len(seeds)))
    about = {
        name: getattr(p, name)
        for name in ("weights", "solver", "steps", "first_sigma", "last_sigma", "label", "guidance")
    }
    about |= {
        name: data[name] for name in ("scale_kbq", "units", "pixel_mm", "task", "target", "iterations") if name in data
    }
    return Drawn(x, seeds, cases if conditional else None, samples.bill, about)


# ------------------------------------------------------------------------------------------------------------- files


def write(drawn: Drawn, folder: str | os.PathLike, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Return the files written to a folder, each with the scale, and with the truth and counts of conditional draws.

    npz and hdf5 (`companion.data.store`) hold everything; drawn.nii.gz is draws one behind the other, case by case,
    with a table beside it; PNGs are 16-bit, level = kBq/mL / `kbq_per_level` as their text says, negative values 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays, units = _arrays(drawn)
    written = []
    if "npz" in formats:
        written.append(folder / "drawn.npz")
        with atomic_write(written[-1]) as aside:
            np.savez_compressed(
                aside,
                **arrays,
                seeds=np.array(drawn.seeds),
                name=np.array(_names(drawn)),
                about=np.array(json.dumps(drawn.about)),
            )
    if "hdf5" in formats:
        written.append(
            write_dataset(
                folder / "drawn.h5",
                arrays,
                units=units,
                scale=dict.fromkeys(arrays, 1.0),
                source=drawn.about["weights"],
                seed=None,
                subjects=_names(drawn),
                split={},
                attrs=drawn.about | {"seeds": drawn.seeds},
            )
        )
    if "nifti" in formats:
        stack = drawn.x.flatten(0, 2).numpy()
        mm = drawn.about["pixel_mm"]
        written.append(
            save_nifti(
                folder / "drawn.nii.gz",
                stack[:, ::-1],
                voxel_mm=(mm, mm, mm),
                units=f"{drawn.about['units']}; draws as slices, see drawn.json",
            )
        )
        written.append(folder / "drawn.json")
        rows = [{"slice": i, **row} for i, row in enumerate(_rows(drawn))]
        with atomic_write(written[-1]) as aside:
            aside.write_text(json.dumps(drawn.about | {"slices": rows}, indent=1) + "\n")
    if "png" in formats:
        top = max(drawn.x.amax().item(), 1e-6)
        images = drawn.x.flatten(0, 2)
        written += [
            _png(folder / "png" / f"{i:06d}.png", x, top, row | drawn.about)
            for i, (x, row) in enumerate(zip(images, _rows(drawn), strict=True))
        ]
    return written


def _names(drawn: Drawn) -> list[str]:
    return drawn.cases.name if drawn.cases else ["prior"]


def _arrays(drawn: Drawn) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    unit = drawn.about["units"]
    arrays, units = {"drawn": drawn.x}, {"drawn": unit}
    if drawn.cases:
        c = drawn.cases
        arrays |= {"truth": c.truth, "mlem": c.mlem, "counts": c.counts, "sensitivity": c.sensitivity}
        units |= {"truth": unit, "mlem": unit, "counts": "1", "sensitivity": f"1/({unit})"}
    return {name: value.float().numpy() for name, value in arrays.items()}, units


def _rows(drawn: Drawn) -> list[dict]:
    """One row per image, case by case."""
    rows = []
    for i, name in enumerate(_names(drawn)):
        case = {"case": name} | ({"counts": drawn.cases.counts[i].item()} if drawn.cases else {})
        rows += [case | {"seed": seed + i * SEED_STEP} for seed in drawn.seeds]
    return rows


def _png(path: Path, x: Tensor, top: float, about: dict) -> Path:
    text = PngInfo()
    for name, value in (about | {"kbq_per_level": top / GREY}).items():
        text.add_text(name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (x / top).clamp(0, 1).mul(GREY).round().numpy().astype(np.uint16)
    with atomic_write(path) as aside:
        Image.fromarray(levels).save(aside, format="PNG", pnginfo=text)
    return path


# ------------------------------------------------------------------------------------------------------- are they good?

FACTS = ("mean activity (kBq/mL)", "99th percentile (kBq/mL)", "head (cm2)", "hot share", "roughness")


def facts(x: Tensor, pixel_mm: float) -> Tensor:
    """Return numbers of slices x (slice, 1, y, x) in kBq/mL that draws and people should share, (slice, FACTS).

    Mean activity in the head, its 99th percentile, area of the head (activity above 1 kBq/mL), share of it that is hot
    as grey matter (above half of the percentile), and mean absolute difference of neighbours over the mean.
    """
    rows = []
    for one in x[:, 0].double():
        head = one > 1.0
        values = one[head] if head.any() else one.flatten()
        high = torch.quantile(values, 0.99)
        steps = (one.diff(dim=0).abs().mean() + one.diff(dim=1).abs().mean()) / 2
        rows.append(
            torch.stack(
                [
                    values.mean(),
                    high,
                    head.sum() * (pixel_mm / 10) ** 2,
                    (values > high / 2).double().mean(),
                    steps / one.mean().clamp(min=1e-9),
                ]
            )
        )
    return torch.stack(rows)


def nearest(x: Tensor, others: Tensor, same: bool = False) -> Tensor:
    """Return the distance of each slice of x to the nearest of others, |a - b| / sqrt((|a|^2 + |b|^2) / 2).

    0 is the same slice, 1.4 has nothing in common. same: others are x themselves, so each leaves itself out.
    """
    a, b = (v.flatten(1).double() for v in (x, others))
    power = (a.square().sum(1)[:, None] + b.square().sum(1)) / 2
    distance = torch.cdist(a, b) / power.sqrt().clamp(min=1e-9)
    return (distance.fill_diagonal_(torch.inf) if same else distance).amin(1)


def population_table(drawn: Tensor, people: Tensor, pixel_mm: float, training: Tensor | None = None) -> list[dict]:
    """Return `facts` of drawn and of held-out slices (slice, 1, y, x), mean and standard error, and two distances.

    To the nearest other of its own kind (small: draws repeat one another) and, given training slices, to the nearest of
    them (smaller than that of held-out people: the network has learnt them by heart).
    """
    rows = []
    for name, x in (("held-out people", people), ("drawn", drawn)):
        values = facts(x, pixel_mm)
        row = {"slices": name, "n": len(x)}
        row |= {fact: metrics.mean_and_error(values[:, i]) for i, fact in enumerate(FACTS)}
        row["to the nearest other"] = metrics.mean_and_error(nearest(x, x, same=True))
        if training is not None:
            row["to the nearest of training"] = metrics.mean_and_error(nearest(x, training))
        rows.append(row)
    return rows


def training_people(data: dict, subjects: int) -> Tensor:
    """Return slices (slice, 1, y, x) in kBq/mL of the first training people, if they are the embedded ones."""
    from companion.data.pet import cohort_slices

    if data["source"] != PEOPLE:
        return torch.empty(0, 1, *data["image_size"])
    size, per_subject = data["image_size"][-1], data["slices_per_subject"]
    return cohort_slices("train", min(subjects, data["subjects"]), size, per_subject, pixel_mm=data["pixel_mm"]).image


def enhancement_table(drawn: Drawn) -> list[dict[str, object]]:
    """Return NRMSE, PSNR, SSIM and the mean activity's error of MLEM, of one draw and of the mean of all draws."""
    cases, truth = drawn.cases, drawn.cases.truth
    counted = drawn.about.get("iterations", range(1, cases.mlem.shape[1] + 1))
    images = {f"MLEM, {k} iterations": cases.mlem[:, i : i + 1] for i, k in enumerate(counted)}
    images |= {"one draw": drawn.x[:, 0], f"mean of {len(drawn.seeds)} draws": drawn.x.mean(1)}
    rows = []
    for name, x in images.items():
        total = x.flatten(1).sum(1) / truth.flatten(1).sum(1) - 1
        rows.append(
            {
                "image": name,
                "NRMSE": metrics.mean_and_error(metrics.nrmse(x, truth)),
                "PSNR (dB)": metrics.mean_and_error(metrics.psnr(x, truth)),
                "SSIM": metrics.mean_and_error(metrics.ssim(x, truth)),
                "error of mean activity": metrics.mean_and_error(total),
            }
        )
    return rows


def calibration(drawn: Drawn) -> float:
    """Return the variance of draws over the squared error of their mean, over all cases; 1 is calibrated."""
    draws, truth = drawn.x.movedim(1, 0), drawn.cases.truth
    together = draws.flatten(1, 3)[:, None, None], truth.flatten(0, 2)[None, None]
    return metrics.calibration_ratio(*together).item()


def overview(drawn: Drawn, cases: Cases, most: int = 8) -> dict[str, dict[str, Tensor]]:
    """Return rows of images: draws under held-out people, or each case with its MLEM image and draws."""
    if drawn.cases is None:
        columns = range(min(most, len(drawn.seeds), len(cases.truth)))
        rows = {"held out": {str(i + 1): cases.truth[i] for i in columns}}
        several = range(0, min(len(drawn.seeds), 3 * len(columns)) - len(columns) + 1, len(columns))
        return rows | {
            f"seeds {drawn.seeds[at]} on": {str(i + 1): drawn.x[0, at + i] for i in columns} for at in several
        }
    middle = cases.mlem.shape[1] // 2
    return {
        _short(name): {"truth": cases.truth[i], "MLEM": cases.mlem[i, middle : middle + 1]}
        | {f"seed {seed}": drawn.x[i, j] for j, seed in enumerate(drawn.seeds[: most - 3])}
        | {"mean": drawn.x[i].mean(0)}
        for i, name in enumerate(cases.name[:6])
    }


def _short(name: str) -> str:
    """The name of a case as a figure has room for it."""
    return name.removeprefix("subject ").replace(", ", "\n")


def uncertainty(drawn: Drawn, most: int = 4) -> dict[str, dict[str, Tensor]]:
    """Return rows of images of conditional draws: truth, mean, its error and the standard deviation of draws."""
    rows = {}
    for i, name in enumerate(drawn.cases.name[:most]):
        truth, mean = drawn.cases.truth[i], drawn.x[i].mean(0)
        rows[_short(name)] = {
            "truth": truth,
            "mean": mean,
            "error": (mean - truth).abs(),
            "std of draws": drawn.x[i].std(0),
        }
    return rows


def quality_table(drawn: Drawn, cases: Cases, data: dict, training: int = 64) -> list[dict[str, object]]:
    """Return `enhancement_table`, or for unconditional draws `population_table` with so many training people."""
    if drawn.cases is not None:
        return enhancement_table(drawn)
    people = training_people(data, training)
    return population_table(drawn.x[0], cases.truth, data["pixel_mm"], people if len(people) else None)
