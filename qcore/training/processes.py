"""Which of several processes this one is, as `torchrun` says, and how they add up what they found."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from qcore.canonical import Digest
from qcore.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process is number `rank` of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device


def join(device: str) -> Processes:
    """Return the place of this process, after it has joined the others; `leave` ends that.

    Args:
        device: "cpu", "cuda" or "auto": CUDA where there is one.

    Raises:
        ConfigError: there is no CUDA device, or nobody says where the other processes are.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here; allowed here: cpu, auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if world > 1 and not distributed.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(f"WORLD_SIZE is {world}, but MASTER_ADDR is not set; start all processes with torchrun")
        distributed.init_process_group("nccl" if cuda else "gloo")
    return Processes(rank=rank, world=world, device=chosen)


def leave() -> None:
    """Part from the other processes, if there are any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def of_first(value: Any, processes: Processes) -> Any:
    """Return what `value` is in the first process."""
    if processes.world == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def refuse_other_models(key: Digest, processes: Processes) -> None:
    """Refuse to train where processes do not hold the same model.

    Raises:
        ModelError: they do not, as where each measured latencies by its own clock.
    """
    if processes.world == 1:
        return
    keys: list[Digest] = [""] * processes.world
    distributed.all_gather_object(keys, key)
    if len(set(keys)) > 1:
        raise ModelError(
            "the processes made different models before training, as a budget of latency can bring about; allowed: the "
            "same; make the model smaller in one process, then train it in several"
        )


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
