"""AID's own parts: prepared sequences, windows that stay in their volume, what the loss is given, sampling modes."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from companion.data import sequences as data_sequences
from companion.data.sequences import pieces
from companion.data.store import open_dataset
from companion.data.virtual import volume, volumes
from companion.diffusion.sampling import Bill
from companion.diffusion.sequence import sample_sequence
from companion.evaluation import sequences
from companion.models import sequences as models_sequences
from companion.models.architectures import build, network_of
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.operators.mri import birdcage_maps, fft
from companion.papers.aid import data as aid
from companion.papers.aid import prior as aid_prior
from companion.papers.aid import sample as sampling
from companion.randomness import randn
from companion.show import sequences as show_sequences
from companion.training import latents as training_latents
from companion.training import sequences as training_sequences
from companion.training.recipe import save

SIZE, FRAMES = 32, 6


def prepare(folder, **values):
    defaults = dict(source="brain", data=str(folder / "data.h5"), image_size=SIZE, frames=FRAMES, subjects=3, window=2)
    return aid.PrepareData(**defaults | values)


# ------------------------------------------------------------------------------------------------------------- data


def test_cohort_is_stored_once_as_its_magnitudes(tmp_path):
    p = prepare(tmp_path)
    prepared = aid.prepare(p, progress=False)
    people = volumes("brain", "train", 3, FRAMES, SIZE, p.spacing_mm)
    assert np.array_equal(prepared.read("magnitude"), people.abs().numpy())
    assert data_sequences.windows_table(prepared, p.window) == [
        {"split": "train", "sequences": 3, "frames of each": FRAMES, "windows": 3 * 4, "frames in no window": 0}
    ]
    written = prepared.path.stat().st_mtime_ns
    assert aid.prepare(p, progress=False).path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="frames = 6 where the parameters ask for frames = 5; delete the file"):
        aid.prepare(prepare(tmp_path, frames=5), progress=False)
    with pytest.raises(ValueError, match="source = brain.*ask for.*source = elsewhere"):
        aid.prepare(prepare(tmp_path, source="elsewhere"), progress=False)
    shown = data_sequences.shown_sequences(prepared, 2, 5.0, seed=1)
    assert shown.is_complex() and torch.allclose(shown.abs(), people[:2].abs(), atol=1e-6)


@pytest.mark.parametrize("source", ["brain", "heart"])
def test_sequences_go_on_beyond_their_end(source):
    x = volume(source, "test", 1, 5, SIZE, 5.0)
    longer = volume(source, "test", 1, 5, SIZE, 5.0, beyond=2)
    assert torch.allclose(longer[:5], x, atol=1e-6) and longer.shape[0] == 7
    if source == "heart":  # the next beat, but for breathing
        assert sequences.change(longer[5], longer[0]) < sequences.change(longer[5], longer[2])


@pytest.fixture
def files(tmp_path):
    """A folder of complex series of 6, 9 and 7 frames, and of files that cannot be used."""
    folder = tmp_path / "files"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    series = {n: 7 * randn((n, 20, 24), torch.complex64, generator) for n in (6, 9, 7)}
    for n, x in series.items():
        np.save(folder / f"s{n}.npy", x.numpy())
    np.save(folder / "s3_short.npy", series[6][:3].numpy())
    np.save(folder / "s5_magnitude.npy", series[6].abs().numpy())
    (folder / "broken.h5").write_bytes(b"no")
    (folder / "notes.txt").write_text("hello")
    return folder, series


def test_folder_keeps_phase_scale_and_all_frames(files, tmp_path):
    folder, series = files
    p = prepare(tmp_path, source=str(folder), subjects=100, image_size=24, validation_share=0.34, test_share=0.34)
    prepared = aid.prepare(p, progress=False)
    image, scale = prepared.read("image"), prepared.read("scale")
    assert prepared.subjects == ("s6.npy/0", "s7.npy/0", "s7.npy/1", "s9.npy/0", "s9.npy/3")
    assert prepared.attrs["first_frame"] == [0, 0, 1, 0, 3] and prepared.attrs["files"]["s9.npy"] == 9
    for row, name in enumerate(prepared.subjects):
        file, first = name.removeprefix("s").split(".npy/")
        x = series[int(file)]
        assert scale[row] == pytest.approx(x.abs().max().item())
        padded = np.pad(x[int(first) : int(first) + FRAMES].numpy(), ((0, 0), (2, 2), (0, 0)))  # to a square
        assert np.allclose(image[row, :, 0] * scale[row], padded, atol=1e-4)
    assert np.abs(image).max() == pytest.approx(1)
    skipped = prepared.attrs["skipped"]
    assert set(skipped) == {"s3_short.npy", "s5_magnitude.npy", "broken.h5"}
    assert "3 frames" in skipped["s3_short.npy"] and "no phase" in skipped["s5_magnitude.npy"]
    people = {split: {name.split("/")[0] for name in members} for split, members in prepared.split.items()}
    assert [len(people[split]) for split in ("train", "validation", "test")] == [1, 1, 1]
    assert len(set.union(*people.values())) == 3
    with pytest.raises(ValueError, match="image_size = 24 where the parameters ask for image_size = 16"):
        aid.prepare(
            prepare(tmp_path, source=str(folder), subjects=100, image_size=16, validation_share=0.34, test_share=0.34),
            progress=False,
        )


def test_magnitudes_are_stored_as_such(files, tmp_path):
    p = prepare(tmp_path, source=str(files[0]), magnitude=True, leave_out=(0, 2), frames=4, image_size=24)
    prepared = aid.prepare(p, progress=False)
    assert prepared.read("magnitude").min() >= 0 and data_sequences.image_name(prepared) == "magnitude"
    assert prepared.attrs["files"]["s5_magnitude.npy"] == 4


def test_fastmri_files_are_combined_from_their_coils(tmp_path):
    truth = volume("brain", "train", 0, 3, SIZE, 5.0)[:, 0]
    (tmp_path / "files").mkdir()
    with h5py.File(tmp_path / "files" / "scan.h5", "w") as file:
        file["kspace"] = (1e-5 * fft(truth[:, None] * birdcage_maps((SIZE, SIZE), 4), 2)).numpy()
    p = prepare(tmp_path, source=str(tmp_path / "files"), frames=3, acs=16, validation_share=0.0, test_share=0.0)
    prepared = aid.prepare(p, progress=False)
    image = torch.from_numpy(prepared.read("image"))[0, :, 0]
    head = truth.abs() > 0.1
    ratio = (image.abs() * prepared.read("scale")[0] / 1e-5)[head] / truth.abs()[head]
    assert ratio.median() == pytest.approx(1, abs=0.02) and (ratio - 1).abs().mean() < 0.05


def test_nothing_to_prepare_is_an_error_with_reasons(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        aid.prepare(prepare(tmp_path, source=str(tmp_path / "missing")), progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to use there"):
        aid.prepare(prepare(tmp_path, source=str(tmp_path / "empty")), progress=False)
    (tmp_path / "empty" / "a.h5").write_bytes(b"no")
    with pytest.raises(ValueError, match="a.h5: not an HDF5 file"):
        aid.prepare(prepare(tmp_path, source=str(tmp_path / "empty")), progress=False)
    assert not (tmp_path / "data.h5").exists()


@pytest.mark.parametrize("count", [6, 7, 11, 12, 13, 40])
def test_pieces_lose_no_frame(count):
    starts = pieces(count, 6)
    assert {n for first in starts for n in range(first, first + 6)} == set(range(count))
    assert len(starts) == math.ceil(count / 6)


def test_released_loader_joins_volumes():
    blocks = data_sequences.published_blocks([16, 16], 11)
    assert blocks[1] == [(0, n) for n in range(11, 16)] + [(1, n) for n in range(6)]
    assert [data_sequences.straddles(block) for block in blocks] == [False, True]
    assert len(data_sequences.published_blocks([11, 11], 11)) == 1  # the last one is full and withheld


def test_released_reader_divides_by_the_largest_real_part():
    x = torch.tensor([1 + 0j, 4j, 0.5 + 2j]).reshape(1, 1, 1, 3)
    assert data_sequences.published_maximum(x) == 1
    assert (x / data_sequences.published_maximum(x)).abs().max() == 4


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def seen(monkeypatch):
    """What the diffusion loss is given: x0 and cond."""
    calls = []

    def loss(D, x0, generator, *settings, cond=None, **options):
        calls.append((x0, cond if cond is not None else next((s for s in settings if torch.is_tensor(s)), None)))
        return torch.zeros(len(x0))

    monkeypatch.setattr(training_sequences, "edm_loss", loss)
    monkeypatch.setattr(training_sequences, "discrete_loss", loss)
    return calls


def windows():
    """Sequences (2, 4, 1, 2, 2) whose every pixel is the frame's number."""
    return torch.arange(1.0, 5.0).reshape(1, 4, 1, 1, 1).expand(2, 4, 1, 2, 2)


@pytest.mark.parametrize("diffusion", ["edm", "ddpm"])
def test_loss_asks_for_the_frame_after_each(seen, diffusion):
    options = {"diffusion": diffusion, "phase_spacing_mm": None}
    training_sequences.sequence_loss(None, windows(), torch.Generator().manual_seed(0), **options)
    (x0, context) = seen[0]
    assert context[0, :, 0, 0, 0].tolist() == [1, 2, 3] and x0[0, :, 0, 0, 0].tolist() == [2, 3, 4]


def test_loss_of_other_stages_and_starts(seen):
    generator = torch.Generator().manual_seed(0)
    for other in ({"start_dropout": 1.0}, {"stage": "first"}, {"single": True}):
        training_sequences.sequence_loss(None, windows(), generator, phase_spacing_mm=None, **other)
    (begun, blank), (frames, nothing), (image, none) = seen
    assert blank[0, :, 0, 0, 0].tolist() == [0, 1, 2] and begun[0, :, 0, 0, 0].tolist() == [1, 2, 3]
    assert frames.shape == (2, 4, 1, 2, 2) and image.shape == (2, 1, 2, 2) and nothing is None and none is None


def test_loss_draws_phases_that_are_smooth_along_the_sequence(seen):
    x = torch.ones(2, 5, 1, SIZE, SIZE)
    training_sequences.sequence_loss(None, x, torch.Generator().manual_seed(0), phase_spacing_mm=5.0)
    x0, context = seen[0]
    assert torch.allclose(x0.abs(), torch.ones(())) and (sequences.phase_agreement(x0) > 0.95).all()
    assert torch.equal(x0[:, :-1], context[:, 1:])


# --------------------------------------------------------------------------------------------------------- sampling


def tiny(folder, channels=2, size=SIZE, **network):
    """A checkpoint of a random sequence network with a window of 3."""
    config = {
        "network": dict(
            name="CausalUNet",
            seq_len=3,
            in_channels=channels,
            model_channels=32,
            out_channels=channels,
            num_res_blocks=1,
            channel_mult=[1],
            patch=4,
            concat_cond=False,
            use_scale_shift_norm=True,
        )
        | network,
        "denoiser": {"name": "EDMDenoiser", "sigma_data": 0.34, "complex": channels == 2, "channel_axis": -3},
        "data": {"source": "nobody", "scale": "none", "frames": FRAMES, "image_size": [size, size]},
    }
    torch.manual_seed(0)
    model = build(config)
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape))
    return str(save_checkpoint(folder, model, config, {}))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    weights = tiny(tmp_path_factory.mktemp("aid") / "tiny")
    p = sampling.SampleSequence(
        weights=weights, subjects=3, draws=2, extra_frames=2, evaluations=3, device="cpu", autocast=None
    )
    prior, true = opened(p)
    return p, prior, true, models_sequences.draw_all(prior, true, p, progress=False)


def opened(p):
    prior = models_sequences.SequencePrior.load(p.weights, p.codec)
    return prior, models_sequences.held_out(prior, p.source, p.subjects, 2 * prior.window + p.extra_frames)


def test_every_mode_is_drawn_where_it_belongs(tiny_run):
    p, prior, true, drawn = tiny_run
    assert true.shape == (3, 8, 1, SIZE, SIZE)  # two windows and the extra frames
    assert {d.name: (d.first, d.x.shape[1]) for d in drawn} == {
        "retrospective": (1, 3),
        "warm, full": (3, 5),
        "warm, last": (3, 5),
        "cold, full": (0, 5),
        "cold, last": (0, 5),
        "first stage": (0, 5),
        "noised start": (3, 5),
    }
    by_name = {d.name: d.x for d in drawn}
    assert torch.equal(by_name["cold, full"][:, 0], by_name["first stage"][:, 0])  # nothing is known either way
    assert not torch.allclose(by_name["cold, full"][:, 1], by_name["first stage"][:, 1])
    assert not torch.allclose(by_name["warm, full"], by_name["warm, last"])
    assert network_of(prior.D).context == "full" and network_of(prior.D).cache is None


def test_warm_starts_continue_their_own_person(tiny_run):
    p, prior, true, drawn = tiny_run
    warm = next(d for d in drawn if d.name == "warm, full")
    alone = sample_sequence(
        prior.D,
        p.noise_levels(prior.D),
        frames=5,
        shape=true.shape[2:],
        seeds=[1],
        window=3,
        context=true[1:2, :3],
        solver=p.solver,
        dtype=torch.complex64,
    )
    assert torch.allclose(warm.x[1:], alone.x, atol=1e-4)
    assert warm.bill.denoiser_calls == pytest.approx(3 * 5)


def test_tables_and_lines_hold_every_mode(tiny_run):
    p, prior, true, drawn = tiny_run
    rows = sequences.coherence_table(true, drawn, prior.window)
    assert [row["n"] for row in rows] == [3, *[2] * 7, 3]
    assert rows[0]["phase agreement"][0] > 0.95 > rows[-1]["phase agreement"][0]
    bills = {row["mode"]: row for row in sequences.bill_table(prior, drawn, true)}
    assert {row["evaluations a frame"] for row in bills.values()} <= {2, 3}  # 2: the noised start begins lower down
    gflop = {mode: row["GFLOP an evaluation"] for mode, row in bills.items()}
    assert gflop["first stage"] < gflop["warm, last"] < gflop["warm, full"] == gflop["cold, full"]
    rows = show_sequences.strips(true, drawn)
    assert list(rows["truth"]) == [str(n + 1) for n in range(8)] and rows["warm\nfull"]["3"].isnan().all()
    assert torch.equal(rows["warm\nfull"]["4"], drawn[1].x[0, 0])
    played = show_sequences.played(true, drawn, 1)
    assert {len(x) for x in played.values()} == {8} and torch.equal(played["warm, full"][:3], true[1, :3] / 2)
    assert torch.equal(played["warm, full"][3:], drawn[1].x[1]) and not played["first stage"][5:].any()
    lines = sequences.signal_by_frame(true, drawn)
    assert lines["warm, full"][0] == [4, 5, 6, 7, 8] and lines["warm, full"][1][0] == pytest.approx(
        drawn[1].x[:, 0].abs().mean().item(), rel=1e-5
    )


def test_measures_know_the_same_the_different_and_the_turned():
    x = randn((2, 5, 1, 8, 8), torch.complex64, torch.Generator().manual_seed(0))
    assert sequences.change(x, 1j * x).abs().max() < 1e-6
    one, other = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    one[..., 0, 0], other[..., 1, 1] = 3, 3
    assert sequences.change(one, other).tolist() == pytest.approx([2**0.5] * 2)
    still = x[:, :1].expand(-1, 4, -1, -1, -1)
    turns = torch.tensor([1, 1j, -1, -1j]).reshape(1, 4, 1, 1, 1)
    assert sequences.phase_agreement(still).tolist() == pytest.approx([1, 1])
    assert sequences.phase_agreement(still * turns).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert sequences.frame_change(still * turns, 2).max() < 1e-6


def test_strangers_share_no_person():
    x = (10 * torch.arange(3).reshape(3, 1, 1, 1, 1) + torch.arange(3).reshape(1, 3, 1, 1, 1)).float()
    assert sequences.strangers(x)[:, :, 0, 0, 0].tolist() == [[0, 11, 22], [10, 21, 2], [20, 1, 12]]


def test_a_draw_of_the_truth_has_no_error():
    true = volumes("heart", "test", 3, 6, SIZE, 5.0)
    drawn = [
        models_sequences.Drawn("warm", "full", true[:2, 3:].clone(), 3, Bill(1, 0, 1)),
        models_sequences.Drawn("noised start", "full", true[:2, 3:].roll(1, 0), 3, Bill(1, 0, 1)),
    ]
    lines = sequences.error_by_frame(true, drawn, 3)
    assert lines["warm, full"][0] == [4, 5, 6] and max(lines["warm, full"][1]) < 1e-6
    assert min(lines["noised start"][1]) > 0.1 and set(lines) >= {"last given frame", "another person"}
    row = sequences.coherence_table(true, drawn, 3)[1]
    assert row["change from truth"] == "0.000 ± 0.000 (frame 6)"
    assert row["change to next frame"][0] == pytest.approx(sequences.frame_change(true[:2, 3:]).mean().item())
    assert row["of held-out people"][0] == pytest.approx(sequences.frame_change(true[:, 3:]).mean().item())


def test_latents_are_decoded_after_sampling(tmp_path):
    codec = {
        "network": dict(
            name="VQModel", channels=32, channel_mult=[1, 1, 1], num_res_blocks=1, num_embeddings=16, middle=False
        ),
        "data": {"source": "nobody", "scale": "none"},
    }
    torch.manual_seed(1)
    folder = save_checkpoint(tmp_path / "codec", build(codec), codec, {})
    p = sampling.SampleSequence(
        weights=tiny(tmp_path / "prior", channels=3, size=16, patch=2),
        codec=str(folder),
        source="heart",
        subjects=2,
        draws=2,
        extra_frames=0,
        evaluations=2,
        device="cpu",
        autocast=None,
        contexts=("last",),
        modes=("warm", "retrospective"),
    )
    prior, true = opened(p)
    assert true.shape[2:] == (1, 64, 64) and not true.is_complex()
    assert prior.encode(true).shape == (2, FRAMES, 3, 16, 16)
    warm, retrospective = models_sequences.draw_all(prior, true, p, progress=False)
    assert warm.x.shape == (2, 3, 1, 64, 64) and retrospective.x.shape == (2, 3, 1, 64, 64)
    assert "phase agreement" not in sequences.coherence_table(true, [warm], 3)[0]


def test_a_prior_on_latents_from_images_to_samples(tmp_path):
    codec = {
        "network": dict(
            name="VQModel", channels=32, channel_mult=[1, 1, 1], num_res_blocks=1, num_embeddings=16, middle=False
        ),
        "data": {"source": "nobody", "scale": "none"},
    }
    torch.manual_seed(1)
    folder = str(save_checkpoint(tmp_path / "codec", build(codec), codec, {}))
    p = prepare(tmp_path, source="heart", codec=folder)
    latents, space = training_latents.encode_sequences(
        load(folder), p.codec_range, aid.prepare(p, progress=False), progress=False
    )
    z = latents.read("latent")
    assert z.shape == (3, FRAMES, 3, SIZE // 4, SIZE // 4) and data_sequences.image_name(latents) == "latent"
    assert np.allclose(z.mean((0, 1, 3, 4)), 0, atol=1e-4) and np.allclose(z.std((0, 1, 3, 4)), 1, atol=1e-3)
    images = torch.from_numpy(aid.prepare(p, progress=False).read("magnitude")[1])
    assert torch.allclose(torch.from_numpy(z[1]), space.encode(images), atol=1e-5)
    with pytest.raises(ValueError, match="codec_range; delete it"):
        training_latents.encode_sequences(load(folder), (0.0, 1.0), aid.prepare(p))

    t = aid_prior.TrainSequence(
        out=str(tmp_path / "prior"),
        data=str(latents.path),
        validation="none",
        window=3,
        mirror=False,
        phase_spacing_mm=None,
        sigma_data=1.0,
        steps=2,
        batch_size=2,
        warmup=0,
        model_channels=32,
        channel_mult=(1,),
        device="cpu",
        autocast=None,
    )
    result, config = aid_prior.train(t, progress=False)
    prior = save(result, t, config, [], unit="sequences")
    with pytest.raises(ValueError, match="holds latents.*mirror: false"):
        aid_prior.train(replace(t, mirror=True))
    s = sampling.SampleSequence(
        weights=str(prior),
        codec=folder,
        source="heart",
        subjects=2,
        draws=2,
        extra_frames=0,
        evaluations=2,
        device="cpu",
        autocast=None,
        modes=("warm",),
        contexts=("full",),
    )
    loaded, true = opened(s)
    assert loaded.space.describe() == space.describe()
    (warm,) = models_sequences.draw_all(loaded, true, s, progress=False)
    assert true.shape[-1] == SIZE and warm.x.shape == (2, t.window, 1, SIZE, SIZE) and warm.x.isfinite().all()


def test_sampling_from_a_prepared_file(files, tmp_path, tiny_run):
    p = prepare(tmp_path, source=str(files[0]), subjects=100, validation_share=0.0, test_share=0.67)
    prepared = aid.prepare(p, progress=False)
    s = sampling.SampleSequence(**dict(weights=tiny_run[0].weights, source=p.data, draws=2, device="cpu"))
    true = models_sequences.held_out(tiny_run[1], s.source, s.subjects, 3)
    assert true.shape[0] == len(prepared.rows("test")) and true.is_complex()
    assert torch.equal(true[0], torch.from_numpy(prepared.read("image", "test")[0]))


def test_errors_of_sampling_say_what_to_do(tmp_path, tiny_run):
    p, prior, *_ = tiny_run
    with pytest.raises(ValueError, match="holds a UNet"):
        models_sequences.SequencePrior.load("brain/t1w")
    aid.prepare(prepare(tmp_path), progress=False)
    with pytest.raises(ValueError, match="no test or validation"):
        models_sequences.held_out(prior, str(tmp_path / "data.h5"), 2, 3)
    with pytest.raises(ValueError, match="choose levels: karras"):
        sampling.SampleSequence(levels="schedule").noise_levels(prior.D)
    with pytest.raises(ValueError, match=r"1 held-out sequences.*need 2 \(draws\)"):
        models_sequences.draw_all(prior, torch.zeros(1, 9, 1, SIZE, SIZE), p)
    assert open_dataset(tmp_path / "data.h5").split["train"]
