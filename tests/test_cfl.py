"""BART files: the bytes BART expects, both ways, and clear words about damage."""

import numpy as np
import pytest
import torch

from companion.data import cfl
from companion.data.cfl import read_cfl, write_cfl
from companion.workbench import run as runs

DIMS = (5, 3, 1, 2)


def numbers(shape=DIMS):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def bart(path, array, header="# Dimensions\n{}\n"):
    """Write as BART does: the first index runs fastest; value by value, to be slow and sure."""
    path.with_suffix(".hdr").write_text(header.format(" ".join(map(str, array.shape))))
    with open(path.with_suffix(".cfl"), "wb") as file:
        for index in np.ndindex(*array.shape[::-1]):
            value = array[index[::-1]]
            file.write(np.float32(value.real).tobytes() + np.float32(value.imag).tobytes())


@pytest.mark.parametrize("suffix", ["", ".cfl", ".hdr"])
def test_reads_what_bart_writes(tmp_path, suffix):
    bart(tmp_path / "x.cfl", numbers())
    found = read_cfl(tmp_path / f"x{suffix}")
    assert found.dtype == torch.complex64 and found.is_contiguous() and np.array_equal(found, numbers())
    assert np.array_equal(read_cfl(tmp_path / "x", squeeze=True), numbers()[:, :, 0])


def test_other_sections_of_the_header_are_comments(tmp_path):
    header = "# Creator\nBART 9\n# Dimensions\n{} 1 1 \n# Command\nfft 3 a b\n# Files\n >x <y\n"
    bart(tmp_path / "x.cfl", numbers(), header)
    assert np.array_equal(read_cfl(tmp_path / "x"), numbers()[..., None, None])


@pytest.mark.parametrize("shape", [DIMS, (7,), (), (1, 2, 1, 1, 3) + (1,) * 10 + (2,)])
def test_round_trip_and_bytes(tmp_path, shape):
    path = write_cfl(tmp_path / "deep" / "name.with.dots", numbers(shape))
    assert path.name == "name.with.dots.cfl"
    assert path.read_bytes() == numbers(shape).tobytes(order="F")
    lines = (tmp_path / "deep" / "name.with.dots.hdr").read_text().split("\n")
    assert lines[0] == "# Dimensions" and len(lines[1].split()) == 16
    assert np.array_equal(read_cfl(path).squeeze(), numbers(shape).squeeze())
    assert read_cfl(path).ndim == 16


def test_writes_tensors_views_and_reals(tmp_path):
    x = torch.from_numpy(numbers())
    turned = x.transpose(0, 1).conj()
    assert torch.equal(read_cfl(write_cfl(tmp_path / "a", turned), True), turned.squeeze())
    assert torch.equal(read_cfl(write_cfl(tmp_path / "b", torch.arange(6)), True), torch.arange(6).to(torch.complex64))


@pytest.mark.parametrize("left, missing", [("hdr", "cfl"), ("cfl", "hdr")])
def test_half_a_pair_is_named(tmp_path, left, missing):
    bart(tmp_path / "x.cfl", numbers())
    (tmp_path / f"x.{missing}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"x\.{missing} does not exist \(there is x\.{left}\)"):
        read_cfl(tmp_path / "x")


def test_size_must_fit_dimensions(tmp_path):
    bart(tmp_path / "x.cfl", numbers())
    content = (tmp_path / "x.cfl").read_bytes()
    for wrong in (content[:-8], content + b"12345678", b""):
        (tmp_path / "x.cfl").write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{len(wrong)} bytes, but the dimensions 5 x 3 x 1 x 2 .* need 240"):
            read_cfl(tmp_path / "x")


@pytest.mark.parametrize(
    "header, words",
    [
        ("", "no line of integers"),
        ("5 3 1 2\n", "no line"),
        ("# Dimensions\n", "no line"),
        ("# Dimensions\n5 a\n", "no line"),
        ("# Dimensions\n5 0 2\n", "not all positive"),
        ("# Dimensions\n-5 3\n", "not all positive"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, words):
    bart(tmp_path / "x.cfl", numbers(), header.replace("{", "{{"))
    with pytest.raises(ValueError, match=words):
        read_cfl(tmp_path / "x")


def test_nan_and_what_complex64_cannot_hold_are_refused(tmp_path):
    for bad in (np.array([np.nan]), np.array([1e300]), np.zeros((2, 0)), np.zeros((1,) * 17), np.array(["a"])):
        with pytest.raises(ValueError, match="x.cfl"):
            write_cfl(tmp_path / "x", bad)
    assert not list(tmp_path.iterdir())
    bart(tmp_path / "x.cfl", np.array([1, np.inf]))
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        read_cfl(tmp_path / "x")


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_full_disk_leaves_the_old_pair(tmp_path, monkeypatch, fail_at):
    write_cfl(tmp_path / "x", numbers())
    store, calls = cfl._store, []

    def full(path, content):
        calls.append(path)
        if len(calls) == fail_at:
            raise OSError(28, "No space left on device")
        store(path, content)

    monkeypatch.setattr(cfl, "_store", full)
    with pytest.raises(OSError, match="disk is full"):
        write_cfl(tmp_path / "x", 2 * numbers())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.cfl", "x.hdr"]
    assert np.array_equal(read_cfl(tmp_path / "x", True), numbers().squeeze())


def test_a_stop_between_the_two_renames_leaves_no_readable_pair(tmp_path, monkeypatch):
    write_cfl(tmp_path / "x", numbers())
    replace = runs.os.replace

    def stop(source, target):
        if str(target).endswith(".hdr"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(runs.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_cfl(tmp_path / "x", 2 * numbers())
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="x.hdr does not exist"):
        read_cfl(tmp_path / "x")
