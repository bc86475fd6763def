// CUDA driver: addresses and memory that are obtained separately (CUDA Driver API, Virtual Memory Management).
//
// Addresses without memory cannot be accessed, so a copy or a launch that reads them ends the process. The content of
// memory is lost when it is unmapped, which on a GPU it is not.
#include <cuda.h>
#include <sys/mman.h>

#include <map>

#include "fakecuda.h"

using namespace fakecuda;

constexpr size_t GRANULARITY = 2 << 20;  // that of the GPUs in devices.cpp

struct Memory {  // with a handle
  size_t size;
  int device;
  uintptr_t address = 0;  // to which it is mapped
  bool released = false;
};

static std::map<CUmemGenericAllocationHandle, Memory> memories;
static std::map<uintptr_t, size_t> reserved;  // address to size
static std::map<uintptr_t, CUmemGenericAllocationHandle> mapped;  // by address

static CUresult check(const char* function) {
  if (cudaError_t error = check_capture(function)) return CUresult(error);
  if (cudaError_t error = context_error()) return CUresult(error);
  count(function);
  return CUDA_SUCCESS;
}

static CUresult invalid(const char* function, const char* reason) {
  violation("%s %s", function, reason);
  return CUDA_ERROR_INVALID_VALUE;
}

// Returns addresses that cannot be accessed: new ones, or the given ones, whose content is lost.
static void* inaccessible(uintptr_t address, size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0);
  return mmap(reinterpret_cast<void*>(address), size, PROT_NONE, flags, -1, 0);
}

static void erase_unused(std::map<CUmemGenericAllocationHandle, Memory>::iterator memory) {
  if (!memory->second.released || memory->second.address) return;
  return_memory(memory->second.device, memory->second.size);
  memories.erase(memory);
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                              CUmemAllocationGranularity_flags) {
  *granularity = GRANULARITY;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                            unsigned long long) {
  static CUmemGenericAllocationHandle last = 0;
  if (CUresult error = check("cuMemCreate")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const bool valid = properties->type == CU_MEM_ALLOCATION_TYPE_PINNED &&
                     properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE && properties->location.id >= 0 &&
                     properties->location.id < settings().devices;
  if (!valid || size == 0 || size % GRANULARITY) return invalid("cuMemCreate", "with a wrong size or location");
  if (!use_memory(properties->location.id, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = ++last;
  memories[*handle] = {size, properties->location.id};
  return CUDA_SUCCESS;
}

// The memory is freed once it is neither mapped nor has a handle.
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  if (CUresult error = check("cuMemRelease")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto memory = memories.find(handle);
  if (memory == memories.end() || memory->second.released) return invalid("cuMemRelease", "of an unknown handle");
  memory->second.released = true;
  erase_unused(memory);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
  if (CUresult error = check("cuMemAddressReserve")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (size == 0 || size % GRANULARITY) return invalid("cuMemAddressReserve", "with a wrong size");
  void* pages = inaccessible(0, size);
  if (pages == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = CUdeviceptr(pages);
  reserved[*address] = size;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  if (CUresult error = check("cuMemAddressFree")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto range = reserved.find(address);
  if (range == reserved.end() || range->second != size) return invalid("cuMemAddressFree", "of another range");
  auto first = mapped.lower_bound(address);
  if (first != mapped.end() && first->first < address + size) return invalid("cuMemAddressFree", "of mapped memory");
  munmap(reinterpret_cast<void*>(address), size);
  reserved.erase(range);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long) {
  if (CUresult error = check("cuMemMap")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto memory = memories.find(handle);
  if (memory == memories.end() || memory->second.released) return invalid("cuMemMap", "of an unknown handle");
  if (memory->second.address) return invalid("cuMemMap", "of memory that is mapped");  // CUDA permits it
  if (offset || size != memory->second.size) return invalid("cuMemMap", "of a part of the memory");
  auto range = reserved.upper_bound(address);
  if (range == reserved.begin()) return invalid("cuMemMap", "to addresses that are not reserved");
  --range;
  if (address + size > range->first + range->second) return invalid("cuMemMap", "to addresses that are not reserved");
  auto next = mapped.lower_bound(address);
  if (next != mapped.end() && next->first < address + size) return invalid("cuMemMap", "to addresses with memory");
  if (next != mapped.begin()) {
    auto previous = std::prev(next);
    if (previous->first + memories[previous->second].size > address) {
      return invalid("cuMemMap", "to addresses with memory");
    }
  }
  mapped[address] = handle;
  memory->second.address = address;
  add_mapped(address, size, memory->second.device);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access, size_t) {
  if (CUresult error = check("cuMemSetAccess")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  for (uintptr_t end = address; end < address + size; end += memories[mapped[end]].size) {
    if (!mapped.count(end)) return invalid("cuMemSetAccess", "of addresses without memory");
    if (memories[mapped[end]].device != access->location.id) return invalid("cuMemSetAccess", "for another device");
  }
  if (access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return invalid("cuMemSetAccess", "with other flags");
  mprotect(reinterpret_cast<void*>(address), size, PROT_READ | PROT_WRITE);
  return CUDA_SUCCESS;
}

// "The range must be the entire contiguous address range that was mapped to."
EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  if (CUresult error = check("cuMemUnmap")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto mapping = mapped.find(address);
  if (mapping == mapped.end()) return invalid("cuMemUnmap", "of addresses without memory");
  auto memory = memories.find(mapping->second);
  if (memory->second.size != size) return invalid("cuMemUnmap", "of a part of the memory");
  inaccessible(address, size);
  remove_mapped(address);
  mapped.erase(mapping);
  memory->second.address = 0;
  erase_unused(memory);
  return CUDA_SUCCESS;
}
