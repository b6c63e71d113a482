"""The CUDA kernels of cuda_ext/ under torch: the built library, or the same sources compiled by NVRTC where it runs.

    interface   what both ways offer: the launchers' C signatures
    library     way 1: the shared library of the package compress-model-cuda
    nvrtc       way 2: source -> machine code of one GPU, kept in the user's cache
    plans       what the launchers decide on the host (kernel, grid, argument), for way 2
    driver      way 2: loads that code and launches it
    devices     which of them a device has, or why not
    mma1        the packed layout of weights that inputs are multiplied with as they are
    mma8a1      that of weights for inputs rounded to int8
    ds1         that of sparse factors
    ops         torch operations over the launchers
    gptq_solve  GPTQ's columns, over their launcher
    selftest    small products on a device, held to float64

Nothing here has run on a GPU: docs/kernels-cuda.md says what has been shown without one.
"""
