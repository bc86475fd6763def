// CUDA runtime: registration and launch of kernels. A launch checks the configuration and does nothing else.
#include <dlfcn.h>

#include <cstring>
#include <unordered_map>

#include "fakecuda.h"

namespace fakecuda {

// Names by the address of the host function. PyTorch registers its kernels while the loader initialises its libraries,
// perhaps before the static objects of this one.
static std::unordered_map<const void*, const char*>& kernel_names() {
  static auto* names = new std::unordered_map<const void*, const char*>;
  return *names;
}

const void* register_kernel(const char* name) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const char* handle = strdup(name);
  kernel_names()[handle] = handle;
  return handle;
}

static const char* name_of(const void* function) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto entry = kernel_names().find(function);
  return entry == kernel_names().end() ? "?" : entry->second;
}

// CUDA C++ Programming Guide, "Compute Capabilities": maximum dimensions of grids and blocks, and shared memory.
static bool valid_configuration(dim3 grid, dim3 block, size_t shared_memory) {
  const unsigned long long threads = 1ull * block.x * block.y * block.z;
  return threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 &&
         grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 && shared_memory <= size_t(model().shared_memory_per_block);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
  const std::string kernel = std::string("kernel ") + name_of(function);
  if (!valid_configuration(grid, block, shared_memory)) {
    violation("%s with grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory", kernel.c_str(), grid.x,
              grid.y, grid.z, block.x, block.y, block.z, shared_memory);
    return fail(cudaErrorInvalidConfiguration);
  }
  return enqueue_kernel(stream_of(stream), kernel);
}

}  // namespace fakecuda

using namespace fakecuda;

// ---- Functions that the compiler calls for `kernel<<<grid, block, shared_memory, stream>>>(...)`

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

EXPORT void __cudaUnregisterFatBinary(void**) {}

EXPORT void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, void*, void*, void*,
                                   void*, int*) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  kernel_names()[host_function] = name;
}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_memory, stream});
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_memory = last.shared_memory;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared_memory,
                                      cudaStream_t stream) {
  return launch(kernel, grid, block, shared_memory, stream);
}

// ---- Functions of the API

EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared_memory,
                                    cudaStream_t stream) {
  return launch(function, grid, block, shared_memory, stream);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**,
                                               size_t shared_memory, cudaStream_t stream) {
  return launch(function, grid, block, shared_memory, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > model().shared_memory_per_block) {
    note("note", "%s needs %d bytes of shared memory, more than the device has", name_of(function), value);
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = settings().capability;
  attributes->maxDynamicSharedSizeBytes = model().shared_memory_per_block;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                          unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

static void missing_driver_function() { missing("a driver function, of those that notes above name,"); }

// PyTorch requests a table of driver functions at once and calls few of them.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    note("note", "the driver function %s is missing", name);
    *function = reinterpret_cast<void*>(&missing_driver_function);
  }
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
