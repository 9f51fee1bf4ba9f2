"""Writes the goldens of this folder: what the published class of each kind answers to weights of a formula.

    PYTHONPATH=PEERS python make.py --edm CHECKOUT --inversebench CHECKOUT

PEERS holds diffusers and monai; the checkouts are of NVlabs/edm and devzhk/InverseBench, which are run and not copied.
A golden has inputs, output, names and shapes of the tensors, no weights: `formula` makes those.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that its name and shape alone decide."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) < 2:
        return x / 4 + (1 if name.endswith("weight") else 0)
    return x / (x[0].numel() ** 0.5)


@torch.no_grad()
def golden(name: str, peer: str, model, inputs: dict[str, Tensor], call, **more) -> None:
    """Fill a peer's model by the formula, run it, write the golden."""
    state = model.state_dict()
    fixed = {k: v.clone() for k, v in state.items() if "resample_filter" in k}
    state = {k: fixed.get(k, formula(k, tuple(v.shape))) for k, v in state.items()}
    model.load_state_dict(state)
    out = call(model.eval(), **inputs)
    about = {
        "peer": peer,
        "shapes": json.dumps({k: list(v.shape) for k, v in state.items() if k not in fixed}),
        "more": json.dumps(more),
    }
    inputs = {k: v.contiguous() for k, v in inputs.items()}
    save_file(
        inputs | {"out": out.contiguous()} | {f"fixed/{k}": v for k, v in fixed.items()},
        HERE / f"{name}.safetensors",
        about,
    )
    print(name, peer, (HERE / f"{name}.safetensors").stat().st_size, out.std().item())


def images(channels: int, *space: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *space, generator=torch.Generator().manual_seed(7))


def edm(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    from training.networks import EDMPrecond

    ddpmpp = dict(model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
    ncsnpp = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
    sigma = torch.tensor([0.1, 2.0])
    x, label = images(2, 16, 16), torch.eye(3)[[0, 2]]
    model = EDMPrecond(16, 2, label_dim=3, sigma_data=0.4, augment_dim=4, **ddpmpp)
    inputs = {
        "x": x,
        "sigma": sigma,
        "y": label,
        "augment": torch.randn(2, 4, generator=torch.Generator().manual_seed(1)),
    }
    run = lambda m, x, sigma, y, augment: m(x, sigma, y, augment_labels=augment)  # noqa: E731
    golden("edm_ddpmpp", "NVlabs/edm SongUNet, ddpmpp", model, inputs, run, sigma_data=0.4)
    run = lambda m, x, sigma: m(x, sigma)  # noqa: E731
    model = EDMPrecond(16, 2, **ddpmpp, **ncsnpp)
    golden("edm_ncsnpp", "NVlabs/edm SongUNet, ncsnpp", model, {"x": x, "sigma": sigma}, run, sigma_data=0.5)


def inversebench(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    from models.precond import EDMPrecond

    # configs/pretrain/mri-brain-mvue.yaml with half the channels and two of its five levels
    model = EDMPrecond(
        16, 2, model_type="DhariwalUNet", model_channels=64, channel_mult=[1, 1], attn_resolutions=[], num_blocks=1
    )
    inputs = {"x": images(2, 16, 16), "sigma": torch.tensor([0.1, 2.0])}
    golden("inversebench", "devzhk/InverseBench DhariwalUNet", model, inputs, lambda m, x, sigma: m(x, sigma))


def diffusers() -> None:
    from diffusers import UNet2DModel, __version__

    size = dict(sample_size=16, in_channels=2, out_channels=2, block_out_channels=(32, 64), layers_per_block=1)
    inputs = {"x": images(2, 16, 16), "t": torch.tensor([3, 750])}
    call = lambda m, x, t: m(x, t).sample  # noqa: E731
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    model = UNet2DModel(**size, **blocks)
    golden("diffusers", f"diffusers {__version__} UNet2DModel", model, inputs, call, config=dict(model.config))
    ddpm = dict(
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None,
        resnet_time_scale_shift="scale_shift", center_input_sample=True, norm_num_groups=16, num_class_embeds=5,
    )  # fmt: skip
    model = UNet2DModel(**size, **blocks, **ddpm)
    call = lambda m, x, t, y: m(x, t, y).sample  # noqa: E731
    inputs |= {"y": torch.tensor([4, 0])}
    golden("diffusers_ddpm", f"diffusers {__version__} UNet2DModel", model, inputs, call, config=dict(model.config))


def monai() -> None:
    from monai import __version__
    from monai.networks.nets import DiffusionModelUNet

    # the brain LDM bundle: four numbers about the person as channels and as context; smaller
    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=7, out_channels=3, num_res_blocks=1, channels=(16, 32), norm_num_groups=8,
        attention_levels=(False, True), num_head_channels=(0, 16), with_conditioning=True, cross_attention_dim=4,
        resblock_updown=True,
    )  # fmt: skip
    inputs = {
        "x": images(3, 4, 8, 4),
        "t": torch.tensor([3, 750]),
        "cond": torch.rand(2, 4, generator=torch.Generator().manual_seed(2)),
    }

    def call(m, x, t, cond):
        told = cond[:, :, None, None, None].expand(-1, -1, *x.shape[2:])
        return m(torch.cat([x, told], 1), t, context=cond[:, None])

    golden("monai_brain_ldm", f"monai {__version__} DiffusionModelUNet", model, inputs, call)


def maisi_autoencoders() -> None:
    from monai import __version__
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    # autoencoder_def of MAISI's configurations, narrower, with what else the class offers; and that of its masks
    sizes = dict(spatial_dims=3, latent_channels=4, norm_num_groups=32, norm_eps=1e-6, dim_split=1, save_mem=False)
    image = dict(
        in_channels=1, out_channels=1, num_res_blocks=(1, 2), num_channels=(32, 64), attention_levels=(False, True),
        with_encoder_nonlocal_attn=True, use_combined_linear=True, num_splits=2,
    )  # fmt: skip
    mask = dict(
        in_channels=2, out_channels=3, num_res_blocks=(1, 1, 1), num_channels=(32, 32, 64), num_splits=1,
        attention_levels=(False, False, False), use_convtranspose=True,
    )  # fmt: skip

    def call(m, x, z):
        mean, std = m.encode(x)
        return torch.cat([mean.flatten(), std.flatten(), m.decode(z).flatten()])

    for name, options, space in (("maisi_autoencoder", image, (4, 32, 4)), ("maisi_mask_autoencoder", mask, (4, 8, 8))):
        model = AutoencoderKlMaisi(**sizes, **options)
        inputs = {"x": images(options["in_channels"], *space, batch=1), "z": images(4, 2, space[1] // 2, 1, batch=1)}
        golden(name, f"monai {__version__} AutoencoderKlMaisi", model, inputs, call)


def maisi_unets() -> None:
    from monai import __version__
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
    from monai.networks.schedulers.rectified_flow import RFlowScheduler

    # diffusion_unet_def of the configurations rflow and ddpm, narrower
    sizes = dict(spatial_dims=3, in_channels=4, out_channels=4, num_res_blocks=1, num_channels=(32, 64))
    sizes |= dict(attention_levels=(False, True), num_head_channels=(0, 32), include_spacing_input=True)
    rflow = dict(num_class_embeds=12, resblock_updown=True, include_fc=True)
    ddpm = dict(include_top_region_index_input=True, include_bottom_region_index_input=True)
    spacing = torch.tensor([[1.0, 1.0, 2.5], [0.5, 0.7, 1.2]])
    inputs = {"x": images(4, 4, 4, 4), "t": torch.tensor([31.5, 750.0])}

    def call(m, x, t, cond, y=None):
        *regions, spacing = (100 * cond).split([4, 4, 3] if cond.shape[1] == 11 else 3, 1)
        names = ("top_region_index_tensor", "bottom_region_index_tensor")
        return m(x, t, class_labels=y, spacing_tensor=spacing, **dict(zip(names, regions, strict=False)))

    # what RFlowScheduler makes of the network's output: its estimate of the image, and the times of ten steps
    flow = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True, scale=1.4)
    flow.set_timesteps(10, input_img_size_numel=64 * 64 * 64)

    def flowing(m, x, t, cond, y):
        velocity = call(m, x, t, cond, y)
        x0 = [flow.step(v, time, part)[1] for v, time, part in zip(velocity, t, x, strict=True)]
        return torch.stack([velocity, torch.stack(x0)])

    model = DiffusionModelUNetMaisi(**sizes, **rflow)
    told = {"cond": spacing, "y": torch.tensor([1, 9])}
    peer = f"monai {__version__} DiffusionModelUNetMaisi"
    golden("maisi_rflow", f"{peer}, RFlowScheduler", model, inputs | told, flowing, times=flow.timesteps.tolist())
    regions = torch.eye(4)[torch.tensor([[0, 1], [1, 3]])].flatten(1)
    model = DiffusionModelUNetMaisi(**sizes, **ddpm)
    golden("maisi_ddpm", peer, model, inputs | {"cond": torch.cat([regions, spacing], 1)}, call)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edm", type=Path)
    parser.add_argument("--inversebench", type=Path)
    given = parser.parse_args()
    if given.edm:
        edm(given.edm)
    if given.inversebench:
        inversebench(given.inversebench)
    diffusers()
    monai()
    maisi_autoencoders()
    maisi_unets()
