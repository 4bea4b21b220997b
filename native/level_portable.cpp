#include "vector_portable.h"

#include "kernels.inl"

const mh::Kernels mh::kPortable = level_kernels("portable");
