"""Measures how far a prior errs on its own people and on anything else, and keeps it beside the weights (errors.json).

    python tools/prior_errors.py brain/t1w --size 64
    python tools/prior_errors.py general/2d --size 128 --own heads
    python tools/prior_errors.py pet/heads --own activity

The first model is that of images like the training set, which the prior did not see; the second that of dead leaves,
shapes that hide each other: nothing of a head is in them, so a prior that errs on a scan as it does there does not know
the scan, and error bars of that width hold all the same. docs/trust.md says how they are used.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data import anatomy
from companion.data.virtual import slices
from companion.diffusion.denoisers import AnySize
from companion.diffusion.recalibration import ErrorModel
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.models.errors import save_errors

SIGMAS = torch.logspace(-2, 1.3, 12)


def people(count: int, size: int) -> Tensor:
    """Complex slices (count, 1, y, x) of virtual people of the validation split."""
    return slices("validation", count, size)


def leaves(count: int, size: int) -> Tensor:
    """Complex dead leaves (count, 1, y, x), two thirds of them within an ellipse with air around it.

    Radii follow r^-3, so that the images look alike at every scale (Lee, Mumford and Huang 2001); grey values are
    uniform, with a little 1/f texture.
    """
    images = [dead_leaves(np.random.default_rng(seed), size) for seed in range(count)]
    magnitude = torch.from_numpy(np.stack(images).astype(np.float32))[:, None]
    return anatomy.random_phase(magnitude, Generator().manual_seed(3))


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """One image of `leaves`, magnitudes up to about 1."""
    y, x = np.mgrid[:size, :size].astype(float)
    image = np.zeros((size, size))
    unit = size / 64
    for radius in sorted(rng.pareto(2, 150) * 2.5 * unit + 2 * unit, reverse=True):
        cy, cx = rng.uniform(-0.08 * size, 1.08 * size, 2)
        stretch, angle = rng.uniform(0.5, 2), rng.uniform(0, np.pi)
        a = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        b = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        cover = np.clip(min(radius, 0.6 * size) - np.hypot(a / stretch, b * stretch) + 0.5, 0, 1)
        image = image * (1 - cover) + cover * rng.uniform(0, 1.1)
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    k[0, 0] = 1
    texture = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) / k).real
    image = np.clip(image * (1 + 0.06 * texture / texture.std()), 0, None)
    if rng.random() < 2 / 3:
        half = size * rng.uniform(0.3, 0.48, 2)
        image = image * (((y - size / 2) / half[0]) ** 2 + ((x - size / 2) / half[1]) ** 2 < 1)
    return image


def heads(count: int, size: int) -> Tensor:
    """Complex images (count, 1, y, x) of the validation head, warped and recoloured as in training."""
    from companion.data import heads as source
    from companion.data.heads_download import load_heads
    from companion.data.phase import add_phase
    from companion.files import project_root

    known = load_heads(project_root() / "data" / "heads", "validation")
    images = [source.head_image(known[i % len(known)], np.random.default_rng(10_000 + i), size) for i in range(count)]
    return add_phase(torch.from_numpy(np.stack(images))[:, None], Generator().manual_seed(3))


def activity(count: int, size: int) -> Tensor:
    """Activity (count, 1, y, x) of the validation head, warped and with random uptake as in training."""
    from companion.data import head_activity as source
    from companion.data.heads_download import load_heads
    from companion.files import project_root

    known = [source.active_head(head) for head in load_heads(project_root() / "data" / "heads", "validation")]
    rngs = [np.random.default_rng(20_000 + i) for i in range(count)]
    images = [source.activity_image(known[i % len(known)], rng, size) for i, rng in enumerate(rngs)]
    return torch.from_numpy(np.stack(images))[:, None]


def active_people(count: int, size: int) -> Tensor:
    """Activity (count, 1, y, x) of virtual people of the validation split, a lesion each."""
    from companion.data.head_activity import SCALE_KBQ
    from companion.papers.pet.data import held_out

    return held_out("validation", count, size, lesions=1).image / SCALE_KBQ


def active_leaves(count: int, size: int) -> Tensor:
    """Dead leaves (count, 1, y, x) as activity."""
    from companion.data.head_activity import leaves_image

    return torch.from_numpy(np.stack([leaves_image(np.random.default_rng(seed), size) for seed in range(count)]))[
        :, None
    ]


OWN = {
    "people": ("virtual people", people, leaves),
    "heads": ("heads", heads, leaves),
    "activity": ("heads", activity, active_leaves),
    "active people": ("virtual people", active_people, active_leaves),
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="checkpoint: an embedded name or a folder")
    parser.add_argument("--own", choices=OWN, default="people", help="images like those of its training")
    parser.add_argument("--size", type=int, default=64, help="pixels along y and x")
    parser.add_argument("--count", type=int, default=16, help="images of each kind")
    args = parser.parse_args(argv)
    D = load_denoiser(args.name)
    D = AnySize(D, network_of(D).total_stride)
    errors = {}
    kind, own, other = OWN[args.own]
    for name, make in ((kind, own), ("dead leaves", other)):
        about = f"{args.count} images of {args.size} x {args.size}: {name}"
        errors[name] = ErrorModel.fit(D, make(args.count, args.size), SIGMAS, about=about)
    print(save_errors(args.name, errors))


if __name__ == "__main__":
    main()
