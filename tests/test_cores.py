"""Threads of a run beside other people's processes."""

import os

import pytest

from companion.workbench import cores
from companion.workbench.cores import Seen, free_threads


@pytest.mark.parametrize(
    ("idle", "own", "threads"),
    [
        (4.0, 3.9, 2),  # a quiet machine of two cores: one idle, one ours
        (0.1, 2.6, 1),  # two busy processes beside us
        (0.0, 0.4, 1),  # many
        (27.6, 3.9, 8),  # eight cores
    ],
)
def test_a_run_has_the_threads_that_others_leave(idle, own, threads):
    assert free_threads(Seen(10.0, 100.0, 1.0), Seen(14.0, 100.0 + idle, 1.0 + own)) == threads


def test_what_cannot_be_seen_changes_nothing(monkeypatch, tmp_path):
    now = cores.look()
    assert now is None or free_threads(now, cores.look()) is None, "too short a look"
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    assert cores.look() is None and free_threads(None, now) is None


@pytest.mark.skipif(not cores.STAT.exists(), reason="no /proc/stat here")
def test_only_our_own_cores_count(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text("cpu 9 0 9 900 90 0\ncpu0 1 0 1 500 20 0 0\ncpu7 1 0 1 300 0 0 0\nintr 5\n")
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7})
    assert cores.look().idle == 300 / os.sysconf("SC_CLK_TCK")
