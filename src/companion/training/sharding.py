"""Training in shards (FSDP): each process keeps its part of weights, gradients, averages and the optimiser's moments.

Blocks of the network are put together when they are needed and let go afterwards. A step is the one of `loop`: what the
optimiser and the average do is elementwise, so they work on the local parts alone. Checkpoints are whole, the same as
without shards: a training may go on with another number of processes, or with none but one.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from companion.training import loop


class ShardedState(loop._State):
    """`loop._State`, the network in shards; `ema`, and the model of the result, are whole, in the host's memory.

    Weights stay contiguous, whatever `channels_last` says: FSDP takes no others.
    """

    def __init__(self, model: nn.Module, config: loop.TrainConfig, here: loop._Here):
        self.model = model.to(here.device).train()
        for tensor in model.state_dict().values():
            here.share(tensor)
        self.ema = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.whole = copy.deepcopy(model).cpu()
        self.device = here.device
        _shard(model, here)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.sharded = {name: p for name, p in self.named.items() if isinstance(p, DTensor)}
        local = {name: nn.Parameter(p.to_local().detach()) for name, p in self.sharded.items()}
        self.parameters = [local.get(name, p) for name, p in self.named.items()]
        alone = [p for name, p in self.named.items() if name not in local]
        self.gradient = loop._flat_gradient(alone) if alone else torch.zeros(0, device=here.device)
        self.local = local
        self.average = [p.detach().clone() for p in self.parameters]
        self.slopes: list[Tensor] = []  # the local gradients of what is sharded
        self.optimiser = loop._OPTIMISERS[config.optimiser](
            self.parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay
        )
        self.moments: dict[str, Tensor] = {}
        self.record = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "count": 0, "loss": math.nan}

    def zero(self) -> None:
        super().zero()
        for p in self.sharded.values():
            p.grad = None

    def collect(self, here: loop._Here) -> None:
        super().collect(here)  # of what lies outside of the network; FSDP has summed the shards'
        self.slopes = []
        for name, p in self.sharded.items():
            part = self.local[name]
            slope = p.grad.to_local() if isinstance(p.grad, DTensor) else torch.zeros_like(part)
            part.grad = slope
            self.slopes.append(slope)

    def norm(self, here: loop._Here) -> float:
        squares = torch.stack([slope.double().square().sum() for slope in self.slopes]).sum()
        here.add(squares)
        return (squares + self.gradient.double().square().sum()).sqrt().item()

    def scale(self, factor: float) -> None:
        super().scale(factor)
        for slope in self.slopes:
            slope.mul_(factor)

    @torch.no_grad()
    def update(self, config: loop.TrainConfig) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimiser.step()
        for average, p in zip(self.average, self.parameters, strict=True):
            average.lerp_(p, 1 - config.ema_beta(self.step))

    @torch.no_grad()
    def gather(self) -> None:
        """Put model, average and moments together; every process takes part."""
        targets = [dict(module.named_parameters()) for module in (self.whole, self.ema)]
        self.moments = {}
        for i, (name, p) in enumerate(zip(self.named, self.parameters, strict=True)):
            targets[0][name].copy_(self._whole(name, p))
            targets[1][name].copy_(self._whole(name, self.average[i]))
            for quantity, value in self.optimiser.state.get(p, {}).items():
                value = self._whole(name, value) if value.shape == p.shape and value.ndim else value
                self.moments[f"optimiser.{i}.{quantity}"] = torch.as_tensor(value).cpu()
        for module in (self.whole, self.ema):
            for mine, theirs in zip(module.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.whole.state_dict().items()}
        return tensors | {f"ema.{k}": v for k, v in self.ema.state_dict().items()} | self.moments

    @torch.no_grad()
    def restore(self, model: dict, ema: dict, moments: dict[int, dict[str, Tensor]]) -> None:
        self.whole.load_state_dict(model)
        self.ema.load_state_dict(ema)
        for mine, theirs in zip(self.model.buffers(), self.whole.buffers(), strict=True):
            mine.copy_(theirs)
        for i, (name, p) in enumerate(zip(self.named, self.parameters, strict=True)):
            p.copy_(self._part(name, model[name]))
            self.average[i].copy_(self._part(name, ema[name]))
            for quantity, value in moments.get(i, {}).items():
                if value.shape == self.named[name].shape and value.ndim:
                    moments[i][quantity] = self._part(name, value)
        self.resume(moments)

    def release(self) -> None:
        self.whole.eval()
        for p in (*self.parameters, *self.sharded.values()):
            p.grad = None

    def result(self, folder, config: loop.TrainConfig) -> loop.TrainResult:
        self.gather()
        self.release()
        model, ema = self.whole.to(self.device), self.ema.to(self.device)
        return loop.TrainResult(model, ema, folder, self.step, config.steps, self.seconds, self.record["loss"])

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter, or what belongs to each of its elements, from the parts of all processes."""
        if name not in self.sharded:
            return part
        like = self.sharded[name]
        parts = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return parts.full_tensor()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        if name not in self.sharded:
            return whole.to(self.device)
        like = self.sharded[name]
        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements).to_local()


def _shard(model: nn.Module, here: loop._Here) -> None:
    """Shard, in place, the network inside a denoiser: its blocks (what lists of modules hold), and what is left."""
    network = loop._inner(model)
    mesh = init_device_mesh(here.device.type, (here.world,))
    for module in list(network.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                if not isinstance(block, (nn.ModuleList, nn.ModuleDict)) and any(p.numel() for p in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are already divided by the size of the whole batch
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
