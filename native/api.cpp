#include "common.h"

int64_t mh_abi(void) { return MH_ABI; }
int64_t mh_levels(void) { return mh::levels(); }
