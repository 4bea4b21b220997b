// The interface as this library was compiled, in text: structures with their sizes and fields, functions with their
// arguments, names in the order of their codes. manyhands/kernels/native/structs.py writes the same text from its own
// declarations; a library that says something else is not used.
#include <stddef.h>

#include <string>

#include "format.h"
#include "manyhands.h"

namespace {

template <class T>
constexpr const char* kName = nullptr;  // of a structure
#define MH_NAME(S) \
  template <>      \
  constexpr const char* kName<S> = #S
MH_NAME(mh_matrix);
MH_NAME(mh_experts);
MH_NAME(mh_stacked);
MH_NAME(mh_linear);
MH_NAME(mh_rows);
MH_NAME(mh_routing);
MH_NAME(mh_gradients);
MH_NAME(mh_run);
MH_NAME(mh_norm);
MH_NAME(mh_cache);
MH_NAME(mh_sequences);
MH_NAME(mh_rotation);
MH_NAME(mh_attention);
MH_NAME(mh_latent);
MH_NAME(mh_router);
MH_NAME(mh_step);
MH_NAME(mh_fetch);

template <class T>
struct Type {  // how it is written
  static std::string text() { return kName<T>; }
};
template <>
struct Type<int> {
  static std::string text() { return "int32"; }
};
template <>
struct Type<int64_t> {
  static std::string text() { return "int64"; }
};
template <>
struct Type<double> {
  static std::string text() { return "double"; }
};
template <class T>
struct Type<T*> {
  static std::string text() { return "pointer"; }
};
template <class T, size_t N>
struct Type<T[N]> {
  static std::string text() { return Type<T>::text() + "[" + std::to_string(N) + "]"; }
};

struct Field {
  const char* name;
  size_t offset, size;
  std::string (*type)();
};
#define F(f) \
  Field { #f, offsetof(S, f), sizeof(S::f), Type<decltype(S::f)>::text }

// Whether the fields are all of S: they follow one another from its beginning to its end.
template <class S, size_t N>
constexpr bool whole(const Field (&fields)[N]) {
  size_t end = 0;
  for (const Field& f : fields) {
    if (f.offset != end) return false;
    end += f.size;
  }
  return end == sizeof(S);
}

template <class S, size_t N>
std::string structure(const Field (&fields)[N]) {
  std::string text = std::string(kName<S>) + ": " + std::to_string(sizeof(S)) + " bytes";
  for (const Field& f : fields) text += std::string(", ") + f.name + " " + f.type() + " at " + std::to_string(f.offset);
  return text + "\n";
}

template <class T>
std::string argument() {
  if constexpr (std::is_pointer_v<T>) {
    constexpr const char* name = kName<std::remove_cv_t<std::remove_pointer_t<T>>>;
    return name ? std::string(name) + "*" : "pointer";
  } else {
    return Type<T>::text();
  }
}

template <class R, class... A>
std::string function(const char* name, R (*)(A...)) {
  std::string text = std::string(name) + ": gives " + Type<R>::text();
  ((text += ", " + argument<A>()), ...);
  return text + "\n";
}

#define MH_STRUCTURE(T, ...)                                                     \
  [] {                                                                           \
    using S = T;                                                                 \
    static constexpr Field fields[] = {__VA_ARGS__};                             \
    static_assert(whole<S>(fields), "a field of " #T " is missing, or padding"); \
    return structure<S>(fields);                                                 \
  }()
#define MH_FUNCTION(f) function(#f, f)

std::string formats() {
  std::string text = "formats:", before = " ";
  for (const mh::Format& f : mh::kFormats) {
    text += before + f.name + " " + std::to_string(f.bits) + " bits";
    if (f.scale_bytes)
      text += " scale " + std::to_string(f.scale_bytes) + (f.half ? " half" : "") + (f.grouped ? " by group" : " by output");
    before = ", ";
  }
  return text + "\n";
}

std::string describe() {
  return MH_STRUCTURE(mh_matrix, F(outputs), F(inputs), F(parts), F(format), F(group), F(weight), F(scales), F(bias)) +
         MH_STRUCTURE(mh_experts, F(table), F(num_experts), F(record_bytes), F(activation), F(up), F(down)) +
         MH_STRUCTURE(mh_stacked, F(up), F(down), F(up_bias), F(down_bias), F(dtype), F(num_experts), F(hidden_size),
                      F(expert_size), F(activation)) +
         MH_STRUCTURE(mh_linear, F(record), F(bytes), F(weight), F(bias)) +
         MH_STRUCTURE(mh_rows, F(data), F(dtype), F(count), F(width), F(stride)) +
         MH_STRUCTURE(mh_routing, F(ids), F(weights), F(kept), F(tokens), F(per_token)) +
         MH_STRUCTURE(mh_gradients, F(weights), F(up), F(down), F(up_bias), F(down_bias)) +
         MH_STRUCTURE(mh_run, F(level), F(threads), F(exact)) + MH_STRUCTURE(mh_norm, F(weight), F(dtype), F(width), F(eps)) +
         MH_STRUCTURE(mh_cache, F(k), F(v), F(k_size), F(v_size), F(dtype), F(groups), F(k_width), F(v_width),
                      F(block), F(k_block), F(v_block), F(k_group), F(v_group), F(k_row), F(v_row)) +
         MH_STRUCTURE(mh_sequences, F(count), F(begin), F(first), F(table), F(blocks), F(entries), F(start)) +
         MH_STRUCTURE(mh_rotation, F(cos), F(sin), F(width), F(positions), F(interleave), F(q_norm), F(k_norm),
                      F(norms)) +
         MH_STRUCTURE(mh_attention, F(heads), F(window), F(sinks), F(scale), F(cap)) +
         MH_STRUCTURE(mh_latent, F(weight), F(size), F(dtype), F(heads), F(nope), F(value), F(width)) +
         MH_STRUCTURE(mh_router, F(weight), F(logit_bias), F(choice_bias), F(experts), F(width), F(per_token),
                      F(sigmoid), F(groups), F(topk_group), F(best_of_group), F(renormalise), F(scaling)) +
         MH_STRUCTURE(mh_step, F(kind), F(a), F(n), F(factor)) +
         MH_STRUCTURE(mh_fetch, F(begin), F(wait), F(context), F(layer)) + MH_FUNCTION(mh_forward) + MH_FUNCTION(mh_backward) +
         MH_FUNCTION(mh_linear_forward) + MH_FUNCTION(mh_steps) + MH_FUNCTION(mh_linears) + MH_FUNCTION(mh_rms_norm) +
         MH_FUNCTION(mh_rope_and_cache) + MH_FUNCTION(mh_attend) + MH_FUNCTION(mh_latent_products) +
         MH_FUNCTION(mh_latent_rope_and_cache) + MH_FUNCTION(mh_route) + formats() +
         "activations: swiglu, swiglu_oai, geglu, geglu_tanh, gelu, relu\n"
         "levels: portable, avx2, avx512, avx512_bf16, amx\n"
         "steps: norm, linears, rope_and_cache, attend, route, experts, add, activate, latent_products, "
         "latent_rope_and_cache, fetch\n";
}

static_assert(MH_RELU == 5 && MH_AMX == 4 && MH_STEP_FETCH == 10,
              "the names above are in the order of their codes");

}  // namespace

const char* mh_layout(void) {
  static const std::string text = describe();
  return text.c_str();
}
