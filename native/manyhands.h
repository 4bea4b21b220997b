// The C interface of the expert kernels. Formats and layout: manyhands/quant/record.py.
// Every function checks what it is given, touches nothing on error and returns 0 or one of the codes below;
// mh_error() then says what was wrong, to the thread that made the call. A stride counts elements from one row to the
// next.
//
// Threads: every function but mh_contention may be called from several threads at once, as long as no two calls write
// the same memory. The calls take turns: one mutex of the process is held from a call's first phase to its last, for
// there is one pool of threads and one set of workspaces, which are kept between calls (up to 32 MiB each). mh_steps
// takes it step by step, so that other threads' calls may come between two steps. A child after fork has a pool of its
// own; fork while another thread is in a call, and the child's first call may find that call's workspaces: exec
// instead.
#pragma once

#include <stdint.h>

#define MH_API extern "C" __attribute__((visibility("default")))

enum { MH_ABI = 6 };
enum {
  MH_OK = 0,
  MH_BAD_ARGUMENT = 1,
  MH_NO_LEVEL = 2,
  MH_NO_MEMORY = 3,
  MH_BAD_ROUTING = 4,
  MH_NOT_RESIDENT = 5,  // an expert that a token is routed to is null in its table
  MH_FETCH_FAILED = 6,  // a callback of mh_fetch gave something else than 0, or a record that cannot be
};
// Formats of weights, a row of kFormats (format.h) each: packed ones in the order of manyhands/config/packing.py, then
// those that are not packed, [outputs][inputs] as training has them; ROUNDED are float32, taken as bf16. Rows of
// activations have the first two as their dtype.
enum {
  MH_FLOAT32,
  MH_BF16,
  MH_INT8,
  MH_INT4,
  MH_Q8_0,
  MH_Q4_0,
  MH_PLAIN_FLOAT32,
  MH_PLAIN_BF16,
  MH_PLAIN_ROUNDED,
  MH_FORMATS  // how many
};
enum { MH_PORTABLE = 0, MH_AVX2 = 1, MH_AVX512 = 2, MH_AVX512_BF16 = 3, MH_AMX = 4, MH_BEST = -1 };
enum { MH_SWIGLU = 0, MH_SWIGLU_OAI = 1, MH_GEGLU = 2, MH_GEGLU_TANH = 3, MH_GELU = 4, MH_RELU = 5 };

struct mh_matrix {  // one packed matrix: places are byte offsets in a record, -1 where there is no such section
  int64_t outputs, inputs, parts, format, group, weight, scales, bias;
};

struct mh_experts {
  const void* const* table;  // [num_experts] records of record_bytes, on 64-byte boundaries; null: not in memory
  int64_t num_experts, record_bytes, activation;
  mh_matrix up, down;
};

struct mh_stacked {  // up [E][2F or F][D], down [E][D][F]; biases float32 or null; dtype is one of MH_PLAIN_...
  const void *up, *down;
  const float *up_bias, *down_bias;
  int64_t dtype, num_experts, hidden_size, expert_size, activation;
};

struct mh_linear {  // a record; or, where the format is MH_PLAIN_..., weights [outputs][inputs] and a bias or null
  const void* record;
  int64_t bytes;
  mh_matrix weight;
  const float* bias;
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

struct mh_run {  // exact, 0 or 1: a row of a float format has the same bits however many rows there are beside it
  int64_t level, threads, exact;
};

struct mh_norm {  // x / rms(x) · weight; weight [width] float32 or bf16, null where there is no norm
  const void* weight;
  int64_t dtype, width;
  double eps;
};

struct mh_cache {  // one layer's keys and values in blocks of positions, [blocks][groups][block][width]
  void *k, *v;            // v may lie in k: of a latent, the first numbers are the values
  int64_t k_size, v_size;  // numbers that may be touched
  int64_t dtype, groups, k_width, v_width;
  int64_t block;  // positions of a block; of a cache in one piece its room, or anything larger
  int64_t k_block, v_block, k_group, v_group, k_row, v_row;  // numbers from one to the next
};

struct mh_sequences {  // sequence s has rows [begin[s], begin[s + 1]) of the call, at positions first[s], first[s] + 1, …
  int64_t count;
  const int64_t *begin, *first;   // [count + 1], [count]; begin[0] is 0
  const int64_t *table, *blocks;  // blocks[table[s] + p / block] is the block of position p
  int64_t entries;                // how many blocks[] has
  const int64_t* start;           // [count] positions at the head of each that are padding, which nobody sees; or null
};

enum { MH_NORM_ROW = 0, MH_NORM_HEAD = 1, MH_NORM_AFTER = 2 };  // over all heads; each; each after the rotation
struct mh_rotation {  // cos and sin [positions][width / 2] float32; interleave: pairs are (0, 1), (2, 3), …
  const float *cos, *sin;
  int64_t width, positions, interleave;
  mh_norm q_norm, k_norm;
  int64_t norms;  // one of MH_NORM_...
};

struct mh_attention {
  int64_t heads, window;  // a query at position p sees keys ≤ p, with a window those > p − window; 0 is none
  const float* sinks;     // [heads] or null
  double scale, cap;      // cap 0 is none
};

struct mh_latent {  // multi-head latent attention: kv_b_proj's weight [heads][nope + value][width], float32 or bf16
  const void* weight;
  int64_t size, dtype, heads, nope, value, width;  // size in numbers; the others multiples of 16, but heads
};

struct mh_router {  // weight [experts][width] float32; biases [experts] float32 or null; groups 0 or 1: not limited
  const float *weight, *logit_bias, *choice_bias;
  int64_t experts, width, per_token, sigmoid, groups, topk_group, best_of_group, renormalise;
  double scaling;
};

// Packed experts that are brought into memory while calls go on. MH_STEP_FETCH gives `begin` the numbers of the experts
// that tokens are routed to, each once, in ascending order: it starts to read those that are missing, and may write the
// table. MH_STEP_EXPERTS later reads the table once, works on the experts that are there, and asks `wait` for each other
// one, in the same order; y has the bits it has where all were there. Records stay where they are until that step has
// ended, or until the next `begin` of this context where it never came to it.
// Both are called by the thread that made the call, without a lock of this library: they may block, take an
// interpreter's lock, or call the library. They give 0, or any other number to end the step with MH_FETCH_FAILED; its y
// is then unfinished. They throw nothing.
struct mh_fetch {
  int64_t (*begin)(void* context, int64_t layer, const int64_t* experts, int64_t count);
  int64_t (*wait)(void* context, int64_t layer, int64_t expert, const void** record);
  void* context;
  int64_t layer;  // handed on
};

MH_API int64_t mh_abi(void);         // MH_ABI: one more where a meaning changed that mh_layout does not show
MH_API const char* mh_layout(void);  // structures, functions and codes in text (layout.cpp), compared at load
MH_API const char* mh_error(void);
// Whether OpenMP's threads wait asleep from now on, after `waited` nanoseconds of waiting for a core and `ran` of
// running on one (native/openmp.cpp). For tests: every call measures this by itself. One caller at a time.
MH_API int64_t mh_contention(int64_t waited, int64_t ran);
MH_API int64_t mh_levels(void);  // bit l is set where level l can run here
// Bytes of a packed matrix's weights, scales and bias in a record: what quant/record.py must say too.
MH_API int mh_matrix_bytes(const mh_matrix*, int64_t* bytes);
// Experts are packed or stacked: one of the two is null.
MH_API int mh_forward(const mh_experts*, const mh_stacked*, const mh_routing*, const mh_rows* x, const mh_rows* y,
                      float* hidden, int64_t hidden_count, const mh_run*);
MH_API int mh_backward(const mh_experts*, const mh_stacked*, const mh_routing*, const mh_rows* x, const mh_rows* dy,
                       const float* hidden, int64_t hidden_count, const mh_rows* dx, const mh_gradients*,
                       const mh_run*);
MH_API int mh_linear_forward(const mh_linear*, const mh_rows* x, const mh_rows* y, const mh_run*);
// Calls one after the other, their arguments in the order of the functions below and above; `run` is shared.
// MH_STEP_LINEARS has its count in n[0], MH_STEP_EXPERTS no hidden, MH_STEP_LATENT_PRODUCTS `values` in n[0].
// MH_STEP_ADD: rows a[0] += factor · a[1] (· sigmoid of a[2], one value per row, if there is one).
// MH_STEP_FETCH: `begin` of the mh_fetch a[0] for the mh_routing a[1] to n[0] experts; MH_STEP_EXPERTS has the fetch, or null, in a[5].
// MH_STEP_ACTIVATE: a[2] = activation n[0] of gate a[0] and up a[1]. The rows of these two are float32.
enum {
  MH_STEP_NORM = 0,
  MH_STEP_LINEARS = 1,
  MH_STEP_ROPE_AND_CACHE = 2,
  MH_STEP_ATTEND = 3,
  MH_STEP_ROUTE = 4,
  MH_STEP_EXPERTS = 5,
  MH_STEP_ADD = 6,
  MH_STEP_ACTIVATE = 7,
  MH_STEP_LATENT_PRODUCTS = 8,
  MH_STEP_LATENT_ROPE_AND_CACHE = 9,
  MH_STEP_FETCH = 10
};
struct mh_step {
  int64_t kind;
  void* a[8];
  int64_t n[2];
  double factor;
};
MH_API int mh_steps(const mh_step*, int64_t count, const mh_run*);

// Layers with the same input: y[i] is [x->count][outputs of i] in x's dtype, contiguous.
MH_API int mh_linears(const mh_linear* const*, int64_t count, const mh_rows* x, void* const* y, const mh_run*);
MH_API int mh_rms_norm(const mh_norm*, const mh_rows* x, const mh_rows* y, const mh_run*);
// Projected rows: q to out [rows][heads · k_width] float32, normed and rotated; keys the same and values as they are
// into the cache, each at its position. `positions` of the rotation are the rows: cos and sin have one of each. v is null
// where the values lie in the keys.
MH_API int mh_rope_and_cache(const mh_rows* q, const mh_rows* k, const mh_rows* v, const mh_sequences*,
                             const mh_rotation*, const mh_cache*, float* out, const mh_run*);
// q and y [rows][heads][width] float32, contiguous, rows as begin[count] says. A query's keys are those of its sequence
// from `start` on up to its own position; y of a row that is padding is 0. A row's numbers depend on its own query, keys
// and values alone: keys are taken in splits of 256 from `start` on, which are joined in order.
MH_API int mh_attend(const mh_attention*, const mh_sequences*, const float* q, const mh_cache*, float* y,
                     const mh_run*);
// Multi-head latent attention, absorbed, for any rows: queries go to the latents. In this order: products with values = 0
// of the projected q into `placed`; mh_latent_rope_and_cache; mh_attend with one group, the cache's v being its k, of
// v_width latent.width; products with values = 1 of what it says. Every row is float32, and its bits are those it has
// alone.
// x and y are [rows][heads · any]; of each head the first numbers count. values = 0: y[h] [width] = W_k[h]ᵀ x[h] [nope],
// one input after the other; values = 1: y[h] [value] = W_v[h] x[h] [width].
MH_API int mh_latent_products(const mh_latent*, int64_t values, const mh_rows* x, const mh_rows* y, const mh_run*);
// kv [rows][width + r]: its first numbers, normed (the rotation's k_norm), and the last r = rotation.width, turned, into
// the cache [width + r]; the last r of each head of q [rows][heads · (nope + r)], turned, into the last r of each head of
// placed [rows][heads · (width + r)].
MH_API int mh_latent_rope_and_cache(const mh_latent*, const mh_rows* q, const mh_rows* kv, const mh_sequences*,
                                    const mh_rotation*, const mh_cache*, const mh_rows* placed, const mh_run*);
// logits and scores [tokens][experts], ids and weights [tokens][per_token].
MH_API int mh_route(const mh_router*, const mh_rows* x, float* logits, float* scores, int64_t* ids, float* weights,
                    const mh_run*);
