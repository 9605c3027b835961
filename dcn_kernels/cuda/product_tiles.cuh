// Tiles in shared memory, and a block's product of two of them: sums += A B^T with A [BM][BK] and B [BN][BK].
//
// A tile's row is 128 bytes along the summed axis (64 halves, 32 floats, 16 doubles): eight pieces of 16 bytes, of which
// piece p stands at p ^ (row % 8). So eight rows of one piece (what a product reads) and eight pieces of one row (what
// a store or a copy writes) lie in all 32 banks once. Every dtype has the same bytes: a step is 32 of them, four steps
// a row, one mma deep.
//
// MATRIX_UNITS: 1 multiplies by mma (sm_80 and later; halves, and float32 as TF32), 0 by plain multiply-adds in acc_t.
// SPLIT (float32 on matrix units): a tile is two, the numbers rounded to TF32 and what they leave; three products.
// Needs scalar_t, acc_t, MATRIX_UNITS, SPLIT, BM, BN, WARPS_M, WARPS_N, and matrix_units.cuh before it.

#define ROW_BYTES 128
#define PIECES 8                                // of a row
#define EL (16 / int(sizeof(scalar_t)))         // numbers of a piece
#define BK (ROW_BYTES / int(sizeof(scalar_t)))  // numbers of a row
#define PARTS (SPLIT ? 2 : 1)                   // tiles of a matrix
#define THREADS (32 * WARPS_M * WARPS_N)
#define MT (BM / WARPS_M / 16)  // a warp's part of the sums is MT x NT times 16 x 8
#define NT (BN / WARPS_N / 8)
#define A_BYTES (BM * ROW_BYTES * PARTS)
#define B_BYTES (BN * ROW_BYTES * PARTS)
static_assert(BM % (WARPS_M * 16) == 0 && BN % (WARPS_N * 16) == 0, "whole fragments");
static_assert(!SPLIT || (MATRIX_UNITS && sizeof(scalar_t) == 4), "only float32 is split");

__device__ __forceinline__ int piece_at(int row, int piece) { return row * ROW_BYTES + ((piece ^ (row & 7)) << 4); }

// Starts the copy of a tile: row r of it is `count` numbers from source + r * stride, zeros beyond and where r >= rows.
// A thread's pieces are THREADS / 8 rows apart, a multiple of 8, so one address serves all of them.
template <int TILE_ROWS>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const scalar_t* source, index_t stride, int rows,
                                          int count) {
  static_assert(TILE_ROWS * PIECES % THREADS == 0 && THREADS % 64 == 0, "every thread copies as many pieces");
  const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
  const scalar_t* from = source + (row * stride + piece * EL);
  unsigned char* const to = tile + piece_at(row, piece);
  const index_t skip = stride * (THREADS / PIECES);
  const int last = piece * EL < count ? rows : 0;
#pragma unroll
  for (int i = 0; i < TILE_ROWS * PIECES / THREADS; i++)
    cp_async(to + i * (THREADS * 16), from + i * skip, row + i * (THREADS / PIECES) < last);
}

// A thread's sums: of[m][n][i] is the element row 16m + 8 (i / 2) + its row lane, column 8n + 2 its column lane + i % 2
// of the warp's part.
struct sums_t {
  acc_t of[MT][NT][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[m][n][i] = 0;
  }
  __device__ __forceinline__ void add(const sums_t& more) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[m][n][i] += more.of[m][n][i];
  }
};

__device__ __forceinline__ int row_lane() { return MATRIX_UNITS ? threadIdx.x % 32 / 4 : threadIdx.x % 8; }
__device__ __forceinline__ int column_lane() { return MATRIX_UNITS ? threadIdx.x % 4 : threadIdx.x % 32 / 8; }
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / WARPS_N * (MT * 16); }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % WARPS_N * (NT * 8); }

// Where this lane's rows of A and of B begin in their tiles, for step 0: step n is n << 5 away by exclusive or, 16 rows
// more are 16 rows of bytes away by addition.
struct lane_t {
  int a, b;
  int b_next;  // MATRIX_UNITS 0: of the next row of B
};

#if MATRIX_UNITS
// ldmatrix. A: lanes 0..15 name rows 0..15 and the step's first half, lanes 16..31 the second half. B: two fragments of
// 8 rows at once, r[0] and r[1] the first's halves, r[2] and r[3] the second's.
__device__ __forceinline__ lane_t lane_rows() {
  const int lane = threadIdx.x % 32;
  return {piece_at(warp_row() + lane % 16, lane / 16),
          piece_at(warp_column() + lane % 8 + lane / 16 * 8, lane / 8 % 2), 0};
}

// sums += A B^T over one step. With SPLIT the small products first.
__device__ __forceinline__ void multiply_step(sums_t& sums, const unsigned char* A, const unsigned char* B,
                                              const lane_t& at, int step) {
  const unsigned char* const a_row = A + (at.a ^ step << 5);
  const unsigned char* const b_row = B + (at.b ^ step << 5);
  unsigned a[PARTS][MT][4];
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int m = 0; m < MT; m++) ldmatrix<false>(a[part][m], a_row + (part * BM + m * 16) * ROW_BYTES);
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    unsigned b[PARTS][4];
#pragma unroll
    for (int part = 0; part < PARTS; part++) ldmatrix<false>(b[part], b_row + (part * BN + n * 8) * ROW_BYTES);
#pragma unroll
    for (int product = SPLIT ? 0 : 2; product < 3; product++) {
      const int low_a = product == 0, low_b = product == 1;  // low high, high low, high high
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const unsigned pair[2] = {b[low_b * (PARTS - 1)][2 * half], b[low_b * (PARTS - 1)][2 * half + 1]};
#pragma unroll
        for (int m = 0; m < MT; m++)
          mma(sums.of[m][n + half], a[low_a * (PARTS - 1)][m], pair, static_cast<const scalar_t*>(nullptr));
      }
    }
  }
}
#else
__device__ __forceinline__ lane_t lane_rows() {
  const int b = warp_column() + column_lane() * 2;
  return {piece_at(warp_row() + row_lane(), 0), piece_at(b, 0), piece_at(b + 1, 0)};
}

// sums += A B^T over one step: a piece's numbers four at a time (two doubles), from 2 MT rows of A and 2 NT of B.
// Eight lanes read eight rows of A, four groups of them four rows of B: no two of them from the same bank.
__device__ __forceinline__ void multiply_step(sums_t& sums, const unsigned char* A, const unsigned char* B,
                                              const lane_t& at, int step) {
  constexpr int AT_ONCE = EL < 4 ? EL : 4, BYTES = AT_ONCE * int(sizeof(scalar_t));
  using numbers_t = vec<scalar_t, AT_ONCE>;
#pragma unroll
  for (int byte = 0; byte < 32; byte += BYTES) {
    const int piece = (step << 5) + (byte & 16), rest = byte & 15;
    acc_t a[2 * MT][AT_ONCE];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
      const numbers_t row = shared_load<numbers_t>(A + ((at.a ^ piece) + i * 8 * ROW_BYTES + rest));
#pragma unroll
      for (int e = 0; e < AT_ONCE; e++) a[i][e] = acc_t(row.v[e]);
    }
#pragma unroll
    for (int n = 0; n < 2 * NT; n++) {
      const int b_row = (n % 2 ? at.b_next : at.b) ^ piece;
      const numbers_t row = shared_load<numbers_t>(B + (b_row + n / 2 * 8 * ROW_BYTES + rest));
#pragma unroll
      for (int e = 0; e < AT_ONCE; e++)
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) sums.of[i / 2][n / 2][i % 2 * 2 + n % 2] += a[i][e] * acc_t(row.v[e]);
    }
  }
}
#endif

// Calls f(row, column, value, next value) for every two neighbouring columns of this thread's sums.
template <typename F>
__device__ __forceinline__ void each_pair(const sums_t& sums, F f) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        f(warp_row() + m * 16 + i / 2 * 8 + row_lane(), warp_column() + n * 8 + column_lane() * 2, sums.of[m][n][i],
          sums.of[m][n][i + 1]);
}

// Calls f(row, column, value) for every sum of this thread.
template <typename F>
__device__ __forceinline__ void each_sum(const sums_t& sums, F f) {
  each_pair(sums, [&](int row, int column, acc_t value, acc_t next) {
    f(row, column, value);
    f(row, column + 1, next);
  });
}
