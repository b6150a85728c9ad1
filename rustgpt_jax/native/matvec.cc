// A few rows of numbers times a matrix: y[b][o] = sum over i of w[o][i] x[b][i].
//
// Such a product takes as long as the weights take to come from memory, so each weight is read once and in order, is
// widened to float32 in registers, and is used for up to eight rows there. Sums are float32, in lanes.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kSums = 12;
#else
constexpr int kLanes = 4;
constexpr int kSums = 12;
#endif
// A thread's work at a time is a part of what is its own, but not so small that it is read out of order, nor so large
// that one thread waits long for the other.
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kLeastBytes = 64 * 1024;
constexpr int64_t kMostBytes = 1024 * 1024;
// How far ahead weights are asked for: while rows of x are read too, processors do not see by themselves that the
// weights are read in order.
constexpr int kAheadBytes = 1024;
constexpr int kSpins = 2000;

typedef float Floats __attribute__((vector_size(kLanes * 4)));

template <typename Vector, typename Number>
inline Vector Loaded(const Number* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

inline Floats Widened(const float* from) { return Loaded<Floats>(from); }

#if defined(__AVX512F__)
inline Floats Widened(const BFloat16* from) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(Loaded<__m256i>(from)), 16);
}

inline Floats Widened(const int8_t* from) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Loaded<__m128i>(from)));
}
#elif defined(__AVX2__)
inline Floats Widened(const BFloat16* from) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(Loaded<__m128i>(from)), 16);
}

inline Floats Widened(const int8_t* from) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
#else
inline Floats Widened(const BFloat16* from) {
  uint32_t words[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = static_cast<uint32_t>(from[lane].bits) << 16;
  return Loaded<Floats>(words);
}

inline Floats Widened(const int8_t* from) {
  Floats floats;
  for (int lane = 0; lane < kLanes; ++lane) floats[lane] = from[lane];
  return floats;
}
#endif

// The sum of all lanes, halves upon halves: one after another would take as long as a row's products.
inline float Sum(Floats vector) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)vector);
#else
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
#endif
}

inline float Single(float weight) { return weight; }
inline float Single(int8_t weight) { return weight; }
inline float Single(BFloat16 weight) {
  uint32_t word = static_cast<uint32_t>(weight.bits) << 16;
  return Loaded<float>(&word);
}

// `kOutputs` outputs of `kRows` rows, so many `apart`, from `kUnrolled` vectors of weights of each at a time.
template <typename Weight, int kRows, int kOutputs, int kUnrolled>
inline void Tile(const Weight* w, const float* x, float* y, int64_t inputs, int64_t outputs, int64_t apart) {
  Floats sums[kOutputs][kRows][kUnrolled] = {};
  int64_t i = 0;
  for (; i + kLanes * kUnrolled <= inputs; i += kLanes * kUnrolled) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) {
      int64_t at = i + u * kLanes;
      Floats weights[kOutputs];
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) {
        weights[o] = Widened(w + o * apart * inputs + at);
        __builtin_prefetch(reinterpret_cast<const char*>(w + o * apart * inputs + at) + kAheadBytes);
      }
#pragma GCC unroll 8
      for (int b = 0; b < kRows; ++b) {
        Floats row = Loaded<Floats>(x + b * inputs + at);
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o) sums[o][b][u] += weights[o] * row;
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) {
      Floats vector = sums[o][b][0];
#pragma GCC unroll 8
      for (int u = 1; u < kUnrolled; ++u) vector += sums[o][b][u];
      float sum = Sum(vector);
      for (int64_t j = i; j < inputs; ++j) sum += Single(w[o * apart * inputs + j]) * x[b * inputs + j];
      y[b * outputs + o * apart] = sum;
    }
  }
}

// Several outputs are made together, whose weights lie far apart: memory delivers more when it is read at several
// places in order than at one.
template <typename Weight, int kRows>
void Span(const Weight* w, const float* x, float* y, int64_t inputs, int64_t outputs, int64_t from, int64_t to) {
  constexpr int kTogether = kSums / kRows < 4 ? kSums / kRows : 4;
  constexpr int kUnrolled = kRows == 1 ? 2 : 1;
  int64_t apart = (to - from) / kTogether, alone = from + apart * kTogether;
  for (int64_t o = from; o < from + apart; ++o) {
    Tile<Weight, kRows, kTogether, kUnrolled>(w + o * inputs, x, y + o, inputs, outputs, apart);
  }
  for (int64_t o = alone; o < to; ++o) Tile<Weight, kRows, 1, kUnrolled>(w + o * inputs, x, y + o, inputs, outputs, 0);
}

// Outputs `from` to `to` of all rows, eight, four, two or one of them at a time.
template <typename Weight>
void Outputs(const Weight* w, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs, int64_t from,
             int64_t to) {
  while (rows > 0) {
    int64_t taken = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    switch (taken) {
      case 8: Span<Weight, 8>(w, x, y, inputs, outputs, from, to); break;
      case 4: Span<Weight, 4>(w, x, y, inputs, outputs, from, to); break;
      case 2: Span<Weight, 2>(w, x, y, inputs, outputs, from, to); break;
      default: Span<Weight, 1>(w, x, y, inputs, outputs, from, to);
    }
    rows -= taken;
    x += taken * inputs;
    y += taken * outputs;
  }
}

struct Progress {
  std::atomic<int64_t> begun{0};
  std::atomic<int64_t> done{0};
};

// Does `chunks` pieces of work on this thread and on those of the pool that come to help. Nobody is waited for who has
// not begun: a thread that comes too late finds nothing left, and touches nothing but the counters, which it shares.
template <typename Work>
void Share(ffi::ThreadPool pool, int64_t chunks, const Work& work) {
  auto progress = std::make_shared<Progress>();
  auto help = [progress, chunks, work] {
    for (int64_t chunk; (chunk = progress->begun.fetch_add(1)) < chunks;) {
      work(chunk);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = pool.num_threads() - 1;
  if (helpers > chunks - 1) helpers = chunks - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(help)(help));
  help();
  for (int spin = 0; progress->done.load(std::memory_order_acquire) < chunks; ++spin) {
    if (spin > kSpins) std::this_thread::yield();
  }
}

template <typename Weight>
void Product(ffi::ThreadPool pool, const Weight* w, const float* x, float* y, int64_t rows, int64_t inputs,
             int64_t outputs) {
  int64_t of_output = inputs * static_cast<int64_t>(sizeof(Weight)) + 1;
  int64_t bytes = outputs * of_output / (kChunksPerThread * pool.num_threads());
  bytes = std::clamp(bytes, kLeastBytes, kMostBytes);
  int64_t of_chunk = bytes / of_output;
  of_chunk = of_chunk < 8 ? 8 : of_chunk - of_chunk % 8;
  int64_t chunks = (outputs + of_chunk - 1) / of_chunk;
  Share(pool, chunks, [=](int64_t chunk) {
    int64_t from = chunk * of_chunk, to = from + of_chunk < outputs ? from + of_chunk : outputs;
    Outputs(w, x, y, rows, inputs, outputs, from, to);
  });
}

using Matrix = ffi::Buffer<ffi::F32, 2>;

ffi::Error MatVecImpl(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer weights, ffi::Result<Matrix> y) {
  auto shape = weights.dimensions();
  if (shape.size() != 2 || shape[1] != x.dimensions()[1] || shape[0] != y->dimensions()[1] ||
      x.dimensions()[0] != y->dimensions()[0]) {
    return ffi::Error::InvalidArgument("weights are (outputs, inputs), x (rows, inputs), y (rows, outputs)");
  }
  int64_t rows = x.dimensions()[0], inputs = shape[1], outputs = shape[0];
  const float* from = x.typed_data();
  float* to = y->typed_data();
  switch (weights.element_type()) {
    case ffi::F32:
      Product(pool, static_cast<const float*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    case ffi::BF16:
      Product(pool, static_cast<const BFloat16*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    case ffi::S8:
      Product(pool, static_cast<const int8_t*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("weights are float32, bfloat16 or int8");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatVec, MatVecImpl, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>());
