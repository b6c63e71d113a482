"""Compiles the CUDA sources: with nvcc for GPUs, with g++ under the emulation header for tests on a CPU.

`python cuda_ext/build.py FOLDER` writes FOLDER/libcompressor_cuda.so, code for sm_80, sm_90a and sm_100 and PTX of
compute_90 in it, and FOLDER/libcompressor_cuda.json: registers and shared memory of each kernel on each target, as
ptxas reports them. A kernel that spills registers or needs a stack frame fails the build. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cu"))
ABOUT = FOLDER / "about.cpp"  # what a library says of itself, in every one
LIBRARY = "libcompressor_cuda.so"
# architecture asked of the front end, code that comes of it; the PTX is for GPUs that are younger than the compiler
TARGETS = (("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_100", "sm_100"), ("compute_90", "compute_90"))
# the host's part is plain C++, what the kernels use of it is in emulate.h; -fno-gnu-unique keeps two libraries in one
# process apart
EMULATION_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
EMULATION_FLAGS += ["-ffp-contract=off"]  # no fma but those that are written out


class BuildError(Exception):
    """A compiler is missing or fails, or a kernel doesn't fit the registers."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target."""

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def parse_ptxas(text: str) -> list[Usage]:
    """Each kernel's line of `-Xptxas -v`; raises BuildError where the report isn't as expected."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'"
        r"(?:(?!Compiling entry).)*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads(?:(?!Compiling entry).)*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    usages = []
    for found in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        usages.append(
            Usage(
                kernel=found["kernel"],
                target=found["target"],
                registers=int(found["registers"]),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(found["stack"]),
                spill_store_bytes=int(found["stores"]),
                spill_load_bytes=int(found["loads"]),
            )
        )
    entries = text.count("Compiling entry function")
    if not usages or len(usages) != entries:
        raise BuildError(f"ptxas reported {entries} kernels, {len(usages)} of them readable. Its report:\n{text}")
    return usages


def refuse_spills(usages: list[Usage]) -> None:
    """Raises BuildError naming every kernel that keeps registers in memory."""
    bad = [u for u in usages if u.stack_bytes or u.spill_store_bytes or u.spill_load_bytes]
    if bad:
        lines = [
            f"{u.kernel} on {u.target}: {u.stack_bytes} bytes of stack, {u.spill_store_bytes} stored, "
            f"{u.spill_load_bytes} loaded, {u.registers} registers"
            for u in bad
        ]
        raise BuildError("Kernels spill registers. Make their tiles smaller:\n" + "\n".join(lines))


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is not on PATH. Install it, or add its folder to PATH.")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build_cuda(folder: Path, sources: list[Path] = SOURCES, flags: tuple[str, ...] = ()) -> tuple[Path, list[Usage]]:
    """The library for GPUs and, beside it, the JSON record of its kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static"]
    for architecture, code in TARGETS:
        command += ["-gencode", f"arch={architecture},code={code}"]
    files = map(str, [*sources, ABOUT])
    usages = parse_ptxas(_run([*command, *flags, "-DCOMPRESSOR_ON_GPU", *files, "-o", str(library)]))
    try:
        refuse_spills(usages)
    except BuildError:
        library.unlink()
        raise
    library.with_suffix(".json").write_text(json.dumps([asdict(u) for u in usages], indent=1) + "\n")
    return library, usages


def build_emulated(library: Path, sources: list[Path] = SOURCES) -> Path:
    """The same sources for the CPU."""
    # -x c++ once for all: g++ would take .cu for a linker script
    files = map(str, [*sources, ABOUT])
    _run(["g++", *EMULATION_FLAGS, "-x", "c++", *files, "-o", str(library)])
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    try:
        library, usages = build_cuda(parser.parse_args().folder)
    except BuildError as error:
        print(f"error[missing-dependency]: {error}" if "PATH" in str(error) else f"error: {error}", file=sys.stderr)
        return 6
    for u in usages:
        print(f"{u.target:8} {u.registers:4} registers {u.shared_bytes:6} bytes shared  {u.kernel}")
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
