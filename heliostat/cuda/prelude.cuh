// What every kernel file stands on, put in front of it before it is compiled: by NVRTC or nvcc for a GPU, or with
// HELIOSTAT_HOST by a C++ compiler for the tests' emulator, which provides the same names. No header is needed on the
// device, so that no CUDA toolkit is. This is the only place for inline PTX, and for anything that differs by compiler.
//
//   DTYPE                      0, 1 or 2: tensors hold float32, float16 or bfloat16
//   Element, load, store       one entry of such a tensor, read and written as float32
//   DYNAMIC_SHARED(type, name) the block's shared memory, the only kind in use: its size is the launch's
//   trap()                     end the kernel with an error
//   __syncthreads, __syncthreads_or, __syncwarp, __shfl_xor_sync, __shfl_down_sync, __shfl_sync as in CUDA

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
#endif

__device__ inline float bfloat_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

#if DTYPE == 0
typedef float Element;
__device__ inline float load(const Element* place) { return *place; }
__device__ inline void store(Element* place, float value) { *place = value; }
#elif DTYPE == 1
typedef unsigned short Element;
__device__ inline float load(const Element* place) { return half_to_float(*place); }
__device__ inline void store(Element* place, float value) { *place = float_to_half(value); }
#else
typedef unsigned short Element;
__device__ inline float load(const Element* place) { return bfloat_to_float(*place); }
__device__ inline void store(Element* place, float value) { *place = float_to_bfloat(value); }
#endif

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
