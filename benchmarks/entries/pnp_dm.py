"""PnP-DM (split Gibbs): sweeps between the data and the prior, five evaluations of reverse diffusion in each."""

from companion.diffusion.gibbs import split_gibbs
from companion.diffusion.noise import karras

NAME, GRID = "PnP-DM", {"last": (0.7, 1.5, 3.0, 6.0)}  # the last coupling, in noise_std
STEPS = 5


def sample(D, A, y, noise_std, seeds, calls, last=0.7):
    rhos = karras(max(2, calls // STEPS), last * noise_std, 5.0)[:-1]
    return split_gibbs(D, A, y, noise_std, rhos, seeds=seeds, steps=STEPS)
