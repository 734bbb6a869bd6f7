// Products with a weight W^ (O, I) in the TB2 format, decoded on the way, and the decoding alone. The format stands in
// heliostat/components/two_bit_format.py; `PACKED_ARRAYS` are its arrays, in its order.
//
//   dequantize   W^ or some of its rows in DTYPE                      block: 16 rows x 2048 columns
//   linear       y = x W^^T + bias, x (batch, I) in DTYPE             block: 16 rows x BATCH rows of x, all columns
//
// 16 rows are what shares a second-order scale. In every tile of 2048 columns a block first issues the loads of the
// codes, 128 bits a thread; while they are in flight it brings its share of x to shared memory and decodes the tile's
// scales there (the paper's asynchronous dequantisation); then it multiplies, with the next tile's codes in flight.
//
// A weight enters as the integer c - z, exact in any dtype; a group's 16 products are summed, then scaled. All sums are
// float32 in a fixed order without atomics, so results repeat to the bit. A result that is not finite is summed again
// weight by weight: 0 x inf under an outlier, or an overflow before scaling, are then what a dense layer would give.
//
//   BATCH         0: `dequantize`; else `linear` for so many rows of x a block
//   TENSOR_CORES  1: `linear` by mma, for 16-bit x and BATCH a multiple of 8; 0: by scalar arithmetic

#define THREADS 256
#define WARPS (THREADS / 32)
#define BLOCK_ROWS 16  // the format's: rows that share second-order scales
#define TILE_QUADS 32  // a quad: the 4 groups of 128 bits of codes
#define TILE_GROUPS (4 * TILE_QUADS)
#define TILE_COLUMNS (16 * TILE_GROUPS)
#define TILE_WORDS (TILE_GROUPS / 32)  // of the map of 4-bit groups

#define PACKED_ARRAYS                                                                                            \
  const unsigned *__restrict__ four_bit_map, const unsigned *__restrict__ codes,                                 \
      const unsigned *__restrict__ codes_hi, const unsigned short *__restrict__ scale_zero,                      \
      const unsigned short *__restrict__ scale2, const unsigned short *__restrict__ zero2,                       \
      const unsigned short *__restrict__ scale4, const unsigned *__restrict__ zero4,                             \
      const int *__restrict__ outlier_row_ptr, const void *__restrict__ outlier_col,                             \
      const unsigned short *__restrict__ outlier_val, const int *__restrict__ exponent, int rows, int columns,   \
      int four_bit_groups

struct Weight {
  const unsigned *map, *codes, *codes_hi;
  const unsigned short *scale_zero, *scale2, *zero2, *scale4;
  const unsigned* zero4;
  const int* outlier_row_ptr;
  const void* outlier_col;
  const unsigned short* outlier_val;
  float first_power, second_power;  // their product is 2^e
  int rows, columns;
  int groups, four, two, triples, zero_words;  // G, H, G2, T, ceil(H / 8)
};

// 2^n, held within float32's normal numbers.
__device__ inline float power_of_two(int n) { return __uint_as_float((unsigned)(min(max(n, -126), 127) + 127) << 23); }

__device__ inline Weight weight_of(PACKED_ARRAYS) {
  Weight w;
  w.map = four_bit_map, w.codes = codes, w.codes_hi = codes_hi;
  w.scale_zero = scale_zero, w.scale2 = scale2, w.zero2 = zero2, w.scale4 = scale4, w.zero4 = zero4;
  w.outlier_row_ptr = outlier_row_ptr, w.outlier_col = outlier_col, w.outlier_val = outlier_val;
  // In halves, where 2^e might leave the normal numbers and be flushed to zero.
  const int e = *exponent, first = e >= -64 && e <= 64 ? e : e >> 1;
  w.first_power = power_of_two(first), w.second_power = power_of_two(e - first);
  w.rows = rows, w.columns = columns;
  w.groups = (columns + 63) / 64 * 4, w.four = four_bit_groups, w.two = w.groups - w.four;
  w.triples = (w.two + 2) / 3, w.zero_words = (w.four + 7) / 8;
  return w;
}

#define WEIGHT                                                                                                   \
  weight_of(four_bit_map, codes, codes_hi, scale_zero, scale2, zero2, scale4, zero4, outlier_row_ptr,            \
            outlier_col, outlier_val, exponent, rows, columns, four_bit_groups)

// --- scales ---

__device__ inline bool is_four_bit(const Weight& w, int group) { return w.map[group / 32] >> group % 32 & 1; }

// 4-bit groups from group 32 * word on, up to and without `group`, which lies less than a tile ahead.
__device__ inline int four_bit_before(const Weight& w, int word, int group) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < TILE_WORDS; ++i) {
    const int begin = 32 * (word + i);
    if (begin < group) {
      const unsigned bits = w.map[word + i];
      count += __popc(group - begin < 32 ? bits & ((1u << (group - begin)) - 1) : bits);
    }
  }
  return count;
}

// A group of columns for one block of 16 rows: where its scales and zeros stand, and what the rows share.
struct Group {
  bool four;
  int index;                          // t among the 2-bit groups, or h among the 4-bit groups
  const unsigned short* words;        // scale_zero or scale4, of row 0
  int stride, zero_shift;             // to the next row; of the zero in its word
  int code_shift, code_mask, offset;  // of a 2-bit group's scale code, and z2
  float scale2;                       // times the first power
};

__device__ inline Group group_of(const Weight& w, int row_block, int group, int four_before) {
  Group g;
  g.four = is_four_bit(w, group);
  g.index = g.four ? four_before : group - four_before;
  const int triple = g.index / 3, member = g.index % 3;
  g.words = g.four ? w.scale4 + g.index : w.scale_zero + triple;
  g.stride = g.four ? w.four : w.triples;
  g.zero_shift = g.four ? 4 * (g.index % 8) : 2 * member;
  g.code_shift = 6 + 3 * member, g.code_mask = member == 2 ? 15 : 7;
  g.scale2 = 0.0f, g.offset = 0;
  if (!g.four) {
    g.scale2 = half_to_float(w.scale2[(long long)row_block * w.two + g.index]) * w.first_power;
    g.offset = w.zero2[(long long)row_block * w.triples + triple] >> 4 * member & g.code_mask;
  }
  return g;
}

// What is stored of one row and group, as it comes from memory.
struct Stored {
  unsigned short word;  // of scale_zero or scale4
  unsigned zeros;       // of zero4
  unsigned high;        // of codes_hi
};

__device__ inline Stored load_stored(const Weight& w, const Group& g, int row) {
  Stored stored;
  stored.word = g.words[(long long)row * g.stride];
  stored.zeros = g.four ? w.zero4[(long long)row * w.zero_words + g.index / 8] : 0;
  stored.high = g.four ? w.codes_hi[(long long)row * w.four + g.index] : 0;
  return stored;
}

// The decoded scale of one row and group. It has at most 16 significant bits, so its float32 has 8 to spare: there
// stand the zero and whether the group has four bits. `y` is the second half of a 4-bit group's codes.
#define FOUR_BITS 16u

__device__ inline uint2 decode(const Weight& w, const Group& g, const Stored& stored) {
  const float of_two = (float)((stored.word >> g.code_shift & g.code_mask) + g.offset) * g.scale2;
  const float of_four = half_to_float(stored.word) * w.first_power;
  const float scale = g.four ? of_four : of_two;
  const unsigned zero = g.four ? (stored.zeros >> g.zero_shift & 15) | FOUR_BITS : stored.word >> g.zero_shift & 3;
  return uint2{(__float_as_uint(scale) & ~0xffu) | zero, stored.high};
}

__device__ inline float scale_in(const uint2& decoded) { return __uint_as_float(decoded.x & ~0xffu); }

// An integer below 2^23 in the last bits of this is the float32 2^23 + integer.
#define TO_FLOAT 0x4b000000u

__device__ inline float integer(unsigned value) { return __uint_as_float(TO_FLOAT | value); }

// The codes of a group's columns from `start` on, up to the end of its first or second half.
struct Run {
  unsigned bits, mask;
  int step;
  float zero;
};

__device__ inline Run run_from(unsigned word, const uint2& decoded, int start) {
  const bool four = decoded.x & FOUR_BITS;
  Run run;
  run.bits = four ? (start < 8 ? word : decoded.y) >> 4 * (start % 8) : word >> 2 * start;
  run.step = four ? 4 : 2, run.mask = four ? 15 : 3;
  run.zero = integer(decoded.x & 15);
  return run;
}

// c - z of the run's column j.
__device__ inline float code_of(const Run& run, int j) {
  return integer(run.bits >> run.step * j & run.mask) - run.zero;
}

// Decoded scales of a tile in shared memory: member m of quad q of a row at row * ROW_STRIDE + m * MEMBER_STRIDE + q.
// The strides spread over the banks what a warp reads or writes at a time.
#define MEMBER_STRIDE (TILE_QUADS + 4)
#define ROW_STRIDE (4 * MEMBER_STRIDE + 1)
#define SCALES (BLOCK_ROWS * ROW_STRIDE)

__device__ inline void decode_tile(uint2* scales, const Weight& w, int row_block, int first_group, int four_before) {
  const int rows_each = BLOCK_ROWS / (THREADS / TILE_GROUPS);
  const int k = threadIdx.x % TILE_GROUPS, group = first_group + k;
  const int first = threadIdx.x / TILE_GROUPS * rows_each;
  uint2* place = scales + first * ROW_STRIDE + k % 4 * MEMBER_STRIDE + k / 4;
  if (group >= w.groups) {
#pragma unroll
    for (int i = 0; i < rows_each; ++i) place[i * ROW_STRIDE] = uint2{0, 0};
    return;
  }
  const Group g = group_of(w, row_block, group, four_before + four_bit_before(w, first_group / 32, group));
  Stored stored[rows_each];
#pragma unroll
  for (int i = 0; i < rows_each; ++i) {  // rows beyond the last repeat it; nobody uses them
    stored[i] = load_stored(w, g, min(BLOCK_ROWS * row_block + first + i, w.rows - 1));
  }
#pragma unroll
  for (int i = 0; i < rows_each; ++i) place[i * ROW_STRIDE] = decode(w, g, stored[i]);
}

// --- outliers ---

__device__ inline int outlier_column(const Weight& w, int n) {
  return w.columns > 65536 ? ((const int*)w.outlier_col)[n] : ((const unsigned short*)w.outlier_col)[n];
}

__device__ inline float outlier_value(const Weight& w, int n) {
  return half_to_float(w.outlier_val[n]) * w.first_power;
}

#if BATCH == 0

#define CHUNK (16 / (int)sizeof(Element))  // columns that a thread writes at a time
#define CHUNKS (TILE_COLUMNS / CHUNK)      // of a row of the tile
#define CHUNKS_EACH (CHUNKS / THREADS)

__device__ inline uint4 packed(const Element (&value)[CHUNK]) {
#if DTYPE == 0
  return uint4{__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
               __float_as_uint(value[3])};
#else
  return uint4{value[0] | (unsigned)value[1] << 16, value[2] | (unsigned)value[3] << 16,
               value[4] | (unsigned)value[5] << 16, value[6] | (unsigned)value[7] << 16};
#endif
}

// out (rows of W^ from 16 * first_block on, columns): blockIdx.x is the block of rows, blockIdx.y the tile of columns.
// `vector`: chunks of 16 bytes are aligned, and none straddles the end of a row.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    dequantize(PACKED_ARRAYS, Element* __restrict__ out, int first_block, int vector) {
  DYNAMIC_SHARED(uint2, scales);
  const Weight w = WEIGHT;
  const int row_block = first_block + blockIdx.x, first_row = BLOCK_ROWS * row_block;
  const int first_group = TILE_GROUPS * blockIdx.y, first_column = 16 * first_group;
  const int count = min(BLOCK_ROWS, w.rows - first_row);
  out += (long long)(BLOCK_ROWS * blockIdx.x) * w.columns;

  unsigned words[CHUNKS_EACH][BLOCK_ROWS];
#pragma unroll
  for (int c = 0; c < CHUNKS_EACH; ++c) {
    const int group = first_group + (threadIdx.x + THREADS * c) * CHUNK / 16;
#pragma unroll
    for (int r = 0; r < BLOCK_ROWS; ++r) {
      // Rows and groups beyond the last repeat it; nobody uses them.
      words[c][r] = w.codes[(long long)min(first_row + r, w.rows - 1) * w.groups + min(group, w.groups - 1)];
    }
  }
  int four_before = 0;  // in the tiles before
  for (int i = threadIdx.x % 32; i < first_group / 32; i += 32) four_before += __popc(w.map[i]);
  for (int distance = 16; distance > 0; distance /= 2) {
    four_before += __shfl_xor_sync(0xffffffffu, four_before, distance);
  }
  decode_tile(scales, w, row_block, first_group, four_before);
  __syncthreads();

#pragma unroll
  for (int c = 0; c < CHUNKS_EACH; ++c) {
    const int k = (threadIdx.x + THREADS * c) * CHUNK, column = first_column + k;
    const int group = k / 16, start = k % 16;
#pragma unroll
    for (int r = 0; r < BLOCK_ROWS; ++r) {
      if (r < count && column < w.columns) {
        const uint2 decoded = scales[r * ROW_STRIDE + group % 4 * MEMBER_STRIDE + group / 4];
        const Run run = run_from(words[c][r], decoded, start);
        const float scale = scale_in(decoded);
        Element value[CHUNK];
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) value[j] = rounded(code_of(run, j) * scale * w.second_power);
        Element* place = out + (long long)r * w.columns + column;
        if (vector) {
          *(uint4*)place = packed(value);
        } else {
#pragma unroll
          for (int j = 0; j < CHUNK; ++j) {
            if (column + j < w.columns) place[j] = value[j];
          }
        }
      }
    }
  }
  __syncthreads();

  // The weights under outliers once more, so that each is rounded once.
  for (int r = threadIdx.x / 32; r < count; r += WARPS) {
    const int row = first_row + r;
    for (int n = w.outlier_row_ptr[row] + threadIdx.x % 32; n < w.outlier_row_ptr[row + 1]; n += 32) {
      const int column = outlier_column(w, n), k = column - first_column, group = k / 16;
      if (k < 0 || k >= TILE_COLUMNS) continue;
      const uint2 decoded = scales[r * ROW_STRIDE + group % 4 * MEMBER_STRIDE + group / 4];
      const Run run = run_from(w.codes[(long long)row * w.groups + first_group + group], decoded, k % 16);
      const float value = fmaf(code_of(run, 0), scale_in(decoded), outlier_value(w, n));
      store(out + (long long)r * w.columns + column, value * w.second_power);
    }
  }
}

#else

// --- what both ways of multiplying share ---

__device__ inline uint4 load_quad(const Weight& w, int row, int quad) {
  const int quads = w.groups / 4;
  if (row >= w.rows || quad >= quads) return uint4{0, 0, 0, 0};
  return ((const uint4*)w.codes)[(long long)row * quads + quad];
}

__device__ inline unsigned member_of(const uint4& quad, int member) {
  return member == 0 ? quad.x : member == 1 ? quad.y : member == 2 ? quad.z : quad.w;
}

// Sum of a row's outliers times x, by a warp: a share for each lane, still without the second power.
__device__ inline void add_outliers(float* sum, const Weight& w, int row, const Element* x, int batch) {
  if (row >= w.rows) return;
  const int end = w.outlier_row_ptr[row + 1];
#pragma unroll 1  // a row has about as many as a warp has lanes
  for (int n = w.outlier_row_ptr[row] + threadIdx.x % 32; n < end; n += 32) {
    const float value = outlier_value(w, n);
    const Element* place = x + outlier_column(w, n);
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {  // rows of x beyond the last repeat it; nobody uses their sums
      sum[b] = fmaf(value, load(place + min(b, batch - 1) * w.columns), sum[b]);
    }
  }
}

__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sums of `count` values over the lanes of a warp, count a power of two: that of value i to the lanes from
// i * 32 / count on. Lanes hand over half of their values at a time: few more shuffles than for one value.
template <int count>
__device__ inline float warp_sums(float (&value)[count]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int half = count >> (step + 1), distance = 16 >> step;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      if (i < half) {
        const float given = upper ? value[i] : value[i + half];
        value[i] = (upper ? value[i + half] : value[i]) + __shfl_xor_sync(0xffffffffu, given, distance);
      }
    }
    if (half == 0) value[0] += __shfl_xor_sync(0xffffffffu, value[0], distance);
  }
  return value[0];
}

__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// x . W^[row] weight by weight, by a warp: slow and as a dense layer does it.
__device__ inline float dense_product(const Weight& w, int row, const Element* x) {
  int four_before = 0;
  float sum = 0.0f;
#pragma unroll 1
  for (int first = 0; first < w.groups; first += 32) {
    const int group = first + threadIdx.x % 32;
    if (group < w.groups) {
      const Group g = group_of(w, row / BLOCK_ROWS, group, four_before + four_bit_before(w, first / 32, group));
      const uint2 decoded = decode(w, g, load_stored(w, g, row));
      const unsigned word = w.codes[(long long)row * w.groups + group];
#pragma unroll 1
      for (int j = 0; j < 16 && 16 * group + j < w.columns; ++j) {
        const int column = 16 * group + j;
        float weight = code_of(run_from(word, decoded, j), 0) * scale_in(decoded);
#pragma unroll 1
        for (int n = w.outlier_row_ptr[row]; n < w.outlier_row_ptr[row + 1]; ++n) {
          if (outlier_column(w, n) == column) weight += outlier_value(w, n);
        }
        sum = fmaf(weight * w.second_power, load(x + column), sum);
      }
    }
    four_before += __popc(w.map[first / 32]);
  }
  return warp_sum(sum);
}

// The bias of a row: null for none, else of its own dtype, as DTYPE counts them.
__device__ inline float bias_of(const void* bias, int dtype, int row) {
  if (!bias) return 0.0f;
  if (dtype == 0) return ((const float*)bias)[row];
  const unsigned short bits = ((const unsigned short*)bias)[row];
  return dtype == 1 ? half_to_float(bits) : bfloat_to_float(bits);
}

// Of a block's rows of x and y: where a result goes, and the bias.
struct Output {
  const Element* x;
  const void* bias;
  Element* y;
  int bias_dtype, batch;
};

// Stores y[b][row] from its sum; false if that is not finite, and so left to `store_dense_product`.
__device__ inline bool store_sum(const Output& out, const Weight& w, int row, int b, float sum) {
  if (row >= w.rows || b >= out.batch) return true;
  const float value = sum * w.second_power;
  if (!is_finite(value)) return false;
  store(out.y + (long long)b * w.rows + row, value + bias_of(out.bias, out.bias_dtype, row));
  return true;
}

// The same by a whole warp and another sum.
__device__ inline void store_dense_product(const Output& out, const Weight& w, int row, int b) {
  const float value = dense_product(w, row, out.x + (long long)b * w.columns);
  if (threadIdx.x % 32 == 0) {
    store(out.y + (long long)b * w.rows + row, value + bias_of(out.bias, out.bias_dtype, row));
  }
}

#if TENSOR_CORES == 0

// A warp has 2 of the 16 rows, a lane one quad of columns of each; x stands in shared memory as float32.

#define ROWS_EACH (BLOCK_ROWS / WARPS)
struct alignas(16) Eight {
  Element entry[TILE_COLUMNS / THREADS];
};

#define QUAD_STRIDE 68  // of 64 inputs: lanes that read 128 bits of their quads meet no bank conflict

// Where input j of a group stands: in the order in which `code_at` brings out its codes.
__device__ inline int slot_of(int j, bool four) {
  return four ? j / 8 * 8 + 4 * (j % 2) + j % 8 / 2 : 4 * (j % 4) + j / 4;
}

// A thread brings half a group of every row of x. Beyond the columns stand zeros, whatever x holds there.
__device__ inline void stage_inputs(float* inputs, const Weight& w, const Element* x, int batch, int first_group,
                                    int vector) {
  const int each = TILE_COLUMNS / THREADS, k = each * threadIdx.x, group = first_group + k / 16;
  const int column = 16 * first_group + k, count = w.columns - column;
  const bool four = group < w.groups && is_four_bit(w, group);
  inputs += k / 64 * QUAD_STRIDE + k % 64 / 16 * 16 + (four ? k % 16 : k % 16 / 4);
#pragma unroll 2
  for (int b = 0; b < BATCH; ++b) {
    const Element* place = x + (long long)b * w.columns + column;
    Eight value = {};
    if (b < batch) {
      if (vector && count >= each) {
        value = *(const Eight*)place;
      } else {
#pragma unroll
        for (int j = 0; j < each; ++j) {
          if (j < count) value.entry[j] = place[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < each; ++j) inputs[b * TILE_QUADS * QUAD_STRIDE + slot_of(j, four)] = load(&value.entry[j]);
  }
}

// The codes of a group as bytes, so that one instruction makes a float32 of each.
struct Codes {
  unsigned bytes[4];
  float zero;
};

__device__ inline Codes unpack(unsigned word, const uint2& decoded) {
  const bool four = decoded.x & FOUR_BITS;
  const int step = four ? 4 : 2;
  const unsigned mask = four ? 0x0f0f0f0fu : 0x03030303u, second = four ? decoded.y : word >> 4;
  return Codes{{word & mask, word >> step & mask, second & mask, second >> step & mask}, integer(decoded.x & 15)};
}

// c - z of what stands at slot 4 * i + k.
__device__ inline float code_at(const Codes& codes, int i, int k) {
  return __uint_as_float(__byte_perm(codes.bytes[i], TO_FLOAT, 0x7540 | k)) - codes.zero;
}

extern "C" __global__ void __launch_bounds__(THREADS, BATCH <= 2 ? 3 : 2)
    linear(PACKED_ARRAYS, const Element* __restrict__ x, const void* __restrict__ bias, Element* __restrict__ y,
           int batch, int bias_dtype, int vector) {
  DYNAMIC_SHARED(float, inputs);
  uint2* scales = (uint2*)(inputs + BATCH * TILE_QUADS * QUAD_STRIDE);
  const Weight w = WEIGHT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = BLOCK_ROWS * blockIdx.x + ROWS_EACH * warp;
  x += (long long)BATCH * blockIdx.y * w.columns, y += (long long)BATCH * blockIdx.y * w.rows;
  batch = min(batch - BATCH * (int)blockIdx.y, BATCH);

  uint4 quad[ROWS_EACH];
#pragma unroll
  for (int r = 0; r < ROWS_EACH; ++r) quad[r] = load_quad(w, row + r, lane);
  float sum[ROWS_EACH * BATCH] = {};
#pragma unroll
  for (int r = 0; r < ROWS_EACH; ++r) add_outliers(sum + r * BATCH, w, row + r, x, batch);
  int four_before = 0;
  for (int first = 0; first < w.groups; first += TILE_GROUPS) {
    stage_inputs(inputs, w, x, batch, first, vector);
    decode_tile(scales, w, blockIdx.x, first, four_before);
    four_before += four_bit_before(w, first / 32, min(first + TILE_GROUPS, w.groups));
    __syncthreads();
    uint4 next[ROWS_EACH];
#pragma unroll
    for (int r = 0; r < ROWS_EACH; ++r) next[r] = load_quad(w, row + r, (first + TILE_GROUPS) / 4 + lane);
#pragma unroll 1  // more takes registers, and with them the second block on a processor
    for (int member = 0; member < 4; ++member) {
      const float4* input = (const float4*)(inputs + lane * QUAD_STRIDE + 16 * member);
      Codes codes[ROWS_EACH];
      float scale[ROWS_EACH], product[ROWS_EACH][BATCH];
#pragma unroll
      for (int r = 0; r < ROWS_EACH; ++r) {
        const uint2 decoded = scales[(ROWS_EACH * warp + r) * ROW_STRIDE + member * MEMBER_STRIDE + lane];
        codes[r] = unpack(member_of(quad[r], member), decoded);
        scale[r] = scale_in(decoded);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) product[r][b] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float code[ROWS_EACH][4];
#pragma unroll
        for (int r = 0; r < ROWS_EACH; ++r) {
#pragma unroll
          for (int k = 0; k < 4; ++k) code[r][k] = code_at(codes[r], i, k);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
          const float4 four = input[b * TILE_QUADS * QUAD_STRIDE / 4 + i];
#pragma unroll
          for (int r = 0; r < ROWS_EACH; ++r) {
            product[r][b] = fmaf(code[r][0], four.x, product[r][b]);
            product[r][b] = fmaf(code[r][1], four.y, product[r][b]);
            product[r][b] = fmaf(code[r][2], four.z, product[r][b]);
            product[r][b] = fmaf(code[r][3], four.w, product[r][b]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS_EACH; ++r) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) sum[r * BATCH + b] = fmaf(scale[r], product[r][b], sum[r * BATCH + b]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS_EACH; ++r) quad[r] = next[r];
  }
  const int lanes = 32 / (ROWS_EACH * BATCH);  // that have the same of the sums
  const float total = warp_sums(sum);
  const int mine = lane / lanes;
  const Output out = {x, bias, y, bias_dtype, batch};
  int left = lane % lanes == 0 && !store_sum(out, w, row + mine / BATCH, mine % BATCH, total) ? 1 << mine : 0;
  for (int distance = 16; distance > 0; distance /= 2) left |= __shfl_xor_sync(0xffffffffu, left, distance);
#pragma unroll 1
  for (int i = 0; i < ROWS_EACH * BATCH; ++i) {
    if (left >> i & 1) store_dense_product(out, w, row + i / BATCH, i % BATCH);
  }
}

#else

// A warp has 4 of the tile's quads for all 16 rows; the 16 columns of a group meet 8 rows of x in one mma. Lane l holds
// rows l / 4 and l / 4 + 8 of W^, columns l % 4 + 0, 4, 8 and 12 of the group, and of x row l / 4 the same columns:
// the order of the products in an mma is free as long as both sides agree.

#define BATCH_TILES (BATCH / 8)
#if DTYPE == 1
#define TO_PAIR 0x64006400u  // float16: a small integer in the last bits is 1024 + integer
#else
#define TO_PAIR 0x43004300u  // bfloat16: 128 + integer
#endif

// The 16 inputs of a group as 8 words, each a column j < 8 in the low half and column j + 8 in the high half, in the
// order 0 4 1 5 2 6 3 7: the two words of a lane side by side.
struct alignas(16) Pairs {
  uint4 half[2];
};

__device__ inline Pairs load_pairs(const Element* x, int count, int vector) {
  uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
  if (vector && count >= 16) {
    low = ((const uint4*)x)[0], high = ((const uint4*)x)[1];
  } else {
    unsigned word[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      word[i] = (2 * i < count ? x[2 * i] : 0u) | (2 * i + 1 < count ? x[2 * i + 1] : 0u) << 16;
    }
    low = uint4{word[0], word[1], word[2], word[3]}, high = uint4{word[4], word[5], word[6], word[7]};
  }
  const int lows = 0x5410, highs = 0x7632;
  return Pairs{{uint4{__byte_perm(low.x, high.x, lows), __byte_perm(low.z, high.z, lows),
                      __byte_perm(low.x, high.x, highs), __byte_perm(low.z, high.z, highs)},
                uint4{__byte_perm(low.y, high.y, lows), __byte_perm(low.w, high.w, lows),
                      __byte_perm(low.y, high.y, highs), __byte_perm(low.w, high.w, highs)}}};
}

// inputs[group of the tile][row of x]
__device__ inline void stage_inputs(Pairs* inputs, const Weight& w, const Element* x, int batch, int first_group,
                                    int vector) {
#pragma unroll 4
  for (int e = threadIdx.x; e < TILE_GROUPS * BATCH; e += THREADS) {
    const int b = e % BATCH, column = 16 * (first_group + e / BATCH);
    inputs[e] = load_pairs(x + (long long)b * w.columns + column, b < batch ? w.columns - column : 0, vector);
  }
}

// c - z of columns c, c + 8 and of columns c + 4, c + 12 of a group, as pairs of DTYPE.
__device__ inline void unpack(unsigned& first, unsigned& second, unsigned word, const uint2& decoded, int c) {
  const unsigned zero = ((decoded.x & 15) * 0x10001u | TO_PAIR) ^ 0x80008000u;  // negative
  if (decoded.x & FOUR_BITS) {
    first = __byte_perm(word, decoded.y, 0x5410) >> 4 * c & 0x000f000fu;
    second = __byte_perm(word, decoded.y, 0x7632) >> 4 * c & 0x000f000fu;
  } else {
    first = word >> 2 * c & 0x00030003u;
    second = word >> (2 * c + 8) & 0x00030003u;
  }
  first = add_pairs(first | TO_PAIR, zero), second = add_pairs(second | TO_PAIR, zero);
}

extern "C" __global__ void __launch_bounds__(THREADS, BATCH == 8 ? 3 : 2)
    linear(PACKED_ARRAYS, const Element* __restrict__ x, const void* __restrict__ bias, Element* __restrict__ y,
           int batch, int bias_dtype, int vector) {
  DYNAMIC_SHARED(Pairs, inputs);
  uint2* scales = (uint2*)(inputs + TILE_GROUPS * BATCH);
  float* totals = (float*)(scales + SCALES);  // (16, BATCH): of the outliers, then of all
  float* shares = (float*)inputs;             // at the end: (WARPS, 16, BATCH)
  const Weight w = WEIGHT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4, r = lane / 4;
  const int first_row = BLOCK_ROWS * blockIdx.x;
  x += (long long)BATCH * blockIdx.y * w.columns, y += (long long)BATCH * blockIdx.y * w.rows;
  batch = min(batch - BATCH * (int)blockIdx.y, BATCH);

  uint4 upper = load_quad(w, first_row + r, 4 * warp + c), lower = load_quad(w, first_row + r + 8, 4 * warp + c);
  for (int row = warp; row < BLOCK_ROWS; row += WARPS) {
    float sum[BATCH] = {};
    add_outliers(sum, w, first_row + row, x, batch);
    const float total = warp_sums(sum);
    if (lane % (32 / BATCH) == 0) totals[row * BATCH + lane / (32 / BATCH)] = total;
  }
  float sum[BATCH_TILES][4] = {};
  int four_before = 0;
  for (int first = 0; first < w.groups; first += TILE_GROUPS) {
    stage_inputs(inputs, w, x, batch, first, vector);
    decode_tile(scales, w, blockIdx.x, first, four_before);
    four_before += four_bit_before(w, first / 32, min(first + TILE_GROUPS, w.groups));
    __syncthreads();
    const int next = (first + TILE_GROUPS) / 4 + 4 * warp + c;
    const uint4 next_upper = load_quad(w, first_row + r, next), next_lower = load_quad(w, first_row + r + 8, next);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int quad = 4 * warp + q;
      if (first / 4 + quad >= w.groups / 4) break;  // the same for the warp
#pragma unroll
      for (int member = 0; member < 4; ++member) {
        const uint2* decoded = scales + r * ROW_STRIDE + member * MEMBER_STRIDE + quad;
        const uint2 top = decoded[0], bottom = decoded[8 * ROW_STRIDE];
        const unsigned top_word = __shfl_sync(0xffffffffu, member_of(upper, member), lane / 4 * 4 + q);
        const unsigned bottom_word = __shfl_sync(0xffffffffu, member_of(lower, member), lane / 4 * 4 + q);
        unsigned code[4];
        unpack(code[0], code[2], top_word, top, c);
        unpack(code[1], code[3], bottom_word, bottom, c);
        const float top_scale = scale_in(top), bottom_scale = scale_in(bottom);
#pragma unroll
        for (int t = 0; t < BATCH_TILES; ++t) {
          const uint2 input = ((const uint2*)(inputs + (4 * quad + member) * BATCH + 8 * t + r))[c];
          float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          multiply_16x8x16(product, code, input);
          sum[t][0] = fmaf(top_scale, product[0], sum[t][0]);
          sum[t][1] = fmaf(top_scale, product[1], sum[t][1]);
          sum[t][2] = fmaf(bottom_scale, product[2], sum[t][2]);
          sum[t][3] = fmaf(bottom_scale, product[3], sum[t][3]);
        }
      }
    }
    __syncthreads();
    upper = next_upper, lower = next_lower;
  }
#pragma unroll
  for (int t = 0; t < BATCH_TILES; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shares[(warp * BLOCK_ROWS + r + i / 2 * 8) * BATCH + 8 * t + 2 * c + i % 2] = sum[t][i];
    }
  }
  __syncthreads();
  const int e = threadIdx.x;  // one result a thread: no more are made
  const Output out = {x, bias, y, bias_dtype, batch};
  bool stored = true;
  if (e < BLOCK_ROWS * BATCH) {
    float total = totals[e];
#pragma unroll
    for (int i = 0; i < WARPS; ++i) total += shares[i * BLOCK_ROWS * BATCH + e];
    stored = store_sum(out, w, first_row + e / BATCH, e % BATCH, total);
    totals[e] = stored ? 0.0f : 1.0f;
  }
  if (!__syncthreads_or(!stored)) return;
#pragma unroll 1
  for (int i = warp; i < BLOCK_ROWS * BATCH; i += WARPS) {
    if (totals[i] != 0.0f) store_dense_product(out, w, first_row + i / BATCH, i % BATCH);
  }
}

#endif
#endif
