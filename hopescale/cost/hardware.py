"""Peak speed of devices, as their vendors state it. Imports no torch and asks no device."""

from __future__ import annotations

import re

TERA = 10**12

# Dense bf16 (no sparsity), FLOP/s, by words of the device's name; the first row whose words all occur is taken.
_PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("A100", 312 * TERA),
    ("A800", 312 * TERA),
    ("A30", 165 * TERA),
    ("A40", 149.7 * TERA),
    ("L4", 121 * TERA),
    ("L40S", 362 * TERA),
    ("H100 PCIe", 756 * TERA),
    ("H100 NVL", 835 * TERA),
    ("H100", 989 * TERA),
    ("H800 PCIe", 756 * TERA),
    ("H800", 989 * TERA),
    ("H20", 148 * TERA),
    ("H200 NVL", 835 * TERA),
    ("H200", 989 * TERA),
    ("GH200", 989 * TERA),
    ("B100", 1750 * TERA),
    ("B200", 2250 * TERA),
    ("GB200", 2500 * TERA),
    ("MI250X", 383 * TERA),
    ("MI300X", 1307 * TERA),
    ("MI325X", 1307 * TERA),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device, or None where it is unknown, a CPU, or a slice of a GPU.

    Args:
        device_name: As the driver names it: `NVIDIA H100 80GB HBM3`, or a bare `H100`.
    """
    words = set(re.split(r"[\s_-]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((peak for name, peak in _PEAK_BF16 if words.issuperset(name.lower().split())), None)
