"""Companion: four diffusion-model papers in medical imaging, as notebooks that run.

    import companion as c

Everything that a reconstruction needs is an attribute, imported when it is first asked for: `import companion` itself
takes no time and no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# OpenMP's threads wait in a spinning loop by default: beside another busy process they burn the cores that they wait
# for, and a run takes many times as long. Read when torch is loaded, and handed on to kernels and batch jobs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from companion.acquisition.measurement import prepare_kspace as prepare_kspace
    from companion.diffusion.covariance import Isotropic as Isotropic
    from companion.diffusion.covariance import Jacobian as Jacobian
    from companion.diffusion.covariance import Measured as Measured
    from companion.diffusion.gibbs import annealed_gibbs as annealed_gibbs
    from companion.diffusion.guidance import dds as dds
    from companion.diffusion.guidance import diffpir as diffpir
    from companion.diffusion.guidance import dps as dps
    from companion.diffusion.guidance import pigdm as pigdm
    from companion.diffusion.guidance import posterior_mean as posterior_mean
    from companion.diffusion.noise import karras as karras
    from companion.diffusion.noise import log_uniform as log_uniform
    from companion.diffusion.sampling import sample as sample
    from companion.evaluation import metrics as metrics
    from companion.models.checkpoint import describe as describe
    from companion.models.checkpoint import load as load
    from companion.models.checkpoint import load_denoiser as load_denoiser
    from companion.operators.masks import cartesian_mask as cartesian_mask
    from companion.operators.mri import birdcage_maps as birdcage_maps
    from companion.operators.mri import estimate_maps as estimate_maps
    from companion.operators.mri import sense as sense
    from companion.randomness import generators as generators
    from companion.randomness import randn as randn
    from companion.show.explore import view as view

_HOME = {  # where each name lives; a module is its own home
    "prepare_kspace": "acquisition.measurement",
    "Isotropic": "diffusion.covariance",
    "Jacobian": "diffusion.covariance",
    "Measured": "diffusion.covariance",
    "annealed_gibbs": "diffusion.gibbs",
    "dds": "diffusion.guidance",
    "diffpir": "diffusion.guidance",
    "dps": "diffusion.guidance",
    "pigdm": "diffusion.guidance",
    "posterior_mean": "diffusion.guidance",
    "karras": "diffusion.noise",
    "log_uniform": "diffusion.noise",
    "sample": "diffusion.sampling",
    "metrics": "evaluation.metrics",
    "describe": "models.checkpoint",
    "load": "models.checkpoint",
    "load_denoiser": "models.checkpoint",
    "birdcage_maps": "operators.mri",
    "cartesian_mask": "operators.masks",
    "estimate_maps": "operators.mri",
    "sense": "operators.mri",
    "generators": "randomness",
    "randn": "randomness",
    "view": "show.explore",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    """The part of that name, from the module it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'companion' has no attribute {name!r}; it has {', '.join(_HOME)}")
    home = import_module(f"companion.{_HOME[name]}")
    value = home if _HOME[name].endswith(f".{name}") else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
