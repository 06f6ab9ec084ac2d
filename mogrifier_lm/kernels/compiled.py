"""C++ kernels for CPUs, compiled by the machine's own compiler on first use.

The libraries are kept in ${XDG_CACHE_HOME:-~/.cache}/mogrifier_lm/native.
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

from mogrifier_lm.files import cache_folder

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
HEADERS = Path(__file__).parent


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The compiled `source`, which may include the headers beside this file.

    Raises:
        OSError: no compiler, or one that fails, with the reason in one line.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise OSError("the native backend needs a C++ compiler (g++, or the one $CXX names)")
    # One pool of threads: link the OpenMP runtime that torch has loaded, where it ships one.
    shipped = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    runtime = [str(shipped[0])] if shipped else ["-fopenmp"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [path.read_text() for path in (source, *sorted(HEADERS.glob("*.h")))]
    key = "\n".join((*texts, *FLAGS, *runtime, version, platform.processor(), *_cpu_flags()))
    path = cache_folder("native") / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = f"{folder}/native.o", f"{folder}/native.so"
            _execute([compiler, *FLAGS, f"-I{HEADERS}", "-c", str(source), "-o", compiled])
            _execute([compiler, "-shared", compiled, *runtime, "-o", linked])
            os.replace(linked, path)  # atomic: another process may be doing the same
    return ctypes.CDLL(str(path))


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return [line for line in lines if line.startswith(("flags", "Features"))][:1]


def _execute(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((s for s in done.stderr.splitlines() if "error" in s), f"{done.returncode}")
        raise OSError(f"the native backend could not be compiled: {command[0]}: {reason}")
