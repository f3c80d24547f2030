"""States that a killed run continues from, bit for bit.

    <save_dir>/resume/<name>_<hidden>[_moe]/<run_id>/step_00000500/
        weights.safetensors  optimizer.safetensors  ranks.safetensors  state.json  manifest.json

Tensors are full, fp32 and filed by parameter name. There is no pickle anywhere. The folder of a state has its name only
once all of it is on the disk (common/files.py), and its manifest has the size and SHA-256 of every file. Reading takes
the newest state that its manifest confirms; a broken one is named and set aside.

An older state is removed only once the newer one is on the disk. None is ever overwritten: saving the same step again
makes step_00000500.1, and a run that continues from another state than its newest one becomes a run of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.console import UserError
from common.files import atomic_folder, remove_folder, sweep
from common.manifest import number_of, problem, states_in, write_manifest
from common.values import show
from model.checkpoint import read_plain, same_weights
from trainer.stage import StageConfig

KEPT = 2  # states of a run that goes on, where --keep_last does not say otherwise

# Options that a continued run may not change: it would be another run
FIXED = ("seed", "max_seq_len", "optimizer", "val_fraction", "data_limit")
WEIGHTS = ("parent", "teacher")  # parts of the identity that are hashes of weights
RULE = (
    "a continued run keeps its stage, architecture, data (and how it was tokenised), tokenizer, parent weights, "
    f"{', '.join(FIXED)} and the examples of a step (batch_size x accumulation_steps x processes); the rest may "
    "change, learning_rate and epochs for instance"
)


def save_state(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep_last: int) -> Path:
    """Writes <folder>/step_<n> from {"weights": {name: tensor}, ...} and plain values; then removes all but the newest
    `keep_last` states. Returns the new state's folder."""
    again = [number[1] for path in states_in(folder) if (number := number_of(path)) and number[0] == step]
    final = folder / (f"step_{step:08d}" + (f".{again[-1] + 1}" if again else ""))
    write_state(final, tensors, state)
    keep_newest(folder, keep_last)
    return final


def save_sound(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep_last: int) -> Path:
    """As `save_state`; but a state that nobody can continue from must not replace a good one."""
    refuse_infinite(tensors)
    return save_state(folder, step, tensors, state, keep_last)


def keep_newest(folder: Path, states: int) -> None:
    """Removes all states in a run's folder but the newest."""
    for old in states_in(folder)[:-states]:
        remove_folder(old)


def write_state(path: Path, tensors: dict[str, dict[str, Tensor]], values: dict) -> None:
    """Makes the folder `path`: a .safetensors file for each entry of `tensors`, state.json, and last the manifest.

    Tensors that lie in the processor's memory are not copied. Those of a GPU are, one file's at a time.
    """
    with atomic_folder(path) as folder:
        for name, content in tensors.items():
            content = {key: tensor.detach().contiguous() for key, tensor in content.items()}
            save_file(content, folder / f"{name}.safetensors", metadata={"format": "pt"})
        with open(folder / "state.json", "wb") as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=False).encode())
        write_manifest(folder, [*(f"{name}.safetensors" for name in tensors), "state.json"])


def random_state(device: torch.device) -> Tensor:
    """(bytes,) of the processor's generator, then of the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    cpu, gpu = state.tensor_split([torch.get_rng_state().numel()])
    torch.set_rng_state(cpu.clone())  # it needs an aligned address
    if device.type == "cuda" and len(gpu):
        torch.cuda.set_rng_state(gpu.clone(), device)


@contextmanager
def rollback_interrupted_step(device: torch.device, received: list[int], alone: bool):
    """Undoes a step that Ctrl-C interrupts, by setting the random state back.

    The terminal sends Ctrl-C to the compiler processes of torch.compile, too, which then fail. After Ctrl-C (`received`
    is not empty) in a run of one process (`alone`), such an error is put into the list that is yielded, not raised.
    """
    failed: list[Exception] = []
    before = random_state(device) if alone else None
    try:
        yield failed
    except Exception as error:
        if before is None or not received:
            raise
        set_random_state(before, device)
        failed.append(error)


def refuse_infinite(tensors: dict[str, dict[str, Tensor]]) -> None:
    """UserError if a tensor has NaN or infinity."""
    for kind, content in tensors.items():
        for name, tensor in content.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{kind} {name} is no longer finite, so nothing was saved; continue from the state before, with "
                    "--from_resume auto and a lower --learning_rate"
                )


def newest_state(folder: Path, say=print) -> Path | None:
    """The newest whole state in a run's folder, None if there is none. Broken ones are named and set aside."""
    for path in reversed(states_in(folder)):
        reason = problem(path)
        if reason is None:
            return path
        aside = path.with_name(f"broken-{path.name}")  # kept for whoever wants to look; it no longer counts
        try:
            os.rename(path, aside)
            say(f"{path}: {reason}; trying the one before ({aside.name} is what is left of it)")
        except OSError:
            say(f"{path}: {reason}; trying the one before")
    return None


def is_newest(state: Path) -> bool:
    """Whether its run has no newer state."""
    return state == states_in(state.parent)[-1]


def clean(states: Path, *folders: Path) -> None:
    """Removes what killed saves left, in `folders` and in the folders of the runs below `states`."""
    for folder in (*folders, *states.glob("*")):
        sweep(folder)


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The inverse of `save_state`."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, read_values(path)


def read_values(path: Path) -> dict:
    """Only the plain values of a state."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def with_recipe_of(state: Path, config: StageConfig) -> StageConfig:
    """A continued run keeps its recipe, unless the user names one: the default may be another today."""
    values = read_values(state)
    config = config.with_recipe(values["config"].get("recipe", "classic"))  # before there were recipes, it was this one
    optimizer = values["identity"]["optimizer"]
    if config.optimizer != optimizer:  # the run began with an optimiser that is not its recipe's
        raise UserError(f"--from_resume {state}: this run was started with --optimizer {optimizer}; give it again")
    if problems := config.problems():  # of the recipe with what the user has given: --zero_stage, for instance
        raise UserError(f"--from_resume {state}: {'; '.join(problems)}")
    return config


def with_batch_of(state: Path, config: StageConfig, world: int, say: Callable[[str], None]) -> StageConfig:
    """With as many micro-batches in a step that it has the examples (batch_size x accumulation_steps x processes) of
    the state, also when the number of processes has changed."""
    examples, at_once = read_values(state)["examples"], config.batch_size * world
    if examples % at_once:
        fit = [str(size) for size in range(1, examples // world + 1) if examples % (size * world) == 0]
        way = f"give --batch_size {' or '.join(fit[-4:])}" if fit else "start it with a number of processes that does"
        raise UserError(
            f"--batch_size {config.batch_size} x {world} processes does not divide the {examples} examples of a step "
            f"in {state}; {way}, or begin afresh without --from_resume"
        )
    needed = examples // at_once
    if needed != config.accumulation_steps:
        say(
            f"--accumulation_steps {needed} instead of {config.accumulation_steps}: a continued run keeps the "
            f"{examples} examples of a step"
        )
    return replace(config, accumulation_steps=needed)


def way_on(step: int, total: int) -> str:
    return RULE if step < total else "no step is left; to train on, ask for more with --epochs or --max_steps"


def check_steps(state: Path, total: int) -> None:
    """UserError if the state has more steps behind it than the run that continues from it shall have in all."""
    if (done := read_values(state)["step"]) > total:
        raise UserError(
            f"{state}: this run has done {done:,} steps, and --max_steps or --epochs ask for {total:,}; ask for more, "
            "or start afresh without --from_resume"
        )


def changes(then: dict, now: dict) -> list[str]:
    """Lines that say which options and what about the machine differ between two states' plain values."""
    lines = []
    for part, effect in (("config", ""), ("machine", "; so equal within 1e-5, not bit by bit")):
        both = {key: (value, now[part].get(key)) for key, value in then[part].items()}
        changed = [f"{key} {show(a)} -> {show(b)}" for key, (a, b) in both.items() if str(a) != str(b)]
        if changed := [line for line in changed if not line.startswith("from_resume ")]:
            lines.append(f"changed since then: {', '.join(changed)}{effect}")
    return lines


def is_of(run: dict, weights: Path) -> bool:
    """Whether the weights file was written by an earlier process of the run that this lineage entry belongs to."""
    try:
        last = read_plain(weights)["lineage"][-1]
    except (ValueError, KeyError, IndexError):  # not there, damaged, or of another program
        return False
    same = [last.get(k) == run[k] for k in ("stage", "data", "seed")]
    return last["steps"] <= run["steps"] and all(same) and same_weights(last.get("parent"), run["parent"])


def new_run(states: Path) -> str:
    """A name for a new run, from the time: it sorts after the names of all earlier runs."""
    name = time.strftime("%Y%m%d-%H%M%S")
    return name if not (states / name).exists() else f"{name}-{1 + len(list(states.glob(f'{name}*')))}"


def launch() -> str:
    """Identifies the start of torchrun that this process belongs to; it stays the same when torchrun restarts it."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}@{socket.gethostname()}:{os.getppid()}"


def find_state(states: Path, wanted: str, identity: dict, say) -> Path | None:
    """The state that --from_resume means, None for a new run.

    wanted    0: none; 1 or auto: of the newest run below `states` with this identity; else the path of a state or run
    identity  what has to be equal, see RULE; UserError if there are states, but none of this identity

    A process that torchrun has restarted continues what this launch of torchrun has saved, whatever the flag says.
    Other runs' states are compared by their plain values only: they are neither read as a whole nor renamed.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        foreign = lambda values: [] if values.get("launch") == launch() else ["another launch"]
        if ours := _newest_of(_runs(states), foreign, say)[0]:
            return ours
        say(f"restarted before anything was saved in {states}")
    if wanted in ("0", ""):
        return None

    def differences(values: dict) -> list[str]:
        theirs = values["identity"]
        # what only one of them has counts too: an adapter, say. But not the optimiser, which is left out of what is
        # wanted where the state's recipe says it, nor what states did not have until December 2026
        one_sided = {"optimizer"} - identity.keys() | {"stage", "token_format"} - theirs.keys()
        names = [k for k in (identity | theirs) if k not in one_sided]
        both = [(k, theirs.get(k), identity.get(k)) for k in names]
        same = lambda k, was, now: same_weights(now, was) if k in WEIGHTS else was == now
        return [f"{k} was {_short(was)}, is {_short(now)}" for k, was, now in both if not same(k, was, now)]

    path = Path(wanted)
    if wanted in ("1", "auto"):
        state, reasons = _newest_of(_runs(states), differences, say)
        if not state and not reasons:
            say(f"nothing to resume in {states}: starting a new run")
            return None
    elif number_of(path):
        state, reasons = _given(path, differences)
    else:
        state, reasons = _newest_of([path], differences, say)
        if not state and not reasons:
            raise UserError(f"--from_resume {path}: no whole state there; give the directory of a run or of a step_*")
    if state:
        return state
    raise UserError(
        f"--from_resume {wanted}: no state of the same model and data; {' | '.join(reasons[:3])}. {RULE[0].upper()}"
        f"{RULE[1:]}"
    )


def _newest_of(
    runs: list[Path], differences: Callable[[dict], list[str]], say: Callable[[str], None]
) -> tuple[Path | None, list[str]]:
    """The newest whole state of the first of these runs without differences -> (it or None, why the others are not it).

    differences: the plain values of a state -> how it differs from what is looked for
    """
    reasons = []
    for run in runs:
        newest = next((state for state in reversed(states_in(run)) if not problem(state, "state.json")), None)
        if newest is None:
            if found := states_in(run):  # nobody knows whose they are
                say(f"{found[-1]}: {problem(found[-1], 'state.json')}; left as it is")
        elif different := differences(read_values(newest)):
            reasons.append(f"{newest}: {', '.join(different)}")
        elif (state := newest_state(run, say)) and not differences(read_values(state)):
            return state, []
    return None, reasons


def _given(state: Path, differences: Callable[[dict], list[str]]) -> tuple[Path | None, list[str]]:
    """As `_newest_of`, for one state that the user names. UserError if it is damaged."""
    for only in ("state.json", None):  # the rest takes longer, and is of no interest where the values differ
        if reason := problem(state, only):
            raise UserError(f"--from_resume {state}: {reason}; take another step_* beside it, or auto")
        if different := differences(read_values(state)):
            return None, [f"{state}: {', '.join(different)}"]
    return state, []


def _runs(states: Path) -> list[Path]:
    """The folders of the runs, the newest first."""
    return sorted(states.glob("*"), reverse=True)


def _short(value) -> str:
    """As JSON; a long one as its hash."""
    text = json.dumps(value)
    return text if len(text) <= 60 else "#" + hashlib.sha256(text.encode()).hexdigest()[:12]


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """{"<parameter>/<kind>": tensor}, "lm_head.weight/exp_avg" for instance, of all optimisers together."""
    found = {}
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                found[f"{name}/{kind}"] = tensor
    return found


def restore_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in tensors.items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        # a copy: on a CPU the tensor is a map of its file, which Windows would not remove as long as training goes on
        owner[parameter].state[parameter][kind] = tensor.to(parameter.device, copy=True)
