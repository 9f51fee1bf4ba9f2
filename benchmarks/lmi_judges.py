"""How good are LMI's translations to a judge that shares no greys with the cohort, and beside a network that saw pairs?

    python benchmarks/lmi_judges.py --heads data/heads [--pairs FOLDER] [--out runs/benchmarks/judges]

*The judge* is the small network of `evaluation.segmenter`, trained on tissues of virtual patients in random contrasts
(SynthSeg, Billot et al. 2023, arXiv 2107.09559): it reads any contrast and was told of none. Where the tissue is known,
Dice as a share of what the true target gets; of real people, whose tissue nobody knows, only how far the segmentations
of a translation and of the true target agree. It reads the source as well as the target, so what is not translated at
all fares well: it says what became of the anatomy; whether the contrast is the target's, PSNR and the cohort's own
judge say.

*The supervised network* is a plain U-Net, trained to give the target of a source on pairs of the patients' own cohort.
Zero-shot translation has no pairs; what this network lacks on real people, too, the cohort's appearance lacks. *The
zero-shot one* is the same, trained on sources made of the target as LMI's are (`data.remap`): it tells what is lost for
want of pairs from what the conditions and draws lose.

Both are trained once and kept in `--out`, as translations are; what was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import wrap

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset

from companion.data import patients
from companion.data.contrast_folder import Reading, read_volumes
from companion.data.remap import remapped
from companion.evaluation import metrics, tables
from companion.evaluation.segmenter import Segmenter, any_contrast, load_segmenter, train_segmenter, unseen_parts
from companion.evaluation.support import head, supported
from companion.evaluation.translation import CONSTANT, constant, matched
from companion.files import atomic_write
from companion.networks.unet import UNet
from companion.reconstruction.translated_people import sdedit_name
from companion.reconstruction.translation import Setting, Translator, translate
from companion.show import figures
from companion.training.loop import TrainConfig, train

CONTRASTS = ("T1w", "T2w")
TISSUES = ("CSF", "grey", "white")
TRUE, LMI = "true target", "LMI, recommended"
SUPERVISED, ZERO_SHOT = "supervised U-Net", "zero-shot U-Net"
VIRTUAL, REAL = "virtual patients", "real people"
SHOWN = 6  # slices of a contact sheet


@dataclass(frozen=True, eq=False)
class People:
    """Pairs: contrast -> images (person, slice, 1, y, x) in [0, 1]; labels, 0 in lesions, if anybody knows them."""

    name: str
    images: dict[str, Tensor]
    labels: Tensor | None = None
    lesion: Tensor | None = None

    @classmethod
    def virtual(cls, found: Mapping[str, Tensor]) -> People:
        """Those of `patients.patients`; their labels are of the tissue that a lesion has taken the place of."""
        ill = found["lesion"] > 0.5
        return cls(VIRTUAL, {c: found[c] for c in CONTRASTS}, found["labels"].masked_fill(ill, 0), ill)

    def segmented(self, judge: Segmenter, x: Tensor) -> Tensor:
        """Labels of images (person, slice, 1, y, x) by a judge, 0 in lesions."""
        labels = judge.labels(x.flatten(0, 1)).view(x.shape)
        return labels if self.lesion is None else labels.masked_fill(self.lesion, 0)

    def inside(self) -> Tensor:
        """Where there is a head in either contrast, bool."""
        one, other = (head(self.images[c].flatten(0, 1)).view(self.images[c].shape) for c in CONTRASTS)
        return one | other


def kept(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, which is made where there is none."""
    if not path.exists():
        with atomic_write(path) as aside:
            save_file({name: x.contiguous() for name, x in make().items()}, aside)
    return load_file(path)


def same_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write settings, or compare: ValueError where a folder holds what others have made."""
    if path.exists() and (known := json.loads(path.read_text())) != settings:
        other = {k: (known.get(k), v) for k, v in settings.items() if known.get(k) != v}
        raise ValueError(f"{path.parent} was made with other settings (there, asked): {other}; choose another --out")
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(settings, indent=1))


def regression(
    x: Tensor, y: Tensor, steps: int, folder: Path, paired: bool = True, progress: bool = False
) -> nn.Module:
    """A U-Net that gives y of x, slices (slice, 1, y, x), by squared error; mirrored at random. Kept in the folder.

    paired: else x is the share of lesions, and sources are made of y in a contrast that nobody has seen.
    """
    options = {
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 1,
        "num_res_blocks": 1,
        "channel_mult": [1, 2, 2],
        "use_scale_shift_norm": True,
        "patch": 2,
    }
    torch.manual_seed(0)
    config = TrainConfig(
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        warmup=min(50, steps - 1),
        schedule="cosine",
        ema_halflife=400.0,
        autocast="auto",
        channels_last=True,
        device="cpu",
        checkpoint_every=200,
        log_every=50,
    )

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
        mirrored = torch.rand(len(batch[0]), 1, 1, 1, generator=generator) < 0.5
        given, true = (torch.where(mirrored, v.flip(-1), v) for v in batch)
        given = given if paired else remapped(true, generator, lesion=given)
        return (network(given, given.new_zeros(len(given))).float() - true).square().flatten(1).mean(1)

    result = train(UNet(**options), loss, TensorDataset(x, y), config, folder, about=options, progress=progress)
    return result.ema.eval().requires_grad_(False)


@torch.no_grad()
def predicted(network: nn.Module, x: Tensor) -> Tensor:
    """What the network gives of images (person, slice, 1, y, x), in [0, 1]."""
    parts = x.flatten(0, 1).split(64)
    return torch.cat([network(p, p.new_zeros(len(p))) for p in parts]).view(x.shape).clamp(0, 1)


def drawn(people: People, source: str, prior: Translator, draws: int, evaluations: int) -> dict[str, Tensor]:
    """Images (person, slice, 1, y, x) that the translator's network draws: SDEdit, the recommended setting, mended."""
    given = people.images[source]
    settings = {sdedit_name(1.0): Setting((), start=1.0, begin="source"), LMI: prior.recommended}
    found = {}
    for name, setting in settings.items():
        setting = replace(setting, evaluations=evaluations, draws=draws)
        each = translate(prior, given.flatten(0, 1), setting, seed=0).draws.unflatten(1, given.shape[:2])
        found[name] = each.mean(0)
        if name == LMI:
            mended = [supported(s, each[:, i]).mended(each[:, i].mean(0)) for i, s in enumerate(given)]
            found[f"{LMI}, mended"] = torch.stack(mended)
    return found


def best_scale(x: Tensor, truth: Tensor, inside: Tensor) -> Tensor:
    """Images (person, ...) with the gain and offset, one of each a person, that bring them nearest to the truth."""
    out = torch.empty_like(x)
    for i, (a, b, m) in enumerate(zip(x, truth, inside, strict=True)):
        u, v = a[m] - a[m].mean(), b[m] - b[m].mean()
        gain = (u @ v) / (u @ u).clamp(min=1e-9)
        out[i] = torch.where(m, b[m].mean() + gain * (a - a[m].mean()), a)
    return out


def scores(
    people: People, images: Mapping[str, Tensor], truth: Tensor, judges: Mapping[str, Segmenter]
) -> list[dict[str, object]]:
    """A row for each method: means over people and, of several, standard errors.

    PSNR (dB) and SSIM inside the head, means of slices; "fitted" is the PSNR after the best gain and offset. Dice of
    each judge's labels, by tissue; "share", their mean over the true target's; "agreement", with those of the target.
    """
    inside = people.inside()
    rows, reached, seen = [], {}, {name: people.segmented(judge, truth) for name, judge in judges.items()}
    for method, x in {TRUE: truth, **images}.items():
        fit = best_scale(x, truth, inside)
        row: dict[str, object] = {"people": people.name, "method": method}
        if method != TRUE:
            args = truth.flatten(0, 1), 1.0, inside.flatten(0, 1)
            for label, f, made in (("PSNR", metrics.psnr, x), ("fitted", metrics.psnr, fit), ("SSIM", metrics.ssim, x)):
                row[label] = tables.average(f(made.flatten(0, 1), *args).view(x.shape[:2]).mean(1))
        for name, judge in judges.items():
            labels = people.segmented(judge, x)
            if people.labels is not None:
                found = metrics.dice(labels, people.labels)
                reached.setdefault(name, found.nanmean().item())
                row[f"{name}: Dice"] = " / ".join(f"{v:.2f}" for v in found.nanmean(0).tolist())
                row[f"{name}: share"] = found.nanmean().item() / reached[name]
            row[f"{name}: agreement"] = metrics.dice(labels, seen[name]).nanmean().item()
        rows.append(row)
    return rows


def levels(people: People, judge: Segmenter, images: Mapping[str, Tensor], source: str, target: str) -> list[dict]:
    """Mean grey of each tissue in true and made targets: by labels, or where the judge sees it in both contrasts."""
    labels = people.labels
    if labels is None:
        one, other = (people.segmented(judge, people.images[c]) for c in (source, target))
        labels = torch.where(one == other, one, 0)
    rows = []
    for method, x in {TRUE: people.images[target], **images}.items():
        each = [tables.average([a[b == k].mean().item() for a, b in zip(x, labels, strict=True)]) for k in (1, 2, 3)]
        rows.append({"people": people.name, "direction": f"{source} to {target}", "method": method}
                    | dict(zip(TISSUES, each, strict=True)))  # fmt: skip
    return rows


def sheet(people: People, source: str, target: str, images: Mapping[str, Tensor], judge: Segmenter) -> dict:
    """Rows of `figures.image_grid`: source, truth, what methods made of it, and the judge's labels of some of them."""
    of = {"source": people.images[source], TRUE: people.images[target], **images}
    shown = {name: x for name, x in of.items() if name not in (CONSTANT, "no translation")}
    judged = ("source", TRUE, SUPERVISED, LMI)
    shown |= {f"{name} segmented": people.segmented(judge, of[name]) / 3 for name in judged}
    flat = {"\n".join(wrap(name, 13)): x.flatten(0, 1) for name, x in shown.items()}
    count = len(next(iter(flat.values())))
    chosen = torch.linspace(0, count - 1, min(SHOWN, count)).round().int().tolist()
    return {f"slice {i}": {name: x[i] for name, x in flat.items()} for i in chosen}


def real(pairs: Path, out: Path, slices: int) -> dict[str, Tensor]:
    """People of a folder of image volumes in any orientation, on the template, as `1_data` reads them."""
    found = read_volumes(pairs, out, Reading(contrasts=CONTRASTS, slices_per_subject=slices), 0)
    return {c: torch.from_numpy(found["arrays"][c]).float() for c in CONTRASTS}


def main(words: list[str] | None = None) -> list[dict]:
    """Train what is not there, translate, judge; `table.json` and pictures in --out. Returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=Path, default=None, help="companion data get heads; none: the template alone")
    parser.add_argument("--pairs", type=Path, default=None, help="a folder of real people with T1w and T2w volumes")
    parser.add_argument("--pair-slices", type=int, default=8)
    parser.add_argument("--sources", nargs="+", default=list(CONTRASTS), choices=CONTRASTS)
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--patients", type=int, default=16, help="to judge with")
    parser.add_argument("--people", type=int, default=240, help="to train on")
    parser.add_argument("--slices", type=int, default=6, help="of each of them")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--judge-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=1500, help="of the supervised networks")
    parser.add_argument("--zero-shot-steps", type=int, default=1500, help="of those that see no pairs; 0: none")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/judges"))
    asked = parser.parse_args(words)
    out, size = asked.out, asked.image_size
    same_settings(
        out / "settings.json", {k: str(v) for k, v in vars(asked).items() if k not in ("out", "pairs", "sources")}
    )

    def tissue() -> dict[str, Tensor]:
        known = patients.anatomies(asked.heads, "train", patients.PIXELS_MM[0])
        return {"parts": patients.tissue_slices(known, "train", asked.people, asked.slices, size)}

    def cohort(split: str, count: int, slices: int) -> dict[str, Tensor]:
        return patients.patients(asked.heads, {split: count}, slices, CONTRASTS, size)

    parts = kept(out / "tissue.safetensors", tissue)["parts"]
    judge = train_segmenter(
        *unseen_parts(parts), asked.judge_steps, augment=any_contrast, folder=out / "judge", progress=True
    )
    training = kept(out / "train.safetensors", lambda: cohort("train", asked.people, asked.slices))
    found = kept(out / f"{asked.split}.safetensors", lambda: cohort(asked.split, asked.patients, 2))
    groups = [People.virtual(found)]
    if asked.pairs:
        path = out / f"real {asked.pairs.name}.safetensors"
        groups.append(People(REAL, kept(path, lambda: real(asked.pairs, out, asked.pair_slices))))
    rows, means = [], []
    for source in asked.sources:
        target = CONTRASTS[1 - CONTRASTS.index(source)]
        way = f"{source} to {target}"
        x, y = (training[c].flatten(0, 1) for c in (source, target))
        networks = {SUPERVISED: regression(x, y, asked.steps, out / way, progress=True)}
        if steps := asked.zero_shot_steps:
            x = training["lesion"].flatten(0, 1)
            networks[ZERO_SHOT] = regression(x, y, steps, out / f"to {target}", paired=False, progress=True)
        prior = Translator.load(f"lmi/patients/{target.lower()}", autocast="auto")
        judges = {"any contrast": judge, "cohort's": load_segmenter(f"segmenter/{target.lower()}", target)}
        for people in groups:
            given, truth, inside = people.images[source], people.images[target], people.inside()
            path = out / f"{people.name if people.name == REAL else asked.split} {way}.safetensors"
            by_network = kept(path, partial(drawn, people, source, prior, asked.draws, asked.evaluations))
            images = {
                CONSTANT: constant(truth, inside),
                "no translation": given,
                "histogram matching": matched(given, inside, y[head(y)]),
                sdedit_name(1.0): by_network[sdedit_name(1.0)],
                LMI: by_network[LMI],
                f"{LMI}, mended": by_network[f"{LMI}, mended"],
            } | {name: predicted(network, given) for name, network in networks.items()}
            rows += [{"direction": way} | row for row in scores(people, images, truth, judges)]
            means += levels(people, judge, {k: v for k, v in images.items() if k in (LMI, SUPERVISED)}, source, target)
            figure = figures.image_grid(sheet(people, source, target, images, judge))
            figure.savefig(out / f"{people.name} {way}.png", dpi=110)
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    with atomic_write(out / "table.json") as aside:
        aside.write_text(json.dumps({"rows": rows, "levels": means}, indent=1))
    print(tables.markdown(rows))
    print("\nMean grey of tissues\n")
    print(tables.markdown(means))
    return rows


if __name__ == "__main__":
    main()
