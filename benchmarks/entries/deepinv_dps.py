"""deepinv's DPS on our prior and operator; deepinv must be installed. A gradient counts as another evaluation."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from between_0_and_1 import each_seed  # noqa: E402

NAME, GRID = "deepinv's DPS", {"weight": (1.0, 3.0, 10.0)}


def sample(D, A, y, seeds, calls, weight=1.0):
    from deepinv.sampling import DPS

    def make(denoiser, physics):
        steps = max(2, calls // 2)
        model = DPS(denoiser, num_steps=steps, weight=weight, dtype=torch.float32, rng=torch.Generator())
        return lambda data, physics, seed: model(data, physics, x_init=(1, *physics.img_size), seed=seed)

    return each_seed(make, D, A, y, seeds)
