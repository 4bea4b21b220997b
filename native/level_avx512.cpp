#include "vector_avx512.h"

#include "kernels.inl"

const mh::Kernels mh::kAvx512 = level_kernels("avx512");
