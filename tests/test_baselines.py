"""Baselines minimise what they say they minimise, in any batch, in 2D and 3D."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from companion.evaluation.metrics import psnr
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.reconstruction.mri import (
    METHODS,
    available_methods,
    bart_pics,
    cg_sense,
    l1_wavelet,
    total_variation,
    tune,
    zero_filled,
)


def boxes(*shape: int) -> torch.Tensor:
    """A complex image (1, 1, *shape) of nested boxes, magnitude at most 1."""
    image = torch.zeros(shape)
    for inset, value in ((1 / 8, 0.5), (1 / 4, 0.5), (3 / 8, -0.4)):
        image[tuple(slice(int(n * inset), n - int(n * inset)) for n in shape)] += value
    return torch.polar(image, torch.linspace(0, 1, shape[-1]).expand(shape))[None, None]


@pytest.fixture
def scan():
    x, maps, mask = boxes(32, 32), birdcage_maps((32, 32), 4), cartesian_mask(32, 3, acs=4)
    A = sense(maps, mask)
    noise = torch.randn(A(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    return x, maps, mask, A, mask.mask * (A(x) + 0.01 * 2**0.5 * noise)


def objective(A, y, x, penalty) -> float:
    return (A(x) - y).abs().square().sum().item() / 2 + penalty(x)


def test_cg_sense_solves_the_normal_equations(scan):
    _, maps, mask, A, y = scan
    x = cg_sense(y, maps, mask, 0.05, 100)
    assert torch.allclose(A.normal(x) + 0.05 * x, A.H(y), atol=1e-5)


def test_cg_sense_agrees_with_sigpy(scan):
    from sigpy.mri.app import SenseRecon

    _, maps, mask, _, y = scan
    weights = mask.mask.expand(32, 32).numpy()
    theirs = SenseRecon(y[0].numpy(), maps.numpy(), 0.05, weights=weights, max_iter=100, show_pbar=False).run()
    np.testing.assert_allclose(cg_sense(y, maps, mask, 0.05, 100)[0, 0].numpy(), theirs, atol=1e-4)


def test_total_variation_converges_to_a_minimum(scan):
    _, maps, mask, A, y = scan

    def penalty(x):
        return 0.005 * sum((x - x.roll(1, d)).abs().sum().item() for d in (-2, -1))

    ours = objective(A, y, total_variation(y, maps, mask, 0.005), penalty)
    long = objective(A, y, total_variation(y, maps, mask, 0.005, 800), penalty)
    assert long <= ours < 1.01 * long
    assert ours < 0.7 * objective(A, y, zero_filled(y, maps, mask), penalty)


def test_wavelet_lowers_its_objective(scan):
    import sigpy

    _, maps, mask, A, y = scan
    W = sigpy.linop.Wavelet((32, 32), wave_name="db4")

    def penalty(x):
        return 0.005 * np.abs(W(x[0, 0].numpy())).sum()

    ours = objective(A, y, l1_wavelet(y, maps, mask, 0.005), penalty)
    long = objective(A, y, l1_wavelet(y, maps, mask, 0.005, 600), penalty)
    assert ours == pytest.approx(long, rel=0.02)


def test_order_of_quality(scan):
    x, maps, mask, _, y = scan
    quality = {name: psnr(method(y, maps, mask), x).item() for name, method in METHODS.items()}
    assert quality["zero-filled"] < quality["CG-SENSE"] < quality["TV"]
    assert quality["zero-filled"] < quality["L1-wavelet"]


@pytest.mark.parametrize("name", METHODS)
def test_items_are_independent_and_scale(name, scan):
    _, maps, mask, _, y = scan
    method, own_maps = METHODS[name], torch.stack([maps, maps.flip(0)])
    both = method(torch.cat([y, y.flip(1)]), own_maps, mask, 0.003, 20)
    assert both.shape == (2, 1, 32, 32) and both.dtype == torch.complex64
    alone = method(y, maps, mask, 0.003, 20)
    assert torch.allclose(both[:1], alone, atol=1e-5)
    assert torch.allclose(both[1:], alone, atol=1e-5)  # coils permuted with their data


@pytest.mark.parametrize("name", METHODS)
def test_volumes_and_empty_data(name):
    x, maps = boxes(8, 10, 9), birdcage_maps((8, 10, 9), 3)
    mask = cartesian_mask(9, 2, acs=3)
    y = sense(maps, mask, ndim=3)(x)
    assert METHODS[name](y, maps, mask, 0.01, 5).shape == (1, 1, 8, 10, 9)
    assert METHODS[name](torch.zeros_like(y), maps, mask, 0.01, 5).abs().max() == 0


def test_tune_finds_the_best_value_and_warns_at_the_edge(scan):
    x, maps, mask, _, y = scan
    tuned = tune(cg_sense, [(y, maps, mask, x)], [1e-5, 1e-2, 10.0])
    assert tuned.regularisation == 1e-2 and max(tuned.psnr) == tuned.psnr[1]
    with pytest.warns(UserWarning, match="end of the grid"):
        tune(cg_sense, [(y, maps, mask, x)], [1.0, 10.0])


def test_errors_say_what_to_do(scan):
    _, maps, mask, _, y = scan
    with pytest.raises(ValueError, match="y must be complex"):
        zero_filled(y[:, :3], maps, mask)
    with pytest.raises(ValueError, match="NaN"):
        cg_sense(y * float("nan"), maps, mask)
    with pytest.raises(ValueError, match="zeros and ones"):
        l1_wavelet(y, maps, 0.5 * mask.mask)
    with pytest.raises(ValueError, match="cg_sense"):
        total_variation(y, maps, mask, 0.0)
    with pytest.raises(ValueError, match="cases"):
        tune(cg_sense, [], [1.0])


BART = """#!{python}
# A stand-in for `bart pics`: answers with A^H y from its files, as the real program would at no iterations.
import json, os, sys, time
import numpy as np

def read(name):
    dims = [int(n) for n in open(name + ".hdr").read().splitlines()[1].split()]
    return np.fromfile(name + ".cfl", "<c8").reshape(dims, order="F")

arguments = sys.argv[1:]
options = dict(zip(arguments[2:-3:2], arguments[3:-3:2]))
kspace, maps = (read(name) for name in arguments[-3:-1])
pattern = read(options["-p"])
with open({log!r}, "a") as file:
    dims = dict(kspace=kspace.shape, maps=maps.shape, pattern=pattern.shape)
    file.write(json.dumps(dict(arguments=arguments, dims=dims, folder=os.getcwd())) + "\\n")
{behaviour}
axes = (0, 1, 2)
images = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(kspace * pattern, axes), axes=axes, norm="ortho"), axes)
image = (maps.conj() * images).sum(3, keepdims=True).astype("<c8")
open(arguments[-1] + ".hdr", "w").write("# Dimensions\\n" + " ".join(map(str, image.shape)) + "\\n")
open(arguments[-1] + ".cfl", "wb").write(image.tobytes(order="F"))
"""


@pytest.fixture
def bart(tmp_path, monkeypatch):
    """bart(behaviour) puts the stand-in on PATH; returns what it was called with, a list that grows."""
    log, folder = tmp_path / "calls", tmp_path / "a folder; with $(odd) characters"

    def install(behaviour=""):
        folder.mkdir(exist_ok=True)
        program = folder / "bart"
        program.write_text(BART.format(python=sys.executable, log=str(log), behaviour=behaviour))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return install


def test_bart_pics_is_called_as_documented_and_its_image_comes_back(scan, bart):
    _, maps, mask, A, y = scan
    calls = bart()
    both, own_maps = torch.cat([y, 2 * y.flip(1)]), torch.stack([maps, maps.flip(0)])
    found = bart_pics(both, own_maps, mask, 0.004, 30)
    torch.testing.assert_close(found, torch.cat([A.H(y), 2 * A.H(y)]), rtol=1e-4, atol=1e-5)
    assert found.dtype == y.dtype and len(calls()) == 2
    for call in calls():
        assert call["arguments"] == ["pics", "-l1", "-r", "0.004", "-i", "30", "-w", "1", "-s", "0.95",
                                     "-p", "pattern", "kspace", "maps", "image"]  # fmt: skip
        dims = {name: (n + [1] * 16)[:5] for name, n in call["dims"].items()}
        assert dims == {"kspace": [32, 32, 1, 4, 1], "maps": [32, 32, 1, 4, 1], "pattern": [32, 32, 1, 1, 1]}
        assert not Path(call["folder"]).exists()


def test_bart_pics_takes_odd_sizes_volumes_and_larger_maps(bart):
    calls = bart()
    for shape in ((9, 14), (6, 9, 5)):
        x, maps = boxes(*shape), 2 * birdcage_maps(shape, 3)
        mask = cartesian_mask(shape[-1], 2, acs=3)
        y = sense(maps, mask, ndim=len(shape))(x)
        expected = sense(maps, mask, ndim=len(shape)).H(y)
        torch.testing.assert_close(bart_pics(y, maps, mask), expected, rtol=1e-4, atol=1e-5)
        arguments = calls()[-1]["arguments"]
        step = float(arguments[arguments.index("-s") + 1])
        assert step == pytest.approx(0.95 / 4, rel=1e-3)  # |A|^2 is 4
    assert calls()[-1]["dims"]["kspace"][:4] == [9, 5, 6, 3]  # readout y, phase encoding x and z, coil


def test_bart_is_a_method_only_where_it_is_installed(scan, bart, monkeypatch, tmp_path):
    x, maps, mask, _, y = scan
    monkeypatch.setenv("PATH", str(tmp_path))
    assert available_methods() == METHODS
    with pytest.raises(FileNotFoundError, match="not on PATH; install BART"):
        bart_pics(y, maps, mask)
    bart()
    assert available_methods() == METHODS | {"BART l1-wavelet": bart_pics}
    assert "BART l1-wavelet" not in METHODS
    with pytest.warns(UserWarning, match="end of the grid"):
        tune(available_methods()["BART l1-wavelet"], [(y, maps, mask, x)], [0.001, 0.01])


FAILURES = {
    "status": ('sys.exit("out of memory")', RuntimeError, "status 1; it said: out of memory"),
    "killed": ("os.kill(os.getpid(), 9)", RuntimeError, "status -9; it said: nothing"),
    "no image": ("sys.exit(0)", RuntimeError, "no usable image: .* does not exist"),
    "NaN": ("kspace[0] = np.nan", RuntimeError, "no usable image: .*NaN"),
    "wrong size": ("kspace, maps, pattern = kspace[:8], maps[:8], pattern[:8]", RuntimeError, "expected .32, 32, 1."),
    "too slow": ("time.sleep(60)", TimeoutError, "did not finish within 1.5 s"),
}


@pytest.mark.parametrize("behaviour, error, message", FAILURES.values(), ids=FAILURES)
def test_failures_of_bart_are_told(scan, bart, behaviour, error, message):
    _, maps, mask, _, y = scan
    bart(behaviour)
    with pytest.raises(error, match=message):
        bart_pics(y, maps, mask, timeout=1.5 if error is TimeoutError else 60)


def test_bart_is_not_even_called_with_bad_data(scan, bart):
    _, maps, mask, _, y = scan
    bart("sys.exit(3)")
    with pytest.raises(ValueError, match="NaN"):
        bart_pics(y * float("nan"), maps, mask)
