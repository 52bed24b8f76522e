"""What the kernel and the GPU's driver say about this machine. Linux only, as it reads /proc and /sys."""

import os
import subprocess
from pathlib import Path
from typing import Any

TICK = 1.0 / os.sysconf("SC_CLK_TCK")
"""Seconds; the kernel's unit of CPU time."""


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use."""
    seen, cores = set(), []
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text(encoding="utf-8") if siblings.exists() else str(cpu)
        if core not in seen:
            seen.add(core)
            cores.append(cpu)
    return cores


def cpu_name() -> str:
    """The processor's model and how many logical CPUs this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    family = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    numbers = f"family {family.get('cpu family', '?')} model {family.get('model', '?')}"
    return f"{model} ({numbers}), {len(os.sched_getaffinity(0))} CPUs"


def vector_extensions() -> list[str]:
    """The instruction sets that decide how fast matrix products can be."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
    return [name for name in known if name in flags]


def busy_seconds(cpus: list[int]) -> float:
    """CPU seconds not idle since boot, summed over these CPUs; time stolen by the hypervisor counts as busy."""
    wanted, total = {f"cpu{cpu}" for cpu in cpus}, 0
    for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines():
        name, *ticks = line.split()
        if name in wanted:
            user, nice, system, _idle, _wait, interrupt, soft_interrupt, steal = map(int, ticks[:8])
            total += user + nice + system + interrupt + soft_interrupt + steal
    return total * TICK


def peak_memory_bytes() -> int:
    """Largest resident set of this process since its start or since `reset_peak_memory`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reset_peak_memory() -> bool:
    """Let the peak count from the present size; False where the kernel forbids it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU: its device file or, where there are none (WSL), its own listing."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return listing.stdout.startswith("GPU ")


def gpu_state() -> dict[str, Any] | None:
    """Utilisation (a share), bytes in use, SM clock and temperature of the first NVIDIA GPU; None without one."""
    fields = "name,utilization.gpu,memory.used,clocks.sm,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        name, utilisation, megabytes, clock, celsius, driver = map(str.strip, done.stdout.splitlines()[0].split(","))
        return {
            "name": name,
            "utilisation": float(utilisation) / 100.0,
            "bytes": int(megabytes) * 2**20,
            "sm_megahertz": int(clock),
            "celsius": int(celsius),
            "driver": driver,
        }
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
