// NVML: the wheels contain no nvml.h, so the few declarations are here.
#include <cuda.h>

#include <cstdio>
#include <cstring>

#include "fakecuda.h"

using namespace fakecuda;

using Handle = size_t;  // number of the device + 1

enum Result { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };  // of nvmlReturn_t

struct Memory {  // nvmlMemory_t
  unsigned long long total, free, used;
};

struct Utilization {  // nvmlUtilization_t
  unsigned gpu, memory;
};

static void format_uuid(int device, char* text, unsigned size) {
  unsigned char id[16];
  unique_id(device, id);
  snprintf(text, size, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", id[0], id[1], id[2],
           id[3], id[4], id[5], id[6], id[7], id[8], id[9], id[10], id[11], id[12], id[13], id[14], id[15]);
}

EXPORT int nvmlInit_v2() { return settings().nvml_init_error; }

EXPORT int nvmlInitWithFlags(unsigned) { return settings().nvml_init_error; }

EXPORT int nvmlShutdown() { return SUCCESS; }

EXPORT int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  snprintf(text, size, "580.159.04");
  return SUCCESS;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = CUDA_VERSION;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = settings().devices;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned number, Handle* handle) {
  if (number >= unsigned(settings().devices)) return INVALID_ARGUMENT;
  *handle = number + 1;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char* uuid, Handle* handle) {
  for (int device = 0; device < settings().devices; device++) {
    char text[64];
    format_uuid(device, text, sizeof text);
    if (strcmp(text, uuid) == 0) return nvmlDeviceGetHandleByIndex_v2(device, handle);
  }
  return NOT_FOUND;
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char* address, Handle* handle) {
  unsigned domain, bus;
  if (sscanf(address, "%x:%x:", &domain, &bus) != 2 || bus == 0) return NOT_FOUND;
  return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}

EXPORT int nvmlDeviceGetUUID(Handle handle, char* text, unsigned size) {
  format_uuid(int(handle - 1), text, size);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetName(Handle, char* text, unsigned size) {
  snprintf(text, size, "%s", model().name);
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMigMode(Handle, unsigned* current, unsigned* pending) {
  *current = *pending = 0;
  return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo(Handle handle, Memory* memory) {
  memory->total = settings().memory;
  memory->used = used_memory(int(handle - 1));
  memory->free = memory->total - memory->used;
  return settings().nvml_error;
}

EXPORT int nvmlDeviceGetUtilizationRates(Handle, Utilization* utilization) {
  *utilization = {50, 10};
  return settings().nvml_error;
}

// PyTorch lists the processes in its message about a lack of memory.
EXPORT int nvmlDeviceGetComputeRunningProcesses(Handle, unsigned* number, void*) {
  *number = 0;
  return settings().nvml_error;
}

// PyTorch looks these up together with the functions that it calls.
EXPORT int nvmlDeviceGetGpuFabricInfoV(Handle, void*) { return NOT_SUPPORTED; }

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(Handle, unsigned, unsigned*) { return NOT_SUPPORTED; }

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(Handle, unsigned, void*) { return NOT_SUPPORTED; }
