// Rounds of the driver for the parts of a decoding step: norms, routing, layers with one input, placing, attending.
// Included by driver.cpp, whose helpers it uses. The portable level is held against the same written out in double.
#pragma once

namespace {

void norm_round() {
  const int64_t N = width(), T = any(0, 20), short_weight = any(0, 1);
  std::vector<float> x = normals(T * N, false), w = normals(N, true), first(x.size()), y(x.size());
  std::vector<uint16_t> short_w = to_bf16(w);
  const mh_norm norm{short_weight ? static_cast<void*>(short_w.data()) : w.data(), short_weight, N, 1e-5};
  for (int64_t t = 0; t < T; t++) {
    double squares = 1e-5 * static_cast<double>(N);
    for (int64_t j = 0; j < N; j++) squares += double(x[t * N + j]) * x[t * N + j];
    for (int64_t j = 0; j < N; j++)
      first[t * N + j] = static_cast<float>(x[t * N + j] / sqrt(squares / static_cast<double>(N)) * w[j]);
  }
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const mh_run run{level, any(1, 3), any(0, 1)};
    const mh_rows in{x.data(), 0, T, N, N}, out{y.data(), 0, T, N, N};
    expect(!mh_rms_norm(&norm, &in, &out, &run), "norm");
    close(y, first, level, largest, 1e-5, "norm");
  }
}

void route_round() {
  const int64_t groups = any(1, 4), E = groups * any(1, 20), D = any(0, 1) ? 16 * any(1, 9) : width(), T = any(0, 20);
  const int64_t kept_groups = any(1, groups), K = any(1, E / groups * kept_groups);
  std::vector<float> weight = normals(E * D, false), bias = normals(E, false), x = normals(T * D, false);
  const mh_router router{weight.data(),
                         any(0, 1) ? bias.data() : nullptr,
                         any(0, 1) ? bias.data() : nullptr,
                         E,
                         D,
                         K,
                         any(0, 1),
                         groups,
                         kept_groups,
                         any(1, 2),
                         any(0, 1),
                         1.5};
  std::vector<float> logits(static_cast<size_t>(T * E)), scores(logits), weights(static_cast<size_t>(T * K)), first;
  std::vector<int64_t> ids(static_cast<size_t>(T * K));
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const mh_run run{level, any(1, 3), any(0, 1)};
    const mh_rows in{x.data(), 0, T, D, D};
    float none = 0;
    int64_t nobody = 0;
    expect(!mh_route(&router, &in, T ? logits.data() : &none, T ? scores.data() : &none, T ? ids.data() : &nobody,
                     T ? weights.data() : &none, &run),
           "route");
    if (level == MH_PORTABLE) first = logits;
    close(logits, first, level, largest, 1e-5, "logits");
    for (int64_t t = 0; t < T; t++)
      for (int64_t k = 0; k < K; k++) {
        const int64_t id = ids[t * K + k];
        bool twice = id < 0 || id >= E;
        for (int64_t j = 0; j < k; j++) twice = twice || ids[t * K + j] == id;
        if (twice) expect(false, "route: an expert twice, or none");
      }
  }
}

void linears_round() {
  const int64_t K = any(0, 1) ? 16 * any(1, 20) : any(1, 300), T = any(0, 17), count = any(1, 4), short_x = any(0, 1);
  std::vector<float> x = normals(T * K, true);
  std::vector<uint16_t> short_in = to_bf16(x);
  std::vector<std::vector<float>> plain;
  std::vector<std::vector<uint16_t>> short_plain;
  std::vector<Bytes*> records;
  std::vector<mh_linear> layers;
  for (int64_t i = 0; i < count; i++) {
    const int64_t N = width(), format = any(0, MH_PLAIN_BF16);
    mh_matrix m{N, K, 1, format, 32 * any(1, 2), 0, 0, -1};
    plain.push_back(normals(N * K, true));
    short_plain.push_back(to_bf16(plain.back()));
    if (mh::kFormats[format].plain) {
      const bool wide_ones = format == MH_PLAIN_FLOAT32;
      layers.push_back({wide_ones ? static_cast<void*>(plain.back().data()) : short_plain.back().data(),
                        N * K * (wide_ones ? 4 : 2), m, nullptr});
      continue;
    }
    const int64_t size = up_to(lay_out(m, 0, any(0, 1)), 64);
    records.push_back(new Bytes(size));
    memset(records.back()->data, 0, static_cast<size_t>(size));
    if (format > MH_BF16) fill(records.back()->data, m, size, true);
    layers.push_back({records.back()->data, size, m, nullptr});
  }
  std::vector<const mh_linear*> pointers;
  for (const mh_linear& layer : layers) pointers.push_back(&layer);
  std::vector<std::vector<float>> first;
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const mh_run run{level, any(1, 3), any(0, 1)};
    const mh_rows in{short_x ? static_cast<void*>(short_in.data()) : x.data(), short_x, T, K, K};
    std::vector<std::vector<float>> ys;
    std::vector<std::vector<uint16_t>> short_ys;
    std::vector<void*> outputs;
    for (const mh_linear& layer : layers)
      ys.push_back(std::vector<float>(static_cast<size_t>(T * layer.weight.outputs + 1)));
    for (const auto& y : ys) short_ys.push_back(std::vector<uint16_t>(y.size()));
    for (size_t i = 0; i < ys.size(); i++)
      outputs.push_back(short_x ? static_cast<void*>(short_ys[i].data()) : ys[i].data());
    expect(!mh_linears(pointers.data(), count, &in, outputs.data(), &run), "linears");
    if (short_x)
      for (size_t i = 0; i < ys.size(); i++) ys[i] = from_bf16(short_ys[i]);
    if (level == MH_PORTABLE) first = ys;
    for (size_t i = 0; i < ys.size(); i++) close(ys[i], first[i], level, largest, 2e-2, "linears");
  }
  for (Bytes* record : records) delete record;
}

// Sequences of any lengths, their blocks in any order.
struct Sequences {
  std::vector<int64_t> begin{0}, first, table, blocks, start;
  mh_sequences view() const {
    return {static_cast<int64_t>(first.size()), begin.data(), first.data(), table.data(), blocks.data(),
            static_cast<int64_t>(blocks.size()), start.data()};
  }
};

Sequences sequences(int64_t block) {
  Sequences s;
  for (int64_t i = any(1, 3); i > 0; i--) {
    const int64_t rows = any(1, 4) > 1 ? any(0, 3) : any(8, 90);
    s.first.push_back(any(0, 2) ? any(0, 40) : any(200, 600));
    s.begin.push_back(s.begin.back() + rows);
    s.start.push_back(any(0, 1) ? 0 : any(0, s.first.back() + rows));
    s.table.push_back(static_cast<int64_t>(s.blocks.size()));
    for (int64_t b = 0; b * block < s.first.back() + rows; b++) s.blocks.push_back(static_cast<int64_t>(s.blocks.size()));
  }
  s.blocks.push_back(static_cast<int64_t>(s.blocks.size()));  // one that nobody has; none is two sequences'
  std::shuffle(s.blocks.begin(), s.blocks.end(), generator);
  return s;
}

void attend_round() {
  const int64_t block = any(0, 2) ? any(1, 64) : 1000;
  const Sequences held = sequences(block);
  const mh_sequences who = held.view();
  const int64_t R = held.begin.back(), G = any(1, 3), H = G * any(1, 9), dk = 16 * any(1, 5), dv = 16 * any(1, 5);
  const int64_t N = who.entries, dtype = any(0, 1);
  if (!R) return;
  const int64_t rotated = 2 * any(0, dk / 2), half_width = rotated / 2, norms = any(0, 2);
  std::vector<float> k = normals(N * G * block * dk, true), v = normals(N * G * block * dv, true);
  std::vector<uint16_t> short_k = to_bf16(k), short_v = to_bf16(v);
  std::vector<float> q_in = normals(R * H * dk, true), k_in = normals(R * G * dk, true), v_in = normals(R * G * dv, true);
  std::vector<float> cos = normals(R * half_width + 1, false), sin = normals(R * half_width + 1, false),
                     sinks = normals(H, false);
  std::vector<float> q_weight = normals(norms ? dk : H * dk, false), k_weight = normals(norms ? dk : G * dk, false);
  mh_rotation r{cos.data(), sin.data(), rotated, R, any(0, 1), {}, {}, norms};
  if (any(0, 1)) r.q_norm = {q_weight.data(), 0, static_cast<int64_t>(q_weight.size()), 1e-5};
  if (any(0, 1)) r.k_norm = {k_weight.data(), 0, static_cast<int64_t>(k_weight.size()), 1e-5};
  const mh_attention how{H, any(0, 1) ? any(1, 300) : 0, any(0, 1) ? sinks.data() : nullptr, 0.3,
                         any(0, 1) ? 3.0 : 0.0};
  std::vector<float> first_q, first_y;
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const mh_run run{level, any(1, 3), any(0, 1)};
    mh_cache c{k.data(), v.data(), N * G * block * dk, N * G * block * dv, dtype,  G,  dk, dv, block,
               G * block * dk, G * block * dv, block * dk, block * dv, dk, dv};
    if (dtype) c.k = short_k.data(), c.v = short_v.data();
    std::vector<float> q(q_in.size()), y(static_cast<size_t>(R * H * dv));
    const mh_rows qs{q_in.data(), 0, R, H * dk, H * dk}, ks{k_in.data(), 0, R, G * dk, G * dk};
    const mh_rows vs{v_in.data(), 0, R, G * dv, G * dv};
    expect(!mh_rope_and_cache(&qs, &ks, &vs, &who, &r, &c, q.data(), &run), "rope_and_cache");
    expect(!mh_attend(&how, &who, q.data(), &c, y.data(), &run), "attend");
    if (level == MH_PORTABLE) first_q = q, first_y = y;
    close(q, first_q, level, largest, 1e-5, "rotated queries");
    close(y, first_y, level, largest, 1e-2, "attended");  // a key in bf16 may be rounded the other way
  }
}

void latent_round() {
  const int64_t block = any(1, 40);
  const Sequences held = sequences(block);
  const mh_sequences who = held.view();
  const int64_t T = held.begin.back(), H = any(1, 5), n = 16 * any(1, 4), v = 16 * any(1, 4), R = 16 * any(1, 9),
                r = 16 * any(1, 3), dtype = any(0, 1), d = R + r;
  if (!T) return;
  std::vector<float> w = normals(H * (n + v) * R, true), q = normals(T * H * (n + r), true), kv = normals(T * d, true);
  std::vector<uint16_t> short_w = to_bf16(w);
  std::vector<float> cos = normals(T * r, false), sin = normals(T * r, false), weight = normals(R, false);
  std::vector<float> cached(static_cast<size_t>(who.entries * block * d)), first, first_y;
  mh_latent l{dtype ? static_cast<void*>(short_w.data()) : w.data(), H * (n + v) * R, dtype, H, n, v, R};
  const mh_rotation turn{cos.data(), sin.data(), r, T, any(0, 1), {}, {weight.data(), 0, R, 1e-5}, 0};
  const mh_cache c{cached.data(), cached.data(), who.entries * block * d, who.entries * block * d, 0, 1, d, R, block,
                   block * d, block * d, block * d, block * d, d, d};
  const mh_attention how{H, 0, nullptr, 0.1, 0};
  int64_t* fields[] = {&l.size, &l.dtype, &l.heads, &l.nope, &l.value, &l.width};
  static const int64_t values[] = {-16, 0, 8, 48, 4096, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  for (int64_t level = MH_PORTABLE; level <= MH_AMX; level++) {
    if (!has(level)) continue;
    const mh_run run{level, any(1, 3), any(0, 1)};
    std::vector<float> placed(static_cast<size_t>(T * H * d)), said(static_cast<size_t>(T * H * R)),
        y(static_cast<size_t>(T * H * v));
    const mh_rows qs{q.data(), 0, T, H * (n + r), H * (n + r)}, kvs{kv.data(), 0, T, d, d},
        there{placed.data(), 0, T, H * d, H * d}, lat{said.data(), 0, T, H * R, H * R}, out{y.data(), 0, T, H * v, H * v};
    expect(!mh_latent_products(&l, 0, &qs, &there, &run), "latent queries");
    expect(!mh_latent_rope_and_cache(&l, &qs, &kvs, &who, &turn, &c, &there, &run), "latents placed");
    expect(!mh_attend(&how, &who, placed.data(), &c, said.data(), &run), "attention to latents");
    expect(!mh_latent_products(&l, 1, &lat, &out, &run), "latent values");
    if (level == MH_PORTABLE) first = placed, first_y = y;
    close(placed, first, level, largest, 1e-5, "placed queries");
    close(y, first_y, level, largest, 1e-3, "values of latents");
    int64_t* field = fields[any(0, 5)];
    const int64_t was = *field, now = values[any(0, 7)];
    if ((field == &l.size && now > was) || (field == &l.dtype && now == 0)) continue;  // true, as above
    *field = now;
    mh_latent_products(&l, 0, &qs, &there, &run), mh_latent_products(&l, 1, &lat, &out, &run);
    mh_latent_rope_and_cache(&l, &qs, &kvs, &who, &turn, &c, &there, &run);
    *field = was;
  }
}

// One field after another set to something that cannot be.
void damaged_step_round() {
  std::vector<float> k(2 * 8 * 16), q(4 * 16), y(4 * 16), w(16);
  mh_cache c{k.data(), k.data(), 2 * 8 * 16, 2 * 8 * 16, 0, 2, 16, 16, 8, 256, 256, 128, 128, 16, 16};
  int64_t begin[] = {0, 1}, first = 3, table = 0, blocks[] = {0}, start = 0;
  mh_sequences who{1, begin, &first, &table, blocks, 1, &start};
  mh_attention how{4, 0, nullptr, 1, 0};
  mh_router router{k.data(), nullptr, nullptr, 4, 16, 2, 0, 2, 1, 2, 1, 1};
  mh_norm norm{w.data(), 0, 16, 1e-5};
  mh_rotation r{w.data(), w.data(), 16, 1, 0, {}, {}, 0};
  int64_t* fields[] = {&c.k_size,     &c.v_size,         &c.dtype,       &c.groups,          &c.k_width,
                       &c.v_width,    &c.k_block,        &c.k_group,     &c.k_row,           &c.v_row,
                       &c.block,      &how.window,       &how.heads,     &first,             &router.experts,
                       &router.width, &router.per_token, &router.groups, &router.topk_group, &router.best_of_group,
                       &norm.dtype,   &norm.width,       &r.width,       &r.positions,       &table,
                       blocks,        &start,            begin,          begin + 1};
  static const int64_t values[] = {-1, 0, 3, 7, 63, 4096, 1 << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  int64_t* field = fields[any(0, 28)];
  const int64_t was = *field, now = values[any(0, 9)];
  *field = now;
  const mh_run run{MH_BEST, 1, 0};
  // Sizes the caller states truly, and with them what may be written, are not damaged upwards.
  if (field != &c.k_size && field != &c.v_size && (field != &how.heads || now < was) &&
      (field != begin + 1 || now < was))
    mh_attend(&how, &who, q.data(), &c, y.data(), &run);
  std::vector<float> logits(8), scores(8), weights(8);
  std::vector<int64_t> ids(8);
  const mh_rows x{q.data(), 0, 1, 16, 16}, out{y.data(), 0, 1, 16, 16}, wide_q{q.data(), 0, 1, 64, 64},
      ks{q.data(), 0, 1, 32, 32};
  mh_rms_norm(&norm, &x, &out, &run);
  if (field != &router.experts) mh_route(&router, &x, logits.data(), scores.data(), ids.data(), weights.data(), &run);
  if (field != &c.k_size && field != &c.v_size) 
    mh_rope_and_cache(&wide_q, &ks, &ks, &who, &r, &c, y.data(), &run);
  mh_step step{any(-1, 10), {}, {any(-1, 5), any(-1, 5)}, 1};
  mh_steps(&step, 1, &run);
}

// Three sequences in blocks of four positions, one number of what describes them set to something that cannot be. What
// is refused is refused; what is taken touches nothing that is not there.
void damaged_sequences_round() {
  const int64_t G = 2, H = 4, dk = 16, block = 4, N = 7;
  const auto numbers = [](int64_t n) { return std::vector<float>(static_cast<size_t>(n)); };
  std::vector<float> k = numbers(N * G * block * dk), v = k, q = numbers(6 * H * dk), out = q, y = q;
  std::vector<float> rows = numbers(6 * G * dk), table_of_angles = numbers(6 * dk / 2);
  std::vector<int64_t> begin{0, 1, 1, 6}, first{5, 2, 3}, table{0, 2, 4}, blocks{3, 1, 0, 0, 5, 6}, start{0, 1, 4};
  mh_cache c{k.data(), v.data(), N * G * block * dk, N * G * block * dk, 0, G, dk, dk, block,
             G * block * dk, G * block * dk, block * dk, block * dk, dk, dk};
  mh_sequences who{3, begin.data(), first.data(), table.data(), blocks.data(), 6, start.data()};
  mh_attention how{H, 3, nullptr, 0.3, 0};
  mh_rotation r{table_of_angles.data(), table_of_angles.data(), dk, 6, 0, {}, {}, 0};
  mh_run run{MH_BEST, 1, 1};
  int64_t* const fields[] = {&begin[0], &begin[1], &begin[2], &begin[3], &first[0],  &first[1],   &first[2], &table[0],
                             &table[1], &table[2], &blocks[0], &blocks[2], &blocks[5], &start[0], &start[2], &who.count,
                             &c.block,  &c.k_block, &c.v_group, &c.k_row,  &how.window, &r.norms, &r.positions,
                             &run.level, &run.threads, &run.exact};
  static const int64_t values[] = {-1, 0, 1, 2, 4, 7, 64, 1 << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  int64_t* const field = fields[any(0, 25)];
  const int64_t was = *field;
  *field = values[any(0, 10)];
  if (field == &who.count && *field > was) *field = 2;  // how long the lists are, and what y has room for, is true
  if (field == &begin[3] && *field > was && *field < int64_t{1} << 48) return;
  const mh_rows qs{q.data(), 0, 6, H * dk, H * dk}, ks{rows.data(), 0, 6, G * dk, G * dk};
  mh_rope_and_cache(&qs, &ks, &ks, &who, &r, &c, out.data(), &run);
  mh_attend(&how, &who, q.data(), &c, y.data(), &run);
}

void step_rounds() {
  norm_round(), route_round(), linears_round(), attend_round(), latent_round(), damaged_step_round();
  for (int i = 0; i < 8; i++) damaged_sequences_round();
}

}  // namespace
