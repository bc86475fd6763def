// CUDA runtime: streams and events. Work is done when it is enqueued, so that nothing ever has to wait.
#include <map>

#include "fakecuda.h"

namespace fakecuda {

std::recursive_mutex mutex;

Stream& stream_of(cudaStream_t handle) {
  if (handle && handle != cudaStreamLegacy) return *reinterpret_cast<Stream*>(handle);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  static auto* legacy_streams = new std::map<int, Stream>;  // by device
  Stream& stream = (*legacy_streams)[current_device()];
  stream.device = current_device();
  stream.legacy = true;
  return stream;
}

static Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

// "cudaErrorCapturedEvent: The operation is not permitted on an event which was last recorded in a capturing stream"
// (CUDA Runtime API, Data types).
static cudaError_t check_event(const Event& event, const char* function) {
  if (event.capture && event.capture->active) {
    violation("%s of an event that was recorded in a capture", function);
    event.capture->invalid = true;
    return fail(cudaErrorCapturedEvent);
  }
  if (cudaError_t error = check_capture(function)) return error;
  return context_error();
}

// A stream that is being captured cannot be synchronised or queried (CUDA C++ Programming Guide, CUDA Graphs, Prohibited
// and Unhandled Operations).
static cudaError_t check_stream(Stream& stream, const char* function) {
  if (stream.capture) {
    violation("%s of a stream that is being captured", function);
    stream.capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (cudaError_t error = check_capture(function)) return error;
  return context_error();
}

}  // namespace fakecuda

using namespace fakecuda;

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  auto* stream = new Stream;
  stream->device = current_device();
  stream->blocking = !(flags & cudaStreamNonBlocking);
  stream->priority = priority;
  *handle = reinterpret_cast<cudaStream_t>(stream);
  count("streams created");
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  if (cudaError_t error = check_stream(stream, "cudaStreamDestroy")) return error;
  delete &stream;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  *priority = stream_of(handle).priority;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  cudaError_t error = check_stream(stream_of(handle), "cudaStreamSynchronize");
  if (error == cudaSuccess) count("cudaStreamSynchronize");
  return error;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) { return check_stream(stream_of(handle), "cudaStreamQuery"); }

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return wait_for_event(stream_of(stream), event_of(event));
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Stream& stream = stream_of(handle);
  if (cudaError_t error = enqueue(stream, "host function")) return error;
  if (!stream.capture) function(data);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  auto* event = new Event;
  event->device = current_device();
  event->timed = !(flags & cudaEventDisableTiming);
  *handle = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete &event_of(handle);
  return cudaSuccess;
}

// An event and the stream that records it belong to the same device (CUDA C++ Programming Guide, Multi-Device System,
// Stream and Event Behavior).
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event_handle, cudaStream_t stream_handle, unsigned) {
  Event& event = event_of(event_handle);
  Stream& stream = stream_of(stream_handle);
  if (event.device != stream.device) {
    violation("event of device %d recorded on a stream of device %d", event.device, stream.device);
    return fail(cudaErrorInvalidResourceHandle);
  }
  if (cudaError_t error = context_error()) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  event.recorded = true;
  event.time = std::chrono::steady_clock::now();
  event.capture = stream.capture;
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) { return check_event(event_of(handle), "cudaEventQuery"); }

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  cudaError_t error = check_event(event_of(handle), "cudaEventSynchronize");
  if (error == cudaSuccess) count("cudaEventSynchronize");
  return error;
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  const Event &start = event_of(start_handle), &end = event_of(end_handle);
  if (!start.timed || !end.timed || !start.recorded || !end.recorded) return fail(cudaErrorInvalidResourceHandle);
  *milliseconds = 0.001f + std::chrono::duration<float, std::milli>(end.time - start.time).count();
  return context_error();
}
