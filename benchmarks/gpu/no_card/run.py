"""Runs a program of torch's CUDA build on a card that computes nothing, where there is no card.

python benchmarks/gpu/no_card/run.py python -m pytest -m gpu tests/gpu
python benchmarks/gpu/no_card/run.py --log log.txt python trainer/train_pretrain.py --save_dir out/no_card

What it shows and what it cannot is said in card.h beside this file. It needs Linux, g++ and torch for CUDA 13. The card
is compiled once, into the user's cache. What a run saves is worthless: give it a folder of its own.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from common.console import UserError, run
from common.files import atomic_folder, lock
from dataset.tokens.cache import compiled_cache

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cpp"))
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those in device.cpp
LIBRARY = "libcuda.so.1"  # the driver's name, under which Triton and CUDA's own libraries look for it


def folders_of(package: str) -> list[Path]:
    """Where a package of this interpreter lies, without importing it; a namespace package has several places."""
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def torch_cuda() -> str:
    """The version of CUDA that this interpreter's torch is built for, from its file: importing it takes seconds."""
    folders = folders_of("torch")
    if not folders:
        raise UserError(f"{sys.executable} has no torch; run this with the interpreter whose torch is to be tried")
    spec = importlib.util.spec_from_file_location("torch_version", folders[0] / "version.py")
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    cuda = getattr(version, "cuda", None)
    if not cuda:
        raise UserError(f"torch {version.__version__} here is built without CUDA; install the build for CUDA 13")
    if cuda.split(".")[0] != "13":
        raise UserError(f"torch {version.__version__} here is built for CUDA {cuda}; the card is written for CUDA 13")
    return cuda


def real_cards() -> int:
    """How many cards the driver of this machine sees; 0 without a driver. The preloaded card counts as one."""
    try:
        driver, count = ctypes.CDLL(LIBRARY), ctypes.c_int(0)
        return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def check() -> str:
    """Raises a UserError where this cannot or should not run -> the version of CUDA."""
    if sys.platform != "linux":
        raise UserError("a card that computes nothing needs Linux: it is put in front of torch by LD_PRELOAD")
    cuda = torch_cuda()
    if LIBRARY in os.environ.get("LD_PRELOAD", ""):
        raise UserError("this already runs on a card that computes nothing; run the command itself")
    if real_cards():
        raise UserError("this machine has a real card; run the command itself")
    return cuda


def header_flags(folders: list[Path], cuda: str) -> list[str]:
    """The compiler's flags for the headers of CUDA's runtime. `folders`: where they may be, the best first."""
    runtime = [folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()]
    macros = [folder for folder in folders if (folder / "crt" / "host_defines.h").is_file()]
    version = ".".join(cuda.split(".")[:2])
    for found, header, package in (
        (runtime, "cuda_runtime_api.h", "nvidia-cuda-runtime"),
        (macros, "crt/host_defines.h", "nvidia-cuda-crt"),
    ):
        if not found:
            raise UserError(f"no {header} found; pip install {package}=={version}.*")
    # the second may be of another version (Triton's): what is taken from it are the names of a few compiler attributes
    return [f"-I{runtime[0]}", "-idirafter", str(macros[0])]


def include_folders() -> list[Path]:
    """Of torch's CUDA packages, then of Triton, which has no headers of CUDA 13's runtime but has those of crt/."""
    found = [folder / "cu13" / "include" for folder in folders_of("nvidia")]
    return found + [folder / "backends" / "nvidia" / "include" for folder in folders_of("triton")]


def build(cuda: str) -> Path:
    """The folder with the compiled card; it is compiled if the cache does not have it."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"no {compiler} found; install g++ (on Debian: apt install g++), or name a compiler in CXX")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", *header_flags(include_folders(), cuda)]
    words = [compiler, cuda, *flags, *(path.read_text(encoding="utf-8") for path in [HERE / "card.h", *SOURCES])]
    folder = compiled_cache() / "no_card" / hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_suffix(".lock"), "waiting for another process, which compiles the card"):
            if not folder.is_dir():
                compile_into(folder, [compiler, *flags])
    return folder


def compile_into(folder: Path, command: list[str]) -> None:
    with atomic_folder(folder) as temporary:
        done = subprocess.run([*command, "-o", temporary / LIBRARY, *SOURCES, "-ldl"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the card could not be compiled:\n{done.stderr[-4000:]}")
        (temporary / "libcuda.so").symlink_to(LIBRARY)  # by which programs are linked with it


def environment(
    folder: Path, capability: str, gib: float, log: str | None, bytes_kept: bool = False, cards: int = 1
) -> dict[str, str]:
    preload = ":".join(filter(None, [str(folder / LIBRARY), os.environ.get("LD_PRELOAD")]))
    own = dict(LD_PRELOAD=preload, TRITON_LIBCUDA_PATH=str(folder))
    own |= dict(NO_CARD_CAPABILITY=capability, NO_CARD_GIB=str(gib), NO_CARD_ZEROS="01"[not bytes_kept])
    own |= dict(NO_CARD_CARDS=str(cards), NO_CARD_LOG=os.path.abspath(log) if log else "")
    return {"OMP_NUM_THREADS": "1", **os.environ, **own}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", choices=CAPABILITIES, default="9.0", help="of the card (9.0: H100)")
    parser.add_argument("--gib", type=float, default=139, help="its memory (139)")
    parser.add_argument("--cards", type=int, default=1, help="how many, for a process each; with --keep_bytes")
    parser.add_argument("--log", help="a file for what is asked of it; summary.py counts its lines; written anew")
    parser.add_argument("--keep_bytes", action="store_true", help="copies are made; else zeros are read from the card")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if not given.command:
        parser.error("no command given")
    folder = build(check())
    if given.log:
        open(given.log, "w").close()
    print("no_card: nothing is computed; numbers and speeds mean nothing", file=sys.stderr, flush=True)
    program, *rest = given.command
    program = sys.executable if program in ("python", "python3") else program  # whose torch was checked
    values = environment(folder, given.capability, given.gib, given.log, given.keep_bytes, given.cards)
    try:
        os.execvpe(program, [program, *rest], values)  # its exit status and its signals are those of this process
    except OSError as error:
        raise UserError(f"{program}: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
