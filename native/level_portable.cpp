#include "vector_portable.h"

#include "kernels.inl"

const mh::Kernels mh::kPortable = {"portable", false,         dot,    product, product_transposed, outer,
                                   activate,   activate_grad, widen,  narrow,  quantize,           combine,
                                   add_bias,   norm,          attend, gemv};
