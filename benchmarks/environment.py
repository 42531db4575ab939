"""Where a benchmark ran: what a reader needs to judge its numbers."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

__all__ = ["ALLOCATOR", "environment"]

PACKAGES = (
    *("posegrad", "torch", "torch_geometric", "torchjd", "opacus", "backpack-for-pytorch"),
    *("dattri-llm", "bergson", "transformers", "peft", "timm", "diffusers", "pignet2", "numpy"),
)
ALLOCATOR = (
    "LD_PRELOAD",
    "MALLOC_CONF",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def environment(device: str) -> dict[str, object]:
    """Versions, processor, GPU if it is used, threads, allocator settings and date."""
    settings = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flush_denormal": _flushes_denormals(),
        "allocator": {"libc": " ".join(platform.libc_ver()), "settings": settings},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _flushes_denormals() -> bool:
    smallest = torch.tensor([torch.finfo(torch.float32).tiny])
    return bool((smallest / 2 == 0).all())
