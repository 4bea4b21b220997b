// The C interface of the expert kernels. Formats and layout: manyhands/quant/record.py.
// Every function checks what it is given, touches nothing on error and returns 0 or one of the codes below;
// mh_error() then says what was wrong. A stride counts elements from one row to the next.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define MH_API extern "C" __declspec(dllexport)
#else
#define MH_API extern "C" __attribute__((visibility("default")))
#endif

enum { MH_ABI = 1 };
enum { MH_OK = 0, MH_BAD_ARGUMENT = 1, MH_NO_LEVEL = 2, MH_NO_MEMORY = 3, MH_BAD_ROUTING = 4 };
enum { MH_FLOAT32 = 0, MH_BF16 = 1, MH_INT8 = 2, MH_INT4 = 3 };
// Weights that are not packed: [outputs][inputs] as training has them; ROUNDED are float32, taken as bf16.
enum { MH_PLAIN_FLOAT32 = 4, MH_PLAIN_BF16 = 5, MH_PLAIN_ROUNDED = 6 };
enum { MH_PORTABLE = 0, MH_AVX2 = 1, MH_AVX512 = 2, MH_AMX = 3, MH_BEST = -1 };
enum { MH_SWIGLU = 0, MH_SWIGLU_OAI = 1, MH_GEGLU = 2, MH_GEGLU_TANH = 3, MH_GELU = 4, MH_RELU = 5 };

struct mh_matrix {  // one packed matrix: places are byte offsets in a record, -1 where there is no such section
  int64_t outputs, inputs, parts, format, group, weight, scales, bias;
};

struct mh_experts {
  const void* records;  // [num_experts][record_bytes], on a 64-byte boundary
  int64_t bytes, num_experts, record_bytes, activation;
  mh_matrix up, down;
};

struct mh_stacked {  // up [E][2F or F][D], down [E][D][F]; biases float32 or null; dtype is one of MH_PLAIN_...
  const void *up, *down;
  const float *up_bias, *down_bias;
  int64_t dtype, num_experts, hidden_size, expert_size, activation;
};

struct mh_linear {
  const void* record;
  int64_t bytes;
  mh_matrix weight;
};

struct mh_rows {  // float32 or bf16 [count][width]
  void* data;
  int64_t dtype, count, width, stride;
};

struct mh_routing {  // [tokens][per_token]; a pair that is not kept is never looked at
  const int64_t* ids;
  const float* weights;
  const uint8_t* kept;
  int64_t tokens, per_token;
};

struct mh_gradients {  // each may be null: not wanted. Layouts of the stacked weights, float32, overwritten
  float *weights, *up, *down, *up_bias, *down_bias;
};

struct mh_run {
  int64_t level, threads;
};

MH_API int64_t mh_abi(void);
MH_API const char* mh_error(void);
MH_API int64_t mh_levels(void);  // bit l is set where level l can run here
// Experts are packed or stacked: one of the two is null.
MH_API int mh_forward(const mh_experts*, const mh_stacked*, const mh_routing*, const mh_rows* x, const mh_rows* y, float* hidden,
                      int64_t hidden_count, const mh_run*);
MH_API int mh_backward(const mh_experts*, const mh_stacked*, const mh_routing*, const mh_rows* x, const mh_rows* dy, const float* hidden,
                       int64_t hidden_count, const mh_rows* dx, const mh_gradients*, const mh_run*);
MH_API int mh_linear_forward(const mh_linear*, const mh_rows* x, const mh_rows* y, const mh_run*);
MH_API int mh_pack(void* record, int64_t bytes, const mh_matrix*, const mh_rows* weights, const mh_rows* bias,
                   const mh_run*);
