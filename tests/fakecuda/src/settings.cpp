// Settings from the environment, and the properties of the GPUs that can be imitated.
#include <cstdlib>

#include "fakecuda.h"

namespace fakecuda {

static long variable(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

const Settings& settings() {
  static const Settings values = {
      int(variable("FAKECUDA_DEVICES", 1)),
      int(variable("FAKECUDA_CAPABILITY", 90)),
      size_t(variable("FAKECUDA_MEMORY_MIB", 81079)) << 20,
      size_t(variable("FAKECUDA_CONTEXT_MIB", 0)) << 20,
      variable("FAKECUDA_FAIL_AT_LAUNCH", 0),
      cudaError_t(variable("FAKECUDA_INIT_ERROR", cudaSuccess)),
      int(variable("FAKECUDA_NVML_INIT_ERROR", 0)),
      int(variable("FAKECUDA_NVML_ERROR", 0)),
      variable("FAKECUDA_STACKS", 0) != 0,
  };
  return values;
}

// CUDA C++ Programming Guide, "Compute Capabilities": technical specifications per compute capability.
const Model& model() {
  static const Model hopper = {"NVIDIA H100 80GB HBM3", 132, 2048, 233472, 232448};
  static const Model blackwell = {"NVIDIA GB200", 148, 2048, 233472, 232448};
  static const Model geforce = {"NVIDIA GeForce RTX 5090", 170, 1536, 102400, 101376};
  switch (settings().capability) {
    case 100: return blackwell;
    case 120: return geforce;
    default: return hopper;
  }
}

void unique_id(int device, unsigned char (&bytes)[16]) {
  for (int i = 0; i < 16; i++) bytes[i] = static_cast<unsigned char>(i + 1);
  bytes[15] = static_cast<unsigned char>(16 + device);
}

}  // namespace fakecuda
