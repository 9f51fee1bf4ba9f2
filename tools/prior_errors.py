"""Measures how far a prior errs on its own people and on anything else, and keeps it beside the weights (errors.json).

    python tools/prior_errors.py brain/t1w --size 64
    python tools/prior_errors.py general/2d --size 128 --own heads
    python tools/prior_errors.py aid/heads --size 128 --own stacks
    python tools/prior_errors.py pet/heads --own activity --widening 2.2
    python tools/prior_errors.py latent3d/voxels --own volumes --count 6

The first model is that of images like the training set, which the prior did not see; the last that of dead leaves,
shapes that hide each other: nothing of a head is in them, so a prior that errs on a scan as it does there does not know
the scan, and error bars of that width hold all the same. docs/trust.md says how they are used.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data.head_sequences import head_sequence, leaves_sequence
from companion.data.heads import dead_leaves, head_image
from companion.data.heads_download import load_heads
from companion.data.virtual import slices
from companion.diffusion.denoisers import AnySize
from companion.diffusion.recalibration import ErrorModel
from companion.files import project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.models.errors import save_errors
from companion.papers.general import scanned
from companion.papers.latent3d.voxels import validation_volumes
from companion.reconstruction.activity import MR_GIVEN
from companion.reconstruction.sequence import CONTEXT_GIVEN, drawn

SIGMAS = torch.logspace(-2.5, 1.3, 12)
SLICES = 4  # of a stack
PIXELS = {"heads": (0.75, 1.3), "heads, large pixels": (2.5, 3.5)}  # mm
WIDENING = {"heads": 1.25}  # of draws of such pixels that begin with an image: benchmarks/real_heads.py, docs/heads.md


def people(count: int, size: int) -> Tensor:
    """Complex slices (count, 1, y, x) of virtual people of the validation split."""
    return slices("validation", count, size)


def leaves(count: int, size: int) -> Tensor:
    """Complex dead leaves (count, 1, y, x), most of them with noise."""
    return phased([dead_leaves(np.random.default_rng(seed), size) for seed in range(count)])


def heads(count: int, size: int, kind: str = "heads") -> Tensor:
    """Complex images (count, 1, y, x) of the validation head, warped and recoloured as in training, most with noise."""
    known = load_heads(project_root() / "data" / "heads", "validation")
    rngs = [np.random.default_rng(10_000 + i) for i in range(count)]
    pixels = np.geomspace(*PIXELS[kind], count)
    return phased([head_image(known[i % len(known)], rngs[i], size, pixels[i]) for i in range(count)])


def coarse_heads(count: int, size: int) -> Tensor:
    """The same with large pixels, where a head is small and has more edges to err at."""
    return heads(count, size // 2, "heads, large pixels")


def stacks(count: int, size: int, kind: str = "heads") -> tuple[Tensor, Tensor]:
    """The same as stacks of slices about a pixel or 3 mm apart: the last slice of each, and those before it."""
    known = load_heads(project_root() / "data" / "heads", "validation")
    made = []
    for i, pixel in enumerate(np.geomspace(*PIXELS[kind], count)):
        gap = max(3.0, pixel) if i % 2 else pixel
        made.append(
            head_sequence(known[0], np.random.default_rng(30_000 + i), size, SLICES, pixel, [gap] * (SLICES - 1))
        )
    return last_of(made)


def coarse_stacks(count: int, size: int) -> tuple[Tensor, Tensor]:
    """The same with large pixels."""
    return stacks(count, size // 2, "heads, large pixels")


def leaves_stacks(count: int, size: int) -> tuple[Tensor, Tensor]:
    """The same of dead leaves."""
    return last_of([leaves_sequence(np.random.default_rng(seed), size, SLICES) for seed in range(count)])


def last_of(made: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The last slices (stack, 1, y, x) of stacks as scans, and the slices before them with errors as draws have."""
    x = scanned(torch.from_numpy(np.stack(made))[:, :, None], Generator().manual_seed(3))
    return x[:, -1], drawn(x, 4)[:, :-1]


def brains(count: int, size: int) -> Tensor:
    """Volumes (count, 1, z, y, x) of virtual patients of the validation split; `size` is theirs."""
    return validation_volumes(None, count)["virtual patients"]


def head_volumes(count: int, size: int) -> Tensor:
    """Volumes (count, 1, z, y, x) of the validation head, warped and recoloured as in training."""
    return validation_volumes(project_root() / "data" / "heads", count)["a real head"]


def phased(images: list[np.ndarray]) -> Tensor:
    """Real images as scans (image, 1, y, x)."""
    return scanned(torch.from_numpy(np.stack(images))[:, None], Generator().manual_seed(3))


def activity(count: int, size: int) -> Tensor:
    """Activity (count, 1, y, x) of the validation head, warped and with random uptake as in training."""
    return active_with_mr(count, size)[0]


def active_with_mr(count: int, size: int) -> tuple[Tensor, Tensor]:
    """The same, and what a prior is given of its MR."""
    from companion.data import head_activity as source

    known = [source.active_head(head) for head in load_heads(project_root() / "data" / "heads", "validation")]
    rngs = [np.random.default_rng(20_000 + i) for i in range(count)]
    return given([source.activity_and_mr(known[i % len(known)], rng, size) for i, rng in enumerate(rngs)])


def given(pairs: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Activity (image, 1, y, x) of pairs with an MR, and the condition: the MR, known everywhere."""
    both = torch.from_numpy(np.stack(pairs))
    return both[:, :1], torch.cat([both[:, 1:], torch.ones_like(both[:, 1:])], 1)


def active_people(count: int, size: int) -> Tensor:
    """Activity (count, 1, y, x) of virtual people of the validation split, a lesion each."""
    from companion.data.head_activity import SCALE_KBQ
    from companion.data.pet import held_out

    return held_out("validation", count, size, lesions=1).image / SCALE_KBQ


def active_leaves(count: int, size: int) -> Tensor:
    """Dead leaves (count, 1, y, x) as activity."""
    return leaves_with_mr(count, size)[0]


def leaves_with_mr(count: int, size: int) -> tuple[Tensor, Tensor]:
    """The same, and what a prior is given of their MR, half of which shows other leaves."""
    from companion.data.head_activity import leaves_pair

    return given([leaves_pair(np.random.default_rng(seed), size) for seed in range(count)])


OWN = {  # images that the error is measured on, those like the training set first
    "people": {"virtual people": people, "dead leaves": leaves},
    "heads": {"heads": heads, "heads, large pixels": coarse_heads, "dead leaves": leaves},
    "stacks": {
        "heads": heads,
        "heads, large pixels": coarse_heads,
        "dead leaves": leaves,
        f"heads{CONTEXT_GIVEN}": stacks,
        f"heads, large pixels{CONTEXT_GIVEN}": coarse_stacks,
        f"dead leaves{CONTEXT_GIVEN}": leaves_stacks,
    },
    "activity": {
        "heads": activity,
        "dead leaves": active_leaves,
        f"heads{MR_GIVEN}": active_with_mr,
        f"dead leaves{MR_GIVEN}": leaves_with_mr,
    },
    "volumes": {"virtual patients": brains, "heads": head_volumes},
    "active people": {"virtual people": active_people, "dead leaves": active_leaves},
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="checkpoint: an embedded name or a folder")
    parser.add_argument("--own", choices=OWN, default="people", help="images like those of its training")
    parser.add_argument(
        "--widening",
        type=float,
        default=1.0,
        help="factor that the variance of posterior draws asks for: the inverse of "
        "the calibration that benchmarks/pet_heads.py measures on a validation head (PET)",
    )
    parser.add_argument("--size", type=int, default=64, help="pixels along y and x")
    parser.add_argument("--count", type=int, default=16, help="images of each kind")
    args = parser.parse_args(argv)
    D = load_denoiser(args.name)
    D = AnySize(D, network_of(D).total_stride)
    errors = {}
    for name, make in OWN[args.own].items():
        made = make(args.count, args.size)
        images, cond = made if isinstance(made, tuple) else (made, None)
        about = f"{len(images)} images of {' x '.join(map(str, images.shape[2:]))}: {name}"
        error = ErrorModel.fit(D, images, SIGMAS, about=about, cond=cond)
        pixels = PIXELS.get(name.removesuffix(CONTEXT_GIVEN)) if args.own in ("heads", "stacks") else None
        widening = WIDENING.get(name, args.widening) if args.own == "heads" else args.widening
        errors[name] = replace(error, pixel_mm=pixels, widening=widening)
    print(save_errors(args.name, errors))


if __name__ == "__main__":
    main()
