// A kernel with one defect of choice, for the tests of the emulator: out[t] = 3 * (x[63 - t] + x[63 - (t ^ 16)]).

enum {
  NONE,
  NO_BARRIER_BEFORE_USE,
  NO_BARRIER_AFTER_USE,
  NO_WARP_BARRIER,
  READ_PAST_THE_END,
  WRITE_PAST_THE_END,
  SHUFFLE_IN_A_BRANCH,
  BARRIER_IN_A_BRANCH,
  EARLY_RETURN,
  WRONG_MASK,
  SHIFT_TOO_FAR,
  BLOCKS_SHARE_OUTPUT,
};

extern "C" __global__ void defective(const float* x, float* out, int defect) {
  DYNAMIC_SHARED(float, pool);
  const int t = threadIdx.x;
  if (defect == EARLY_RETURN && t == 63) return;
  pool[t] = x[defect == READ_PAST_THE_END ? t + 1 : t];
  if (defect != NO_BARRIER_BEFORE_USE && !(defect == BARRIER_IN_A_BRANCH && t < 32)) __syncthreads();
  float value = pool[63 - t];
  if (defect != NO_BARRIER_AFTER_USE) __syncthreads();
  pool[t] = 3.0f * value;
  if (defect != NO_WARP_BARRIER) __syncwarp(0xffffffffu);
  float sum = pool[t ^ 16];  // of the same warp
  if (defect == SHUFFLE_IN_A_BRANCH) {
    if (t % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 0);
  } else if (defect == WRONG_MASK) {
    value = __shfl_sync(0x0000ffffu, value, t % 32);
  } else {
    value = __shfl_xor_sync(t % 32 < 16 ? 0x0000ffffu : 0xffff0000u, value, 0);
  }
  sum += 3.0f * value;
  if (defect == SHIFT_TOO_FAR) sum += (float)(1u << (32 + t));
  const int block = defect == BLOCKS_SHARE_OUTPUT ? 0 : blockIdx.x;
  out[64 * block + (defect == WRITE_PAST_THE_END ? t + 1 : t)] = sum;
}

extern "C" __global__ void collectives(const float* x, float* out) {
  const int t = threadIdx.x;
  out[t] = __shfl_down_sync(0xffffffffu, x[t], 3);
  out[64 + t] = __shfl_sync(0xffffffffu, x[t], 5);
  out[128 + t] = (float)__syncthreads_or(x[t] > 62.0f);
  out[192 + t] = block_sum<64>(x[t], out + 256);
}

extern "C" __global__ void round_trip(const float* x, Element* out, float* back, int n) {
  for (int i = threadIdx.x; i < n; i += 64) {
    store(out + i, x[i]);
    back[i] = load(out + i);
  }
}

extern "C" __global__ void bits(const unsigned* x, unsigned* out) {
  const int t = threadIdx.x;
  out[t] = __popc(x[t]);
  out[64 + t] = __byte_perm(x[t], x[63 - t], 0x7520);
}

#if DTYPE > 0
// a (16, 16), b (16, 8), row after row; out their product, and what adding the first halves of both gives.
// With fewer than 32 `lanes` the tensor cores wait for the others.
extern "C" __global__ void pairs(const unsigned* a, const Element* b, float* out, unsigned* sums, int lanes) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const unsigned left[4] = {a[8 * r + c], a[8 * (r + 8) + c], a[8 * r + c + 4], a[8 * (r + 8) + c + 4]};
  const unsigned first = b[16 * c + r] | (unsigned)b[16 * c + 8 + r] << 16;
  const unsigned second = b[16 * (c + 4) + r] | (unsigned)b[16 * (c + 4) + 8 + r] << 16;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const uint2 right = {first, second};
  if (lane < lanes) multiply_16x8x16(sum, left, right);
  if (threadIdx.x >= 32) return;
  for (int i = 0; i < 4; ++i) out[8 * (r + i / 2 * 8) + 2 * c + i % 2] = sum[i];
  sums[lane] = add_pairs(a[lane], ((const unsigned*)b)[lane]);
}
#endif
