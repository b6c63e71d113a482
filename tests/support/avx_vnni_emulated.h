// For g++ -include after dot_of_bytes.h: the AVX-VNNI bodies of the CPU kernels run by it on a machine without AVX-VNNI.
#pragma once

#define AVXVNNI_EMULATED 1
