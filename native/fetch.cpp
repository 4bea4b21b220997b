#include "fetch.h"

#include "sorted.h"

namespace mh {

void check_fetch(const mh_fetch* fetch) {
  need(fetch, "fetch");
  if (!fetch->begin || !fetch->wait) fail(MH_BAD_ARGUMENT, "fetch: a callback is missing");
}

const void* const* Arrivals::copy(const Experts& e) {
  table_.assign(e.up.table, e.up.table + e.num_experts);
  return table_.data();
}

void Arrivals::wait(int64_t expert) {
  const void* record = nullptr;
  call_.leave();
  const int64_t code = fetch_->wait(fetch_->context, fetch_->layer, expert, &record);
  call_.enter();
  if (code)
    fail(MH_FETCH_FAILED, "expert %lld of layer %lld was not fetched: its wait gave %lld", (long long)expert,
         (long long)fetch_->layer, (long long)code);
  if (!record || !is_aligned(record))
    fail(MH_FETCH_FAILED, "expert %lld of layer %lld was fetched to no record, or to one not aligned to 64 bytes",
         (long long)expert, (long long)fetch_->layer);
  table_[expert] = record;
}

int begin_fetch(const mh_fetch* fetch, const mh_routing* routing, int64_t num_experts) {
  return guard([&] {
    check_fetch(fetch);
    const std::vector<int64_t> experts = wanted_experts(routing, num_experts);
    const int64_t count = static_cast<int64_t>(experts.size());
    if (const int64_t code = fetch->begin(fetch->context, fetch->layer, experts.data(), count))
      fail(MH_FETCH_FAILED, "the experts of layer %lld were not fetched: begin gave %lld", (long long)fetch->layer,
           (long long)code);
  });
}

}  // namespace mh
