// The CUDA driver's functions that compressor/kernels/cuda/driver.py calls, over kernels that g++ compiled: "code" is
// any non-empty text, a kernel is the emulated one of the same symbol, in the library that this file is linked into.
#include <dlfcn.h>
#include <sys/mman.h>

#include "../cuda_ext/device.h"

namespace {

// Kernels take one struct by value; one of more than 16 bytes lies on the stack, so a longer one serves for all.
struct Argument {
  char bytes[128];
};

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
  Dl_info self;
  dladdr((const void*)&cuInit, &self);
  void* library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *function = library ? dlsym(library, symbol) : nullptr;
  handles_made += *function != nullptr;
  return *function ? 0 : 500;
}

extern "C" int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (shared_bytes || extra || by != 1 || bz != 1 || bx > 1024) return 1;
  last_stream = stream;
  Argument argument{};
  // a kernel's own struct is shorter and may lie on two pages; what is behind it, unless that page is not there, is
  // copied and never used
  const size_t on_page = 4096 - ((u64)arguments[0] & 4095);
  unsigned char resident;
  const bool next_is_there = mincore((char*)arguments[0] + on_page, 1, &resident) == 0;
  memcpy(&argument, arguments[0], on_page < sizeof argument && !next_is_there ? on_page : sizeof argument);
  return emulate::launch((void (*)(Argument))function, dim3(gx, gy, gz), dim3(bx), argument);
}

extern "C" int cuGetErrorString(int code, const char** text) {
  *text = code == 500 ? "named symbol not found" : code == 101 ? "invalid device ordinal" : "an error";
  return 0;
}

extern "C" int test_contexts_set() { return contexts_set; }
extern "C" int test_handles_made() { return handles_made; }
extern "C" void* test_last_stream() { return last_stream; }
