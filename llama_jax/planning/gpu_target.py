"""What XLA has to be told of a GPU to compile for one that is not here.

Figures: openxla/xla, xla/backends/gpu/target_config/specs (h100_sxm, h200 and b200), as their devices report them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU, as XLA's compiler sees it.

    name: as the driver calls it.
    capability: major number of its compute capability.
    cores: streaming multiprocessors.
    clock: GHz.
    memory: bytes.
    bandwidth: of the memory, bytes per second.
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
        """An XLA GpuTargetConfigProto as text; the limits are those of all these GPUs."""
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


GPU_TARGETS = {
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84942979072, 3352320000000, 52428800),
    "h200": GpuTarget("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 151397597184, 4800000000000, 52428800),
    "b200": GpuTarget("NVIDIA B200", 10, 148, 1.965, 191514411008, 7672320000000, 132644864),
}
