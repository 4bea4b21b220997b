// y = x·Wᵀ (+ b) with packed W: one layer, or several that take the same x.
#include <string.h>

#include <utility>

#include "multiply.h"
#include "pool.h"
#include "sorted.h"

namespace mh {
namespace {

struct Layer {
  Matrix m;
  mh_rows y;
};

struct Linears {
  const Kernels& k;
  std::vector<Layer> layers;
  int64_t threads;
  bool exact;
  IntBlocks integers[5];  // by kind: int8; nibbles in groups of 32, of 64; bytes in such groups
  std::vector<const float*> at;
  uint16_t* tiles = nullptr;  // of the blocks, where a layer takes them

  static int kind(const Matrix& m) {
    return !m.format().grouped ? 0 : (m.format().bits == 4 ? 1 : 3) + (m.m.group == 32 ? 0 : 1);
  }

  IntBlock int_block(const Matrix& m, int64_t block, int64_t begin, int64_t rows) const {
    return integers[kind(m)].block(block, begin, rows, k.integer_tile(rows, m.m.format));
  }

  uint16_t* tiles_of(int64_t block, int64_t begin, int64_t depth) const {  // with room for whole tiles of 16 rows
    return tiles + (begin + 16 * block) * depth;
  }

  // Every block's rows as tiles, once for all tasks.
  void lay_tiles(const mh_rows& in, int64_t depth, int64_t blocks) {
    const Halves halves = as_halves(in, depth, workspaces().halves, k, threads);
    tiles = reinterpret_cast<uint16_t*>(workspaces().gathered.floats((in.count + 16 * blocks) * depth / 2));
    const int64_t pieces = divide_up(divide_up(in.count, blocks), 16);
    parallel(threads, blocks * pieces, [&](int64_t task, int64_t) {
      const int64_t block = task / pieces, row = task % pieces * 16, begin = block * in.count / blocks;
      const int64_t left = (block + 1) * in.count / blocks - begin - row, n = left < 16 ? left : 16;
      const uint16_t* from[16];
      for (int64_t i = 0; i < n; i++) from[i] = halves.row(begin + row + i);
      if (n > 0) k.lay_rows(from, n, depth, false, tiles_of(block, begin, depth) + row * depth);
    });
  }

  void panels(const Layer& layer, int64_t first, int64_t end, int64_t block, int64_t begin, int64_t rows,
              const Worker& w) const {
    const Matrix& m = layer.m;
    if (m.format().plain) return plain_panels(layer, first, end, begin, rows, w);
    RowBlock in(rows, m, k, exact);
    if (in.is_integer) {
      in.integers = int_block(m, block, begin, rows).rows();
    } else if (in.is_tiles) {
      in.tiles = {tiles_of(block, begin, m.size.depth), rows};
    } else if (in.is_few) {
      for (int64_t i = 0; i < rows; i++) in.row[i] = {at[begin + i]};
    } else {
      float* panels = reinterpret_cast<float*>(w.rounded);
      gather(at.data() + begin, rows, m.size.depth, panels);
      in.matrix = {panels, rows};
    }
    for (int64_t p = first, n; p < end; p += n) {
      Panel panels[2 * kColumnBlocks];
      int64_t all = 0;
      n = end - p < kColumnBlocks ? end - p : kColumnBlocks;
      for (; all < 2 * n && p + all < m.size.panels; all++) panels[all] = m.panel(m.base, p + all);
      for (int64_t i = 0; i + 1 < all; i++) panels[i].next = panels + i + 1;
      in.times(k, panels, n, w.scratch, w.first, w.c_stride);
      for (int64_t q = 0; q < n; q++) put(layer, p + q, begin, rows, w.first + q * w.c_stride);
    }
  }

  // Bias and rounding of [rows][16] for panel p.
  void put(const Layer& layer, int64_t p, int64_t begin, int64_t rows, float* c) const {
    const int64_t columns = layer.m.outputs_of(p);
    if (const float* bias = layer.m.bias(0, p)) k.add_bias(bias, columns, rows, c);
    for (int64_t i = 0; i < rows; i++, c += 16) {
      const int64_t offset = (begin + i) * layer.y.stride + 16 * p;
      if (layer.y.dtype == MH_BF16)
        k.narrow(c, columns, static_cast<uint16_t*>(layer.y.data) + offset);
      else
        memcpy(static_cast<float*>(layer.y.data) + offset, c, columns * sizeof(float));
    }
  }

  // Every row in the order it has alone, however many there are: no path here depends on `exact`.
  void plain_panels(const Layer& layer, int64_t first, int64_t end, int64_t begin, int64_t rows,
                    const Worker& w) const {
    for (int64_t p = first; p < end; p++) {
      k.gemm_plain(layer.m.panel(layer.m.base, p), at.data() + begin, rows, w.scratch, w.first);
      put(layer, p, begin, rows, w.first);
    }
  }

  // Once for all matrices of a kind.
  void round_rows(const Matrix& m, int64_t blocks) {
    IntBlocks& to = integers[kind(m)];
    if (to.memory) return;
    const int64_t count = static_cast<int64_t>(at.size()), parts = divide_up(kBlockRows, kQuantRows);
    to.prepare({m, k}, count, blocks, workspaces().integers[kind(m)]);
    parallel(threads, count <= kQuantRows ? 1 : blocks * parts, [&](int64_t task, int64_t) {
      const int64_t b = task / parts, begin = b * count / blocks, rows = (b + 1) * count / blocks - begin;
      const IntBlock block = int_block(m, b, begin, rows);
      for (int64_t i = task % parts * kQuantRows; i < rows && i < (task % parts + 1) * kQuantRows; i++)
        block.set(i, at[begin + i], k);
      if (task % parts == 0) block.clear_rest();
    });
  }

  void all(const mh_rows& in) {
    int64_t depth = 0, count = in.count, blocks = divide_up(count, kBlockRows);
    for (const Layer& layer : layers)
      depth = layer.m.size.depth > depth ? layer.m.size.depth : depth;  // records are padded
    const Floats x = as_floats(in, depth, workspaces().x, k, threads);
    at.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) at[i] = x.row(i);
    int64_t every = 0;
    for (const Layer& layer : layers) {
      every += layer.m.size.panels;
      if (layer.m.format().integer) round_rows(layer.m, blocks);
    }
    for (const Layer& layer : layers)
      if (!tiles && !layer.m.format().plain && in_tiles(count / blocks, layer.m, k, exact))
        lay_tiles(in, layer.m.size.depth, blocks);
    const int64_t most = count < kBlockRows ? count : kBlockRows;
    for (int64_t i = 0; i < threads; i++) workspaces().worker[i].floats(worker_floats(most, depth));
    int64_t pieces = divide_up(8 * threads, blocks);
    pieces = pieces < every ? pieces : every;
    parallel(threads, blocks * pieces, [&](int64_t task, int64_t worker) {
      const Worker w(workspaces().worker[worker], most);
      const int64_t block = task / pieces, piece = task % pieces;
      const int64_t begin = block * count / blocks, rows = (block + 1) * count / blocks - begin;
      int64_t first = piece * every / pieces, left = (piece + 1) * every / pieces - first;
      for (const Layer& layer : layers) {
        const int64_t here = layer.m.size.panels - first < left ? layer.m.size.panels - first : left;
        if (here > 0) panels(layer, first, first + here, block, begin, rows, w), left -= here;
        first = here > 0 ? 0 : first - layer.m.size.panels;
      }
    });
  }
};

Matrix record_matrix(const mh_linear& l) {
  Matrix m = checked_matrix(l.weight, l.bytes / 64 * 64, "linear");
  if (!l.record || !is_aligned(l.record))
    fail(MH_BAD_ARGUMENT, "linear: its record is missing or not aligned to 64 bytes");
  m.base = static_cast<const uint8_t*>(l.record);
  return m;
}

Layer checked_layer(const mh_linear* l, const mh_rows* x, mh_rows y) {
  need(l, "a linear layer");
  need(x, "x");
  const Layer layer{is_plain(l->weight) ? plain_matrix(*l) : record_matrix(*l), y};
  if (layer.m.m.parts != 1) fail(MH_BAD_ARGUMENT, "a linear layer has one part, not %lld", (long long)layer.m.m.parts);
  check_rows(x, x->count, layer.m.m.inputs, "x");
  check_rows(&y, x->count, layer.m.m.outputs, "y");
  return layer;
}

void run_layers(const Kernels& k, std::vector<Layer> layers, const mh_rows& x, const mh_run& run) {
  if (x.count == 0) return;
  Call call(x.count);
  Linears{k, std::move(layers), run.threads, run.exact != 0, {}, {}}.all(x);
  workspaces().trim();
}

}  // namespace
}  // namespace mh

int mh_linear_forward(const mh_linear* l, const mh_rows* x, const mh_rows* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    need(y, "y");
    run_layers(*k, {checked_layer(l, x, *y)}, *x, *run);
  });
}

int mh_linears(const mh_linear* const* l, int64_t count, const mh_rows* x, void* const* y, const mh_run* run) {
  using namespace mh;
  return guard([&] {
    const Kernels* k = checked_kernels(run);
    need(l, "the layers' array");
    need(x, "x");
    need(y, "y");
    if (count < 1 || count > 64) fail(MH_BAD_ARGUMENT, "%lld layers in one call: 1 to 64", (long long)count);
    std::vector<Layer> layers;
    for (int64_t i = 0; i < count; i++) {
      const int64_t width = l[i] ? l[i]->weight.outputs : 0;
      layers.push_back(checked_layer(l[i], x, {y[i], x->dtype, x->count, width, width}));
    }
    run_layers(*k, std::move(layers), *x, *run);
  });
}
