"""Synthetic brain volumes by latent diffusion, after DIPY's VQ-VAE and diffusion project of 2023: data and training.

An autoencoder makes of a volume of 64^3 voxels a small one of 16^3 cells with a few channels, a prior learns these
latents, and the decoder turns what the prior draws into brains:

    prior = load_latent("latent3d/prior")
    z = sample(prior.D, karras(20), shape=prior.latent_shape, seeds="0-15").x
    volumes = prior.decode(z)                    # (16, 1, z, y, x) at prior.affine

The original ended in noise; latent3d_sample.py shows why, by experiment. Here the latents have mean 0 and standard
deviation 1 in every channel over the whole training set, these numbers travel with the prior, and a noise schedule that
leaves part of the signal at its end is refused before training.
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion import latent, metrics, weights
from companion.data import anatomy, volumes
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.losses import discrete_loss, edm_loss, flow_loss
from companion.diffusion.noise import randn
from companion.latent import (
    AdversarialCodec,
    LatentDenoiser,
    LatentSpace,
    adversarial_loss,
    check_terminal_signal,
    codec_loss,
)
from companion.networks.autoencoder import PatchDiscriminator
from companion.networks.vqvae import Codec
from companion.parameters import Parameters, param, resolve_device
from companion.runs import code_version, project_root, sha256
from companion.training import TrainConfig, TrainResult, train
from companion.weights import SCHEDULES

AUTOENCODER, PRIOR = "latent3d/autoencoder", "latent3d/prior"

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of latent3d/1_data.ipynb."""

    source: str = param("cohort", "cohort: the embedded one; digits: small 2D images, to check the code; else a folder "
                                  "of NIfTI volumes, such as NFBS or CC359")
    data: str = param("data/latent3d_64.h5", "where the prepared volumes go; kept when it is there already")
    shape: tuple[int, ...] = param((64, 64, 64), "voxels along z, y and x (of digits: 16 16)", minimum=16)
    voxel_mm: tuple[float, ...] | None = param(None, "of files: voxel size along z, y and x; none: as for the cohort",
                                               minimum=0.1)
    subjects: int = param(1500, "virtual people to learn from, or at most so many files", minimum=1)
    validation_share: float = param(0.1, "of files: share of the people to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of files: share of the people kept for tests", minimum=0, maximum=1)


COHORT = "virtual cohort of companion.data.anatomy (ICBM 152), T1w"


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the prepared volumes, made and stored once as HDF5.

    Arrays: image (person, 1, z, y, x) float16 on the scale of `data.volumes`; tissue_ml (person, 3) CSF, grey and white
    matter of virtual people; affine (person, 4, 4), scale (person,). Files that cannot be used are named with the
    reason in attrs["skipped"]. Raises ValueError when no file can be used, or `p.data` holds other volumes than the
    parameters ask for.
    """
    make = {"cohort": _cohort, "digits": _digits}.get(p.source, _files)
    if make is not _digits and (len(p.shape) != 3 or (p.voxel_mm and len(p.voxel_mm) != 3)):
        raise ValueError(f"shape {p.shape} and voxel_mm {p.voxel_mm} must have three numbers each, for z, y and x")
    path, wanted = project_root() / p.data, {"source": p.source, "shape": list(p.shape), "subjects": p.subjects}
    if make is _files:
        wanted |= {name: getattr(p, name) for name in ("voxel_mm", "validation_share", "test_share", "seed")}
        wanted["voxel_mm"] = list(p.voxel_mm or volumes.spacing(p.shape))
    if not path.exists():
        arrays, people, split, about = make(p, progress)
        units = {"image": "1", "tissue_ml": "mL", "affine": "mm", "scale": "as in the file"}
        write_dataset(
            path, arrays, units={name: units[name] for name in arrays}, subjects=people, split=split, seed=p.seed,
            scale={name: volumes.SCALE if name == "image" else "1" for name in arrays}, source=about.pop("source"),
            attrs=about | {"parameters": wanted})
    prepared = open_dataset(path, require=["image"])
    made = prepared.attrs.get("parameters", {})
    if made != wanted:
        differ = ", ".join(f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        raise ValueError(f"{path} was prepared with {differ}; delete the file, or give another data file")
    return prepared


def _cohort(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return arrays, subjects, split and facts of virtual people, all for training: others are drawn when needed."""
    image, tissue = np.empty((p.subjects, 1, *p.shape), np.float16), np.empty((p.subjects, 3), np.float32)
    people = anatomy.cohort("train", p.subjects)
    for i, subject in enumerate(tqdm(people, desc="people", disable=not progress)):
        person = volumes.virtual(subject, p.shape)
        image[i, 0], tissue[i], affine = person.image, person.tissue_ml, person.affine
    seeds = [str(subject.seed) for subject in people]
    arrays = {"image": image, "tissue_ml": tissue, "affine": np.repeat(affine[None], p.subjects, 0)}
    return arrays, seeds, {"train": seeds}, {"source": COHORT, "voxel_mm": list(volumes.spacing(p.shape))}


def _files(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return arrays, subjects, split and facts of the NIfTI volumes of a folder that can be used."""
    voxel_mm, read, skipped = p.voxel_mm or volumes.spacing(p.shape), {}, {}
    scans = volumes.find_scans(project_root() / p.source)
    for scan in tqdm(scans[: p.subjects], desc="files", disable=not progress):
        try:
            read[scan.image.name] = scan, *volumes.load_scan(scan, p.shape, voxel_mm)
        except (ValueError, OSError) as error:
            skipped[scan.image.name] = str(error)
    if not read:
        raise ValueError("\n  ".join([f"no file of {p.source} can be used:", *skipped.values()]))
    arrays = {"image": np.stack([v.array[None] for _, v, _ in read.values()]).astype(np.float16),
              "affine": np.stack([v.affine for _, v, _ in read.values()]),
              "scale": np.array([scale for *_, scale in read.values()], np.float32)}
    whose = {name: scan.subject for name, (scan, *_) in read.items()}
    order = np.random.default_rng(p.seed).permutation(sorted(set(whose.values()))).tolist()
    tests = min(round(p.test_share * len(order)), len(order) - 1)
    checks = min(round(p.validation_share * len(order)), len(order) - 1 - tests)
    parts = {"test": order[:tests], "validation": order[tests : tests + checks], "train": order[tests + checks :]}
    split = {part: [name for name in read if whose[name] in people] for part, people in parts.items()}
    about = {"source": f"NIfTI volumes of {Path(p.source).name}", "voxel_mm": list(voxel_mm), "skipped": skipped,
             "about": {name: scan.about for name, (scan, *_) in read.items()}}
    return arrays, list(read), split, about


def _digits(p: PrepareData, progress: bool) -> tuple[dict, list, dict, dict]:
    """Return scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 16 x 16; the last 297 for tests."""
    from sklearn.datasets import load_digits  # comes with nilearn

    if tuple(p.shape) != (16, 16):
        raise ValueError(f"digits have the shape (16, 16), not {p.shape}; set shape to it")
    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear").clamp(0, 1).numpy().astype(np.float16)
    names = [str(i) for i in range(len(images))]
    train = names[:1500][: p.subjects]
    return {"image": images}, names, {"train": train, "test": names[1500:]}, {
        "source": "handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998)", "voxel_mm": [1.0, 1.0]}


def held_out(prepared: Prepared, split: str, count: int) -> Tensor:
    """Return volumes (person, 1, z, y, x) of people that training never sees, the first `count` of a split.

    Of the cohort they are drawn now. Of files, where the split is empty: of another split, training last.
    """
    if prepared.source == COHORT:
        shape = prepared.shapes["image"][2:]
        return torch.stack([volumes.virtual(one, shape).image[None] for one in anatomy.cohort(split, count)])
    others = [name for name in (split, "test", "validation", "train") if prepared.split.get(name)]
    items = prepared.sequences("image", others[0], 1)
    return torch.stack([items[i].float() for i in range(min(count, len(items)))])


def planes(x: Tensor) -> dict[str, Tensor]:
    """Return the middle axial, coronal and sagittal slice of a volume (1, z, y, x), head up; an image as it is."""
    if x.ndim == 3:
        return {"image": x}
    k, j, i = (n // 2 for n in x.shape[1:])
    return {"axial": x[:, k], "coronal": x[:, :, j].flip(1), "sagittal": x[..., i].flip(1)}


def histograms(x: list[Tensor], bins: int = 30) -> dict[str, tuple[list, list]]:
    """Return, for `figures.curves`, the histogram of the values above 0 of each volume, in shares of them."""
    edges = torch.linspace(0.02, volumes.CEILING, bins + 1)
    curves = {}
    for i, one in enumerate(x):
        counts = torch.histogram(one[one > 0.02].flatten(), edges).hist
        curves[f"person {i + 1}"] = ((edges[1:] + edges[:-1]) / 2).tolist(), (counts / counts.sum()).tolist()
    return curves


def mean_and_spread(prepared: Prepared, most: int = 100) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (1, z, y, x), voxel by voxel, of the first training volumes."""
    items = prepared.sequences("image", "train", 1)
    x = torch.stack([items[i].float() for i in range(min(most, len(items)))])
    return x.mean(0), x.std(0, correction=0)


def loss_curve(result: TrainResult, points: int = 60) -> tuple[list[float], list[float]]:
    """Return (items seen, mean loss) of a training in about `points` pieces of its log, for `figures.curves`."""
    lines = [line for line in result.stats if "loss" in line]
    width = max(1, len(lines) // points)
    pieces = [lines[i : i + width] for i in range(0, len(lines), width)]
    return [piece[-1]["images"] for piece in pieces], [sum(v["loss"] for v in piece) / len(piece) for piece in pieces]


# ----------------------------------------------------------------------------------------------------- autoencoder


@dataclass(frozen=True)
class TrainLatent(Parameters):
    """Parameters of latent3d/2_train.ipynb."""

    data: str = param("data/latent3d_64.h5", "prepared volumes, made by 1_data")
    stage: str = param("both", "what to train; decoder: of the autoencoder only that half, so that its latents stay",
                       choices=("autoencoder", "decoder", "prior", "both"))
    # the autoencoder
    autoencoder: str | None = param(None, "checkpoint that its training begins with, or that a prior alone builds on")
    architecture: str = param("kl", "kl: variational; vq: residual VQ-VAE (MONAI); plain: the project's first VQ-VAE",
                              choices=("kl", "vq", "plain"))
    channels: tuple[int, ...] = param((32, 48), "width of each level, finest first", minimum=4)
    patch: int = param(2, "of kl: the finest level works on blocks of so many voxels along each axis", minimum=1)
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    latent_channels: int = param(8, "channels of the latents", minimum=1)
    codes: int = param(512, "of vq and plain: size of the codebook", minimum=2)
    background: float = param(0.2, "weight of voxels outside the brain in the reconstruction error", minimum=0)
    edges: float = param(0.5, "weight of the error of differences between neighbours, against blur", minimum=0)
    regulariser: float | None = param(1e-7, "weight of the KL or codebook term; none: the architecture's usual one")
    adversary: float = param(0.0, "weight of a patch discriminator; begin without", minimum=0)
    ae_steps: int = param(6000, "optimiser steps", minimum=1)
    ae_batch_size: int = param(1, "volumes a step", minimum=1)
    ae_learning_rate: float = param(2e-3, "highest learning rate", minimum=0)
    ae_warmup: int = param(50, "steps of linear warm-up", minimum=0)
    ae_ema_decay: float = param(0.995, "decay of the averaged weights", minimum=0, maximum=1)
    ae_seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=0)
    # the prior
    start_from: str | None = param(None, "prior to begin with")
    diffusion: str = param("edm", "edm, rectified flow, or what a network at 1000 discrete times predicts",
                           choices=("edm", "flow", "v", "epsilon", "x0"))
    schedule: str = param("scaled_linear", "of v, epsilon, x0", choices=tuple(SCHEDULES))
    covariates: tuple[str, ...] = param((), "what the prior is told of each brain", choices=("brain_ml", "csf_share"))
    model_channels: int = param(96, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1,), "relative width of each level, finest first")
    prior_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((1,), "strides at which the network attends over cells")
    prior_patch: int = param(2, "the finest level works on blocks of so many cells along each axis", minimum=1)
    P_mean: float = param(0.3, "mean of ln sigma in training (edm)")
    P_std: float = param(1.3, "standard deviation of ln sigma in training (edm)", minimum=0)
    steps: int = param(10000, "optimiser steps", minimum=1)
    batch_size: int = param(4, "latents a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(1e-3, "highest learning rate", minimum=0)
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.998, "decay of the averaged weights", minimum=0, maximum=1)
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=0)
    # both
    rate: str = param("cosine", "learning rates after the warm-up; constant ones can go on for longer",
                      choices=("cosine", "constant"))
    mirror: bool = param(True, "mirror volumes left to right at random")
    autocast: str | None = param("bfloat16", "number format inside the networks", choices=("bfloat16", None))
    checkpoint_every: int = param(200, "steps between checkpoints", minimum=1)


def data_config(prepared: Prepared) -> dict:
    """Return what a checkpoint says of the volumes that it knows: source, scale, grid, affine of the first."""
    return {"source": prepared.source, "scale": volumes.SCALE, "volumes": len(prepared.rows("train")),
            "shape": list(prepared.shapes["image"][2:]), "voxel_mm": prepared.attrs["voxel_mm"],
            "affine": prepared.read("affine")[0].tolist() if "affine" in prepared.shapes else None}


def autoencoder_config(p: TrainLatent, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the autoencoder from."""
    dims = len(prepared.shapes["image"]) - 2
    common = {"dims": dims, "in_channels": 1, "out_channels": 1}
    codebook = {"num_embeddings": p.codes, "embedding_dim": p.latent_channels, "restart": 0.05}
    network = {
        "kl": {"name": "AutoencoderKL", "channels": p.channels[0], "patch": p.patch, "middle": False,
               "channel_mult": [c / p.channels[0] for c in p.channels], "num_res_blocks": p.num_res_blocks,
               "decoder_blocks": p.num_res_blocks, "latent_channels": p.latent_channels, "norm_groups": 8},
        "vq": {"name": "VQVAE", "channels": list(p.channels), "num_res_layers": p.num_res_blocks, "decay": 0.99,
               "upsample": "resize"} | codebook,
        "plain": {"name": "PlainVQVAE", "channels": list(p.channels)} | codebook,
    }[p.architecture]
    return {"network": network | common, "data": data_config(prepared)}


def train_autoencoder(p: TrainLatent, progress: bool = True) -> TrainResult:
    """Return the trained autoencoder; continues what <out>/autoencoder holds."""
    prepared = open_dataset(project_root() / p.data, require=["image"])
    config = autoencoder_config(p, prepared)
    torch.manual_seed(p.seed)
    codec = weights.build(config)
    if p.architecture == "kl":  # begin almost without noise on the latents, or nothing is learned for long
        codec.quant_conv.bias.data[p.latent_channels :] = -4.0
    if p.autoencoder:
        codec.load_state_dict(load_autoencoder(p.autoencoder).state_dict())
    if p.stage == "decoder":
        for name, tensor in codec.named_parameters():
            tensor.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    model = codec
    if p.adversary:
        model = AdversarialCodec(codec, PatchDiscriminator(codec.dims))
    options = TrainConfig(
        steps=p.ae_steps, batch_size=p.ae_batch_size, learning_rate=p.ae_learning_rate, warmup=p.ae_warmup,
        schedule=p.rate, betas=(0.9, 0.99), ema_decay=p.ae_ema_decay, autocast=p.autocast, channels_last=True,
        seed=p.seed, device=p.device, seconds=p.ae_seconds, checkpoint_every=p.checkpoint_every)

    def loss(model: nn.Module, x: Tensor, generator: Generator) -> Tensor:
        return autoencoder_loss(model, x, generator, p)

    about = config["network"] | {name: getattr(p, name) for name in AUTOENCODER_LOSS}
    about |= {"frozen encoder": True} if p.stage == "decoder" else {}
    return train(model, loss, prepared.sequences("image", "train", 1), options, project_root() / p.out / "autoencoder",
                 about=about, progress=progress)


AUTOENCODER_LOSS = ("background", "edges", "regulariser", "adversary", "mirror", "autoencoder")


def autoencoder_loss(model: nn.Module, x: Tensor, generator: Generator, p: TrainLatent) -> Tensor:
    """Return the loss (batch,) of volumes x (batch, 1, z, y, x): reconstruction, edges, regulariser, adversary."""
    x = x.float()
    if p.mirror:
        flipped = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator, device=generator.device) < 0.5
        x = torch.where(flipped.to(x.device), x.flip(-1), x)
    options = {"background": p.background, "edges": p.edges, "regulariser": p.regulariser}
    if p.adversary:
        return adversarial_loss(model, x, generator, weight=p.adversary, **options)
    return codec_loss(model, x, generator, **options)


@torch.no_grad()
def reconstruct(codec: Codec, x: Tensor, batch: int = 4) -> Tensor:
    """Return what an autoencoder makes of volumes (batch, 1, z, y, x): codes if it has them, else means, decoded."""
    parts = []
    for part in x.split(batch):
        z = codec.encode(part)
        parts.append(codec.decode(codec.quantize(z).z_q if hasattr(codec, "quantize") else z))
    return torch.cat(parts)


def reconstruction_figures(x_hat: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """Return L1, PSNR, SSIM and MS-SSIM of reconstructions, mean and standard error over volumes; peak signal 1.

    "brain": over voxels above 0 only, where the background cannot flatter.
    """
    brain, peak = x > 0, {"data_range": 1.0}
    figures = {
        "L1 (brain)": torch.where(brain, (x_hat - x).abs(), 0).flatten(1).sum(1) / brain.flatten(1).sum(1),
        "PSNR (dB)": metrics.psnr(x_hat, x, **peak), "PSNR (brain, dB)": metrics.psnr(x_hat, x, mask=brain, **peak),
        "SSIM": metrics.ssim(x_hat, x, **peak), "SSIM (brain)": metrics.ssim(x_hat, x, mask=brain, **peak),
        "MS-SSIM": metrics.ms_ssim(x_hat, x, 1.0)}
    return {name: metrics.mean_and_error(values) for name, values in figures.items()}


def codec_of(result: TrainResult) -> Codec:
    """Return the averaged autoencoder of a training, without the discriminator beside it."""
    return getattr(result.ema, "codec", result.ema)


def save_autoencoder(result: TrainResult, p: TrainLatent, figures: dict) -> Path:
    """Return the folder <out>/autoencoder/checkpoint with the averaged weights in half precision."""
    codec = codec_of(result)
    record = _record(result, p, p.ae_batch_size) | {"validation": figures}
    config = autoencoder_config(p, open_dataset(project_root() / p.data))
    return weights.save_checkpoint(project_root() / p.out / "autoencoder" / "checkpoint", copy.deepcopy(codec).half(),
                                   config, record)


def _record(result: TrainResult, p: TrainLatent, batch_size: int) -> dict:
    return {"parameters": asdict(p), "steps": result.step, "volumes seen": result.step * batch_size,
            "seconds": round(result.seconds), "loss": result.loss, "code": code_version()}


# ------------------------------------------------------------------------------------------------------------ prior


def cache_latents(codec: Codec, prepared: Prepared, path: str | os.PathLike, mirror: bool = True, device="cpu",
                  autocast: str | None = "bfloat16", progress: bool = True) -> tuple[LatentSpace, Prepared]:
    """Return the space of normalised latents of all training volumes, and these latents, stored once as HDF5.

    z (person, version, channel, *cells) float16, mean 0 and standard deviation 1 per channel over all of them;
    version 1, with `mirror`, is that of the volume mirrored left to right. Raises ValueError if `path` holds latents of
    another autoencoder or of other volumes.
    """
    path, made_of = Path(path), sha256(prepared.path)
    if not path.exists():
        raw, items = LatentSpace(codec), prepared.sequences("image", "train", 1)
        z = []
        for i in tqdm(range(len(items)), desc="latents", disable=not progress):
            x = items[i][None].float().to(device)
            both = torch.cat([x, x.flip(-1)]) if mirror else x
            with torch.autocast(torch.device(device).type, getattr(torch, autocast or "float32"), bool(autocast)):
                z.append(raw.encode(both).float().cpu().half())
        z = torch.stack(z).float()
        mean, std = latent.statistics(z.flatten(0, 1).split(64))
        space = LatentSpace(codec, mean, std)
        z = (z - space._column(space.mean.cpu())) / space._column(space.std.cpu())
        people = [prepared.subjects[row] for row in prepared.rows("train")]
        write_dataset(path, {"z": z.half().numpy()}, units={"z": "1"}, seed=prepared.seed, subjects=people,
                      scale={"z": "mean 0 and standard deviation 1 in each channel; see attrs"},
                      source=prepared.source, split={"train": people},
                      attrs={"latent": space.describe(), "volumes": made_of})
    cached = open_dataset(path, require=["z"])
    space = LatentSpace.described(codec, cached.attrs["latent"]).to(device)
    if cached.attrs["volumes"] != made_of:
        raise ValueError(f"{path} holds latents of other volumes than those of {prepared.path}; delete it")
    return space, cached


COVARIATES = {"brain_ml": "volume of the brain, mL", "csf_share": "CSF, share of the brain's volume: grows with age"}


def covariates(tissue_ml: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return covariates (person, name) of tissue volumes (person, 3); see COVARIATES."""
    brain = tissue_ml.sum(-1)
    values = {"brain_ml": brain, "csf_share": tissue_ml[..., 0] / brain}
    return torch.stack([values[name] for name in names], -1)


def condition(values: Tensor, config: dict, cells: tuple[int, ...]) -> Tensor:
    """Return the cond (batch, name, *cells) of a prior with covariates for values (batch, name) in their own units.

    config: the prior's, whose "covariates" give names, means and standard deviations of the training set. Each
    standardised number fills a channel.
    """
    about = config.get("covariates", [])
    if values.ndim != 2 or values.shape[1] != len(about):
        raise ValueError(f"covariates of shape {tuple(values.shape)} were given; this prior takes (batch, {len(about)})"
                         f": {', '.join(a['name'] for a in about) or 'none'}")
    mean, std = (torch.tensor([a[key] for a in about]) for key in ("mean", "std"))
    return ((values - mean) / std)[(...,) + (None,) * len(cells)].expand(*values.shape, *cells)


class _Latents(Dataset):
    """Items for training: z (version, channel, *cells), with the person's cond (name, *cells) behind it on channels."""

    def __init__(self, cached: Prepared, cond: Tensor | None):
        self.items, self.cond = cached.sequences("z", "train", cached.shapes["z"][1]), cond

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        z = self.items[i].float()
        return z if self.cond is None else torch.cat([z, self.cond[i].expand(len(z), *self.cond[i].shape)], 1)


def prior_config(p: TrainLatent, space: LatentSpace, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the prior from, the covariates that it takes, and whose latents it knows."""
    channels = space.codec.latent_channels
    denoiser = {"edm": {"name": "EDMDenoiser", "sigma_data": 1.0}, "flow": {"name": "FlowDenoiser"}}.get(
        p.diffusion, {"name": "DiscreteDenoiser", "schedule": {"name": p.schedule}, "prediction": p.diffusion})
    network = {"name": "UNet", "dims": space.codec.dims, "in_channels": channels + len(p.covariates),
               "model_channels": p.model_channels, "out_channels": channels, "num_res_blocks": p.prior_res_blocks,
               "channel_mult": list(p.channel_mult), "attention_resolutions": list(p.attention_resolutions),
               "num_heads": 4, "use_scale_shift_norm": True, "patch": p.prior_patch}
    about = []
    if p.covariates:
        if "tissue_ml" not in prepared.shapes:
            raise ValueError(f"{prepared.path} does not say the tissue volumes of its people, which covariates need")
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        about = [{"name": name, "what": COVARIATES[name], "mean": m, "std": s} for name, m, s in
                 zip(p.covariates, values.mean(0).tolist(), values.std(0).tolist(), strict=True)]
    return {"network": network, "denoiser": denoiser, "data": data_config(prepared), "covariates": about,
            "autoencoder": autoencoder_name(p)}


def autoencoder_name(p: TrainLatent) -> str:
    """Return the checkpoint of the autoencoder that a prior is to be trained on."""
    if p.stage == "prior" and p.autoencoder is None:
        raise ValueError("stage prior needs the name or folder of its autoencoder: autoencoder = latent3d/autoencoder")
    return p.autoencoder if p.stage == "prior" else f"{p.out}/autoencoder/checkpoint"


def check_levels(D: nn.Module) -> float:
    """Return the share of the signal that is left at the highest noise level that a prior learns, see

    `latent.check_terminal_signal`; ValueError if sampling would begin with a state that training never showed.
    """
    if not isinstance(D, DiscreteDenoiser):
        return check_terminal_signal(SIGMA_MAX)
    share = check_terminal_signal(D.schedule)
    if share == 0 and D.process.prediction == "epsilon":
        raise ValueError("a schedule without signal at its end leaves epsilon nothing to say about the image there; "
                         "choose diffusion v or x0, or another schedule")
    return share


def prior_loss(D: nn.Module, z: Tensor, generator: Generator, p: TrainLatent) -> Tensor:
    """Return the loss (batch,) of latents (batch, version, channel, *cells), a random version of each."""
    options = {"generator": generator, "device": generator.device}
    z = z[torch.arange(len(z)), torch.randint(z.shape[1], (len(z),), **options).to(z.device)]
    cond = None
    if p.covariates:
        z, cond = z[:, : -len(p.covariates)], z[:, -len(p.covariates) :]
    if p.diffusion == "edm":
        return edm_loss(D, z, generator, p.P_mean, p.P_std, cond)
    return (flow_loss if p.diffusion == "flow" else discrete_loss)(D, z, generator, cond=cond)


def train_prior(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, LatentSpace]:
    """Return the trained prior and the space of its latents; continues what <out>/prior holds.

    Latents are cached in <out>/latents.h5. Raises ValueError for latents of another autoencoder, and for a schedule
    that leaves signal at its end.
    """
    prepared, out = open_dataset(project_root() / p.data, require=["image"]), project_root() / p.out
    device = resolve_device(p.device)
    codec = load_autoencoder(autoencoder_name(p), device)
    space, cached = cache_latents(codec, prepared, out / "latents.h5", p.mirror, device, p.autocast, progress)
    config = prior_config(p, space, prepared)
    torch.manual_seed(p.seed)
    D = weights.build(config)
    check_levels(D)
    if p.start_from:
        D.load_state_dict(weights.load_denoiser(p.start_from).state_dict())
    D.autocast = getattr(torch, p.autocast) if p.autocast else None
    cond = None
    if p.covariates:
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        cond = condition(values, config, cached.shapes["z"][3:])
    options = TrainConfig(
        steps=p.steps, batch_size=p.batch_size, grad_accumulation=p.grad_accumulation, learning_rate=p.learning_rate,
        warmup=p.warmup, schedule=p.rate, ema_decay=p.ema_decay, channels_last=True, seed=p.seed, device=p.device,
        seconds=p.seconds, checkpoint_every=p.checkpoint_every)

    def loss(D: nn.Module, z: Tensor, generator: Generator) -> Tensor:
        return prior_loss(D, z, generator, p)

    about = {name: config[name] for name in ("network", "denoiser", "covariates")}
    about |= {"latent": space.describe(), "P_mean": p.P_mean, "P_std": p.P_std, "start_from": p.start_from}
    return train(D, loss, _Latents(cached, cond), options, out / "prior", about=about, progress=progress), space


SIGMA_MAX = 80.0  # where draws begin: latents of standard deviation 1 are invisible in it


def latent_report(D: nn.Module, space: LatentSpace) -> list[dict[str, float]]:
    """Return what to look at before a prior is trained: the latents, and what is left of them at the highest noise."""
    left = {"amplitude left at the highest noise (%)": 100 * check_levels(D)}
    return [{"channel": i, "mean": m, "standard deviation": s, "normalised": "0, 1"} | left
            for i, (m, s) in enumerate(zip(space.mean.tolist(), space.std.tolist(), strict=True))]


def with_decoder(prior: LatentPrior, codec: Codec) -> LatentDenoiser:
    """Return the prior with another decoder for the same latents, to be saved; ValueError if the latents are others."""
    halves = [{k: v for k, v in c.state_dict().items() if not k.startswith(("decoder.", "post_quant_conv."))}
              for c in (prior.space.codec, codec)]
    if halves[0].keys() != halves[1].keys() or not all(torch.equal(v, halves[1][k]) for k, v in halves[0].items()):
        raise ValueError("the encoders differ, so the latents do; train the prior on those of the new autoencoder")
    space = LatentSpace(codec, prior.space.mean, prior.space.std, prior.space.latents, prior.space.intensity)
    return LatentDenoiser(prior.D.D, space)


def no_cond(p: TrainLatent, z: Tensor) -> Tensor | None:
    """Return the cond of an average person, for latents z (batch, channel, *cells); None without covariates."""
    return z.new_zeros(len(z), len(p.covariates), *z.shape[2:]) if p.covariates else None


@torch.no_grad()
def denoising_errors(D: nn.Module, z: Tensor, sigmas: list[float], seed: int = 0, cond: Tensor | None = None) -> list:
    """Return, for each sigma, the root mean squared error of D on latents z (batch, channel, *cells) of other people.

    "blank": of the best guess that knows nothing but mean 0 and standard deviation 1, sigma / sqrt(1 + sigma^2).
    """
    noise, rows = randn(z.shape, z.dtype, Generator().manual_seed(seed)).to(z.device), []
    for sigma in sigmas:
        level = torch.full((len(z),), sigma, device=z.device)
        error = (D(z + sigma * noise, level, cond) - z).square().mean().sqrt().item()
        rows.append({"sigma": sigma, "error": round(error, 4), "blank": round(sigma / (1 + sigma**2) ** 0.5, 4)})
    return rows


def save_prior(result: TrainResult, space: LatentSpace, p: TrainLatent, errors: list) -> Path:
    """Return the folder <out>/prior/checkpoint: averaged weights in half precision, latent statistics, autoencoder."""
    record = _record(result, p, p.batch_size) | {"validation": errors}
    config = prior_config(p, space, open_dataset(project_root() / p.data))
    prior = LatentDenoiser(copy.deepcopy(result.ema).half(), space)
    return latent.save_prior(project_root() / p.out / "prior" / "checkpoint", prior, config, record)


# ---------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """A prior on the latents of an autoencoder, with all that is needed to draw volumes from it.

    D: denoiser of normalised latents (batch, *latent_shape), the prior's network inside. space: encode and decode.
    shape, voxel_mm: (z, y, x) of the volumes that it was trained on; affine: from their voxels (x, y, z) to mm.
    covariates: names of what D takes as cond, see `condition`; () for most priors.
    """

    D: LatentDenoiser
    config: dict

    @property
    def space(self) -> LatentSpace:
        return self.D.space

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.config["data"]["shape"])

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        return tuple(self.config["data"]["voxel_mm"])

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.config["data"]["affine"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        codec = self.space.codec
        return codec.latent_channels, *(n // codec.factor for n in self.shape)

    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Return normalised latents (batch, *latent_shape) of volumes (batch, 1, z, y, x) in [0, 1]."""
        return self.space.encode(x, tile=tile)

    def decode(self, z: Tensor, tile: int | None = None, batch: int = 4) -> Tensor:
        """Return volumes (batch, 1, z, y, x) of normalised latents, `batch` at a time; nothing is clipped."""
        return torch.cat([self.space.decode(part, tile=tile) for part in z.split(batch)])


def load_latent(name: str | os.PathLike = PRIOR, autoencoder: str | os.PathLike | None = None, device="cpu",
                autocast: str | None = "bfloat16") -> LatentPrior:
    """Return the prior of a checkpoint together with its autoencoder; raises ValueError if they do not belong together.

    autoencoder: its checkpoint, by default the one that the prior's config names.
    """
    config = weights.describe(name)
    codec = load_autoencoder(autoencoder or config.get("autoencoder", AUTOENCODER), device)
    return LatentPrior(latent.load_prior(name, codec, device, autocast), config)


def load_autoencoder(name: str | os.PathLike = AUTOENCODER, device="cpu") -> Codec:
    """Return the autoencoder of a checkpoint; raises ValueError for a checkpoint of something else."""
    codec = weights.load(name, device)
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, no autoencoder; give one such as {AUTOENCODER}")
    return codec
