// The kernels in terms of a level's sixteen-float vector. Each level's file includes its vector and then this.
// Everything is in an unnamed namespace, and nothing of the standard library is used that could be shared between
// object files: the linker would keep one copy, perhaps one that this CPU cannot run.
#pragma once

#include "activation.inl"
#include "formats.inl"
#include "gemm_plain.inl"
#include "integers.inl"
#include "kernels.h"
#include "latent.inl"
#include "rows.inl"
#include "step.inl"
#include "tiles.inl"

namespace {

// A level's table; one with instructions of its own replaces what it does with them.
constexpr mh::Kernels level_kernels(const char* name) {
  return {
      .name = name,
      .rounds_rows = false,
      .dot = dot,
      .product = product,
      .product_tiles = nullptr,
      .lay_rows = nullptr,
      .lay_columns = nullptr,
      .product_transposed = product_transposed,
      .outer = outer,
      .activate = activate,
      .activate_grad = activate_grad,
      .widen = widen,
      .narrow = narrow,
      .quantize = quantize,
      .integer_tile = integer_tile,
      .multiply_integers = multiply_integers,
      .int8_shift = kInt8Shift,
      .combine = combine,
      .add_bias = add_bias,
      .norm = norm,
      .attend = attend,
      .join = join,
      .mix_rows = mix_rows,
      .dot_rows = dot_rows,
      .tiles = nullptr,
      .gemm_plain = gemm_plain,
      .scores = scores,
  };
}

}  // namespace
