"""Pictures show the numbers they should, sliders answer at once, and the gallery survives any folder."""

import gc
import json
import shutil
import time
from dataclasses import dataclass, replace

import h5py
import ipywidgets as widgets
import nibabel
import numpy as np
import psutil
import pytest
import torch
from ipywidgets.widgets.widget import _instances as INSTANCES
from PIL import Image

from companion.data.cfl import write_cfl
from companion.data.nifti import load_nifti, save_nifti
from companion.parameters import Parameters, param
from companion.show.examples import write_examples
from companion.show.explore import view
from companion.show.gallery import ROWS, Gallery, RunGrid, alike
from companion.show.stack import READERS, Stack, make_stack, mosaic, open_stack, paint, pictures, png
from companion.show.viewer import Viewer
from companion.workbench import catalogue
from companion.workbench.catalogue import conditions, find_entries, flatten
from companion.workbench.run import MANIFEST, Run

AXES = {"truth": ("z", "y", "x"), "draws": ("draw", "z", "y", "x")}


@pytest.fixture
def stack():
    """A volume (4, 6, 5) with 3 complex draws around it."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 6, 5, generator=generator)
    draws = torch.polar(truth + 0.1 * torch.randn(3, 4, 6, 5, generator=generator), torch.rand(3, 4, 6, 5))
    return Stack(
        {"truth": truth.numpy(), "draws": draws.numpy()}, AXES, voxel_mm={"z": 4.0, "y": 2.0, "x": 2.0}, source="a test"
    )


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    runs = tmp_path_factory.mktemp("examples") / "runs"
    write_examples(runs, accelerations=(2, 4), doses=(0.1, 1.0))
    return runs


# --- what is shown -------------------------------------------------------------------------------------


def test_a_cut_is_the_slice_of_the_plane_and_z_points_up(stack):
    x = stack.arrays["truth"]
    at = {"z": 1, "y": 2, "x": 3, "draw": 0}
    assert np.array_equal(stack.cut("truth", at, ("y", "x")), x[1])
    assert np.array_equal(stack.cut("truth", at, ("z", "x")), x[::-1, 2])
    assert np.array_equal(stack.cut("truth", at, ("z", "y")), x[::-1, :, 3])
    assert np.array_equal(stack.cut("truth", at, ("x", "y")), x[1].T)
    assert np.array_equal(stack.cut("draws", at, ("y", "x"), over="draw"), stack.arrays["draws"][:, 1])
    assert stack.cut("truth", at | {"z": 4}, ("y", "x")) is None and stack.cut("truth", at, ("draw", "x")) is None
    assert stack.lengths == {"draw": 3, "z": 4, "y": 6, "x": 5} and stack.planes[0] == ("y", "x")


def test_estimate_error_and_deviation_follow_from_draws(stack):
    shown = pictures(stack, {"z": 2, "draw": 1}, ("y", "x"))
    truth, draws = stack.arrays["truth"][2], stack.arrays["draws"][:, 2]
    assert list(shown) == ["truth", "draws", "estimate", "error", "std"]
    assert np.allclose(shown["estimate"], np.abs(draws.mean(0)))
    assert np.allclose(shown["error"], np.abs(np.abs(draws.mean(0)) - truth))
    assert np.allclose(shown["std"], np.abs(draws).std(0))
    phase = pictures(stack, {"z": 2, "draw": 1}, ("y", "x"), "phase")
    assert np.allclose(phase["draws"], np.angle(draws[1])) and np.array_equal(phase["truth"], truth)
    stored = Stack(stack.arrays | {"mean": truth * 0}, stack.axes | {"mean": ("y", "x")})
    assert np.allclose(pictures(stored, {"z": 2}, ("y", "x"))["error"], truth)


def test_paint_and_png_keep_the_window(tmp_path):
    x = np.array([[-1.0, 0.0, 0.5], [1.0, 2.0, np.nan]])
    assert paint(x, 0, 1).tolist() == [[0, 0, 128], [255, 255, 0]]
    (tmp_path / "a.png").write_bytes(png(paint(x, 0, 1, "magma")))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), paint(x, 0, 1, "magma"))
    sheet = mosaic([np.full((2, 3), i) for i in range(3)])
    assert sheet.shape == (4, 6) and sheet[0, 3] == 1 and sheet[2, 0] == 2 and np.isnan(sheet[3, 5])


# --- files ---------------------------------------------------------------------------------------------


def test_every_kind_of_file_opens(tmp_path):
    x = torch.polar(torch.rand(5, 3, 4, 6), torch.rand(5, 3, 4, 6))  # readout, phase 1, slice, coil
    write_cfl(tmp_path / "a.cfl", x.reshape(5, 3, 1, 4, 6))
    cfl = open_stack(tmp_path / "a.cfl")
    assert cfl.axes["a"] == ("coil", "map", "readout", "phase 1")
    assert np.array_equal(cfl.cut("a", {"coil": 1, "map": 2}, cfl.planes[0]), x[:, :, 1, 2].numpy())
    np.save(tmp_path / "b.npy", x.numpy())
    assert open_stack(tmp_path / "b.npy").axes["b"] == ("draw", "slice", "y", "x")
    np.savez(tmp_path / "c.npz", truth=np.zeros((1, 7, 8)), draws_R4=np.zeros((5, 1, 7, 8)), name=np.array("text"))
    npz = open_stack(tmp_path / "c.npz")
    assert npz.axes == {"truth": ("y", "x"), "draws_R4": ("draw", "y", "x")}
    save_nifti(tmp_path / "d.nii.gz", np.random.rand(3, 4, 5).astype(np.float32), voxel_mm=(4, 2, 1))
    nii = open_stack(tmp_path / "d.nii.gz")
    assert nii.lengths == {"z": 3, "y": 4, "x": 5} and nii.voxel_mm == {"z": 4, "y": 2, "x": 1}
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3, 2), np.float32), np.eye(4)), tmp_path / "e.nii")
    assert open_stack(tmp_path / "e.nii").lengths == {"frame": 2, "z": 3, "y": 4, "x": 5}
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["kspace"], file["header"] = np.zeros((2, 3, 8, 6), np.complex64), "text"
    assert open_stack(tmp_path / "f.h5").axes == {"kspace": ("slice", "coil", "y", "x")}
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "g.png")
    assert view(tmp_path / "g.png").value == (tmp_path / "g.png").read_bytes()


def test_files_that_cannot_be_shown_say_why(tmp_path):
    (tmp_path / "a.h5").write_text("no")
    (tmp_path / "b.npz").write_bytes(b"PK\3\4 rubbish")
    np.savez(tmp_path / "c.npz", a=np.zeros(3))
    for name, reason in (
        ("a.h5", "a.h5 is damaged"),
        ("b.npz", "b.npz: not a readable npz"),
        ("c.npz", "holds no image"),
        ("d.dcm", "cannot show this kind"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_stack(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.npy does not exist"):
        open_stack(tmp_path / "gone.npy")
    with pytest.raises(ValueError, match="cannot compare shapes"):
        view(np.zeros((3, 4)), np.zeros((4, 3)))


@dataclass(frozen=True)
class Plain(Parameters):
    dose: float = param(1.0, "dose")


def test_run_images_come_back_with_axes_labels_and_scales(tmp_path):
    run = Run.start(Plain(out=str(tmp_path / "run"), device="cpu"), paper="brain", stage="test")
    x = torch.rand(2, 8, 1, 5, 6)
    path = run.images(
        "a",
        truth=(x[0, 0, 0], "y x"),
        draws=(x, "acceleration draw y x"),
        voxel_mm=2,
        unit="signal",
        labels={"acceleration": [4, 8]},
        window=(0, 1.1),
    )
    stack = open_stack(path)
    assert stack.axes["draws"] == ("acceleration", "draw", "y", "x") and stack.labels == {"acceleration": [4, 8]}
    assert (stack.unit, stack.window, stack.voxel_mm) == ("signal", (0, 1.1), {"z": 2.0, "y": 2.0, "x": 2.0})
    assert np.array_equal(stack.arrays["draws"], x[:, :, 0].numpy())
    for wrong in ({"truth": (x, "y x")}, {"truth": (x * torch.nan, "a d c y x")}):
        with pytest.raises(ValueError, match="images b: truth has shape"):
            run.images("b", **wrong)
    with pytest.raises(ValueError, match="labels of draw do not fit"):
        run.images("b", truth=(x[0, 0, 0], "y x"), labels={"draw": [1]})
    assert not (run.folder / "b.h5").exists()


# --- the viewer ----------------------------------------------------------------------------------------


def shown(viewer: Viewer) -> dict[str, tuple[bytes, str]]:
    return {name: tuple(w.value for w in tile.children) for (_, name), tile in viewer._tiles.items()}


def test_sliders_move_all_pictures_and_their_numbers(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path)
    assert viewer.at == {"draw": 0, "z": 2, "y": 3, "x": 2}
    before = shown(viewer)
    viewer.sliders["z"].value = 0
    after = shown(viewer)
    assert before.keys() == after.keys() and all(before[n][i] != after[n][i] for n in before for i in (0, 1))
    viewer.sliders["draw"].value = 2
    assert {n for n in after if after[n] != shown(viewer)[n]} == {"draws"}
    assert "draws" in shown(viewer) and "PSNR" in shown(viewer)["estimate"][1]
    viewer.part.value = "phase"
    assert viewer.limits("draws")[0] == "twilight_shifted" and viewer.limits("truth")[0] == "gray"
    viewer.part.value = "magnitude"
    viewer.width.value /= 2
    assert shown(viewer)["truth"][0] != after["truth"][0]


def test_three_planes_have_the_proportions_of_the_body(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path)
    viewer.plane.value = dict(viewer.plane.options)["three planes"]
    assert len(viewer._tiles) == 3 * 5 and {"z", "y", "x"} <= {s.description for s in viewer._axes_box.children[:4]}
    size = {name: tile.children[0].layout for (plane, name), tile in viewer._tiles.items() if plane == ("z", "x")}
    assert (size["truth"].width, size["truth"].height) == ("190px", "304px")  # 4 x 4 mm high, 5 x 2 mm wide
    viewer.turn.click()
    size = {name: tile.children[0].layout for (plane, name), tile in viewer._tiles.items() if plane == ("z", "x")}
    assert size["truth"].height == "119px"


def test_all_draws_in_one_sheet_turned_and_mirrored(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path)
    viewer.over.value = "draw"
    tiles = {name: x for (_, name), x in viewer.tiles().items()}
    assert tiles["draws"].shape == (12, 10) and tiles["truth"].shape == tiles["std"].shape == (6, 5)
    viewer.over.value = ""
    viewer.mirror.value = True
    assert np.array_equal(viewer.tiles()[("y", "x"), "truth"], stack.arrays["truth"][2, :, ::-1])
    viewer.turn.click()
    assert np.array_equal(viewer.tiles()[("y", "x"), "truth"], np.rot90(stack.arrays["truth"][2, :, ::-1]))


def test_play_and_slider_are_one(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path)
    assert viewer.playing.value == "z" and viewer.play.max == 3
    assert viewer._link.source == (viewer.play, "value") and viewer._link.target == (viewer.sliders["z"], "value")
    viewer.playing.value = "draw"
    assert viewer.play.max == 2 and viewer._link.target == (viewer.sliders["draw"], "value")


def test_saving_png_gif_and_nifti(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path / "saved")
    for button in viewer._saving.children[:3]:
        button.click()
        assert "saved a_test" in viewer.said.value
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == [
        "a_test_draw0_z2.gif",
        "a_test_draw0_z2.png",
        "a_test_draw0_z2_draws.nii.gz",
        "a_test_draw0_z2_truth.nii.gz",
    ]
    assert Image.open(tmp_path / "saved" / names[0]).n_frames == 4 and viewer.at["z"] == 2
    volume = load_nifti(tmp_path / "saved" / names[3])
    assert np.array_equal(volume.array, stack.arrays["truth"]) and volume.voxel_mm == (4.0, 2.0, 2.0)
    flat = view(np.random.rand(5, 6), folder=tmp_path)
    flat._saving.children[2].click()
    assert "not saved: no array shown has three axes" in flat.said.value


def test_two_files_are_compared_with_their_difference(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 5), 1.0))
    np.save(tmp_path / "b.npy", np.full((4, 5), 0.7))
    viewer = view(tmp_path / "a.npy", tmp_path / "b.npy")
    tiles = {name: x for (_, name), x in viewer.tiles().items()}
    assert list(tiles) == ["reference: a", "estimate: b", "error"] and np.allclose(tiles["error"], 0.3)


def test_a_notebook_gets_the_widget_and_a_picture_with_words(stack, tmp_path):
    viewer = Viewer(stack, folder=tmp_path)
    data, about = viewer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(data)
    assert about["image/png"]["alt"] == "truth, draws, estimate, error, std of a test, draw 0 (0 to 2), z 2 (0 to 3)"
    assert all(tile.children[0].tooltip for tile in viewer._tiles.values())


def moved(side: int, moves: int, folder) -> tuple[float, float, int]:
    """Seconds a move of the slice slider takes, and growth of memory (bytes) and widgets, after some moves before."""
    x = np.random.default_rng(0).random((1, 20, side, side), np.float32)
    viewer = Viewer(make_stack({"truth": x[0], "draws": np.concatenate([x, x, x])}), folder=folder)
    slider, process = viewer.sliders["slice"], psutil.Process()
    for i in range(20):
        slider.value = i
    gc.collect()
    memory, count, start = process.memory_info().rss, len(INSTANCES), time.process_time()
    for i in range(moves):
        slider.value = i % 20
    a_move = (time.process_time() - start) / moves
    gc.collect()
    return a_move, process.memory_info().rss - memory, len(INSTANCES) - count


def test_a_slider_answers_at_once(tmp_path):
    a_move, _, _ = moved(320, 10, tmp_path)  # five pictures of 320 x 320
    assert a_move < 0.1, f"{1000 * a_move:.0f} ms a move"


def test_memory_stays_over_500_moves(tmp_path):
    _, grown, more = moved(64, 500, tmp_path)
    assert grown < 10e6 and more == 0


# --- runs ----------------------------------------------------------------------------------------------


def test_numbers_are_found_wherever_metrics_keep_them():
    rows = [{"R": 4, "method": "TV", "PSNR": [27.8, 0.2]}, {"R": 8, "method": "TV", "PSNR": [22.2, 0.3]}]
    metrics = {
        "a": 1,
        "flag": True,
        "curve": [1, 2, 3],
        "table": rows,
        "doses": {"5 %": rows[:1]},
        "nested": {"R = 4": {"ratio": 1.13}},
    }
    assert list(flatten(metrics)) == [
        ("a", 1, None),
        ("R 4, TV: PSNR", 27.8, 0.2),
        ("R 8, TV: PSNR", 22.2, 0.3),
        ("5 %, R 4, TV: PSNR", 27.8, 0.2),
        ("nested: R = 4: ratio", 1.13, None),
    ]


def test_conditions_are_read_and_mistakes_said():
    assert conditions("acceleration >= 8, mask=random, heart") == [
        ("acceleration", ">=", "8"),
        ("mask", "=", "random"),
        ("heart", "", ""),
    ]
    with pytest.raises(ValueError, match="'> 3' needs a name and a value"):
        conditions("> 3")


def test_gallery_filters_and_sorts(examples):
    gallery = Gallery(examples)
    assert len(gallery.shown) == 8 and gallery.shown[0].name == "example/pet/dose=1.0,seed=1"
    gallery.where.value = "acceleration >= 4, seed = 1"
    assert gallery.names() == ["example/mr/acceleration=4,seed=1"]
    gallery.where.value = "psnr > 1000"
    assert gallery.names() == [] and "0 of 8 runs" in gallery.count.value
    gallery.where.value = "="
    assert len(gallery.names()) == 8 and "needs a name" in gallery.count.value
    gallery.where.value = ""
    gallery.stage.value = "mr"
    gallery.metric.value = "psnr_db: mean of all"
    gallery.headers["metric"].click()
    numbers = [entry.values["psnr_db: mean of all"] for entry in gallery.shown]
    assert numbers == sorted(numbers, reverse=True) and "▼" in gallery.headers["metric"].description
    gallery.headers["metric"].click()
    assert [e.values["psnr_db: mean of all"] for e in gallery.shown] == numbers[::-1]
    first = gallery._rows[0]
    assert first[0].description == gallery.names()[0] and f"{numbers[-1]:.4g}" in first[1].value


def test_opening_runs_one_after_the_other_forgets_the_former(examples):
    gallery = Gallery(examples)
    for name in gallery.names()[:2]:
        gallery.open(name)
    count = len(INSTANCES)
    for name in gallery.names():
        assert isinstance(gallery.open(name), Viewer)
    gallery.open(gallery.names()[1])
    assert len(INSTANCES) <= count + 15  # MR has one axis and one picture more than PET
    with pytest.raises(ValueError, match="there is no run x"):
        gallery.open("x")


def test_sliders_over_runs_choose_the_run(examples):
    entries = find_entries(examples)
    grid = RunGrid([e for e in entries if e.get("stage") == "pet"], metric="psnr")
    assert grid.axes == {"seed": [0, 1], "dose": [0.1, 1.0]}
    grid.viewer.sliders["slice"].value = 1
    before, said = shown(grid.viewer), grid.said.value
    grid.sliders["dose"].value = 0.1
    assert grid.entry.parameters["dose"] == 0.1 and grid.said.value != said and "psnr" in grid.said.value
    assert grid.viewer.at["slice"] == 1, "the position stays"
    assert shown(grid.viewer)["draws"] != before["draws"] and shown(grid.viewer)["truth"] == before["truth"]
    grid.sliders["seed"].value = 0
    assert shown(grid.viewer)["truth"] != before["truth"]
    grid.entries = [e for e in grid.entries if e.parameters != grid.entry.parameters]
    grid.sliders["dose"].value = 1.0
    grid.sliders["dose"].value = 0.1
    assert "no run with" in grid.said.value
    with pytest.raises(ValueError, match="needs finished runs with images"):
        RunGrid([])


def test_a_parameter_that_one_run_sets_and_the_first_does_not_has_a_slider(examples):
    entries = [e for e in find_entries(examples) if e.get("stage") == "pet"][:2]
    for e, value in zip(entries, (None, [3, 4]), strict=True):
        e.parameters["slices"] = value
    grid = RunGrid(entries)
    assert grid.sliders["slices"].label == "not set"
    grid.sliders["slices"].value = (3, 4)
    assert grid.entry is entries[1] or "no run with" in grid.said.value


def test_bad_folders_are_grey_with_their_reason_and_break_nothing(examples, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(examples / "example" / "pet", runs)
    a, b, c, d = sorted(runs.iterdir())
    (a / MANIFEST).unlink()
    (a / "notebook.ipynb").write_text("{}")
    (b / "images.h5").write_bytes(b"short")
    record = json.loads((c / MANIFEST).read_text())
    (c / MANIFEST).write_text(json.dumps(record | {"packages": {"companion": "0.0.1"}}))
    file = d / "images.h5"
    file.write_bytes(file.read_bytes()[:-9] + b"corrupted")  # of the right size
    gallery = Gallery(runs)
    assert {e.name: e.state.state for e in gallery.entries} == {
        a.name: "incomplete",
        b.name: "corrupt",
        c.name: "older",
        d.name: "done",
    }
    rows = {button.description: cells.value for button, cells in gallery._rows}
    for name, reason in ((a.name, "stopped, failed"), (b.name, "not the file that the run wrote"), (c.name, "0.0.1")):
        assert "stale" in rows[name] and reason in rows[name]
        assert gallery.open(name) is None and reason in gallery._detail.children[0].value
    assert gallery.open(d.name) is None  # the hash is compared on opening
    texts = [w.value for w in gallery._detail.children[1].children[0].children if isinstance(w, widgets.HTML)]
    assert any("not the file that the run wrote" in text for text in texts)
    assert gallery.still()


def test_two_hundred_runs_open_in_less_than_three_seconds(examples, tmp_path, monkeypatch):
    source = examples / "example" / "pet" / "dose=0.1,seed=0"
    record = json.loads((source / MANIFEST).read_text())
    for i in range(200):
        folder = tmp_path / "runs" / f"{i:03d}"
        folder.mkdir(parents=True)
        for name in record["results"]:
            (folder / name).hardlink_to(source / name)
        record["parameters"]["dose"] = i / 200
        (folder / MANIFEST).write_text(json.dumps(record))
    monkeypatch.setattr(catalogue, "sha256", None)  # opening a table reads no array
    start = time.process_time()
    gallery = Gallery(tmp_path / "runs")
    assert time.process_time() - start < 3 and len(gallery.shown) == 200
    assert len(gallery._rows) == ROWS, "rows are reused, not multiplied"
    start = time.process_time()
    gallery.headers["run"].click()
    assert time.process_time() - start < 0.1
    gallery._turn(1)
    assert gallery._rows[0][0].description == "012"


def test_runs_that_differ_in_many_parameters_are_no_grid(examples):
    entries = find_entries(examples)
    (group, *_) = alike(entries)
    first = group[0]
    record = first.record | {"parameters": {f"option {i}": i for i in range(5)}}
    other = catalogue.Entry(replace(first.state, record=record), first.name)
    assert alike(group) == [group] and alike([first, other]) == []


def test_numbers_offered_are_those_of_the_runs_shown(examples):
    gallery = Gallery(examples)
    assert all(any(name in entry.values for entry in gallery.entries) for name in gallery.metric.options)
    gallery.where.value = "no such run"
    assert gallery.metric.options == ("-",)


def test_every_number_of_a_table_has_a_name_of_its_own():
    rows = [{"sigma": s, "blank": [s, 0.1], "error": 2 * s} for s in (0.5, 1.0)]
    assert [(name, value) for name, value, _ in flatten({"errors": rows})] == [
        ("errors, sigma 0.5: blank", 0.5),
        ("errors, sigma 0.5: error", 1.0),
        ("errors, sigma 1: blank", 1.0),
        ("errors, sigma 1: error", 2.0),
    ]
    assert [name for name, *_ in flatten({"t": [{"a": 1.0}, {"a": 1.0}]})] == ["t, row 1: a", "t, row 2: a"]
    told = [{"R": 4, "method": "TV", "PSNR": [27.8, 0.2]}, {"R": 8, "method": "TV", "PSNR": [25.0, 0.2]}]
    assert [name for name, *_ in flatten({"t": told})] == ["R 4, TV: PSNR", "R 8, TV: PSNR"]


def test_the_catalogue_lists_what_the_viewer_opens():
    assert {name for name in catalogue.ARRAYS if name != ".nii.gz"} == READERS.keys()
