"""The U-Net of EDM (Karras et al. 2022, the "ADM" architecture there): guided diffusion's, in smaller parts.

It is the U-Net of `unet.py` with residual blocks that resample and norms that the time embedding scales and
shifts. What it adds: fewer groups in narrow norms, heads counted from the width, a null class, label dropout,
and labels of the augmentation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from companion.networks.blocks import GroupNorm32, dtype_of, timestep_embedding, zero
from companion.networks.unet import UNet


def edm_norm(channels: int) -> GroupNorm32:
    """Returns group normalisation in 32 groups, or in groups of 4 channels where that gives fewer."""
    if channels < 4:
        raise ValueError(f"{channels} channels are too few to be normalised; make every width at least 4")
    return GroupNorm32(channels, min(32, channels // 4))


class EDMUNet(UNet):
    """Network (batch, in_channels, *space), t (batch,) -> (batch, out_channels, *space).

    Every image size works that is a multiple of `total_stride` = 2^(levels - 1) along each axis. The defaults
    are those of the published PET network, which has in_channels 2 (image and condition) and num_res_blocks 3.

    in_channels: channels of x plus those of cond.
    num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
    attention_resolutions: strides 1, 2, 4, ... of the levels with attention; the bottom block asks for it in
        any case. A level of C channels has C // head_channels heads, so a narrow one has no attention.
    emb_mult: width of the embedding over model_channels.
    num_classes: how many class labels y the network knows. It also works without a label (the null class);
        label_dropout is the probability that a label is dropped in training, so that it learns to.
    augment_dim: how many numbers say how a training image was augmented (see companion.data.augmentation); all
        zero, or absent, means not at all.
    """

    norm = staticmethod(edm_norm)

    def __init__(
        self,
        in_channels: int,
        model_channels: int = 128,
        out_channels: int = 1,
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (4, 8),
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        dropout: float = 0.13,
        emb_mult: int = 4,
        head_channels: int = 64,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
        dims: int = 2,
        use_checkpoint: bool = False,
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout}: expected a probability, from 0 to 1")
        if label_dropout and num_classes is None:
            raise ValueError(f"label_dropout={label_dropout} in a network without labels; give num_classes too")
        super().__init__(
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            channel_mult,
            dropout,
            dims=dims,
            num_classes=num_classes,
            use_checkpoint=use_checkpoint,
            num_head_channels=head_channels,
            use_scale_shift_norm=True,
            resblock_updown=True,
            emb_mult=emb_mult,
        )
        self.label_dropout, self.augment_dim = label_dropout, augment_dim
        if augment_dim:
            self.map_augment = zero(nn.Linear(augment_dim, model_channels, bias=False))

    def heads(self, width: int, num_heads: int, num_head_channels: int) -> tuple[int, int] | None:
        """Returns (num_heads, -1) of attention over `width` channels; None for a width below one head."""
        heads = width // num_head_channels
        return (heads, -1) if heads else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        y: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Returns (batch, out_channels, *space) for images x (batch, channel, *space) at times t (batch,).

        cond (batch or 1, channel, *space) is concatenated to x on channels. y: class labels (batch or 1,), or
        weights of the classes (batch or 1, num_classes), such as one-hot rows; None is the null class.
        augment (batch or 1, augment_dim): how x was augmented. Raises ValueError for shapes that the network
        was not built for.
        """
        if cond is not None:
            x = torch.cat([x, cond.to(x.dtype).expand(x.shape[0], *cond.shape[1:])], dim=1)
        self.check(x, t)
        return self.run(x, self.embed(t.expand(x.shape[0]), y, augment))

    def embed(self, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Returns embeddings (batch, emb_mult * model_channels) of times t (batch,) and of both labels."""
        features = timestep_embedding(t, self.model_channels).to(dtype_of(self.time_embed))
        if augment is not None:
            self.check_labels("augment", augment, len(t), self.augment_dim)
            features = features + self.map_augment(augment.to(features.dtype))
        emb = self.time_embed(features)
        return emb if y is None else emb + self.embed_class(y, len(t)).to(emb.dtype)

    def embed_class(self, y: Tensor, batch: int) -> Tensor:
        """Returns embeddings (batch or 1, emb_mult * model_channels) of labels; dropped ones are zero."""
        if y.ndim == 1:
            if self.num_classes is None or y.is_floating_point() or len(y) not in (1, batch):
                raise ValueError(
                    f"class labels y have shape {tuple(y.shape)} and type {y.dtype}; this network has "
                    f"num_classes={self.num_classes} and expects ({batch},) integers"
                )
            if ((y < 0) | (y >= self.num_classes)).any():
                raise ValueError(f"class labels y={y.tolist()} are not all in 0..{self.num_classes - 1}")
            labels = self.label_emb(y)
        else:
            self.check_labels("y", y, batch, self.num_classes or 0)
            labels = y.to(self.label_emb.weight.dtype) @ self.label_emb.weight
        if self.training and self.label_dropout:
            labels = labels.expand(batch, -1)
            labels = labels * (torch.rand(batch, 1, device=labels.device) >= self.label_dropout)
        return labels

    def check_labels(self, name: str, labels: Tensor, batch: int, width: int) -> None:
        """Raises ValueError unless labels are (batch or 1, width), with a width that the network has."""
        if labels.ndim != 2 or labels.shape[0] not in (1, batch) or labels.shape[1] != width or not width:
            option = "augment_dim" if name == "augment" else "num_classes"
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)}; this network, built with {option}="
                f"{width or None}, expects {f'({batch}, {width})' if width else 'none'}"
            )
