# SPDX-License-Identifier: MIT
"""What the launchers share: the configuration of a kernel on a device, launches kept by shape, fp32 products."""

import contextlib
import functools
import json
import pathlib

import torch
import triton

# Before 3.3 a compiled kernel is called without its constants; on HIP it also depends on the size of the storage.
_KEEPS_COMPILED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) and not torch.version.hip
_caches = []


class Configurations:
    """Blocks, warps and stages of the kernels of a file, called with what they are for.

    Args:
        module: the file; `tables` are what lies beside it as JSON.
        sizes: the smallest and the largest bucket, powers of 2, where the tables have such a level.
    """

    def __init__(self, module, sizes=None):
        self._path, self._sizes = pathlib.Path(module).with_suffix(".json"), sizes

    @functools.cached_property
    def tables(self):
        return json.loads(self._path.read_text())

    def __call__(self, kernel, dtype, device_name, size=None):
        """The caller's own copy, of the bucket that holds `size` channels."""
        bucket = ()
        if self._sizes:
            smallest, largest = self._sizes
            bucket = (str(min(max(triton.next_power_of_2(size), smallest), largest)),)
        return dict(lookup(self.tables, kernel, dtype, device_name, *bucket))


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


class Launch:
    """A kernel on its grid with the arguments that shapes decide, to be called with those before them: the tensors.

    Triton's own launch examines each argument again, 28 us for 44 of them on the machine that takes 3 to launch. What
    it finds can only differ by the tensors' dtypes and alignments, so a compiled kernel is kept by these.

    Args:
        kernel: its parameters are tensors and whatever else changes (None, a float, an unspecialised int), then
            `fixed`, then the constants.
        programs: how many.
        fixed: the arguments behind the leading ones.
        config: the constants, and options of the compilation.
    """

    def __init__(self, kernel, programs, fixed, config):
        self._kernel, self._grid, self._fixed = kernel, (programs, 1, 1), fixed
        # Scores and their maximum are rounded alike only where a product joins its sum; Triton 3.10 no longer does so
        # unless it is asked.
        self._config = {"enable_fp_fusion": True, **config}
        self._rest = *fixed, *(config[name] for name in kernel.arg_names if name in config)
        self._compiled = {}

    def __call__(self, *leading):
        pointers, key = 0, []
        for x in leading:
            if isinstance(x, torch.Tensor):
                pointers |= x.data_ptr()
                key.append(x.dtype)
            else:
                key.append(type(x))
        if pointers % 16:
            key.extend(isinstance(x, torch.Tensor) and x.data_ptr() % 16 for x in leading)
        key = tuple(key)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[self._grid](*leading, *self._rest)
            return
        compiled = self._kernel[self._grid](*leading, *self._fixed, **self._config)
        if _KEEPS_COMPILED and compiled is not None:  # None in the interpreter
            self._compiled[key] = compiled


def cached(function):
    """Keep what a function makes of shapes, strides, dtypes and a device: launches, until `clear_caches`."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached


def clear_caches():
    """Launch by the tables as they are now, after one of them has been changed."""
    for cached in _caches:
        cached.cache_clear()


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
