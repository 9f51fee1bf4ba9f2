"""Vector quantisation: codes, codebooks, the two layouts, tiles."""

import pytest
import torch
import torch.nn.functional as F

from companion.networks import VQVAE, PlainVQVAE
from companion.networks.codec import tiled
from companion.networks.vqvae import EMAQuantizer, Quantizer, perplexity


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**options):
    torch.manual_seed(0)
    defaults = dict(dims=2, channels=(4, 6), num_res_layers=1, num_embeddings=12, embedding_dim=3)
    return VQVAE(**(defaults | options))


def clusters(n=256, seed=0):
    """Latents (n, 2, 1, 1) around four corners, and the corners (4, 2)."""
    corners = torch.tensor([[5.0, 5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, -5.0]])
    return (corners.repeat(n // 4, 1) + 0.1 * draws(n, 2, seed=seed))[:, :, None, None], corners


# --- codes


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_codes_are_the_nearest(dims):
    q = Quantizer(9, 4).eval()
    q.embedding.weight.data = draws(9, 4)
    z = draws(2, 4, *[5] * dims, seed=1)
    out = q(z)
    distance = (z[:, None] - q.embedding.weight.reshape(1, 9, 4, *[1] * dims)).square().sum(2)
    assert torch.equal(out.indices, distance.argmin(1))
    torch.testing.assert_close(out.z_q, q.lookup(out.indices))
    least = distance.amin(1).flatten(1).mean(1) / 4  # mean over channels too
    torch.testing.assert_close(out.loss, 1.25 * least)


def test_gradients_pass_straight_through_and_pull_both_ways():
    q = Quantizer(3, 2, commitment=0.25)
    q.embedding.weight.data = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    z = torch.tensor([[1.0, 0.5]]).requires_grad_()
    out = q(z)
    weight = torch.tensor([[3.0, -2.0]])
    (grad,) = torch.autograd.grad((weight * out.z_q).sum(), z)
    assert torch.equal(grad, weight)
    to_z, to_codes = torch.autograd.grad(q(z).loss.sum(), [z, q.embedding.weight])
    torch.testing.assert_close(to_z, 0.25 * z.detach())  # 2/2 channels (z - q), and q = 0
    torch.testing.assert_close(to_codes, torch.cat([-z.detach(), torch.zeros(2, 2)]))


def test_perplexity_counts_codes_in_use():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 0.0])).item() == pytest.approx(3)
    assert perplexity(torch.tensor([0.0, 8.0])).item() == pytest.approx(1)


def test_many_vectors_are_compared_in_pieces(monkeypatch):
    q = Quantizer(2**12, 2).eval()
    flat = draws(5000, 2)  # more than 2^24 distances
    torch.testing.assert_close(q.nearest(flat), torch.cat([q.nearest(part) for part in flat.split(7)]))


# --- codebooks that learn


def test_ema_codes_become_the_means_of_their_latents():
    z, corners = clusters()
    q = EMAQuantizer(4, 2, decay=0.5)
    q.embedding.weight.data = corners * 0.3
    q.ema_w.copy_(q.embedding.weight)
    for _ in range(40):
        q(z)
    means = z.reshape(-1, 4, 2).mean(0)
    torch.testing.assert_close(q.embedding.weight.data, means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.ema_cluster_size, torch.full((4,), 64.0), rtol=1e-4, atol=1e-3)
    assert not q.embedding.weight.requires_grad


def test_evaluation_changes_no_codebook():
    for q in (EMAQuantizer(4, 2, restart=1.0), Quantizer(4, 2, restart=1.0)):
        before = {k: v.clone() for k, v in q.eval().state_dict().items()}
        q(clusters()[0])
        assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


@pytest.mark.parametrize("kind", [EMAQuantizer, Quantizer])
def test_dead_codes_are_revived(kind):
    """All codes start far away on one side, so that a few of them serve everything, the others nothing."""
    z, corners = clusters()

    def trained(restart):
        torch.manual_seed(0)
        q = kind(16, 2, restart=restart, decay=0.8)
        q.embedding.weight.data = corners[0] + 20 + draws(16, 2)
        if kind is EMAQuantizer:
            q.ema_w.copy_(q.embedding.weight * max(2 * restart, 1))
        for _ in range(60):
            q(z)
        out = q.eval()(z)
        return q, out.loss.mean(), len(out.indices.unique())

    _, loss_without, used_without = trained(0.0)
    q, loss, used = trained(3.0)
    assert used_without < 10 < 12 < used
    assert loss < 0.1 * loss_without
    again = trained(3.0)[0]
    assert torch.equal(q.embedding.weight, again.embedding.weight)  # drawn from the global seed, as dropout is


def test_processes_that_train_together_share_the_counts(monkeypatch):
    """As if another process had the same images: counts and sums are twice as large, the codes are the same."""
    alone, together, (z, _) = EMAQuantizer(4, 2, decay=0.0), EMAQuantizer(4, 2, decay=0.0), clusters()
    together.load_state_dict(alone.state_dict())
    alone(z)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x.mul_(2))
    together(z)
    torch.testing.assert_close(together.ema_cluster_size, 2 * alone.ema_cluster_size)
    torch.testing.assert_close(together.embedding.weight, alone.embedding.weight)


def test_reviving_codes_leaves_the_gradient_of_the_step_alone():
    z, q = clusters()[0].requires_grad_(), Quantizer(16, 2, restart=50.0, decay=0.1)
    expected = torch.autograd.grad(q.eval()(z).loss.sum(), q.embedding.weight)[0]
    before = q.embedding.weight.clone()
    grad = torch.autograd.grad(q.train()(z).loss.sum(), q.embedding.weight)[0]
    torch.testing.assert_close(grad, expected)
    assert not torch.equal(before, q.embedding.weight)


def test_codebooks_work_in_float32_under_autocast():
    q = EMAQuantizer(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = q(draws(1, 3, 4, 4).bfloat16())
    assert out.z_q.dtype == out.loss.dtype == q.embedding.weight.dtype == torch.float32


# --- autoencoders


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), (8, 12)),
        (dict(dims=3), (4, 8, 12)),
        (dict(upsample="resize", ema=False), (8, 8)),
        (dict(downsample_parameters=[(2, 3, 1, 1)] * 2, upsample_parameters=[(2, 3, 1, 1, 1)] * 2), (12, 8)),
        (dict(channels=(4, 4, 4), num_res_channels=(2, 3, 5), in_channels=2, out_channels=2), (8, 16)),
    ],
)
def test_every_size_divisible_by_the_factor(options, shape):
    codec = small(**options).eval()
    x = draws(2, codec.in_channels, *shape)
    z = codec.encode(x)
    assert z.shape == (2, 3, *(n // codec.factor for n in shape))
    out = codec(x)
    assert out.x_hat.shape == x.shape and out.regulariser.shape == (2,)
    torch.testing.assert_close(codec.decode_indices(codec.indices(x)), out.x_hat)


def test_the_plain_variant_has_the_published_size():
    codec = PlainVQVAE()
    codes = codec.quantizer["quantizer"].embedding.weight.numel()
    assert (sum(p.numel() for p in codec.parameters()) - codes, codes) == (612_497, 2_048)
    assert codec.encode(torch.zeros(1, 1, 8, 16, 8)).shape == (1, 16, 1, 2, 1)
    assert codec.decode(torch.zeros(1, 16, 1, 2, 1)).shape == (1, 1, 8, 16, 8)


def test_the_plain_decoder_mirrors_the_padding_of_the_encoder():
    """A transposed convolution with the encoder's weights is the adjoint of the strided one: <Ax, y> = <x, A'y>."""
    codec = PlainVQVAE(dims=2, channels=(3,), embedding_dim=3)
    down, up = codec.encoder.blocks[0], codec.decoder.blocks[0]
    up.conv.weight = torch.nn.Parameter(draws(3, 3, 3, 3))
    down.conv = torch.nn.Conv2d(3, 3, 3, stride=2, bias=False)
    down.conv.weight = up.conv.weight
    up.conv.bias.data.zero_()
    down.act = up.act = False
    x, y = draws(1, 3, 8, 6, seed=1), draws(1, 3, 4, 3, seed=2)
    torch.testing.assert_close((down(x) * y).sum(), (x * up(y)).sum())


def test_resize_convolutions_make_no_checkerboard():
    """From constant latents, neighbouring pixels of the interior are equal with "resize" and not with "transposed"."""
    spread = {}
    for upsample in ("resize", "transposed"):
        x = small(upsample=upsample).eval().decode(torch.ones(1, 3, 12, 12))[0, 0, 16:32, 16:32]
        spread[upsample] = (x.std() / x.abs().mean()).item()
    assert spread["resize"] < 1e-5 < 1e-2 < spread["transposed"]


def test_checkpointing_changes_no_number_and_updates_the_codebook_once():
    grads, codes = [], []
    x = draws(2, 1, 8, 8)
    for use_checkpoint in (False, True):
        codec = small(use_checkpoint=use_checkpoint)
        out = codec(x)
        (F.mse_loss(out.x_hat, x) + out.regulariser.mean()).backward()
        grads.append([p.grad for p in codec.parameters() if p.requires_grad])
        codes.append(codec.quantizer["quantizer"].embedding.weight.clone())
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(*codes)


def test_training_lowers_the_error():
    codec = small(channels=(8, 8), num_embeddings=32, decay=0.9, restart=0.5)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 2, indexing="ij")
    centre = 0.6 * draws(8, 2, 1, 1)
    images = torch.exp(-4 * ((y - centre[:, :1]) ** 2 + (x - centre[:, 1:]) ** 2))
    optimiser = torch.optim.Adam([p for p in codec.parameters() if p.requires_grad], 5e-3)
    errors = []
    for _ in range(60):
        out = codec(images)
        loss = F.mse_loss(out.x_hat, images) + out.regulariser.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(F.mse_loss(out.x_hat, images).item())
    assert errors[-1] < 0.3 * images.var()


# --- tiles


@pytest.mark.parametrize("dims, tile, overlap", [(2, 3, 14), (2, 5, 14), (3, 2, 14)])
def test_tiles_give_the_whole(dims, tile, overlap):
    """Local networks without norms: exact, whatever the tiles, and also where the last tile is smaller."""
    codec = small(dims=dims).eval()
    x = draws(1, 1, *[24, 20, 16][:dims])
    with torch.no_grad():
        z = codec.encode(x)
        torch.testing.assert_close(codec.encode(x, tile, overlap), z, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codec.decode(z, tile, overlap), codec.decode(z), rtol=1e-5, atol=1e-6)


def test_tiles_are_no_larger_than_said():
    sizes = []

    def f(x):
        sizes.append(x.shape[-1])
        return x.repeat_interleave(2, -1)

    x = draws(1, 1, 40)
    for overlap in (0, 1, 3):
        torch.testing.assert_close(tiled(f, x, 2, 6, overlap, up=True), x.repeat_interleave(2, -1))
        assert max(sizes) <= 6 + 2 * overlap
    torch.testing.assert_close(tiled(lambda x: x[..., ::2], x, 2, 3, 2, up=False), x[..., ::2])


# --- errors


def test_errors_say_what_to_do():
    codec = small()
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 4\).*expected \(batch, 1, y, x\)"):
        codec.encode(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(9, 8\) is not a multiple of .* 4"):
        codec(torch.zeros(1, 1, 9, 8))
    with pytest.raises(ValueError, match="image holds NaN"):
        codec.encode(torch.full((1, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="latent holds NaN"):
        codec.decode(torch.full((1, 3, 2, 2), torch.inf))
    with pytest.raises(ValueError, match="were they made by this autoencoder"):
        codec.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="3 channels"):
        codec.quantize(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="num_res_channels has 3 entries for 2 levels"):
        small(num_res_channels=(1, 2, 3))
    with pytest.raises(ValueError, match="'transposed' or 'resize'"):
        small(upsample="bilinear")
    with pytest.raises(ValueError, match="tile=0"):
        codec.decode(torch.zeros(1, 3, 2, 2), tile=0)
