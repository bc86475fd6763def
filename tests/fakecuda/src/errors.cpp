// The last error of a thread, and the error that breaks the context. Texts of errors come from the real libcudart.
#include <atomic>

#include "fakecuda.h"

namespace fakecuda {

static thread_local cudaError_t last_error = cudaSuccess;
static std::atomic<long> graph_launches{0};
static std::atomic<bool> broken{false};

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

// cudaErrorIllegalAddress: "This leaves the process in an inconsistent state and any further CUDA work will return the
// same error." (CUDA Runtime API, Data types)
cudaError_t context_error() { return broken ? fail(cudaErrorIllegalAddress) : cudaSuccess; }

void launched_graph() {
  if (++graph_launches == settings().fail_at_launch) {
    broken = true;
    note("note", "the context fails at graph launch %ld", settings().fail_at_launch);
  }
}

}  // namespace fakecuda

using namespace fakecuda;

EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = broken ? cudaErrorIllegalAddress : last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return broken ? cudaErrorIllegalAddress : last_error; }
