"""The CUDA kernels of compress-model, one shared library. `compressor.kernels.cuda.library` loads it."""

from pathlib import Path

LIBRARY = Path(__file__).parent / "libcompressor_cuda.so"
