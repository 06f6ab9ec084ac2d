"""Where kernels written in Triton run: on CUDA devices, and where it is asked for interpreted."""

import importlib.util
import os

import torch


def unsupported(device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why they cannot run with such parameters here, in one line; None where they can."""
    device = torch.device(device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"the triton backend runs on cuda, not on {device}"
    if dtype != torch.float32:
        return f"the triton backend takes float32 parameters, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the triton backend needs Triton, which pip install triton brings"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton backend needs a GPU of compute capability 8.0 or later"
    return None
