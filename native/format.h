// The weight formats, one row each: sizes, offsets, checks and the choice of a path follow from the row. What a level
// does with a format is its row of kFormatKernels in formats.inl; manyhands/quant/record.py has the bytes.
// Data only: a function here would be compiled into every level's object file (kernels.inl says why that is a trap).
#pragma once

#include <stdint.h>

#include "manyhands.h"

namespace mh {

struct Format {
  const char* name;
  int64_t bits;             // of a weight
  int64_t scale_bytes = 0;  // of a scale; 0: the format has none
  bool grouped = false;     // a scale per output and group of inputs, mh_matrix.group of them; else one per output
  bool half = false;        // scales of two bytes are IEEE halves; else bf16
  bool integer = false;     // rows are rounded to int8 and multiplied with it as integers
  bool plain = false;       // [outputs][inputs] as training has them, not in panels of a record
  bool exact = false;       // never rounded to bf16, not even at a level that multiplies bf16
  int64_t few_rows = 0;     // rows that the vector path (`dot`) takes; more only where each must be as it is alone
};

constexpr Format kFormats[] = {
    {.name = "float32", .bits = 32, .exact = true, .few_rows = 4},
    {.name = "bf16", .bits = 16, .few_rows = 4},
    {.name = "int8", .bits = 8, .scale_bytes = 4, .integer = true, .exact = true},
    {.name = "int4", .bits = 4, .scale_bytes = 2, .grouped = true, .integer = true, .exact = true},
    {.name = "q8_0", .bits = 8, .scale_bytes = 2, .grouped = true, .half = true, .integer = true, .exact = true},
    {.name = "q4_0", .bits = 4, .scale_bytes = 2, .grouped = true, .half = true, .integer = true, .exact = true},
    {.name = "plain float32", .bits = 32, .plain = true, .exact = true, .few_rows = 4},
    {.name = "plain bf16", .bits = 16, .plain = true, .few_rows = 4},
    {.name = "plain float32 taken as bf16", .bits = 32, .plain = true},
};
static_assert(sizeof kFormats / sizeof *kFormats == MH_FORMATS, "a row for each MH_... format, in their order");

}  // namespace mh
