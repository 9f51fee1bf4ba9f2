"""Lesions: what they look like, what became of them in a translation, and what tells it without a truth."""

import pytest
import torch

from companion.data import anatomy
from companion.data.lesions import KINDS, SIZES_MM, draw_lesion, patient_slices
from companion.evaluation import lesions
from companion.evaluation.support import supported

CONTRASTS = ("T1w", "T2w", "PDw", "FLAIR")


@pytest.fixture(scope="module")
def patient():
    """A person with a cavity, one slice, and the same person in health."""
    (person,) = anatomy.cohort("test", 1)
    lesion = draw_lesion(person, "cavity", "large", seed=1)
    height = torch.tensor([lesion.centre_mm[2]])
    return lesion, patient_slices(person, lesion, CONTRASTS, height), patient_slices(person, None, CONTRASTS, height)


def test_lesions_follow_the_signal_equation(patient):
    lesion, ill, healthy = patient
    inside = ill["lesion"] > 0.9
    assert inside.sum() > 20 and not healthy["lesion"].any()
    fluid = (ill["labels"] == 1) & (healthy["T2w"] > 0.9)
    assert ill["T2w"][inside].mean() > 0.8 and fluid.any() and ill["T1w"][inside].mean() < 0.35
    far = ill["lesion"] < 1e-3
    assert (ill["PDw"] - healthy["PDw"])[far].abs().max() < 0.2, "but for the scale, health is left as it is"
    (person,) = anatomy.cohort("test", 1)
    assert draw_lesion(person, "cavity", "large", seed=1) == lesion != draw_lesion(person, "cavity", "large", seed=2)
    with pytest.raises(ValueError, match="unknown lesion 'wart'"):
        draw_lesion(person, "wart")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_size_lies_in_the_brain(kind):
    for i, size in enumerate(SIZES_MM):
        person = anatomy.cohort("test", i + 1)[i]
        lesion = draw_lesion(person, kind, size, i)
        found = patient_slices(person, lesion, ("T1w",), torch.tensor([lesion.centre_mm[2]]))
        assert (found["lesion"] > 0.5).any() and found["lesion"].max() <= 1.001
        assert not (found["lesion"] > 0.1)[found["labels"] == 0].float().mean() > 0.05


def test_the_truth_keeps_its_lesion_and_health_has_lost_it(patient):
    lesion, ill, healthy = patient
    tissue = ill["labels"] > 1
    kept, lost = (
        lesions.fates(x, ill["T2w"], ill["T1w"], ill["lesion"], tissue)[0] for x in (ill["T2w"], healthy["T2w"])
    )
    assert kept["seen"] and kept["fate"] == "kept" and kept["contrast"] == kept["volume"] == 1 and not kept["invented"]
    assert lost["fate"] == "lost" and abs(lost["contrast"]) < 0.3 and lost["volume"] < 0.4
    (well,) = lesions.fates(ill["T2w"], healthy["T2w"], healthy["T1w"], healthy["lesion"], tissue)
    assert well["invented"] and not well["seen"]
    table = lesions.summary([kept | {"kind": "a"}, lost | {"kind": "a"}], "kind")
    assert table[0]["lesions"] == 2 and table[0]["kept"] == 0.5 and table[0]["lost"] == 1


def test_what_the_source_holds_and_the_draw_has_not_is_marked():
    (person,) = anatomy.cohort("test", 1)
    lesion = draw_lesion(person, "tumour", "large", seed=1)
    height = torch.tensor([lesion.centre_mm[2]])
    ill, healthy = (patient_slices(person, one, ("T1w", "T2w"), height) for one in (lesion, None))
    tissue, inside = ill["labels"] > 1, ill["lesion"] > 0.5
    far = tissue & ~lesions.around(ill["lesion"])
    noise = 0.02 * torch.randn(3, *ill["T2w"].shape, generator=torch.Generator().manual_seed(0))
    erased, right = (supported(ill["T1w"], x["T2w"][None] + noise) for x in (healthy, ill))
    assert erased.unsupported[inside].float().mean() > 0.9 and erased.unsupported[far].float().mean() < 0.1
    assert right.unsupported[inside].float().mean() < 0.25 and right.unsupported[far].float().mean() < 0.15
    assert erased.share > right.share and "prior insists" in erased.verdict
    lost, back = (
        lesions.fates(x, ill["T2w"], ill["T1w"], ill["lesion"], tissue, erased)[0]
        for x in (healthy["T2w"], erased.mended(healthy["T2w"]))
    )
    assert lost["fate"] == "lost" and lost["marked"] > 0.9 and lost["flagged"] < 0.1
    assert back["fate"] == "kept" and 0.5 < back["contrast"] < 1.2, "the person's own relation brings it back"


def test_a_lesion_that_the_draw_explains_as_fluid_is_told_by_the_other_side():
    (person,) = anatomy.cohort("test", 1)
    lesion = draw_lesion(person, "oedema", "large", seed=1)
    height = torch.tensor([lesion.centre_mm[2]])
    ill, healthy = (patient_slices(person, one, ("T1w", "T2w"), height)["T1w"] for one in (lesion, None))
    inside = (patient_slices(person, lesion, ("T1w",), height)["lesion"] > 0.5) & (ill > 0)
    draws = 1 - ill[None]  # a draw that follows the source everywhere leaves nothing unexplained
    told, well = supported(ill, draws, sides=True), supported(healthy, 1 - healthy[None], sides=True)
    assert told.unsupported[inside].float().mean() < 0.2, "the draw contradicts nothing"
    assert told.lopsided[inside].float().mean() > 0.5 and told.marked[inside].float().mean() > 0.5
    assert "other side" in told.verdict and well.lopsided.float().mean() < 0.02
    assert not supported(ill, draws).lopsided.any(), "not asked: slices need not have their middle in the middle"


def test_a_translation_of_somebody_else_is_doubtful():
    a, b = (patient_slices(p, None, ("T1w", "T2w"), torch.tensor([z]))
            for p, z in zip(anatomy.cohort("test", 2), (10.0, 40.0), strict=True))  # fmt: skip
    own, other = (supported(a["T1w"], x["T2w"][None].expand(2, -1, -1, -1, -1)) for x in (a, b))
    assert own.information > 2 * other.information and other.doubtful.all() and not own.doubtful.any()
