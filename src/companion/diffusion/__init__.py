"""Diffusion: noise, denoisers, losses, solvers, guidance and the one sampling loop; no MRI, no PET."""

from companion.diffusion.denoisers import ComplexDenoiser, Denoiser, DiscreteDenoiser, EDMDenoiser
from companion.diffusion.exact import FourierBasis, GaussianDenoiser, GaussianMixtureDenoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.diffusion.noise import DiscreteSchedule, karras, linear, log_uniform
from companion.diffusion.sampling import Bill, Samples, sample
from companion.diffusion.solvers import (
    SOLVERS,
    Solver,
    aid_stochastic,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    heun,
    heun_churn,
)
from companion.randomness import randn

__all__ = [
    "SOLVERS",
    "Bill",
    "ComplexDenoiser",
    "Denoiser",
    "DiscreteDenoiser",
    "DiscreteSchedule",
    "EDMDenoiser",
    "FourierBasis",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "Samples",
    "Solver",
    "aid_stochastic",
    "ddim",
    "ddpm",
    "discrete_loss",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "edm_loss",
    "euler",
    "heun",
    "heun_churn",
    "karras",
    "linear",
    "log_uniform",
    "randn",
    "sample",
]
