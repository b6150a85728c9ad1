// Multiplies a few rows by a matrix: y[b][o] = sum over i of w[o][i] x[b][i].
//
// The time is bounded by reading the weights from memory, so each weight is read once and in order, converted to
// float32 in registers, and used there for up to eight rows. Sums are accumulated in float32 SIMD lanes.

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
// A chunk is the unit of work of a thread: large enough that weights are read in order, and small enough that threads
// finish at about the same time.
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kMinChunkBytes = 64 * 1024;
constexpr int64_t kMaxChunkBytes = 1024 * 1024;
// Distance of prefetching: with rows of x read in between, processors do not detect that weights are read in order.
constexpr int kPrefetchBytes = 1024;
constexpr int kSpins = 2000;

typedef float Floats __attribute__((vector_size(kLanes * 4)));

template <typename Vector, typename Number>
inline Vector Load(const Number* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

inline Floats ToFloats(const float* from) { return Load<Floats>(from); }

#if defined(__AVX512F__)
inline Floats ToFloats(const BFloat16* from) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(Load<__m256i>(from)), 16);
}

inline Floats ToFloats(const int8_t* from) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load<__m128i>(from)));
}
#elif defined(__AVX2__)
inline Floats ToFloats(const BFloat16* from) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load<__m128i>(from)), 16);
}

inline Floats ToFloats(const int8_t* from) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
#else
inline Floats ToFloats(const BFloat16* from) {
  uint32_t words[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = static_cast<uint32_t>(from[lane].bits) << 16;
  return Load<Floats>(words);
}

inline Floats ToFloats(const int8_t* from) {
  Floats floats;
  for (int lane = 0; lane < kLanes; ++lane) floats[lane] = from[lane];
  return floats;
}
#endif

// The sum of all lanes, as a tree: a sequential sum would take as long as the products of a row.
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

inline float ToFloat(float weight) { return weight; }
inline float ToFloat(int8_t weight) { return weight; }
inline float ToFloat(BFloat16 weight) {
  uint32_t word = static_cast<uint32_t>(weight.bits) << 16;
  return Load<float>(&word);
}

// Computes `kOutputs` outputs, `stride` apart, of `kRows` rows, from `kUnrolled` vectors of weights of each at a time.
template <typename Weight, int kRows, int kOutputs, int kUnrolled>
inline void ComputeTile(const Weight* w, const float* x, float* y, int64_t inputs, int64_t outputs, int64_t stride) {
  Floats sums[kOutputs][kRows][kUnrolled] = {};
  int64_t i = 0;
  for (; i + kLanes * kUnrolled <= inputs; i += kLanes * kUnrolled) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; ++u) {
      int64_t at = i + u * kLanes;
      Floats weights[kOutputs];
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) {
        weights[o] = ToFloats(w + o * stride * inputs + at);
        __builtin_prefetch(reinterpret_cast<const char*>(w + o * stride * inputs + at) + kPrefetchBytes);
      }
#pragma GCC unroll 8
      for (int b = 0; b < kRows; ++b) {
        Floats row = Load<Floats>(x + b * inputs + at);
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
      for (int64_t j = i; j < inputs; ++j) sum += ToFloat(w[o * stride * inputs + j]) * x[b * inputs + j];
      y[b * outputs + o * stride] = sum;
    }
  }
}

// Computes outputs `from` to `to`, several at a time that are far apart: reading several streams of memory in order is
// faster than reading one.
template <typename Weight, int kRows>
void ComputeSpan(const Weight* w, const float* x, float* y, int64_t inputs, int64_t outputs, int64_t from, int64_t to) {
  constexpr int kTogether = kSums / kRows < 4 ? kSums / kRows : 4;
  constexpr int kUnrolled = kRows == 1 ? 2 : 1;
  int64_t stride = (to - from) / kTogether, rest = from + stride * kTogether;
  for (int64_t o = from; o < from + stride; ++o) {
    ComputeTile<Weight, kRows, kTogether, kUnrolled>(w + o * inputs, x, y + o, inputs, outputs, stride);
  }
  for (int64_t o = rest; o < to; ++o) {
    ComputeTile<Weight, kRows, 1, kUnrolled>(w + o * inputs, x, y + o, inputs, outputs, 0);
  }
}

// Computes outputs `from` to `to` of all rows, eight, four, two or one rows at a time.
template <typename Weight>
void ComputeOutputs(const Weight* w, const float* x, float* y, int64_t rows, int64_t inputs, int64_t outputs,
                    int64_t from, int64_t to) {
  while (rows > 0) {
    int64_t batch = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    switch (batch) {
      case 8: ComputeSpan<Weight, 8>(w, x, y, inputs, outputs, from, to); break;
      case 4: ComputeSpan<Weight, 4>(w, x, y, inputs, outputs, from, to); break;
      case 2: ComputeSpan<Weight, 2>(w, x, y, inputs, outputs, from, to); break;
      default: ComputeSpan<Weight, 1>(w, x, y, inputs, outputs, from, to);
    }
    rows -= batch;
    x += batch * inputs;
    y += batch * outputs;
  }
}

struct Progress {
  std::atomic<int64_t> started{0};
  std::atomic<int64_t> done{0};
};

// Runs `chunks` units of work on this thread and on threads of the pool. Threads that have not started a chunk are not
// waited for: one that is scheduled too late finds no chunk left, and touches only the counters, which it co-owns.
template <typename Work>
void ParallelFor(ffi::ThreadPool pool, int64_t chunks, const Work& work) {
  auto progress = std::make_shared<Progress>();
  auto help = [progress, chunks, work] {
    for (int64_t chunk; (chunk = progress->started.fetch_add(1)) < chunks;) {
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
void MatMul(ffi::ThreadPool pool, const Weight* w, const float* x, float* y, int64_t rows, int64_t inputs,
            int64_t outputs) {
  int64_t bytes_per_output = inputs * static_cast<int64_t>(sizeof(Weight)) + 1;
  int64_t bytes = outputs * bytes_per_output / (kChunksPerThread * pool.num_threads());
  bytes = std::clamp(bytes, kMinChunkBytes, kMaxChunkBytes);
  int64_t outputs_per_chunk = bytes / bytes_per_output;
  outputs_per_chunk = outputs_per_chunk < 8 ? 8 : outputs_per_chunk - outputs_per_chunk % 8;
  int64_t chunks = (outputs + outputs_per_chunk - 1) / outputs_per_chunk;
  ParallelFor(pool, chunks, [=](int64_t chunk) {
    int64_t from = chunk * outputs_per_chunk, to = std::min(from + outputs_per_chunk, outputs);
    ComputeOutputs(w, x, y, rows, inputs, outputs, from, to);
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
      MatMul(pool, static_cast<const float*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    case ffi::BF16:
      MatMul(pool, static_cast<const BFloat16*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    case ffi::S8:
      MatMul(pool, static_cast<const int8_t*>(weights.untyped_data()), from, to, rows, inputs, outputs);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("weights are float32, bfloat16 or int8");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatVec, MatVecImpl, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>());
