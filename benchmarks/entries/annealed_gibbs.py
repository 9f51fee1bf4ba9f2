"""The recommended sampler: draws from N(D(x), C) and the data, C measured on the validation images."""

from companion.diffusion.covariance import Measured
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras

NAME, GRID = "annealed Gibbs", {"last": (3.0, 4.0, 6.0)}  # level of the last sweep, in noise_std
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # where the error of D is measured
measured: dict = {}  # by the sum of the images, which one prior shares


def sample(D, A, y, noise_std, seeds, calls, images, last=4.0):
    key = images.abs().sum().item()
    if key not in measured:
        measured[key] = Measured.fit(D.D, images, LEVELS)
    G = posterior_mean(A, y, noise_std, measured[key])
    return annealed_gibbs(D, G, karras(calls, last * noise_std, 5.0), seeds=seeds)
