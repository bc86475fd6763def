// cuDNN's graph API, which PyTorch uses for convolutions and attention: every graph has one engine, which supports it.
#include <cudnn_graph.h>

#include "fakecuda.h"

using namespace fakecuda;

struct cudnnContext {
  cudaStream_t stream = nullptr;
};

EXPORT size_t cudnnGetVersion() { return CUDNN_VERSION; }

EXPORT cudnnStatus_t cudnnGetProperty(libraryPropertyType type, int* value) {
  *value = type == MAJOR_VERSION ? CUDNN_MAJOR : type == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  if (check_capture("cudnnCreate")) return CUDNN_STATUS_NOT_INITIALIZED;
  *handle = new cudnnContext;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  delete handle;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* descriptor) {
  *descriptor = new char;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  delete static_cast<char*>(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }

EXPORT cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                                              cudnnBackendAttributeType_t, int64_t, const void*) {
  return CUDNN_STATUS_SUCCESS;
}

// Integers, such as the size of a workspace, are 0. There is one descriptor of each kind (engine, configuration), but
// no knobs.
EXPORT cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
                                              cudnnBackendAttributeType_t type, int64_t requested, int64_t* count,
                                              void* array) {
  int64_t elements = 0;
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR && name != CUDNN_ATTR_ENGINECFG_KNOB_CHOICES) elements = 1;
  if (requested > 0 && array && (type == CUDNN_TYPE_INT32 || type == CUDNN_TYPE_INT64)) {
    elements = 1;
    if (type == CUDNN_TYPE_INT32) *static_cast<int32_t*>(array) = 0;
    if (type == CUDNN_TYPE_INT64) *static_cast<int64_t*>(array) = 0;
  }
  if (count) *count = elements;
  return CUDNN_STATUS_SUCCESS;
}

EXPORT cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
  const cudaError_t error = enqueue_kernel(stream_of(handle->stream), "cuDNN graph");
  return error == cudaSuccess ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}
