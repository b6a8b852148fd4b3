"""The device, the precision, and the machine of a run.

Without this file `--device` and `--amp` would be constants.
"""

import os
import platform

import numpy as np
import tokenizers
import torch

from engine import distributed
from engine.errors import UserError


def pick_device(device: str, amp: str) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the type of mixed precision (None: fp32). Raises: UserError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    names = [name for name in available if available[name]]
    name = names[0] if device == "auto" else device
    if name not in names:
        raise UserError(f"--device {name} is not available (available: {', '.join(names)})")
    supported = {"cuda": ["off", "bf16", "fp16"], "cpu": ["off", "bf16"], "mps": ["off"]}[name]
    if amp == "auto":
        amp = best_amp(name)
    if amp not in supported:
        raise UserError(f"--amp {amp} does not work on {name}; use {' or '.join(supported)}")
    dtypes = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.device(name), dtypes[amp]


def best_amp(device: str) -> str:
    """bf16 where the hardware multiplies it, fp16 on older cards."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so may be missing
    in_hardware = device == "cpu" and any(getattr(torch.cpu, test, bool)() for test in tests)
    return "bf16" if in_hardware else "off"


def machine(device: torch.device) -> dict[str, str | int]:
    """The part of a run's circumstances that moves its numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
    }
