"""Our denoisers and operators as deepinv's, and deepinv's denoisers and reconstructions as ours, for who has deepinv.

    D = to_deepinv(load("general/2d"))                  # a deepinv Denoiser: D(x, sigma), x (batch, 2, y, x)
    physics = to_physics(A, noise_std=0.02)             # a deepinv LinearPhysics: A, A_adjoint, prox_l2, ...
    model = deepinv.sampling.DPS(D, ...)                # anything of deepinv works with both
    D = from_deepinv(deepinv.models.DRUNet(2, 2))       # a denoiser for our samplers
    R = load("runs/ram")                                # published weights of RAM, or DIRECT, converted
    x = R(A, y, noise_std)                              # an image in one pass, as of `unrolled`

deepinv has no complex images: (batch, C, *space) complex is (batch, 2 C, *space) there, re and im of each channel, and
measurements (batch, *range) are (batch, 2, *range), as those of its own MRI operators. Its noise levels are ours:
the standard deviation of each real number.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from companion.diffusion.complexify import to_channels, to_complex
from companion.diffusion.denoisers import ComplexDenoiser, Denoiser
from companion.operators.linear import LinearOperator
from companion.operators.mri import Sense


def to_deepinv(D: Denoiser, device: str | torch.device = "cpu") -> nn.Module:
    """A deepinv `Denoiser` of real channels that gives what D gives.

    D: a denoiser (x, sigma) -> x0_hat; a `ComplexDenoiser` sees complex images, any other the channels themselves.
    """
    from deepinv.models.base import Denoiser as Base

    class Companion(Base):
        def __init__(self):
            super().__init__(device)
            self.D = D

        def forward(self, x: Tensor, sigma: float | Tensor, **_) -> Tensor:
            levels = self._handle_sigma(sigma, batch_size=x.shape[0], device=x.device, dtype=x.dtype)
            if isinstance(D, ComplexDenoiser):
                return to_channels(D(to_complex(x), levels))
            return D(x, levels)

    return Companion().eval()


def from_deepinv(denoiser: nn.Module, is_complex: bool = False) -> nn.Module:
    """A denoiser D(x, sigma) for our samplers, from a deepinv one that takes noise levels (batch,).

    is_complex: its pairs of channels are re and im; the result then takes complex images. Nothing says how far such a
    denoiser is a mean of the posterior: one that was trained to remove noise by least squares is.
    """

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            if cond is not None:
                raise ValueError("denoisers of deepinv take no condition; leave cond out")
            return self.denoiser(x, sigma=sigma.reshape(-1).expand(x.shape[0]))

    return ComplexDenoiser(Theirs()) if is_complex else Theirs()


def to_physics(A: LinearOperator, noise_std: float = 0.0, seed: int = 0, **options) -> nn.Module:
    """A deepinv `LinearPhysics` of an operator without a batch of its own, with Gaussian noise of `noise_std`.

    Images (batch, 2 C, *space) for a complex domain (C, *space); measurements (batch, 2, *range) for a complex range.
    Its adjoint is ours, the true one of these real numbers. seed: of the noise that physics(x) adds. **options
    go to LinearPhysics. Raises ValueError for an operator with a batch of its own.
    """
    from deepinv.physics import GaussianNoise, LinearPhysics, ZeroNoise

    if A.batch_shape:
        raise ValueError(f"the operator has a batch of its own, {A.batch_shape}; give that of one item")
    images, data = A.domain_dtype.is_complex, A.range_dtype.is_complex
    noise = GaussianNoise(noise_std, rng=torch.Generator().manual_seed(seed)) if noise_std else ZeroNoise()

    def forward(x: Tensor, **_) -> Tensor:
        return _real(A(to_complex(x) if images else x))

    def adjoint(y: Tensor, **_) -> Tensor:
        x = A.H(torch.view_as_complex(y.movedim(1, -1).contiguous()) if data else y)
        return to_channels(x) if images else x

    channels, *space = A.domain_shape
    size = (2 * channels if images else channels, *space)
    return LinearPhysics(A=forward, A_adjoint=adjoint, img_size=size, noise_model=noise, **options)


def _real(y: Tensor) -> Tensor:
    """Measurements as deepinv has them: (batch, 2, *range) of complex ones (batch, *range)."""
    return torch.view_as_real(y).movedim(-1, 1).contiguous() if y.is_complex() else y


# ----------------------------------------------------------------------------------------------------
# Reconstructions in one pass

FOURIER = re.compile(r"i?fft2(\((\w+=(True|False)(, ?(?=\w)|(?=\))))*\))?")  # what a file may say of DIRECT's operators


class RAM(nn.Module):
    """The Reconstruct Anything Model: R(A, y, noise_std) -> images, for any linear operator [terris2025].

    The network is `deepinv.models.RAM`, at random weights. in_channels: the real channels that it has heads for; two
    are a complex image. Raises ModuleNotFoundError without deepinv.
    """

    def __init__(self, in_channels: Sequence[int] = (1, 2, 3)):
        super().__init__()
        self.theirs = _models("RAM").RAM(tuple(in_channels), pretrained=False)

    def forward(self, A: LinearOperator, y: Tensor, noise_std: float | Tensor) -> Tensor:
        """The image (batch, *A.domain_shape) of data y (batch, *A.range_shape), in units in which bright tissue is 1.

        A: without a batch of its own, of norm 1, as it was trained (SENSE with maps of unit sum of squares is; else
        A * (1 / norm) and y / norm). noise_std: one, or (batch,), of each real component; 0.005 stands for less. Raises
        ValueError for images of channels without a head.
        """
        physics = to_physics(A)
        if physics.img_size[0] not in self.theirs.in_channels:
            raise ValueError(
                f"images {A.domain_shape}, {A.domain_dtype}, have {physics.img_size[0]} real channels; this RAM was "
                f"made for {', '.join(map(str, self.theirs.in_channels))}"
            )
        std = torch.as_tensor(noise_std, dtype=torch.float32, device=y.device).expand(len(y))
        x = self.theirs(_real(y), physics, sigma=std)
        return to_complex(x) if A.domain_dtype.is_complex else x


class DIRECT(nn.Module):
    """A reconstruction of the DIRECT toolkit [yiasemis2022]: R(A, y) -> complex images of Cartesian multi-coil scans.

    The network is what `deepinv.models.DIRECTModel` makes of a published configuration, at random weights. model,
    additional_models, physics: its parts of these names. Raises ValueError for what is no network or Fourier transform
    of DIRECT, ModuleNotFoundError without deepinv, ImportError without DIRECT.
    """

    def __init__(self, model: Mapping, additional_models: Mapping | None = None, physics: Mapping | None = None):
        super().__init__()
        parts = {"model": dict(model), "additional_models": additional_models or {}, "physics": physics or {}}
        strange = [name for name in parts["physics"].values() if not FOURIER.fullmatch(str(name))]
        if strange:
            raise ValueError(
                f"{strange[0]!r} is no operator of DIRECT; expected fft2(...), ifft2(...) with True or False"
            )
        with torch.device("cpu"), tempfile.TemporaryDirectory() as folder, _hub(folder):  # where it looks for the file
            Path(folder, "unet_5x.yaml").write_text(yaml.safe_dump(parts))
            try:
                self.theirs = _models("DIRECT").DIRECTModel("unet_5x", pretrained=False)
            except SystemExit:  # what it does about a name that it does not know
                names = [part.get("model_name") for part in (model, *parts["additional_models"].values())]
                raise ValueError(f"DIRECT does not know all of the networks {names}") from None

    def forward(self, A: LinearOperator, y: Tensor, noise_std: float | Tensor = 0.0) -> Tensor:
        """The image (batch, 1, y, x) of k-space y (batch, coil, y, x), up to a factor, with a phase of its own or none.

        It estimates coil maps itself, from the fully sampled middle, and asks neither those of A nor noise_std: compare
        magnitudes. A: SENSE with one mask. Raises ValueError for other operators.
        """
        if not isinstance(A, Sense) or A.batch_shape or len(A.domain_shape) != 3:
            raise ValueError(f"DIRECT reconstructs slices of one Cartesian mask; it got {A!r}, expected that of sense")
        from deepinv.physics import MultiCoilMRI

        mask = A.mask.mask.expand(A.range_shape)[0].ne(0).float()
        physics = MultiCoilMRI(mask=mask, coil_maps=A.coils.maps, device=y.device)
        return to_complex(self.theirs(_real(y), physics))


def _models(what: str):
    """The module deepinv.models."""
    try:
        import deepinv.models
    except ModuleNotFoundError as error:
        advice = f"{what} runs in deepinv, and {error.name} is not installed: pip install deepinv"
        raise ModuleNotFoundError(advice, name=error.name) from error
    return deepinv.models


@contextmanager
def _hub(folder: str) -> Iterator[None]:
    """Inside, torch's hub is this folder."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(folder)
    try:
        yield
    finally:
        torch.hub.set_dir(before)
