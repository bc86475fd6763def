// CUDA driver: the functions that Triton's launcher, TorchInductor and PyTorch's runtime compilation call.
#include <cuda.h>

#include <cstring>

#include "fakecuda.h"

using namespace fakecuda;

static CUcontext context() { return reinterpret_cast<CUcontext>(8); }  // any address but null

// ---- Devices and contexts

EXPORT CUresult cuInit(unsigned) { return CUresult(settings().init_error); }

EXPORT CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return CUresult(cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), device));
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  unsigned char id[16];
  unique_id(device, id);
  memcpy(uuid->bytes, id, sizeof id);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* result, CUdevice) {
  *result = context();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext* result) {
  *result = context();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 8 << 20;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

// The driver and the runtime number their errors alike.
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(cudaError_t(error));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = cudaGetErrorName(cudaError_t(error));
  return CUDA_SUCCESS;
}

// ---- Modules and functions: a function's handle is that of its kernel

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
  if (cudaError_t error = check_capture("cuModuleLoadData")) return CUresult(error);
  *module = reinterpret_cast<CUmodule>(new char);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }

EXPORT CUresult cuModuleUnload(CUmodule module) {
  delete reinterpret_cast<char*>(module);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(const_cast<void*>(register_kernel(name)));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUresult(cudaFuncSetAttribute(function, cudaFuncAttribute(attribute), value));
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  *blocks = 2;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = model().multiprocessors / 2;
  return CUDA_SUCCESS;
}

// ---- Launches

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_memory, CUstream stream, void**,
                               void**) {
  return CUresult(
      launch(function, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_memory, stream));
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  return CUresult(launch(function, dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
                         dim3(config->blockDimX, config->blockDimY, config->blockDimZ), config->sharedMemBytes,
                         config->hStream));
}

// ---- Memory

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (!on_device(reinterpret_cast<void*>(address))) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *static_cast<CUdeviceptr*>(value) = address;
  } else {
    *static_cast<unsigned*>(value) = CU_MEMORYTYPE_DEVICE;
  }
  return CUDA_SUCCESS;
}

// The address of the tensor must be a multiple of 16 (CUDA Driver API, Tensor Map Object Management).
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void* address, const cuuint64_t*,
                                       const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (uintptr_t(address) % 16 == 0) return CUDA_SUCCESS;
  violation("tensor map of an address that is not a multiple of 16");
  return CUDA_ERROR_INVALID_VALUE;
}
