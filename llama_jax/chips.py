"""Accelerators, with the figures that the package needs of them: a new chip is one entry of `CHIPS`.

Figures of TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and the tables of "How to scale your model"
(jax-ml.github.io/scaling-book, chapter 2). Of GPUs: NVIDIA's data sheets of DGX H100, H200 and B200, the same book's
chapter 12, and for XLA's compiler openxla/xla, xla/backends/gpu/target_config/specs. Peaks are dense, halved where data
sheets count sparsity. Memory of a TPU is what its compiler leaves to a program, of a GPU that of the data sheet.

Of GPUs that are planned for by formulas only: NVIDIA's data sheets of A100 and DGX A100, L40S, L4, A10, T4, V100 and
DGX-1, and AWS's of A10G; the appendices of NVIDIA's white papers of GA102 (RTX 3090, RTX A6000), Ada (RTX 4090) and RTX
Blackwell (RTX 5090), bfloat16 summed in float32. T4 and V100 have no bfloat16 units: their peak is float32's. Where no
NVLink joins all GPUs of a host, the link is PCIe x16: generation 3 (16 GB/s one way), 4 (32) or 5 (64).
"""

import dataclasses
import json
import re
from typing import Any

from llama_jax.config import UserError, override

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """The description of a GPU from which XLA's compiler can compile for one that is not here.

    name: as the driver calls it.
    capability: major number of its compute capability.
    cores: streaming multiprocessors.
    clock: GHz.
    memory: bytes.
    bandwidth: bytes per second of the memory.
    cache: bytes of the second level.
    """

    name: str
    capability: int
    cores: int
    clock: float
    memory: int
    bandwidth: int
    cache: int

    def proto(self) -> str:
        """Return an XLA GpuTargetConfigProto as text; the limits are those of all these GPUs."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              core_count: {self.cores}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.cache}
              cuda_compute_capability {{ major: {self.capability} feature_extension: ACCELERATED_FEATURES }}
              fpus_per_core: 128
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: 232448
              shared_memory_per_core: 233472
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              driver_version: "13.0.0"
              runtime_version: "13.0.0"
              compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
              device_interconnect_info {{ active_links: 18 }}
            }}
        """


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator; all bandwidths in bytes per second, one way.

    name: as topologies write it.
    kinds: its names as JAX's `device_kind`, where a run's mesh is chosen by the plan; boards of one chip (H100 SXM,
      PCIe) differ in speed and in their links.
    peak_flops: bfloat16 FLOP/s.
    memory: bytes of HBM that a program may use.
    bandwidth: of HBM.
    link: of one ICI link of a TPU, which has two in each direction of its torus; of all NVLinks of a GPU together, or
      of its PCIe; 0 where it is not known.
    network: a chip's share of its host's connection to other slices or nodes; 0 where it is not known.
    max_shape: the largest torus; of a GPU, how many share NVLink.
    on_chip: bytes of a TPU's memory that the compiler places arrays in itself.
    wraps: size of a torus axis that is closed to a ring: exactly this (v5e, v6e), or a multiple (v4, v5p); 0 for GPUs.
    host: bytes per second to the memory of its host, and the same back; 0 where it is not known.
    host_memory: a chip's share of that memory.
    overlaps: True for a TPU whose programs gather and pass on while they multiply, by libtpu's default settings.
    target: description for XLA's compiler; None for TPUs, which libtpu knows, and for GPUs that are not compiled for.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    network: float = 0.0
    max_shape: tuple[int, ...] = (8,)
    on_chip: int = 0
    wraps: int = 0
    host: float = 0.0
    host_memory: float = 0.0
    overlaps: bool = False
    target: GpuTarget | None = None

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`."""
        return "tpu" if self.wraps else "gpu"


PCIE = 1.5e10
H100 = GpuTarget("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84942979072, 3352320000000, 52428800)
H200 = GpuTarget("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 151397597184, 4800000000000, 52428800)
B200 = GpuTarget("NVIDIA B200", 10, 148, 1.965, 191514411008, 7672320000000, 132644864)
CHIPS = {
    chip.name: chip
    for chip in (
        # Hosts: PCIe as "How to scale your model" has it, and the memory of Google Cloud's machines over their chips.
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1.2e12, 4.5e10, 6.25e9, (16, 16, 16), 0, 4, PCIE, 407e9 / 4),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            197e12,
            15.75 * GIB,
            8.1e11,
            5e10,
            3.125e9,
            (16, 16),
            128 * MIB,
            16,
            host=PCIE,
            host_memory=384e9 / 8,
            overlaps=True,
        ),
        Chip(
            "v5p",
            ("TPU v5", "TPU v5p"),
            459e12,
            95.74 * GIB,
            2.765e12,
            1e11,
            6.25e9,
            (16, 20, 28),
            128 * MIB,
            4,
            host=PCIE,
            host_memory=448e9 / 4,
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            918e12,
            31.25 * GIB,
            1.6e12,
            1e11,
            1.25e10,
            (16, 16),
            128 * MIB,
            16,
            host=PCIE,
            host_memory=1440e9 / 8,
        ),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3.35e12, 4.5e11, 5e10, (8,), target=H100),
        Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4.8e12, 4.5e11, 5e10, (8,), target=H200),
        Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 8e12, 9e11, 5e10, (8,), target=B200),
        Chip("a100", (), 312e12, 80e9, 2.039e12, 3e11, 2.5e10),
        Chip("a100-40gb", (), 312e12, 40e9, 1.555e12, 3e11, 2.5e10),
        Chip("l40s", (), 362e12, 48e9, 8.64e11, 3.2e10),
        Chip("l4", (), 121e12, 24e9, 3e11, 3.2e10),
        Chip("a10", (), 125e12, 24e9, 6e11, 3.2e10),
        Chip("a10g", (), 70e12, 24e9, 6e11, 3.2e10),
        Chip("t4", (), 8.1e12, 16e9, 3e11, 1.6e10),
        Chip("v100", (), 15.7e12, 32e9, 9e11, 1.5e11, 6.25e9),
        Chip("v100-16gb", (), 15.7e12, 16e9, 9e11, 1.5e11, 6.25e9),
        Chip("a6000", (), 154.8e12, 48e9, 7.68e11, 3.2e10),
        Chip("rtx3090", (), 71e12, 24e9, 9.36e11, 3.2e10),
        Chip("rtx4090", (), 165.2e12, 24e9, 1.008e12, 3.2e10),
        Chip("rtx5090", (), 209.5e12, 32e9, 1.792e12, 6.4e10),
    )
}
# Peaks of boards that nothing is planned for, by `device_kind`. The same chip on another board has another clock.
OTHER_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-PCIE-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA GB200": 2500e12,
}


def chip_of(kind: str) -> Chip | None:
    """Return the chip that JAX calls `kind`, or None for others."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def peak_of(kind: str) -> float | None:
    """Return the bfloat16 FLOP/s of a device of this kind by its maker, or None where they are not known."""
    chip = chip_of(kind)
    return OTHER_PEAKS.get(kind) if chip is None else chip.peak_flops


def chip_named(text: str) -> Chip | None:
    """Return the chip that a person calls this (`A100 80GB`, `RTX 4090`, `4090`, `h100-sxm`), or None."""
    plain = re.sub(r"nvidia|geforce|tesla|rtx|tpu|[\W_]", "", text.lower())
    names = {re.sub(r"rtx|-", "", name): chip for name, chip in CHIPS.items()}
    usual = re.sub(r"(80gb|sxm\d?)+$", "", plain) if plain.startswith(("a100", "h100")) else plain
    return names.get(plain) or names.get(usual.removesuffix("32gb") if usual.startswith("v100") else usual)


def described(text: str) -> Chip:
    """Return the chip of a user's description: `name=mi300x,peak_flops=1.3e15,...`, or JSON of the fields.

    Raises UserError for a field that is missing or unknown, and for other units than bytes and FLOP/s.
    """
    given: Any
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--chip is not valid JSON ({error}): give name=mine,peak_flops=1e15,...") from None
    else:
        pairs = (part.strip().partition("=") for part in text.split(","))
        given = {name: value for name, _, value in pairs}
    needed = ("peak_flops", "memory", "bandwidth")
    if not isinstance(given, dict) or any(name not in given for name in needed):
        raise UserError(
            f"--chip={text!r} must give peak_flops (FLOP/s), memory (bytes) and bandwidth (bytes per second), and for "
            "several GPUs link and network: name=mine,peak_flops=1e15,memory=80e9,bandwidth=3e12,link=4e11"
        )
    chip = override(Chip("chip", (), 0.0, 0.0, 0.0), given)
    for name in (*needed, *(name for name in ("link", "network") if getattr(chip, name))):
        if getattr(chip, name) < 1e6:
            unit = "FLOP/s" if name == "peak_flops" else "bytes" if name == "memory" else "bytes per second"
            raise UserError(f"--chip: {name}={getattr(chip, name):g} is in {unit}, such as 80e9")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", chip.name):
        raise UserError(f"--chip: name={chip.name!r} must be of lower-case letters and digits, such as mi300x")
    return chip
