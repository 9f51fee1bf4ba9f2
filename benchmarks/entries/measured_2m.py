"""A deterministic solver with the measured error of the prior: draws without the texture of a last Gibbs sweep."""

from companion.diffusion.covariance import Measured
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import sample as solve

NAME, GRID = "measured error, 2M", {"last": (0.5, 1.0, 2.0)}  # last level, in noise_std
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # where the error of D is measured
measured: dict = {}  # by the sum of the images, which one prior shares


def sample(D, A, y, noise_std, seeds, calls, images, last=0.5):
    key = images.abs().sum().item()
    if key not in measured:
        measured[key] = Measured.fit(D.D, images, LEVELS)
    G = posterior_mean(A, y, noise_std, measured[key])
    levels = karras(calls, last * noise_std, 5.0)
    return solve(G(D), levels, shape=A.domain_shape, seeds=seeds, solver="dpmpp_2m", dtype=y.dtype)
