"""Processes that the launcher started, and the cards that they take."""

import socket
from types import SimpleNamespace

import pytest
import torch

from common.console import UserError
from trainer.loop import processes


@pytest.mark.parametrize("name", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
def test_two_processes_do_not_share_one_card(name, monkeypatch):
    """`torchrun --nproc_per_node 2 ... --device cuda:0` put both on one card: NCCL's "invalid usage" was taken for a
    process that had ended."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(processes, "pick_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(UserError, match="--device cuda:0: 2 processes would share this card; give --device cuda,"):
        with processes.start(SimpleNamespace(device="cuda:0", backend="ddp", ddp_timeout=1)):
            pass


@pytest.mark.parametrize("name", ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
def test_processes_that_do_not_know_of_each_other_are_refused(name, monkeypatch):
    """`srun -n 4 python trainer/train_pretrain.py`: four runs on one card, which overwrote each other's files."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=f"has started 4 processes .{name}., and none knows of the others"):
        with processes.start(SimpleNamespace(device="cpu", backend="auto", ddp_timeout=1)):
            pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.start(SimpleNamespace(device="cpu", backend="auto", ddp_timeout=1)) as backend:
        assert backend.world == 1


def test_a_start_that_fails_is_explained(monkeypatch):
    """A port that is taken, and a process that does not come (its card was not there), ended in a traceback."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)).items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(device="cpu", backend="ddp", ddp_timeout=1)
    with taken, pytest.raises(UserError, match=f"another program listens at 127.0.0.1:{port}; .* --master_port"):
        with processes.start(config):
            pass
    with pytest.raises(UserError, match=f"the 2 processes did not find each other at 127.0.0.1:{port} within"):
        with processes.start(config):
            pass


def test_after_an_error_nccl_is_not_waited_for(monkeypatch):
    """destroy_process_group waits for what the cards exchange. With a dead process it waited until the launcher killed
    the one that was left, before it could say why it ended."""
    ended = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(processes.torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(processes.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(processes.dist.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    monkeypatch.setattr(processes, "DDP", lambda *_: None)
    monkeypatch.setattr(processes, "check_precision", lambda *_: None)
    config = SimpleNamespace(device="cuda", backend="ddp", ddp_timeout=1)
    with pytest.raises(UserError, match="no memory"), processes.start(config):
        raise UserError("no memory")
    with pytest.raises(SystemExit), processes.start(config):  # after a signal all ranks end together
        raise SystemExit(143)
    assert ended == ["aborted", "destroyed"]


@pytest.mark.parametrize(
    ("found", "fine"),
    (
        (("bfloat16", "float16"), False),  # a 3060 and a 2060: one scaled its loss by 2^14, the other did not
        (("float16", "float32"), False),
        (("float16", "float16"), True),
        (("bfloat16", "float32"), True),  # two kinds of CPUs: no loss is scaled
    ),
)
def test_cards_of_two_kinds_do_not_mix_scaled_and_other_gradients(found, fine, monkeypatch):
    """Each process took the best precision of its own card, and the gradients were averaged, scaled or not."""
    monkeypatch.setattr(processes, "pick_dtype", lambda *_: (torch.bfloat16, ""))
    backend = SimpleNamespace(device=torch.device("cpu"), gather_objects=lambda own: list(found))
    check = lambda: processes.check_precision(SimpleNamespace(dtype="auto"), backend)
    if fine:
        check()
        return
    with pytest.raises(UserError, match=rf"rank 0 {found[0]}, rank 1 {found[1]}\); give --dtype float16"):
        check()
