"""Figures show what they are given, on the scale they state."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from companion.evaluation.tables import markdown
from companion.show.figures import animation, curves, image_grid, picture, thumbnail


def test_picture_shows_magnitudes_and_drops_singletons():
    x = torch.tensor([[3 + 4j, 0]])[None]
    assert picture(x).tolist() == [[5.0, 0.0]]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        picture(torch.zeros(2, 3, 4))


def test_image_grid_shares_one_window_and_gives_other_kinds_their_own():
    images = {"truth": torch.rand(6, 5), "draw": torch.rand(6, 5), "error": torch.rand(6, 5)}
    fig = image_grid(
        {"R = 4": images, "R = 8": images},
        window=(0, 1.1),
        kinds={"error": ("magma", 0, 0.2)},
        notes={("R = 8", "draw"): "31.2 dB"},
        unit="signal",
        voxel_mm=10.0,
    )
    shown = [ax.images[0] for ax in fig.axes if ax.images]
    assert [image.get_clim() for image in shown[:3]] == [(0, 1.1), (0, 1.1), (0, 0.2)]
    assert np.array_equal(shown[0].get_array(), images["truth"].numpy())
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert texts.count("31.2 dB") == 1 and "50 mm" in texts
    bars = [ax for ax in fig.axes[-3:] if ax.axison]
    assert [label.get_text() for label in bars[0].get_xticklabels()] == ["0", "1.1 signal"]
    assert len(bars) == 2  # the first stands for both grey columns
    assert not plt.get_fignums()


def test_curves_draws_every_line_and_the_diagonal():
    fig = curves({"a": ([0.1, 1], [0.2, 1])}, xlabel="x", ylabel="y", diagonal="perfect", logx=True)
    (ax,) = fig.axes
    assert [line.get_label() for line in ax.lines] == ["perfect", "a"] and ax.get_xscale() == "log"
    assert list(ax.lines[1].get_ydata()) == [0.2, 1]


def test_curves_draws_errors_as_bands_and_counts_in_whole_numbers():
    fig = curves({"a": ([1, 2, 3], [0.2, 0.5, 0.4], [0.1, 0.2, 0.1])}, xlabel="frame", ylabel="y")
    (ax,) = fig.axes
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (low, high) == pytest.approx((0.1, 0.7))
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_animation_plays_every_frame_of_every_sequence(tmp_path):
    one, two = torch.rand(4, 1, 6, 5), torch.polar(torch.rand(4, 1, 6, 5), torch.rand(4, 1, 6, 5))
    path = animation(tmp_path / "a.gif", {"one": one, "two": two}, window=(0, 0.5), frame_ms=120, zoom=10)
    gif = Image.open(path)
    assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.info["duration"] == 120
    for n in range(4):
        gif.seek(n)
        shown = np.asarray(gif.convert("L"))[16:-16].astype(float)
        for left, x in ((5, one[n, 0]), (50 + 4 + 5, two[n, 0].abs())):
            wanted = (x / 0.5).clamp(max=1) * 255
            assert np.abs(shown[5::10, left : left + 50 : 10] - wanted.numpy()).max() <= 1
    coloured = Image.open(animation(tmp_path / "d.gif", {"one": one, "error": one}, kinds={"error": ("magma", 0, 1)}))
    assert np.asarray(coloured.convert("RGB")).std(-1).max() > 10  # a map with colours
    again = animation(tmp_path / "b.gif", {"one": one, "two": two}, window=(0, 0.5), frame_ms=120, zoom=10)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        animation(tmp_path / "c.gif", {"one": one, "two": two[:3]})


def test_markdown_table_writes_means_with_their_errors():
    table = markdown([{"R": 4, "PSNR": (31.239, 0.214), "SSIM": (0.9123, 0.004), "x": 0.5}])
    assert table.splitlines()[2] == "| 4 | 31.24 ± 0.21 | 0.912 ± 0.004 | 0.5 |"
    with pytest.raises(ValueError, match="at least one row"):
        markdown([])


def test_thumbnail_keeps_proportions(tmp_path):
    Image.fromarray(np.zeros((300, 600, 3), np.uint8)).save(tmp_path / "a.png")
    assert thumbnail(tmp_path / "a.png", 100).shape == (50, 100, 3)
