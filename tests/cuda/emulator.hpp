// CUDA's language for a C++ compiler, as far as our kernels use it: what heliostat/cuda/prelude.cuh includes on the host.
// emulator.cpp runs the threads of a block as fibres, which switch only inside the functions declared here.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::shared_memory())

struct Index3 {
  unsigned x, y, z;
};
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Launch {
  unsigned grid[3], threads, shared_bytes;
  unsigned order;     // of the threads: 0 forwards, 1 backwards, else the seed of a random order
  int skipped_line;   // a barrier to ignore, for tests; 0: none
  char message[512];  // what went wrong
};

int run(Launch& launch, void (*kernel)(void**), void** arguments);
void* shared_memory();
void fail(const char* message);
void barrier(int line);
int barrier_or(int line, int predicate);
void warp_barrier(int line, unsigned mask);
// Every lane of the mask shows `size` <= 64 bytes to the others; returns lane 0's, 64 bytes a lane, until the next
// warp_barrier. The lanes must be at the same line.
const char* show(int line, unsigned mask, const void* value, unsigned size);

template <class T>
inline T shuffle(int line, unsigned mask, T value, unsigned source) {
  const char* lanes = show(line, mask, &value, sizeof value);
  if (source < 32) {
    if (!(mask >> source & 1)) fail("a shuffle reads a lane that does not take part");
    std::memcpy(&value, lanes + 64 * source, sizeof value);
  }
  warp_barrier(line, mask);
  return value;
}

template <class... A, std::size_t... I>
inline void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
inline void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>());
}

}  // namespace emulator

#define EMULATOR_KERNEL(name)                                                     \
  static void call_##name(void** arguments) { emulator::call(name, arguments); } \
  extern "C" int launch_##name(emulator::Launch* launch, void** arguments) {     \
    return emulator::run(*launch, call_##name, arguments);                       \
  }

// A line names the place of a call: return addresses do not, since compilers duplicate code.
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncthreads_or(predicate) emulator::barrier_or(__LINE__, predicate)
#define __syncwarp(mask) emulator::warp_barrier(__LINE__, mask)
#define __shfl_sync(mask, value, lane) emulator::shuffle(__LINE__, mask, value, (lane) % 32)
#define __shfl_xor_sync(mask, value, bits) emulator::shuffle(__LINE__, mask, value, threadIdx.x % 32 ^ (bits))
#define __shfl_down_sync(mask, value, by) emulator::shuffle(__LINE__, mask, value, threadIdx.x % 32 + (by))

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void trap() { emulator::fail("the kernel trapped"); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Byte i of the result is the byte, of the eight of x and y, that nibble i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline float half_to_float(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}

inline unsigned short float_to_half(float value) {
  _Float16 half = value;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline unsigned short float_to_bfloat(float value) {
  unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

#if defined(DTYPE) && DTYPE > 0
namespace emulator {

inline float entry(unsigned pair, unsigned second) {
  const unsigned short bits = pair >> 16 * second;
  return DTYPE == 1 ? half_to_float(bits) : __uint_as_float(unsigned(bits) << 16);
}

// Of 16-bit elements: the sum in float32 is exact or rounds as the exact one would.
inline unsigned add_pairs(unsigned a, unsigned b) {
  unsigned sums = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const float sum = entry(a, i) + entry(b, i);
    sums |= unsigned(DTYPE == 1 ? float_to_half(sum) : float_to_bfloat(sum)) << 16 * i;
  }
  return sums;
}

inline void multiply_16x8x16(int line, float (&sum)[4], const unsigned (&a)[4], const uint2& b) {
  const unsigned own[6] = {a[0], a[1], a[2], a[3], b.x, b.y};
  const char* lanes = show(line, 0xffffffffu, own, sizeof own);
  const unsigned r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned below = i / 2, column = 2 * c + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      unsigned left[6], right[6];
      std::memcpy(left, lanes + 64 * (4 * r + k % 8 / 2), sizeof left);
      std::memcpy(right, lanes + 64 * (4 * column + k % 8 / 2), sizeof right);
      sum[i] += entry(left[below + 2 * (k / 8)], k % 2) * entry(right[4 + k / 8], k % 2);
    }
  }
  warp_barrier(line, 0xffffffffu);
}

}  // namespace emulator

#define add_pairs(a, b) emulator::add_pairs(a, b)
#define multiply_16x8x16(sum, a, b) emulator::multiply_16x8x16(__LINE__, sum, a, b)
#endif
