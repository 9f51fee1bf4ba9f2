"""Autoencoders of latent diffusion, their published layouts, latent spaces, priors on them, losses."""

import math

import pytest
import torch

from companion.diffusion.latent import (
    LatentDenoiser,
    LatentSpace,
    check_terminal_signal,
    cine_space,
    fingerprint,
    statistics,
)
from companion.diffusion.losses import edm_loss
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.sampling import sample
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.models.latent import load_prior, save_prior
from companion.networks import VQVAE, AutoencoderKL, DiffusionUNet, VQModel, monai
from companion.networks.autoencoder import (
    SCALE_FACTOR,
    PatchDiscriminator,
    published,
    sd_vae,
    vq_cardiac_d4,
)
from companion.training.codec import (
    AdversarialCodec,
    adversarial_loss,
    codec_loss,
    perceptual_distance,
    reconstruction_error,
)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_kl(**options):
    torch.manual_seed(0)
    defaults = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2, norm_groups=4)
    return AutoencoderKL(**(defaults | options)).eval()


def small_vq(**options):
    torch.manual_seed(0)
    defaults = dict(channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, num_embeddings=16, norm_groups=4)
    return VQModel(**(defaults | options)).eval()


# --- the published layouts


def listed(multipliers, features, moments, latents, codes=None):
    """Names and shapes of the published layouts, written down from their description; 128 channels, RGB."""
    shapes = {}

    def conv(name, inputs, outputs, kernel=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    widths, top = [128 * m for m in multipliers], len(multipliers) - 1
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        norm(f"{side}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", widths[-1], widths[-1], 1)
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
    conv("encoder.conv_in", 3, 128)
    for i, width in enumerate(widths):
        for j in range(2):
            block(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else width, width)
        if i < top:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], features)
    conv("decoder.conv_in", features if codes else latents, widths[-1])
    for i, width in enumerate(widths):
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", widths[min(i + 1, top)] if j == 0 else width, width)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", 128)
    conv("decoder.conv_out", 128, 3)
    conv("quant_conv", features, moments, 1)
    conv("post_quant_conv", latents, features if codes else latents, 1)
    if codes:
        shapes["quantize.embedding.weight"] = (codes, latents)
    return shapes


@pytest.fixture(scope="module")
def layouts():
    with torch.device("meta"):
        return vq_cardiac_d4(), sd_vae()


def test_published_layouts_name_by_name(layouts):
    expected = listed((1, 2, 4), 3, 3, 3, codes=8192), listed((1, 2, 4, 4), 8, 8, 4)
    for codec, shapes in zip(layouts, expected, strict=True):
        assert {k: tuple(v.shape) for k, v in codec.state_dict().items()} == shapes
    # counted by another implementation of both
    assert [sum(p.numel() for p in codec.parameters()) for codec in layouts] == [55_322_782, 83_653_863]
    assert [codec.factor for codec in layouts] == [4, 8]


def test_blocks_are_counted_per_level_finest_first():
    codec = small_kl(num_res_blocks=(2, 1))
    assert [len(level.block) for level in codec.encoder.down] == [2, 1]
    assert [len(level.block) for level in codec.decoder.up] == [3, 2]  # one more each, as published
    assert codec(torch.zeros(1, codec.in_channels, 8, 8)).x_hat.shape == (1, codec.in_channels, 8, 8)
    assert [len(level.block) for level in small_kl(num_res_blocks=2).encoder.down] == [2, 2]
    with pytest.raises(ValueError, match="num_res_blocks has 3 entries for 2 levels"):
        small_kl(num_res_blocks=(1, 2, 1))


def test_the_size_of_the_published_file_fits(layouts):
    """vq_cardiac_d4.ckpt has 756,213,966 bytes: weights and two moments of Adam, and the loss networks."""
    autoencoder = sum(p.numel() for p in layouts[0].parameters())
    discriminator = 2_765_633 + 2 * 2 * (128 + 256 + 512) // 12  # of 64 channels; running means and variances
    vgg = 14_716_160
    size = 12 * (autoencoder + discriminator) + 4 * vgg
    assert 0 < 756_213_966 - size < 1e6  # names and bookkeeping of the pickle
    attention = 2 * (4 * (512**2 + 512) + 2 * 512)
    assert abs(size - 12 * attention - 756_213_966) > 20e6  # so its middle blocks have attention


def as_diffusers(tensors, levels, old=False):
    """The names of diffusers for the original ones, by replacing text."""
    swaps = [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")]
    swaps += [("norm_out", "conv_norm_out"), ("nin_shortcut", "conv_shortcut")]
    swaps.append(("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."))
    attention = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
    for ours, theirs in zip(("q", "k", "v", "proj_out"), attention, strict=True):
        swaps.append((f"mid.attn_1.{ours}.", f"mid_block.attentions.0.{theirs}."))
    for i in range(levels):
        there = levels - 1 - i
        swaps += [(f"down.{i}.block", f"down_blocks.{i}.resnets"), (f"up.{i}.block", f"up_blocks.{there}.resnets")]
        swaps.append((f"down.{i}.downsample.", f"down_blocks.{i}.downsamplers.0."))
        swaps.append((f"up.{i}.upsample.", f"up_blocks.{there}.upsamplers.0."))
    out = {}
    for name, x in tensors.items():
        matrix = "attn_1" in name and name.endswith("weight") and x.ndim == 4
        for a, b in swaps:
            name = name.replace(a, b)
        out[name] = x[:, :, 0, 0] if matrix else x
    return out


@pytest.mark.parametrize("make", [small_kl, small_vq])
@pytest.mark.parametrize("names", ["original", "first_stage", "checkpoint", "diffusers", "old diffusers"])
def test_published_names_load_strictly(make, names):
    codec, other = make(), make()
    tensors = codec.state_dict()
    for p in other.parameters():
        p.data.zero_()
    given = {
        "original": tensors,
        "first_stage": {f"first_stage_model.{k}": v for k, v in tensors.items()} | {"model.x": torch.ones(1)},
        "checkpoint": {"state_dict": tensors | {"loss.lin0.weight": torch.ones(1), "model_ema.decay": torch.ones(1)}},
        "diffusers": as_diffusers(tensors, len(codec.encoder.down)),
        "old diffusers": as_diffusers(tensors, len(codec.encoder.down), old=True),
    }[names]
    other.load_state_dict(published(given))
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), other.parameters(), strict=True))


def test_monai_names_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"encoder.blocks.99.* belongs to no layer"):
        monai.translate(small_kl(double_z=False), {"encoder.blocks.99.conv.weight": torch.zeros(1)})


# --- numerics


@pytest.mark.parametrize("make", [small_kl, small_vq])
@pytest.mark.parametrize("dims, size", [(2, (8, 12)), (3, (4, 8, 4))])
def test_every_size_divisible_by_the_factor(make, dims, size):
    codec = make(dims=dims, attention=(False,) * (1 if make is small_kl else 2) + (True,))
    x = draws(2, 3, *size)
    z = codec.encode(x)
    assert z.shape == (2, codec.latent_channels, *(n // codec.factor for n in size))
    assert codec.decode(z).shape == x.shape
    one_by_one = torch.cat([codec.decode(z[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(codec.decode(z), one_by_one, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="not a multiple of the autoencoder's factor"):
        codec.encode(x[..., :-1])


def test_kl_is_that_of_the_gaussians_and_noise_is_drawn_around_the_mean():
    codec, x = small_kl(), draws(2, 3, 8, 8)
    mean, std = codec.posterior(x)
    assert torch.equal(mean, codec.encode(x))
    out = codec(x, torch.Generator().manual_seed(3))
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0))
    torch.testing.assert_close(out.regulariser, kl.flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    noise = torch.empty_like(mean).normal_(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out.x_hat, codec.decode(mean + std * noise))


def test_tiles_are_close_to_the_whole_and_without_seams():
    """Norms and attention see a tile only: an approximation, but the tiles must agree where they meet."""
    codec = small_kl(middle=False)
    z = draws(1, 2, 24, 24)
    whole, tiles = codec.decode(z), codec.decode(z, tile=12, overlap=6)
    assert (tiles - whole).norm() < 0.1 * whole.norm()
    jump = (tiles - whole).diff(dim=-1).abs().amax((0, 1, 2))
    assert jump[23] < 2 * jump.median()  # between the two columns where the tiles meet
    torch.testing.assert_close(codec.decode(z, tile=24), whole)


@pytest.mark.parametrize("use", [small_kl, small_vq])
def test_checkpointing_changes_no_gradient(use):
    grads = []
    for use_checkpoint in (False, True):
        codec = use(use_checkpoint=use_checkpoint).train()
        codec_loss(codec, draws(1, 3, 8, 8), torch.Generator().manual_seed(0)).sum().backward()
        grads.append([p.grad for p in codec.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- latent spaces


def test_normalised_latents_have_mean_zero_and_std_one():
    codec, images = small_kl(), 3 * draws(12, 3, 8, 8) + 1
    space = LatentSpace.fit(codec, images.split(5), intensity=(-1, 1))
    z = space.encode(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=1e-4, atol=1e-4)
    raw = codec.encode(2 * images - 1)
    torch.testing.assert_close(space.decode(z), (codec.decode(raw) + 1) / 2, rtol=1e-3, atol=1e-3)


def test_statistics_do_not_depend_on_the_batches():
    z = 5 + draws(9, 2, 4, 4) * torch.tensor([1.0, 3.0])[:, None, None]
    mean, std = statistics(z.split(2))
    torch.testing.assert_close(mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(std, z.movedim(1, 0).flatten(1).std(1))
    with pytest.raises(ValueError, match="no latents"):
        statistics([])
    with pytest.raises(ValueError, match="NaN"):
        statistics([z, z * torch.nan])
    with pytest.raises(ValueError, match=r"channels \[1\] never change"):
        statistics([z * torch.tensor([1.0, 0.0])[:, None, None]])


def test_cine_latents_are_scaled_codes_of_grey_frames():
    """AID, latent mode: x -> 2x - 1, three equal channels, code * 0.18215; back without quantisation."""
    codec = small_vq()
    space, x = cine_space(codec), torch.rand(2, 5, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    z = space.encode(x)
    assert z.shape == (2, 5, 3, 2, 3)
    rgb = (2 * x - 1).expand(2, 5, 3, 8, 12).flatten(0, 1)
    q = codec.quantize(codec.encode(rgb)).z_q
    torch.testing.assert_close(z.flatten(0, 1), q * SCALE_FACTOR)
    z = z + 0.01  # no longer codes
    torch.testing.assert_close(space.decode(z).flatten(0, 1), (codec.decode(z.flatten(0, 1) / SCALE_FACTOR) + 1) / 2)
    assert cine_space(small_kl(latent_channels=4)).latents == "sample"


def test_sampled_latents_scatter_around_the_mean():
    codec, x = small_kl(), draws(1, 3, 8, 8).repeat(400, 1, 1, 1)
    mean, std = codec.posterior(x[:1])
    z = LatentSpace(codec, latents="sample").encode(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.std(0), std[0], rtol=0.2, atol=0)
    assert ((z.mean(0) - mean[0]).abs() < 5 * std[0] / 20).all()


def test_latent_spaces_refuse_what_is_not_theirs():
    codec = small_kl()
    space = LatentSpace(codec, 0.5, 2.0)
    description = space.describe()
    space.check(description)
    LatentSpace.described(codec, description)
    with pytest.raises(ValueError, match="mean.*make them again"):
        LatentSpace(codec, 0.0, 2.0).check(description)
    other = small_kl()
    other.quant_conv.bias.data += 1e-3
    assert fingerprint(other) != fingerprint(codec) == fingerprint(small_kl())
    with pytest.raises(ValueError, match="another autoencoder"):
        LatentSpace.described(other, description)
    with pytest.raises(ValueError, match="give the autoencoder that the latents were made with"):
        LatentSpace.described(small_kl(latent_channels=3), description)
    with pytest.raises(ValueError, match="lacks codec"):
        LatentSpace.described(codec, {k: v for k, v in description.items() if k != "codec"})
    with pytest.raises(ValueError, match="made by another one"):
        space.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="offers continuous, sample"):
        LatentSpace(codec, latents="quantised")
    with pytest.raises(ValueError, match="above 0"):
        LatentSpace(codec, 0.0, 0.0)


def test_encoding_never_trains_the_codebook():
    codec = VQVAE(dims=2, channels=(4,), num_res_layers=0, num_embeddings=4, embedding_dim=2, restart=5.0).train()
    prior = LatentDenoiser(None, LatentSpace(codec, latents="quantised")).train()
    before = fingerprint(codec)
    prior.space.encode(draws(2, 1, 8, 8))
    assert fingerprint(codec) == before and not codec.training


def test_decoding_has_a_gradient_on_request_only():
    space = LatentSpace(small_kl())
    z = draws(1, 2, 4, 4)
    assert not space.decode(z).requires_grad
    (grad,) = torch.autograd.grad(space.decode(z.requires_grad_()).sum(), z)
    assert grad.abs().max() > 0


# --- priors


def test_priors_travel_with_their_latents(tmp_path):
    options = dict(dims=3, channels=(2, 2), num_res_layers=1, num_embeddings=8, embedding_dim=3)
    data = {"source": "noise", "scale": "none"}
    torch.manual_seed(0)
    codec = VQVAE(**options).eval()
    save_checkpoint(tmp_path / "codec", codec, {"network": {"name": "VQVAE", **options}, "data": data}, {})
    space = LatentSpace.fit(codec, [draws(3, 1, 8, 8, 8)])
    network = dict(name="DiffusionUNet", in_channels=3, out_channels=3, channels=(8, 8), attention=(False, True))
    config = {
        "network": network | dict(num_head_channels=4, norm_groups=4),
        "denoiser": {"name": "EDMDenoiser", "sigma_data": 1.0},
        "data": data,
    }
    prior = LatentDenoiser(build(config), space)
    assert edm_loss(prior.D, space.encode(draws(2, 1, 8, 8, 8)), torch.Generator().manual_seed(0)).shape == (2,)
    save_prior(tmp_path / "prior", prior, config, {})

    loaded = load_prior(tmp_path / "prior", load(tmp_path / "codec"))
    assert loaded.space.describe() == space.describe()
    z = sample(loaded, karras(3), shape=(3, 2, 2, 2), seeds="0-1").x
    expected = sample(prior.eval(), karras(3), shape=(3, 2, 2, 2), seeds="0-1").x
    torch.testing.assert_close(z, expected)
    assert loaded.space.decode(z).shape == (2, 1, 8, 8, 8)
    assert not hasattr(loaded, "moments")
    with pytest.raises(ValueError, match="another autoencoder"):
        load_prior(tmp_path / "prior", VQVAE(**options))
    with pytest.raises(ValueError, match="no prior on latents"):
        load_prior(tmp_path / "codec", codec)
    with pytest.raises(ValueError, match="made by another one"):
        loaded(torch.zeros(1, 4, 2, 2, 2), torch.ones(1))


@pytest.mark.parametrize("steps, share", [(1000, 0.006), (500, 0.08), (300, 0.22), (200, 0.36)])
def test_terminal_signal_of_the_published_schedules(steps, share):
    schedule = DiscreteSchedule.linear(steps)
    if share < 0.05:
        assert check_terminal_signal(schedule) == pytest.approx(share, abs=0.006)
    else:
        with pytest.raises(ValueError, match=r"% of the signal is left .*lengthen the schedule"):
            check_terminal_signal(schedule)
        assert check_terminal_signal(schedule, limit=1) == pytest.approx(share, abs=0.006)
    assert check_terminal_signal(80.0, data_std=0.5) == pytest.approx(0.00625, rel=1e-3)


def test_the_diffusion_unet_in_3d():
    torch.manual_seed(0)
    options = dict(channels=(8, 12), norm_groups=4, attention=(False, True), num_head_channels=4, num_classes=3)
    net = DiffusionUNet(3, 2, **options)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, cond, t, y = draws(2, 2, 4, 6, 4), draws(1, 1, 4, 6, 4, seed=1), torch.rand(2), torch.tensor([0, 2])
    out = net(x, t, cond, y)
    assert out.shape == (2, 2, 4, 6, 4)
    saving = DiffusionUNet(3, 2, **options, use_checkpoint=True)
    saving.load_state_dict(net.state_dict())
    for network in (net, saving):
        network(x, t, cond, y).square().sum().backward()
    for p, q in zip(net.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(ValueError, match="attention has 3 entries for 2 levels"):
        DiffusionUNet(3, 2, channels=(8, 8), norm_groups=4)
    with pytest.raises(ValueError, match="multiple of 32"):
        DiffusionUNet(3, 2, channels=(8, 8), attention=(False, False))


# --- losses


def test_the_weighted_error_keeps_its_units():
    x = torch.zeros(2, 1, 4, 4)
    x[..., :2] = 1.0
    x_hat = x + torch.tensor([0.3, 0.2]).repeat_interleave(2)  # error 0.3 in the foreground, 0.2 outside
    assert reconstruction_error(x_hat, x).tolist() == pytest.approx([0.25] * 2)
    assert reconstruction_error(x_hat, x, background=0.5).tolist() == pytest.approx([(0.3 + 0.1) / 1.5] * 2)
    assert reconstruction_error(x_hat, x, "l2", background=0.0).tolist() == pytest.approx([0.09] * 2)
    everywhere = reconstruction_error(x_hat, x, mask=torch.ones(2, 1, 4, 4), background=0.5)
    assert everywhere.tolist() == pytest.approx([0.25] * 2)
    with pytest.raises(ValueError, match="mask of an image is empty"):
        reconstruction_error(x_hat, x, mask=torch.zeros(2, 1, 4, 4), background=0.5)
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        reconstruction_error(x_hat, x, "l3")


@pytest.mark.parametrize("dims", [2, 3])
def test_the_perceptual_distance_sees_features_not_brightness(dims):
    generator = torch.Generator().manual_seed(0)
    kernel = draws(4, 1, 3, 3)
    kernel = kernel - kernel.mean((2, 3), keepdim=True)

    def features(x):
        return [torch.nn.functional.conv2d(x, kernel)]

    a, b = draws(2, 1, *[10] * dims), draws(2, 1, *[10] * dims, seed=1)
    assert perceptual_distance(features, a, 2 * a + 3, generator, 0.5).max() < 1e-6
    assert perceptual_distance(features, a, b, generator, 0.5).min() > 0.5
    assert codec_loss(small_kl(dims=dims, in_channels=1, out_channels=1), a, features=features).shape == (2,)


def test_autoencoder_and_discriminator_do_not_train_each_other():
    """With the adversarial weight 0 the autoencoder has the gradient of codec_loss, and D only that of judging."""
    codec = small_kl(dims=3, in_channels=1, out_channels=1, middle=False).train()
    pair = AdversarialCodec(codec, PatchDiscriminator(3, channels=4, levels=1))
    x = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradients(loss):
        pair.zero_grad()
        loss(torch.Generator().manual_seed(1)).sum().backward()
        parts = pair.codec, pair.discriminator
        return [[0 if p.grad is None else p.grad.clone() for p in part.parameters()] for part in parts]

    plain, _ = gradients(lambda g: codec_loss(codec, x, g, kind="l2"))
    silent, judge = gradients(lambda g: adversarial_loss(pair, x, g, weight=0.0, kind="l2"))
    loud, same_judge = gradients(lambda g: adversarial_loss(pair, x, g, weight=1.0, kind="l2"))
    for a, b in zip(plain, silent, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(judge, same_judge, strict=True):
        torch.testing.assert_close(a, b)
    assert max((a - b).abs().max() for a, b in zip(loud, silent, strict=True)) > 1e-4
    with pytest.raises(TypeError, match="does not know kinds"):
        adversarial_loss(pair, x, kinds="l2")


def test_the_discriminator_learns_to_judge():
    torch.manual_seed(0)
    judge = PatchDiscriminator(2, 1, channels=4, levels=2)
    optimiser = torch.optim.Adam(judge.parameters(), 1e-2)
    real, fake = draws(8, 1, 24, 24), draws(8, 1, 24, 24, seed=1).cumsum(-1) / math.sqrt(12)
    for _ in range(30):
        loss = ((judge(real) - 1) ** 2).mean() + (judge(fake) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert judge(real).shape == (8, 1, 4, 4)
    assert judge(real).mean() > 0.7 > 0.3 > judge(fake).mean()
