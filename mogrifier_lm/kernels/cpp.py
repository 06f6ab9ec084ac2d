"""C++ kernels for CPUs, compiled by the machine's own compiler on first use.

The libraries are kept in ${XDG_CACHE_HOME:-~/.cache}/mogrifier_lm/native.

The environment variable MOGRIFIER_LM_CPU limits what of the processor they use: "none" (they are
refused), "avx2", "avx512", "amx" (no limit, the default). A kernel never needs more than AVX2; a
limit makes this machine stand for another one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from mogrifier_lm.files import cache_folder, replacing
from mogrifier_lm.machine import cpu_info

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
HEADERS = Path(__file__).parent
_NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
LIMITS = {"avx2": ("-mno-avx512f", *_NO_AMX), "avx512": _NO_AMX, "amx": ()}


def _limits() -> tuple[str, ...]:
    """The compiler's flags that MOGRIFIER_LM_CPU stands for."""
    level = os.environ.get("MOGRIFIER_LM_CPU") or "amx"
    if level == "none":
        raise OSError("the native backend is switched off by MOGRIFIER_LM_CPU=none")
    if level not in LIMITS:
        known = ", ".join(("none", *LIMITS))
        raise OSError(f"MOGRIFIER_LM_CPU is {level!r}, it must be one of {known}")
    return LIMITS[level]


@functools.cache
def load(source: Path, sizes: tuple[int, ...] = ()) -> ctypes.CDLL:
    """The compiled `source`, which may include the headers beside this file.

    Args:
        source: a C++ file.
        sizes: of the structures that Python hands over, in bytes, in the order of the library's
            `size_of(i)`; a field missing on one side would be read from memory misplaced.

    Raises:
        OSError: no compiler, or one that fails, or a processor without AVX2, with the reason in
            one line.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        machine = platform.machine() or "this machine"
        raise OSError(f"the native backend is written for x86 processors; {machine} is none")
    flags = (*FLAGS, *_limits())
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise OSError("the native backend needs a C++ compiler (g++, or the one $CXX names)")
    # One pool of threads: link the OpenMP runtime that torch has loaded, where it ships one.
    shipped = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    runtime = [str(shipped[0])] if shipped else ["-fopenmp"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(HEADERS.glob("*.h")))]
    processor = (platform.processor(), cpu_info("flags", "Features") or "")
    key = "\n".join((*texts, *flags, *runtime, version, *processor))
    path = cache_folder("native") / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: another process may be doing the same.
        with tempfile.TemporaryDirectory() as scratch, replacing(path) as linked:
            compiled = f"{scratch}/native.o"
            _execute([compiler, *flags, f"-I{HEADERS}", "-c", str(source), "-o", compiled])
            _execute([compiler, "-shared", compiled, *runtime, "-o", str(linked)])
    library = ctypes.CDLL(str(path))
    library_sizes = tuple(library.size_of(ctypes.c_int64(i)) for i in range(len(sizes)))
    if library_sizes != sizes:
        raise OSError(f"{source.name} and its caller disagree: {library_sizes} and {sizes} bytes")
    return library


def _execute(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((s for s in done.stderr.splitlines() if "error" in s), f"{done.returncode}")
        raise OSError(f"the native backend could not be compiled: {command[0]}: {reason}")
