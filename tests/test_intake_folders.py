"""Folders of every make: each usable file exactly once, each person in one split, nothing lost without a reason."""

import os
import random

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from companion.data.intake.kinds import mask_of, one_each
from companion.data.intake.look import find, look
from companion.data.intake.persons import Unclear, whose
from companion.data.intake.records import Unreadable
from companion.data.intake.splits import split_people, split_table
from companion.data.intake.walk import walk


def nifti(path, value=1, shape=(5, 6, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) + np.int16(value)
    nibabel.save(nibabel.Nifti1Image(x, np.diag([4.0, 4, 4, 1])), path)
    return path


def people(*names, **options):
    return {name: (who.person, who.session) for name, who in whose(names, **options).items()}


# ------------------------------------------------------------------------------------------------------- who is who


@pytest.mark.parametrize(
    "names, expected",
    [
        ("subj01/T1w.nii.gz subj02/T1w.nii.gz", "subj01 subj02"),
        ("100307/T1w/T1w_restore_brain.nii.gz 100408/T1w/T1w_restore_brain.nii.gz", "100307 100408"),
        ("BRATS_000.nii.gz BRATS_001.nii.gz BRATS_010.nii.gz", "BRATS_000 BRATS_001 BRATS_010"),
        ("imagesTr/B_001.nii.gz labelsTr/B_001.nii.gz imagesTs/B_002.nii.gz", "B_001 B_001 B_002"),
        ("BRATS_001_0000.nii.gz BRATS_001_0001.nii.gz BRATS_002_0000.nii.gz", "BRATS_001 BRATS_001 BRATS_002"),
        ("OAS1_0001_MR1.nii.gz OAS1_0001_MR2.nii.gz OAS1_0002_MR1.nii.gz", "OAS1_0001 OAS1_0001 OAS1_0002"),
        ("ADNI_002_S_0413_MR_br_raw_20060501_I14.nii ADNI_002_S_0413_MR_br_raw_20070501_I24.nii ADNI_002_S_0559_MR.nii",
         "002_S_0413 002_S_0413 002_S_0559"),
        ("IXI012-HH-1211-T1.nii.gz IXI012-HH-1211-T2.nii.gz IXI013-Guys-1211-T1.nii.gz", "IXI012 IXI012 IXI013"),
        ("2022061000_T101.h5 2022061000_T102.h5 2022061001_T101.h5 2022061001_FLAIR01.h5",
         "2022061000 2022061000 2022061001 2022061001"),
        ("visit1/subj01.nii.gz visit2/subj01.nii.gz visit1/subj02.nii.gz", "subj01 subj01 subj02"),
        ("BraTS-GLI-00001-000/a-t1c.nii.gz BraTS-GLI-00001-001/a-t1c.nii.gz BraTS-GLI-00002-000/a-t1c.nii.gz",
         "BraTS-GLI-00001 BraTS-GLI-00001 BraTS-GLI-00002"),
        ("HGG/Brats18_CBICA_AAB_1/t1.nii.gz HGG/Brats18_CBICA_AAC_1/t1.nii.gz", "Brats18_CBICA_AAB Brats18_CBICA_AAC"),
        ("Utrecht/0/pre/T1.nii.gz Utrecht/2/pre/T1.nii.gz Amsterdam/GE3T/100/pre/T1.nii.gz",
         "Utrecht/0 Utrecht/2 Amsterdam/100"),
        ("1000001_20252_2_0/T1.nii 1000001_20252_3_0/T1.nii 1000002_20252_2_0/T1.nii", "1000001 1000001 1000002"),
        ("anna/t1.nii.gz bert/t1.nii.gz bert/t1_mask.nii.gz", "anna bert bert"),
        ("bert/mri/T1.mgz bert/mri/orig/001.mgz ernie/mri/T1.mgz", "bert bert ernie"),
        ("site1/001.nii site2/001.nii site1/002.nii", "site1/001 site2/001 site1/002"),
        ("patient001/patient001_frame01.nii.gz patient001/patient001_4d.nii.gz patient002/patient002_frame01.nii.gz",
         "patient001 patient001 patient002"),
        ("s0_0.png s0_1.png s1_0.png", "s0 s0 s1"),
        ("mri_0.nii pet_0.nii mri_1.nii pet_1.nii", "0 0 1 1"),
        ("T1_001.nii T2_001.nii T1_002.nii", "001 001 002"),
        ("MNINonLinear_100307/T1w_restore.nii MNINonLinear_100408/T1w_restore.nii",
         "100307 100408"),
        ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii sub-01/ses-2/anat/sub-01_ses-2_T1w.nii sub-02/anat/sub-02_T1w.nii",
         "sub-01 sub-01 sub-02"),
        ("derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii sub-01/anat/sub-01_T1w.nii", "sub-01 sub-01"),
    ],
    ids=lambda v: v.split()[0] if "." in v else "",
)  # fmt: skip
def test_people_are_told_from_the_part_of_names_that_varies(names, expected):
    names = names.split()
    assert [people(*names)[name][0] for name in names] == expected.split()
    backwards = people(*reversed(names))
    assert backwards == people(*names), "the order of the file system must not matter"


def test_folders_called_train_and_test_are_the_split(tmp_path):
    for name in ("imagesTr/h_001.nii", "imagesTr/h_002.nii", "imagesTr/h_003.nii", "imagesTs/h_004.nii"):
        nifti(tmp_path / "msd" / name)
    found = look(tmp_path / "msd")
    assert found.split == {"h_004": "test"}
    split = split_people(found.people, given=found.split)
    assert split["test"] == ["h_004"] and len(split["validation"]) == 1 and len(split["train"]) == 2
    for name in ("train/sub-1/a.nii", "test/sub-1/b.nii", "train/sub-2/a.nii"):  # one person in both: no split
        nifti(tmp_path / "both" / name)
    assert not look(tmp_path / "both").split


def test_a_file_and_its_compressed_copy_are_one_scan(tmp_path):
    import gzip

    for i in range(2):
        path = nifti(tmp_path / f"p{i}.nii", i)
        (tmp_path / f"p{i}.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    kept, left = one_each(look(tmp_path).items)
    assert [i.name for i in kept] == ["p0.nii", "p1.nii"] and set(left) == {"p0.nii.gz", "p1.nii.gz"}


def test_sessions_and_repetitions_are_named():
    told = people("2022061000_T101.h5", "2022061000_T102.h5", "2022061001_T101.h5")
    assert [session for _, session in told.values()] == ["t101", "t102", "t101"]
    assert people("OAS1_0001_MR1.nii", "OAS1_0002_MR2.nii")["OAS1_0002_MR2.nii"] == ("OAS1_0002", "MR2")


@pytest.mark.parametrize(
    "names",
    [
        "scan1.nii.gz scan2.nii.gz",
        "20220610.h5 20220611.h5",
        "anna/001.nii anna/002.nii bert/001.nii",
        "run1.h5 run2.h5",
    ],
)
def test_what_cannot_be_told_stops_and_says_how_to_tell_it(names):
    with pytest.raises(Unclear, match="give a table .* file, subject"):
        people(*names.split())


def test_the_content_says_whose_it_is_unless_it_says_the_same_of_all():
    said = {"a/1.h5": ("p1", ""), "a/2.h5": ("p1", ""), "b/3.h5": ("p2", "")}
    assert [p for p, _ in people(*said, said=said).values()] == ["p1", "p1", "p2"]
    anonymous = {f"subj{i}/scan.h5": ("anonymous", "") for i in range(4)}
    with pytest.raises(Unclear, match="names tell 4 people"):
        people(*anonymous, said=anonymous)


def test_a_table_settles_it(tmp_path):
    for name in ("scan1", "scan2", "scan3"):
        nifti(tmp_path / f"{name}.nii.gz")
    assert "give a table" in look(tmp_path).unclear
    with pytest.raises(Unclear, match="give a table"):
        find(tmp_path)
    table = tmp_path / "who.csv"
    table.write_text(
        "file,subject,session,split\nscan1.nii.gz,anna,1,train\nscan2.nii.gz,anna,2,train\nscan3.nii.gz,bert,1,test\n"
    )
    found = find(tmp_path, table)
    assert {p: len(items) for p, items in found.people.items()} == {"anna": 2, "bert": 1}
    assert found.split == {"anna": "train", "bert": "test"}
    (tmp_path / "participants.tsv").write_text("filename\tparticipant_id\nscan1.nii.gz\ta\nscan2.nii.gz\tb\n")
    own = find(tmp_path)
    assert [i.person for i in own.items] == ["a", "b"] and "not in participants.tsv" in own.left["scan3.nii.gz"]
    for text, reason in (
        ("file,age\na,1\n", "expected subject"),
        ("file,subject\nnix.nii,a\n", "nix.nii"),
        ("subject,split\na,train\na,test\n", "one split"),
        ("subject,split\na,somewhere\n", "use train"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=reason):
            look(tmp_path, table)


# ------------------------------------------------------------------------------------------------------------ splits


def test_nobody_is_in_two_splits_and_no_split_is_empty_without_a_word():
    names = [f"s{i}" for i in range(20)]
    split = split_people(names, (0.8, 0.1, 0.1), seed=3)
    assert sorted(sum(split.values(), [])) == sorted(names) and [len(v) for v in split.values()] == [16, 2, 2]
    assert split == split_people(reversed(names), (0.8, 0.1, 0.1), seed=3)
    assert "train         16 people" in split_table(split)
    assert [len(v) for v in split_people(["a", "b", "c"]).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="nobody would be in"):
        split_people(["a", "b"])
    assert split_people(["a", "b"], (1, 0, 0)) == {"train": ["a", "b"], "validation": [], "test": []}
    with pytest.raises(ValueError, match="sum 1"):
        split_people(names, (0.8, 0.3, 0.1))


def test_a_given_split_is_kept():
    given = {"a": "test", "b": "test", "c": "train", "d": "validation"}
    assert split_people("abcd", given=given) == {"train": ["c"], "validation": ["d"], "test": ["a", "b"]}
    split = split_people("abcdefgh", given={"a": "test"})
    assert split["test"] == ["a"] and len(split["validation"]) == 1 and len(split["train"]) == 6
    with pytest.raises(ValueError, match="nobody would be in validation"):
        split_people("ab", given={"a": "test", "b": "train"})


# ----------------------------------------------------------------------------------------------------------- walking

NAMES = st.sampled_from(["sub-{p:02d}/ses-{s}/anat/sub-{p:02d}_ses-{s}_T1w.nii", "subj{p}/visit{s}/T1w.nii",
                         "IXI{p:03d}-HH-12{p}-visit{s}-T1.nii", "OAS1_{p:04d}_MR{s}.nii",
                         "10{p:04d}/T1w/scan{s}/T1w_brain.nii"])  # fmt: skip
HIDDEN = [".git/objects/x.nii", ".datalad/y.nii", "._a.nii", "__MACOSX/z.nii", ".DS_Store"]
NOTES = ["README", "dataset_description.json", "participants.json", "CHANGES", "notes.txt"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    naming=NAMES,
    visits=st.lists(st.integers(1, 3), min_size=1, max_size=8),
    extra=st.lists(st.sampled_from([*HIDDEN, *NOTES]), unique=True),
    links=st.lists(st.sampled_from(["loop", "self", "up", "twin", "file", "dangling", "outside"]), unique=True),
    order=st.randoms(use_true_random=False),
)
def test_every_tree_gives_every_usable_file_once(tmp_path_factory, naming, visits, extra, links, order):
    root = tmp_path_factory.mktemp("tree") / "data"
    root.mkdir()
    expected = {naming.format(p=p, s=s): p for p, count in enumerate(visits, 1) for s in range(1, count + 1)}
    for i, name in enumerate(expected):
        nifti(root / name, i, shape=(2, 2, 2))
    for name in extra:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    first = next(iter(expected))
    for link in links:
        target = {"loop": root, "self": root / "self", "up": root.parent, "dangling": root / "gone.nii",
                  "twin": (root / first).parent, "file": root / first}.get(link)  # fmt: skip
        if link == "outside":
            target = root.parent / "elsewhere"
            elsewhere = naming.format(p=90, s=1)
            nifti(target / elsewhere, 90, shape=(2, 2, 2))
            expected[f"outside/{elsewhere}"] = 90
        (root / (f"{link}.nii" if link in ("file", "dangling") else link)).symlink_to(target)

    found = look(root)
    assert not found.unclear
    assert sorted(item.name for item in found.items) == sorted(expected), "each usable file exactly once"
    assert len({os.path.realpath(i.path) for i in found.items}) == len(expected)
    who = {item.name: item.person for item in found.items}
    for name, person in expected.items():
        for other, another in expected.items():
            assert (who[name] == who[other]) == (person == another)
    told = {*who, *found.left, *found.notes}
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith((".", "__"))]
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), root)
            assert name in told or file.startswith(".") or name == "self", "nothing is lost"

    real = os.scandir

    def shuffled(folder):
        entries = list(real(folder))
        order.shuffle(entries)
        return iter(entries)

    try:
        os.scandir = shuffled
        again = look(root)
    finally:
        os.scandir = real
    assert again == found
    if len(visits) > 2:
        split = split_people(found.people, seed=order.randint(0, 99))
        assert sorted(sum(split.values(), [])) == sorted(found.people)


def test_links_are_followed_once_and_loops_noticed(tmp_path):
    a = nifti(tmp_path / "data/s1/T1.nii.gz")
    nifti(tmp_path / "far/s2/T1.nii.gz", 2)
    (tmp_path / "data/more").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/again.nii.gz").symlink_to(a)
    walked = walk(tmp_path / "data")
    assert list(walked.files) == ["more/s2/T1.nii.gz", "s1/T1.nii.gz"]
    assert walked.left["again.nii.gz"] == "the same file as s1/T1.nii.gz"
    assert "read already" in walked.left["more/back"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        walk(tmp_path / "nix")


def test_archives_and_strangers_are_named(tmp_path):
    nifti(tmp_path / "s1_T1.nii")
    for name, content in (("a.zip", b"PK\3\4"), ("b.xyz", b"abc"), ("c.nii.gz", b""), ("d.nii/d.nii", None)):
        if content is None:
            nifti(tmp_path / name, 4)
        else:
            (tmp_path / name).write_bytes(content)
    found = look(tmp_path)
    assert [item.name for item in found.items] == ["d.nii/d.nii", "s1_T1.nii"]
    assert "archive" in found.left["a.zip"] and "no format" in found.left["b.xyz"] and "empty" in found.left["c.nii.gz"]
    with pytest.raises(Unreadable, match="nothing to use"):
        find(tmp_path, kinds=("sinogram",))


# ------------------------------------------------------------------------------------------------------- what it is


def test_fmriprep_derivatives_are_told_apart(tmp_path):
    for p in (1, 2):
        s, folder = f"sub-{p:02d}", tmp_path / f"sub-{p:02d}/anat"
        for i, name in enumerate(
            (
                "T1w",
                "desc-preproc_T1w",
                "space-MNI152NLin2009cAsym_desc-preproc_T1w",
                "T2w",
                "dseg",
                "desc-brain_mask",
                "space-MNI152NLin2009cAsym_desc-brain_mask",
                "label-GM_probseg",
            )
        ):
            nifti(folder / f"{s}_{name}.nii.gz", 10 * p + i)
    found = look(tmp_path)
    kinds = {item.name.split("_", 1)[1]: item.what.kind for item in found.items}
    assert kinds["dseg.nii.gz"] == "labels" and kinds["label-GM_probseg.nii.gz"] == "probability"
    assert kinds["desc-brain_mask.nii.gz"] == "mask" and kinds["T2w.nii.gz"] == "image"
    t1 = [i for i in found.items if i.what.kind == "image" and i.what.contrast == "T1w"]
    chosen, left = one_each(t1)
    assert [i.name for i in chosen] == [f"sub-0{p}/anat/sub-0{p}_desc-preproc_T1w.nii.gz" for p in (1, 2)]
    assert len(left) == 4 and all("another version" in why for why in left.values())
    masks = [mask_of(i, found.items).name for i in chosen]
    assert masks == [f"sub-0{p}/anat/sub-0{p}_desc-brain_mask.nii.gz" for p in (1, 2)]
    other = next(i for i in t1 if "space-" in i.name)
    assert mask_of(other, found.items).name.endswith("space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz")


def test_200_people_are_looked_at_by_their_headers_alone(tmp_path, monkeypatch):
    for i in range(200):
        nifti(tmp_path / f"sub-{i:03d}/anat/sub-{i:03d}_T1w.nii.gz", i, (8, 8, 8))
    from companion.data.intake import streams

    monkeypatch.setattr(streams, "part", lambda *a, **k: pytest.fail("values were read"))
    found = look(tmp_path)
    assert len(found.people) == 200 and not found.left
    assert random.Random(0).sample(list(found.people), 1)
