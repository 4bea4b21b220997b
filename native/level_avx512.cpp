#include "vector_avx512.h"

#include "kernels.inl"

const mh::Kernels mh::kAvx512 = {"avx512", false,         dot,    product, product_transposed, outer,
                                 activate, activate_grad, widen,  narrow,  quantize,           combine,
                                 add_bias, norm,          attend, gemv};
