"""Run a command and measure it from outside: peak anonymous memory, CPU and wall seconds."""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

SAMPLE_SECONDS = 0.01
IMPORTS = (
    "import torch, transformers, zarr, distributed;"
    "from esm_stream import engine; from esm_stream.calibration import skeleton, trace;"
    "from transformers.models.llama import modeling_llama"
)


@dataclass(frozen=True)
class Measured:
    """What one process used."""

    exit_code: int
    peak_anon: int
    cpu_seconds: float
    wall_seconds: float
    peak_rss: int


def measure(command: list[str], *, env: dict[str, str] | None = None) -> Measured:
    """Run a command to its end, sampling RssAnon and VmHWM of its process every 10 ms."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL
    )
    anon = rss = 0
    status = Path(f"/proc/{process.pid}/status")
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        anon = max(anon, _status_bytes(status, "RssAnon"))
        rss = max(rss, _status_bytes(status, "VmHWM"))
        time.sleep(SAMPLE_SECONDS)
    wall = time.monotonic() - started
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(os.waitstatus_to_exitcode(code), anon, cpu, wall, rss)


def _status_bytes(status: Path, key: str) -> int:
    """One entry of /proc/PID/status in bytes; 0 when the process is gone."""
    try:
        for line in status.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def import_base() -> Measured:
    """What the imports of a merge cost by themselves."""
    return measure([sys.executable, "-c", IMPORTS])


def machine() -> str:
    """One line about machine and versions, for result files."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    names = ("torch", "transformers", "zarr", "dask", "safetensors", "esm-stream")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, {versions}"
