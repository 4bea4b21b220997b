// What is done to projected rows before they are queries and keys: norms and the rotation.
#pragma once

#include "common.h"

namespace mh {

void check_norm(const mh_norm& n, int64_t width, const char* name);
void check_rotation(const mh_rotation* r, int64_t rows, int64_t width);  // of rows that have so many numbers each
const float* norm_weight(const mh_norm& n, Workspace& workspace, const Kernels& k);  // in float32, or null
// Rotates the first `width` numbers of a head; the two of a pair come out half of `width` apart.
void rotate(const mh_rotation& r, const float* cos, const float* sin, float* head, float* scratch);
void put(const Kernels& k, const float* from, int64_t width, int64_t dtype, void* to, int64_t offset);

}  // namespace mh
