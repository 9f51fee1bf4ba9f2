"""How far networks of activity are from the truth on virtual validation people."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from companion.acquisition.pet import acquire
from companion.data.pet import PEOPLE, held_out
from companion.diffusion.denoisers import EDMDenoiser
from companion.evaluation import metrics
from companion.evaluation.denoising import denoising_errors, expected_errors
from companion.randomness import randn
from companion.reconstruction.condition import BLIND_SIGMA, condition, iterates

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # network units: noise at which a prior is looked at
COUNTS = (2.5e3, 1e4, 5e4, 2.5e5, 1e6)  # of the scans that a conditional network is tried on


def validation_errors(D: EDMDenoiser, data: dict, people: int = 16, seed: int = 0) -> list[dict]:
    """`prior_errors` or `enhancement_errors`, whichever fits; nothing if it was not trained on the embedded people.

    data: of the checkpoint's config.
    """
    if data["source"] != PEOPLE:
        return []
    if data["task"] == "conditional":
        return enhancement_errors(D, data, COUNTS, people, seed)
    return prior_errors(D, data["scale_kbq"], SIGMAS, people, data["image_size"][-1], seed)


def prior_errors(
    D: EDMDenoiser, scale_kbq: float, sigmas: Sequence[float], people: int = 16, image_size: int = 64, seed: int = 0
) -> list[dict[str, float]]:
    """For each sigma (network units), the error of an unconditional D on slices of validation people.

    Root mean squared error in kBq/mL, beside the one that the variance channel expects and the noise it was given.
    """
    x0 = (held_out("validation", people, image_size).image / scale_kbq).to(next(D.parameters()).device)
    options = {"seed": seed, "digits": None}
    found = (
        expected_errors(D, x0, sigmas, **options)
        if D.learned_variance
        else denoising_errors({"error": D}, x0, sigmas, **options)
    )
    return [
        {
            "sigma": row["sigma"],
            "noise (kBq/mL)": row["sigma"] * scale_kbq,
            "error (kBq/mL)": row["error"] * scale_kbq,
            "expected": row.get("expected", float("nan")) * scale_kbq,
        }
        for row in found
    ]


@torch.no_grad()
def enhancement_errors(D: EDMDenoiser, data: dict, counts: Sequence[float], people: int = 16, seed: int = 0) -> list:
    """For each number of counts, the NRMSE of D's best guess from a scan alone and of its MLEM images.

    Slices of validation people with a lesion each; mean and standard error over people. D looks at pure noise of
    BLIND_SIGMA, so the guess is the posterior mean, in one evaluation. data: of the checkpoint's config.
    """
    slices = held_out("validation", people, data["image_size"][-1], lesions=1)
    device, rows = next(D.parameters()).device, []
    noise = BLIND_SIGMA * randn(slices.image.shape, torch.float32, torch.Generator().manual_seed(seed))
    for total in counts:
        mu = slices.mu if data["attenuation"] else None
        scan = acquire(slices.image, mu, total, range(seed, seed + people), pixel_mm=slices.pixel_mm)
        cond = condition(scan, data["iterations"], data["scale_kbq"])
        given = cond if data["dose_channel"] else cond[:, :-1]
        guess = D(noise.to(device), torch.full((people,), BLIND_SIGMA, device=device), given.to(device)).cpu()
        images = iterates(scan, data["iterations"]) / data["scale_kbq"]
        mlems = {f"MLEM, {k} iterations": images[:, i : i + 1] for i, k in enumerate(data["iterations"])}
        rows.append(
            {"counts": total}
            | {
                name: metrics.mean_and_error(metrics.nrmse(x * data["scale_kbq"], slices.image))
                for name, x in ({"network": guess} | mlems).items()
            }
        )
    return rows


def logged_errors(errors: list[dict]) -> dict[str, float]:
    """What `validation_errors` says of the network as single numbers by name, for stats.jsonl."""
    return {f"NRMSE at {row['counts']:g} counts": row["network"][0] for row in errors if "counts" in row} | {
        f"error at sigma {row['sigma']:g}": row["error (kBq/mL)"] for row in errors if "sigma" in row
    }
