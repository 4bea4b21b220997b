#include "vector_avx2.h"

#include "kernels.inl"

const mh::Kernels mh::kAvx2 = {"avx2", false,  dot,      product, product_transposed, outer, activate, activate_grad,
                               widen,  narrow, quantize, combine, add_bias,           norm,  attend,   gemv};
