"""Runs the CUDA kernels of cuda_ext/ in torch. NVRTC compiles the sources for the GPU of the machine. Experimental.

    interface   the interface of all launchers
    nvrtc       compiles a source to machine code of one GPU, cached for the user
    plans       the kernels that a call launches, with grids and arguments
    driver      loads and launches machine code
    devices     the kernels of a device, or the reason why it has none
    mma1        the packed layout of weights for weight-only matmuls
    mma8a1      the packed layout of weights for int8 inputs
    ds1         the packed layout of sparse factors
    ops         torch operations over the launchers
    gptq_solve  GPTQ's columns, over their launcher
    selftest    small products on a device, compared with float64

Nothing here has run on a GPU: docs/kernels-cuda.md says what has been shown without one.
"""
