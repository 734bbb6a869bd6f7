// Group whitening, forward and backward: y = (x - mean) W and its derivative, for P = views * groups problems at once.
//
// A problem is one group of `size` channels of one view: block blockIdx.x, whose channels are
// order[view][group * size ...] of x (V, rows, dim), or the group's own when order is null. Three phases each way:
//
//   stats   a slab of rows -> its mean and its scatter (forward), or sum C and A^T C (backward)
//   root    all slabs -> Sigma -> W (forward), or dL/dSigma (backward); one block a problem, in shared memory
//   apply   a slab of rows -> Y = A W, or dX = (C - mean C) W + (2 / N) A S
//
// `forward` and `backward` run the three in one launch, one block a problem: the small sizes, where a launch costs more
// than the arithmetic. The other entry points run one phase over many slabs of rows, blockIdx.y, for large N. The sums
// over rows, slabs and threads have a fixed order and no atomics, so results repeat to the bit.
//
//   TILE     1, 2, 3, 4 or 6: a thread's share of a (size, size) product is TILE x TILE entries; size <= 16 * TILE
//   METHOD   0: eigenvalues by cyclic Jacobi; 1: coupled Newton-Schulz, normalised by the trace
//   SLABS    0: the entry points with all phases; 1: those with one
//
// Matrices in shared memory have the odd leading dimension `ld`, which spreads rows and columns over the banks.

#define THREADS 256
#define ROW_TILE (TILE <= 4 ? 2 * TILE : TILE)  // likewise for products that sum over rows
#define ROWS_EACH 4                             // rows that one thread whitens at a time
#define BATCH 8                                 // loads in flight of a thread
#define MAX_COPIES 32                           // of a sum over rows: each costs a barrier
#define MAX_SWEEPS 12                           // of Jacobi; about 6 to 10 are needed

struct Problem {
  long long start;         // of the view in x
  const long long* order;  // the group's channels, or null
  int first;               // the group's first channel, when order is null
  int rows, dim, size, ld;
};

struct Shared {
  int* channels;   // (size): where in a row of x the group's channels are
  float* mean;     // (size)
  float* scratch;  // (THREADS)
  float* work;     // the phase's matrices
};

__device__ inline Problem problem_of(const long long* order, int rows, int dim, int size) {
  int groups = dim / size;
  int view = blockIdx.x / groups, group = blockIdx.x % groups;
  Problem problem;
  problem.start = (long long)view * rows * dim;
  problem.order = order ? order + (long long)view * dim + group * size : order;
  problem.first = group * size;
  problem.rows = rows, problem.dim = dim, problem.size = size, problem.ld = (size + 1) / 2 * 2 + 1;
  return problem;
}

__device__ inline Shared shared_of(float* pool, int size) {
  Shared shared;
  shared.channels = (int*)pool;
  shared.mean = pool + size;
  shared.scratch = pool + 2 * size;
  shared.work = pool + 2 * size + THREADS;
  return shared;
}

__device__ inline void load_channels(const Problem& problem, const Shared& shared) {
  for (int k = threadIdx.x; k < problem.size; k += THREADS) {
    long long channel = problem.order ? problem.order[k] : problem.first + k;
    if (channel < 0 || channel >= problem.dim) trap();
    shared.channels[k] = (int)channel;
  }
  __syncthreads();
}

// --- rows ---

// How the threads share a product that sums over rows: `lanes` x `lanes` threads hold the result's tiles, and as many
// copies of them as there are threads for take turns with the rows.
struct RowLayout {
  int lanes, copies, copy, across, down;
  int stage;  // rows in shared memory at a time
};

__device__ inline RowLayout row_layout(int size) {
  RowLayout layout;
  layout.lanes = (size + ROW_TILE - 1) / ROW_TILE;
  layout.copies = min(THREADS / (layout.lanes * layout.lanes), MAX_COPIES);
  layout.copy = threadIdx.x / (layout.lanes * layout.lanes);
  layout.across = threadIdx.x % layout.lanes;
  layout.down = threadIdx.x / layout.lanes % layout.lanes;
  layout.stage = THREADS / layout.lanes * ROWS_EACH;
  return layout;
}

// tile[r][k] = x[row + r][channel k] - shift[k], and zero for `count` <= r < `stage`. Loads are issued BATCH at a time,
// so that a thread waits for memory once a batch.
__device__ inline void stage_rows(float* tile, const Element* x, const float* shift, const Problem& problem,
                                  const Shared& shared, int row, int count, int stage) {
  const int size = problem.size, r_step = THREADS / size, k_step = THREADS % size;
  const Element* rows = x + problem.start + (long long)row * problem.dim;
  int r = threadIdx.x / size, k = threadIdx.x % size;
  while (r < stage) {
    float value[BATCH];
    int place[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      value[b] = 0.0f;
      place[b] = r < stage ? r * problem.ld + k : -1;
      if (r < count) {
        value[b] = load(rows + (long long)r * problem.dim + shared.channels[k]) - (shift ? shift[k] : 0.0f);
      }
      r += r_step, k += k_step;
      if (k >= size) k -= size, r += 1;
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      if (place[b] >= 0) tile[place[b]] = value[b];
    }
  }
}

// Sums over the rows of x - pilot, for every channel, into shared `sums` (size), channel k by thread k; pilot may be null.
__device__ inline void column_sums(float* sums, const Element* x, const float* pilot, const Problem& problem,
                                   const Shared& shared, int begin, int end) {
  int size = problem.size;
  int copies = THREADS / size, copy = threadIdx.x / size, k = threadIdx.x % size;
  if (copy < copies) {
    float shift = pilot ? pilot[k] : 0.0f;
    const Element* column = x + problem.start + shared.channels[k];
    float sum = 0.0f;
#pragma unroll 8
    for (int row = begin + copy; row < end; row += copies) sum += load(column + (long long)row * problem.dim) - shift;
    shared.scratch[threadIdx.x] = sum;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < size; c += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < copies; ++s) sum += shared.scratch[s * size + c];
    sums[c] = sum;
  }
}

// out = sum over rows begin..end of (x - x_shift)^T (z - z_shift); tiles of the rows in `x_tile` and `z_tile`, which
// are the same when z is x.
__device__ inline void row_products(float* out, float* x_tile, float* z_tile, const Element* x, const Element* z,
                                    const float* x_shift, const float* z_shift, const Problem& problem,
                                    const Shared& shared, int begin, int end) {
  const RowLayout layout = row_layout(problem.size);
  const int ld = problem.ld, last = problem.size - 1;
  const bool busy = layout.copy < layout.copies;
  int row[ROW_TILE], column[ROW_TILE];
  float sum[ROW_TILE][ROW_TILE];
#pragma unroll
  for (int u = 0; u < ROW_TILE; ++u) {
    row[u] = min(layout.down + layout.lanes * u, last);
    column[u] = min(layout.across + layout.lanes * u, last);
#pragma unroll
    for (int w = 0; w < ROW_TILE; ++w) sum[u][w] = 0.0f;
  }
  for (int top = begin; top < end; top += layout.stage) {
    int count = min(layout.stage, end - top);
    stage_rows(x_tile, x, x_shift, problem, shared, top, count, layout.stage);
    if (z_tile != x_tile) stage_rows(z_tile, z, z_shift, problem, shared, top, count, layout.stage);
    __syncthreads();
    if (busy) {
      for (int r = layout.copy; r < count; r += layout.copies) {
        float a[ROW_TILE], b[ROW_TILE];
#pragma unroll
        for (int u = 0; u < ROW_TILE; ++u) {
          a[u] = x_tile[r * ld + row[u]];
          b[u] = z_tile[r * ld + column[u]];
        }
#pragma unroll
        for (int u = 0; u < ROW_TILE; ++u) {
#pragma unroll
          for (int w = 0; w < ROW_TILE; ++w) sum[u][w] = fmaf(a[u], b[w], sum[u][w]);
        }
      }
    }
    __syncthreads();
  }
  for (int turn = 0; turn < layout.copies; ++turn) {  // the copies add up in a fixed order
    if (layout.copy == turn) {
#pragma unroll
      for (int u = 0; u < ROW_TILE; ++u) {
#pragma unroll
        for (int w = 0; w < ROW_TILE; ++w) {
          int i = layout.down + layout.lanes * u, j = layout.across + layout.lanes * w;
          if (i <= last && j <= last) out[i * ld + j] = turn ? out[i * ld + j] + sum[u][w] : sum[u][w];
        }
      }
    }
    __syncthreads();
  }
}

// out[row][channel] = a_tile[row] a_matrix + b_tile[row] b_matrix, for the staged rows; without b_tile only the first.
__device__ inline void whiten_rows(Element* out, const float* a_tile, const float* a_matrix, const float* b_tile,
                                   const float* b_matrix, const Problem& problem, const Shared& shared, int row,
                                   int count) {
  const RowLayout layout = row_layout(problem.size);
  const int ld = problem.ld, last = problem.size - 1;
  const int workers = THREADS / layout.lanes, worker = threadIdx.x / layout.lanes;
  if (worker >= workers) return;
  int column[ROW_TILE];
  float sum[ROWS_EACH][ROW_TILE];
#pragma unroll
  for (int w = 0; w < ROW_TILE; ++w) {
    column[w] = min(layout.across + layout.lanes * w, last);
#pragma unroll
    for (int u = 0; u < ROWS_EACH; ++u) sum[u][w] = 0.0f;
  }
  for (int pass = 0; pass < (b_tile ? 2 : 1); ++pass) {
    const float* tile = pass ? b_tile : a_tile;
    const float* matrix = pass ? b_matrix : a_matrix;
    for (int k = 0; k <= last; ++k) {
      float a[ROWS_EACH], b[ROW_TILE];
#pragma unroll
      for (int u = 0; u < ROWS_EACH; ++u) a[u] = tile[(worker + workers * u) * ld + k];
#pragma unroll
      for (int w = 0; w < ROW_TILE; ++w) b[w] = matrix[k * ld + column[w]];
#pragma unroll
      for (int u = 0; u < ROWS_EACH; ++u) {
#pragma unroll
        for (int w = 0; w < ROW_TILE; ++w) sum[u][w] = fmaf(a[u], b[w], sum[u][w]);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < ROWS_EACH; ++u) {
    int r = worker + workers * u;
#pragma unroll
    for (int w = 0; w < ROW_TILE; ++w) {
      int j = layout.across + layout.lanes * w;
      if (r < count && j <= last) {
        store(out + problem.start + (long long)(row + r) * problem.dim + shared.channels[j], sum[u][w]);
      }
    }
  }
}

// --- matrices in shared memory ---

// How the threads share a (size, size) matrix for `multiply`.
struct MatrixLayout {
  int lanes, down, across;
  bool busy;
  int row[TILE], column[TILE];  // clamped: entries beyond the matrix repeat its last
};

__device__ inline MatrixLayout matrix_layout(int size) {
  MatrixLayout layout;
  layout.lanes = (size + TILE - 1) / TILE;
  layout.down = threadIdx.x / layout.lanes;
  layout.across = threadIdx.x % layout.lanes;
  layout.busy = layout.down < layout.lanes;
#pragma unroll
  for (int u = 0; u < TILE; ++u) {
    layout.row[u] = min(layout.down + layout.lanes * u, size - 1);
    layout.column[u] = min(layout.across + layout.lanes * u, size - 1);
  }
  return layout;
}

struct Tile {
  float entry[TILE][TILE];
};

__device__ inline Tile zero_tile() {
  Tile tile;
#pragma unroll
  for (int u = 0; u < TILE; ++u) {
#pragma unroll
    for (int w = 0; w < TILE; ++w) tile.entry[u][w] = 0.0f;
  }
  return tile;
}

// tile += scale * a b. Entry (i, k) of a is a[i * a_row + k * a_column], so that a transpose costs nothing; b likewise.
__device__ inline void multiply(Tile& tile, float scale, const float* a, int a_row, int a_column, const float* b,
                                int b_row, int b_column, const MatrixLayout& layout, int size) {
  if (!layout.busy) return;
  for (int k = 0; k < size; ++k) {
    float left[TILE], right[TILE];
#pragma unroll
    for (int u = 0; u < TILE; ++u) {
      left[u] = scale * a[layout.row[u] * a_row + k * a_column];
      right[u] = b[k * b_row + layout.column[u] * b_column];
    }
#pragma unroll
    for (int u = 0; u < TILE; ++u) {
#pragma unroll
      for (int w = 0; w < TILE; ++w) tile.entry[u][w] = fmaf(left[u], right[w], tile.entry[u][w]);
    }
  }
}

// out = diagonal * I + tile
__device__ inline void put_tile(float* out, const Tile& tile, float diagonal, const MatrixLayout& layout, int size,
                                int ld) {
  if (!layout.busy) return;
#pragma unroll
  for (int u = 0; u < TILE; ++u) {
#pragma unroll
    for (int w = 0; w < TILE; ++w) {
      int i = layout.down + layout.lanes * u, j = layout.across + layout.lanes * w;
      if (i < size && j < size) out[i * ld + j] = tile.entry[u][w] + (i == j ? diagonal : 0.0f);
    }
  }
}

__device__ inline void copy_in(float* matrix, const float* global, int size, int ld) {
  for (int e = threadIdx.x; e < size * size; e += THREADS) matrix[e / size * ld + e % size] = global[e];
}

__device__ inline void copy_out(float* global, const float* matrix, float scale, int size, int ld) {
  for (int e = threadIdx.x; e < size * size; e += THREADS) global[e] = scale * matrix[e / size * ld + e % size];
}

__device__ inline float trace(const float* matrix, const Shared& shared, int size, int ld) {
  return block_sum<THREADS>(threadIdx.x < size ? matrix[threadIdx.x * ld + threadIdx.x] : 0.0f, shared.scratch);
}

// --- the root ---

__device__ inline float ridge_of(float trace, float eps, int relative, int size) {
  return relative ? fmaxf(eps * trace / size, 1e-12f) : eps;  // a constant group stays invertible
}

#if METHOD == 0

// Rotates the symmetric a (even, even) to its eigenvalues on the diagonal; row k of `vectors` becomes the k-th
// eigenvector. In every step the players of a tournament meet in pairs, and each pair's rotation zeroes its entry.
__device__ inline void jacobi(float* a, float* vectors, float* rotations, float floor, int even, int ld) {
  const int pairs = even / 2;
  float* cosine = rotations;
  float* sine = rotations + pairs;
  float* tangent = rotations + 2 * pairs;
  int* first = (int*)(rotations + 3 * pairs);
  int* second = first + pairs;
  for (int sweep = 0; sweep < MAX_SWEEPS; ++sweep) {
    int rotated = 0;
    for (int step = 0; step < even - 1; ++step) {
      int turned = 0;
      if (threadIdx.x < pairs) {
        int t = threadIdx.x;
        int p = t ? (step + t) % (even - 1) : even - 1, q = (step - t + even - 1) % (even - 1);
        float app = a[p * ld + p], aqq = a[q * ld + q], apq = a[p * ld + q];
        float slope = 0.0f;
        // Written so that NaN rotates, and so spreads over the group instead of vanishing.
        if (!(fabsf(apq) <= 6e-8f * sqrtf(fabsf(app)) * sqrtf(fabsf(aqq)) + floor)) {
          float theta = 0.5f * (aqq - app) / apq;
          slope = copysignf(1.0f / (fabsf(theta) + sqrtf(fmaf(theta, theta, 1.0f))), theta);
          turned = 1;
        }
        float c = 1.0f / sqrtf(fmaf(slope, slope, 1.0f));
        cosine[t] = c, sine[t] = slope * c, tangent[t] = slope, first[t] = p, second[t] = q;
      }
      turned = __syncthreads_or(turned);
      if (!turned) continue;  // the same for all threads
      rotated = 1;
      for (int e = threadIdx.x; e < pairs * (pairs / 2 + 1); e += THREADS) {
        // Every unordered couple of pairs once: the 2 x 2 block where the rows of one meet the columns of the other.
        int i = e % pairs, gap = e / pairs, j = (i + gap) % pairs;
        if (2 * gap == pairs && i >= gap) continue;
        int p = first[i], q = second[i], r = first[j], s = second[j];
        float pr = a[p * ld + r], ps = a[p * ld + s], qr = a[q * ld + r], qs = a[q * ld + s];
        if (gap == 0) {
          pr = fmaf(-tangent[i], ps, pr), qs = fmaf(tangent[i], ps, qs);
          if (tangent[i] != 0.0f) ps = qr = 0.0f;
        } else {
          float c = cosine[i], n = sine[i];
          float left_pr = c * pr - n * qr, left_ps = c * ps - n * qs;
          float left_qr = n * pr + c * qr, left_qs = n * ps + c * qs;
          c = cosine[j], n = sine[j];
          pr = c * left_pr - n * left_ps, ps = n * left_pr + c * left_ps;
          qr = c * left_qr - n * left_qs, qs = n * left_qr + c * left_qs;
        }
        a[p * ld + r] = pr, a[r * ld + p] = pr, a[p * ld + s] = ps, a[s * ld + p] = ps;
        a[q * ld + r] = qr, a[r * ld + q] = qr, a[q * ld + s] = qs, a[s * ld + q] = qs;
      }
      for (int e = threadIdx.x; e < pairs * even; e += THREADS) {
        int i = e / even, k = e % even;
        float c = cosine[i], n = sine[i];
        float p = vectors[first[i] * ld + k], q = vectors[second[i] * ld + k];
        vectors[first[i] * ld + k] = c * p - n * q;
        vectors[second[i] * ld + k] = n * p + c * q;
      }
      __syncthreads();
    }
    if (!rotated) break;
  }
}

// An order of all floats, NaN included, for ranking.
__device__ inline unsigned sort_key(float value) {
  unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sigma in work[0] -> W to `w`, ascending eigenvalues to `lam`, and, unless that is null,
// their eigenvectors as rows to `saved`.
__device__ inline void root(float* w, float* lam, float* saved, float sigma_trace, const Shared& shared, int size,
                            int ld, int) {
  const int even = (size + 1) / 2 * 2;
  float* a = shared.work;
  float* vectors = a + even * ld;
  float* value = vectors + even * ld;  // (size) eigenvalues
  float* rotations = value + size;
  for (int e = threadIdx.x; e < even * even; e += THREADS) {
    int i = e / even, j = e % even;
    vectors[i * ld + j] = i == j ? 1.0f : 0.0f;
    if (i >= size || j >= size) a[i * ld + j] = 0.0f;  // an odd size gets a player that never rotates
  }
  __syncthreads();
  jacobi(a, vectors, rotations, 1e-9f * fabsf(sigma_trace) / size, even, ld);
  if (threadIdx.x < size) value[threadIdx.x] = a[threadIdx.x * ld + threadIdx.x];
  __syncthreads();
  float largest = value[0];
  for (int i = 1; i < size; ++i) largest = fmaxf(largest, value[i]);
  // Rounding can make an eigenvalue of a singular covariance negative: held at the precision of the largest.
  const float smallest = largest > 0.0f ? largest * 1.1920929e-7f : 1.0f;
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int k = e / size, i = e % size;
    a[k * ld + i] = vectors[k * ld + i] / sqrtf(fmaxf(value[k], smallest));
  }
  __syncthreads();
  const MatrixLayout layout = matrix_layout(size);
  Tile tile = zero_tile();
  multiply(tile, 1.0f, vectors, 1, ld, a, ld, 1, layout, size);
  if (threadIdx.x < size) {
    int rank = 0;
    unsigned key = sort_key(value[threadIdx.x]);
    for (int i = 0; i < size; ++i) {
      unsigned other = sort_key(value[i]);
      rank += other < key || (other == key && i < threadIdx.x);
    }
    lam[rank] = value[threadIdx.x];
    if (saved) {
      for (int i = 0; i < size; ++i) saved[rank * size + i] = vectors[threadIdx.x * ld + i];
    }
  }
  __syncthreads();
  put_tile(a, tile, 0.0f, layout, size, ld);
  __syncthreads();
  copy_out(w, a, 1.0f, size, ld);
}

// M in work[0] -> S = U (K o (U^T M U)) U^T there, K_ij = -1 / (r_i r_j (r_i + r_j))
__device__ inline void root_backward(const float*, const float* lam, const float* saved, float, float, const Shared& shared,
                                     const float*, int size, int ld, int) {
  float* m = shared.work;
  float* vectors = m + size * ld;
  float* other = vectors + size * ld;
  float* r = other + size * ld;  // (size) roots of the eigenvalues
  copy_in(vectors, saved, size, ld);
  const float smallest = lam[size - 1] > 0.0f ? lam[size - 1] * 1.1920929e-7f : 1.0f;
  if (threadIdx.x < size) r[threadIdx.x] = sqrtf(fmaxf(lam[threadIdx.x], smallest));
  __syncthreads();
  const MatrixLayout layout = matrix_layout(size);
  Tile tile = zero_tile();
  multiply(tile, 1.0f, vectors, ld, 1, m, ld, 1, layout, size);
  put_tile(other, tile, 0.0f, layout, size, ld);
  __syncthreads();
  tile = zero_tile();
  multiply(tile, 1.0f, other, ld, 1, vectors, 1, ld, layout, size);
#pragma unroll
  for (int u = 0; u < TILE; ++u) {
#pragma unroll
    for (int v = 0; v < TILE; ++v) {
      float a = r[layout.row[u]], b = r[layout.column[v]];
      tile.entry[u][v] *= -1.0f / (a * b * (a + b));
    }
  }
  put_tile(m, tile, 0.0f, layout, size, ld);
  __syncthreads();
  tile = zero_tile();
  multiply(tile, 1.0f, vectors, 1, ld, m, ld, 1, layout, size);
  put_tile(other, tile, 0.0f, layout, size, ld);
  __syncthreads();
  tile = zero_tile();
  multiply(tile, 1.0f, other, ld, 1, vectors, ld, 1, layout, size);
  put_tile(m, tile, 0.0f, layout, size, ld);
}

#else

// Sigma in work[0] -> W = P_T / sqrt(tau) to `w`, by R = 1.5 I - 0.5 P Y; Y <- Y R; P <- R P from Y_0 = Sigma / tau and
// P_0 = I. All Y_t and P_t go to `saved` (iterations, 2, size, size) unless that is null.
__device__ inline void root(float* w, float*, float* saved, float sigma_trace, const Shared& shared, int size, int ld,
                            int iterations) {
  float* y = shared.work;
  float* p = y + size * ld;
  float* r = p + size * ld;
  const float tau = fmaxf(sigma_trace, 1.17549435e-38f);  // a constant group whitens to zero, not to NaN
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int i = e / size, j = e % size;
    y[i * ld + j] /= tau;
    p[i * ld + j] = i == j ? 1.0f : 0.0f;
  }
  __syncthreads();
  const MatrixLayout layout = matrix_layout(size);
  for (int t = 0; t < iterations; ++t) {
    if (saved) {
      copy_out(saved + (2LL * t) * size * size, y, 1.0f, size, ld);
      copy_out(saved + (2LL * t + 1) * size * size, p, 1.0f, size, ld);
    }
    Tile tile = zero_tile();
    multiply(tile, -0.5f, p, ld, 1, y, ld, 1, layout, size);
    put_tile(r, tile, 1.5f, layout, size, ld);
    __syncthreads();
    Tile next_y = zero_tile(), next_p = zero_tile();
    if (t + 1 < iterations) multiply(next_y, 1.0f, y, ld, 1, r, ld, 1, layout, size);
    multiply(next_p, 1.0f, r, ld, 1, p, ld, 1, layout, size);
    __syncthreads();
    put_tile(y, next_y, 0.0f, layout, size, ld);
    put_tile(p, next_p, 0.0f, layout, size, ld);
    __syncthreads();
  }
  copy_out(w, p, 1.0f / sqrtf(tau), size, ld);
}

// M in work[0] -> S = dL/dSigma there: the iteration's own derivative, step by step backwards.
__device__ inline void root_backward(const float* w, const float*, const float* saved, float sigma_trace, float ridge,
                                     const Shared& shared, const float* covariance, int size, int ld,
                                     int iterations) {
  float* gp = shared.work;
  float* gy = gp + size * ld;
  float* gr = gy + size * ld;
  float* y = gr + size * ld;
  float* p = y + size * ld;
  float* r = p + size * ld;
  const float tau = fmaxf(sigma_trace, 1.17549435e-38f), scale = 1.0f / sqrtf(tau);
  float inner = 0.0f;  // <M, W>
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int i = e / size, j = e % size;
    inner = fmaf(gp[i * ld + j], w[e], inner);
    gp[i * ld + j] *= scale;
    gy[i * ld + j] = 0.0f;
  }
  float tau_gradient = -0.5f * block_sum<THREADS>(inner, shared.scratch) / tau;
  const MatrixLayout layout = matrix_layout(size);
  for (int t = iterations - 1; t >= 0; --t) {
    copy_in(y, saved + (2LL * t) * size * size, size, ld);
    copy_in(p, saved + (2LL * t + 1) * size * size, size, ld);
    __syncthreads();
    Tile tile = zero_tile();
    multiply(tile, -0.5f, p, ld, 1, y, ld, 1, layout, size);
    put_tile(r, tile, 1.5f, layout, size, ld);
    tile = zero_tile();
    multiply(tile, 1.0f, y, 1, ld, gy, ld, 1, layout, size);
    multiply(tile, 1.0f, gp, ld, 1, p, 1, ld, layout, size);
    put_tile(gr, tile, 0.0f, layout, size, ld);
    __syncthreads();
    Tile next_y = zero_tile(), next_p = zero_tile();
    multiply(next_y, 1.0f, gy, ld, 1, r, 1, ld, layout, size);
    multiply(next_y, -0.5f, p, 1, ld, gr, ld, 1, layout, size);
    multiply(next_p, 1.0f, r, 1, ld, gp, ld, 1, layout, size);
    multiply(next_p, -0.5f, gr, ld, 1, y, 1, ld, layout, size);
    __syncthreads();
    put_tile(gy, next_y, 0.0f, layout, size, ld);
    put_tile(gp, next_p, 0.0f, layout, size, ld);
  }
  __syncthreads();
  inner = 0.0f;  // <gy, Sigma>
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int i = e / size, j = e % size;
    inner = fmaf(gy[i * ld + j], covariance[e] + (i == j ? ridge : 0.0f), inner);
  }
  tau_gradient -= block_sum<THREADS>(inner, shared.scratch) / tau / tau;
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int i = e / size, j = e % size;
    gp[i * ld + j] = 0.5f * (gy[i * ld + j] + gy[j * ld + i]) / tau + (i == j ? tau_gradient : 0.0f);
  }
}

#endif

// --- phases ---
// Between them the slabs' shares lie in global memory: means or sums (P, slabs, size), products (P, slabs, size, size).

__device__ inline void stats_phase(const Element* x, float* slab_means, float* slab_products, const Problem& problem,
                                   const Shared& shared, int slab, int slabs, int slab_rows) {
  const int size = problem.size, begin = slab * slab_rows, end = min(problem.rows, begin + slab_rows);
  const long long place = (long long)blockIdx.x * slabs + slab;
  float* out = shared.work;
  float* tile = out + size * problem.ld;
  // Sums of differences from the slab's first row: a mean far from zero costs no digits.
  for (int k = threadIdx.x; k < size; k += THREADS) {
    tile[k] = load(x + problem.start + (long long)begin * problem.dim + shared.channels[k]);
  }
  __syncthreads();
  column_sums(shared.mean, x, tile, problem, shared, begin, end);
  for (int k = threadIdx.x; k < size; k += THREADS) {
    float mean = tile[k] + shared.mean[k] / (end - begin);
    shared.mean[k] = mean;
    slab_means[place * size + k] = mean;
  }
  __syncthreads();
  row_products(out, tile, tile, x, x, shared.mean, shared.mean, problem, shared, begin, end);
  copy_out(slab_products + place * size * size, out, 1.0f, size, problem.ld);
}

__device__ inline void root_phase(const float* slab_means, const float* slab_products, float* mean, float* covariance,
                                  float* w, float* lam, float* saved, const Problem& problem, const Shared& shared,
                                  int slabs, int slab_rows, float eps, int relative, int iterations) {
  const int size = problem.size, ld = problem.ld, rows = problem.rows;
  const long long p = blockIdx.x;
  slab_means += p * slabs * size, slab_products += p * slabs * size * size;
  for (int k = threadIdx.x; k < size; k += THREADS) {
    float sum = 0.0f;
    for (int s = 1; s < slabs; ++s) {
      int count = min(slab_rows, rows - s * slab_rows);
      sum += count * (slab_means[s * size + k] - slab_means[k]);
    }
    shared.mean[k] = slab_means[k] + sum / rows;
    mean[p * size + k] = shared.mean[k];
  }
  __syncthreads();
  float* sigma = shared.work;
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int i = e / size, j = e % size;
    float sum = 0.0f;
    for (int s = 0; s < slabs; ++s) {  // scatter about the mean of all = scatter about the slab's own + its offset's
      int count = min(slab_rows, rows - s * slab_rows);
      float from_i = slab_means[s * size + i] - shared.mean[i], from_j = slab_means[s * size + j] - shared.mean[j];
      sum += slab_products[(long long)s * size * size + e] + count * from_i * from_j;
    }
    sigma[i * ld + j] = sum / rows;
    covariance[p * size * size + e] = sum / rows;
  }
  __syncthreads();
  float sigma_trace = trace(sigma, shared, size, ld);
  const float ridge = ridge_of(sigma_trace, eps, relative, size);
  for (int k = threadIdx.x; k < size; k += THREADS) sigma[k * ld + k] += ridge;
  sigma_trace = trace(sigma, shared, size, ld);
  const long long kept = METHOD == 0 ? size * size : 2LL * iterations * size * size;
  root(w + p * size * size, lam ? lam + p * size : lam, saved ? saved + p * kept : saved, sigma_trace, shared, size, ld, iterations);
}

__device__ inline void apply_phase(const Element* x, const float* mean, const float* w, Element* y,
                                   const Problem& problem, const Shared& shared, int begin, int end) {
  const int size = problem.size, stage = row_layout(size).stage;
  float* matrix = shared.work;
  float* tile = matrix + size * problem.ld;
  copy_in(matrix, w + (long long)blockIdx.x * size * size, size, problem.ld);
  for (int k = threadIdx.x; k < size; k += THREADS) shared.mean[k] = mean[(long long)blockIdx.x * size + k];
  __syncthreads();
  for (int top = begin; top < end; top += stage) {
    int count = min(stage, end - top);
    stage_rows(tile, x, shared.mean, problem, shared, top, count, stage);
    __syncthreads();
    whiten_rows(y, tile, matrix, nullptr, nullptr, problem, shared, top, count);
    __syncthreads();
  }
}

__device__ inline void grad_stats_phase(const Element* x, const Element* grad, const float* mean, float* slab_sums,
                                        float* slab_products, const Problem& problem, const Shared& shared, int slab,
                                        int slabs, int slab_rows, int detached) {
  const int size = problem.size, begin = slab * slab_rows, end = min(problem.rows, begin + slab_rows);
  const long long place = (long long)blockIdx.x * slabs + slab;
  float* out = shared.work;
  float* x_tile = out + size * problem.ld;
  float* c_tile = x_tile + row_layout(size).stage * problem.ld;
  column_sums(x_tile, grad, nullptr, problem, shared, begin, end);
  for (int k = threadIdx.x; k < size; k += THREADS) {
    slab_sums[place * size + k] = x_tile[k];
    shared.mean[k] = mean[(long long)blockIdx.x * size + k];
  }
  if (detached) return;
  __syncthreads();
  row_products(out, x_tile, c_tile, x, grad, shared.mean, nullptr, problem, shared, begin, end);
  copy_out(slab_products + place * size * size, out, 1.0f, size, problem.ld);
}

__device__ inline void grad_root_phase(const float* slab_sums, const float* slab_products, const float* covariance,
                                       const float* w, const float* lam, const float* saved, float* grad_mean,
                                       float* grad_sigma, const Problem& problem, const Shared& shared, int slabs,
                                       float eps, int relative, int iterations, int detached) {
  const int size = problem.size, ld = problem.ld;
  const long long p = blockIdx.x;
  slab_sums += p * slabs * size;
  for (int k = threadIdx.x; k < size; k += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < slabs; ++s) sum += slab_sums[s * size + k];
    grad_mean[p * size + k] = sum / problem.rows;
  }
  if (detached) return;
  slab_products += p * slabs * size * size, covariance += p * size * size;
  float* m = shared.work;
  for (int e = threadIdx.x; e < size * size; e += THREADS) {
    int mirror = e % size * size + e / size;
    float sum = 0.0f;
    for (int s = 0; s < slabs; ++s) {
      const float* share = slab_products + (long long)s * size * size;
      sum += 0.5f * (share[e] + share[mirror]);
    }
    m[e / size * ld + e % size] = sum;
  }
  float diagonal = threadIdx.x < size ? covariance[threadIdx.x * size + threadIdx.x] : 0.0f;
  const float ridge = ridge_of(block_sum<THREADS>(diagonal, shared.scratch), eps, relative, size);
  diagonal += threadIdx.x < size ? ridge : 0.0f;
  const float sigma_trace = block_sum<THREADS>(diagonal, shared.scratch);
  const long long kept = METHOD == 0 ? size * size : 2LL * iterations * size * size;
  root_backward(w + p * size * size, lam ? lam + p * size : lam, saved + p * kept, sigma_trace, ridge, shared, covariance, size, ld,
                iterations);
  __syncthreads();
  copy_out(grad_sigma + p * size * size, m, 1.0f, size, ld);
}

__device__ inline void grad_apply_phase(const Element* x, const Element* grad, const float* mean, const float* w,
                                        const float* grad_mean, const float* grad_sigma, Element* dx,
                                        const Problem& problem, const Shared& shared, int begin, int end,
                                        int detached) {
  const int size = problem.size, ld = problem.ld, stage = row_layout(size).stage;
  const long long p = blockIdx.x;
  float* w_matrix = shared.work;
  float* s_matrix = w_matrix + size * ld;
  float* c_tile = s_matrix + size * ld;
  float* x_tile = c_tile + stage * ld;
  copy_in(w_matrix, w + p * size * size, size, ld);
  if (!detached) {
    const float scale = 2.0f / problem.rows;
    for (int e = threadIdx.x; e < size * size; e += THREADS) {
      s_matrix[e / size * ld + e % size] = scale * grad_sigma[p * size * size + e];
    }
  }
  for (int k = threadIdx.x; k < size; k += THREADS) {
    shared.mean[k] = mean[p * size + k];
    shared.scratch[k] = grad_mean[p * size + k];
  }
  __syncthreads();
  for (int top = begin; top < end; top += stage) {
    int count = min(stage, end - top);
    stage_rows(c_tile, grad, shared.scratch, problem, shared, top, count, stage);
    if (!detached) stage_rows(x_tile, x, shared.mean, problem, shared, top, count, stage);
    __syncthreads();
    whiten_rows(dx, c_tile, w_matrix, detached ? nullptr : x_tile, s_matrix, problem, shared, top, count);
    __syncthreads();
  }
}

// --- entry points ---
// All phases in one launch, slabs = 1, or one phase a launch.

enum { STATS = 1, ROOT = 2, APPLY = 4, ALL = 7 };

template <int phases>
__device__ inline void run_forward(float* pool, const Element* x, const long long* order, float* slab_means,
                                   float* slab_products, float* mean, float* covariance, float* w, float* lam,
                                   float* saved, Element* y, int rows, int dim, int size, int slabs, int slab_rows,
                                   float eps, int relative, int iterations) {
  const Problem problem = problem_of(order, rows, dim, size);
  const Shared shared = shared_of(pool, size);
  const int begin = blockIdx.y * slab_rows, end = min(rows, begin + slab_rows);
  load_channels(problem, shared);
  if (phases & STATS) stats_phase(x, slab_means, slab_products, problem, shared, blockIdx.y, slabs, slab_rows);
  if (phases == ALL) __syncthreads();
  if (phases & ROOT) {
    root_phase(slab_means, slab_products, mean, covariance, w, lam, saved, problem, shared, slabs, slab_rows, eps,
               relative, iterations);
  }
  if (phases == ALL) __syncthreads();
  if (phases & APPLY) apply_phase(x, mean, w, y, problem, shared, begin, end);
}

template <int phases>
__device__ inline void run_backward(float* pool, const Element* x, const Element* grad, const long long* order,
                                    const float* mean, const float* covariance, const float* w, const float* lam,
                                    const float* saved, float* slab_sums, float* slab_products, float* grad_mean,
                                    float* grad_sigma, Element* dx, int rows, int dim, int size, int slabs,
                                    int slab_rows, float eps, int relative, int iterations, int detached) {
  const Problem problem = problem_of(order, rows, dim, size);
  const Shared shared = shared_of(pool, size);
  const int begin = blockIdx.y * slab_rows, end = min(rows, begin + slab_rows);
  load_channels(problem, shared);
  if (phases & STATS) {
    grad_stats_phase(x, grad, mean, slab_sums, slab_products, problem, shared, blockIdx.y, slabs, slab_rows, detached);
  }
  if (phases == ALL) __syncthreads();
  if (phases & ROOT) {
    grad_root_phase(slab_sums, slab_products, covariance, w, lam, saved, grad_mean, grad_sigma, problem, shared, slabs,
                    eps, relative, iterations, detached);
  }
  if (phases == ALL) __syncthreads();
  if (phases & APPLY) {
    grad_apply_phase(x, grad, mean, w, grad_mean, grad_sigma, dx, problem, shared, begin, end, detached);
  }
}

#define FORWARD(name, phases)                                                                                         \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                      \
      const Element* __restrict__ x, const long long* __restrict__ order, float* slab_means, float* slab_products,    \
      float* mean, float* covariance, float* w, float* lam, float* saved, Element* y, int rows, int dim, int size,    \
      int slabs, int slab_rows, float eps, int relative, int iterations) {                                            \
    DYNAMIC_SHARED(float, pool);                                                                                      \
    run_forward<phases>(pool, x, order, slab_means, slab_products, mean, covariance, w, lam, saved, y, rows, dim,     \
                        size, slabs, slab_rows, eps, relative, iterations);                                           \
  }

#define BACKWARD(name, phases)                                                                                        \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                      \
      const Element* __restrict__ x, const Element* __restrict__ grad, const long long* __restrict__ order,           \
      const float* mean, const float* covariance, const float* w, const float* lam, const float* saved,               \
      float* slab_sums, float* slab_products, float* grad_mean, float* grad_sigma, Element* dx, int rows, int dim,    \
      int size, int slabs, int slab_rows, float eps, int relative, int iterations, int detached) {                    \
    DYNAMIC_SHARED(float, pool);                                                                                      \
    run_backward<phases>(pool, x, grad, order, mean, covariance, w, lam, saved, slab_sums, slab_products, grad_mean,  \
                         grad_sigma, dx, rows, dim, size, slabs, slab_rows, eps, relative, iterations, detached);     \
  }

#if SLABS == 0
FORWARD(forward, ALL)
BACKWARD(backward, ALL)
#else
FORWARD(forward_stats, STATS)
FORWARD(forward_root, ROOT)
FORWARD(forward_apply, APPLY)
BACKWARD(backward_stats, STATS)
BACKWARD(backward_root, ROOT)
BACKWARD(backward_apply, APPLY)
#endif
