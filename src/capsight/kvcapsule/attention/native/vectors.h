// Vectors as wide as the machine that this is compiled for has them, and stored numbers as vectors of float.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE inline __attribute__((always_inline))
// All else is hidden: what several levels name alike, a process that loads them would share.
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace capsight {

constexpr int W = LANES;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vc __attribute__((vector_size(W)));

enum Format : int32_t { F32, BF16, F16, U8, U4, I8 };

// Memory of a thread that is given back is kept for the next of its size: aligned memory of the system is slow.
class Pool {
 public:
  static void* take(size_t bytes) {
    const int size = size_of(bytes);
    if (size == SIZES || ended || own.kept[size].empty()) return ::operator new(size == SIZES ? bytes : size_t(64) << size, LINE);
    void* p = own.kept[size].back();
    own.kept[size].pop_back();
    return p;
  }
  static void give(void* p, size_t bytes) {
    const int size = size_of(bytes);
    if (size == SIZES || ended || own.kept[size].size() == EACH) ::operator delete(p, LINE);
    else own.kept[size].push_back(p);
  }

 private:
  static constexpr int SIZES = 11;  // from 64 bytes to 64 KB
  static constexpr size_t EACH = 4;
  static constexpr std::align_val_t LINE{64};
  std::vector<void*> kept[SIZES];
  static thread_local Pool own;
  static thread_local bool ended;  // what is kept for a thread may end before what uses it
  ~Pool() {
    ended = true;
    for (auto& each : kept)
      for (void* p : each) ::operator delete(p, LINE);
  }
  static int size_of(size_t bytes) {
    int size = 0;
    while (size < SIZES && bytes > size_t(64) << size) size++;
    return size;
  }
};
inline thread_local Pool Pool::own;
inline thread_local bool Pool::ended = false;

// Numbers from the start of a cache line on, so that no vector lies in two.
template <class T>
struct Lines {
  typedef T value_type;
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) { return (T*)Pool::take(n * sizeof(T)); }
  void deallocate(T* p, size_t n) { Pool::give(p, n * sizeof(T)); }
  template <class U>
  bool operator==(const Lines<U>&) const { return true; }
  template <class U>
  bool operator!=(const Lines<U>&) const { return false; }
};
typedef std::vector<float, Lines<float>> Floats;
typedef std::unique_ptr<float[]> Filled;  // all of it is written before it is read

template <class V>
INLINE V get(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void put(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vf all(float x) { return x - vf{}; }  // x + vf{} would be another number for -0

// Half precision, one number; subnormals, infinities and NaN included.
INLINE float of_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, body = uint32_t(h & 0x7fff) << 13, bits;
  float x, magic = 0x1p112f;
  if (body >= 0x0f800000) bits = body | 0x7f800000;
  else {
    std::memcpy(&x, &body, 4);
    x *= magic;
    std::memcpy(&bits, &x, 4);
  }
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint16_t to_half(float x) {
  uint32_t bits, sign;
  std::memcpy(&bits, &x, 4);
  sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // below the smallest normal number: 2^-24 is one unit
    std::memcpy(&x, &bits, 4);
    return sign | uint16_t(std::nearbyint(x * 0x1p24f));
  }
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}
INLINE uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float number(const void* p, int64_t i, int32_t format) {
  if (format == F32) return get<float>((const float*)p + i);
  uint16_t h = get<uint16_t>((const uint16_t*)p + i);
  if (format == F16) return of_half(h);
  uint32_t bits = uint32_t(h) << 16;
  return get<float>(&bits);
}

// Integers of 16 and 8 bits in 32.
#if LANES == 16
INLINE vi wide16(const char* p) { return (vi)_mm512_cvtepu16_epi32(get<__m256i>(p)); }
INLINE vi wide8(const char* p) { return (vi)_mm512_cvtepu8_epi32(get<__m128i>(p)); }
INLINE vi signed8(const char* p) { return (vi)_mm512_cvtepi8_epi32(get<__m128i>(p)); }
#elif LANES == 8
INLINE vi wide16(const char* p) { return (vi)_mm256_cvtepu16_epi32(get<__m128i>(p)); }
INLINE vi wide8(const char* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE vi signed8(const char* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
INLINE vi wide16(const char* p) { return __builtin_convertvector(get<vh>(p), vi); }
INLINE vi wide8(const char* p) { return __builtin_convertvector(get<vb>(p), vi); }
INLINE vi signed8(const char* p) { return __builtin_convertvector(get<vc>(p), vi); }
#endif

// W numbers as float; 4 bits give two vectors, since channel c shares a byte with channel c + half.
template <Format F>
struct Stored;
template <>
struct Stored<F32> {
  static constexpr int parts = 1, bytes = 4;
  static INLINE void load(const char* p, vf* x) { x[0] = get<vf>(p); }
};
template <>
struct Stored<BF16> {
  static constexpr int parts = 1, bytes = 2;
  static INLINE void load(const char* p, vf* x) { x[0] = (vf)(wide16(p) << 16); }
};
template <>
struct Stored<F16> {
  static constexpr int parts = 1, bytes = 2;
  static INLINE void load(const char* p, vf* x) {
#if defined(__F16C__) && LANES == 16
    x[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && LANES == 8
    x[0] = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    for (int i = 0; i < W; i++) x[0][i] = of_half(get<uint16_t>(p + 2 * i));
#endif
  }
};
template <>
struct Stored<U8> {
  static constexpr int parts = 1, bytes = 1;
  static INLINE void load(const char* p, vf* x) {
    x[0] = __builtin_convertvector(wide8(p), vf);
  }
};
template <>
struct Stored<I8> {
  static constexpr int parts = 1, bytes = 1;
  static INLINE void load(const char* p, vf* x) { x[0] = __builtin_convertvector(signed8(p), vf); }
};
template <>
struct Stored<U4> {
  static constexpr int parts = 2, bytes = 1;
  static INLINE void load(const char* p, vf* x) {
    vi both = wide8(p);
    x[0] = __builtin_convertvector(both & 15, vf);
    x[1] = __builtin_convertvector(both >> 4, vf);
  }
};
// exp(x) for x <= 0; exactly 0 where floats end.
INLINE vf exp_of(vf x) {
  vf n = x < -88.f ? all(-88.f) : x;  // keeps NaN
  const vf magic = all(12582912.f);
  vf k = n * 1.44269504f + magic;
  vi e = (vi)k - (vi)magic;
  k -= magic;
  n -= k * 0.693359375f;
  n -= k * -2.12194440e-4f;
  vf y = all(1.9875691500e-4f);
  y = y * n + 1.3981999507e-3f;
  y = y * n + 8.3334519073e-3f;
  y = y * n + 4.1665795894e-2f;
  y = y * n + 1.6666665459e-1f;
  y = y * n + 5.0000001201e-1f;
  y = y * n * n + n + 1.f;
  y *= (vf)((e + 127) << 23);
  return x < -87.f ? vf{} : y;
}

#if defined(__clang__) || __GNUC__ >= 12
#if LANES == 16
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#elif LANES == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#endif
#else
INLINE vf every_other(vf a, vf b, int first) {
  vi index;
  for (int i = 0; i < W; i++) index[i] = 2 * i + first;
  return __builtin_shuffle(a, b, index);
}
#define EVEN(a, b) every_other(a, b, 0)
#define ODD(a, b) every_other(a, b, 1)
#endif

// The sums of W vectors' own lanes, as one vector.
template <int N>
INLINE vf sums(const vf* x, int stride) {
  if constexpr (N == 1) return x[0];
  else {
    vf a = sums<N / 2>(x, stride), b = sums<N / 2>(x + N / 2 * stride, stride);
    return EVEN(a, b) + ODD(a, b);
  }
}
INLINE float sum_of(vf x) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}
// The largest of some numbers and of another.
INLINE float most_of(vf x, float other) {
#if LANES == 16
  return std::max(other, _mm512_reduce_max_ps((__m512)x));
#endif
  for (int i = 0; i < W; i++) other = x[i] > other ? x[i] : other;
  return other;
}

}  // namespace capsight
