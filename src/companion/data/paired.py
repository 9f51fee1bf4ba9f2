"""Two contrasts of the same anatomy: slices and image volumes in, aligned pairs out, and translations back to NIfTI.

    pairs = SlicePairs({"T1": "IXI/T1", "PD": "IXI/PD"})            # the layout of the LMI release: equal file names
    cohort = find_subjects("IXI", LAYOUTS["IXI"])                     # or one NIfTI per subject and contrast
    data = prepare("ixi.h5", cohort, contrasts=("T1", "PD"), reference="PD", per_subject=16, ...)

    cut = cut_file("IXI/IXI012-HH-1211-PD.nii.gz", size=(128, 128))   # slices of a volume, and how they were cut
    save_translation("t1.nii.gz", translate(cut.slices), cut.slicing, scale)    # the shape and affine of the source

Images are float32 in [0, 1], stacks (slice, 1, y, x). Volumes are (z, y, x) with an affine, as in `nifti`. `alignment`
says whether a pair fits, `registration` makes it fit where it is asked to. Wang et al. 2024 (IEEE TMI, doi
10.1109/TMI.2024.3382043) publish neither slicing, scaling nor splits; the choices are ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from companion.data.alignment import MAX_SHIFT, Alignment, alignment, grid_distance_mm, resample
from companion.data.cohort import Cohort, some
from companion.data.intake.splits import split_people
from companion.data.intake.walk import natural
from companion.data.intensity import FOREGROUND, Scale, Size, scaled, typical_scale
from companion.data.nifti import Volume, load_nifti
from companion.data.registration import WHOLE, moved, register, to_template
from companion.data.rows import Rows
from companion.data.slicing import Slicing, _header, _images, _inner, _onto_canvas, read_image
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.data.template import OnTemplate, slab_heights

SLICE_NUMBER = r"(?P<subject>.+?)[-_. ]*(?:slice|z)?[-_. ]*\d+"  # case ignored, of a file's stem


def read_subject(
    files: Mapping[str, Path],
    *,
    reference: str | None = None,
    labels: str | None = None,
    tolerance: float = 0.1,
    read: Callable[[Path], Volume] = load_nifti,
) -> dict[str, Volume]:
    """The volumes of one subject, contrast -> volume, all on one grid.

    reference: the contrast whose grid the others are resampled to where they differ; without it a difference is an
    error. labels: the contrast that is a label map. tolerance: of the grid, in parts of the smallest voxel side.
    Raises ValueError naming the files if grids differ, or as `load_nifti`.
    """
    volumes = {contrast: read(path) for contrast, path in files.items()}
    for name, role in ((reference, "reference"), (labels, "labels")):
        if name is not None and name not in volumes:
            raise ValueError(f"{role}={name!r} is not among the contrasts {', '.join(volumes)}")
    first = next(iter(files)) if reference is None else reference
    grid = volumes[first]
    for contrast, volume in volumes.items():
        apart = grid_distance_mm(volume, grid)
        if apart <= tolerance * min(grid.voxel_mm):
            continue
        if reference is None:
            why = (
                f"shapes {volume.array.shape} and {grid.array.shape} (z, y, x)"
                if np.isinf(apart)
                else f"affines up to {apart:.3g} mm apart"
            )
            raise ValueError(
                f"{files[contrast]} and {files[first]} lie on different grids: {why}; register them, or "
                f"resample to one with reference={first!r}"
            )
        volumes[contrast] = resample(volume, grid, nearest=contrast == labels)
    return volumes


def prepare(
    path: str | os.PathLike,
    cohort: Cohort,
    *,
    contrasts: Sequence[str],
    per_subject: int,
    split: Mapping[str, Sequence[str]] | Callable[[Sequence[str]], Mapping[str, Sequence[str]]],
    subjects: int | None = None,
    size: Size = (128, 128),
    pixel_mm: float | None = None,
    plane: str = "axial",
    scales: Mapping[str, Scale] | None = None,
    reference: str | None = None,
    labels: str | None = None,
    max_shift: float = MAX_SHIFT,
    registered: bool = False,
    template: bool = False,
    source: str = "",
) -> Prepared:
    """The prepared file written: an array (subject, slice, 1, y, x) for each contrast, values in [0, 1].

    per_subject  slices of each, evenly spaced where at least 5 % of the slice is foreground
    split        from `split_people`, or the sets of others, or a function that makes it of the subjects that are used
    size         and `pixel_mm`, `plane`: as for `Slicing.of`
    scales       contrast -> scale that all subjects share, such as `ct_window()`; by default each its percentiles
    subjects     at most so many, of those that can be used; the others are in attrs["left_out"] with the reason
    reference    contrast whose grid the others are resampled to, see `read_subject`
    labels       contrast of the cohort that is a label map: kept as it is, stored as uint8 under "labels"
    max_shift    pixels by which contrasts may seem apart (`alignment`); infinite to accept everything
    registered   contrasts on other grids, or farther apart than that, are registered to the first (rigid), then judged
    template     slices lie on the grid of the cohort's template (`OnTemplate`), `per_subject` of its slab, whatever the
                 head's size and place: for networks that know the cohort; pixel_mm and plane are then the cohort's
    Each subject's slicing, slice positions, scales and alignment are kept in `attrs`; `stored_slicing` and
    `stored_scale` read them. Raises ValueError naming the subjects that are misaligned, or as `read_subject`.
    """
    if not contrasts or labels in contrasts:
        raise ValueError(f"give contrasts, and labels apart from them; got {contrasts} and labels={labels!r}")
    wanted = (*contrasts, *([labels] if labels else []))
    stacks = {name: Rows(Path(path).parent) for name in (*contrasts, *(["labels"] if labels else []))}
    about, misaligned, left = {}, {}, dict(cohort.left_out)
    options = {"size": size} if template else {"size": size, "pixel_mm": pixel_mm, "plane": plane}
    if registered and reference is None:
        reference = contrasts[0]
    for subject, files in cohort.files.items():
        if len(about) == subjects:
            break
        if lacking := [name for name in wanted if name not in files]:
            raise ValueError(f"{subject} has no {', '.join(lacking)}, only {', '.join(files)}")
        try:
            volumes = read_subject({n: files[n] for n in wanted}, reference=reference, labels=labels, read=cohort.read)
            slices, facts, fits = _slices(
                volumes, contrasts, per_subject, labels, scales or {}, options, max_shift if registered else None
            )
        except (ValueError, OSError) as error:
            left[subject] = str(error)
            continue
        if far := [f"{name} {fit}" for name, fit in fits.items() if fit.distance > max_shift]:
            misaligned[subject] = far[-1]
        about[subject] = facts
        for name, rows in stacks.items():
            rows.append(slices[name])
    if misaligned:
        raise ValueError(
            f"{len(misaligned)} of {len(cohort.files)} pairs do not fit {contrasts[0]}: "
            f"{some([f'{s}: {why}' for s, why in misaligned.items()])}; register them, drop them with "
            f"cohort.without(...), or raise max_shift={max_shift}"
        )
    if not about:
        raise ValueError(f"no subject can be used: {some([f'{s}: {why}' for s, why in left.items()])}")
    parts = (
        split(list(about)) if callable(split) else {part: [s for s in who if s in about] for part, who in split.items()}
    )
    write_dataset(
        path,
        stacks,
        units={name: "1" for name in stacks},
        scale={name: "label values" if name == "labels" else "0 and 1 are attrs.subjects.*.scales" for name in stacks},
        source=source or "NIfTI volumes: " + ", ".join(wanted),
        seed=None,
        split=parts,
        subjects=list(about),
        attrs={"subjects": about, "left_out": left},
    )
    return open_dataset(path, require=list(contrasts))


def stored_slicing(prepared: Prepared, subject: str) -> tuple[Slicing | OnTemplate, list[int]]:
    """How a subject of a prepared file was cut, and which of its slices the file holds."""
    about = _stored(prepared, subject)
    kind = OnTemplate if "found" in about["slicing"] else Slicing
    return kind(**about["slicing"]), list(about["positions"])


def stored_scale(prepared: Prepared, contrast: str, subject: str | None = None) -> Scale:
    """The scale of a contrast of one subject of a prepared file; by default `typical_scale` of those for training."""
    subjects = prepared.split.get("train", ()) if subject is None else (subject,)
    scales = [_stored(prepared, s)["scales"] for s in subjects]
    if any(contrast not in s for s in scales):
        raise ValueError(f"{prepared.path.name} has no scale of {contrast!r}; it has {', '.join(scales[0])}")
    return typical_scale(Scale(**s[contrast]) for s in scales)


def _stored(prepared: Prepared, subject: str) -> dict:
    about = prepared.attrs.get("subjects", {})
    if subject not in about:
        raise ValueError(f"{prepared.path.name} says nothing of the volume of {subject!r}; it knows {some(about)}")
    return about[subject]


def _slices(
    volumes: dict[str, Volume],
    contrasts: Sequence[str],
    count: int,
    labels: str | None,
    given: Mapping[str, Scale],
    options: dict,
    max_shift: float | None,
):
    """One subject's slices, name -> (slice, 1, y, x), what is to be remembered of them, and how they fit the first.

    max_shift: pixels beyond which a contrast is registered to the first; None: never.
    """
    anchor, found, scales = volumes[contrasts[0]], {}, {}
    if "plane" not in options:
        slicing = OnTemplate.of(
            anchor, options["size"], heights=slab_heights(count), found=to_template(volumes.get("T1w", anchor))
        )
        if any(slicing.outside(volumes[name].array) > WHOLE for name in contrasts[1:]):
            slicing = replace(slicing, stripped=True)  # one whole head among stripped ones: all show the same brain
    else:
        slicing = Slicing.of(anchor, **options)

    def cut(name: str) -> np.ndarray:
        array = volumes[name].array
        if isinstance(slicing, OnTemplate):  # the scale is that of the slices, as in the cohort
            slices, scales[name] = slicing.scaled(slicing.cut(array), given.get(name), name)
            return slices
        values, scales[name] = scaled(array, given.get(name), name)
        return slicing.cut(values).numpy()

    stacks = {name: cut(name) for name in contrasts}
    first = stacks[contrasts[0]]
    fits = {name: alignment(first[:, 0], stacks[name][:, 0]) for name in contrasts[1:]}
    for name in [n for n, fit in fits.items() if max_shift is not None and fit.distance > max_shift]:
        found[name] = register(volumes[name], anchor)
        volumes[name] = resample(moved(volumes[name], found[name]), anchor)
        stacks[name] = cut(name)
        fits[name] = alignment(first[:, 0], stacks[name][:, 0])
    filled = np.flatnonzero((first > FOREGROUND).mean((1, 2, 3)) >= 0.05)
    if isinstance(slicing, OnTemplate) and len(filled) < count:
        low, high = slicing.heights[0], slicing.heights[-1]
        raise ValueError(
            f"{count - len(filled)} of {count} slices between {low:.0f} and {high:.0f} mm of MNI show nothing: the "
            "volume does not reach so far; keep its own grid"
        )
    if not 1 <= count <= len(filled):
        raise ValueError(f"{len(filled)} slices with anything in them, {count} wanted; choose a smaller per_subject")
    positions = filled[np.linspace(0, len(filled) - 1, count).round().astype(int)]
    kept = {name: stack[positions] for name, stack in stacks.items()}
    if labels:
        kept["labels"] = slicing.cut(volumes[labels].array, nearest=True).numpy()[positions].astype(np.uint8)
    facts = {
        "slicing": asdict(slicing),
        "positions": positions.tolist(),
        "scales": {name: asdict(scales[name]) for name in contrasts},
        "alignment": {name: asdict(fit) for name, fit in fits.items()},
        "registered": {name: asdict(where) for name, where in found.items()},
    }
    return kept, facts, fits


# -------------------------------------------------------------------------------------------------- folders of slices


class SlicePairs(Dataset):
    """The images with equal names of several folders, `pairs[i]` -> one tensor (channel, y, x) in [0, 1] per folder.

    This is the layout of the LMI release: 8-bit or 16-bit images (PNG, TIFF, BMP, JPEG), divided by 255 or 65535;
    float TIFF as it is. Files are read when asked for, but names, sizes and modes are checked at once.
    folders        contrast -> folder, in the order of the tensors
    channels       1 for grey, 3 for colour
    size           (y, x) to bring all images to, keeping their aspect ratio, zeros around
    complete_only  use the names that all folders have, as published, rather than stop; `left_out` lists the others
    subject        regular expression with a group `subject`, for a file's name without its ending; by default the
                   subject is what stands before the last number
    refuse         stop at a file that cannot be used; False leaves its pair out: `refused` says why
    Raises FileNotFoundError or ValueError: names without a partner (listed), different sizes, colour where grey was
    expected; when read, constant images and NaN.
    """

    def __init__(
        self,
        folders: Mapping[str, str | os.PathLike],
        *,
        channels: int = 1,
        size: Size | None = None,
        complete_only: bool = False,
        subject: str = SLICE_NUMBER,
        refuse: bool = True,
    ):
        if not folders or channels not in (1, 3):
            raise ValueError(f"give folders, and channels of 1 (grey) or 3 (colour), not {channels}")
        found = {contrast: _images(folder) for contrast, folder in folders.items()}
        self.contrasts, self.channels, self.size = tuple(found), channels, size
        common = set.intersection(*(set(files) for files in found.values()))
        alone = {contrast: sorted(set(files) - common, key=natural) for contrast, files in found.items()}
        if any(alone.values()) and not complete_only or not common:
            told = "; ".join(f"only {some(names)} in {folders[c]}" for c, names in alone.items() if names)
            hint = ", or pass complete_only=True" if common else ""
            raise ValueError(f"the folders are not paired by file names: {told}; rename or complete them{hint}")
        self.left_out = alone
        self.names = sorted(common, key=natural)
        self.files = {name: tuple(files[name] for files in found.values()) for name in self.names}
        self._subject = subject
        self.refused = {} if refuse else self._drop_bad_headers()
        self._check_headers()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        images = (read_image(path, self.channels) for path in self.files[self.names[index]])
        if self.size is None:
            return tuple(images)
        return tuple(_onto_canvas(x[None], _inner(x.shape[1:], self.size, (1, 1), None), self.size)[0] for x in images)

    @cached_property
    def subjects(self) -> list[str]:
        """The subject of each image; ValueError if the names do not tell."""
        matches = {name: re.fullmatch(self._subject, name, re.IGNORECASE) for name in self.names}
        if silent := [name for name, match in matches.items() if not match]:
            raise ValueError(
                f"cannot tell the subject from the names {some(silent)}; give subject=r'...' with a "
                f"group (?P<subject>...), so that nobody's slices are both trained on and tested"
            )
        return [match["subject"] for match in matches.values() if match]

    def split(self, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> dict[str, Subset]:
        """The images for "train", "validation" and "test", split by subject; see `split_people`."""
        members = split_people(self.subjects, fractions, seed)
        return {
            part: Subset(self, [i for i, s in enumerate(self.subjects) if s in set(names)])
            for part, names in members.items()
        }

    def misaligned(self, max_shift: float = MAX_SHIFT, reach: int = 3) -> dict[str, Alignment]:
        """The names of pairs that seem shifted by more than `max_shift` pixels against their first image, and how."""
        fits = {name: worst_alignment(images, reach) for name, images in zip(self.names, self, strict=True)}
        return {name: fit for name, fit in fits.items() if fit and fit.distance > max_shift}

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def _drop_bad_headers(self) -> dict[str, str]:
        refused = {}
        for name, paths in self.files.items():
            try:
                if len({_header(path, self.channels) for path in paths}) > 1:
                    raise ValueError("the images have different sizes; pairs must show the same pixels")
            except (ValueError, OSError) as error:
                refused[name] = str(error)
        if len(refused) < len(self.names):  # if all are bad, checking them says so
            self.names = [name for name in self.names if name not in refused]
            self.files = {name: self.files[name] for name in self.names}
        return refused

    def _check_headers(self) -> None:
        sizes = {name: [_header(path, self.channels) for path in paths] for name, paths in self.files.items()}
        for name, mine in sizes.items():
            if len(set(mine)) > 1:
                each = ", ".join(f"{y} x {x} ({c})" for c, (y, x) in zip(self.contrasts, mine, strict=True))
                raise ValueError(f"the images {name} have different sizes: {each}; pairs must show the same pixels")
        if self.size is None and len({mine[0] for mine in sizes.values()}) > 1:
            one, other = list({mine[0]: name for name, mine in sizes.items()}.items())[:2]
            each = " and ".join(f"{y} x {x} ({name})" for (y, x), name in (one, other))
            raise ValueError(f"the images have different sizes: {each}; bring them to one with size=(y, x)")


def worst_alignment(images: Sequence[Tensor], reach: int = 3) -> Alignment | None:
    """How the one of several images (channel, y, x) that fits the first worst does so; None for a single image."""
    first, *others = (x.mean(0).numpy() for x in images)
    return max((alignment(first, other, reach) for other in others), key=lambda fit: fit.distance, default=None)
