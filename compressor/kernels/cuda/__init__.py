"""The CUDA kernels of cuda_ext/ under torch: the sources are compiled by NVRTC for the GPU that is there. Experimental.

    interface   what calls of the kernels have in common
    nvrtc       source -> machine code of one GPU, kept in the user's cache
    plans       which kernels a call launches, with which grid and argument
    driver      loads machine code and launches it
    devices     which kernels a device has, or why it has none
    mma1        the packed layout of weights that inputs are multiplied with as they are
    mma8a1      that of weights for inputs rounded to int8
    ds1         that of sparse factors
    ops         torch operations over the launchers
    gptq_solve  GPTQ's columns, over their launcher
    selftest    small products on a device, held to float64

Nothing here has run on a GPU: docs/kernels-cuda.md says what has been shown without one.
"""
