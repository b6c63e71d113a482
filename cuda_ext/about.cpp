// What a library says of itself, before anything in it is called.
#ifdef COMPRESSOR_ON_GPU
#include <cuda_runtime_api.h>
#endif

// The version of the C interface, that of compressor/kernels/cuda/interface.py: one more whenever a launcher is added or
// its arguments change. 0 for the emulation, which must not be given the addresses of a GPU.
extern "C" int compressor_cuda_abi() {
#ifdef COMPRESSOR_ON_GPU
  return 5;
#else
  return 0;
#endif
}

// What a cudaError that a launcher returned means.
extern "C" const char* compressor_cuda_error(int code) {
#ifdef COMPRESSOR_ON_GPU
  return cudaGetErrorString((cudaError_t)code);
#else
  return code ? "no cudaError under emulation" : "no error";
#endif
}
