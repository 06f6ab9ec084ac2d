"""What of the processor the C++ kernels use, and why they cannot be had where they cannot."""

import ctypes
import platform
import re
from pathlib import Path

import pytest

from mogrifier_lm.kernels import cpp
from mogrifier_lm.kernels.recurrence import native, resolve

LEVEL = """
extern "C" int level() {
#if defined(__AMX_BF16__)
  return 3;
#elif defined(__AVX512F__)
  return 2;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Nothing that was loaded before is found, and nothing of here afterwards."""
    cpp.load.cache_clear()
    native.library.cache_clear()
    yield
    cpp.load.cache_clear()
    native.library.cache_clear()


def level(tmp_path: Path) -> int:
    source = tmp_path / "level.cpp"
    source.write_text(LEVEL)
    try:
        return int(cpp.load(source).level())
    except OSError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("limit, most", [("avx2", 1), ("avx512", 2), ("amx", 3), ("", 3)])
def test_a_limit_holds_and_takes_no_more_than_it_says(limit, most, tmp_path, monkeypatch):
    monkeypatch.delenv("MOGRIFIER_LM_CPU", raising=False)
    whole = level(tmp_path)
    cpp.load.cache_clear()
    monkeypatch.setenv("MOGRIFIER_LM_CPU", limit)
    assert level(tmp_path) == min(most, whole)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("MOGRIFIER_LM_CPU", "none", "switched off by MOGRIFIER_LM_CPU=none"),
        ("MOGRIFIER_LM_CPU", "sse", "MOGRIFIER_LM_CPU is 'sse', it must be one of none, avx2"),
        ("CXX", "/nonexistent", "C\\+\\+ compiler"),
        ("CXX", "false", "could not be compiled|needs a C"),
    ],
)
def test_auto_falls_back_and_an_explicit_native_says_why_not(name, value, reason, monkeypatch):
    monkeypatch.delenv("MOGRIFIER_LM_CPU", raising=False)
    monkeypatch.setenv(name, value)
    assert resolve("auto", "cpu") == "fused"
    with pytest.raises(ValueError, match=reason) as error:
        resolve("native", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", ""])
def test_another_processor_falls_back_by_its_name(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert resolve("auto", "cpu") == "fused"
    with pytest.raises(ValueError, match=f"x86 processors; {machine or 'this machine'} is none"):
        resolve("native", "cpu")


def test_a_processor_without_avx2_is_told_so(monkeypatch):
    monkeypatch.setattr(cpp, "FLAGS", tuple(f.replace("native", "x86-64") for f in cpp.FLAGS))
    monkeypatch.delenv("MOGRIFIER_LM_CPU", raising=False)
    with pytest.raises(ValueError, match="AVX2 and FMA|C\\+\\+ compiler"):
        resolve("native", "cpu")


def test_a_structure_that_differs_is_refused(monkeypatch):
    """A field that one language has and the other has not would misplace what follows it."""
    try:
        native.library()
    except OSError as reason:
        pytest.skip(str(reason))
    cpp.load.cache_clear()
    native.library.cache_clear()

    class Longer(ctypes.Structure):
        _fields_ = [*native._Job._fields_, ("one", ctypes.c_int64)]

    monkeypatch.setattr(native, "_Job", Longer)
    sizes = f"{ctypes.sizeof(Longer) - 8}.*{ctypes.sizeof(Longer)}"
    with pytest.raises(OSError, match=re.compile(f"native.cpp and its caller disagree: .*{sizes}")):
        native.library()
