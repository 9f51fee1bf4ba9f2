"""Judges of translations: contrasts that nobody has seen, what scores mean, and a run that goes on where it was."""

import sys
from pathlib import Path

import pytest
import torch

from companion.data import patients
from companion.evaluation.segmenter import any_contrast, train_segmenter, unseen_parts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import lmi_judges as bench  # noqa: E402


@pytest.fixture(scope="module")
def parts():
    """What 8 people are made of, two slices each, every size of pixels twice."""
    known = patients.anatomies(None, "train", patients.PIXELS_MM[0])
    return patients.tissue_slices(known, "train", 8, 2)


def test_parts_add_up_to_brains_of_every_pixel_size(parts):
    assert parts.shape == (16, 5, 64, 64) and parts.min() >= 0
    brain = parts[:, :4].sum(1)
    assert brain.max() < 1.001 and (parts[:, 3] > 0.5).any(), "one of them has a lesion"
    size = (brain > 0.5).float().mean((1, 2)).view(8, 2).mean(1).view(2, 4).mean(0)
    assert size[0] > 1.3 * size[3], "small pixels show a brain large"
    shares = unseen_parts(parts)[1]
    assert torch.allclose(shares.sum(1), 1 - parts[:, 3], atol=1e-3), "nothing is asked of lesions"


def test_contrasts_that_nobody_has_seen_show_the_same_tissue(parts):
    item = tuple(v[0] for v in unseen_parts(parts))
    g = torch.Generator().manual_seed(0)
    made = torch.stack([any_contrast(item, g)[0] for _ in range(12)])
    again = any_contrast(item, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], made[0]) and torch.equal(again[1], item[1])
    assert made.shape == (12, 1, 64, 64) and made.min() == 0 and made.max() == 1
    far = torch.nn.functional.max_pool2d(item[0][:4].sum(0)[None], 5, 1, 2)[0] < 1e-3
    assert made[:, 0, far].max() < 0.01, "air stays dark"
    pure = item[0][:3] > 0.9
    grey, white = (made[:, 0, pure[k]].mean(1) for k in (1, 2))
    assert (grey > white + 0.05).any() and (white > grey + 0.05).any(), "either tissue may be the brighter"


def test_a_judge_learns_any_contrast_and_goes_on_from_its_folder(parts, tmp_path):
    judge = train_segmenter(*unseen_parts(parts), steps=4, augment=any_contrast, folder=tmp_path)
    again = train_segmenter(*unseen_parts(parts), steps=4, augment=any_contrast, folder=tmp_path)
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(judge.probabilities(x), again.probabilities(x)) and (tmp_path / "state.safetensors").exists()


class Levels:
    """A judge that reads labels off grey levels: thirds of the scale."""

    def labels(self, x):
        return (3 * x).round().to(torch.uint8)


def virtual(known: bool) -> bench.People:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 4, (3, 2, 1, 16, 16), generator=g).to(torch.uint8)
    lesion = torch.zeros(labels.shape)
    lesion[..., :4, :] = 1
    found = {"T1w": labels / 3, "T2w": (4 - labels) / 3, "labels": labels, "lesion": lesion}
    return bench.People.virtual(found) if known else bench.People(bench.REAL, {c: found[c] for c in bench.CONTRASTS})


def test_scores_know_the_truth_and_leave_lesions_out():
    people = virtual(known=True)
    truth = people.images["T1w"]
    spoilt = torch.where(people.lesion, 0.0, truth)
    halves = {"in lesions": spoilt, "darker": 0.4 * truth + 0.1, "other": people.images["T2w"]}
    rows = {row["method"]: row for row in bench.scores(people, halves, truth, {"judge": Levels()})}
    for name in (bench.TRUE, "in lesions"):
        assert rows[name]["judge: share"] == rows[name]["judge: agreement"] == 1
        assert rows[name]["judge: Dice"] == "1.00 / 1.00 / 1.00"
    assert rows["other"]["judge: share"] < 0.6 and "PSNR" not in rows[bench.TRUE]
    assert rows["darker"]["fitted"][0] > 60 > 20 > rows["darker"]["PSNR"][0], "gain and offset are all that is wrong"
    (means,) = bench.levels(people, Levels(), {}, "T2w", "T1w")
    assert [means[name][0] for name in bench.TISSUES] == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-4)


def test_of_real_people_only_agreement_is_said():
    people = virtual(known=False)
    row = bench.scores(people, {"same": people.images["T2w"]}, people.images["T2w"], {"judge": Levels()})[1]
    assert row["judge: agreement"] == 1 and "judge: Dice" not in row and "judge: share" not in row


def test_a_supervised_network_learns_a_map_of_grey_levels(tmp_path):
    x = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
    network = bench.regression(x, 0.8 - 0.5 * x, 60, tmp_path)
    made = bench.predicted(network, x[None])[0]
    assert (made - (0.8 - 0.5 * x)).square().mean() < 0.5 * (0.5 * x).var(), "better than the mean"


def test_the_benchmark_goes_on_where_it_was(tmp_path, capsys):
    tiny = "--people 4 --slices 1 --patients 2 --draws 1 --evaluations 2".split()
    tiny += "--judge-steps 2 --steps 2 --zero-shot-steps 2".split()
    rows = bench.main([*tiny, "--out", str(tmp_path)])
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(made) == 3 + 5 + 2, "three sets of people, five networks, two directions"
    assert bench.main([*tiny, "--out", str(tmp_path)]) == rows
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    by = {(r["direction"], r["method"]): r for r in rows}
    lmi, none = (by["T1w to T2w", name]["PSNR"][0] for name in (bench.LMI, "no translation"))
    assert lmi > none + 5 and (tmp_path / f"{bench.VIRTUAL} T1w to T2w.png").exists()
    assert "| T2w to T1w |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings.*choose another --out"):
        bench.main([*tiny, "--draws", "2", "--out", str(tmp_path)])
