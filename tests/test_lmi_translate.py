"""Translations: conditions follow the noisy image at every step, seeds decide, volumes keep their place in space."""

import nibabel
import numpy as np
import pytest
import torch

from companion.data import anatomy, contrast_people, shading
from companion.data.contrasts import cohort_slices
from companion.data.nifti import load_nifti, save_nifti
from companion.diffusion import local_information as lmi
from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.denoisers import DiscreteDenoiser, EDMDenoiser
from companion.diffusion.local_information import Conditioning, conditions
from companion.evaluation import translation
from companion.networks.unet import UNet
from companion.papers.lmi import people as lmi_people
from companion.papers.lmi.people import Translate
from companion.randomness import randn
from companion.reconstruction import translated_people
from companion.reconstruction import translation as reconstruction_translation
from companion.reconstruction.translation import ABLATION, Setting, Translator, translate
from companion.reconstruction.volume_translation import noise_along, translate_file


def network(inputs: int, outputs: int = 1, seed: int = 0) -> UNet:
    """A tiny network whose last layer is not zero, so that it depends on all its inputs."""
    torch.manual_seed(seed)
    net = UNet(inputs, 32, outputs, num_res_blocks=1, channel_mult=(1, 1), use_scale_shift_norm=True).eval()
    torch.nn.init.normal_(net.out[-1].weight, std=0.02)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def prior() -> Translator:
    conditioning = Conditioning(patches=(3,))
    return Translator(EDMDenoiser(network(1 + conditioning.channels)), conditioning, "T2w", 13.0, size=(16, 16))


@pytest.fixture(scope="module")
def people() -> dict:
    return cohort_slices("test", 2, 2, ("T1w", "T2w"), 16)


def test_denoiser_sees_the_conditions_of_the_step_it_is_in(prior, people, monkeypatch):
    source, seen = people["T1w"].flatten(0, 1), []

    def watched(x, sigma, side, *args):
        seen.append((x.clone(), sigma.clone(), side))
        return conditions(x, sigma, side, *args)

    monkeypatch.setattr(lmi, "conditions", watched)
    setting = Setting(evaluations=3, draws=2)
    found = translate(prior, source, setting)
    assert found.draws.shape == (2, 4, 1, 16, 16) and torch.equal(found.x, found.draws.mean(0))
    assert found.bill.denoiser_calls == 3 and len(seen) == 6
    assert [s.unique().item() for _, s, _ in seen[:3]] == pytest.approx(setting.levels()[:-1].tolist(), rel=1e-6)
    assert all(side is seen[0][2] for *_, side in seen), "the source side is prepared once"
    x, sigma, _ = seen[1]
    expected = prior.D(x, sigma, conditions(x, sigma, source, prior.conditioning))
    informed = lmi.Informed(prior.D, source, prior.conditioning)
    assert torch.allclose(informed(x, sigma), expected)


def test_draws_belong_to_seeds_not_to_batches(prior, people):
    source, setting = people["T1w"].flatten(0, 1), Setting(evaluations=2, draws=2)
    whole = translate(prior, source, setting, seed=5)
    parts = translate(prior, source, setting, seed=5, batch_size=3)
    assert torch.allclose(whole.draws, parts.draws, atol=1e-5)
    again = translate(prior, source[1:2], setting, seed=5 + 1 * 2)
    assert torch.allclose(again.draws[:, 0], whole.draws[:, 1], atol=1e-5)
    assert not torch.allclose(whole.draws[0], whole.draws[1])


def test_every_second_draw_may_be_mirrored(prior, people):
    source = people["T1w"].flatten(0, 1)
    plain = translate(prior, source, Setting(evaluations=2, draws=2), seed=4)
    both = translate(prior, source, Setting(evaluations=2, draws=2, mirrored=True), seed=4)
    seeds = [torch.Generator().manual_seed(4 + 2 * i) for i in range(len(source))]
    noise = -randn((1, 16, 16), torch.float32, seeds).flip(-1)  # the opposite, as a mirror shows it
    flipped = translate(prior, source.flip(-1), Setting(evaluations=2, draws=1), noise=noise[None])
    assert torch.equal(both.draws[0], plain.draws[0])
    assert torch.allclose(both.draws[1], flipped.draws[0].flip(-1), atol=1e-6)


def test_a_draw_is_given_the_shading_of_its_source(people):
    source, truth = (cohort_slices("test", 2, 2, (c,), 48)[c].flatten(0, 1) for c in ("T1w", "PDw"))
    tilt = torch.tensor([[0.2, -0.1], [-0.15, 0.0], [0.0, 0.25], [0.1, 0.1]])
    field = torch.einsum("nc,cyx->nyx", tilt, shading.positions(source))[:, None].exp()
    plain, shaded = (shading.shaded_like(s, truth) for s in (source, source * field))
    tissue = (source > shading.FAINT) & (truth > shading.FAINT)
    change = torch.where(tissue, (shaded / plain).log(), 0)
    wanted = torch.where(tissue, field.log(), 0)
    wanted = torch.where(tissue, wanted - wanted.sum((2, 3), True) / tissue.sum((2, 3), True), 0)
    assert (change - wanted).square().mean().sqrt() < 0.35 * wanted.square().mean().sqrt()
    again = torch.where(tissue, (shading.shaded_like(source * field, shaded) / shaded).log(), 0)
    assert again.square().mean().sqrt() < 0.35 * change.square().mean().sqrt(), "done once, little is left"
    assert torch.allclose(shading.shaded_like(source, 3 * truth), 3 * plain, rtol=1e-2), "whatever the gain"
    colours = shading.shaded_like(source, truth.expand(-1, 3, -1, -1))
    assert torch.allclose(colours[:, 1:2], plain, rtol=1e-4)
    empty = torch.zeros_like(source)
    assert torch.equal(shading.shaded_like(source, empty), empty)
    assert torch.equal(shading.shaded_like(empty, truth), truth)


def test_the_shading_is_a_part_of_the_setting(prior, people):
    source = people["T1w"].flatten(0, 1)
    plain, shaded = (translate(prior, source, Setting(evaluations=2, draws=1, shading=s)).x for s in (False, True))
    assert torch.allclose(shaded, shading.shaded_like(source, plain))


def test_estimates_may_be_cut_to_the_range_of_images(prior, people):
    source = people["T1w"].flatten(0, 1)
    x, sigma = source + 3 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0])
    free, cut = (
        reconstruction_translation.informed(prior, source, Setting(cut=c))(x, sigma.expand(len(x)))
        for c in (False, True)
    )
    assert (free < 0).any() and torch.equal(cut, free.clamp(0, 1))
    assert {"published chain, cut", "recommended"} <= set(Translate(published=3, cut=True).settings())


def test_guidance_goes_further_away_from_the_untold(prior, people):
    source = people["T1w"].flatten(0, 1)[:1]
    x, sigma = source + 0.3, torch.tensor([0.5])
    told, untold, guided = (
        reconstruction_translation.informed(prior, source, s)(x, sigma)
        for s in (Setting(), Setting(()), Setting(guidance=3.0))
    )
    assert torch.allclose(guided - untold, 3 * (told - untold), atol=1e-5)
    assert translate(prior, source, Setting(evaluations=2, draws=1, guidance=2.0)).bill.denoiser_calls == 4


def test_told_nothing_the_source_does_not_matter(prior, people):
    a, b = people["T1w"].flatten(0, 1), people["T2w"].flatten(0, 1)
    nothing, cross = Setting((), evaluations=2, draws=1), Setting(("cross",), evaluations=2, draws=1)
    assert torch.equal(translate(prior, a, nothing).x, translate(prior, b, nothing).x)
    assert not torch.allclose(translate(prior, a, cross).x, translate(prior, b, cross).x)


def test_sdedit_begins_with_the_noised_source(prior, people):
    source = people["T1w"].flatten(0, 1)
    faint = translate(prior, source, Setting((), start=0.02, begin="source", evaluations=2, draws=1))
    assert (faint.x - source).abs().max() < 0.2
    assert Setting(start=0.5).levels()[0] == pytest.approx(0.5)
    noise = translate(prior, source, Setting((), start=0.02, evaluations=2, draws=1))
    assert (noise.x - source).abs().mean() > (faint.x - source).abs().mean()


def test_published_chain_is_the_ancestral_one_with_noise_at_the_end(people):
    """Against the discrete process, written out, of a network trained on noise and the published maps."""
    conditioning = Conditioning.published()
    D = DiscreteDenoiser(network(3), reconstruction_translation.PUBLISHED)
    prior = Translator(D, conditioning, "T2w")
    source, steps = people["T1w"].flatten(0, 1)[1:2], 6
    setting = Setting(
        solver="published",
        evaluations=1000,
        start=float(reconstruction_translation.PUBLISHED.sigmas[steps - 1]),
        draws=1,
    )
    ours = translate(prior, source, setting, seed=3).x
    process = DiscreteProcess(reconstruction_translation.PUBLISHED, variance="fixed_large")
    generator = [torch.Generator().manual_seed(3)]
    x = randn((1, 16, 16), torch.float32, generator)
    for i in range(steps - 1, -1, -1):
        t = torch.tensor([i])
        cond = torch.cat([conditioning.comparisons[0](source, x), conditioning.comparisons[0](source, source)], 1)
        step = process.p_mean_variance(D.network(x, t, cond), x, t)
        x = step.mean + (step.log_variance / 2).exp() * randn((1, 16, 16), torch.float32, generator)
    assert torch.allclose(ours, x, atol=2e-4)
    assert Setting(solver="published", evaluations=1000).levels().shape == (1001,)
    assert Setting(solver="published", evaluations=50).levels().shape == (51,)


def test_attraction_raises_the_information(prior, people):
    source = people["T1w"].flatten(0, 1)
    side = lmi.prepare_source(source, prior.conditioning)
    x, sigma = people["T2w"].flatten(0, 1) + 0.1, torch.full((4,), 0.3)

    def blank(x, sigma, cond=None):
        return people["T2w"].flatten(0, 1).roll(1, -1)

    plain, moved = blank(x, sigma), reconstruction_translation.Attracted(blank, side, 0.02)(x, sigma)
    assert side.cross(moved).sum() > side.cross(plain).sum()
    assert translate(prior, source, Setting(evaluations=2, draws=1, attraction=0.1)).x.isfinite().all()


def test_colours(people):
    conditioning = Conditioning(patches=(3,))
    prior = Translator(EDMDenoiser(network(3 + conditioning.channels, 3)), conditioning, "stain", channels=3)
    rgb = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert translate(prior, rgb, Setting(evaluations=2, draws=1)).x.shape == (2, 3, 16, 16)
    grey = people["T1w"].flatten(0, 1)
    assert translate(prior, grey, Setting((), "ddim", 2, 0.5, "source", 1)).x.shape == (4, 3, 16, 16)


def test_odd_sizes(prior):
    x = torch.rand(1, 1, 17, 21, generator=torch.Generator().manual_seed(0))
    assert translate(prior, x, Setting(evaluations=2, draws=1)).x.shape == x.shape


@pytest.mark.parametrize(
    "x, error, match",
    [
        (torch.full((1, 1, 16, 16), 0.3), ValueError, "constant"),
        (torch.rand(1, 2, 16, 16), ValueError, "RGB"),
        (torch.rand(1, 16, 16), ValueError, "expected grey or RGB"),
        (300 * torch.rand(1, 1, 16, 16), ValueError, "expected 0 to 1"),
        (torch.rand(1, 1, 16, 16) / 0, ValueError, "NaN or infinity"),
        (torch.ones(1, 1, 16, 16, dtype=torch.int64), TypeError, "floating-point"),
    ],
)
def test_sources_that_cannot_be_translated(prior, x, error, match):
    with pytest.raises(error, match=match):
        translate(prior, x, Setting(evaluations=1, draws=1))


def test_settings_that_make_no_sense():
    for options, match in (
        ({"begin": "middle"}, "noise or source"),
        ({"draws": 0}, "1 or more"),
        ({"start": -1.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            Setting(**options)
    with pytest.raises(ValueError, match="no map tissue"):
        conditions(torch.zeros(1, 1, 16, 16), 1.0, torch.rand(1, 1, 16, 16), Conditioning(), keep=("tissue",))


def oblique(shape=(13, 31, 27), voxel=(6.1, 5.3, 7.2)):
    """A head (z, y, x) of odd size lying askew in its scanner, and the affine that says so."""
    cosines = [np.linalg.qr(np.eye(3) + np.array([[0, 0.3, -0.2], [-0.3, 0, 0.1], [0.2, -0.1, 0]]))[0]]
    matrix = np.eye(4)
    matrix[:3, :3] = cosines[0] @ np.diag(voxel)
    matrix[:3, 3] = -matrix[:3, :3] @ (np.array(shape[::-1]) - 1) / 2
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    head = (x**2 + y**2 + z**2 < 0.7) * (1000 + 300 * np.sin(4 * x) * np.cos(5 * y))
    return head.astype(np.float32), matrix


def test_rows_have_names_of_their_own():
    assert len(Translate(sdedit=(0.25, 0.5), published=10, rows=tuple(ABLATION)).settings()) == 3 + len(ABLATION)
    with pytest.raises(ValueError, match="both called SDEdit from sigma = 0.25,"):
        Translate(sdedit=(0.25, 0.25 + 1e-9)).settings()


def test_embedded_is_a_name_here_too():
    assert lmi_people.named("embedded", "PDw") == "lmi/pdw"
    virtual, own = lmi_people.Translate(), lmi_people.Translate(people="data/mine.h5")
    targets = ("T1w", "T2w", "PDw")
    assert [virtual.translator(t) for t in targets] == ["lmi/t1w", "lmi/t2w", "lmi/pdw"]
    assert [own.translator(t) for t in targets] == ["lmi/patients/t1w", "lmi/patients/t2w", "lmi/pdw"]
    assert own.translator("FLAIR") == "lmi/patients/flair"
    assert lmi_people.Translate(volume="scan.nii.gz").translator("T1w") == "lmi/patients/t1w"
    assert lmi_people.Translate(weights="mine/{target}").translator("T2w") == "mine/t2w"
    assert lmi_people.named("embedded", "PDw", lmi_people.SEGMENTERS) == "segmenter/pdw"
    assert Translator.load("embedded").contrast == "T2w"


def test_volumes_keep_shape_and_affine(prior, tmp_path):
    head, affine = oblique()
    source, out = tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"
    save_nifti(source, head, affine=affine)
    own = {"grid": "own", "pixel_mm": 10.0}
    assert translate_file(source, out, prior, Setting(evaluations=2, draws=1), **own) == out
    made = load_nifti(out)
    assert made.array.shape == head.shape and np.allclose(made.affine, affine, atol=1e-4)
    assert nibabel.aff2axcodes(made.affine) == nibabel.aff2axcodes(affine)
    assert np.isfinite(made.array).all() and made.array.max() > 0
    assert not made.array[0].any() or not made.array[-1].any(), "empty slices stay empty"
    assert b"NOT FOR DIAGNOSIS" in bytes(nibabel.load(out).header["descrip"].tobytes())
    marked = load_nifti(tmp_path / "t2_unsupported.nii.gz")
    assert marked.array.shape == head.shape and np.allclose(marked.affine, affine, atol=1e-4)
    assert 0 <= marked.array.min() and marked.array.max() <= 1
    save_nifti(source, np.zeros((4, 9, 9), np.float32), affine=affine)
    with pytest.raises(ValueError, match="constant"):
        translate_file(source, out, prior)
    with pytest.raises(FileNotFoundError):
        translate_file(tmp_path / "absent.nii", out, prior)


def test_neighbouring_slices_share_their_noise():
    noise = noise_along((2, 40, 1, 24, 24), 3.0, seed=5)
    assert noise.shape == (2, 40, 1, 24, 24) and noise.std().item() == pytest.approx(1, abs=0.03)
    for apart in (1, 3, 8):
        product = (noise[:, apart:] * noise[:, :-apart]).mean().item()
        assert product == pytest.approx(np.exp(-(apart**2) / 36), abs=0.04)
    assert abs((noise[0] * noise[1]).mean().item()) < 0.03
    again = noise_along((2, 40, 1, 24, 24), 3.0, seed=5)
    assert torch.equal(again, noise) and not torch.equal(noise_along((2, 40, 1, 24, 24), 3.0, 6), noise)


def test_histogram_matching_is_right_where_contrast_is_monotone():
    g = torch.Generator().manual_seed(0)
    source = torch.rand(1, 2, 1, 16, 16, generator=g)
    inside = torch.ones_like(source, dtype=torch.bool)
    truth = source**2
    assert (translation.matched(source, inside, truth[inside]) - truth).abs().max() < 0.1
    inverted = 1 - source
    assert (translation.matched(source, inside, inverted[inside]) - inverted).abs().mean() > 0.3


def test_scores_of_the_truth_and_of_another(people):
    truth, labels = people["T2w"], people["labels"]
    inside = labels > 0
    best = translation.score(truth + 1e-6, truth, inside)
    other = translation.score(people["T1w"], truth, inside)
    assert (best["PSNR"] > 100).all() and (best["SSIM"] > 0.999).all() and (best["MAE"] < 1e-5).all()
    assert (other["PSNR"] < 25).all() and set(best) == {"PSNR", "SSIM", "MS-SSIM", "MAE", "NMI"}
    shifted = truth + 0.1
    assert translation.score(shifted, truth, inside)["PSNR"] == pytest.approx([20, 20], abs=1e-3)


def test_a_study_has_every_row_for_every_subject(prior, people):
    p = Translate(
        targets=("T2w",),
        sources=("T1w",),
        image_size=16,
        subjects=2,
        slices=2,
        evaluations=2,
        draws=2,
        sdedit=(0.5,),
        rows=("unconditional", "oracle: LMI of the truth", "recommended"),
        segmenters=None,
    )
    held_out = contrast_people.People.of(
        p.people, p.split, p.subjects, p.slices, (*p.sources, *p.targets), p.image_size
    )
    found = translated_people.translate_people(prior, None, held_out, "T1w", p.settings(), p.seed)
    methods = {r["method"] for r in found.rows}
    assert methods == {
        "constant grey",
        "no translation",
        "histogram matching",
        "SDEdit from sigma = 0.5",
        "unconditional",
        "recommended",
        "oracle: LMI of the truth",
        "true target",
    }
    assert len(found.rows) == 2 * len(methods)
    table = translation.summary(found.rows)
    assert table[-1]["method"] == "true target" and table[-1]["PSNR"] == ""
    assert table[-1]["SSIM"][0] == pytest.approx(1)
    (gain,) = translation.verdict(found.rows)
    psnr = {m: [r["PSNR"] for r in found.rows if r["method"] == m] for m in methods}
    assert gain["direction"] == "T1w to T2w" and "PSNR over best SDEdit" in gain
    assert gain["PSNR over none"][0] == pytest.approx(np.mean(psnr["recommended"]) - np.mean(psnr["no translation"]))
    drawn = next(r for r in found.rows if r["method"] == "recommended")
    assert drawn["PSNR, one draw"] < drawn["PSNR"] and drawn["PSNR, spread"] > 0
    assert anatomy.LABELS["white"] == held_out.labels.max()
