// What every kernel file stands on, put in front of it before it is compiled: by NVRTC or nvcc for a GPU, or with
// HELIOSTAT_HOST by a C++ compiler for the tests' emulator, which provides the same names. No header is needed on the
// device, so that no CUDA toolkit is. This is the only place for inline PTX, and for anything that differs by compiler.
//
//   DTYPE                      0, 1 or 2: tensors hold float32, float16 or bfloat16
//   Element, load, store       one entry of such a tensor, read and written as float32; `rounded` is what is written
//   DYNAMIC_SHARED(type, name) the block's shared memory, the only kind in use: its size is the launch's
//   trap()                     end the kernel with an error
//   __syncthreads, __syncthreads_or, __syncwarp, __shfl_xor_sync, __shfl_down_sync, __shfl_sync, __popc, __byte_perm,
//   uint2, uint4, float4       as in CUDA
//
// and of 16-bit elements, two to a word, the first in its low half:
//
//   add_pairs(a, b)              their sums
//   multiply_16x8x16(sum, a, b)  sum += a b by the tensor cores, of a warp: a (16, 16), b (16, 8), sum (16, 8) float32.
//                                With r = lane / 4 and c = lane % 4 a lane holds of a rows r, r + 8, r, r + 8, columns
//                                2c, 2c, 2c + 8, 2c + 8 and the next of each; of b column r, rows 2c and 2c + 8 and
//                                the next of each; of sum rows r, r, r + 8, r + 8, columns 2c, 2c + 1, 2c, 2c + 1

#ifdef HELIOSTAT_HOST
#include "emulator.hpp"
#else
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

__device__ inline void trap() { asm volatile("trap;"); }

__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline unsigned short float_to_bfloat(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#if DTYPE == 1
__device__ inline unsigned add_pairs(unsigned a, unsigned b) {
  unsigned sums;
  asm("add.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  return sums;
}
#elif DTYPE == 2
__device__ inline unsigned add_pairs(unsigned a, unsigned b) {  // as 1 * a + b: sm_80 has no sum of its own
  unsigned sums;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sums;
}
#endif

#if DTYPE > 0
__device__ inline void multiply_16x8x16(float (&sum)[4], const unsigned (&a)[4], const uint2& b) {
#if DTYPE == 1
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif
  asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
#undef TYPES
#endif
#endif

__device__ inline float bfloat_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

#if DTYPE == 0
typedef float Element;
__device__ inline float load(const Element* place) { return *place; }
__device__ inline Element rounded(float value) { return value; }
#elif DTYPE == 1
typedef unsigned short Element;
__device__ inline float load(const Element* place) { return half_to_float(*place); }
__device__ inline Element rounded(float value) { return float_to_half(value); }
#else
typedef unsigned short Element;
__device__ inline float load(const Element* place) { return bfloat_to_float(*place); }
__device__ inline Element rounded(float value) { return float_to_bfloat(value); }
#endif
__device__ inline void store(Element* place, float value) { *place = rounded(value); }

// Sum over the block in a fixed order, the same value for every thread. `scratch` is shared, one float a warp, and free
// again on return.
template <int threads>
__device__ inline float block_sum(float value, float* scratch) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < threads / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}
