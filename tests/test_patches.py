"""Patches as whole images: tiles come back in place, with their positions, and a pixelwise denoiser is unchanged."""

import pytest
import torch

from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.patches import PatchDenoiser, positions
from companion.networks.song_unet import SongUNet


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_pixelwise_denoiser_is_the_same_of_patches_and_whole(partitions):
    x, sigma = torch.randn(3, 2, 13, 22), torch.tensor([0.1, 1.0, 3.0])

    def D(x, sigma, cond):
        assert x.shape[1:] == (2, 8, 8) and cond.shape == (len(x), 2, 8, 8)
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    torch.testing.assert_close(PatchDenoiser(D, 8, partitions)(x, sigma), D_whole(x, sigma))


def D_whole(x, sigma):
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def test_a_patch_is_told_where_it_is():
    where = PatchDenoiser(lambda x, sigma, cond: cond, 4, 1)(torch.zeros(2, 2, 8, 12), torch.ones(2))
    whole = positions((12, 16), where)
    assert whole[0, 0, 0, 0] == -1 and whole[0, 0, 5, -1] == 1 and whole[0, 1, -1, 3] == 1
    torch.testing.assert_close(where, whole[:, :, :8, :12].expand(2, -1, -1, -1))


def test_a_published_network_with_positions_denoises_images_of_any_size():
    torch.manual_seed(0)
    network = SongUNet(in_channels=4, out_channels=2, model_channels=8, num_res_blocks=1, channel_mult=(1, 2))
    D = PatchDenoiser(EDMDenoiser(network), 8, 2)
    x = torch.randn(2, 2, 11, 17)
    both = D(x, torch.tensor([0.5, 1.0]))
    assert both.shape == x.shape
    torch.testing.assert_close(D(x[1:], torch.tensor(1.0)), both[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="partitions"):
        PatchDenoiser(D, 4, 5)
