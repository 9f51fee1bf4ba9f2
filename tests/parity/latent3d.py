"""Cases of synthetic 3D brains: VQ-VAEs, a gradient-trained codebook, an autoencoder, a U-Net, schedulers.

The published code is TensorFlow that rewrote MONAI; MONAI's own layers are the reference.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.latent import statistics
from companion.diffusion.noise import DiscreteSchedule
from companion.networks import VQVAE, AutoencoderKL, DiffusionUNet, VQModel, autoencoder, monai
from companion.networks.vqvae import Quantizer

from .ledger import Case, Tensors, handles

ROUNDED = 3e-4  # what rounding of MONAI's tables to float32 does to a step, at worst


def kind(case: Case) -> str:
    """The class that the manifest names."""
    made = case.spec.get("constructor")
    return str(made.get("cls", "")).rsplit(".", 1)[-1] if isinstance(made, dict) else ""


def tolerance(case: Case) -> float:
    """The number that the manifest gives for this case."""
    return max(case.spec.get("tolerance", {"abs": 1e-4}).values())


def opened(case: Case) -> Tensors:
    """The inputs and outputs of a case, which lie in a file of their own; the ledger keeps count of them."""
    case.io = Tensors(case.folder.tensors(case.spec["io"]))
    return case.io


def weights(case: Case) -> dict[str, Tensor]:
    """The reference's state_dict: from its file, or by formula for shapes in the manifest."""
    if "shapes" in case.spec:
        return filled(case.spec["shapes"])
    return {name: x.float() for name, x in case.strip("").items()}


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights by formula, the same anywhere: sines of the position, counted through the sorted names."""
    start, out = 0, {}
    for name, shape in sorted(shapes.items()):
        k = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
        start += len(k)
        values = torch.sin(0.7 * k + 0.3 * torch.sin(1.9 * k))
        if "embedding" not in name and "ema" not in name:
            values = values * (1.5 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3)
        if len(shape) == 1 and name.endswith("weight") or "cluster_size" in name:
            values = values + 1  # of norms, and counts
        out[name] = values.reshape(shape).float()
    return out


# --- VQ-VAE


@handles(lambda case: kind(case) == "VQVAE")
def vqvae(case: Case) -> Iterator[tuple]:
    options = {k: v for k, v in case.spec["constructor"].items() if k not in ("cls", "ddp_sync", "spatial_dims")}
    close = tolerance(case)
    with torch.inference_mode(False), torch.enable_grad():
        codec = VQVAE(dims=case.spec["constructor"]["spatial_dims"], **options).eval()
        codec.load_state_dict({name: x.clone() for name, x in weights(case).items()})
        io = opened(case)
        x = io["x"].clone()
        out = codec(x)
        (((out.x_hat - x) ** 2).mean() + out.regulariser.mean()).backward()
        gradient = codec.encoder.blocks[0].conv.weight.grad
    parameters = sum(p.numel() for p in codec.parameters())
    yield "parameters", parameters, case.spec["n_params"], 0.0
    z = codec.encode(x)
    q = codec.quantize(z)
    yield "z", z, io["z"], close
    yield "z_q", q.z_q, io["z_q"], close
    yield "indices", q.indices, io["indices"], 0.0
    yield "indices of x", codec.indices(x), io["indices"], 0.0
    yield "vq_loss", q.loss.mean()[None], io["vq_loss"], close
    yield "perplexity", q.perplexity[None], io["perplexity"], close
    yield "decoded", codec.decode_indices(io["indices"]), io["decoded"], close
    yield "recon", out.x_hat, io["recon"], close
    yield "recon_l1", (out.x_hat - x).abs().mean()[None], io["recon_l1"], close
    yield "recon_mse", (out.x_hat - x).square().mean()[None], io["recon_mse"], close
    yield "grad_first", gradient, io["grad_first"], close
    yield "decoded in tiles", codec.decode(q.z_q, tile=2, overlap=14), io["recon"], close
    codec.train()
    yield "train_vq_loss", codec(x).regulariser.mean()[None], io["train_vq_loss"], close
    codebook = codec.quantizer["quantizer"]
    yield "ema_codebook_after", codebook.embedding.weight, io["ema_codebook_after"], close
    yield "ema_w_after", codebook.ema_w, io["ema_w_after"], close
    yield "ema_cluster_size_after", codebook.ema_cluster_size, io["ema_cluster_size_after"], close


@handles(lambda case: "gradient-trained codebook" in case.spec.get("what", ""))
def gradient_codebook(case: Case) -> Iterator[tuple]:
    io, close = case.io, tolerance(case)
    with torch.inference_mode(False), torch.enable_grad():
        quantizer = Quantizer(io["embeddings"].shape[1], io["embeddings"].shape[0]).double().eval()
        quantizer.embedding.weight.data.copy_(io["embeddings"].T)
        z = io["z"].movedim(-1, 1).clone().requires_grad_()
        q = quantizer(z)
        gradient = torch.autograd.grad(q.loss.mean(), z)[0].movedim(1, -1)
    yield "indices", q.indices, io["indices"], 0.0
    yield "quantized", q.z_q.movedim(1, -1), io["quantized"], close
    yield "total", q.loss.mean(), io["total"], close
    for name, weight in ("codebook_loss", 1.0), ("commitment_loss", quantizer.commitment):
        yield name, weight * (q.z_q - z).square().mean(), io[name], close
    yield "grad_z_from_vq", gradient, io["grad_z_from_vq"], close


# --- autoencoders and U-Net


@handles(lambda case: kind(case) == "AutoencoderKL")
def autoencoder_kl(case: Case) -> Iterator[tuple]:
    c, close = case.spec["constructor"], tolerance(case)
    channels, blocks = c["channels"], c["num_res_blocks"]
    codec = AutoencoderKL(
        c["spatial_dims"],
        c["in_channels"],
        c["out_channels"],
        channels[0],
        [Fraction(width, channels[0]) for width in channels],
        blocks,
        c["latent_channels"],
        decoder_blocks=blocks,
        attention=c["attention_levels"],
        middle=tuple(c.get(f"with_{part}_nonlocal_attn", True) for part in ("encoder", "decoder")),
        norm_groups=c["norm_num_groups"],
        double_z=False,
        final_activation=False,
    ).eval()
    codec.load_state_dict(monai.translate(codec, weights(case)))
    io = opened(case)
    yield "parameters", sum(p.numel() for p in codec.parameters()), case.spec["n_params"], 0.0
    mean, std = codec.posterior(io["x"])
    yield "mu", mean, io["mu"], close
    yield "mu (encode)", codec.encode(io["x"]), io["mu"], close
    yield "sigma", std, io["sigma"], close
    yield "decoded_mu", codec.decode(mean), io["decoded_mu"], close
    yield "kl", codec(io["x"]).regulariser.mean()[None], io["kl"], close
    yield "scale_factor", 1 / statistics([mean.reshape(1, 1, -1)])[1], io["scale_factor"], close


@handles(lambda case: kind(case) == "DiffusionModelUNet")
def diffusion_model_unet(case: Case) -> Iterator[tuple]:
    c = case.spec["constructor"]
    network = DiffusionUNet(
        c["in_channels"],
        c["out_channels"],
        c["channels"],
        c["num_res_blocks"],
        c["attention_levels"],
        c["num_head_channels"],
        c["norm_num_groups"],
        c["spatial_dims"],
        num_classes=c.get("num_class_embeds"),
        resblock_updown=c.get("resblock_updown", False),
    ).eval()
    network.load_state_dict(monai.translate(network, weights(case)))
    io = opened(case)
    yield "parameters", sum(p.numel() for p in network.parameters()), case.spec["n_params"], 0.0
    labels = {"y": io["class_labels"]} if "class_labels" in io else {}
    yield "y", network(io["x"], io["t"], **labels), io["y"], tolerance(case)


# --- the autoencoders of cine, against diffusers


@handles(lambda case: case.spec.get("codec") in ("AutoencoderKL", "VQModel"))
def cine_codec(case: Case) -> Iterator[tuple]:
    io, close = opened(case), tolerance(case)
    codec = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}[case.spec["codec"]](**case.spec["options"]).eval()
    codec.load_state_dict(autoencoder.published(weights(case)))
    if case.spec["codec"] == "AutoencoderKL":
        z, std = codec.posterior(io["x"])
        yield "std", std, io["std"], close
    else:
        z = codec.encode(io["x"])
        yield "z_q", codec.quantize(z).z_q, io["z_q"], close
        yield "quantised, decoded", codec(io["x"]).x_hat, io["decoded_z_q"], close
    yield "z", z, io["z"], close
    yield "decoded", codec.decode(z), io["decoded"], close


# --- schedulers


@handles(lambda case: "MONAI scheduler" in case.spec.get("what", "") and "cases" in case.spec)
def schedulers(case: Case) -> Iterator[tuple]:
    for spec in case.spec["cases"]:
        yield from (ddpm if spec["cls"] == "DDPMScheduler" else ddim)(case, spec)


def process_of(spec: dict, schedule: DiscreteSchedule, clip: bool) -> DiscreteProcess:
    prediction = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}[spec["prediction_type"]]
    return DiscreteProcess(schedule, prediction, spec.get("variance_type", "fixed_small"), (-1, 1) if clip else None)


def schedule_of(spec: dict) -> DiscreteSchedule:
    make = {"linear_beta": DiscreteSchedule.linear, "scaled_linear_beta": DiscreteSchedule.scaled_linear}
    return make[spec["schedule"]](spec["num_train_timesteps"], spec["beta_start"], spec["beta_end"])


class SinglePrecision(DiscreteSchedule):
    """A schedule whose tables are rounded to float32 before the steps use them, as MONAI's are.

    At t = 0 that is not a matter of the last digit: 1 - abar is 1e-4 there, known to three digits.
    """

    def __post_init__(self):
        super().__post_init__()
        betas = self.betas.float()
        object.__setattr__(self, "betas", betas.double())
        self.__dict__["alphas_cumprod"] = torch.cumprod(1 - betas, 0).double()


def chain(case: Case, spec: dict, step, close: float, note: str = "") -> Iterator[tuple]:
    """The recorded steps from `start`: step(output, x, t, noise) -> (x of before, x0)."""
    key, io = spec["key"], case.io
    respaced = schedule_of(spec).respace(f"ddim{spec['num_inference_steps']}").timesteps.flip(0)
    yield f"{key}.timesteps", torch.cat([respaced[:3], respaced[-1:]]), spec["timesteps"], 0.0
    if "all_timesteps_head" in spec:
        head = spec["all_timesteps_head"]
        yield f"{key}.all_timesteps_head", respaced[: len(head)], head, 0.0
    x = io[f"{key}.start"]
    for j, t in enumerate(spec["timesteps"]):
        x, x0 = step(io[f"{key}.step{j}.out"], x, torch.tensor([t]), io[f"{key}.step{j}.rand"])
        yield f"{key}.step{j}.prev{note}", x, io[f"{key}.step{j}.prev"], close
        yield f"{key}.step{j}.x0{note}", x0, io[f"{key}.step{j}.x0"], close


def ddpm(case: Case, spec: dict) -> Iterator[tuple]:
    """Ancestral steps as MONAI takes them: always to t - 1, even where steps are skipped."""
    key, io, close, schedule = spec["key"], case.io, tolerance(case), schedule_of(spec)
    yield f"{key}.betas", schedule.betas, io[f"{key}.betas"], close
    x0, noise, t = io[f"{key}.x0"], io[f"{key}.noise"], torch.tensor([spec["add_noise_t"]])
    yield f"{key}.xt", schedule.q_sample(x0, t, noise), io[f"{key}.xt"], close
    velocity = DiscreteProcess(schedule, "v").target(x0, t, noise)
    yield f"{key}.velocity", velocity, io[f"{key}.velocity"], close
    for tables, within, note in (SinglePrecision(schedule.betas), close, ""), (schedule, ROUNDED, " (float64)"):
        process = process_of(spec, tables, spec["clip_sample"])

        def step(output, x, t, noise, process=process):
            return process.step(output, x, t, noise), process.x0_hat(output, x, t)

        yield from chain(case, spec, step, within, note)


def ddim(case: Case, spec: dict) -> Iterator[tuple]:
    full = schedule_of(spec)
    schedule = full.respace(f"ddim{spec['num_inference_steps']}")
    process = process_of(spec, schedule, clip=False)
    stride = len(full) // spec["num_inference_steps"]

    def step(output, x, t, noise):
        i = t // stride
        free = process.x0_hat(output, x, i)
        x0 = free.clamp(-1, 1) if spec["clip_sample"] else free
        if t == 0 and not spec["set_alpha_to_one"]:
            return x, x0  # from abar_0 to abar_0: nowhere, with any eta
        # MONAI clips x0 but keeps the noise of the unclipped one; our own step derives it from the clipped x0.
        shift = schedule.at(schedule.alphas_cumprod_prev.sqrt(), i, x) * (x0 - free)
        return process.ddim_step(output, x, i, noise, spec["eta"]) + shift, x0

    yield from chain(case, spec, step, tolerance(case))
