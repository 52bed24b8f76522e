"""The devices a plan can be made for: what XLA must know of them, what must be installed, how fast they are on paper.

Imports no framework, so that a missing package is said before one is loaded.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence

from recipe.config import require

EXTRA = "pip install -e '.[plan]'"


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches, for paper times; docs/plan.md says which are published, counted or assumed."""

    products: float
    """FLOP/s of bfloat16 products that accumulate in float32."""
    wide_products: float
    """FLOP/s of products with a float32 operand."""
    memory: float
    """Bytes/s."""
    links: float
    """Bytes/s of one device to the others, in one direction; of a torus over all its links."""
    network: float
    """Bytes/s of one device to those of other hosts, in one direction; 0 where links go from host to host."""
    least: float
    """Seconds that the smallest launch takes."""
    attention_forward: float
    """FLOP/s of fused causal attention, masked scores not counted."""
    attention_backward: float
    kernels: float
    """FLOP/s of products in kernels of our own."""
    threefry: float | None
    """Threefry-2x32 blocks/s; None where nobody has counted."""
    peak: float
    """Published FLOP/s of bfloat16 products, of which MFU is a share."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device."""

    name: str
    platform: str
    """JAX's name for a topology: cuda or tpu; nothing for this machine's own processor."""
    backend: str
    """What `jax.default_backend()` answers on it."""
    kind: str
    """The device's own name."""
    packages: tuple[str, ...] = ()
    """Distributions without which nothing can be compiled."""
    pinned: tuple[str, ...] = ()
    """Those of them whose version must be jax's own."""
    remedy: str = EXTRA
    memory: int | None = None
    """Bytes of device memory that a program may use."""
    cores: int = 0
    rates: Rates | None = None
    description: str = ""
    """XLA's GpuTargetConfigProto, in text."""
    topologies: tuple[tuple[int, str], ...] = ()
    """Number of devices -> XLA's name of a topology with so many."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that must be set before jax is imported."""
    dims: int = 1
    """Dimensions of a torus."""
    host: int = 0
    """Devices of one host, beyond which the network begins; 0 where all devices of a slice are linked."""
    wraps: int = 1
    """Side of a torus of which this is a multiple before its ends are linked; ends that are not halve the rate."""

    def link_rate(self, devices: int, group: Sequence[int]) -> float:
        """Bytes/s that leave each device of a group, of a mesh of so many devices, while all groups talk at once.

        Of hosts: a group within one has its links; one over several has, at each, the network of its members there. Of
        a torus: a group no larger than a side has the links along it, a larger one all.
        """
        assert self.rates is not None
        if self.host:
            hosts = {device // self.host for device in group}
            if len(hosts) < 2:
                return self.rates.links
            return min(self.rates.links, len(group) // len(hosts) * self.rates.network)
        sides = [int(side) for side in self.topology(devices).rpartition(":")[2].split("x") if side != "1"]
        if not sides:
            return self.rates.links
        wrapped = all(side % self.wraps == 0 for side in sides)
        along = 1 if len(group) > max(sides) else 1 / max(len(sides), self.dims)
        return self.rates.links * along * (1.0 if wrapped else 0.5)

    def topology(self, devices: int) -> str:
        """The name of a topology; `UserError` for a number that is not in the table."""
        names = dict(self.topologies)
        require(
            devices in names,
            f"--mesh {devices} is not a number of {self.name} devices; choose {', '.join(map(str, names))}.",
        )
        return names[devices]

    def versions(self) -> dict[str, str | None]:
        """Installed versions of jax and of the packages; None is missing."""
        return {name: _version(name) for name in ("jax", *self.packages)}

    def check_installed(self) -> None:
        """`UserError` in one line if a package is missing or has another version than jax."""
        versions = self.versions()
        missing = [name for name, version in versions.items() if version is None]
        require(not missing, f"--target {self.name} needs {', '.join(missing)}; run: {self.remedy}")
        equal = " ".join(f"{name}=={versions['jax']}" for name in self.pinned)
        for name in self.pinned:
            require(
                versions[name] == versions["jax"],
                f"{name} is {versions[name]} and jax is {versions['jax']}, but they must be equal; run: "
                f"pip install {equal}",
            )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# NVIDIA's data sheet of the H100 SXM5 80 GB, its tuning guide (shared memory, registers) and compute capability 9.0's
# limits. The memory is what the driver leaves of 80 GiB.
H100_MEMORY = 84_942_979_072
H100_PROTO = f"""
gpu_device_info {{
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000  device_memory_size: {H100_MEMORY}  l2_cache_size: 52428800
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_address_bits: 64
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""

PLUGIN = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
# Integer instructions of a Threefry word in XLA's sm_90a code, on a pipe of 64 lanes a core; boost clock under load.
THREEFRY_INSTRUCTIONS, INTEGER_LANES, CLOCK = 52, 64, 1.755e9

H100 = Target(
    name="h100",
    platform="cuda",
    backend="gpu",
    kind="NVIDIA H100 80GB HBM3",
    packages=(*PLUGIN, "nvidia-cuda-nvcc", "nvidia-nvvm"),
    pinned=PLUGIN,
    memory=H100_MEMORY,
    cores=132,
    rates=Rates(
        products=800e12,
        wide_products=50e12,
        memory=3.0e12,
        links=400e9,
        network=45e9,
        least=2e-6,
        attention_forward=550e12,
        attention_backward=420e12,
        kernels=500e12,
        threefry=132 * INTEGER_LANES * CLOCK / THREEFRY_INSTRUCTIONS,
        peak=989e12,
    ),
    description=H100_PROTO,
    host=8,
    topologies=(
        *((count, f"1x1x{count}") for count in (1, 2, 4, 8)),
        *((8 * hosts, f"1x{hosts}x8") for hosts in (2, 4, 8, 16, 32)),
    ),
)


def _tpu(
    name: str,
    kind: str,
    *,
    tflops: float,
    gigabytes: float,
    links: float,
    memory: int,
    topologies,
    variable,
    dims=2,
    wraps=16,
):
    """A TPU by Google's published peak: products at 0.8 of it, memory at 0.9, as assumed of the H100."""
    products = 0.8 * tflops * 1e12
    return Target(
        name=name,
        platform="tpu",
        backend="tpu",
        kind=kind,
        packages=("libtpu",),
        remedy="pip install 'jax[tpu]'",
        memory=memory * 2**30,
        rates=Rates(
            products=products,
            wide_products=products / 6,  # six bfloat16 passes make a float32 product
            memory=0.9 * gigabytes * 1e9,
            links=links * 1e9,
            network=0.0,
            least=1e-6,
            attention_forward=products,
            attention_backward=products,
            kernels=products,
            threefry=None,
            peak=tflops * 1e12,
        ),
        topologies=topologies,
        dims=dims,
        wraps=wraps,
        # Else libtpu asks a metadata server which machine this is.
        environment=(
            *(("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", variable)),
            *(("TPU_WORKER_HOSTNAMES", "localhost"),),
        ),
    )


def _slices(name: str) -> tuple[tuple[int, str], ...]:
    """Slices of a two-dimensional torus, up to a pod of 256."""
    sides = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    return tuple((rows * columns, f"{name}:{rows}x{columns}") for rows, columns in sides)


TARGETS = {
    target.name: target
    for target in (
        H100,
        _tpu("v5e", "TPU v5e", tflops=197, gigabytes=819, links=200, memory=16, variable="v5litepod-1",
             topologies=_slices("v5e")),
        _tpu("v5p", "TPU v5p", tflops=459, gigabytes=2765, links=600, memory=95, variable="v5p-8", dims=3, wraps=4,
             topologies=((4, "v5p:2x2x1"), (8, "v5p:2x2x2"), (16, "v5p:2x2x4"), (64, "v5p:4x4x4"), (128, "v5p:4x4x8"))),
        _tpu("v6e", "TPU v6e", tflops=918, gigabytes=1640, links=448, memory=32, variable="v6e-1",
             topologies=_slices("v6e")),
        Target(name="host", platform="", backend="cpu", kind="this machine's processor",
               topologies=tuple((count, "") for count in (1, 2, 4, 8))),
    )
}  # fmt: skip
"""Every target by name. The host has no rates: its program is counted, not timed."""


def get_target(name: str) -> Target:
    """The target of that name."""
    require(name in TARGETS, f"--target {name} is unknown; choose from {', '.join(TARGETS)}.")
    return TARGETS[name]
