"""Joins the processes that the launcher started: one process, DistributedDataParallel, or DeepSpeed's engine.

with start(config) as backend:
    ...
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.console import UserError
from common.options import Options
from model.precision import pick_device, pick_dtype
from trainer.loop.backend import DDP, Backend
from trainer.loop.deepspeed import STAGES
from trainer.loop.launch import deepspeed_config


def _rendezvous(timeout: timedelta) -> dict:
    """Where the processes find each other's addresses: arguments of init_process_group.

    torchrun keeps its store when it restarts the processes (torch 2.13), so the addresses of the dead ones are still in
    it. A process that reads such an address, before the new one is written, waits for a dead process until the timeout.
    So the keys of each start get a prefix of their own. On several nodes this is not possible, as each node counts its
    restarts by itself.
    """
    env = os.environ
    if "MASTER_ADDR" not in env:
        return dict(store=dist.HashStore(), rank=0, world_size=1)
    one_node = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if not one_node or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # torch for Windows is built without libuv and says so with an error (torch 2.13)
    libuv = env.get("USE_LIBUV", "0" if sys.platform == "win32" else "1") == "1"
    store = dist.TCPStore(*address, world, is_master=False, timeout=timeout, use_libuv=libuv)
    store = dist.PrefixStore(f"start {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return dict(store=store, rank=rank, world_size=world)


@contextmanager
def start(config: Options):
    """Context with the backend that the launcher asked for; the process group ends with it."""
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    by_deepspeed = config.backend == "deepspeed"
    check_launcher()
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1))  # torchrun's, DeepSpeed's
    if device.type != "cpu" and ":" in config.device and together > 1:  # NCCL refuses it, unclearly
        raise UserError(
            f"--device {config.device}: {together} processes would share this card; give --device {device.type}, then "
            "each takes its own (CUDA_VISIBLE_DEVICES chooses among them)"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # memory is measured on the current device
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not by_deepspeed:
        yield Backend(device)
        return
    kind = {"cuda": "nccl", "npu": "hccl"}.get(device.type, "gloo")
    if kind == "nccl" and not dist.is_nccl_available():  # Windows
        kind = "gloo"
    timeout = timedelta(seconds=config.ddp_timeout)
    bound = dict(device_id=device) if kind == "nccl" else {}  # else torch guesses it at each barrier, and warns
    try:
        dist.init_process_group(kind, timeout=timeout, **bound, **_rendezvous(timeout))
    except dist.DistError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in reason:
            raise UserError(f"another program listens at {where}; give the launcher another --master_port") from error
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE', 1)} processes did not find each other at {where} within --ddp_timeout "
            f"{config.ddp_timeout:g} seconds ({reason[:160]}); if one has ended, its own message says why"
        ) from error
    end = dist.destroy_process_group
    try:
        backend = _deepspeed(device, timeout, config) if by_deepspeed else DDP(device, timeout)
        check_precision(config, backend)
        yield backend
    except Exception:
        # NCCL's usual end waits until all that was begun is done, and with a process that is dead it never is. The
        # error's message would wait too, and the launcher would kill this process before it is printed.
        end = dist.distributed_c10d._abort_process_group if kind == "nccl" else end
        raise
    finally:
        end()


def check_launcher() -> None:
    """Processes that srun or mpirun has started do not know of each other: each would be a run of its own, on the same
    card, and they would overwrite each other's files."""
    env = os.environ
    for name, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        if "WORLD_SIZE" not in env and (count := env.get(variable, "1")) != "1":
            raise UserError(
                f"{name} has started {count} processes ({variable}), and none knows of the others: let it start one "
                "torchrun a machine, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each; if "
                "they are to be runs of their own, set WORLD_SIZE=1"
            )


def check_precision(config: Options, backend: Backend) -> None:
    """fp16 on some ranks only is an error: these scale their loss, the others do not, and the gradients are averaged.
    Cards of two kinds come to it, as each process looks at its own."""
    own = str(pick_dtype(config.dtype, backend.device)[0]).removeprefix("torch.")
    found = backend.gather_objects(own)
    if "float16" in found and len(set(found)) > 1:
        ranks = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(found))
        raise UserError(f"--dtype {config.dtype}: the cards differ ({ranks}); give --dtype float16, which all have")


def _deepspeed(device: torch.device, timeout: timedelta, config: Options) -> Backend:
    merged = deepspeed_config(config, dist.get_world_size())
    return STAGES[merged["zero_optimization"]["stage"]](device, merged, timeout)
