"""The readout that says whether a scan shows a head: fitted to features of a prior, of heads and of what is none.

    python -m companion.papers.organ general/2d         # half an hour; the prior's errors.json then has it

The prior that learnt from heads predicts anything with edges, so held-out samples do not tell what it was not shown
(docs/trust.md). Heads are slices of the training heads in any plane, place and contrast; what is none is drawn
(`companion.data.no_heads`). Both are scanned and reconstructed alike, so that neither noise nor aliasing tells.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from companion.data import anatomy
from companion.data.heads import (
    AIR,
    MARGIN,
    Head,
    add_lesions,
    bias_field,
    draw_contrast,
    draw_plane,
    resolution,
    texture,
)
from companion.data.heads_download import load_heads
from companion.data.no_heads import Other, drawn
from companion.data.random_scans import random_scan
from companion.evaluation.organ import Organ, features, standard
from companion.extras import extra
from companion.files import project_root
from companion.models.checkpoint import load_denoiser
from companion.models.errors import save_organ
from companion.papers.crops import Bank, complete
from companion.papers.general import scanned
from companion.reconstruction.regularised import cg, tv

PART, ALIKE = 256, 16  # images in a file of the bank, and those that are scanned together
FIELDS_MM = (120.0, 330.0)  # sides of the images of heads
LEAST = 0.06  # share of an image that tissue fills, at least
PEOPLE, BRAINS = 0.08, 0.14  # shares of the heads: virtual people, and brains without a skull
PHOTOGRAPHS = ("brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "horse", "moon", "hubble_deep_field")
RIDGES = (0.001, 0.003, 0.01, 0.03)  # of which validation images choose
ACCEPTED, HIGHEST = 0.9, 0.5  # share of validation heads that is accepted, and the highest probability asked for


# -------------------------------------------------------------------------------------------------------------- images


def head_slice(head: Head, rng: np.random.Generator, size: int, field_mm: float) -> np.ndarray:
    """Return one image (size, size) of a head in a new contrast and plane, anywhere from its vertex to its neck.

    As `companion.data.heads.head_image`, which shows what is around the middle of the head.
    """
    pixel = field_mm / size
    fine = math.ceil(pixel / 1.3)
    n = (size + 2 * MARGIN) * fine
    tone = draw_contrast(head.levels.numpy(), rng)
    while True:
        plane = draw_plane(head, rng, n, pixel / fine)
        step = plane.normal / plane.normal.norm()
        away = (head.tissue[int(rng.integers(len(head.tissue)))] - plane.points.mean((0, 1))) @ step
        signal = head.at(plane.shifted(float(away) * rng.uniform(0, 1))).numpy()
        if (signal > AIR).mean() > LEAST:
            break
    image = add_lesions(tone(signal), rng, pixel / fine)
    return resolution(image * texture(n, rng) * bias_field(n, rng), rng, size, fine)


def a_head(heads: Sequence[Head], split: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return an image of a whole head, of a brain alone, or of a virtual person of a split."""
    brains = [head for head in heads if head.name.endswith("_brain")]
    whole = [head for head in heads if not head.name.endswith("_brain")]
    kind, field_mm = rng.random(), rng.uniform(*FIELDS_MM)
    if kind < PEOPLE:
        person = anatomy.cohort(split, 500)[int(rng.integers(500))]
        contrast = str(rng.choice(("T1w", "T2w", "PDw")))
        height = torch.tensor([rng.uniform(-50, 72)])
        return anatomy.render(person, contrast, (1, size, size), slices_mm=height).image[0].abs().numpy()
    if brains and kind < PEOPLE + BRAINS:
        return head_slice(brains[0], rng, size, 0.8 * field_mm)
    return head_slice(whole[int(rng.integers(len(whole)))], rng, size, field_mm)


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """Grey photographs (y, x) that scikit-image carries, in [0, 1]; other textures than those that are drawn."""
    with extra("notebooks"):
        from skimage import data
    found = [np.asarray(getattr(data, name)(), np.float32) for name in PHOTOGRAPHS]
    return tuple((v[..., :3].mean(-1) if v.ndim == 3 else v) / v.max() for v in found)


def photograph(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a part of a photograph, (size, size)."""
    known = photographs()
    image = known[int(rng.integers(len(known)))]
    step = int(rng.integers(1, max(2, min(image.shape) // size + 1)))
    image = image[: len(image) // step * step, : image.shape[1] // step * step]
    image = image.reshape(len(image) // step, step, -1, step).mean((1, 3))
    top, left = (int(rng.integers(max(1, n - size + 1))) for n in image.shape)
    part = image[top : top + size, left : left + size]
    return np.pad(part, [(0, size - n) for n in part.shape])


def as_scanned(image: Tensor, rng: np.random.Generator, generator: Generator) -> Tensor:
    """Return images (batch, 1, y, x) of real ones as a scan shows them: fully sampled, zero-filled, CG or TV."""
    x0, kind = scanned(image, generator), rng.random()
    if kind < 0.3:
        return x0
    _, A, y, std = random_scan(x0, generator)
    weight = float(std.mean()) ** 1.5 * rng.uniform(0.5, 4)
    return A.H(y) if kind < 0.45 else cg(A, y, 10 * weight, 12) if kind < 0.65 else tv(A, y, weight, 12)


def bank_part(
    heads: Sequence[Head], part: int, split: str = "train", seed: int = 23, others: Sequence[Other] | None = None
) -> np.ndarray:
    """Return the images (PART, SIDE, SIDE) float16 of one file, as the network sees them; every other one a head."""
    if others is None:
        others = (partial(a_head, heads, split), photograph)
    found = []
    for batch in range(PART // ALIKE):
        rng = np.random.default_rng([seed, part, batch])
        size = int(rng.choice((64, 64, 80, 96)))
        pairs = [(a_head(heads, split, rng, size), drawn(rng, size, others)) for _ in range(ALIKE // 2)]
        image = torch.from_numpy(np.stack([x for pair in pairs for x in pair]))[:, None]
        bright = image.abs().flatten(1).quantile(0.98, dim=1).clamp(min=0.05)
        image = (image / bright[:, None, None, None]).clamp(-0.3, 3)
        if rng.random() < 0.35:
            image = image[:, :, : size * int(rng.integers(5, 8)) // 8]
        image = image.transpose(2, 3) if rng.random() < 0.5 else image
        shown = as_scanned(image.contiguous(), rng, Generator().manual_seed(int(rng.integers(2**31))))
        found.append(standard(shown)[:, 0].numpy())
    return np.concatenate(found).astype(np.float16)


def prepare_bank(folder: Path, heads: str, images: int, split: str = "train", more_heads: bool = False) -> Bank:
    """Return the images of a split, those of "validation" in a folder of their own; those that lack are made first.

    more_heads: training images show those of `companion data get more-heads`, too.
    """
    seed = {"train": 23, "validation": 29}[split]

    def source() -> Callable[[int], np.ndarray]:
        splits = ("train", "more") if more_heads and split == "train" else (split,)
        found = [head for name in splits for head in load_heads(project_root() / heads, name)]
        return partial(bank_part, found, split=split, seed=seed)

    return complete(folder / split, images, PART, source)


# ------------------------------------------------------------------------------------------------------------- fitting


def varied(x: Tensor, generator: Generator) -> Tensor:
    """Return images (batch, 1, SIDE, SIDE) turned, mirrored, toned, moved and sized at random."""
    turns, mirror = torch.randint(4, (2,), generator=generator).tolist()
    x = x.rot90(turns, (2, 3))
    x = x.flip(3) if mirror % 2 else x
    n = len(x)
    x = x ** (0.3 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)).exp()
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 + 0.2 * (torch.rand(n, generator=generator) - 0.5)
    matrix[:, :, 2] = 0.2 * (torch.rand(n, 2, generator=generator) - 0.5)
    return standard(F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False))


def regression(x: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return weight (d,) and bias of the logistic regression of labels (n,), 0 or 1, on features (n, d).

    The features are brought to unit variance; ridge: penalty on the square of their weights, to the mean cross entropy.
    """
    middle, width = x.mean(0), x.std(0) + 1e-6
    z = (x - middle) / width
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.binary_cross_entropy_with_logits(z @ w[1:] + w[0], labels) + ridge * w[1:].square().sum()
        value.backward()
        return value

    search.step(loss)  # pyright: ignore[reportArgumentType]
    weight = w[1:].detach() / width
    return weight, (w[0].detach() - middle @ weight).item()


def labels_of(images: Bank) -> Tensor:
    """Return the labels of a bank: every other image is a head, 1."""
    return (torch.arange(len(images)) % 2 == 0).float()


def fit_organ(
    prior: str,
    heads: str = "data/heads",
    bank: str = "data/organ_bank",
    images: int = 12288,
    validation: int = 512,
    more_heads: bool = False,
) -> dict[str, float]:
    """Return what was found of a readout that is now a part of a prior's errors.json.

    Learnt from `images` scans of training heads and drawings, each once as it is and once varied. `validation` scans of
    the head held for validation and of new drawings choose the ridge, the temperature of the logits (Guo et al. 2017,
    arXiv 1706.04599) and the threshold, the largest, up to HIGHEST, from which ACCEPTED of the heads look like heads.
    """
    D, generator = load_denoiser(prior), Generator().manual_seed(0)
    folder = project_root() / (f"{bank}_more" if more_heads else bank)
    known = prepare_bank(folder, heads, images, "train", more_heads)
    others = prepare_bank(folder, heads, validation, "validation")
    x = [torch.stack([bank[i] for i in range(len(bank))]) for bank in (known, others)]
    labels, truth = labels_of(known), labels_of(others)
    learnt = torch.cat([x[0], torch.cat([varied(part, generator) for part in x[0].split(16)])])
    seen = features(D, learnt), features(D, x[1])
    fits = [regression(seen[0], labels.repeat(2), ridge) for ridge in RIDGES]
    weight, bias = min(fits, key=lambda f: calibrated(seen[1] @ f[0] + f[1], truth)[1])
    T, entropy = calibrated(seen[1] @ weight + bias, truth)
    organ = Organ("head", HIGHEST, weight / T, bias / T)
    p = torch.cat([organ.probability(D, part) for part in x[1].split(32)])
    accept = min(HIGHEST, round(p[truth == 1].quantile(1 - ACCEPTED).item(), 3))
    save_organ(prior, {"name": "head", "accept": accept, "bias": bias / T, "weight": (weight / T).tolist()})
    p, q = p[truth == 1], p[truth == 0]
    return {
        "cross entropy": entropy, "AUC": (p[:, None] > q).float().mean().item(), "accept": accept,
        "heads accepted": (p >= accept).float().mean().item(), "others flagged": (q < accept).float().mean().item(),
    }  # fmt: skip


def calibrated(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the temperature that logits (n,) are best divided by, and the cross entropy then."""
    tried = torch.linspace(-1, 2, 61).exp().tolist()
    return min(((T, F.binary_cross_entropy_with_logits(logits / T, labels).item()) for T in tried), key=lambda v: v[1])


if __name__ == "__main__":
    print(fit_organ(sys.argv[1], more_heads="more-heads" in sys.argv[2:]))
