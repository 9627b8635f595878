"""Which of several processes this one is, as `torchrun` says, and how they add up what they found."""

import os
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process is number `rank` of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device


def join(device: str) -> Processes:
    """Return the place of this process, after it has joined the others.

    Args:
        device: "cpu", "cuda" or "auto": CUDA where there is one.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo")
    return Processes(rank=rank, world=world, device=chosen)


def add_gradients(parameters: list[torch.nn.Parameter], processes: Processes) -> None:
    """Put the sum over all processes, divided by their number, in place of each gradient."""
    if processes.world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    distributed.all_reduce(flat)
    flat /= processes.world
    start = 0
    for g in grads:
        g.copy_(flat[start : start + g.numel()].reshape(g.shape))
        start += g.numel()


def add_up(values: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Return the sum of `values` over all processes."""
    if processes.world > 1:
        distributed.all_reduce(values)
    return values
