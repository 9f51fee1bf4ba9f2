"""Every head of a folder as a PET scan: classical methods, priors, and what the counts say of them.

    python benchmarks/pet_heads.py FOLDER --out runs/benchmarks/pet_heads
    python benchmarks/pet_heads.py FOLDER --tune           # on validation heads: writes pet_heads_tuned.json

A head is one file of any format that `companion look` knows: a T1-weighted image, which gets FDG-like activity
(`companion.data.head_phantoms`: grey to white matter --ratio, scalp unless --bare, one hot lesion a slice), or activity
itself, where its name has "activity" in it or ends with "_pet", or the file says its units. "virtual" in the place of
FOLDER: held out people of the virtual cohort.

Scans: --slices axial slices, 224 mm across, 64 or 128 pixels, 10^6 true counts a slice at full dose, thinned. Simulated
from pixels of 0.875 mm with strips, detectors of 4 mm, 20 % scatter and 10 % randoms; reconstructed with lines, pixels
of the image, a blur of the image of 4 mm, and a scatter estimate that is broader and 10 % off
(`companion.acquisition.simulated`). The settings of the classical methods come from pet_heads_tuned.json, made on
validation heads; the folder is never tuned on. "MLEM, oracle stop" stops where each slice is best. "MR:" and ", MR"
have the person's T1-weighted image too, from which the activity was made, its receive bias taken out: as good as an MR
can be, but for the lesion, which it does not show. --mr-off moves it by so many millimetres, in another direction in
each slice. With --step-mm slices follow one another, with one lesion through several of them, and Bowsher's prior knows
(--tune with it, too).

Columns: NRMSE against the activity; calibration, the variance of the draws over the squared error of their mean (1 is
right); inside 80 %, how often the mean over a region (squares of 28 mm inside the brain, and the lesion; cut along no
tissue, since edges that counts do not resolve bias any mean along them) lies in the interval of the draws; recovery of
the lesion's contrast; the verdict, which knows no truth. Numbers of a head are means over its slices, the table gives
means and standard errors over heads. A finished head is not redone: <out>/heads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pet_projector import write
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.acquisition.simulated import simulate
from companion.data import head_phantoms as phantoms
from companion.data.head_activity import active_head
from companion.data.heads import prepare_head
from companion.data.intake.kinds import refuse_labels
from companion.data.intake.look import find
from companion.data.pet import Slices, held_out
from companion.data.upright import canonical
from companion.evaluation import metrics
from companion.evaluation.activity import score
from companion.evaluation.tables import markdown
from companion.files import atomic_write
from companion.models.checkpoint import describe_source
from companion.reconstruction import trust_counts
from companion.reconstruction.activity import Prior, Sampler, bowsher, drawer, on_trial, posterior
from companion.reconstruction.mr_guided import kernel_em
from companion.reconstruction.pet import GRIDS, METHODS, oracle_stop, tune
from companion.show import figures

TUNED = Path(__file__).with_name("pet_heads_tuned.json")
FULL = 1e6  # true counts of a slice at full dose
CLASSICAL = ("MLEM", "filtered MLEM", "MAP")
BOWSHER = "MR: Bowsher MAP"
GUIDED = {  # with the MR of the same person, and the settings that are tried
    BOWSHER: (bowsher, GRIDS["MAP"]),
    "MR: kernel EM": (lambda s, v: kernel_slices(s, v), (20, 40, 80, 160)),
}
ORACLE, TRUSTED, MR = "MLEM, oracle stop", "trusted", ", MR"
TRIAL = {"draws": 3, "evaluations": 12}


# ----------------------------------------------------------------------------------------------------------- heads


def fine_slices(array: np.ndarray, affine: np.ndarray, activity: bool, args) -> tuple[Slices, Tensor | None]:
    """Slices of `phantoms.FINE` pixels of a volume (z, y, x) and, of tissues, their MR: its activity, or theirs."""
    signal, voxel_mm = canonical(array, affine)
    head = prepare_head("head", signal, voxel_mm)
    if activity:
        return own_activity(head, float(np.percentile(signal[signal > 0.1 * signal.max()], 99)), args.slices), None
    active = active_head(head)
    flat = phantoms.flattened(active)
    return (
        phantoms.fdg_slices(flat, args.slices, args.ratio, not args.bare, step_mm=args.step_mm),
        phantoms.mr_slices(active, args.slices, args.step_mm),
    )


def own_activity(head, bright: float, count: int) -> Slices:
    """Slices of an activity volume, scaled so that its bright tissue has the 22 kBq/mL of grey matter of FDG."""
    low, high = head.tissue[:, 2].quantile(0.1).item(), head.tissue[:, 2].quantile(0.9).item()
    line = (torch.arange(phantoms.FINE) - (phantoms.FINE - 1) / 2) * phantoms.FIELD_MM / phantoms.FINE
    y, x = torch.meshgrid(-line, line, indexing="ij")
    middle, heights = head.tissue.mean(0), torch.linspace(low, high, count)
    image = torch.stack(
        [head.at(torch.stack([x + middle[0], y + middle[1], torch.full_like(x, z)], -1)) for z in heights]
    )
    image = 22.0 * image[:, None]
    labels = torch.bucketize(image, torch.tensor([0.5, 3.0, 11.0])).byte()
    mu = torch.where(image > 0.5, 0.0096, 0.0)
    return Slices(
        image, labels, torch.zeros_like(labels), mu, torch.arange(count), heights, phantoms.FIELD_MM / phantoms.FINE
    )


def heads_of(folder: str, args) -> tuple[dict, dict[str, str]]:
    """Functions that give the fine slices of each head by name, and the reasons for what is left out."""
    if folder == "virtual":
        split = "validation" if args.tune else "test"
        return {f"virtual {split}": lambda: (held_out(split, args.slices, phantoms.FINE, lesions=1), None)}, {}
    found = find(Path(folder))
    heads, left = {}, dict(found.left)
    for item in found.items:
        if len(item.what.shape) < 3 or min(item.what.shape[-3:]) < 16:
            left[item.name] = f"shape {item.what.shape}: not a volume"
            continue
        stem = item.name.lower().split(".")[0]
        activity = bool(item.what.units) or "activity" in stem or stem.endswith("_pet")

        frames = item.what.shape[0] if item.what.axes[0] == "t" else 1
        name = item.name if frames == 1 else f"{item.name}, frame 0 of {frames}"

        def load(item=item, activity=activity, several=frames > 1):
            volume = item.read(**({"frame": 0} if several else {}))
            refuse_labels(volume.array, item.path)
            return fine_slices(volume.array, volume.affine, activity, args)

        heads[name] = load
    return heads, left


def on_grid(mr: Tensor | None, size: int, off_mm: float = 0.0) -> Tensor | None:
    """The MR on the pixels of the scan, each slice moved by `off_mm` in a direction of its own."""
    if mr is None:
        return None
    angles = torch.arange(len(mr)) * 2.4 + 0.3  # of the golden ratio: all directions alike
    steps = (off_mm / (phantoms.FIELD_MM / phantoms.FINE) * torch.stack([angles.sin(), angles.cos()], 1)).round().int()
    moved = torch.stack([x.roll(tuple(step.tolist()), (-2, -1)) for x, step in zip(mr, steps, strict=True)])
    return F.avg_pool2d(moved, mr.shape[-1] // size)


def kernel_slices(scan: Scan, iterations: int) -> Tensor:
    """The kernel method, slice by slice, as each has its own kernel."""
    slices = [scan.some([i]) for i in range(len(scan.y))]
    return torch.cat([kernel_em(s.y, s.A, s.mr, s.background, iterations=iterations).x for s in slices])


def scan_of(
    fine: Slices,
    mr: Tensor | None,
    size: int,
    dose: float,
    seed: int,
    off_mm: float = 0.0,
    step_mm: float | None = None,
) -> tuple[Scan, Slices]:
    """The scan of slices at a share of the full dose, with their MR, and what it should show."""
    factor = phantoms.FINE // size
    people = phantoms.coarser(fine, factor)
    seeds = [seed + 100 * i for i in range(len(fine.image))]
    full = simulate(fine.image, fine.mu, FULL, seeds, pixel_mm=people.pixel_mm, fine=factor)
    step = None if step_mm is None else step_mm / people.pixel_mm
    people, full = replace(people, image=full.x), replace(full, mr=on_grid(mr, size, off_mm), step=step)
    return full if dose == 1 else full.thinned(dose, seeds), people


# ----------------------------------------------------------------------------------------------------------- scores


def regions(people: Slices) -> Tensor:
    """Masks (slice, region, y, x): the brain in each square of 8 x 8 (an eighth of the field), and the lesion."""
    n = people.image.shape[-1]
    at = torch.arange(n) * 8 // n
    squares = (8 * at[:, None] + at)[None] == torch.arange(64)[:, None, None]
    return torch.cat([(people.labels > 0) & squares, people.lesions > 0], 1)


def inside(draws: Tensor, people: Slices, level: float = 0.8) -> float:
    """How often the true mean of a region of 6 pixels or more lies in the central interval of the draws' means."""
    masks = regions(people).flatten(2).double()  # (slice, region, pixel)
    sizes = masks.sum(2)
    true = torch.einsum("srp,sp->sr", masks, people.image.flatten(1).double()) / sizes.clamp(min=1)
    found = torch.einsum("srp,dsp->dsr", masks, draws.flatten(2).double()) / sizes.clamp(min=1)
    known = (sizes >= 6)[None, None]
    return metrics.coverage(found[:, None, None], true[None, None], (level,), known)[1].item()


def row_of(name: str, x: Tensor, people: Slices, draws: Tensor | None = None, **others) -> dict:
    """The scores of images (slice, 1, y, x), and of draws (draw, slice, 1, y, x)."""
    found = {k: v.nanmean().item() for k, v in score(x, people).items() if k in ("NRMSE", "bias, brain", "recovery")}
    if draws is not None:
        found |= {"calibration": metrics.pooled_calibration(draws, people.image), "inside 80 %": inside(draws, people)}
    return {"method": name, **found, **others}


def study(
    scan: Scan, people: Slices, priors: dict[str, dict[str, Prior]], tuned: dict, args
) -> tuple[list[dict], dict]:
    """Rows of all methods of one head at one size and dose, and the middle slice of each."""
    images, rows, seed = {}, [], 77
    for name in CLASSICAL:
        images[name] = METHODS[name](scan.y, scan.A, scan.background, tuned[name])
    images |= {name: method(scan, tuned[name]) for name, (method, _) in GUIDED.items() if scan.mr is not None}
    images[ORACLE] = oracle_stop(scan.y, scan.A, scan.background, scan.x)
    rows += [row_of(name, x, people) for name, x in images.items()]
    whole, short = Sampler(args.draws, args.evaluations), Sampler(**TRIAL)
    kinds = (False, True) if scan.mr is not None else (False,)  # without the MR, and with it
    for name, errors in priors.items():
        for prior in [next(p for p in errors.values() if p.with_mr == mr) for mr in kinds if has(errors, mr)]:
            began, called = time.perf_counter(), f"{name}{MR if prior.with_mr else ''}"
            found = posterior(prior, scan, whole, seed)
            seconds = (time.perf_counter() - began) / len(scan.y)
            images[called] = found.mean
            rows.append(row_of(f"posterior mean, {called}", found.mean, people, found.x, seconds=seconds))
            rows.append(row_of(f"one draw, {called}", found.x[0], people))
    for mr in kinds:
        tried = {k: p for errors in priors.values() for k, p in errors.items() if mr or not p.with_mr}
        began, called = time.perf_counter(), f"{TRUSTED}{MR if mr else ''}"

        def classical(one: Scan, mr=mr) -> Tensor:
            name = BOWSHER if mr else "MAP"
            return GUIDED[name][0](one, tuned[name]) if mr else METHODS[name](one.y, one.A, one.background, tuned[name])

        trial = {k: on_trial(p, short, seed) for k, p in tried.items()}
        final = {k: drawer(p, whole, seed) for k, p in tried.items()}
        trusts = trust_counts.assess(scan, trial, classical, seed=seed)
        done = trust_counts.reconstruct(scan, trusts, final, classical)
        seconds = (time.perf_counter() - began) / len(scan.y)
        images[called] = done.image
        known, told = sum(t.knows for t in trusts) / len(trusts), [t.verdict for t in trusts]
        rows.append(row_of(called, done.image, people, done.x, seconds=seconds, known=known, verdicts=told))
    middle = len(scan.y) // 2
    return rows, {"truth": people.image[middle, 0], **{name: x[middle, 0] for name, x in images.items()}}


def has(errors: dict[str, Prior], mr: bool) -> bool:
    """Whether one of the priors of a checkpoint is, or is not, given the MR."""
    return any(prior.with_mr == mr for prior in errors.values())


# ----------------------------------------------------------------------------------------------------------- report

COLUMNS = ("NRMSE", "calibration", "inside 80 %", "recovery", "bias, brain", "known", "seconds")


def table(rows: list[dict]) -> list[dict]:
    """For each size, dose and method the mean over heads of every column, and its standard error for more than one."""
    lines = []
    for key in dict.fromkeys((r["size"], r["dose"], r["method"]) for r in rows):
        group = [r for r in rows if (r["size"], r["dose"], r["method"]) == key]
        line = dict(zip(("size", "dose", "method"), key, strict=True)) | {"heads": len(group)}
        for column in COLUMNS:
            values = torch.tensor([r[column] for r in group if r.get(column) is not None], dtype=torch.float64)
            line[column] = (
                None if not len(values) else metrics.mean_and_error(values) if len(values) > 1 else values.item()
            )
        lines.append(line)
    return lines


def contact_sheet(pictures: dict[str, dict[str, Tensor]]):
    """A row a head: the truth and all methods, white is the brightest percent of the truth."""
    return figures.image_grid(
        {
            head: {name: x.float() / images["truth"].float().quantile(0.99) for name, x in images.items()}
            for head, images in pictures.items()
        }
    )


def tuned_settings(heads: dict, args) -> dict:
    """The best settings of the classical methods on validation heads, by size and dose."""
    found = {}
    for size in args.sizes:
        for dose in args.doses:
            if len(heads) > 1:
                raise SystemExit("tune on one head of many slices: scans of several heads have several models")
            fine, mr = next(iter(heads.values()))()
            scan = scan_of(fine, mr, size, dose, 0, step_mm=args.step_mm)[0]
            best = {n: tune(n, scan.y, scan.A, scan.background, scan.x) for n in CLASSICAL}
            for name, (method, grid) in GUIDED.items() if mr is not None else ():
                best[name] = min(grid, key=lambda v: metrics.nrmse(method(scan, v), scan.x).mean().item())
            found[f"{size} {dose:g}"] = best
            print(size, dose, found[f"{size} {dose:g}"], flush=True)
    return found


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help='a folder of heads, or "virtual"')
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pet_heads"))
    parser.add_argument("--weights", nargs="+", default=["pet/heads", "pet/prior"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], choices=[32, 64, 128])
    parser.add_argument("--doses", nargs="+", type=float, default=[0.05, 0.25, 1.0], help="shares of the full dose")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--evaluations", type=int, default=25, help="of the network, a draw")
    parser.add_argument("--ratio", type=float, default=4.0, help="grey to white matter, of T1-weighted heads")
    parser.add_argument("--mr-off", type=float, default=0.0, help="mm by which the MR lies beside the scan")
    parser.add_argument("--step-mm", type=float, help="from slice to slice; by default they are spread over the brain")
    parser.add_argument("--bare", action="store_true", help="no activity outside the brain, of T1-weighted heads")
    parser.add_argument(
        "--tune", action="store_true", help="the folder holds one validation head: tune on it, and stop"
    )
    parser.add_argument("--tuned", type=Path, default=TUNED)
    args = parser.parse_args(argv)
    heads, left = heads_of(args.folder, args)
    for name, why in left.items():
        print(f"left out: {name}: {why}")
    known = json.loads(args.tuned.read_text()) if args.tuned.exists() else {}
    if args.tune:
        with atomic_write(args.tuned) as path:
            path.write_text(json.dumps(known | tuned_settings(heads, args), indent=1) + "\n")
        return []
    if missing := [k for s in args.sizes for d in args.doses if (k := f"{s} {d:g}") not in known]:
        raise SystemExit(f"{args.tuned} has no settings for {', '.join(missing)}; make them with --tune")
    priors = {weights: Prior.every(weights, mr=True) for weights in args.weights}
    asked = {k: getattr(args, k) for k in ("slices", "draws", "evaluations", "ratio", "bare", "mr_off", "step_mm")}
    asked |= {"weights": [describe_source(w).sha256 for w in args.weights], "tuned": known}
    rows, pictures = [], {}
    for name, load in heads.items():
        for size in args.sizes:
            for dose in args.doses:
                found = finished(name, load, size, dose, priors, known[f"{size} {dose:g}"], asked, args)
                if found is None:
                    continue
                rows += found[0]
                pictures.setdefault(f"{size} {dose:g}", {})[name] = found[1]
                report(args.out, rows, pictures)
    if not rows:
        raise SystemExit(f"{args.folder}: no head could be used")
    return table(rows)


def finished(name, load, size, dose, priors, tuned, asked, args) -> tuple[list[dict], dict] | None:
    """Rows and pictures of one head at one size and dose, from its file or made now; None where it cannot be used."""
    key = {"head": name, "size": size, "dose": dose, **asked}
    stem = args.out / "heads" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    done, images = stem.with_suffix(".json"), stem.with_suffix(".pt")
    if not done.exists():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "big")  # the same in any folder
        try:
            fine, mr = load()
            scan, people = scan_of(fine, mr, size, dose, seed, args.mr_off, args.step_mm)
        except (ValueError, OSError) as error:
            warnings.warn(f"{name} left out: {error}", stacklevel=1)
            return None
        rows, sheet = study(scan, people, priors, tuned, args)
        rows = [{"head": name, "size": size, "dose": f"{100 * dose:g} %", **row} for row in rows]
        for row in rows:
            print(", ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        done.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(images) as path:
            torch.save({k: v.half() for k, v in sheet.items()}, path)
        with atomic_write(done) as path:
            path.write_text(json.dumps(key | {"rows": rows}, indent=1))
    return json.loads(done.read_text())["rows"], torch.load(images, weights_only=True)


def report(out: Path, rows: list[dict], pictures: dict) -> None:
    """The table, all rows, and a contact sheet for each size and dose."""
    lines = table(rows)
    write(out, lines, markdown(lines))
    for setting, sheets in pictures.items():
        with atomic_write(out / f"sheet_{setting.replace(' ', '_')}.png") as path:
            contact_sheet(sheets).savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    main()
