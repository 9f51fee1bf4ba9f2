"""What a file is, as its name says: contrast, mask, labels, probability; and which mask belongs to which image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from companion.data.intake.records import Item, Unreadable

_EDGE, _END = r"(?:^|[_\-. /])", r"(?=$|[_\-. /])"
LABELS = re.compile(
    _EDGE + r"(?:dseg|aseg\w*|a\d+s?\w*aseg|aparc\w*|w?m?parc\w*|segs?|segmentations?|labels?(?:tr|ts)?|labelmap|gt"
    r"|ground_?truth|parcellations?|atlas\w*|tissues?|lesions?(?:_?mask)?|tumou?r|manual|ribbon)" + _END,
    re.IGNORECASE,
)
MASK = re.compile(
    _EDGE + r"(?:brain_?)?masks?" + _END + r"|" + _EDGE + r"(?:ss|staple|brainmask)" + _END, re.IGNORECASE
)
PROBABILITY = re.compile(
    _EDGE + r"(?:probseg|prob(?:abilit(?:y|ies)|map)?s?|pve(?:_?\d)?|posteriors?\d*)" + _END, re.IGNORECASE
)
FIELD = re.compile(_EDGE + r"(?:xfm|warps?\d*\w*|displacement|deformation|ddf|jacobian)" + _END, re.IGNORECASE)
CONTRASTS = (  # the first that fits; BIDS's names
    ("FLAIR", r"\w*flair|t2f"),
    ("T2starw", r"t2star\w*|swi|qsm"),
    ("PET", r"pet|fdg|suv\w*"),
    ("CT", r"cta?"),
    ("T1ce", r"t1(?:_?ce|c|gd|_?post)|axt1post"),
    ("PDw", r"(?:ax|cor)?pd(?:w|fs)?(?:_fbk)?"),
    ("T2w", r"(?:ax|sag|cor|w)?t2(?:w|wi|n)?(?:\d\d)?"),
    ("T1w", r"(?:ax|sag|cor|w)?t1(?:w|wi|n|pre)?(?:\d\d)?|mp2?rage\w*|i?r?f?spgr|unit1"),
    ("bold", r"bold|rest|task\w*"),
    ("dwi", r"dwi|dti|adc"),
    ("angio", r"mra|angio|tof"),
    ("MR", r"mri?"),
)
_CONTRASTS = [(name, re.compile(_EDGE + f"(?:{form})" + _END, re.IGNORECASE)) for name, form in CONTRASTS]
BRAIN_MASK = re.compile(r"desc-brain|brain_?mask|(?:^|_)(?:bet|ss|staple)(?:_|$)", re.IGNORECASE)


def stem(name: str) -> str:
    """Return the last part of a name without its ending: what .nii.gz and the like hide."""
    return re.sub(
        r"(?:\.(?:nii|mnc|mgz|mgh|img|hdr|mha|mhd|nrrd|nhdr|h5|hdf5|npy|cfl|png|tiff?|bmp|jpe?g|gz|bz2))+$",
        "",
        name.rsplit("/", 1)[-1],
        flags=re.IGNORECASE,
    )


def kind_of(name: str) -> str:
    """Return "mask", "labels", "probability" or "" as the name below the folder says (of an image it says nothing)."""
    last, folders = stem(name), name.rpartition("/")[0]
    for kind, form in (("probability", PROBABILITY), ("mask", MASK), ("labels", LABELS)):
        if form.search(last):
            return kind
    nearest = folders.rsplit("/", 1)[-1]
    for kind, form in (
        ("mask", r"(?:brain)?_?masks?(?:tr|ts)?"),
        ("labels", r"labels?(?:tr|ts)?|seg(?:mentation)?s?|gt|ground_?truth"),
    ):
        if re.fullmatch(form, nearest, re.IGNORECASE):
            return kind
    return ""


def contrast_of(name: str) -> str:
    """Return the contrast that a name below the folder tells ("T1w", "FLAIR", "PET", ...), "" if none."""
    for text in (stem(name), *reversed(name.split("/")[:-1])):
        for contrast, form in _CONTRASTS:
            if form.search(text):
                return contrast
    return ""


def refuse_labels(array: np.ndarray, path: str | Path) -> None:
    """Raise Unreadable for a volume whose values are names of regions rather than a signal, whatever it is called.

    Regions have few different whole numbers, and neighbours inside have the same one; a signal varies, if only by
    noise. Volumes of two values are masks.
    """
    sample = np.asarray(array)
    if sample.dtype.kind == "c" or sample.size < 4096:
        return
    inside = sample[sample != 0]
    if inside.size < 64 or (inside.dtype.kind == "f" and not np.array_equal(inside[:4096], np.rint(inside[:4096]))):
        return
    first = sample[..., 1:]
    same = (first == sample[..., :-1])[first != 0]
    if same.mean() < 0.75:
        return
    values = np.unique(inside)
    if not np.array_equal(values, np.rint(values)):
        return
    if len(values) == 1:
        raise Unreadable(path, f"a mask: its values are 0 and {values[0]:g}; give the image, and name this NAME_mask")
    if len(values) <= 8 or (len(values) <= 256 and same.mean() > 0.9):
        raise Unreadable(path, f"a label map: {len(values)} whole numbers in uniform regions; give the image itself")


def entities(name: str) -> dict[str, str]:
    """Return the BIDS entities of a file's name, with its suffix under "suffix"."""
    parts = stem(name).split("_")
    return dict(part.split("-", 1) for part in parts if "-" in part) | {"suffix": parts[-1]}


def mask_of(image: Item, items: Iterable[Item]) -> Item | None:
    """Return the brain mask of an image among the items of its folder, None if there is none or no telling which.

    By name (NAME_mask, NAME_brainmask, NAME_ss, ...), beside it or the only one so called; or by BIDS: a mask of the
    same person, session and space, called desc-brain before any other. Masks of lesions do not count.
    """
    own = stem(image.name)
    bare = re.sub(r"(_desc-preproc)(?=_)", "", own)
    masks = [m for m in items if m.what.kind == "mask" and m.person == image.person]
    named = [m for m in masks if MASK.sub("", stem(m.name)).rstrip("_-. ") in (own, bare)]
    beside = [m for m in named if m.path.parent == image.path.parent]
    if len(beside) == 1 or (not beside and len(named) == 1):
        return (beside or named)[0]
    if named:
        return sorted(beside or named, key=lambda m: m.name)[0]
    mine = entities(image.name)
    keys = ("sub", "ses", "space", "res", "run", "acq")
    fit = [
        m
        for m in masks
        if m.session == image.session
        and "label" not in (e := entities(m.name))
        and all(e.get(k) in (mine.get(k), None) or (k in ("run", "acq") and k not in e) for k in keys)
        and (mine.get("space") == e.get("space"))
    ]
    brains = [m for m in fit if BRAIN_MASK.search(stem(m.name))] or fit
    near = [m for m in brains if m.path.parent == image.path.parent] or brains
    return near[0] if len(near) == 1 else None


def one_contrast(images: Sequence[Item], contrast: str | None = None) -> tuple[list[Item], dict[str, str]]:
    """Return the images of one contrast, and why the others are not used.

    contrast: as in `CONTRASTS`; None takes T1w where several are there, and stops where T1w is not among them. Images
    whose contrast nothing tells are kept unless one is asked for. Raises Unreadable where none is left.
    """
    there = sorted({item.what.contrast for item in images if item.what.contrast})
    wanted = contrast or ("T1w" if "T1w" in there and len(there) > 1 else None)
    if wanted is None and len(there) > 1:
        raise Unreadable(images[0].path.parent, f"images of several contrasts, {', '.join(there)}; choose one of them")
    if wanted is None:
        return list(images), {}
    kept = [i for i in images if i.what.contrast == wanted or (not i.what.contrast and contrast is None)]
    if images and not kept:
        raise Unreadable(images[0].path.parent, f"no {wanted} there, only {', '.join(there) or 'unnamed images'}")
    chosen = {item.name for item in kept}
    return kept, {
        i.name: f"{i.what.contrast or 'of unknown contrast'}, {wanted} is used" for i in images if i.name not in chosen
    }


def without_copies(images: Sequence[Item], mask: Mapping[str, Item | None]) -> tuple[list[Item], dict[str, str]]:
    """Return images without those that show the same scan twice: NAME beside its skull-stripped copy NAME_brain."""
    by_name = {(item.path.parent, stem(item.name)): item for item in images}
    left = {}
    for (folder, name), copy in by_name.items():
        plain = re.sub(r"[_-](?:brain|bet|stripped|skullstripped)$", "", name, flags=re.IGNORECASE)
        whole = by_name.get((folder, plain))
        if whole is None or whole is copy:
            continue
        unused, used = (copy, whole) if mask[whole.name] else (whole, copy)
        left[unused.name] = f"the same scan as {used.name}, which is used"
    return [item for item in images if item.name not in left], left


def one_each(images: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """Return one version of every image, and why the others are not used: fMRIPrep and its kin store several.

    A preprocessed image in its own space (desc-preproc, without space-) comes before the raw one, that before copies in
    other spaces; of a file and its compressed copy one is taken. Images that differ in anything else (session, run,
    acquisition, contrast) are all kept.
    """
    groups: dict[tuple, list[Item]] = {}
    for item in images:
        e = entities(item.name)
        versions = {k: v for k, v in e.items() if k not in ("desc", "space", "res", "den")}
        key = tuple(sorted(versions.items())) if "sub" in e else (re.sub(r"\.(?:gz|bz2)$", "", item.name.lower()),)
        groups.setdefault((item.person, item.session, key), []).append(item)
    kept, left = [], {}
    for group in groups.values():
        ranked = sorted(group, key=lambda i: (_rank(i), i.name))
        kept.append(ranked[0])
        left |= {other.name: f"another version of {ranked[0].name}, which is used" for other in ranked[1:]}
    chosen = {item.name for item in kept}
    return [item for item in images if item.name in chosen], left


def _rank(item: Item) -> int:
    e = entities(item.name)
    return 2 * ("space" in e) + (e.get("desc") != "preproc")
