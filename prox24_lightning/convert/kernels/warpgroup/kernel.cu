// y = x W^T + bias for one to some hundreds of tokens and a packed 2:4 weight, on Hopper's sparse tensor cores.
//
// Compiled at run time with these macros: FORM (of the weight, and of the inputs that are multiplied: 0 for 16 bits, 1 for
// float8_e4m3, 2 for int8), BF16 (0: float16, 1: bfloat16, of the result and of a weight in 16 bits), TOKENS (of a block),
// GROUPS (warpgroups of a block that multiply, 64 rows of the weight each), CR and CS (blocks of a cluster along the rows
// and along the sum), STAGES (pieces of 128 words of inputs in shared memory), ONE (1: there is one token, and each block
// rounds it). After the constants stands `multiply`, the instruction wgmma.mma_async.sp.m64nTOKENSk32 (k64) with all its
// registers by name, which kernel.py generates.
//
// All sizes along the inputs are in words of 16 bits: one input, or two of 8 bits. Then everything but the metadata has
// the same size and place in all forms. Inputs of 8 bits come from the kernel before (round_tokens) with a scale a token, or
// with ONE from the block itself: its warpgroups read the whole token and keep what the block multiplies, behind the stages.
//
// The packed weight is read in the layout of cuSPARSELt: the values row by row, then the metadata in tiles of 64 rows by
// 32 words (see packed_buffer.py). One warp has the copy engine fill the stages: the values of 64 GROUPS rows, the inputs
// of all tokens (each block of a cluster row loads its share and multicasts it), and the metadata. A tile of
// metadata is what four warps need for one product: warp w has the 64 bytes from 64 w on, and of these the eight bytes
// of row r hold group c in byte 2c and group 4 + c in byte 2c + 1, row r in the lower four bits and row r + 8 in the upper.
// In 8 bits warp w has the 128 bytes from 128 w on, and of these the 16 bytes of row r are four words: word i holds groups
// 2i and 2i + 1 of row r, of row r + 8, and groups 8 + 2i and 9 + 2i of row r and of row r + 8, a byte each.
//
// The kernel may start while the one before it ends, and waits before it reads or writes memory; but in 8 bits it reads the
// weight at once, as round_tokens/kernel.cu says.

constexpr int ROWS = GROUPS * 64;
constexpr int TILE = FORM ? 512 : 256;  // bytes of metadata of 64 rows and 32 words
constexpr int WORDS = FORM ? 4 : 2;     // of metadata that a lane supplies to the four products of a stage
constexpr int THREADS = GROUPS * 128 + 32;
constexpr int VALUES = ROWS * 128, INPUTS = ONE ? 0 : TOKENS * 256, METADATA = GROUPS * 4 * TILE;  // bytes of a stage
constexpr int STAGE = VALUES + INPUTS + METADATA;
constexpr int SHARE = TOKENS / CR;
constexpr int STRIDE = ROWS + 4;  // of a token of partial sums in shared memory
constexpr int SUMS = TOKENS * STRIDE * 4;
constexpr int BARRIERS = STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS;  // where they lie: other blocks reach them late
constexpr int ROW_SCALES = BARRIERS + STAGES * 16, TOKEN_SCALES = ROW_SCALES + ROWS * 4;  // in 8 bits
constexpr int LARGEST_OF_WARPS = TOKEN_SCALES + TOKENS * 4;  // with ONE
constexpr int ROUNDED = BARRIERS + 1024;  // likewise, the block's part of the token, in boxes of eight tokens by 128 bytes
constexpr int HELD = 16 / GROUPS;         // pieces of eight inputs that a thread rounds

// MULTIPLY

extern __shared__ __align__(1024) char memory[];

// After this barrier all blocks of the cluster see what was written before it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ float4 read_sums(u32 address) {
  float4 v;
#if FORM == 2
  int a, b, c, d;
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
  v = make_float4((float)a, (float)b, (float)c, (float)d);
#else
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
#endif
  return v;
}

// Add the sums of the blocks of a cluster in their order, scale them, and store.
__device__ __forceinline__ void finish(const u16* bias, u16* y, int tokens, int outputs) {
  const int across = blockIdx.x % CR;
  const u32 partial = shared_address(memory);
  for (int at = threadIdx.x + blockIdx.y * THREADS; at < ROWS / 4 * tokens; at += CS * THREADS) {
    const int row = at % (ROWS / 4) * 4, token = at / (ROWS / 4);
    const int out = blockIdx.x * ROWS + row;
    if (out >= outputs) continue;
    float sum[4] = {};
    float4 part[CS];
#pragma unroll
    for (int k = 0; k < CS; k++) part[k] = read_sums(in_block(partial + (token * STRIDE + row) * 4, across + k * CR));
#pragma unroll
    for (int k = 0; k < CS; k++) {
      sum[0] += part[k].x, sum[1] += part[k].y, sum[2] += part[k].z, sum[3] += part[k].w;
    }
#if FORM
    const float4 of_rows = *(const float4*)(memory + ROW_SCALES + row * 4);
    const float scale = *(const float*)(memory + TOKEN_SCALES + token * 4);
    sum[0] *= of_rows.x * scale, sum[1] *= of_rows.y * scale, sum[2] *= of_rows.z * scale, sum[3] *= of_rows.w * scale;
#endif
    if (bias)
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (out + k < outputs) sum[k] += to_float(bias[out + k]);
    const uint2 halves = make_uint2(to_halves(sum[0], sum[1]), to_halves(sum[2], sum[3]));
    u16* to = y + (size_t)token * outputs + out;
    if (outputs % 4 == 0) {
      *(uint2*)to = halves;
    } else {
      to[0] = (u16)halves.x;
      if (out + 1 < outputs) to[1] = (u16)(halves.x >> 16);
      if (out + 2 < outputs) to[2] = (u16)halves.y;
      if (out + 3 < outputs) to[3] = (u16)(halves.y >> 16);
    }
  }
}

#if ONE
static_assert(TOKENS == 8 && CR == 1 && ROUNDED % 1024 == 0, "one box of tokens, which no block shares");

// Round the token x with all warpgroups, and keep `count` pieces of 256 inputs from `first` on. A token too many is what the
// memory happens to hold: its products are not stored.
__device__ __forceinline__ void round_token(const u16* x, float given, int width, int first, int count) {
  uint4 held[HELD];
  u32 most = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int eight = threadIdx.x + k * GROUPS * 128;
    held[k] = eight < width / 8 ? load_eight(x + eight * 8) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int k = 0; k < HELD; k++) most = larger(most, magnitude(held[k]));
  most = largest_in_warp(most);
  u32* largest = (u32*)(memory + LARGEST_OF_WARPS);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  asm volatile("bar.sync 1, %0;" :: "n"(GROUPS * 128) : "memory");
#pragma unroll
  for (int warp = 0; warp < GROUPS * 4; warp++) most = larger(most, largest[warp]);
  const float scale = token_scale(most, given), inverse = 1 / scale;
  if (threadIdx.x == 0) *(float*)(memory + TOKEN_SCALES) = scale;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int at = (threadIdx.x + k * GROUPS * 128) * 8 - first * 256;
    if (at >= 0 && at < count * 256) *(uint2*)(memory + ROUNDED + at / 128 * 1024 + at % 128) = round_eight(held[k], inverse);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, %0;" :: "n"(GROUPS * 128) : "memory");
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CR, CS, 1)
warpgroup(const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap inputs,
          const __grid_constant__ TensorMap metadata, const float* __restrict__ row_scales, const float* __restrict__ token_scales,
          const u16* bias, u16* __restrict__ y, const u16* x, const float* given, int tokens, int rows, int columns, int outputs,
          int width) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int pieces = (columns + 127) / 128;
  const int first = pieces * blockIdx.y / CS, count = pieces * (blockIdx.y + 1) / CS - first;
  const int groups = min(GROUPS, rows / 64 - (int)blockIdx.x * GROUPS);  // with rows at all
  const u32 stages = shared_address(memory), full = stages + BARRIERS, empty = full + STAGES * 8;
  if (threadIdx.x == 32) prefetch_map(&values), prefetch_map(&metadata), prefetch_map(&inputs);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + s * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + s * 8), "r"(GROUPS * 4 * CR) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if CR > 1
  cluster_barrier_relaxed();
#else
  __syncthreads();
#endif
  Sum acc[TOKENS / 2] = {};
  asm volatile("griddepcontrol.launch_dependents;");
#if FORM
  // The scales wait in shared memory: in the end nothing but the sums has to come from elsewhere.
  const int row = blockIdx.x * ROWS + threadIdx.x;
  if (threadIdx.x < ROWS && row < rows)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"(shared_address(memory + ROW_SCALES) + threadIdx.x * 4), "l"(row_scales + row) : "memory");
#endif
#if ONE
  if (group < GROUPS) {
    const float fixed = load_given(given);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    round_token(x, fixed, width, first, count);
  }
#endif
  if (group == GROUPS) {
    const int across = blockIdx.x % CR;
    auto load_weight = [&](int i) {
      const int s = i % STAGES, piece = first + i;
      if (i >= STAGES) wait(empty + s * 8, (i / STAGES - 1) & 1);
      const u32 to = stages + s * STAGE, barrier = full + s * 8;
      if (elected()) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "n"(STAGE) : "memory");
        copy_box(to, &values, piece * 64, blockIdx.x * ROWS, barrier);
        copy_box(to + VALUES + INPUTS, &metadata, piece * (TILE / 2), blockIdx.x * GROUPS, barrier);
      }
    };
    auto load_inputs = [&](int i) {
      const int column = (first + i) * 128, token = blockIdx.z * TOKENS + across * SHARE;
      const u32 to = stages + i % STAGES * STAGE + VALUES + across * (SHARE * 128), barrier = full + i % STAGES * 8;
      if (elected()) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#if CR > 1
          const u16 blocks = ((1 << CR) - 1) << (blockIdx.y * CR);
          copy_box_to(blocks, to + half * (TOKENS * 128), &inputs, column + half * 64, token, barrier);
#else
          copy_box(to + half * (TOKENS * 128), &inputs, column + half * 64, token, barrier);
#endif
        }
      }
    };
#if ONE
    for (int i = 0; i < count; i++) load_weight(i);
#else
    const int early = FORM ? min(STAGES, count) : 0;
    for (int i = 0; i < early; i++) load_weight(i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < early; i++) load_inputs(i);
    for (int i = early; i < count; i++) load_weight(i), load_inputs(i);
#endif
#if FORM && !ONE
    for (int t = lane; t < TOKENS && blockIdx.z * TOKENS + t < tokens; t += 32) {
      float scale;
      asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale) : "l"(token_scales + blockIdx.z * TOKENS + t));
      ((float*)(memory + TOKEN_SCALES))[t] = scale;
    }
#endif
    __syncwarp();
  } else if (count > 0) {
    const char* mine = memory + VALUES + INPUTS + group * 4 * TILE + warp % 4 * (TILE / 4);
    u32 where[WORDS], where_next[WORDS];
    auto read_metadata = [&](int i, u32 (&into)[WORDS]) {
      const char* tiles = mine + i % STAGES * STAGE;
#pragma unroll
      for (int k = 0; k < WORDS; k++) {
        const bool inside = group < groups && (k < WORDS / 2 || (first + i) * 128 + 64 < columns);
        into[k] = inside ? lane_metadata(tiles + k * (4 / WORDS) * TILE, lane) : ANY;
      }
    };
    wait(full, 0);
    read_metadata(0, where);
    for (int i = 0; i < count; i++) {
      const u32 stage = stages + i % STAGES * STAGE;
      const u64 a = descriptor<128>(stage + group * 8192);
      const u64 b = descriptor<128>(ONE ? stages + ROUNDED + i * (TOKENS * 256) : stage + VALUES);
      constexpr int HALF = TOKENS * 128 / 16;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      multiply<0>(acc, a, b, where[0]);
      multiply<FORM == 0>(acc, a + 2, b + 4, where[WORDS / 2 - 1]);
      multiply<0>(acc, a + 4, b + HALF, where[WORDS / 2]);
      multiply<FORM == 0>(acc, a + 6, b + HALF + 4, where[WORDS - 1]);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (i + 1 < count) {
        wait(full + (i + 1) % STAGES * 8, (i + 1) / STAGES & 1);
        read_metadata(i + 1, where_next);
      }
      // The products read their metadata while they run: the next ones need registers of their own.
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int k = 0; k < WORDS; k++) asm volatile("" : "+r"(where[k]));
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < CR; k++)
          asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];"
                       :: "r"(in_block(empty + i % STAGES * 8, blockIdx.y * CR + k)) : "memory");
      }
#pragma unroll
      for (int k = 0; k < WORDS; k++) where[k] = where_next[k];
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  if (group < GROUPS) {
    Sum* partial = (Sum*)memory + warp * 16 + lane / 4;  // [TOKENS][STRIDE]
#pragma unroll
    for (int k = 0; k < TOKENS / 2; k++)
      partial[(k / 4 * 8 + lane % 4 * 2 + k % 2) * STRIDE + k / 2 % 2 * 8] = acc[k];
  }
#if CS > 1
  cluster_barrier();
#else
  __syncthreads();
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int token = blockIdx.z * TOKENS;
  finish(bias, y + (size_t)token * outputs, min(TOKENS, tokens - token), outputs);
#if CR * CS > 1
  cluster_barrier_relaxed();  // a block's memory must live until all others have read it and written to it
#endif
}
