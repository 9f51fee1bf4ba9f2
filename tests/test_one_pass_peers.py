"""RAM and DIRECT, which look once: converted strictly, and the same image as deepinv's own call to 1e-5."""

import sys

import peers
import pytest
import torch
import yaml

from companion.diffusion.complexify import to_channels, to_complex
from companion.models import kinds
from companion.models.checkpoint import load
from companion.models.deepinv import DIRECT, RAM, from_deepinv, to_physics
from companion.models.obtain import convert
from companion.operators.linear import Identity
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.operators.pet import ParallelBeam, Projector
from companion.randomness import randn
from companion.reconstruction.one_pass import one_pass


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def same(ours, theirs):
    assert theirs.isfinite().all() and theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
def test_ram_gives_what_it_gives_in_deepinv(tmp_path):
    deepinv = peers.deepinv()
    torch.manual_seed(0)
    theirs = deepinv.models.RAM(pretrained=False).eval()
    unread = {"m_down1.enc.0.PhysicsBlock.gain": torch.ones(1), "m_body.enc.1.PhysicsBlock.gain_pinvy": torch.ones(1)}
    torch.save(theirs.state_dict() | unread, tmp_path / "ram.pth.tar")
    folder = convert(tmp_path / "ram.pth.tar", "deepinv/ram", tmp_path / "ours")
    R = load(folder)

    A = sense(birdcage_maps((40, 36), 3), cartesian_mask((40, 36), 2, acs=4))  # a size that it has to extend
    y = A(randn((1, 1, 40, 36), torch.complex64, rng())) + 0.02 * randn((1, *A.range_shape), torch.complex64, rng(1))
    image = theirs(torch.view_as_real(y).movedim(-1, 1), to_physics(A, noise_std=0.02))
    same(one_pass(A, y, 0.02, str(folder)), to_complex(image))

    P = Projector(ParallelBeam((32, 32), angles=6)) * 0.01
    y = P(torch.rand(1, 1, 32, 32, generator=rng()))
    same(R(P, y, 0.01), theirs(y, to_physics(P, noise_std=0.01)))

    x = randn((1, 1, 64, 64), torch.complex64, rng())  # without an operator it is a denoiser
    same(from_deepinv(R.theirs, is_complex=True)(x, torch.tensor(0.3)), to_complex(theirs(to_channels(x), sigma=0.3)))
    with pytest.raises(ValueError, match="have 4 real channels; this RAM was made for 1, 2, 3"):
        R(Identity((2, 8, 8), torch.complex64), torch.zeros(1, 2, 8, 8, dtype=torch.complex64), 0.1)


def test_what_the_files_of_ram_say(tmp_path):
    x = {"m_head.conv0.weight": torch.ones(64, 4, 3, 3), "m_down1.enc.0.PhysicsBlock.gain_gradx": torch.ones(1)}
    torch.save({"state_dict": x}, tmp_path / "ram.pth.tar")
    tensors, config = kinds.read_kind(tmp_path / "ram.pth.tar", "ram")
    assert list(tensors) == ["m_head.conv0.weight"] and config["network"] == {"name": "RAM", "in_channels": [2]}
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="m_head.conv0.weight"):
        kinds.read_kind(tmp_path / "other.pt", "ram")


def test_without_deepinv_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(ModuleNotFoundError, match="RAM runs in deepinv.*pip install deepinv"):
        RAM()


VARNET = {
    "physics": {"forward_operator": "fft2(centered=False)", "backward_operator": "ifft2(centered=False)"},
    "model": {
        "model_name": "recurrentvarnet.recurrentvarnet.RecurrentVarNet",
        "num_steps": 2,
        "recurrent_hidden_channels": 8,
        "recurrent_num_layers": 2,
        "initializer_initialization": "sense",
        "learned_initializer": True,
        "initializer_channels": [4, 4, 8, 8],
        "initializer_dilations": [1, 1, 2, 4],
        "initializer_multiscale": 3,
    },
    "additional_models": {
        "sensitivity_model": {"model_name": "unet.unet_2d.UnetModel2d", "in_channels": 2, "out_channels": 2}
        | {"num_filters": 4, "num_pool_layers": 2, "dropout_probability": 0.0}
    },
    "training": {"lr": 0.0005},
}


def test_direct_gives_what_it_gives_in_deepinv(tmp_path):
    deepinv = peers.direct()
    file = tmp_path / "recurrentvarnet_5x.pt"
    file.with_suffix(".yaml").write_text(yaml.safe_dump(VARNET))
    torch.manual_seed(0)
    parts = {name: VARNET[name] for name in ("model", "additional_models", "physics")}
    random = DIRECT(**parts).theirs.engine
    states = {"model": random.model.state_dict(), "sensitivity_model": random.models["sensitivity_model"].state_dict()}
    more = {"optimizer": {"state": {}, "param_groups": []}, "__datetime__": "2022-01-01 00:00:00", "iteration": 7}
    torch.save(states | more, file)
    theirs = deepinv.models.DIRECTModel("recurrentvarnet_5x", pretrained=file)
    folder = convert(file, "deepinv/direct", tmp_path / "ours")

    maps, mask = birdcage_maps((32, 28), 4), cartesian_mask((32, 28), 2, acs=6)
    A = sense(maps, mask)
    y = A(randn((2, 1, 32, 28), torch.complex64, rng()))
    physics = deepinv.physics.MultiCoilMRI(mask=mask.mask.expand(32, 28), coil_maps=maps)
    image = theirs(torch.view_as_real(y).movedim(-1, 1).contiguous(), physics)  # it changes what it need not copy
    ours = one_pass(A, y, 0.0, str(folder))
    assert ours.shape == (2, 1, 32, 28)
    same(ours, to_complex(image))
    with pytest.raises(ValueError, match="expected that of sense"):
        load(folder)(Identity((1, 8, 8), torch.complex64), y)
    for changed, said in [
        ({"physics": {"forward_operator": "print(1)"}}, "no operator of DIRECT"),
        ({"model": {"model_name": "varnet.varnet.Nothing"}}, "does not know all of the networks"),
    ]:
        with pytest.raises(ValueError, match=said):
            DIRECT(**(parts | changed))
    file.with_suffix(".yaml").unlink()
    with pytest.raises(FileNotFoundError, match="keep it beside its weights"):
        convert(file, "direct", tmp_path / "again")
