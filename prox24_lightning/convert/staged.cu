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

constexpr int WARPS = WR * WK;
constexpr int X_BYTES = TOKENS * WK * 128;  // of a stage: 64 inputs of each warp along the sum
constexpr int W_BYTES = MT * 1280;          // of a stage and warp
constexpr int STAGE_BYTES = X_BYTES + WARPS * W_BYTES;

__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void copy8(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

__device__ __forceinline__ uint2 shared8(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
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

template <int BIT>
__device__ __forceinline__ void step(float (&acc)[NT][4], u32 upper, u32 lower, u32 places, const u32 (&b)[NT][2]) {
  u32 a0, a1, a2, a3;
  expand<BIT>(upper, places, a0, a2);
  expand<BIT + 4>(lower, places, a1, a3);
#pragma unroll
  for (int t = 0; t < NT; t++) multiply(acc[t], a0, a1, a2, a3, b[t][0], b[t][1]);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
#if CS > 1
__cluster_dims__(1, CS, 1)
#endif
few_tokens(const u16* __restrict__ x, const u16* __restrict__ packed, const u16* __restrict__ bias,
           u16* __restrict__ y, int tokens, int rows, int columns, int outputs) {
  extern __shared__ __align__(128) char memory[];
  const u32 shared = (u32)__cvta_generic_to_shared(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int wr = warp % WR, wk = warp / WR;
  const int row = min(blockIdx.x * ROWS + wr * MT * 16, rows - MT * 16);
  const int blocks = columns / 64, chunks = (blocks + WK - 1) / WK;
  const u16* values = packed + (size_t)(row + r) * (columns / 2) + c * 8;
  const u16* positions = packed + (size_t)rows * (columns / 2) + (c / 2) * 128 + r * 4;
  const u32 w_slot = shared + X_BYTES + warp * W_BYTES;

  // Stage `s` gets chunk `chunk`: the tokens' inputs for all warps, and each lane's own operands in a slot of its own.
  auto fetch = [&](int s, int chunk) {
    if (chunk < chunks) {
      const int base = s * STAGE_BYTES;
      for (int at = threadIdx.x; at < TOKENS * WK * 8; at += WARPS * 32) {
        const int part = at % (WK * 8), token = at / (WK * 8), block = chunk * WK + part / 8;
        // 16 bytes to the place where eight lanes of a later read meet no bank twice
        const u32 to = shared + base + ((part / 8) * TOKENS + token) * 128 + ((part % 8) ^ (token & 1)) * 16;
        if (block < blocks) copy16(to, x + (size_t)min(token, tokens - 1) * columns + block * 64 + part % 8 * 8);
      }
      const int block = chunk * WK + wk;
      if (block < blocks) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
          const u32 to = w_slot + base + i * 1280;
          const u16* v = values + (size_t)i * 16 * (columns / 2) + block * 32;
          const int tile = row / 16 + i;
          copy16(to + lane * 16, v);
          copy16(to + 512 + lane * 16, v + (size_t)8 * (columns / 2));
          copy8(to + 1024 + lane * 8, positions + (size_t)(tile / 4) * (columns / 32) * 128 + block * 256 + tile % 4 * 32);
        }
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  float acc[MT][NT][4] = {};
  const int first = blockIdx.y;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(s, first + s * CS);
  int stage = 0;
  for (int chunk = first; chunk < chunks; chunk += CS) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    fetch((stage + STAGES - 1) % STAGES, chunk + (STAGES - 1) * CS);
    if (chunk * WK + wk < blocks) {
      const u32 w = w_slot + stage * STAGE_BYTES;
      const u32 tokens_at = shared + stage * STAGE_BYTES + wk * TOKENS * 128 + r * 128;
      uint4 upper[MT], lower[MT];
      uint2 places[MT];
#pragma unroll
      for (int i = 0; i < MT; i++) {
        upper[i] = shared16(w + i * 1280 + lane * 16);
        lower[i] = shared16(w + i * 1280 + 512 + lane * 16);
        places[i] = shared8(w + i * 1280 + 1024 + lane * 8);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 b[2][NT][2];
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const uint4 v = shared16(tokens_at + t * 1024 + ((2 * c + half) ^ (r & 1)) * 16);
          b[0][t][0] = v.x, b[0][t][1] = v.y, b[1][t][0] = v.z, b[1][t][1] = v.w;
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
          const u32 both = half ? places[i].y : places[i].x;
          const u32 four = c & 1 ? both >> 5 : both << 3;
          step<0>(acc[i], half ? upper[i].z : upper[i].x, half ? lower[i].z : lower[i].x, four, b[0]);
          step<16>(acc[i], half ? upper[i].w : upper[i].y, half ? lower[i].w : lower[i].y, four, b[1]);
        }
      }
    }
    stage = (stage + 1) % STAGES;
  }
  asm volatile("cp.async.wait_all;");
  __syncthreads();

  float* partial = (float*)memory;  // [WK][ROWS][STRIDE]
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        partial[(wk * ROWS + (wr * MT + i) * 16 + r + k / 2 * 8) * STRIDE + t * 8 + c * 2 + k % 2] = acc[i][t][k];
  __syncthreads();
#if CS > 1
  for (int at = threadIdx.x; at < ROWS * TOKENS; at += WARPS * 32) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < WK; k++) sum += partial[(k * ROWS + at % ROWS) * STRIDE + at / ROWS];
    partial[at % ROWS * STRIDE + at / ROWS] = sum;
  }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  for (int at = threadIdx.x + blockIdx.y * WARPS * 32; at < ROWS * TOKENS; at += CS * WARPS * 32) {
    const int out = blockIdx.x * ROWS + at % ROWS, token = at / ROWS;
    if (out >= outputs || token >= tokens) continue;
    float sum = bias ? to_float(bias[out]) : 0.f;
#if CS > 1
    const u32 here = shared + (at % ROWS * STRIDE + token) * 4;
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
    for (int k = 0; k < WK; k++) sum += partial[(k * ROWS + at % ROWS) * STRIDE + token];
#endif
    y[(size_t)token * outputs + out] = to_half(sum);
  }
#if CS > 1
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
