# SPDX-License-Identifier: MIT
"""What the launchers share: the configuration of a kernel on a device, the device, how fp32 products are taken."""

import contextlib
import functools

import torch


def lookup(tables, kernel, dtype, device_name, *bucket):
    """The configuration of one kernel for a dtype and, where the table has such a level, a bucket of sizes.

    From the table whose name begins the device's name, the longest first; what no such table has is in "default".
    Lengths and batches have no say.
    """
    keys = kernel, f"{dtype.itemsize * 8}-bit", *bucket
    names = sorted((name for name in tables if device_name.startswith(name)), key=len)
    for name in (*reversed(names), "default"):
        config = functools.reduce(lambda table, key: table.get(key, {}), keys, tables[name])
        if config:
            return config
    raise KeyError(f"no configuration of {', '.join(keys)}")


@functools.cache
def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def on_device(x):
    """Triton launches on torch's current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def precision(dtype):
    """How fp32 products are taken: as torch's own matrix products on this device are."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9 keeps the setting here, and raises on the older name once the newer one has been used.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
