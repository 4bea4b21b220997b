// What one level of the CPU's abilities provides. A tile has 16 columns: the outputs of one panel.
#pragma once

#include <stdint.h>

namespace mh {

struct Panel {  // 16 outputs of a matrix
  const uint8_t* data;
  const uint8_t* scales;
  int64_t depth, group;  // inputs with padding; inputs per scale (int4, q8_0, q4_0)
  int format;
  int64_t rows, inputs;  // of plain weights: how many of the 16 outputs exist; inputs, which are also the stride
  const Panel* next;     // what will be multiplied after it, to be fetched meanwhile; may be null
};

struct Columns {  // blocks of 16 inputs each, [block, block + blocks), of all outputs of a matrix
  const Panel* panels;
  int64_t count, block, blocks;
};

struct Row {  // one row of activations for the vector path
  const float* x;
};

struct IntRows {  // rows rounded to int8, [tiles][depth / 64][tile][64], the last tile perhaps with rows missing
  const int8_t* q;
  const float* scale;    // [groups][stride]
  const int32_t* start;  // the same of -shift · Σ q: a product adds `shift` to the weights (nibbles hold w + 8)
  int64_t count, tile, stride, group;
};

struct IntRow {  // where one of them is written: 64 integers, and those q_step further; scales `stride` apart
  int8_t* q;
  int64_t q_step;
  float* scale;
  int32_t* start;
  int64_t stride;
};

struct Rows {  // activations for the matrix path, [inputs / 16][count][16]
  const float* at;
  int64_t count;
};

struct TileRows {  // the same rounded to bf16, in tiles, [count / 16][inputs / 32] of 1 KB (product_bf16.inl)
  const uint16_t* tiles;
  int64_t count;
};

constexpr int64_t kChunk = 256;                // inputs multiplied at a time: their 16 columns stay in the first cache
constexpr int64_t kQuantGroup = 64;            // activations that share a scale, for int8 weights
constexpr int kDotRows = 4;                    // rows a dot takes at a time
constexpr int64_t kColumnBlocks = 4;           // 16 columns each that product_transposed and combine take at a time
constexpr int64_t kScratch = 2 * kChunk * 16;  // floats of scratch a product needs

constexpr int64_t kSplitKeys = 256;  // keys of a split: their weights and values stay in the second cache

struct KvRun {  // keys and values of consecutive positions in one block
  const void *k, *v;
  int64_t keys;
};

struct KvSplit {             // rows (queries of heads that share keys) that attend to the same split
  const float* const* q;     // [rows]
  const int32_t *from, *to;  // [rows]: each sees keys [from, to) of the split, at least one
  int64_t rows;
  const KvRun* runs;
  int64_t run_count, keys;  // of all runs
  bool is_bf16;
  int64_t k_stride, v_stride, k_width, v_width;  // widths are multiples of 16
  float scale, cap;                              // cap 0 is none
  float* scratch;                                // [attend_scratch(rows, k_width + v_width)]
  float *largest, *total, *y;  // per row: the largest logit, Σ e^(logit - largest), Σ e^(logit - largest) · v
};
constexpr int64_t kManyRows = 8;  // from here on keys and values are laid out anew, which costs as much as a few rows
constexpr int64_t attend_scratch(int64_t rows, int64_t widths) { return (rows + widths) * kSplitKeys; }

struct KvJoin {  // the splits of one row: `next` from one's largest and total to the next one's, `next_part` of its y
  const float *largest, *total, *parts;
  int64_t splits, next, next_part, width;
  const float* sink;  // or null
};

// Products of bf16 by bf16 with float32 sums, in tiles of 1 KB: a left tile is 16 rows by 32 inputs, [16][32]; a right
// tile is 32 inputs by 16 columns in pairs of inputs, [16][16][2]. Tiles of one depth lie one after the other.
constexpr int64_t kTileNumbers = 512;

struct TileProduct {  // c = or += left [rows][depth] · right [blocks][depth], all counted in tiles
  const uint16_t *left, *right;
  int64_t rows, depth, blocks;
  float* c;
  int64_t row, block;  // floats from a row of c to the next, and from 16 of its columns to the next 16
  bool first;
};

struct TileKernels {
  // Rows of 16 floats, `stride` apart, as the first or second half of left tiles that are `step` numbers apart; zeros
  // up to whole tiles.
  void (*left)(const float* from, int64_t stride, int64_t rows, bool second, uint16_t* to, int64_t step);
  // The same rows as the inputs of right tiles.
  void (*right)(const float* from, int64_t stride, int64_t rows, uint16_t* to);
  // Right tiles whose inputs are the outputs of a matrix: [blocks][(count + 1) / 2].
  void (*columns)(const Columns&, float* scratch, uint16_t* to);
  // The columns of right tiles become the rows of left ones.
  void (*turn)(const uint16_t* right, int64_t count, uint16_t* left);
  void (*multiply)(const TileProduct&);
};

struct HeadRows {  // rows of one head and its part [n][width] of a projection, bf16 or float32; multiples of 16
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride, rows;
  const void* w;
  bool is_bf16;
  int64_t n, width;
  float* scratch;  // [head_scratch(n, width)]
};
constexpr int64_t head_scratch(int64_t n, int64_t width) { return 64 * (n > width ? n : width); }

struct Kernels {
  const char* name;
  bool rounds_rows;
  void (*dot)(const Panel&, const Row*, int rows, float* c);
  void (*product)(const Panel&, const Rows&, float* scratch, float* c);
  // Rows in tiles times some panels, whose products are c_stride apart; null where the level multiplies no bf16. And
  // rows of bf16 to tiles, all inputs or 16 columns of float32 [count][16] from `column` on, a multiple of 16: right
  // tiles for plain weights, else left ones, with zeros up to 16 rows.
  void (*product_tiles)(const Panel*, int64_t panels, const TileRows&, float* scratch, float* c, int64_t c_stride);
  void (*lay_rows)(const uint16_t* const* at, int64_t count, int64_t depth, bool right, uint16_t* tiles);
  void (*lay_columns)(const float* c, int64_t count, int64_t column, int64_t depth, bool right, uint16_t* tiles);
  // Rows times columns of the weights; `next` is fetched meanwhile. One block of columns is c_stride after the other.
  void (*product_transposed)(const Columns&, const Columns& next, const Rows&, float* scratch, float* c,
                             int64_t c_stride);
  // c[16][16], rows `stride` apart, = or += Σ_m a[m][16]·b[m][16]
  void (*outer)(const float* a, const float* b, int64_t m, float* c, int64_t stride, bool first);
  void (*activate)(int activation, const float* gate, const float* up, int64_t rows, float* out, int64_t out_stride);
  // dh from h and dact, [rows][16] and for each part after the other, the parts of dh `dh_part` apart; act·weight;
  // dweight += Σ act·dact
  void (*activate_grad)(int activation, const float* h, const float* dact, const float* weight, int64_t rows, float* dh,
                        int64_t dh_part, float* act, float* dweight);
  void (*widen)(const uint16_t* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, uint16_t* to);
  // n inputs, a multiple of 64; the last group may be shorter
  void (*quantize)(const float* x, int64_t n, int64_t group, int32_t shift, const IntRow& to);
  int64_t (*integer_tile)(int64_t count, int64_t format);  // how many of so many rows lie in a tile
  void (*multiply_integers)(const Panel&, const IntRows&, float* scratch, float* c);  // c [count][16]
  int32_t int8_shift;                                                                 // of a row's starts for weights of a byte
  // y[places[i]] += weight[i] · (c[i] + bias), `columns` of them from as many blocks; weight and bias may be null
  void (*combine)(const float* c, int64_t c_stride, int64_t rows, int64_t columns, const float* bias,
                  const float* weight, const int64_t* places, int64_t stride, float* y);
  void (*add_bias)(const float* bias, int64_t columns, int64_t rows, float* c);
  void (*norm)(const float* x, int64_t n, const float* weight, float eps, float* y);  // x / rms(x) · weight
  void (*attend)(const KvSplit&);
  void (*join)(const KvJoin&, float* y);  // in order; zeros where no split has a key
  void (*mix_rows)(const HeadRows&);      // y [width] = Σ_i x[i] · w_i, one i after the other
  void (*dot_rows)(const HeadRows&);      // y [n] = x · w_i, in the order of gemm_plain
  const TileKernels* tiles;  // null where the level multiplies no bf16
  // c [rows][16] = rows, zero up to a multiple of 16 inputs, by a plain panel; scratch kScratch + 256 · rows floats
  void (*gemm_plain)(const Panel&, const float* const* x, int64_t rows, float* scratch, float* c);
  void (*scores)(bool sigmoid, const float* logits, int64_t n, float* out);  // else softmax; out may be logits
};

extern const Kernels kPortable;
#if defined(MH_X86)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmx;
#endif

int64_t levels();                       // bit mask of what this CPU and operating system allow
const Kernels* kernels(int64_t level);  // null where it cannot run; level -1 is the best

}  // namespace mh
