// NVRTC, with which PyTorch compiles a few elementwise functions (exp2, for example) on their first call.
#include <cuda.h>
#include <nvrtc.h>

#include <cstring>

#include "fakecuda.h"

using namespace fakecuda;

struct _nvrtcProgram {};

constexpr size_t CUBIN_SIZE = 64;

EXPORT nvrtcResult nvrtcVersion(int* major, int* minor) {
  *major = CUDA_VERSION / 1000;
  *minor = CUDA_VERSION % 1000 / 10;
  return NVRTC_SUCCESS;
}

EXPORT nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char*, const char*, int, const char* const*,
                                      const char* const*) {
  *program = new _nvrtcProgram;
  return NVRTC_SUCCESS;
}

EXPORT nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  delete *program;
  *program = nullptr;
  return NVRTC_SUCCESS;
}

EXPORT nvrtcResult nvrtcCompileProgram(nvrtcProgram, int, const char* const*) { return NVRTC_SUCCESS; }

EXPORT nvrtcResult nvrtcGetCUBINSize(nvrtcProgram, size_t* size) {
  *size = CUBIN_SIZE;
  return NVRTC_SUCCESS;
}

EXPORT nvrtcResult nvrtcGetCUBIN(nvrtcProgram, char* cubin) {
  memset(cubin, 0, CUBIN_SIZE);
  return NVRTC_SUCCESS;
}
