"""What became of a lesion in a translation: kept, lost, changed in size, or invented where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.evaluation.support import Support
from companion.evaluation.tables import grouped

VISIBLE = 0.08  # contrast of a lesion to the mirrored side, of bright tissue, from which it can be seen
KEPT = 0.5  # share of that contrast that a translation must show, with its sign
AROUND = 4  # pixels around a lesion that count as its place
BLOB = 0.2  # error of a region, of bright tissue, from which it is a lesion that nobody has
BLOB_PIXELS = 12  # of the smallest such region


def around(lesion: Tensor) -> Tensor:
    """The place of a lesion, bool: where its share (slice, 1, y, x) exceeds a twentieth, and `AROUND` pixels more."""
    return F.max_pool2d((lesion > 0.05).float(), 2 * AROUND + 1, 1, AROUND) > 0


def contrast(x: Tensor, lesion: Tensor) -> Tensor:
    """Mean of images (slice, 1, y, x) in a lesion less that of the mirrored side, (slice,); lesion: bool, as images."""
    count = lesion.flatten(1).sum(1).clamp(min=1)
    return ((x - x.flip(-1)) * lesion).flatten(1).sum(1) / count


def area(x: Tensor, lesion: Tensor, true: Tensor) -> Tensor:
    """Pixels in the place of a lesion that differ from the mirrored side by half its true contrast `true` (slice,)."""
    at = (F.max_pool2d(lesion.to(x), 2 * AROUND + 1, 1, AROUND) > 0) & (lesion | ~lesion.flip(-1))
    difference = F.avg_pool2d(x - x.flip(-1), 3, 1, 1) * true.sign().view(-1, 1, 1, 1)
    return (at & (difference > true.abs().view(-1, 1, 1, 1) / 2)).flatten(1).sum(1)


def invented(x: Tensor, truth: Tensor, tissue: Tensor, lesion: Tensor) -> Tensor:
    """Whether a translation shows a lesion where there is none, (slice,), bool.

    That is a region whose contrast to the mirrored side is wrong by `BLOB`, in the mean of 5 x 5 pixels. tissue: where
    to look, bool; the places of the true lesion and of its mirror image do not count.
    """
    from scipy.ndimage import label

    place = around(lesion)
    at = tissue & tissue.flip(-1) & ~place & ~place.flip(-1)
    weight = F.avg_pool2d(at.to(x), 5, 1, 2)
    error = F.avg_pool2d(torch.where(at, (x - x.flip(-1)) - (truth - truth.flip(-1)), 0), 5, 1, 2) / weight.clamp(
        min=0.2
    )
    found = []
    for e, inside in zip(error[:, 0], at[:, 0], strict=True):
        sizes = [0]
        for sign in (1, -1):
            names, count = cast(tuple[np.ndarray, int], label((inside & (sign * e > BLOB)).cpu().numpy()))
            sizes += [int((names == i).sum()) for i in range(1, count + 1)]
        found.append(max(sizes) >= BLOB_PIXELS)
    return torch.tensor(found)


def fates(
    x: Tensor, truth: Tensor, source: Tensor, lesion: Tensor, tissue: Tensor, support: Support | None = None
) -> list:
    """A row for each image (slice, 1, y, x): what became of its lesion (share of each pixel, or none), told by numbers.

    "seen": whether the lesion shows in the truth and in the source; "fate": kept (sign and half of the contrast) or
    lost; "contrast" of the translation over the true one; "volume" likewise; "invented"; and of `support` "marked", the
    share of the lesion that is marked, and "flagged", that of the tissue elsewhere.
    """
    inside = lesion > 0.5
    true, made, given = (contrast(v, inside) for v in (truth, x, source))
    sizes, own = area(truth, inside, true), area(x, inside, true)
    wrong = invented(x, truth, tissue, lesion)
    rows = []
    for i in range(len(x)):
        there = bool(inside[i].any())
        row: dict[str, object] = {
            "seen": there and min(abs(true[i].item()), abs(given[i].item())) >= VISIBLE,
            "invented": bool(wrong[i]),
        }
        if there:
            ratio = (made[i] / true[i]).item()
            row |= {
                "fate": "kept" if ratio >= KEPT else "lost",
                "contrast": ratio,
                "volume": (own[i] / sizes[i].clamp(min=1)).item(),
                "pixels": int(inside[i].sum()),
            }
        if support is not None:
            elsewhere = tissue[i] & ~around(lesion[i : i + 1])[0]
            row["flagged"] = support.marked[i][elsewhere].float().mean().item()
            if there:
                row["marked"] = support.marked[i][inside[i]].float().mean().item()
        rows.append(row)
    return rows


def summary(rows: Sequence[Mapping], *by: str) -> list[dict]:
    """Lesions that can be seen, by the columns `by`: how many, kept, contrast, volume, and lost ones that are marked.

    A lost lesion is marked where half of it is. "invented": of all images of the group, healthy ones among them.
    """
    table = []
    for key, mine in grouped(rows, *by).items():
        row = dict(zip(by, key if len(by) > 1 else (key,), strict=True))
        seen = [r for r in mine if r["seen"]]
        lost = [r for r in seen if r["fate"] == "lost"]

        def share(of: Sequence, test) -> float:
            return sum(map(test, of)) / len(of) if of else float("nan")

        median = (
            torch.tensor([[r["contrast"], r["volume"]] for r in seen]).median(0).values if seen else [float("nan")] * 2
        )
        row |= {
            "lesions": len(seen),
            "kept": share(seen, lambda r: r["fate"] == "kept"),
            "contrast, of true": float(median[0]),
            "volume, of true": float(median[1]),
            "lost": len(lost),
            "invented": share(mine, lambda r: r["invented"]),
        }
        if mine and "flagged" in mine[0]:
            row |= {
                "lost, marked": share(lost, lambda r: r["marked"] >= 0.5),
                "flagged elsewhere": sum(r["flagged"] for r in mine) / len(mine),
            }
        table.append(row)
    return table
