"""Addresses and memory of a CUDA device, obtained separately from the driver, so that addresses can outlive memory."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint64

from engines.errors import ConfigError, DeviceLostError, DeviceMemoryError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_UNSUPPORTED = (800, 801)  # CUDA_ERROR_NOT_PERMITTED, CUDA_ERROR_NOT_SUPPORTED; some virtual GPUs
_DEVICE_LOCATION = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED, the only type: it is not migrated
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM
_NO_FLAGS = c_uint64(0)


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", c_int)]


class VirtualMemory:
    """The driver's virtual memory management for one device.

    Addresses and sizes are multiples of the granularity of the device, usually 2 MiB. Methods raise DeviceMemoryError
    if the device is out of memory, and DeviceLostError if a call fails for another reason.
    """

    def __init__(self, device: int) -> None:
        """Open the driver, for the device with this index. Raises ConfigError if it does not support this."""
        self._driver = ctypes.CDLL("libcuda.so.1")
        location = _Location(_DEVICE_LOCATION, device)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)
        self._call("cuInit", 0)
        # Nothing else fails early on a device without virtual memory management.
        self._call("cuMemGetAllocationGranularity", byref(c_size_t()), byref(self._properties), _MINIMUM)

    def create(self, nbytes: int) -> int:
        """Allocate memory, which has no address yet; return its handle."""
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), c_size_t(nbytes), byref(self._properties), _NO_FLAGS)
        return handle.value

    def release(self, handle: int) -> None:
        """Free memory that is not mapped."""
        self._call("cuMemRelease", c_uint64(handle))

    def reserve(self, nbytes: int) -> int:
        """Reserve a range of addresses, which has no memory yet; return the first."""
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), c_size_t(nbytes), c_size_t(0), c_uint64(0), _NO_FLAGS)
        return address.value

    def free(self, address: int, nbytes: int) -> None:
        """Free a range of addresses, none of which is mapped."""
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(nbytes))

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map all memory of a handle, `nbytes` bytes, to reserved addresses. `allow_access` must follow."""
        self._call("cuMemMap", c_uint64(address), c_size_t(nbytes), c_size_t(0), c_uint64(handle), _NO_FLAGS)

    def allow_access(self, address: int, nbytes: int) -> None:
        """Allow the device to access mapped memory, until it is unmapped."""
        self._call("cuMemSetAccess", c_uint64(address), c_size_t(nbytes), byref(self._access), c_size_t(1))

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap the memory of one handle. The device must not be using it."""
        self._call("cuMemUnmap", c_uint64(address), c_size_t(nbytes))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise DeviceMemoryError(
                "The device has too little free memory for the weights. Keep fewer decoders in its memory, or use a "
                "smaller size, batch, number of slots or limit of pixels."
            )
        if code in _UNSUPPORTED:
            raise ConfigError(
                f"The device does not support that weights move to host memory ({name}: CUDA error {code}); "
                "omit --resident."
            )
        if code != 0:
            raise DeviceLostError(f"{name} failed with the CUDA error {code}; the process must be restarted.")
