// Rounds of the driver for experts by a table of which some are null: fetched, missing, damaged.
// Included by driver.cpp, whose helpers it uses.
#pragma once

#include <memory>
#include <thread>

namespace {

struct Table {  // every record in memory of exactly its size, at a place of its own
  std::vector<std::unique_ptr<Bytes>> records;
  std::vector<const void*> places;
  Table(const uint8_t* from, int64_t count, int64_t size) {
    for (int64_t e = 0; e < count; e++) {
      records.push_back(std::make_unique<Bytes>(size));
      memcpy(records.back()->data, from + e * size, static_cast<size_t>(size));
      places.push_back(records.back()->data);
    }
  }
};

struct Store {
  const mh_experts& all;
  std::vector<const void*> table;
  std::vector<std::unique_ptr<Bytes>> late;  // freed at the next `begin`
  std::vector<int64_t> wanted;
  size_t asked = 0;
  int64_t broken = -1, gives = 1;  // the expert whose wait fails, and how
  bool fills = false;              // `begin` writes the table
  void (*meanwhile)(void*) = nullptr;
  void* context = nullptr;

  const void* copy(int64_t e) {
    late.push_back(std::make_unique<Bytes>(all.record_bytes));
    memcpy(late.back()->data, all.table[e], static_cast<size_t>(all.record_bytes));
    return late.back()->data;
  }
};

int64_t store_begin(void* context, int64_t layer, const int64_t* experts, int64_t count) {
  Store& s = *static_cast<Store*>(context);
  expect(layer == 5, "another layer");
  s.late.clear(), s.wanted.clear(), s.asked = 0;
  for (int64_t i = 0; i < count; i++) {
    expect(!i || experts[i - 1] < experts[i], "experts that do not ascend");
    if (s.fills && i % 2) s.table[experts[i]] = s.copy(experts[i]);
    if (!s.table[experts[i]]) s.wanted.push_back(experts[i]);
  }
  return 0;
}

int64_t store_wait(void* context, int64_t, int64_t expert, const void** record) {
  Store& s = *static_cast<Store*>(context);
  expect(s.asked < s.wanted.size() && s.wanted[s.asked++] == expert, "an expert that is not missing, or not its turn");
  if (s.meanwhile) s.meanwhile(s.context);
  if (expert == s.broken && s.gives) return s.gives;
  *record = expert == s.broken ? nullptr : s.copy(expert);
  return 0;
}

// y [T][D] of dtype in.dtype as mh_forward made it with all experts there.
void fetch_round(const mh_experts& all, const mh_routing& routing, const mh_rows& in, const void* y,
                 const mh_run& run) {
  const size_t bytes = static_cast<size_t>(in.count * in.width) * (in.dtype == MH_BF16 ? 2 : 4);
  std::vector<uint8_t> found(bytes + 64), other(bytes + 64);
  const mh_rows out{found.data(), in.dtype, in.count, in.width, in.width},
      beside{other.data(), in.dtype, in.count, in.width, in.width};
  Store store{all, {}, {}, {}};
  mh_experts some = all;
  for (int64_t e = 0; e < all.num_experts; e++) store.table.push_back(any(0, 1) ? all.table[e] : nullptr);
  const std::vector<const void*> there = store.table;
  some.table = store.table.data();
  const mh_fetch fetch{store_begin, store_wait, &store, 5};
  const auto step = [](int64_t kind, std::vector<const void*> a, int64_t n) {
    mh_step s{kind, {}, {n, 0}, 0};
    for (size_t i = 0; i < a.size(); i++) s.a[i] = const_cast<void*>(a[i]);
    return s;
  };
  const mh_step steps[] = {step(MH_STEP_FETCH, {&fetch, &routing}, all.num_experts),
                           step(MH_STEP_EXPERTS, {&some, nullptr, &routing, &in, &out, &fetch}, 0)};
  const auto same = [&](const std::vector<uint8_t>& a, const char* what) {
    if (bytes && memcmp(a.data(), y, bytes)) expect(false, what);
  };
  const auto whole = [&] { expect(!mh_forward(&all, nullptr, &routing, &in, &beside, nullptr, 0, &run), "beside"); };
  store.context = const_cast<void*>(static_cast<const void*>(&whole));
  if (any(0, 1)) store.meanwhile = [](void* c) { (*static_cast<decltype(whole)*>(c))(); };
  store.fills = any(0, 2) == 0;
  std::thread neighbour;  // by now and then
  if (!store.meanwhile && any(0, 3) == 0) neighbour = std::thread(whole);
  expect(!mh_steps(steps, 2, &run), "fetched experts");
  if (neighbour.joinable()) neighbour.join(), same(other, "beside a fetch, another y");
  same(found, "fetched, another y");
  expect(store.asked == store.wanted.size(), "an expert was not waited for");

  store.fills = false, store.table = there, some.table = store.table.data();
  const int64_t code = mh_forward(&some, nullptr, &routing, &in, &out, nullptr, 0, &run);
  mh_steps(steps, 1, &run);
  expect(code == (store.wanted.empty() ? MH_OK : MH_NOT_RESIDENT), "a null record");
  if (store.wanted.empty()) return;
  store.broken = store.wanted[static_cast<size_t>(any(0, static_cast<int64_t>(store.wanted.size()) - 1))];
  store.gives = any(0, 1);
  expect(mh_steps(steps, 2, &run) == MH_FETCH_FAILED, "a fetch that fails");
  store.broken = -1;
  expect(!mh_steps(steps, 2, &run), "after a fetch that failed");
  same(found, "after a fetch that failed, another y");

  int64_t* fields[] = {&some.num_experts, &some.record_bytes, &some.activation, &some.up.outputs,  &some.up.inputs,
                       &some.up.parts,    &some.up.format,    &some.up.group,   &some.up.weight,   &some.up.scales,
                       &some.up.bias,     &some.down.outputs, &some.down.inputs, &some.down.format, &some.down.weight};
  static const int64_t values[] = {-1, 0, 1, 3, 63, 64, 4096, 1 << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN};
  int64_t* const field = fields[any(0, 14)];
  const int64_t was = *field, now = values[any(0, 10)];
  if ((field == &some.num_experts || field == &some.record_bytes) && now > was) return;  // which the caller states truly
  *field = now;
  mh_steps(steps, 2, &run);
  mh_fetch none = fetch;
  if (any(0, 1))
    none.begin = nullptr;
  else
    none.wait = nullptr;
  const mh_step bad = step(MH_STEP_FETCH, {&none, &routing}, all.num_experts);
  expect(mh_steps(&bad, 1, &run) == MH_BAD_ARGUMENT, "a fetch without a callback");
}

}  // namespace
