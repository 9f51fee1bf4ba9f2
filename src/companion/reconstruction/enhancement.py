"""Activity drawn from a prior, or given the MLEM images of a low-dose scan; is it good?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.acquisition.own_pet import check_pixels
from companion.acquisition.pet import acquire, as_condition, mean_sensitivity
from companion.data.draws import SEED_STEP, Draws
from companion.data.pet import PEOPLE, cohort_slices, held_out
from companion.data.store import Prepared, open_dataset
from companion.diffusion.class_guidance import ClassGuidance
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, find_solver, sample
from companion.diffusion.solvers import SOLVERS, HeunChurn, Solver
from companion.evaluation import metrics
from companion.evaluation.activity import population_table
from companion.files import project_root
from companion.models import checkpoint
from companion.models.architectures import network_of
from companion.parameters import param
from companion.randomness import parse_seeds
from companion.reconstruction.condition import iterates

EMBEDDED = "pet/prior"


@dataclass(frozen=True)
class Schedule:
    """The part of a form that says how noise becomes an image."""

    solver: str = param("heun", "any of companion.diffusion.SOLVERS", choices=tuple(SOLVERS))
    steps: int = param(18, "steps from first_sigma to 0", minimum=1)
    first_sigma: float = param(40.0, "highest noise level, in network units", minimum=1e-3)
    last_sigma: float = param(0.01, "lowest noise level above 0", minimum=1e-5)
    S_churn: float = param(5.0, "heun_churn: noise added and removed over all steps; published: 40", minimum=0)
    S_min: float = param(0.05, "heun_churn: lowest noise level with churn", minimum=0)
    S_max: float = param(50.0, "heun_churn: highest noise level with churn", minimum=0)
    S_noise: float = param(1.003, "heun_churn: size of added noise", minimum=0)

    @property
    def levels(self) -> Tensor:
        """The noise levels (steps + 1,), the last 0."""
        return karras(self.steps, self.last_sigma, self.first_sigma)

    @property
    def chosen(self) -> Solver:
        """The solver; heun_churn with its own numbers."""
        if self.solver == HeunChurn.name:
            return HeunChurn(self.S_churn, self.S_min, self.S_max, self.S_noise)
        return find_solver(self.solver)


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser of activity, the "data" of its config, and the name of its weights."""

    D: Denoiser
    data: Mapping
    weights: str
    device: str = "cpu"

    @classmethod
    def load(cls, weights: str, device: str = "cpu", autocast: str | None = None) -> Model:
        """That of a checkpoint. Raises ValueError for weights that were not trained by pet/2_train."""
        found = checkpoint.find(weights, EMBEDDED)
        data = found.config.get("data", {})
        if missing := {"scale_kbq", "task", "image_size", "pixel_mm"} - data.keys():
            raise ValueError(
                f"the config of {weights} does not state {', '.join(sorted(missing))} of its data, so its "
                "activity has no units; give weights made by pet/2_train"
            )
        return cls(found.denoiser(device, autocast), data, found.name, device)

    def labelled(self, label: int | None, guidance: float = 1.0) -> Denoiser:
        """D bound to a class label, if there is one. Raises ValueError for labels that D does not know."""
        classes = network_of(self.D).num_classes
        if label is None:
            if guidance != 1:
                raise ValueError(f"guidance {guidance} has no label to weigh; give a label, or guidance 1")
            return self.D
        if classes is None or label >= classes:
            knows = "no classes" if classes is None else f"classes 0 to {classes - 1}"
            raise ValueError(f"label {label}: {self.weights} knows {knows}")
        return ClassGuidance(self.D, label, guidance)


@dataclass(frozen=True, eq=False)
class Cases:
    """What conditional draws are given: slices of held-out people and their scans. Images in kBq/mL.

    name (slice): subject and height or number. truth (slice, 1, y, x), mlem (slice, iterate, y, x), counts (slice,)
    measured, sensitivity (slice,), see `mean_sensitivity`.
    """

    name: list[str]
    truth: Tensor
    mlem: Tensor
    counts: Tensor
    sensitivity: Tensor

    def condition(self, data: Mapping) -> Tensor:
        """What the network of a checkpoint whose config says `data` is given."""
        cond = as_condition(self.mlem, self.sensitivity, data["scale_kbq"])
        return cond if data["dose_channel"] else cond[:, :-1]


def held_out_cases(
    data: Mapping, subjects: int, source: str = "cohort", lesions: int = 1, counts: float = 2.5e5, seed: int = 0
) -> Cases:
    """The slices that a source holds out, with scans of the geometry that the network of a config's `data` knows.

    Virtual people are scanned with `counts`; a prepared file has its own scans. Raises ValueError for a file without
    test split, of other pixels or units than the network was trained on, or, if it is given them, other MLEM iterates.
    """
    iterations = data.get("iterations", [15])
    if source == "cohort":
        s = held_out("test", subjects, data["image_size"][-1], lesions=lesions)
        mu = s.mu if data.get("attenuation", True) else None
        scan = acquire(s.image, mu, counts, range(seed, seed + len(s.image)), pixel_mm=s.pixel_mm)
        names = [f"subject {i}, {z:.0f} mm" for i, z in zip(s.subject.tolist(), s.height_mm.tolist(), strict=True)]
        return Cases(names, s.image, iterates(scan, iterations), scan.y.flatten(1).sum(1), mean_sensitivity(scan.A))
    prepared = open_dataset(project_root() / source, require=["activity", "mlem", "sensitivity", "counts"])
    if not prepared.split.get("test"):
        raise ValueError(f"{source} has no test split; prepare it with a held_out_share")
    check_pixels(data["pixel_mm"], prepared.attrs["pixel_mm"], "the network")
    unit, known = prepared.units["activity"], data.get("units", "kBq/mL")
    if unit != known:
        raise ValueError(
            f"{source} holds activity in units {unit!r}, and the network knows {known}; prepare it in those"
        )
    made = prepared.attrs["parameters"]["iterations"]
    if data["task"] == "conditional" and made != list(iterations):
        raise ValueError(
            f"{source} was prepared with MLEM iterates {made}, but the network was trained on {iterations}; "
            "prepare it with those"
        )
    return _prepared_cases(prepared, subjects)


def _prepared_cases(prepared: Prepared, count: int) -> Cases:
    """`count` slices spread over all test slices of a file."""
    arrays = [torch.from_numpy(prepared.read(n, "test")) for n in ("activity", "mlem", "counts", "sensitivity")]
    depth, total = arrays[0].shape[1], arrays[0].shape[:2].numel()
    at = torch.linspace(0, total - 1, min(count, total)).round().long()
    names = [f"{prepared.split['test'][i // depth]}, slice {i % depth}" for i in at.tolist()]
    return Cases(names, *(array.flatten(0, 1)[at] for array in arrays))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Drawn activity x (slice, draw, 1, y, x) in kBq/mL, one slice if unconditional; what it was given; its bill."""

    x: Tensor
    seeds: list[int]
    cases: Cases | None
    bill: Bill
    about: dict  # weights, solver and scale, for files

    def files(self) -> Draws:
        """The same, to be written."""
        if self.cases is None:
            return Draws(self.x, self.seeds, ["prior"], self.about)
        c, unit = self.cases, self.about["units"]
        given = {"truth": c.truth, "mlem": c.mlem, "counts": c.counts, "sensitivity": c.sensitivity}
        units = {"truth": unit, "mlem": unit, "counts": "1", "sensitivity": f"1/({unit})"}
        return Draws(self.x, self.seeds, c.name, self.about, given, units)


def draw(
    model: Model,
    seeds: str | Sequence[int],
    schedule: Schedule,
    cases: Cases | None = None,
    *,
    label: int | None = None,
    guidance: float = 1.0,
    batch_size: int = 16,
    progress: bool = False,
) -> Drawn:
    """One draw per seed: from the prior, or of each case if the network is conditional.

    A seed gives the same bits in the same batch, and the same image to rounding in any other. Warns when churn
    saturates. Raises ValueError for a conditional network without cases, and as `Model.labelled`.
    """
    data, seeds = model.data, parse_seeds(seeds)
    conditional = data["task"] == "conditional"
    if conditional and cases is None:
        raise ValueError(f"{model.weights} is conditional; give the cases that it should enhance (held_out_cases)")
    given = cases if conditional else None
    cond = None if given is None else given.condition(data).to(model.device).repeat_interleave(len(seeds), 0)
    count = 1 if given is None else len(given.truth)
    samples = sample(
        model.labelled(label, guidance),
        schedule.levels,
        shape=(1, *data["image_size"]),
        seeds=[s + i * SEED_STEP for i in range(count) for s in seeds],
        solver=schedule.chosen,
        device=model.device,
        cond=cond,
        batch_size=batch_size,
        progress=progress,
    )
    x = (samples.x * data["scale_kbq"]).cpu().unflatten(0, (count, len(seeds)))
    about = {"weights": model.weights, "label": label, "guidance": guidance}
    about |= {name: getattr(schedule, name) for name in ("solver", "steps", "first_sigma", "last_sigma")}
    names = ("scale_kbq", "units", "pixel_mm", "task", "target", "iterations")
    about |= {name: data[name] for name in names if name in data}
    return Drawn(x, seeds, given, samples.bill, about)


def quality_table(drawn: Drawn, cases: Cases, data: Mapping, training: int = 64) -> list[dict[str, object]]:
    """`enhancement_table`, or for unconditional draws `population_table` with so many training people."""
    if drawn.cases is not None:
        return enhancement_table(drawn)
    people = training_people(data, training)
    return population_table(drawn.x[0], cases.truth, data["pixel_mm"], people if len(people) else None)


def training_people(data: Mapping, subjects: int) -> Tensor:
    """Slices (slice, 1, y, x) in kBq/mL of the first training people, if they are the embedded ones."""
    if data["source"] != PEOPLE:
        return torch.empty(0, 1, *data["image_size"])
    size, per_subject = data["image_size"][-1], data["slices_per_subject"]
    return cohort_slices("train", min(subjects, data["subjects"]), size, per_subject, pixel_mm=data["pixel_mm"]).image


def enhancement_table(drawn: Drawn) -> list[dict[str, object]]:
    """NRMSE, PSNR, SSIM and the mean activity's error of MLEM, of one draw and of the mean of all draws."""
    cases = drawn.cases
    if cases is None:
        raise ValueError("these draws are unconditional: nobody's scan was enhanced; use population_table")
    truth = cases.truth
    counted = drawn.about.get("iterations", range(1, cases.mlem.shape[1] + 1))
    images = {f"MLEM, {k} iterations": cases.mlem[:, i : i + 1] for i, k in enumerate(counted)}
    images |= {"one draw": drawn.x[:, 0], f"mean of {len(drawn.seeds)} draws": drawn.x.mean(1)}
    rows = []
    for name, x in images.items():
        values = {
            "NRMSE": metrics.nrmse(x, truth),
            "PSNR (dB)": metrics.psnr(x, truth),
            "SSIM": metrics.ssim(x, truth),
            "error of mean activity": x.flatten(1).sum(1) / truth.flatten(1).sum(1) - 1,
        }
        rows.append({"image": name} | {key: metrics.mean_and_error(v) for key, v in values.items()})
    return rows
