"""PETSIRD list mode becomes sinograms: every event where its line is, sources where they were, one clear error each."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

petsird = pytest.importorskip("petsird", reason="needs the extra formats")

import listed  # noqa: E402 (needs the package)

from companion.acquisition.own_pet import OwnScan  # noqa: E402
from companion.cli import app  # noqa: E402
from companion.data.efficiencies import Efficiencies, singles_of  # noqa: E402
from companion.data.intake.readers import read_image  # noqa: E402
from companion.data.list_mode import histogram  # noqa: E402
from companion.data.petsird import read_scanner  # noqa: E402
from companion.data.rings import Rings  # noqa: E402
from companion.data.sinograms import read_sinograms  # noqa: E402
from companion.operators.cylinder import Projector3D  # noqa: E402
from companion.operators.linear import Diagonal  # noqa: E402
from companion.operators.pet import Projector  # noqa: E402
from companion.reconstruction.pet import mlem, osem  # noqa: E402

SOURCE = (14.0, -22.0, 2.0)  # mm, from the middle of the scanner: right, down, up along the axis
ENERGIES = listed.ENERGIES


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    info = listed.scanner()
    events = listed.decays(info, SOURCE, 16000, np.random.default_rng(0))
    return info, events, listed.write(tmp_path_factory.mktemp("list") / "a.petsird", info, events)


def by_hand(info, events, angles, shifts):
    """Angle, bin, z of both ends (lower first) and TOF bin of events, from where the crystals are alone."""
    where = listed.centres(info)
    where = where - where.mean(0)
    for a, b, tof in events:
        p, q = where[a // ENERGIES], where[b // ENERGIES]
        along = math.atan2(q[1] - p[1], q[0] - p[0])
        best = []
        for theta in (along - math.pi / 2, along + math.pi / 2):
            turned = (np.asarray(angles) - theta + math.pi) % (2 * math.pi) - math.pi
            best.append((np.abs(turned).min(), np.abs(turned).argmin(), theta))
        _, angle, theta = min(best)
        s = (p[0] + q[0]) / 2 * math.cos(theta) + (p[1] + q[1]) / 2 * math.sin(theta)
        upper = -math.sin(theta) * q[0] + math.cos(theta) * q[1] > 0  # the second photon's end
        low, high = (p[2], q[2]) if upper else (q[2], p[2])
        yield int(angle), int(np.abs(shifts - s).argmin()), low, high, tof if upper else listed.TOF[0] - 1 - tof


def ring(z):
    return round(z / listed.AXIAL + (listed.RINGS - 1) / 2)


@pytest.mark.parametrize("clockwise", [False, True])
def test_slices_are_a_direct_count(tmp_path, clockwise):
    info = listed.scanner(clockwise=clockwise)
    events = listed.decays(info, SOURCE, 3000, np.random.default_rng(1), spread=6.0)
    found = histogram(listed.write(tmp_path / "a.petsird", info, events))
    beam = found.scanner.rings.geometry(found.bins).beam(8, 1.0)
    counted = Counter(
        (ring(low) + ring(high), k, j) for k, j, low, high, _ in by_hand(info, events, beam.theta, beam.shifts_mm)
    )
    expected = np.zeros(found.counts.shape, int)
    for at, n in counted.items():
        expected[at] = n
    assert found.counts.sum() == len(events) == found.seen["prompt events"] > 1000
    np.testing.assert_array_equal(found.counts, expected)
    assert found.seen["ms"] == 3000 and not found.counts[found.factors == 0].any()


@pytest.mark.parametrize(("span", "tof"), [(1, True), (3, False)])
def test_planes_and_time_are_a_direct_count(scan, span, tof):
    info, events, path = scan
    cylinder = read_scanner(path).cylinder((5, 20, 20), (2.5, 3.0), span=span, tof=tof, bins=81)
    found = histogram(path, cylinder)
    plane = {pair: i for i, pairs in enumerate(cylinder.planes) for pair in pairs}
    expected = np.zeros(cylinder.sinogram_shape, int)
    some = by_hand(info, events, cylinder.theta, cylinder.shifts_mm)
    for k, j, low, high, time in some:
        expected[(0, *([time] if tof else []), plane[ring(low), ring(high)], k, j)] += 1
    np.testing.assert_array_equal(found.counts, expected)


def peak(x, pixel_mm):
    """Where a source is, mm to the right and up: the middle of what is around the largest pixel."""
    side = x.shape[-1]
    row, column = divmod(int(x.argmax()), side)
    return (column - (side - 1) / 2) * pixel_mm, ((side - 1) / 2 - row) * pixel_mm


def test_a_source_comes_back_in_its_place_through_a_scan_file(scan, tmp_path):
    out = tmp_path / "mine.npz"
    result = CliRunner().invoke(
        app, ["data", "petsird", str(scan[2]), str(out), "--units", "counts", "--slices", "1", "4"]
    )
    assert result.exit_code == 0 and "3000 ms" in result.output and "without attenuation" in result.output
    own = OwnScan.read(out, 36, 2.0)
    assert own.file.slice_mm == listed.AXIAL / 2 and own.beam.radius_mm == pytest.approx(62.13, abs=0.01)
    x = mlem(own.scan.y, own.scan.A, iterations=20).x.sum((0, 1))
    assert peak(x, 2.0) == pytest.approx(SOURCE[:2], abs=2.0)
    shown = CliRunner().invoke(app, ["look", str(out)])
    assert shown.exit_code == 0 and "without arc correction" in shown.output


@pytest.mark.parametrize("tof", [False, True])
def test_a_source_comes_back_in_its_place_in_3d(scan, tof):
    cylinder = read_scanner(scan[2]).cylinder((7, 36, 36), (2.0, 2.0), bins=81, tof=tof)
    y, A, r = histogram(scan[2], cylinder).emission(Projector3D(cylinder))
    x = osem(y, A, r, iterations=2, subsets=4).x[0, 0]
    assert peak(x.sum(0), 2.0) == pytest.approx(SOURCE[:2], abs=2.0)
    z = (x.sum((1, 2)) * (torch.arange(7) - 3) * 2.0).sum() / x.sum()
    assert z.item() == pytest.approx(SOURCE[2], abs=1.5)


def some_efficiencies():
    """Random efficiencies of crystals and of pairs of modules, neighbours being in no coincidence."""
    rng = np.random.default_rng(0)
    size = listed.ACROSS * listed.RINGS * ENERGIES
    apart = [[min(i - j, 28 - i + j) for j in range(i + 1)] for i in range(28)]
    lut = [[d - 3 if d >= 3 else -1 for d in row] for row in apart]
    tables = rng.uniform(0.5, 1, (12, size, size)).tolist()
    pairs = [petsird.ModulePairEfficiencies(values=table, sgid=k) for k, table in enumerate(tables)]
    single = rng.uniform(0.5, 1, 28 * size)
    single[: 3 * ENERGIES] = 0  # the first three crystals are dead
    return petsird.DetectionEfficiencies(
        detection_bin_efficiencies=[single.tolist()],
        module_pair_sgidlut=[[lut]],
        module_pair_efficiencies_vectors=[[pairs]],
    )


def test_efficiencies_are_those_of_the_package(tmp_path):
    info = listed.scanner(efficiencies=some_efficiencies(), calibration=0.25)
    events = listed.decays(info, SOURCE, 1000, np.random.default_rng(2))
    dead = listed.ordered(np.zeros(5, int), np.full(5, 150), np.zeros(5, int))
    path = listed.write(tmp_path / "a.petsird", info, np.concatenate([events, dead]))
    scanner = read_scanner(path)
    cylinder = scanner.cylinder((3, 8, 8), (2.5, 4.0))
    found = histogram(path, cylinder)
    assert found.seen["prompt events of pairs with efficiency 0, left out"] >= 5
    assert not found.counts[:, found.factors[0] == 0].any()
    assert cylinder.bins == 95  # modules three apart, crystals nine; 111 without the table
    pairs = events[:, :2] // ENERGIES
    for a, b in pairs[:40]:
        total = sum(
            petsird.helpers.get_detection_efficiency(info, (0, 0), int(a * ENERGIES + e), int(b * ENERGIES + f))
            for e in range(ENERGIES)
            for f in range(ENERGIES)
        )
        where = scanner.rings
        k, j, low = (int(v[0]) for v in where.lines(where.place[[a]], where.place[[b]], cylinder.bins))
        ends = (where.ring[a], where.ring[b]) if low else (where.ring[b], where.ring[a])
        plane = [p[0] for p in cylinder.planes].index(tuple(ends))
        assert found.factors[0, plane, k, j] == pytest.approx(total, rel=1e-5)
    slices = histogram(path)
    direct = histogram(path, max_difference=0)
    assert (slices.factors >= direct.factors).all() and not direct.factors[1::2].any()
    total = sum(found.factors[0, i] for i, p in enumerate(cylinder.planes) if sum(p[0]) == 2)
    assert (slices.factors[2] >= total * (1 - 1e-6)).all()  # oblique lines are longer


def test_uneven_efficiencies_leave_a_source_as_it_was(tmp_path):
    """Exact expected counts with the factors of a file: the source is found again."""
    info = listed.scanner(efficiencies=some_efficiencies())
    events = listed.decays(info, SOURCE, 500, np.random.default_rng(0))
    found = histogram(listed.write(tmp_path / "a.petsird", info, events))
    P = Projector(found.scanner.rings.geometry(found.bins).beam(16, 4.0))
    factors = torch.from_numpy(found.factors)[:, None]
    x = torch.ones(5, 1, 16, 16)
    x[..., 3:6, 9:12] = 3
    again = mlem(factors * P(x), Diagonal(factors, P.range_shape) @ P, iterations=400, noise_free=True).x
    inside = torch.hypot(*torch.meshgrid(*[torch.arange(16) - 7.5] * 2, indexing="ij")) < 7
    assert (again - x)[..., inside].abs().max() < 0.1


def test_activity_keeps_its_units(tmp_path):
    """A long cylinder of 10 kBq/mL, its chords between crystals in closed form: 10 kBq/mL in slices and in 3D."""
    info = listed.scanner(tof=False, calibration=2e-3)  # counts per kBq/mL and mm, in each of 2 x 2 energy windows
    where = listed.centres(info)
    first, second = np.tril_indices(len(where), -1)
    p, along = where[first, :2], (where[second] - where[first])
    flat = np.hypot(along[:, 0], along[:, 1])
    toward = p - (8.0, -5.0)
    away = np.abs(toward[:, 0] * along[:, 1] - toward[:, 1] * along[:, 0]) / np.maximum(flat, 1e-9)
    chord = 2 * np.sqrt(np.clip(20.0**2 - away**2, 0, None)) * np.linalg.norm(along, axis=1) / np.maximum(flat, 1e-9)
    drawn = np.random.default_rng(4).poisson(np.where(flat > 1, 2e-3 * ENERGIES**2 * 10 * chord, 0))
    pairs = (np.repeat(v, drawn) for v in (first, second))
    events = listed.ordered(*pairs, np.zeros(drawn.sum(), int), 1)
    path = listed.write(tmp_path / "a.petsird", info, events)
    own = OwnScan.read(histogram(path).write(tmp_path / "a.npz", units="kBq/mL"), 28, 3.0)
    cylinder = read_scanner(path).cylinder((5, 28, 28), (2.5, 3.0))
    y, A, _ = histogram(path, cylinder).emission(Projector3D(cylinder))
    for x in (mlem(own.scan.y, own.scan.A, iterations=15).x[:, 0], mlem(y, A, iterations=15).x[0, 0, 1:4]):
        assert x.sum().item() * 9 / len(x) == pytest.approx(10 * math.pi * 400, rel=0.02)
    half = histogram(path).write(tmp_path / "half.npz", units="kBq/mL", attenuation=np.full((5, 1, 1), 0.5))
    np.testing.assert_allclose(2 * read_sinograms(half).arrays["factors"], own.file.arrays["factors"], rtol=1e-6)
    thinner = histogram(path, cylinder).emission(Projector3D(cylinder), torch.full((1, 1, 1), 0.5))[1]
    ones = torch.ones(1, *cylinder.volume_shape)
    assert torch.allclose(2 * thinner(ones), A(ones))


def test_randoms_are_those_of_the_singles(tmp_path):
    rng = np.random.default_rng(3)
    info = listed.scanner(efficiencies=some_efficiencies())
    path = listed.write(tmp_path / "a.petsird", info, [[200, 3, 0]])
    efficiencies = read_scanner(path).efficiencies
    count = len(efficiencies.module)
    rates = rng.uniform(0.2, 0.6, count)
    rates[:3] = 0
    first, second = np.tril_indices(count, -1)
    alive = efficiencies.alive[efficiencies.module[first], efficiencies.module[second]]
    mean = rates[first] * rates[second] * alive
    fans = np.bincount(first, mean, count) + np.bincount(second, mean, count)
    np.testing.assert_allclose(singles_of(fans, efficiencies), rates, rtol=1e-6)

    drawn = rng.poisson(mean)
    events = listed.ordered(np.repeat(first, drawn), np.repeat(second, drawn), rng.integers(5, size=drawn.sum()))
    prompts = listed.decays(info, SOURCE, 1000, rng)
    path = listed.write(tmp_path / "b.petsird", info, prompts, events)
    found = histogram(path)
    assert found.seen["delayed events"] == len(events)
    place, rings = found.scanner.rings.place, found.scanner.rings.ring
    crossing = place[first] != place[second]
    assert found.background.sum() == pytest.approx(mean[crossing].sum(), rel=0.03)
    k, j, _ = found.scanner.rings.lines(place[first], place[second], found.bins)
    truth = np.zeros(found.counts.shape)
    np.add.at(truth, ((rings[first] + rings[second])[j >= 0], k[j >= 0], j[j >= 0]), mean[j >= 0])
    raw = np.zeros(found.counts.shape)
    np.add.at(raw, ((rings[first] + rings[second])[j >= 0], k[j >= 0], j[j >= 0]), drawn[j >= 0])
    assert np.square(found.background - truth).sum() < 0.05 * np.square(raw - truth).sum()
    timed = read_scanner(path).cylinder((3, 8, 8), (2.5, 4.0), tof=True)
    spread = histogram(path, timed)
    assert 5 * spread.background.sum() == pytest.approx(found.background.sum(), rel=1e-5)
    assert spread.emission(Projector3D(timed))[2].shape == (1, *timed.sinogram_shape)


def test_lines_of_json_say_the_same(scan, tmp_path):
    info, events, path = scan
    lines = listed.write(tmp_path / "a.ndjson", info, events[:500], binary=False)
    binary = listed.write(tmp_path / "a.petsird", info, events[:500])
    assert np.array_equal(histogram(lines).counts, histogram(binary).counts)


def test_what_is_no_coincidence_is_counted(tmp_path):
    info = listed.scanner()
    still = petsird.RigidTransformation(matrix=np.eye(3, 4, dtype=np.float32))
    others = [
        petsird.TimeBlock.BedMovementTimeBlock(petsird.BedMovementTimeBlock(transform=still)),
        petsird.TimeBlock.DeadTimeTimeBlock(petsird.DeadTimeTimeBlock()),
        petsird.TimeBlock.ExternalSignalTimeBlock(petsird.ExternalSignalTimeBlock(signal_values=[1.0])),
        petsird.TimeBlock.EventTimeBlock(
            petsird.EventTimeBlock(
                single_events=[[petsird.SingleEvent()] * 4],
                triple_events=[[[[petsird.TripleEvent()] * 3]]],
                quadruple_events=[[[[[petsird.TripleEvent()] * 2]]]],
            )
        ),
    ]
    events = [[200, 3, 0], [3, 2, 0], [2, 2, 0], [660, 20, 1]]  # the second and third are of one detector's place
    path = listed.write(tmp_path / "a.petsird", info, events, extra=others)
    found = histogram(path, bins=61)
    assert found.seen == {
        "ms": 3000, "prompt events": 4, "prompt events of pairs with efficiency 0, left out": 0,
        "prompt events outside of the bins and ring differences, left out": 4 - found.counts.sum(),
        "single events, not used": 4, "triple events, not used": 3, "quadruple events, not used": 2,
        "blocks of BedMovement, not used": 1, "blocks of DeadTime, not used": 1,
        "blocks of ExternalSignal, not used": 1,
    }  # fmt: skip
    assert found.counts.sum() < 3 and "3 triple events, not used" in str(found)


def test_look_says_what_it_is(scan, tmp_path):
    info, events, _ = scan
    path = listed.write(tmp_path / "scan.petsird", info, events[:50], events[:7], patient="LOVELACE-0815")
    result = CliRunner().invoke(app, ["look", str(path)])
    assert result.exit_code == 0 and "LOVELACE" not in result.output
    for words in (
        "PET list mode",
        "3 rings of 112 places (336 detectors)",
        "5 of 30 mm",
        "50 prompt events",
        "7 delayed",
    ):
        assert words in result.output
    with pytest.raises(ValueError, match="list mode .PETSIRD., not an image volume"):
        read_image(path)


# ----------------------------------------------------------------------------------------------------------- geometry


def circle(places, rings=2, radius=100.0, keep=None):
    angle = 2 * math.pi * np.arange(places) / places + 0.1
    angle = angle if keep is None else angle[keep]
    z = np.arange(rings) * 4.0
    return np.concatenate(
        [np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(len(angle), h)], 1) for h in z]
    )


def test_gaps_between_blocks_are_places():
    found = Rings.of(circle(90, keep=np.arange(90) % 9 < 8))
    assert (found.places, found.rings, len(found.ring)) == (90, 2, 160) and "20 gaps" in str(found)
    assert found.first_rad == pytest.approx(0.1 % (2 * math.pi / 90)) and found.ring_mm == pytest.approx(4)
    assert (found.at == -1).sum() == 20
    odd = Rings.of(circle(31))
    assert odd.places == 31 and odd.check_bins(30) == 30
    k, j, _ = odd.lines(np.array([20]), np.array([3]), 30)
    geometry = odd.geometry(30)
    angle = 0.1 % (2 * math.pi / 31) + math.pi * 23 / 31
    beam = geometry.beam(8, 1.0)
    p, q = (100 * np.array([math.cos(a), math.sin(a)]) for a in (odd.first_rad + 2 * math.pi * np.array([20, 3]) / 31))
    assert beam.theta[k[0]] == pytest.approx(angle)
    assert beam.shifts_mm[j[0]] == pytest.approx(((p + q) / 2) @ [math.cos(angle), math.sin(angle)])


def test_one_ring_is_a_slice(tmp_path):
    info = listed.scanner(rings=1, tof=False)
    events = listed.decays(info, SOURCE, 300, np.random.default_rng(0), tof=False)
    found = histogram(listed.write(tmp_path / "a.petsird", info, events))
    assert found.counts.shape == (1, 112, 111) and found.scanner.rings.ring_mm == listed.AXIAL
    assert found.factors.max() == ENERGIES**2


@pytest.mark.parametrize(
    ("centres", "message"),
    [
        (circle(40) * [1.0, 1.2, 1.0], "80 detectors 100.1 to 119.9 mm from the axis, at 40 angles and 2 heights"),
        (circle(40) + [30.0, 0, 0], "no regular rings"),
        (np.concatenate([circle(40), circle(40)]), "share a place"),
        (np.concatenate([circle(40), circle(40, radius=110.0)]), "detector is 5 mm off, and 1.33 mm"),
        (circle(40) * 0, "around the z axis"),
        (circle(40)[:, [2, 0, 1]], "no regular rings"),  # around x
    ],
)  # fmt: skip
def test_what_is_no_cylinder(centres, message):
    with pytest.raises(ValueError, match=message):
        Rings.of(centres)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2}, "cannot be used: 672 detectors 6.* no regular rings"),
        ({"shift": 30.0}, "no regular rings"),
    ],
)
def test_scanners_that_are_no_rings(tmp_path, change, message):
    path = listed.write(tmp_path / "a.petsird", listed.scanner(**change), [[200, 3, 0]])
    with pytest.raises(ValueError, match=message):
        histogram(path)
    shown = CliRunner().invoke(app, ["look", str(path)])
    assert shown.exit_code == 1 and "no regular" in shown.output


def test_damage_and_what_is_missing(scan, tmp_path, monkeypatch):
    info, events, path = scan
    content = path.read_bytes()
    cut = tmp_path / "cut.petsird"
    for size in (len(content) - 1, len(content) // 2, 30000, 100):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated"):
            histogram(cut)
    cut.write_bytes(content.replace(b'"LowerTriangularMatrix"', b'"UpperTriangularMatrix"', 1))
    with pytest.raises(ValueError, match="another version of the format"):
        read_scanner(cut)
    cut.write_bytes(b"something else, " * 9)
    with pytest.raises(ValueError, match="not a PETSIRD file"):
        read_scanner(cut)
    assert CliRunner().invoke(app, ["look", str(cut)]).exit_code == 1
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_scanner(tmp_path / "none.petsird")
    for event, message in (([10_000, 3, 0], "detection bin 10000 of 672"), ([200, 3, 9], "TOF bin 9 of 5")):
        with pytest.raises(ValueError, match=message):
            histogram(listed.write(cut, info, [event]))
    monkeypatch.setitem(sys.modules, "petsird", None)
    with pytest.raises(ValueError, match=r'needs the package petsird: pip install "companion\[formats\]"'):
        read_scanner(path)
    shown = CliRunner().invoke(app, ["look", str(path)])
    assert shown.exit_code == 1 and "needs the package petsird" in shown.output


def test_movements(tmp_path):
    info = listed.scanner()
    moved = np.eye(3, 4, dtype=np.float32)
    moved[2, 3] = 100
    bed = petsird.TimeBlock.BedMovementTimeBlock(
        petsird.BedMovementTimeBlock(transform=petsird.RigidTransformation(matrix=moved))
    )
    gantry = petsird.TimeBlock.GantryMovementTimeBlock(
        petsird.GantryMovementTimeBlock(transforms=[petsird.RigidTransformation(matrix=moved)])
    )
    block = petsird.TimeBlock.EventTimeBlock(petsird.EventTimeBlock())
    histogram(listed.write(tmp_path / "a.petsird", info, [[200, 3, 0]], extra=[bed]))  # before all events: at rest
    for extra, message in (([block, bed], "bed moves by .*100"), ([gantry], "gantry moves")):
        with pytest.raises(ValueError, match=message):
            histogram(listed.write(tmp_path / "b.petsird", info, [[200, 3, 0]], extra=extra))


def test_what_was_asked_for_must_be_there(scan, tmp_path):
    info, events, path = scan
    scanner = read_scanner(path)
    with pytest.raises(ValueError, match="110 bins of a ring of 112 places; use 111, or fewer by an even number"):
        histogram(path, bins=110)
    with pytest.raises(ValueError, match="ring differences up to 3 of 3 rings"):
        histogram(path, max_difference=3)
    cylinder = scanner.cylinder((3, 8, 8), (2.5, 4.0))
    with pytest.raises(ValueError, match="those of the cylinder"):
        histogram(path, cylinder, bins=81)
    plain = listed.write(tmp_path / "plain.petsird", listed.scanner(tof=False, calibration=0.0), [[200, 3, 0]])
    with pytest.raises(ValueError, match="a calibration of 0; give calibration"):
        histogram(plain)
    with pytest.raises(ValueError, match="no time of flight"):
        read_scanner(plain).cylinder((3, 8, 8), (2.5, 4.0), tof=True)
    other = listed.write(tmp_path / "other.petsird", listed.scanner(rings=2), [[200, 3, 0]])
    with pytest.raises(ValueError, match="the cylinder is not that of"):
        histogram(other, cylinder)
    with pytest.raises(ValueError, match="are no slices"):
        histogram(path, cylinder).write(tmp_path / "a.npz", units="counts")
    slices = histogram(plain, calibration=2.0)
    assert slices.factors.max() >= 2 * ENERGIES**2
    with pytest.raises(ValueError, match="slices .* of 5 counted nothing above their randoms; give slices"):
        slices.write(tmp_path / "a.npz", units="counts")
    with pytest.raises(ValueError, match=r"slices=\(2, 9\) of 5"):
        slices.write(tmp_path / "a.npz", units="counts", slices=(2, 9))
    with pytest.raises(ValueError, match="takes one of kBq/mL"):
        histogram(path).write(tmp_path / "a.npz", units="mCi", slices=(1, 4))
    for units, out in (("mCi", "a.npz"), ("counts", "a.nii")):
        result = CliRunner().invoke(app, ["data", "petsird", str(path), str(tmp_path / out), "--units", units])
        assert "units are one of kBq/mL" in str(result.exception)
    assert not list(tmp_path.glob("a.*"))
    info.tof_bin_edges[0][0].edges[1] += 9
    with pytest.raises(ValueError, match="even and centred ones are read"):
        read_scanner(listed.write(tmp_path / "uneven.petsird", info, [[200, 3, 0]]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("detection_bin_efficiencies", [[1.0, 2.0]], r"shape \(2,\); expected \(672,\)"),
        ("detection_bin_efficiencies", [[-1.0] * 672], "not negative"),
        ("module_pair_sgidlut", [[[[0], [0]]]], "lower triangle of 28 modules"),
        ("module_pair_efficiencies_vectors", [[[]]], None),
    ],
)
def test_tables_of_efficiencies_must_fit(field, value, message):
    given = some_efficiencies()
    setattr(given, field, value)
    if message is None:
        assert Efficiencies.of("x", given, 28, 12, 2).matrices is None  # absent parts are 1
        return
    with pytest.raises(ValueError, match=message):
        Efficiencies.of("x", given, 28, 12, 2)
