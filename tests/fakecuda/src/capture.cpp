// CUDA runtime: stream capture and graphs.
//
// The rules are those of the CUDA C++ Programming Guide, section CUDA Graphs. What is quoted is from the CUDA Runtime API,
// sections Stream Management (functions) and Data types (errors).
#include <algorithm>
#include <atomic>

#include "fakecuda.h"

namespace fakecuda {

static std::vector<Capture*> active;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// cudaThreadExchangeStreamCaptureMode:
// - cudaStreamCaptureModeGlobal: "If the local thread has an ongoing capture sequence that was not initiated with
//   cudaStreamCaptureModeRelaxed at cudaStreamBeginCapture, or if any other thread has a concurrent capture sequence
//   initiated with cudaStreamCaptureModeGlobal, this thread is prohibited from potentially unsafe API calls."
// - cudaStreamCaptureModeThreadLocal: the first condition only.
// - cudaStreamCaptureModeRelaxed: "The local thread is not prohibited from potentially unsafe API calls."
static bool forbids_unsafe_calls(const Capture& capture) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  if (capture.thread == std::this_thread::get_id()) return capture.mode != cudaStreamCaptureModeRelaxed;
  return thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

cudaError_t check_capture(const char* function) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  bool forbidden = false;
  for (Capture* capture : active) {
    if (!forbids_unsafe_calls(*capture)) continue;
    capture->invalid = forbidden = true;
  }
  if (!forbidden) return cudaSuccess;
  violation("%s while a stream is being captured", function);
  return fail(cudaErrorStreamCaptureUnsupported);
}

static cudaError_t invalidate(Capture& capture, cudaError_t error, const char* reason) {
  violation("%s", reason);
  capture.invalid = true;
  return fail(error);
}

// cudaErrorStreamCaptureImplicit: "The operation would have resulted in a disallowed implicit dependency on a current
// capture sequence from cudaStreamLegacy." The legacy stream waits for all streams without cudaStreamNonBlocking.
static cudaError_t check_legacy_stream(const std::string& operation) {
  for (Capture* capture : active) {
    const auto blocking = [](const Stream* stream) { return stream->blocking; };
    if (std::any_of(capture->streams.begin(), capture->streams.end(), blocking)) {
      return invalidate(*capture, cudaErrorStreamCaptureImplicit,
                        (operation + " on the legacy stream during the capture of a blocking stream").c_str());
    }
  }
  return cudaSuccess;
}

// CUDA allows work on other streams during a capture, but a capturing thread that enqueues some has made a mistake: the
// work runs now and is missing in the graph.
static void check_other_stream(const std::string& operation) {
  for (Capture* capture : active) {
    if (capture->thread == std::this_thread::get_id()) {
      violation("%s on another stream during a capture: it is not part of the graph", operation.c_str());
      return;
    }
  }
}

cudaError_t enqueue(Stream& stream, const std::string& operation) {
  if (cudaError_t error = context_error()) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (stream.capture) {
    if (stream.capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    ++stream.capture->graph->nodes;
    count("captured " + operation);
    return cudaSuccess;
  }
  if (stream.legacy) {
    if (cudaError_t error = check_legacy_stream(operation)) return error;
  }
  check_other_stream(operation);
  count(operation);
  return cudaSuccess;
}

// A kernel cannot be launched on a stream of another device than the current one (CUDA C++ Programming Guide,
// Multi-Device System, Stream and Event Behavior).
cudaError_t enqueue_kernel(Stream& stream, const std::string& kernel) {
  if (stream.device != current_device()) {
    violation("%s on a stream of device %d, but the current device is %d", kernel.c_str(), stream.device,
              current_device());
    return fail(cudaErrorInvalidResourceHandle);
  }
  return enqueue(stream, kernel);
}

// Cross-stream dependencies: a stream that waits for a captured event joins the capture. Errors:
// - cudaErrorStreamCaptureMerge: "The operation would have resulted in a merge of two independent capture sequences."
// - cudaErrorStreamCaptureIsolation: "A dependency would have been created which crosses the capture sequence boundary."
cudaError_t wait_for_event(Stream& stream, const Event& event) {
  if (cudaError_t error = context_error()) return error;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const bool captured = event.capture && event.capture->active;
  if (!captured) {
    if (!stream.capture || !event.recorded) return cudaSuccess;
    return invalidate(*stream.capture, cudaErrorStreamCaptureIsolation,
                      "a captured stream waits for an event from outside the capture");
  }
  if (!stream.capture) {
    stream.capture = event.capture;
    event.capture->streams.push_back(&stream);
  } else if (stream.capture != event.capture) {
    event.capture->invalid = true;
    return invalidate(*stream.capture, cudaErrorStreamCaptureMerge, "a stream waits for an event of another capture");
  }
  return cudaSuccess;
}

}  // namespace fakecuda

using namespace fakecuda;

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}

// The legacy stream cannot be captured.
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static std::atomic<unsigned long long> captures{0};
  Stream& stream = stream_of(handle);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (stream.legacy) {
    violation("capture of the legacy stream");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (stream.capture) return fail(cudaErrorIllegalState);
  stream.capture = std::make_shared<Capture>(
      Capture{++captures, mode, std::this_thread::get_id(), &stream, {&stream}, new Graph});
  active.push_back(stream.capture.get());
  return cudaSuccess;
}

// "Capture must have been initiated on stream via a call to cudaStreamBeginCapture. [...] If the mode argument was not
// cudaStreamCaptureModeRelaxed, this call must be from the same thread as cudaStreamBeginCapture."
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream& stream = stream_of(handle);
  std::lock_guard<std::recursive_mutex> lock(mutex);
  *graph = nullptr;
  const std::shared_ptr<Capture> capture = stream.capture;
  if (!capture) return fail(cudaErrorIllegalState);
  if (capture->origin != &stream) {
    return invalidate(*capture, cudaErrorStreamCaptureUnmatched, "a capture ends on a stream that it did not begin on");
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return invalidate(*capture, cudaErrorStreamCaptureWrongThread, "a capture ends in another thread");
  }
  active.erase(std::find(active.begin(), active.end(), capture.get()));
  capture->active = false;
  for (Stream* member : capture->streams) member->capture = nullptr;
  if (capture->invalid) {
    delete capture->graph;
    return fail(cudaErrorStreamCaptureInvalidated);
  }
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  count("graphs captured");
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const std::shared_ptr<Capture>& capture = stream_of(handle).capture;
  *status = !capture             ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* dependency_count) {
  const std::shared_ptr<Capture>& capture = stream_of(handle).capture;
  cudaStreamIsCapturing(handle, status);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (dependency_count) *dependency_count = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
  *number = reinterpret_cast<Graph*>(graph)->nodes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  const Graph& captured = *reinterpret_cast<Graph*>(graph);
  note("graph", "%zu nodes", captured.nodes);
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(captured));
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  if (cudaError_t error = enqueue(stream_of(stream), "graph launch")) return error;
  launched_graph();
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
