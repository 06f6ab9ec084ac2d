"""What autocast asks of a kernel that casts its operands itself."""

import torch


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of products: autocast's where it is on (it spares float64)."""
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def without_autocast(device_type: str) -> torch.autocast:
    """A context in which a kernel's own operations are not cast."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type if known else "cpu", enabled=False)
