"""Rounds the weights of a checkpoint to few bits of mantissa, as bfloat16, so that archives of them are smaller.

    python tools/round_weights.py general/2d --bits 6

What is bound to the weights (sha256 in config.json and errors.json, SHA256SUMS) follows. Measure before and after that
the prior errs alike: errors.json stays as it was.
"""

from __future__ import annotations

import argparse

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from companion.files import atomic_write, sha256
from companion.models.checkpoint import resolve
from companion.models.folder import ERRORS, write_sums


def rounded(t: Tensor, bits: int) -> Tensor:
    """A tensor of real numbers as bfloat16 with so many bits after the leading one; others as they are."""
    if not t.is_floating_point():
        return t
    mantissa, exponent = torch.frexp(t.float())  # mantissa in [0.5, 1)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent).bfloat16().contiguous()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="checkpoint: an embedded name or a folder")
    parser.add_argument("--bits", type=int, default=6, choices=range(1, 8), help="of mantissa; bfloat16 has 7")
    args = parser.parse_args(argv)
    folder = resolve(args.name)
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    before, tensors = sha256(weights), {key: rounded(t, args.bits) for key, t in load_file(weights).items()}
    with atomic_write(weights) as path:
        save_file(tensors, path, metadata=metadata)
    after = sha256(weights)
    for bound in (folder / "config.json", folder / ERRORS):
        if bound.exists():
            text = bound.read_text().replace(before, after)
            with atomic_write(bound) as path:
                path.write_text(text)
    write_sums()
    print(f"{weights}: {before[:12]} is now {after[:12]}")


if __name__ == "__main__":
    main()
