"""Spoilt files of every format: refused by the readers' own error, or read as they were; quick version, fixed seed.

The ten-minute version is benchmarks/fuzz_readers.py. Formats without checksums are those whose samples say so.
"""

import fuzzing
import pytest

UNCHECKED = {
    "NIfTI .nii", "DICOM", "fastMRI .h5", "ISMRMRD .h5", "MATLAB 7.3 .mat", "NumPy .npy", "BART .cfl", "BART .hdr",
    "Siemens .dat",
}  # fmt: skip


def samples():
    for sample in fuzzing.SAMPLES:
        slow = sample.name == "Siemens .dat"
        yield pytest.param(sample, id=sample.name, marks=[pytest.mark.slow] if slow else [])


def test_the_formats_without_checksums_are_these():
    known = {sample.name for sample in fuzzing.SAMPLES if not sample.checked}
    assert known == UNCHECKED - ({"Siemens .dat"} if not fuzzing.REAL.is_file() else set())


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


def test_the_harness_sees_what_it_must():
    """A reader that crashes, hangs, takes memory, raises or changes values is found."""
    import os
    import time

    import numpy as np

    def make(folder):
        (folder / "a.bin").write_bytes(bytes(64))
        return folder / "a.bin"

    def bad(how):
        def read(path):
            if path.read_bytes() != bytes(64):
                how()
            return [np.frombuffer(path.read_bytes(), np.uint8)]

        return read

    def hang():
        while True:
            time.process_time()

    ways = {
        "died, SIGABRT": os.abort,
        "KeyError": lambda: {}["x"],
        "memory": lambda: np.ones(2**28),
        "changed": lambda: None,
        "over": hang,
    }
    seconds, fuzzing.SECONDS = fuzzing.SECONDS, 1
    try:
        for words, how in ways.items():
            sample = fuzzing.Sample("bad", make, True, read=bad(how))
            _, findings = fuzzing.try_all(sample, range(1), fuzzing.flip)
            assert len(findings) == 1 and words in findings[0].what
    finally:
        fuzzing.SECONDS = seconds
