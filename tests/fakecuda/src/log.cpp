// Log, counters, and the functions that tests call: see control.py.
#include <execinfo.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "fakecuda.h"

namespace fakecuda {

static std::map<std::string, long>& counters() {
  static auto* all = new std::map<std::string, long>;  // never destroyed: threads may count until the process ends
  return *all;
}
static long violations = 0;

static FILE* log_file() {
  static const char* path = getenv("FAKECUDA_LOG");
  static FILE* file = path && *path ? fopen(path, "a") : stderr;
  return file ? file : stderr;
}

static void write(const char* kind, const char* format, va_list arguments) {
  char message[512];
  vsnprintf(message, sizeof message, format, arguments);
  fprintf(log_file(), "fakecuda %s: %s\n", kind, message);
  fflush(log_file());
}

void note(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write(kind, format, arguments);
  va_end(arguments);
}

void violation(const char* format, ...) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  ++violations;
  va_list arguments;
  va_start(arguments, format);
  write("violation", format, arguments);
  va_end(arguments);
  if (settings().stacks) {
    void* frames[40];
    backtrace_symbols_fd(frames, backtrace(frames, 40), fileno(log_file()));
  }
}

void count(const std::string& operation) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  ++counters()[operation];
}

void missing(const char* function) {
  note("error", "%s is not implemented by the fake", function);
  abort();
}

}  // namespace fakecuda

using namespace fakecuda;

EXPORT long fakecuda_violations() { return violations; }

EXPORT void fakecuda_reset_counters() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  counters().clear();
}

EXPORT int fakecuda_write_counters(const char* path) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  FILE* file = fopen(path, "w");
  if (!file) return -1;
  for (const auto& [operation, number] : counters()) fprintf(file, "%ld\t%s\n", number, operation.c_str());
  return fclose(file);
}
