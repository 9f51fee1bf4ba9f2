"""deepinv's DiffPIR on our prior and operator, its data step solved exactly; deepinv must be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from between_0_and_1 import WIDE, each_seed, exact_prox  # noqa: E402

NAME, GRID = "deepinv's DiffPIR", {"weight": (3.0, 7.0, 20.0, 60.0), "zeta": (0.3, 1.0)}


def sample(D, A, y, noise_std, seeds, calls, weight=7.0, zeta=0.3):
    from deepinv.optim import L2
    from deepinv.sampling import DiffPIR

    def make(denoiser, physics):
        physics.prox_l2 = exact_prox(2 * WIDE * A)
        return DiffPIR(denoiser, L2(), sigma=noise_std, max_iter=calls, zeta=zeta, lambda_=weight)

    return each_seed(make, D, A, y, seeds)
