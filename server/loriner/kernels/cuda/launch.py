"""One GPU: its modules of compiled kernels, and how they are launched on torch's current stream.

Knows the driver, no kernel. Launches are programmatic (PDL) from sm_90 on: a kernel may begin
before the one ahead of it ends, so each calls grid_wait() before it touches shared state.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from loriner.kernels.cuda import nvrtc

OLDEST = (8, 0)
STATIC_SMEM = 48 << 10  # bytes of dynamic shared memory that need no opt-in
Argument = (
    Tensor | int | float | ctypes.Structure | ctypes.Array[ctypes.c_float] | ctypes.c_int64 | None
)
TensorMap = ctypes.c_uint64 * 16
Grid = int | tuple[int, ...]


class DeviceError(Exception):
    """The driver refused something, or this card cannot run the kernels."""


def architecture(capability: tuple[int, int]) -> str:
    """The target that a card of this compute capability runs. Raises DeviceError for too old
    ones."""
    major, minor = capability
    if capability < OLDEST:
        raise DeviceError(
            f"This GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or"
            " newer."
        )
    suffix = "a" if major >= 9 else ""
    return f"sm_{major}{minor}{suffix}"


class Device:
    """A GPU with its loaded modules."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        torch.zeros(1, device=self.torch_device)  # makes torch's context the current one
        properties: Any = torch.cuda.get_device_properties(index)
        self.capability = (properties.major, properties.minor)
        self.arch = architecture(self.capability)
        self.num_sms = int(properties.multi_processor_count)
        self.max_smem = int(properties.shared_memory_per_block_optin)
        self._modules: dict[tuple[str, tuple[tuple[str, int | str], ...]], Module] = {}

    def module(self, source: str, **defines: int | str) -> Module:
        """`csrc/source` compiled with these definitions, loaded once."""
        key = (source, tuple(sorted(defines.items())))
        if key not in self._modules:
            cubin = nvrtc.compile_cubin(source, self.arch, defines)
            self._modules[key] = Module(self, cubin)
        return self._modules[key]

    def compile_ahead(self, source: str, wanted: Iterable[Mapping[str, int | str]]) -> None:
        """Have these variants ready for `module`; compiled one by one they take a minute."""
        nvrtc.compile_all(source, self.arch, wanted)


def tensor_map(x: Tensor, blocks: int, tokens: int) -> Any:
    """Of x [rows, inputs] bf16 as [inputs / 64, rows, 64], in boxes of blocks x tokens x 64 that
    are swizzled by 128 bytes in shared memory; beyond its ends are zeros."""
    rows, inputs = x.shape
    wide = driver.cuuint64_t
    narrow = driver.cuuint32_t
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            x.data_ptr(),
            [wide(64), wide(rows), wide(inputs // 64)],
            [wide(inputs * 2), wide(128)],
            [narrow(64), narrow(tokens), narrow(blocks)],
            [narrow(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
    return TensorMap.from_buffer_copy(TensorMap.from_address(encoded.getPtr()))


class Module:
    """A loaded module and its kernels."""

    def __init__(self, device: Device, cubin: bytes) -> None:
        self.device = device
        self._handle = _checked(driver.cuModuleLoadData(cubin))
        self._kernels: dict[tuple[str, int], Kernel] = {}

    def kernel(self, name: str, smem: int = 0) -> Kernel:
        """The `extern "C"` kernel of this name, with `smem` bytes of dynamic shared memory."""
        if (name, smem) not in self._kernels:
            function = _checked(driver.cuModuleGetFunction(self._handle, name.encode()))
            if smem > STATIC_SMEM:
                attribute = driver.CUfunction_attribute
                limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(driver.cuFuncSetAttribute(function, limit, smem))
            self._kernels[name, smem] = Kernel(self.device, name, function, smem)
        return self._kernels[name, smem]


class Kernel:
    """One kernel, ready to launch."""

    def __init__(self, device: Device, name: str, function: Any, smem: int) -> None:
        self.device, self.name, self.smem = device, name, smem
        self._function = function

    def __call__(
        self, grid: Grid, block: int, *args: Argument, cluster: int = 1, pdl: bool = True
    ) -> None:
        """Launch on torch's current stream. A tensor is passed as its pointer (None: null),
        an int as i32."""
        x, y, z = _three(grid)
        if 0 in (x, y, z):
            return
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = self.smem
        config.hStream = torch.cuda.current_stream(self.device.torch_device).cuda_stream
        attributes = []
        if cluster > 1:
            attributes.append(_cluster(cluster))
        if pdl and self.device.capability >= (9, 0):
            attributes.append(_programmatic())
        config.attrs = attributes
        config.numAttrs = len(attributes)
        pointers, keep = _parameters(args)
        address = ctypes.addressof(pointers)  # type: ignore[arg-type]
        _checked(driver.cuLaunchKernelEx(config, self._function, address, 0), self.name)
        del keep

    def max_blocks_per_sm(self, block: int) -> int:
        """How many blocks of this kernel fit on one multiprocessor."""
        count = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, block, self.smem)
        return int(_checked(count))


def _cluster(size: int) -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    value = driver.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = size, 1, 1
    attribute.value = value
    return attribute


def _programmatic() -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    return attribute


def _parameters(args: Sequence[Argument]) -> tuple[object, list[object]]:
    """The driver's array of pointers to arguments, and what must outlive the call."""
    values = [_value(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    return pointers, [values, pointers]


def _value(arg: Argument) -> Any:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return arg


def _three(grid: Grid) -> tuple[int, int, int]:
    sizes = (grid,) if isinstance(grid, int) else grid
    x, y, z = (*sizes, 1, 1, 1)[:3]
    return x, y, z


def _checked(result: tuple[Any, ...], what: str = "driver") -> Any:
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{what}: {status.name}")
    return values[0] if values else None
