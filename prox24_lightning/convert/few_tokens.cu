// y = x W^T + bias for a few tokens and a packed 2:4 weight, bound by the reading of the weight.
//
// Compiled at run time with these macros: BF16 (0: float16, 1: bfloat16), MT (16-row tiles of a warp), NT (8-token
// tiles), WR and WK (warps of a block along the rows and along the sum), CS (blocks of a cluster along the sum).
//
// The packed weight is read where cuSPARSELt left it: the values row by row, then the positions in tiles of 64 rows and
// 32 inputs (see packed_layout.py). A lane of an m16n8k16 product wants, of rows r and r + 8, four inputs each; as the
// sum does not mind its order, these four are one group of the weight, and the lane's operands over four products are
// four neighbouring groups: 16 bytes of values a row, 8 bytes of positions for both rows. Each pair of values becomes
// two registers of the operand by a byte permutation that the positions select, zeros included.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int ROWS = WR * MT * 16;  // of a block
constexpr int TOKENS = NT * 8;
constexpr int STRIDE = TOKENS + 1;  // of a row of partial sums in shared memory

__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

__device__ __forceinline__ uint2 load_positions(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

__device__ __forceinline__ uint4 load_often(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// `places`: the group's four bits of positions begin at bit BIT + 3.
template <int BIT>
__device__ __forceinline__ void expand(u32 pair, u32 places, u32& low, u32& high) {
  u32 first = 0x54u << ((places >> BIT) & 0x18);         // bytes 4 4 of the selector become 1 0: the first value
  u32 second = 0x76u << ((places >> (BIT + 2)) & 0x18);  // and 3 2: the second
  u32 selector = 0x44444444u ^ first ^ second;           // 4: a zero
  low = __byte_perm(pair, 0, selector);
  high = __byte_perm(pair, 0, selector >> 16);
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float to_float(u16 v) {
  float f;
#if BF16
  f = __uint_as_float((u32)v << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
#endif
  return f;
}

__device__ __forceinline__ u16 to_half(float f) {
  u16 v;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// A block of 64 inputs: one warp's share of the weight and of the tokens.
struct Piece {
  uint4 upper[MT], lower[MT];  // four pairs of values of rows r and r + 8
  uint2 places[MT];
  uint4 x[NT][2];
};

struct Place {
  const u16* values;     // this lane's row, first input of the lane
  const u16* positions;
  const u16* x[NT];
  int columns;

  __device__ __forceinline__ void load(Piece& p, int block) const {
#pragma unroll
    for (int i = 0; i < MT; i++) {
      const u16* v = values + (size_t)i * 16 * (columns / 2) + block * 32;
      p.upper[i] = load_once(v);
      p.lower[i] = load_once(v + (size_t)8 * (columns / 2));
      p.places[i] = load_positions(positions + i * 32 + block * 256);
    }
#pragma unroll
    for (int t = 0; t < NT; t++) {
      p.x[t][0] = load_often(x[t] + block * 64);
      p.x[t][1] = load_often(x[t] + block * 64 + 8);
    }
  }
};

template <int BIT>
__device__ __forceinline__ void step(float (&acc)[MT][NT][4], int i, u32 upper, u32 lower, u32 places,
                                     const u32 (&b)[NT][2]) {
  u32 a0, a1, a2, a3;
  expand<BIT>(upper, places, a0, a2);
  expand<BIT + 4>(lower, places, a1, a3);
#pragma unroll
  for (int t = 0; t < NT; t++) multiply(acc[i][t], a0, a1, a2, a3, b[t][0], b[t][1]);
}

__device__ __forceinline__ void compute(float (&acc)[MT][NT][4], const Piece& p, bool odd) {
  u32 b[4][NT][2];
#pragma unroll
  for (int t = 0; t < NT; t++) {
    b[0][t][0] = p.x[t][0].x, b[0][t][1] = p.x[t][0].y;
    b[1][t][0] = p.x[t][0].z, b[1][t][1] = p.x[t][0].w;
    b[2][t][0] = p.x[t][1].x, b[2][t][1] = p.x[t][1].y;
    b[3][t][0] = p.x[t][1].z, b[3][t][1] = p.x[t][1].w;
  }
#pragma unroll
  for (int i = 0; i < MT; i++) {
    u32 first = odd ? p.places[i].x >> 5 : p.places[i].x << 3;
    u32 second = odd ? p.places[i].y >> 5 : p.places[i].y << 3;
    step<0>(acc, i, p.upper[i].x, p.lower[i].x, first, b[0]);
    step<16>(acc, i, p.upper[i].y, p.lower[i].y, first, b[1]);
    step<0>(acc, i, p.upper[i].z, p.lower[i].z, second, b[2]);
    step<16>(acc, i, p.upper[i].w, p.lower[i].w, second, b[3]);
  }
}

extern "C" __global__ void __launch_bounds__(WR * WK * 32)
#if CS > 1
__cluster_dims__(1, CS, 1)
#endif
few_tokens(const u16* __restrict__ x, const u16* __restrict__ packed, const u16* __restrict__ bias,
           u16* __restrict__ y, int tokens, int rows, int columns, int outputs) {
  __shared__ float partial[WK][ROWS][STRIDE];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int wr = warp % WR, wk = warp / WR;
  const int row = blockIdx.x * ROWS + wr * MT * 16;
  float acc[MT][NT][4] = {};
  if (row < rows) {
    Place place;
    place.columns = columns;
    place.values = packed + (size_t)(row + r) * (columns / 2) + c * 8;
    place.positions = packed + (size_t)rows * (columns / 2) + (size_t)(row / 64) * (columns / 32) * 128 +
                      (c / 2) * 128 + (row % 64) / 16 * 32 + r * 4;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      int token = min(t * 8 + r, tokens - 1);  // what a token too many gives is not stored
      place.x[t] = x + (size_t)token * columns + c * 16;
    }
    // A warp takes two neighbouring blocks at a time, whole lines of 128 bytes, and has the next two under way.
    const int blocks = columns / 64, stride = 2 * WK * CS;
    int block = 2 * (blockIdx.y * WK + wk);
    Piece now[2], next[2];
    if (block < blocks) place.load(now[0], block);
    if (block + 1 < blocks) place.load(now[1], block + 1);
    for (; block < blocks; block += stride) {
      if (block + stride < blocks) place.load(next[0], block + stride);
      if (block + stride + 1 < blocks) place.load(next[1], block + stride + 1);
      compute(acc, now[0], c & 1);
      if (block + 1 < blocks) compute(acc, now[1], c & 1);
      now[0] = next[0];
      now[1] = next[1];
    }
  }
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        partial[wk][(wr * MT + i) * 16 + r + (k / 2) * 8][t * 8 + c * 2 + k % 2] = acc[i][t][k];
  __syncthreads();
#if CS > 1
  for (int at = threadIdx.x; at < ROWS * TOKENS; at += WR * WK * 32) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < WK; k++) sum += partial[k][at % ROWS][at / ROWS];
    partial[0][at % ROWS][at / ROWS] = sum;
  }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  for (int at = threadIdx.x + blockIdx.y * WR * WK * 32; at < ROWS * TOKENS; at += CS * WR * WK * 32) {
    const int out = blockIdx.x * ROWS + at % ROWS, token = at / ROWS;
    if (out >= outputs || token >= tokens) continue;
    float sum = bias ? to_float(bias[out]) : 0.f;
#if CS > 1
    u32 here = (u32)__cvta_generic_to_shared(&partial[0][at % ROWS][token]);
#pragma unroll
    for (int k = 0; k < CS; k++) {
      u32 there;
      float part;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(k));
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(part) : "r"(there));
      sum += part;
    }
#else
#pragma unroll
    for (int k = 0; k < WK; k++) sum += partial[k][at % ROWS][token];
#endif
    y[(size_t)token * outputs + out] = to_half(sum);
  }
#if CS > 1
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
