// The CUDA driver's functions that compressor/kernels/cuda/driver.py calls, over kernels that g++ compiled: "code" is
// any non-empty text, and the symbol of a kernel is its C++ name.
#include "device.h"

namespace {

int handles_made = 0, contexts_set = 0;
void* last_stream = nullptr;

}  // namespace

extern "C" int cuInit(unsigned flags) { return flags ? 1 : 0; }

extern "C" int cuDeviceGet(int* device, int index) {
  *device = index;
  return index == 0 ? 0 : 101;
}

extern "C" int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &contexts_set;
  return 0;
}

extern "C" int cuCtxSetCurrent(void* context) {
  contexts_set++;
  return context == &contexts_set ? 0 : 201;
}

extern "C" int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return *(const char*)image ? 0 : 200;
}

extern "C" int cuModuleGetFunction(void** function, void*, const char* symbol) {
  for (const emulate::Kernel* kernel = emulate::Kernel::last; kernel; kernel = kernel->before)
    if (!strcmp(kernel->name, symbol)) {
      *function = (void*)kernel;
      handles_made++;
      return 0;
    }
  return 500;
}

extern "C" int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (shared_bytes || extra || by != 1 || bz != 1 || bx > 1024) return 1;
  last_stream = stream;
  emulate::launch(*(const emulate::Kernel*)function, dim3(gx, gy, gz), dim3(bx), arguments[0]);
  return 0;
}

extern "C" int cuGetErrorString(int code, const char** text) {
  *text = code == 500 ? "named symbol not found" : code == 101 ? "invalid device ordinal" : "an error";
  return 0;
}

// The seed of the interleaving of all launches to come.
extern "C" void emulate_seed(u32 number) { emulate::seed(number); }

// Bytes of the argument of a kernel.
extern "C" size_t emulate_argument_bytes(const void* function) { return ((const emulate::Kernel*)function)->argument_bytes; }

extern "C" int test_contexts_set() { return contexts_set; }
extern "C" int test_handles_made() { return handles_made; }
extern "C" void* test_last_stream() { return last_stream; }
