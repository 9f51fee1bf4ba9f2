"""What LMI makes of lesions that its networks never saw: kept, lost, changed in size, invented, and is it told?

    python benchmarks/lmi_lesions.py --sources T1w --target T2w --patients 30        # the table of docs/lmi.md

Virtual patients of the test set (`companion.data.lesions`), one slice through the middle of the lesion each, kinds and
sizes in turn, and every third of them in health, too. Baselines, rows that networks draw, and the recommended row
mended by what the person's own relation of draws to source says where the source does not support the draws.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.contrast_people import stacks
from companion.data.lesions import KINDS, SIZES_MM, draw_lesion, patient_slices
from companion.evaluation import lesions, metrics, tables
from companion.evaluation.support import supported
from companion.evaluation.translation import CONSTANT, constant, matched
from companion.reconstruction.translated_people import sdedit_name
from companion.reconstruction.translation import ABLATION, Setting, Translator, translate

ROWS = ("cross and self LMI", "recommended", "oracle: LMI of the truth")


def patients(split: str, count: int, contrasts: tuple[str, ...], first: int = 100) -> tuple[dict[str, Tensor], list]:
    """Slices (image, 1, y, x) of each contrast, "labels" and "lesion", and the kind and size of each image's lesion."""
    kinds = [(kind, size) for size in SIZES_MM for kind in KINDS]
    made, told = [], []
    for i, subject in enumerate(anatomy.cohort(split, first + count)[first:]):
        kind, size = kinds[i % len(kinds)]
        lesion = draw_lesion(subject, kind, size, i)
        height = torch.tensor([lesion.centre_mm[2]])
        made.append(patient_slices(subject, lesion, contrasts, height))
        told.append((kind, size))
        if i % 3 == 0:
            made.append(patient_slices(subject, None, contrasts, height))
            told.append(("none", "none"))
    return {name: torch.cat([m[name] for m in made]) for name in made[0]}, told


def study(
    prior: Translator, source: str, images: dict[str, Tensor], told: list, setting: dict, seed: int
) -> list[dict]:
    """A row for each image and method: fate of the lesion, PSNR and SSIM inside the tissue, and what was marked."""
    truth, given, labels = images[prior.contrast], images[source], images["labels"]
    inside = labels > 0
    reference = stacks("brain", "train", 4, (prior.contrast,), truth.shape[-1])
    tissue = reference[prior.contrast][reference["labels"] > 0]
    found = {
        CONSTANT: (constant(truth[None], inside[None])[0], None),
        "no translation": (given, None),
        "histogram matching": (matched(given[None], inside[None], tissue)[0], None),
    }
    settings = {sdedit_name(1.0): Setting((), start=1.0, begin="source")} | {name: ABLATION[name] for name in ROWS}
    settings |= {"recommended": prior.recommended}
    for name, one in settings.items():
        made = translate(prior, truth if one.oracle else given, replace(one, **setting), seed=seed)
        draws, support = made.draws, supported(given, made.draws, sides=True, paired=made.paired)
        found[name] = (draws.mean(0), support)
        if name == "recommended":
            found["recommended, mended"] = (support.mended(draws.mean(0)), support)
    rows = []
    for name, (x, support) in found.items():
        scores = {"PSNR": metrics.psnr(x, truth, 1.0, inside), "SSIM": metrics.ssim(x, truth, 1.0, inside)}
        fates = lesions.fates(x, truth, given, images["lesion"], inside, support)
        for i, (row, (kind, size)) in enumerate(zip(fates, told, strict=True)):
            rows.append(
                {"method": name, "kind": kind, "size": size} | {k: v[i].item() for k, v in scores.items()} | row
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", default=["T1w"])
    parser.add_argument("--target", default="T2w")
    parser.add_argument("--weights", default="lmi/{target}", help="{target} is the contrast in small letters")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--patients", type=int, default=30)
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a CSV file of all rows")
    asked = parser.parse_args()
    prior = Translator.load(asked.weights.format(target=asked.target.lower()))
    images, told = patients(asked.split, asked.patients, (*asked.sources, asked.target))
    everything = []
    for source in asked.sources:
        setting = {"evaluations": asked.evaluations, "draws": asked.draws}
        rows = study(prior, source, images, told, setting, asked.seed)
        everything += [{"direction": f"{source} to {asked.target}"} | row for row in rows]
        print(
            f"\n{source} to {asked.target}, {asked.patients} patients and {len(told) - asked.patients} healthy people\n"
        )
        table = lesions.summary(rows, "method")
        for row in table:
            mine = [r for r in rows if r["method"] == row["method"]]
            row |= {k: tables.average([r[k] for r in mine]) for k in ("PSNR", "SSIM")}
        names = list(dict.fromkeys(name for row in table for name in row))
        print(tables.markdown([{name: row.get(name, "") for name in names} for row in table]))
        for method in ("recommended", "recommended, mended"):
            chosen = [r for r in rows if r["method"] == method and r["kind"] != "none"]
            print(f"\n{method}\n")
            print(tables.markdown(lesions.summary(chosen, "kind")))
            print("\n" + tables.markdown(lesions.summary(chosen, "size")))
            healthy = lesions.summary([r for r in rows if r["method"] == method and r["kind"] == "none"], "kind")
            print(f"\nhealthy: invented {healthy[0]['invented']:.2f}, flagged {healthy[0]['flagged elsewhere']:.3f}")
    if asked.out:
        names = dict.fromkeys(name for row in everything for name in row)
        tables.write_csv(asked.out, [{name: row.get(name, "") for name in names} for row in everything])


if __name__ == "__main__":
    main()
