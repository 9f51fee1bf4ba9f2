"""DAPS: steps of the reverse ODE make x0, whose error is taken for white; draw x0 from that and the data, and renoise.

The draw is exact here, by conjugate gradients, where the paper takes Langevin steps to the same law.
"""

from companion.diffusion.covariance import Factor
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import sample as solve
from companion.randomness import generators, randn

NAME, GRID = "DAPS", {"error": (0.1, 0.3, 1.0)}  # of x0, in units of the noise level; at most `MOST`
STEPS, MOST = 3, 0.3


def sample(D, A, y, noise_std, seeds, calls, error=0.3):
    draws, G = generators(seeds), posterior_mean(A, y, noise_std)
    z = 0
    for sigma in karras(max(2, calls // STEPS), noise_std, 5.0)[:-1].tolist():
        x = z + sigma * randn(A.domain_shape, y.dtype, draws)
        levels = karras(STEPS, sigma / 20, sigma)
        x0 = solve(D, levels, shape=A.domain_shape, seeds=draws, solver="dpmpp_2m", dtype=y.dtype, state=x).x
        variance = x0.real.new_tensor(min(error * sigma, MOST) ** 2)
        z = G.draw(x0, Factor.diagonal(variance), draws)
    return z
