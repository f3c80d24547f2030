"""Starts what the launcher asked for: one process, DistributedDataParallel, or DeepSpeed's engine.

with start(config) as backend:
    ...
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.options import Options
from model.precision import pick_device
from trainer.loop.backend import DDP, Backend
from trainer.loop.deepspeed import STAGES
from trainer.loop.launch import deepspeed_config


def _meeting_place(timeout: timedelta) -> dict:
    """Where the processes leave their addresses for each other, in the words of init_process_group.

    torchrun keeps its store over a restart (torch 2.13), with the addresses of the dead in it: who looks before its
    neighbour has written the new one calls a process that is gone, until the timeout. So each start gets names of its
    own. Over several nodes that cannot be done: their counts of restarts differ.
    """
    env = os.environ
    if "MASTER_ADDR" not in env:
        return dict(store=dist.HashStore(), rank=0, world_size=1)
    one_node = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if not one_node or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"start {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return dict(store=store, rank=rank, world_size=world)


@contextmanager
def start(config: Options):
    """The backend that the launcher asked for, for as long as the block lasts."""
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    sharded = config.backend == "deepspeed"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what is measured, too, is the current one
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not sharded:
        yield Backend(device)
        return
    kind = {"cuda": "nccl", "npu": "hccl"}.get(device.type, "gloo")
    timeout = timedelta(seconds=config.ddp_timeout)
    dist.init_process_group(kind, timeout=timeout, **_meeting_place(timeout))
    try:
        yield _sharded(device, timeout, config) if sharded else DDP(device, timeout)
    finally:
        dist.destroy_process_group()


def _sharded(device: torch.device, timeout: timedelta, config: Options) -> Backend:
    merged = deepspeed_config(config, dist.get_world_size())
    return STAGES[merged["zero_optimization"]["stage"]](device, merged, timeout)
