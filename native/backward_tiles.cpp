// The backward pass in products of bf16 with float32 sums. Rows are rounded to tiles once, in the first phase:
//   1. by rows: dact = dy·Wdown; <act, dact>; dh through the activation, in float32; dh, act, dy and x to tiles
//   2. by outputs of the weights: dW = Σ rows, into the caller's memory; biases in float32
//   3. by columns of dx: dh·Wup, summed over a token's experts in their order
#include <string.h>

#include "backward.h"

namespace mh {
namespace {

constexpr int64_t kPartRows = 512;                   // of one expert: its weights are rounded once for all of them
constexpr int64_t kGroupBytes = int64_t{1} << 23;    // what one group of parts may write between two phases
constexpr int64_t kPartNumbers = int64_t{1} << 19;   // a part's rows of one matrix stay in the second cache
constexpr int64_t kGatherColumns = 64;

struct Part {  // consecutive blocks of an expert
  const Block *first, *last;
  int64_t expert, begin, rows;
  uint16_t *dh, *dh_turned, *act, *dy_turned, *x;  // tiles: left of dx, left of dWup, right of dWdown, left, right
  float* bias;                                     // Σ dh
  int64_t row_tiles() const { return divide_up(rows, 16); }
  int64_t depth() const { return divide_up(rows, 32); }  // of dW
};

struct InTiles : Backward {
  const TileKernels& t = *k.tiles;
  const int64_t wide = e.up.size.panels / e.parts, down = e.down.size.panels;  // panels of F and of D
  const int64_t h_depth = divide_up(e.up.size.panels, 2), dy_depth = divide_up(down, 2);
  std::vector<Part> parts = {};

  // ---- Memory. ----

  int64_t numbers(const Part& p) const {
    int64_t turned = 0;
    if (g.up) turned += e.up.size.panels + down;
    if (g.down) turned += down + wide;
    return (dx ? p.row_tiles() * h_depth : 0) + turned * p.depth();
  }

  void place(Part& p, uint16_t*& at, float*& bias) const {
    const auto take = [&](bool wanted, int64_t tiles) {
      uint16_t* here = wanted ? at : nullptr;
      if (wanted) at += tiles * kTileNumbers;
      return here;
    };
    p.dh = take(dx, p.row_tiles() * h_depth);
    p.dh_turned = take(g.up, e.up.size.panels * p.depth()), p.x = take(g.up, down * p.depth());
    p.dy_turned = take(g.down, down * p.depth()), p.act = take(g.down, wide * p.depth());
    p.bias = bias, bias += h_stride;
  }

  struct Scratch {  // of a worker
    uint16_t *left, *right, *pairs;
    float *c, *dh, *act, *gathered, *dweight, *block;
    int64_t c_block;
  };

  int64_t scratch_floats(int64_t rows) const {
    const int64_t padded = round_up(rows, 32), weights = kColumnBlocks * (h_depth > dy_depth ? h_depth : dy_depth);
    const int64_t tiles = padded / 16 * dy_depth + weights + padded / 32;
    return tiles * kTileNumbers / 2 + (kColumnBlocks + e.parts + 1 + kGatherColumns / 16) * 16 * padded + padded +
           kScratch + 16 * 16 * (down > wide ? down : wide);
  }

  Scratch scratch(int64_t worker, int64_t rows) const {
    const int64_t padded = round_up(rows, 32), weights = kColumnBlocks * (h_depth > dy_depth ? h_depth : dy_depth);
    Scratch w;
    float* at = workspaces().worker[worker].floats(0);
    const auto floats = [&](int64_t n) { return at += n, at - n; };
    const auto tiles = [&](int64_t n) { return reinterpret_cast<uint16_t*>(floats(n * kTileNumbers / 2)); };
    w.left = tiles(padded / 16 * dy_depth), w.right = tiles(weights), w.pairs = tiles(padded / 32);
    w.c_block = 16 * padded;
    w.c = floats(kColumnBlocks * w.c_block), w.dh = floats(e.parts * w.c_block), w.act = floats(w.c_block);
    w.gathered = floats(kGatherColumns / 16 * w.c_block), w.dweight = floats(padded), w.block = floats(0);
    return w;
  }

  // ---- 1. By rows. ----

  // Panels of the rows at `rows`, as left tiles, as left tiles of their transposition, as right tiles; or null.
  void to_tiles(const Part& p, const std::vector<const float*>& rows, int64_t panels, const Scratch& w, uint16_t* left,
                uint16_t* turned, uint16_t* right) const {
    constexpr int64_t most = kGatherColumns / 16;
    const int64_t step = dy_depth * kTileNumbers, tile_rows = p.depth() * kTileNumbers;
    for (int64_t q = 0; q < panels; q += most) {
      const int64_t n = panels - q < most ? panels - q : most;
      for (int64_t i = 0; i < p.rows; i++)
        for (int64_t j = 0; j < n; j++)
          memcpy(w.gathered + (j * p.rows + i) * 16, rows[static_cast<size_t>(p.begin + i)] + 16 * (q + j), 64);
      for (int64_t j = 0; j < n; j++) {
        const float* from = w.gathered + j * p.rows * 16;
        if (left) t.left(from, 16, p.rows, (q + j) % 2, left + (q + j) / 2 * kTileNumbers, step);
        uint16_t* pairs = right ? right + (q + j) * tile_rows : w.pairs;
        if (right || turned) t.right(from, 16, p.rows, pairs);
        if (turned) t.turn(pairs, p.depth(), turned + (q + j) * tile_rows);
      }
    }
  }

  static void clear_last(uint16_t* left, int64_t tiles, int64_t depth) {  // the second halves of a last tile
    for (int64_t i = 0; i < tiles; i++)
      for (int64_t j = 0; j < 16; j++)
        memset(left + ((i + 1) * depth - 1) * kTileNumbers + 32 * j + 16, 0, 16 * sizeof(uint16_t));
  }

  void rows_task(const Part& p, const Scratch& w) const {
    to_tiles(p, dy_rows, down, w, w.left, p.dy_turned, nullptr);
    if (p.x) to_tiles(p, x_rows, down, w, nullptr, nullptr, p.x);
    if (down % 2) clear_last(w.left, p.row_tiles(), dy_depth);
    if (p.dh && e.up.size.panels % 2) clear_last(p.dh, p.row_tiles(), h_depth);
    memset(w.dweight, 0, p.rows * sizeof(float));
    const std::vector<Panel> panels = e.down.all_panels(p.expert);
    for (int64_t q = 0, n; q < wide; q += n) {
      n = wide - q < kColumnBlocks ? wide - q : kColumnBlocks;
      t.columns({panels.data(), down, q, n}, w.block, w.right);
      t.multiply({w.left, w.right, p.row_tiles(), dy_depth, n, w.c, 16, w.c_block, true});
      for (int64_t j = 0; j < n; j++) columns_task(p, q + j, w.c + j * w.c_block, w);
    }
    for (const Block* b = p.first; b <= p.last; b++) weight_gradients(*b, w.dweight + b->begin - p.begin);
  }

  // 16 columns of dact through the activation.
  void columns_task(const Part& p, int64_t column, const float* dact, const Scratch& w) const {
    const int64_t part = w.c_block, tile_rows = p.depth() * kTileNumbers;
    for (const Block* b = p.first; b <= p.last; b++) {
      const int64_t at = 16 * (b->begin - p.begin);
      const float* h = hidden + b->begin * h_stride + e.parts * column * 16 * b->rows();
      k.activate_grad(static_cast<int>(e.activation), h, dact + at, s.weight.data() + b->begin, b->rows(), w.dh + at,
                      part, w.act + at, w.dweight + b->begin - p.begin);
    }
    if (p.act) t.right(w.act, 16, p.rows, p.act + column * tile_rows);
    for (int64_t i = 0; i < e.parts; i++) {
      const float* dh = w.dh + i * part;
      const int64_t panel = column * e.parts + i;
      if (p.dh) t.left(dh, 16, p.rows, panel % 2, p.dh + panel / 2 * kTileNumbers, h_depth * kTileNumbers);
      if (p.dh_turned) {
        t.right(dh, 16, p.rows, w.pairs);
        t.turn(w.pairs, p.depth(), p.dh_turned + (i * wide + column) * tile_rows);
      }
      if (!g.up_bias) continue;
      float sums[16] = {};
      for (int64_t r = 0; r < p.rows; r++)
        for (int64_t j = 0; j < 16; j++) sums[j] += dh[16 * r + j];
      memcpy(p.bias + (i * wide + column) * 16, sums, sizeof sums);
    }
  }

  // ---- 2. By outputs of the weights. ----

  // Tiles of rows [first, end) of a matrix's dW, parts after each other.
  void weights_task(const Part& p, bool up, int64_t first, int64_t end, bool fresh, float* scratch) const {
    const int64_t outputs = up ? e.F : e.D, inputs = up ? e.D : e.F, tiles = up ? wide : down, blocks = up ? down : wide;
    float* dw = (up ? g.up : g.down) + p.expert * (up ? e.parts : 1) * outputs * inputs;
    const uint16_t *left = (up ? p.dh_turned : p.dy_turned) + first * p.depth() * kTileNumbers, *right = up ? p.x : p.act;
    if (outputs % 16 == 0 && inputs % 16 == 0)
      return t.multiply({left, right, end - first, p.depth(), blocks, dw + first * 16 * inputs, inputs, 16, fresh});
    for (int64_t i = first; i < end; i++, left += p.depth() * kTileNumbers) {
      t.multiply({left, right, 1, p.depth(), blocks, scratch, 16 * blocks, 16, true});
      const int64_t row = i % tiles * 16, rows = outputs - row < 16 ? outputs - row : 16;
      float* to = dw + (i / tiles * outputs + row) * inputs;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < inputs; j++) {
          float& sum = to[r * inputs + j];
          sum = scratch[r * 16 * blocks + j] + (fresh ? 0 : sum);
        }
    }
  }

  void biases(const Part& p, bool fresh) const {
    for (int64_t i = 0; g.up_bias && i < e.parts; i++)
      for (int64_t j = 0; j < e.F; j++) {
        float& sum = g.up_bias[(p.expert * e.parts + i) * e.F + j];
        sum = p.bias[i * wide * 16 + j] + (fresh ? 0 : sum);
      }
    if (!g.down_bias) return;
    float* to = g.down_bias + p.expert * e.D;
    if (fresh) memset(to, 0, e.D * sizeof(float));
    for (int64_t i = p.begin; i < p.begin + p.rows; i++)  // the router's weight is not in dy
      for (int64_t j = 0; j < e.D; j++) to[j] += s.weight[i] * dy_rows[i][j];
  }

  void weights(const Part* group, size_t count) {
    std::vector<const Part*> experts;
    for (const Part* p = group; p < group + count; p++)
      if (experts.empty() || experts.back()->expert != p->expert) experts.push_back(p);
    const Part* end = group + count;
    const int64_t pieces = divide_up(4 * threads, 2 * static_cast<int64_t>(experts.size()));
    parallel(threads, static_cast<int64_t>(experts.size()) * 2 * pieces, [&](int64_t task, int64_t worker) {
      const Part* first = experts[task / (2 * pieces)];
      const bool up = task / pieces % 2 == 0;
      const int64_t piece = task % pieces, tiles = up ? e.up.size.panels : down;
      for (const Part* p = first; p < end && p->expert == first->expert; p++) {
        const bool fresh = p == first && !seen[p->expert];
        if (up ? g.up : g.down)
          weights_task(*p, up, piece * tiles / pieces, (piece + 1) * tiles / pieces, fresh,
                       workspaces().worker[worker].floats(0));
        if (up && piece == 0) biases(*p, fresh);
      }
    });
    for (const Part* p : experts) seen[p->expert] = 1;
  }

  // ---- 3. By columns of dx. ----

  void dx_task(const Part* group, size_t count, int64_t first, int64_t end, const Scratch& w) const {
    std::vector<Panel> up;
    for (const Part* p = group; p < group + count; p++) {
      if (p == group || p->expert != p[-1].expert) up = e.up.all_panels(p->expert);
      for (int64_t q = first, n; q < end; q += n) {
        n = end - q < kColumnBlocks ? end - q : kColumnBlocks;
        t.columns({up.data(), e.up.size.panels, q, n}, w.block, w.right);
        t.multiply({p->dh, w.right, p->row_tiles(), h_depth, n, w.c, 16, w.c_block, true});
        const int64_t columns = e.D - 16 * q < 16 * n ? e.D - 16 * q : 16 * n;
        k.combine(w.c, w.c_block, p->rows, columns, nullptr, nullptr, s.token.data() + p->begin, dx_stride, dx + 16 * q);
      }
    }
  }

  // ---- All. ----

  void group(Part* group, size_t count) {
    int64_t all = 0, most = 0;
    for (const Part* p = group; p < group + count; p++) {
      all += numbers(*p) * kTileNumbers;
      most = p->rows > most ? p->rows : most;
    }
    uint16_t* at = reinterpret_cast<uint16_t*>(workspaces().dh.floats(divide_up(all, 2)));
    float* bias = workspaces().act.floats(static_cast<int64_t>(count) * h_stride);
    for (Part* p = group; p < group + count; p++) place(*p, at, bias);
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(scratch_floats(most));
    parallel(threads, static_cast<int64_t>(count),
             [&](int64_t task, int64_t worker) { rows_task(group[task], scratch(worker, most)); });
    if (any_weights()) weights(group, count);
    if (!dx) return;
    const int64_t wanted = 3 * threads, chunks = wanted < down ? wanted : down;
    parallel(threads, chunks, [&](int64_t task, int64_t worker) {
      dx_task(group, count, task * down / chunks, (task + 1) * down / chunks, scratch(worker, most));
    });
  }

  void all() {
    const int64_t width = h_stride > dy_stride ? h_stride : dy_stride, fit = kPartNumbers / width;
    const int64_t limit = fit < kPartRows ? fit : kPartRows;
    for (const Block& b : s.blocks) {
      if (!parts.empty() && parts.back().expert == b.expert && parts.back().rows + b.rows() <= limit)
        parts.back().last = &b, parts.back().rows += b.rows();
      else
        parts.push_back({&b, &b, b.expert, b.begin, b.rows()});
    }
    for (size_t first = 0, end; first < parts.size(); first = end) {
      int64_t bytes = 0;
      for (end = first; end < parts.size() && (end == first || bytes < kGroupBytes); end++)
        bytes += numbers(parts[end]) * kTileNumbers * 2;
      group(parts.data() + first, end - first);
    }
  }
};

}  // namespace

void backward_tiles(Backward& b) { InTiles{std::move(b)}.all(); }

}  // namespace mh
