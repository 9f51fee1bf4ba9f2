"""Networks of MONAI, MAISI among them, under our names.

    config = describe(tensors)                # of MAISI's classes, whose names and shapes say what they are
    state_dict = translate(network, tensors)  # of any of them, for the network of that config

MONAI's AutoencoderKL and DiffusionModelUNet, also of monai-generative, and MAISI's AutoencoderKlMaisi and
DiffusionModelUNetMaisi [guo2025] are AutoencoderKL and DiffusionUNet here. A MAISI convolution that works in slabs is
the convolution; its norms in float16 are norms.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from companion.networks.autoencoder import AutoencoderKL
from companion.networks.diffusion_unet import DiffusionUNet

TOLD = ("top_region_index_layer", "bottom_region_index_layer", "spacing_layer")  # in the order in which cond has them
HEAD_CHANNELS = 32  # of MAISI's attention, which leaves no trace in the weights


def translate(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state_dict for `network` from that of MONAI's class; a VQVAE has MONAI's own names.

    Matrices of q, k and v become one in a U-Net; an attention without a last layer (include_fc=False) is given
    the identity. Otherwise tensors keep their values. load_state_dict says what does not fit.
    """
    if isinstance(network, AutoencoderKL):
        if _is_maisi(tensors):  # whose convolutions sit in two modules
            tensors = {re.sub(r"\.conv\.conv\.(\w+)$", r".conv.\1", name): x for name, x in tensors.items()}
        return _autoencoder(network, _with_projections(_apart(tensors)))
    if isinstance(network, DiffusionUNet):
        return _unet(network, _with_projections({_modern(name): x for name, x in _apart(tensors).items()}))
    return tensors


def _is_maisi(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of an AutoencoderKlMaisi."""
    return "encoder.blocks.0.conv.conv.weight" in tensors


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v apart where one matrix holds them (use_combined_linear=True)."""
    found = {}
    for name, x in tensors.items():
        if ".attn.qkv." in name:
            found |= {name.replace(".qkv.", f".to_{k}."): x for k, x in zip("qkv", x.chunk(3), strict=True)}
        else:
            found[name] = x
    return found


def _with_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The identity as the last layer of attentions that have none."""
    found = dict(tensors)
    for name, x in tensors.items():
        if name.endswith(".attn.to_v.weight") and (last := name.replace("to_v", "out_proj")) not in tensors:
            found[last] = torch.eye(len(x), dtype=x.dtype)
            found[last.replace("weight", "bias")] = x.new_zeros(len(x))
    return found


# ----------------------------------------------------------------------------------------------------
# Autoencoders

_LAYER = [  # patterns, one after the other, that change MONAI's names within a layer
    (r"^attn\.to_", ""),
    (r"^attn\.out_proj\.", "proj_out."),
    (r"^postconv\.", "conv."),
    (r"(^|\.)conv\.(weight|bias)$", r"\1\2"),  # every convolution of MONAI sits in a module of its own
]


def _autoencoder(model: AutoencoderKL, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MONAI numbers the layers in the order in which they run, and so can we.

    Its two 1x1 convolutions for mean and log variance are one here. Raises ValueError for names that fit no layer.
    """
    names = {module: name for name, module in model.named_modules()}
    homes = {}
    for part in ("encoder", "decoder"):
        layers = [layer for layer in getattr(model, part).layers() if any(True for _ in layer.parameters())]
        homes |= {f"{part}.blocks.{i}.": f"{names[layer]}." for i, layer in enumerate(layers)}
    homes["post_quant_conv.conv."] = "post_quant_conv."
    renamed = {}
    for name, x in tensors.items():
        if name.startswith(("quant_conv_mu.", "quant_conv_log_sigma.")):
            continue
        home = next((old for old in homes if name.startswith(old)), None)
        if home is None:
            raise ValueError(f"tensor {name} belongs to no layer of this AutoencoderKL; compare their options")
        rest = name.removeprefix(home)
        for pattern, replacement in _LAYER:
            rest = re.sub(pattern, replacement, rest)
        if re.match(r"(q|k|v|proj_out)\.weight$", rest):
            x = x.reshape(*x.shape, *[1] * model.dims)
        renamed[homes[home] + rest] = x
    for kind in ("weight", "bias"):
        parts = [tensors[f"quant_conv_{which}.conv.{kind}"] for which in ("mu", "log_sigma")]
        renamed[f"quant_conv.{kind}"] = torch.cat(parts)
    return renamed


# ----------------------------------------------------------------------------------------------------
# U-Nets

_BLOCK = {
    "norm1.": "in_layers.0.",
    "conv1.conv.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.conv.": "out_layers.3.",
    "skip_connection.conv.": "skip_connection.",
    "op.conv.": "op.",
    "postconv.conv.": "conv.",
    "attn.out_proj.": "proj_out.",
    "proj_in.conv.": "proj_in.",
    "proj_out.conv.": "proj_out.",
}
_TOP = {"conv_in.conv.": "input_blocks.0.0.", "out.2.conv.": "out.2.", "class_embedding.": "label_emb."}


def _unet(model: DiffusionUNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    told = [layer for layer in TOLD if f"{layer}.0.weight" in tensors]
    top = _TOP | {f"{layer}.": f"told.{i}." for i, layer in enumerate(told)}
    renamed = {}
    for name, x in tensors.items():
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        if ".attn.to_q." in name:
            x = torch.cat([tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
        new = _renamed(name, model, top)
        linear = new.endswith(("qkv.weight", "proj_out.weight")) and x.ndim == 2
        renamed[new] = x[:, :, None] if linear else x
    return renamed


def _modern(name: str) -> str:
    """The name of today of a tensor of monai-generative."""
    name = re.sub(r"(attentions\.\d+|attention)\.to_([qkv])\.", r"\1.attn.to_\2.", name)
    name = re.sub(r"(attentions\.\d+|attention)\.proj_attn\.", r"\1.attn.out_proj.", name)
    return name.replace(".to_out.0.", ".out_proj.").replace("upsampler.conv.conv.", "upsampler.postconv.conv.")


def _renamed(name: str, model: DiffusionUNet, top: Mapping[str, str]) -> str:
    for old, new in top.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    blocks = model.blocks
    if found := re.match(r"middle_block\.(resnet_1|attention|resnet_2)\.", name):
        home = f"middle_block.{('resnet_1', 'attention', 'resnet_2').index(found[1])}."
    elif found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsampler|upsampler)\.(?:(\d+)\.)?", name):
        way, level, kind = found[1], int(found[2]), found[3]
        in_order = blocks if way == "down" else blocks[::-1]
        i = sum(n + 1 for n in in_order[:level]) + int(found[4] or in_order[level])
        if way == "down":
            home = f"input_blocks.{1 + i}.{int(kind == 'attentions')}."
        else:
            place = {"resnets": 0, "attentions": 1, "upsampler": len(list(model.output_blocks[i].children())) - 1}[kind]
            home = f"output_blocks.{i}.{place}."
    else:
        return name
    rest = name[found.end() :].replace("attn.to_q.", "qkv.")
    old = next((old for old in _BLOCK if rest.startswith(old)), "")
    return home + _BLOCK.get(old, "") + rest.removeprefix(old)


# ----------------------------------------------------------------------------------------------------
# What the weights of MAISI say of their network


def describe(tensors: Mapping[str, Tensor]) -> dict:
    """The config of the AutoencoderKL or DiffusionUNet of MAISI's weights, read off names and shapes.

    Assumed, since it leaves no trace: norms in 32 groups, heads of 32 channels, upsampling "linear" of an autoencoder
    ("transposed" if use_convtranspose). Raises ValueError for other tensors, and by name for what is not supported:
    ControlNets, the AdaGN U-Net, attention to a context beside regions and spacing.
    """
    for part, what in {"controlnet_": "a ControlNet", "adagn_": "the AdaGN U-Net of masks"}.items():
        if any(name.startswith(part) for name in tensors):
            raise ValueError(f"its {part}... tensors are those of {what}, which is not supported")
    try:
        return _describe_autoencoder(tensors) if _is_maisi(tensors) else _describe_unet(tensors)
    except (KeyError, IndexError):
        raise ValueError("it holds neither MAISI's autoencoder nor its U-Net") from None


def _describe_autoencoder(tensors: Mapping[str, Tensor]) -> dict:
    levels, middle = _levels(tensors, "encoder")
    up, middle_up = _levels(tensors, "decoder")
    widths = [width for width, _, _ in levels]
    unit = math.gcd(*widths)
    first, last = tensors["encoder.blocks.0.conv.conv.weight"], f"decoder.blocks.{_count(tensors, 'decoder') - 1}"
    return {
        "name": "AutoencoderKL",
        "dims": first.ndim - 2,
        "in_channels": first.shape[1],
        "out_channels": tensors[f"{last}.conv.conv.weight"].shape[0],
        "channels": unit,
        "channel_mult": [width // unit for width in widths],
        "num_res_blocks": [blocks for _, blocks, _ in levels],
        "decoder_blocks": [blocks for _, blocks, _ in up[::-1]],
        "latent_channels": len(tensors["quant_conv_mu.conv.weight"]),
        "attention": [attends for _, _, attends in levels],
        "middle": [middle, middle_up],
        "double_z": False,
        "final_activation": False,
        "upsampling": "linear",
    }


def _count(tensors: Mapping[str, Tensor], part: str) -> int:
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith(f"{part}.blocks."))


def _levels(tensors: Mapping[str, Tensor], part: str) -> tuple[list[tuple[int, int, bool]], bool]:
    """(width, residual blocks, whether they are followed by attention) of each level as it runs; is there a middle?"""
    levels, middle, attends = [], False, False
    width, blocks = 0, 0
    for i in range(_count(tensors, part)):
        home = f"{part}.blocks.{i}."
        if f"{home}conv.conv.conv.weight" in tensors:
            levels.append((width, blocks, attends))
            blocks, attends = 0, False
        elif f"{home}conv1.conv.conv.weight" in tensors:
            width, blocks = len(tensors[f"{home}conv1.conv.conv.weight"]), blocks + 1
        elif f"{home}conv1.conv.weight" in tensors:
            middle = True  # its residual blocks are not MAISI's own, which tells them apart
        elif f"{home}norm.weight" in tensors and f"{part}.blocks.{i - 1}.conv1.conv.conv.weight" in tensors:
            attends = True
    return [*levels, (width, blocks, attends)], middle


def _describe_unet(tensors: Mapping[str, Tensor]) -> dict:
    tensors = {_modern(name): x for name, x in tensors.items()}
    count = 1 + max((int(f[1]) for name in tensors if (f := re.match(r"down_blocks\.(\d+)\.", name))), default=-1)
    found = [{name.removeprefix(f"down_blocks.{i}.") for name in tensors if name.startswith(f"down_blocks.{i}.")}
             for i in range(count)]  # fmt: skip
    first = tensors["conv_in.conv.weight"]
    config = {
        "name": "DiffusionUNet",
        "in_channels": first.shape[1],
        "out_channels": len(tensors["out.2.conv.weight"]),
        "channels": [len(tensors[f"down_blocks.{i}.resnets.0.conv1.conv.weight"]) for i in range(count)],
        "num_res_blocks": [len({n.split(".")[1] for n in names if n.startswith("resnets.")}) for names in found],
        "attention": [any(n.startswith("attentions.") for n in names) for names in found],
        "num_head_channels": HEAD_CHANNELS,
        "dims": first.ndim - 2,
        "resblock_updown": "downsampler.norm1.weight" in found[0],
        "told": [tensors[f"{layer}.0.weight"].shape[1] for layer in TOLD if f"{layer}.0.weight" in tensors],
        "told_scale": 100.0,  # MAISI gives its networks hundreds of region indices and of mm
    }
    if "class_embedding.weight" in tensors:
        config["num_classes"] = len(tensors["class_embedding.weight"])
    if any(".transformer_blocks." in name for name in tensors):
        raise ValueError("attention to a context (with_conditioning) beside MAISI's other inputs is not supported")
    return config
