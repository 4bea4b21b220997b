// Matrices and experts as a caller gives them, checked.
#pragma once

#include <vector>

#include "common.h"
#include "format.h"

namespace mh {

// The sizes of a matrix in a record, as manyhands/quant/record.py has them.
struct PanelSizes {
  int64_t depth, panels;               // inputs with padding; panels of all parts
  int64_t weights, scales, bias = 64;  // bytes of a panel's weights, scales, bias
};

struct Matrix {                        // a matrix per expert, packed or plain
  const uint8_t* base = nullptr;       // of the first expert's record, or weights; unused where there is a table
  const void* const* table = nullptr;  // of the experts' records, or null
  int64_t record_bytes;
  mh_matrix m;
  PanelSizes size;
  const float* plain_bias;
  const Format& format() const { return kFormats[m.format]; }
  int64_t row_group() const { return format().grouped ? m.group : kQuantGroup; }  // inputs that share a row's scale
  int64_t outputs_of(int64_t p) const;  // how many of a panel's 16 outputs exist
  const uint8_t* record(int64_t expert) const {  // or weights
    return table ? static_cast<const uint8_t*>(table[expert]) : base + expert * record_bytes;
  }
  Panel panel(const uint8_t* record, int64_t p) const;
  std::vector<Panel> all_panels(int64_t expert) const;
  const float* bias(int64_t expert, int64_t p) const;  // outputs_of(p) floats, or null
};

// A packed one in records of this size; where they are is the caller's to say.
Matrix checked_matrix(const mh_matrix& m, int64_t record_bytes, const char* name);
inline bool is_aligned(const void* record) { return reinterpret_cast<uintptr_t>(record) % 64 == 0; }

bool is_plain(const mh_matrix& m);  // by its format's code, which may be none
Matrix plain_matrix(const mh_linear& l);  // a linear layer's that is not packed, checked

inline bool is_gated(int64_t activation) { return activation >= MH_SWIGLU && activation < MH_GELU; }

void check_activation(int64_t activation);

struct Experts {
  Matrix up, down;
  int64_t num_experts, activation, parts, D, F;
};
Experts checked_experts(const mh_experts* e, const mh_stacked* s);

}  // namespace mh
