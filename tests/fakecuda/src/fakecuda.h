// State that the parts of the fake CUDA device share. README.md describes the whole.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fakecuda {

// ---- settings.cpp: environment variables, and the model of GPU that they select

struct Settings {
  int devices;           // FAKECUDA_DEVICES
  int capability;        // FAKECUDA_CAPABILITY: 90, 100 or 120
  size_t memory;         // FAKECUDA_MEMORY_MIB, in bytes
  size_t context;        // FAKECUDA_CONTEXT_MIB, in bytes: memory that is in use before the first allocation
  long fail_at_launch;   // FAKECUDA_FAIL_AT_LAUNCH: the n-th graph launch breaks the context; 0: never
  cudaError_t init_error;  // FAKECUDA_INIT_ERROR: result of cudaGetDeviceCount
  int nvml_init_error;   // FAKECUDA_NVML_INIT_ERROR: result of nvmlInit
  int nvml_error;        // FAKECUDA_NVML_ERROR: result of NVML's queries of a device
  bool stacks;           // FAKECUDA_STACKS: log the C++ stack of each violation
};

const Settings& settings();

struct Model {
  const char* name;
  int multiprocessors;
  int threads_per_multiprocessor;
  int shared_memory_per_multiprocessor;
  int shared_memory_per_block;  // with opt-in
};

const Model& model();
void unique_id(int device, unsigned char (&bytes)[16]);  // differs between devices

// ---- log.cpp: FAKECUDA_LOG, counters

void note(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
void violation(const char* format, ...) __attribute__((format(printf, 1, 2)));
void count(const std::string& operation);
[[noreturn]] void missing(const char* function);  // ends the process

// ---- streams.cpp, capture.cpp

extern std::recursive_mutex mutex;  // guards all state

struct Graph {
  size_t nodes = 0;
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;        // that began it
  Stream* origin;                // the stream that it began on
  std::vector<Stream*> streams;  // those that belong to it
  Graph* graph;
  bool invalid = false;
  bool active = true;
};

struct Stream {
  int device;
  bool legacy = false;
  bool blocking = true;  // synchronises with the legacy stream
  int priority = 0;
  std::shared_ptr<Capture> capture;
};

struct Event {
  int device;
  bool timed;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Capture> capture;  // that of the stream when it was recorded
};

Stream& stream_of(cudaStream_t handle);

// Returns an error, and invalidates the captures, if a capture forbids this function to the current thread.
cudaError_t check_capture(const char* function);

// Lets the stream wait for the event: a captured event adds the stream to its capture.
cudaError_t wait_for_event(Stream& stream, const Event& event);

// Adds an operation to the stream: to the graph during a capture, otherwise only to the counters.
cudaError_t enqueue(Stream& stream, const std::string& operation);

// The same for a kernel, which needs a stream of the current device.
cudaError_t enqueue_kernel(Stream& stream, const std::string& kernel);

// ---- errors.cpp

cudaError_t fail(cudaError_t error);  // stores it for cudaGetLastError and returns it
cudaError_t context_error();          // error that the context does not survive, or cudaSuccess
void launched_graph();                // counts towards FAKECUDA_FAIL_AT_LAUNCH

// ---- devices.cpp

int current_device();

// ---- memory.cpp

bool on_device(const void* address);
bool page_locked(const void* address);
size_t used_memory(int device);
bool use_memory(int device, size_t size);  // returns false if the device has too little
void return_memory(int device, size_t size);
void add_mapped(uintptr_t address, size_t size, int device);  // device memory of virtual_memory.cpp
void remove_mapped(uintptr_t address);

// ---- kernels.cpp

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream);
const void* register_kernel(const char* name);  // returns a handle for `launch`

}  // namespace fakecuda
