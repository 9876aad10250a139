"""Compiles this folder into one shared library: `python kernels/csrc/build.py [TARGET]`.

PER_SET is compiled once for every instruction set, dispatch.cpp chooses among them at run time. CXX names
the compiler; DAPE_CPU_SANITIZE=address,undefined makes a library for sanitizer runs. Needs nothing but
Python's standard library, since it runs inside pip's empty build environment.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent
LIBRARY = SOURCES.parent / "dape_kernels/cpu/libdape_cpu.so"

COMMON = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
# DAPE_ISA and the flags it is compiled with.
INSTRUCTION_SETS: dict[str, list[str]] = {"portable": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = AVX512
    INSTRUCTION_SETS["avx512bf16"] = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
    INSTRUCTION_SETS["avx512amx"] = [*INSTRUCTION_SETS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]

# Bounds are checked by calls, and what AddressSanitizer sees as well is left to it: checks written out beside
# every vector load would take the compiler minutes for each instruction set.
SANITIZE = [
    *("-fno-sanitize=null,alignment,object-size,pointer-overflow", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0", "-g1", "-O1"),
]

PER_SET = ("adapt.cpp", "attend.cpp", "linear.cpp", "tally.cpp")


class BuildError(Exception):
    """There is no library; the message says why and how to mend it."""


def build(target: Path) -> None:
    """Compile the library and move it to `target`, whose former content stays until then.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    sanitize = os.environ.get("DAPE_CPU_SANITIZE")
    extra = [f"-fsanitize={sanitize}", *SANITIZE] if sanitize else []
    with TemporaryDirectory() as folder:
        jobs: list[tuple[Path, list[str], Path]] = []
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name in PER_SET:
                for name, flags in INSTRUCTION_SETS.items():
                    made = Path(folder, f"{source.stem}-{name}.o")
                    jobs.append((source, [f"-DDAPE_ISA={name}", *flags], made))
            else:
                flags = ["-DDAPE_HAVE_X86"] if X86 and source.name == "dispatch.cpp" else []
                jobs.append((source, flags, Path(folder, f"{source.stem}.o")))

        def compile_one(job: tuple[Path, list[str], Path]) -> Path:
            source, flags, made = job
            _run([*compiler, *COMMON, *flags, *extra, "-c", str(source), "-o", str(made)])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(made) for made in pool.map(compile_one, jobs)]
        linked = Path(folder, "linked.so")
        _run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", str(linked)])
        # A process that has the former library open keeps it: the new one is another file.
        fresh = target.with_name(f"{target.name}.new")
        shutil.copyfile(linked, fresh)
        fresh.replace(target)


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise BuildError(
            f"there is no C++ compiler {shlex.join(command)!r}; install one (apt install g++) or set CXX"
        )
    return command


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(result.stderr)
    if result.returncode:
        raise BuildError(
            f"`{shlex.join(command)}` ended with {result.returncode}; a compiler with C++20 is needed, "
            "such as g++ 12 or newer"
        )


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY)
    except BuildError as error:
        sys.exit(f"The C++ attention library was not built: {error}")
