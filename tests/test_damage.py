"""Spoilt files of every format: refused by the readers' own error, or read as they were; quick version, fixed seed.

The ten-minute version is benchmarks/fuzz_readers.py. Formats without checksums are those whose samples say so.
"""

import fuzzing
import pytest

UNCHECKED = {
    "NIfTI .nii", "MINC 2 .mnc", "DICOM", "fastMRI .h5", "ISMRMRD .h5", "MATLAB 7.3 .mat", "NumPy .npy", "BART .cfl",
    "BART .hdr", "Siemens .dat", "PETSIRD",
}  # fmt: skip


def samples():
    for sample in fuzzing.SAMPLES:
        slow = sample.name == "Siemens .dat"
        yield pytest.param(sample, id=sample.name, marks=[pytest.mark.slow] if slow else [])


def test_the_formats_without_checksums_are_these():
    known = {sample.name for sample in fuzzing.SAMPLES if not sample.checked}
    there = {sample.name for sample in fuzzing.SAMPLES}
    assert known == UNCHECKED - ({"Siemens .dat", "PETSIRD"} - there)


@pytest.mark.parametrize("sample", list(samples()))
def test_a_flipped_byte_is_refused_or_changes_nothing(sample):
    outcomes, findings = fuzzing.try_all(sample, range(12), fuzzing.flip, seed=1)
    assert not findings and outcomes.total() == 12
    if sample.checked:
        assert not outcomes["changed"]


@pytest.mark.parametrize("sample", list(samples()))
def test_any_damage_is_refused_by_the_readers_own_error(sample):
    outcomes, findings = fuzzing.try_all(sample, range(12), fuzzing.spoil, seed=2)
    assert not findings and outcomes.total() == 12


@pytest.mark.parametrize("sample", fuzzing.BAD, ids=lambda sample: sample.name)
def test_the_harness_sees_what_it_must(sample):
    """A reader that crashes, computes or waits for ever, takes memory, raises or changes values is found each time."""
    wall = 3 if "without computing" in sample.name else 120
    outcomes, findings = fuzzing.try_all(sample, range(2), fuzzing.flip, limits=(1, wall))
    assert [finding.case for finding in findings] == [0, 1] and outcomes.total() == 2
    assert all(sample.name in finding.what for finding in findings)


def test_what_libhdf5_cannot_survive_is_refused_before(tmp_path):
    """A heap that ends in a length of 0, at which it stands for ever, and a type of lists at which it crashes."""
    known = {sample.name: sample for sample in fuzzing.SAMPLES}
    for name, find, shift, value in (
        ("prepared .h5", b"GCOL", 24, 0xF9),  # the size of the first object, so that a free space of 0 follows
        ("ISMRMRD .h5", b"\x19\0\0\0\x10\0\0\0\x11", 1, 2),  # neither a sequence nor a text
    ):
        sample = known[name]
        path = sample.make(tmp_path)
        content = bytearray(path.read_bytes())
        content[content.index(find) + shift] = value
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            fuzzing.values(path, sample)
        path.unlink()
