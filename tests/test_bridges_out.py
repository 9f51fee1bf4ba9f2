"""Priors and operators for other programs: each must give what ours gives, to 1e-5."""

import json

import peers
import pytest
import torch

from companion.diffusion.complexify import to_channels, to_complex
from companion.diffusion.denoisers import ComplexDenoiser
from companion.diffusion.exact import GaussianDenoiser
from companion.models.architectures import build
from companion.models.deepinv import from_deepinv, to_deepinv, to_physics
from companion.models.export import CONVENTION, export, image_channels
from companion.models.folder import save_checkpoint
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.operators.pet import ParallelBeam, Projector
from companion.randomness import randn

NETWORK = dict(name="UNet", model_channels=32, num_res_blocks=1, channel_mult=[1, 1], attention_resolutions=[2])
COMPLEX = {
    "network": NETWORK | {"in_channels": 2, "out_channels": 3},
    "denoiser": {
        "name": "EDMDenoiser",
        "complex": True,
        "sigma_data": 0.3,
        "learned_variance": True,
        "variance_channels": 1,
    },
    "data": {"source": "none", "scale": "bright tissue is 1"},
}
CONDITIONED = {
    "network": NETWORK | {"in_channels": 3, "out_channels": 1},
    "denoiser": {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}},
    "data": {"source": "none", "scale": "-1 to 1"},
}


def checkpoint(folder, config, seed=0):
    torch.manual_seed(seed)
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_checkpoint(folder, model, config, {"steps": 0}), model.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [COMPLEX, CONDITIONED], ids=["complex", "conditioned"])
def test_torchscript_gives_what_the_denoiser_gives_at_any_size(tmp_path, config):
    folder, D = checkpoint(tmp_path / "prior", config)
    path = export(folder, tmp_path / "prior.pt")
    says = {CONVENTION: ""}
    theirs = torch.jit.load(str(path), _extra_files=says)
    said = json.loads(says[CONVENTION])
    D = D.D if isinstance(D, ComplexDenoiser) else D
    channels, cond = image_channels(D)
    assert (said["channels"], said["channels of cond"]) == (channels, cond) == ((2, 0) if cond == 0 else (1, 2))
    assert said["data"] == config["data"] and len(said["weights"]) == 64
    x, sigma = torch.randn(5, channels, 26, 44), torch.linspace(0.02, 3, 5)
    more = (torch.randn(5, cond, 26, 44),) if cond else ()
    torch.testing.assert_close(theirs(x, sigma, *more), D(x, sigma, *more), rtol=1e-5, atol=1e-5)


def test_onnx_gives_what_the_denoiser_gives_at_any_size(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'companion[bridges]'")
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed: pip install 'companion[bridges]'"
    )
    folder, D = checkpoint(tmp_path / "prior", COMPLEX)
    path = export(folder, tmp_path / "prior.onnx")
    (said,) = [json.loads(p.value) for p in onnx.load(str(path)).metadata_props if p.key == CONVENTION]
    assert said["order of channels"].startswith("re and im") and said["multiples"] == [2, 2]
    x, sigma = torch.randn(5, 2, 26, 44), torch.linspace(0.02, 3, 5)
    session = runtime.InferenceSession(str(path))
    (theirs,) = session.run(None, {"x": x.numpy(), "sigma": sigma.numpy()})
    torch.testing.assert_close(torch.from_numpy(theirs), D.D(x, sigma), rtol=1e-5, atol=1e-5)


def test_only_denoisers_of_images_are_exported_and_only_to_known_formats(tmp_path):
    folder, _ = checkpoint(tmp_path / "prior", COMPLEX)
    with pytest.raises(ValueError, match="FILE.pt"):
        export(folder, tmp_path / "prior.h5")
    bare, _ = checkpoint(tmp_path / "bare", {"network": COMPLEX["network"], "data": COMPLEX["data"]})
    with pytest.raises(ValueError, match="bare network"):
        export(bare, tmp_path / "bare.pt")
    sequence = {
        "network": dict(NETWORK, name="CausalUNet", in_channels=1, out_channels=1, seq_len=2),
        "denoiser": {"name": "EDMDenoiser", "channel_axis": -3},
        "data": COMPLEX["data"],
    }
    frames, _ = checkpoint(tmp_path / "frames", sequence)
    with pytest.raises(ValueError, match="sequences"):
        export(frames, tmp_path / "frames.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_a_file_that_disagrees_is_not_written(tmp_path, monkeypatch):
    from companion.models import export as module

    folder, _ = checkpoint(tmp_path / "prior", COMPLEX)
    monkeypatch.setattr(module, "run", lambda *_, onnx: torch.zeros(()))
    with pytest.raises(ValueError, match="not written"):
        export(folder, tmp_path / "prior.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_a_denoiser_is_the_same_in_deepinv():
    peers.deepinv()
    from deepinv.models import Denoiser

    torch.manual_seed(0)
    D = build(COMPLEX).eval()
    for parameter in D.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs, x = to_deepinv(D), randn((3, 1, 16, 16), torch.complex64, torch.Generator().manual_seed(1))
    assert isinstance(theirs, Denoiser)
    for sigma in (0.3, torch.tensor([0.1, 0.2, 0.3])):
        levels = torch.as_tensor(sigma).expand(3)
        torch.testing.assert_close(to_complex(theirs(to_channels(x), sigma)), D(x, levels), rtol=1e-5, atol=1e-5)
    back = from_deepinv(theirs, is_complex=True)
    torch.testing.assert_close(back(x, torch.tensor(0.3)), D(x, torch.full((3,), 0.3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mri", "pet"])
def test_an_operator_is_the_same_in_deepinv(kind):
    deepinv = peers.deepinv()
    if kind == "mri":
        A = sense(birdcage_maps((12, 16), 3), cartesian_mask(16, 2).mask)
    else:
        A = Projector(ParallelBeam((12, 12), angles=10))
    x = randn((2, *A.domain_shape), A.domain_dtype, torch.Generator().manual_seed(0))
    physics, theirs = to_physics(A), to_channels(x)
    y = physics(theirs)
    ours = A(x)
    if kind == "mri":
        assert y.shape == (2, 2, *A.range_shape)
        ours = torch.view_as_real(ours).movedim(-1, 1)
    torch.testing.assert_close(y, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(physics.A_adjoint(y), to_channels(A.H(A(x))), rtol=1e-5, atol=1e-5)
    assert physics.adjointness_test(theirs[:1]).abs() < 1e-3 * y.square().sum()
    noisy = to_physics(A, noise_std=0.5)(theirs)
    assert isinstance(physics, deepinv.physics.LinearPhysics) and 0.3 < (noisy - y).std() < 0.7


def test_deepinvs_data_step_is_the_posterior_mean_under_our_operator():
    """prox of ||A x - y||^2 / 2 at z with weight gamma, by their solver on our operator, against the dense answer."""
    peers.deepinv()
    A = sense(birdcage_maps((6, 6), 2), cartesian_mask(6, 2, acs=2).mask)
    generator = torch.Generator().manual_seed(0)
    x, z = (randn((1, 1, 6, 6), torch.complex64, generator) for _ in range(2))
    physics = to_physics(A, max_iter=200, tol=1e-7, solver="CG")
    theirs = physics.prox_l2(to_channels(z), physics(to_channels(x)), 0.7)
    eye = torch.eye(36, dtype=torch.complex64).reshape(36, 1, 6, 6)
    M = A(eye).flatten(1).T
    ours = torch.linalg.solve(M.mH @ M + torch.eye(36) / 0.7, M.mH @ A(x).flatten() + z.flatten() / 0.7)
    torch.testing.assert_close(to_complex(theirs).flatten(), ours, rtol=1e-4, atol=1e-4)


def test_an_exact_denoiser_crosses_as_well():
    peers.deepinv()
    D = GaussianDenoiser(torch.zeros(2, 3, 3, dtype=torch.float64), 0.5 * torch.eye(18, dtype=torch.float64))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(to_deepinv(D)(x, 0.5), x * 0.5 / 0.75)
