// CUDA runtime: device memory, page-locked memory, copies.
//
// Device memory is host memory that the kernel of the operating system provides page by page on first use. Since no
// kernel computes anything, it is hardly ever used, so that a network of 80 GB fits into a small machine.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "fakecuda.h"

namespace fakecuda {

struct Block {
  size_t size;
  int device;
};
using Blocks = std::map<uintptr_t, Block>;  // by address

static Blocks device_blocks, host_blocks, mapped_blocks;
static std::map<int, size_t> used, peak;  // by device, without the context

static Blocks::iterator find(Blocks& blocks, const void* address) {
  auto after = blocks.upper_bound(uintptr_t(address));
  if (after == blocks.begin()) return blocks.end();
  auto block = std::prev(after);
  return uintptr_t(address) < block->first + block->second.size ? block : blocks.end();
}

static bool contains(Blocks& blocks, const void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return find(blocks, address) != blocks.end();
}

static const Block* device_block(const void* address) {
  for (Blocks* blocks : {&device_blocks, &mapped_blocks}) {
    if (auto block = find(*blocks, address); block != blocks->end()) return &block->second;
  }
  return nullptr;
}

void add_mapped(uintptr_t address, size_t size, int device) { mapped_blocks[address] = {size, device}; }

void remove_mapped(uintptr_t address) { mapped_blocks.erase(address); }

bool on_device(const void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return device_block(address) != nullptr;
}

bool page_locked(const void* address) { return contains(host_blocks, address); }

size_t used_memory(int device) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return settings().context + used[device];
}

bool use_memory(int device, size_t size) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (used_memory(device) + size > settings().memory) return false;
  used[device] += size;
  peak[device] = std::max(peak[device], used[device]);
  return true;
}

void return_memory(int device, size_t size) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  used[device] -= size;
}

static void* map_pages(size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
}

constexpr size_t MIB = 1 << 20;

// Contents of large tensors are never read, so copying them would only cost time and memory.
static void copy(void* target, const void* source, size_t size) {
  const bool from_device = on_device(source), to_device = on_device(target);
  if (size > (from_device && to_device ? MIB : 256 * MIB)) return;
  if (from_device && !to_device && size == 1) {
    *static_cast<char*>(target) = 1;  // a boolean that no kernel has computed: true
    return;
  }
  memmove(target, source, size);
}

static const char* memory_kind(const void* address) {
  return on_device(address) ? "device" : page_locked(address) ? "pinned" : "pageable";
}

}  // namespace fakecuda

using namespace fakecuda;

EXPORT cudaError_t cudaMalloc(void** address, size_t size) {
  if (cudaError_t error = check_capture("cudaMalloc")) return error;
  if (cudaError_t error = context_error()) return error;
  *address = nullptr;
  if (size == 0) return cudaSuccess;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const int device = current_device();
  if (!use_memory(device, size)) return fail(cudaErrorMemoryAllocation);
  if (!(*address = map_pages(size))) return fail(cudaErrorMemoryAllocation);
  if (size <= 2 * MIB) memset(*address, 1, size);  // a boolean that no kernel has computed: true
  device_blocks[uintptr_t(*address)] = {size, device};
  count("cudaMalloc");
  return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  if (cudaError_t error = check_capture("cudaFree")) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto block = device_blocks.find(uintptr_t(address));
  if (block == device_blocks.end()) return fail(cudaErrorInvalidValue);
  munmap(address, block->second.size);
  return_memory(block->second.device, block->second.size);
  device_blocks.erase(block);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  if (cudaError_t error = check_capture("cudaHostAlloc")) return error;
  if (cudaError_t error = context_error()) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  size = std::max<size_t>(size, 1);
  if (!(*address = map_pages(size))) return fail(cudaErrorMemoryAllocation);
  host_blocks[uintptr_t(*address)] = {size, current_device()};
  count("cudaHostAlloc");
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto block = host_blocks.find(uintptr_t(address));
  if (block == host_blocks.end()) return address ? fail(cudaErrorInvalidValue) : cudaSuccess;
  munmap(address, block->second.size);
  host_blocks.erase(block);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = settings().memory;
  *available = *total - used_memory(current_device());
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  *attributes = {};
  auto* pointer = const_cast<void*>(address);
  if (const Block* block = device_block(address)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = block->device;
    attributes->devicePointer = pointer;
  } else if (auto block = find(host_blocks, address); block != host_blocks.end()) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = block->second.device;
    attributes->hostPointer = attributes->devicePointer = pointer;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = current_device();
    attributes->hostPointer = pointer;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  if (cudaError_t error = check_capture("cudaMemcpy")) return error;
  if (cudaError_t error = context_error()) return error;
  copy(target, source, size);
  count("cudaMemcpy");
  return cudaSuccess;
}

// A copy from or to pageable memory synchronises the stream (CUDA Runtime API, API synchronization behavior), which a
// capture forbids.
EXPORT cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const std::string from = memory_kind(source), to = memory_kind(target);
  const std::string operation = "copy " + from + " to " + to;
  if (stream.capture && (from == "pageable" || to == "pageable")) {
    violation("%s in a capture", operation.c_str());
    stream.capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (cudaError_t error = enqueue(stream, operation)) return error;
  if (!stream.capture) copy(target, source, size);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, cudaStream_t stream) {
  return enqueue(stream_of(stream), "copy between devices");
}

EXPORT cudaError_t cudaMemset(void* address, int value, size_t size) {
  if (cudaError_t error = check_capture("cudaMemset")) return error;
  if (cudaError_t error = context_error()) return error;
  if (size <= MIB) memset(address, value, size);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  if (cudaError_t error = enqueue(stream, "memset")) return error;
  if (!stream.capture && size <= MIB) memset(address, value, size);
  return cudaSuccess;
}

EXPORT size_t fakecuda_used_memory(int device) { return used_memory(device); }

EXPORT size_t fakecuda_peak_memory(int device) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return settings().context + peak[device];
}

EXPORT size_t fakecuda_mapped_memory() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  size_t sum = 0;
  for (const auto& [address, block] : mapped_blocks) sum += block.size;
  return sum;
}

EXPORT void fakecuda_reset_peak_memory() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  peak = used;
}
