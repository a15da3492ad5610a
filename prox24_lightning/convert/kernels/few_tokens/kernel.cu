// y = x W^T + bias for a few tokens and a packed 2:4 weight, bound by reading the weight.
//
// Compiled at run time with these macros: FORM (of the weight, and of the inputs that are multiplied: 0 for 16 bits, 1 for
// float8_e4m3, 2 for int8), BF16 (0: float16, 1: bfloat16, of the result and of a weight in 16 bits), STAGED (1: the
// tokens pass through shared memory), MT (16-row tiles of a warp), NT (8-token tiles), WR and WK (warps of a block along
// the rows and along the sum), CS (blocks of a cluster along the sum), SPAN (neighbouring pieces of 64 words that a warp
// takes at a time), DEPTH (pieces that a warp has in flight), RESIDENT (blocks that a multiprocessor holds).
//
// All sizes along the inputs are in words of 16 bits: one input, or two of 8 bits. Then everything but the metadata has
// the same size and place in all forms. Inputs of 8 bits come from the kernel before (round_tokens) with a scale a token;
// that one waits for all before it, so the weight is read while it runs.
//
// The packed weight is read in the layout of cuSPARSELt: the values row by row, then the metadata in tiles of 64 rows by
// 32 words (see packed_buffer.py). Nothing is expanded: the sparse tensor cores (mma.sp, m16n8k32) take pairs of values
// and metadata as they are. A sum does not mind its order, so a lane's operands are chosen for wide loads. Of a block of
// 64 inputs, 16 groups, lane 4 r + c reads groups 4c to 4c + 3 of rows r and r + 8, and product t (0 or 1) takes
//   group 4c + 2t as the hardware's group c, and group 4c + 2t + 1 as its group c + 4.
// With that, lane 4 r + c finds the metadata that it supplies to product c / 2 in the two words of its own number.
// Of the tokens the hardware expects the two halves of a group in two neighbouring lanes: lane c gets half c % 2 of the
// groups of quads c / 2 and c / 2 + 2.
// In 8 bits (mma.sp, m16n8k64) a block has 32 groups, of half the bytes, and the same reads give each product the groups
// 8p + 4t and 8p + 4t + 1 of quads p as the hardware's groups 2p and 2p + 1, and the two behind them as its groups 8 + 2p
// and 9 + 2p. A lane supplies the metadata of row r + c % 2 * 8 and of the lower (c < 2) or upper eight of these groups: two
// bytes of word 2t + c / 2 of the 16 bytes of row r in each of the two tiles of a block.

typedef unsigned int u32;
typedef unsigned short u16;

#if FORM == 2
typedef int Sum;
#else
typedef float Sum;
#endif

constexpr int ROWS = WR * MT * 16;  // of a block
constexpr int TOKENS = NT * 8;
constexpr int WARPS = WR * WK;
constexpr int STRIDE = TOKENS + 1;  // of a row of partial sums in shared memory
constexpr int TILE = FORM ? 512 : 256;  // bytes of metadata of 64 rows and 32 words

__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

__device__ __forceinline__ u32 load_two_words_once(const void* address) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

__device__ __forceinline__ u32 load_word_once(const void* address) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(address));
  return v;
}

// Inputs that the kernel before writes while this one runs: a load as "nc" may be moved before the wait for it.
#if FORM
#define LOAD "ld.global"
#else
#define LOAD "ld.global.nc"
#endif

__device__ __forceinline__ uint4 load_often(const void* address) {
  uint4 v;
  asm volatile(LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// d += a b, where the lanes of pair SELECTOR of each four supply the metadata (16 bits), or all lanes (8 bits).
template <int SELECTOR>
__device__ __forceinline__ void multiply(Sum (&d)[4], const u32 (&a)[4], const uint4& b, u32 metadata) {
#if FORM == 2
#define PRODUCT "m16n8k64.row.col.s32.s8.s8.s32"
#define SUM "+r"
#elif FORM == 1
#define PRODUCT "m16n8k64.row.col.f32.e4m3.e4m3.f32"
#define SUM "+f"
#elif BF16
#define PRODUCT "m16n8k32.row.col.f32.bf16.bf16.f32"
#define SUM "+f"
#else
#define PRODUCT "m16n8k32.row.col.f32.f16.f16.f32"
#define SUM "+f"
#endif
  asm("mma.sp.sync.aligned." PRODUCT
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
               : SUM(d[0]), SUM(d[1]), SUM(d[2]), SUM(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(metadata),
                 "n"(FORM ? 0 : SELECTOR));
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

// A lane's share of the weight, 16 MT rows by 64 words.
struct Weight {
  uint4 upper[MT], lower[MT];  // of rows r and r + 8
#if FORM
  u32 words[MT][2][2];  // of the metadata as stored, for each product and tile: even bytes row r, odd ones row r + 8

  __device__ __forceinline__ u32 metadata(int i, int t) const {
    return __byte_perm(words[i][t][0], words[i][t][1], threadIdx.x % 2 ? 0x7531 : 0x6420);
  }
#else
  u32 words[MT];  // the metadata as stored: even nibbles row r, odd ones row r + 8

  // Even nibbles to the lower half, odd ones to the upper.
  __device__ __forceinline__ u32 metadata(int i) const {
    u32 w = words[i];
    u32 t = (w ^ (w >> 4)) & 0x00f000f0u;
    w ^= t ^ (t << 4);
    t = (w ^ (w >> 8)) & 0x0000ff00u;
    return w ^ t ^ (t << 8);
  }
#endif
};

// Where a lane reads. Steps are constants, so that they end up in the load instructions.
struct Source {
  const char *upper[MT], *lower[MT], *metadata;

  __device__ __forceinline__ Source(const u16* packed, int row, int rows, int columns, int lane, int block) {
    const u16* values = packed + (size_t)(row + lane / 4) * (columns / 2) + lane % 4 * 8 + (size_t)block * 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
      upper[i] = (const char*)(values + (size_t)i * 16 * (columns / 2));
      lower[i] = (const char*)(values + (size_t)(i * 16 + 8) * (columns / 2));
    }
    const char* tiles = (const char*)(packed + (size_t)rows * (columns / 2)) + (size_t)(row / 64) * (columns / 32) * TILE;
    metadata = tiles + row % 64 / 16 * (TILE / 4) + (size_t)block * (2 * TILE) + (FORM ? lane / 4 * 16 + lane / 2 % 2 * 4 : lane * 2);
  }

  __device__ __forceinline__ void load(Weight& w, int ahead) const {
#pragma unroll
    for (int i = 0; i < MT; i++) {
      w.upper[i] = load_once(upper[i] + ahead * 64);
      w.lower[i] = load_once(lower[i] + ahead * 64);
      const char* p = metadata + i * (TILE / 4) + ahead * (2 * TILE);
#if FORM
#pragma unroll
      for (int t = 0; t < 2; t++)
        w.words[i][t][0] = load_two_words_once(p + t * 8), w.words[i][t][1] = load_two_words_once(p + t * 8 + TILE);
#else
      w.words[i] = load_word_once(p) | load_word_once(p + TILE) << 16;
#endif
    }
  }

  __device__ __forceinline__ void advance(int by) {
#pragma unroll
    for (int i = 0; i < MT; i++) upper[i] += by * 64, lower[i] += by * 64;
    metadata += by * (2 * TILE);
  }
};

// The operands of the two products of 64 words, each in four registers in a row. `zero` is 0, which the compiler cannot
// know: without the exclusive or it would collect the registers anew for every tile of tokens.
struct Operands {
  u32 a[MT][2][4], metadata[MT][2];

  __device__ __forceinline__ Operands(const Weight& w, u32 zero) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
      a[i][0][0] = w.upper[i].x ^ zero, a[i][0][1] = w.lower[i].x ^ zero;
      a[i][0][2] = w.upper[i].y ^ zero, a[i][0][3] = w.lower[i].y ^ zero;
      a[i][1][0] = w.upper[i].z ^ zero, a[i][1][1] = w.lower[i].z ^ zero;
      a[i][1][2] = w.upper[i].w ^ zero, a[i][1][3] = w.lower[i].w ^ zero;
#if FORM
      metadata[i][0] = w.metadata(i, 0), metadata[i][1] = w.metadata(i, 1);
#else
      metadata[i][0] = metadata[i][1] = w.metadata(i);
#endif
    }
  }

  __device__ __forceinline__ void multiply_into(Sum (&acc)[MT][NT][4], int t, const uint4& first,
                                                const uint4& second) const {
#pragma unroll
    for (int i = 0; i < MT; i++) multiply<0>(acc[i][t], a[i][0], first, metadata[i][0]);
#pragma unroll
    for (int i = 0; i < MT; i++) multiply<1>(acc[i][t], a[i][1], second, metadata[i][1]);
  }
};

extern __shared__ __align__(128) char memory[];

// Wait for the kernel before, which rounds the tokens, and let the one behind start.
__device__ __forceinline__ void wait_for_inputs() {
#if FORM && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Add the warps' sums, then the blocks' of a cluster, and store.
__device__ __forceinline__ void finish(const Sum (&acc)[MT][NT][4], const float* row_scales, const float* token_scales,
                                       const u16* bias, u16* y, int tokens, int outputs) {
  const int warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int wr = warp % WR, wk = warp / WR;
  Sum* partial = (Sum*)memory;  // [WK][ROWS][STRIDE]
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
    Sum sum = 0;
#pragma unroll
    for (int k = 0; k < WK; k++) sum += partial[(k * ROWS + at % ROWS) * STRIDE + at / ROWS];
    partial[at % ROWS * STRIDE + at / ROWS] = sum;
  }
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const u32 shared = (u32)__cvta_generic_to_shared(memory);
#endif
  for (int at = threadIdx.x + blockIdx.y * WARPS * 32; at < ROWS * TOKENS; at += CS * WARPS * 32) {
    const int out = blockIdx.x * ROWS + at % ROWS, token = at / ROWS;
    if (out >= outputs || token >= tokens) continue;
    Sum sum = 0;
#if CS > 1
    const u32 here = shared + (at % ROWS * STRIDE + token) * 4;
#pragma unroll
    for (int k = 0; k < CS; k++) {
      u32 there, part;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(k));
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(part) : "r"(there));
#if FORM == 2
      sum += (int)part;
#else
      sum += __uint_as_float(part);
#endif
    }
#else
#pragma unroll
    for (int k = 0; k < WK; k++) sum += partial[(k * ROWS + at % ROWS) * STRIDE + token];
#endif
    float result = sum;
#if FORM
    float scale;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale) : "l"(token_scales + token));
    result *= row_scales[out] * scale;
#endif
    if (bias) result += to_float(bias[out]);
    y[(size_t)token * outputs + out] = to_half(result);
  }
#if CS > 1
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
#if CS > 1
__cluster_dims__(1, CS, 1)
#endif
few_tokens(const u16* __restrict__ x, const u16* __restrict__ packed, const float* __restrict__ row_scales,
           const float* __restrict__ token_scales, const u16* __restrict__ bias, u16* __restrict__ y, int tokens, int rows,
           int columns, int outputs) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int wr = warp % WR, wk = warp / WR;
  const int row = min((int)blockIdx.x * ROWS + wr * MT * 16, rows - MT * 16);  // rows too many are not stored
  const int blocks = columns / 64;
  x += (size_t)blockIdx.z * TOKENS * columns;
  y += (size_t)blockIdx.z * TOKENS * outputs;
  token_scales += blockIdx.z * TOKENS;
  tokens -= blockIdx.z * TOKENS;
  const u32 zero = (u32)columns >> 31;
  Sum acc[MT][NT][4] = {};
  Weight w[DEPTH];

#if STAGED
  // The threads copy the tokens' inputs of WK SPAN blocks to shared memory, sorted by the lane that will read them.
  constexpr int SPANS = WK * SPAN;
  constexpr int PARTS = TOKENS * SPANS * 4 / (WARPS * 32);  // of a thread: 16 bytes of quad p and 16 of quad p + 2
  constexpr int BUFFER = TOKENS * SPANS * 128;
  static_assert(PARTS > 0 && DEPTH % SPAN == 0, "too many threads, or too few pieces in flight");
  const int chunks = (blocks + SPANS - 1) / SPANS;
  uint4 x_next[PARTS][2];
  const char* from[PARTS];
  char* to[PARTS];
  const int part = threadIdx.x % 4, part_block = threadIdx.x / 4 % SPANS;  // all of these are powers of two
#pragma unroll
  for (int k = 0; k < PARTS; k++) {
    const int token = (threadIdx.x + k * WARPS * 32) / (SPANS * 4), p = part / 2, t = part % 2;
    from[k] = (const char*)(x + (size_t)min(token, tokens - 1) * columns) + (blockIdx.y * SPANS + part_block) * 128 + part * 16;
    to[k] = memory + ((part_block * NT + token / 8) * 2 + t) * 512 + (token % 8 * 4 + p * 2) * 16;
  }
  auto fetch = [&](int chunk) {
    if (chunk * SPANS + part_block < blocks) {
#pragma unroll
      for (int k = 0; k < PARTS; k++) x_next[k][0] = load_often(from[k]), x_next[k][1] = load_often(from[k] + 64);
    }
#pragma unroll
    for (int k = 0; k < PARTS; k++) from[k] += CS * SPANS * 128;
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const uint4 u = x_next[k][0], v = x_next[k][1];
      uint4* lanes = (uint4*)(to[k] + buffer * BUFFER);
      lanes[0] = make_uint4(u.x, v.x, u.z, v.z);  // first halves of the groups
      lanes[1] = make_uint4(u.y, v.y, u.w, v.w);
    }
  };
  constexpr int STEP = CS * SPANS;  // blocks from one of a warp's chunks to the next
  const int start = blockIdx.y * SPANS + wk * SPAN;
  Source source(packed, row, rows, columns, lane, start);
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (start + d / SPAN * STEP + d % SPAN < blocks) source.load(w[d], d / SPAN * STEP + d % SPAN);
  wait_for_inputs();
  fetch(blockIdx.y);
  store(0);
  fetch(blockIdx.y + CS);
  int buffer = 0;
  __syncthreads();
  for (int base = blockIdx.y; base < chunks; base += CS * (DEPTH / SPAN)) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int chunk = base + d / SPAN * CS;
      if (chunk >= chunks) break;
      const int block = chunk * SPANS + wk * SPAN + d % SPAN;
      if (block < blocks) {
        const uint4* mine = (const uint4*)(memory + buffer * BUFFER + (wk * SPAN + d % SPAN) * NT * 1024) + lane;
        const Operands operands(w[d], zero);
        constexpr int AHEAD = DEPTH / SPAN * STEP;
        Weight fresh = {};  // so that the registers of the old one are free
        if (block + AHEAD < blocks) source.load(fresh, d / SPAN * STEP + d % SPAN + AHEAD);
        w[d] = fresh;
#pragma unroll
        for (int t = 0; t < NT; t++) operands.multiply_into(acc, t, mine[t * 64], mine[t * 64 + 32]);
      }
      if (d % SPAN == SPAN - 1) {
        buffer ^= 1;
        if (chunk + CS < chunks) store(buffer);
        if (chunk + 2 * CS < chunks) fetch(chunk + 2 * CS);
        __syncthreads();
      }
    }
    source.advance(DEPTH / SPAN * STEP);
  }
#else
  constexpr int STEP = SPAN * CS * WK;
  uint4 own[DEPTH][NT][2];
  const int start = SPAN * (blockIdx.y * WK + wk);
  Source source(packed, row, rows, columns, lane, start);
  const char* mine[NT];
#pragma unroll
  for (int t = 0; t < NT; t++)  // what a token too many gives is not stored
    mine[t] = (const char*)(x + (size_t)min(t * 8 + r, tokens - 1) * columns + (c / 2 + c % 2 * 2) * 16 + start * 64);
  auto load_tokens = [&](int d, int ahead) {
#pragma unroll
    for (int t = 0; t < NT; t++) {
      own[d][t][0] = load_often(mine[t] + ahead * 128);
      own[d][t][1] = load_often(mine[t] + ahead * 128 + 16);
    }
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (start + d / SPAN * STEP + d % SPAN < blocks) source.load(w[d], d / SPAN * STEP + d % SPAN);
  wait_for_inputs();
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (start + d / SPAN * STEP + d % SPAN < blocks) load_tokens(d, d / SPAN * STEP + d % SPAN);
  for (int base = start; base < blocks; base += STEP * (DEPTH / SPAN)) {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int block = base + d / SPAN * STEP + d % SPAN;
      if (block < blocks) {
        const Operands operands(w[d], zero);
        uint4 b[NT][2];
#pragma unroll
        for (int t = 0; t < NT; t++) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
            // This lane holds both halves of two groups of its quad and exchanges one of each with its neighbour.
            const uint4 v = own[d][t][k];
            const u32 g0 = __shfl_xor_sync(~0u, c & 1 ? v.x : v.y, 1), g1 = __shfl_xor_sync(~0u, c & 1 ? v.z : v.w, 1);
            b[t][k] = c & 1 ? make_uint4(g0, v.y, g1, v.w) : make_uint4(v.x, g0, v.z, g1);
          }
        }
#pragma unroll
        for (int t = 0; t < NT; t++) operands.multiply_into(acc, t, b[t][0], b[t][1]);
      }
      constexpr int AHEAD = STEP * (DEPTH / SPAN);
      if (block + AHEAD < blocks) {
        source.load(w[d], d / SPAN * STEP + d % SPAN + AHEAD);
        load_tokens(d, d / SPAN * STEP + d % SPAN + AHEAD);
      }
    }
    source.advance(STEP * (DEPTH / SPAN));
#pragma unroll
    for (int t = 0; t < NT; t++) mine[t] += STEP * (DEPTH / SPAN) * 128;
  }
#endif
  finish(acc, row_scales, token_scales, bias, y, tokens, outputs);
}
