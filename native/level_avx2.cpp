#include "vector_avx2.h"

#include "kernels.inl"

const mh::Kernels mh::kAvx2 = level_kernels("avx2");
