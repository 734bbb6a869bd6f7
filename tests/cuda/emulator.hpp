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
