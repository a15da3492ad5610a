// y = x W^T + bias for many tokens and a packed 2:4 weight of 8 bits, on Hopper's sparse tensor cores.
//
// Compiled at run time with these macros: FORM (of weight and inputs: 1 for float8_e4m3, 2 for int8), BF16 (0: float16, 1:
// bfloat16, of the result), TOKENS (of a tile), GROUPS (warpgroups that multiply, 64 rows of the weight each), CR (blocks
// of a cluster, along the rows), STAGES (pieces of 128 inputs in shared memory), PANEL (tiles along the tokens
// that are taken side by side), BESIDE (1: warps of the blocks round the later tokens). After the constants stands `multiply`,
// the instruction wgmma.mma_async.sp.m64nTOKENSk64 with all its registers by name, which kernel.py generates.
//
// Each block stays and takes one tile of 64 GROUPS rows by TOKENS tokens after the other. One warp has the copy engine fill
// the stages: values, metadata, and the inputs, of which each block of a cluster loads its share and multicasts it. It
// runs ahead into the next tile while the warpgroups scale their sums, transpose them through shared memory and have them
// stored. The layout of the packed weight is described in rounded_buffer.py, and what a lane needs of the metadata in
// ../warpgroup/kernel.cu. The inputs come from the kernel before (round_tokens); the first pieces of the weight are loaded
// while it runs.
//
// BESIDE: the kernel before rounds the tokens of the first tiles only, `ready` of them. Three warps of each block round the
// others while the first ones are multiplied: a warp claims the next TOKENS_AT_ONCE by a counter, in order, and counts
// them as done for their tile; the loading warps wait for that count. No warp that has claimed tokens waits for anything,
// so that all is done in the end even if some blocks start after others have ended. The kernel before clears the counters.

constexpr int ROWS = GROUPS * 64;
constexpr int LOADER = GROUPS * 4;  // the warp that loads; the warps behind it round
constexpr int THREADS = GROUPS * 128 + 32 + BESIDE * 96;
constexpr int VALUES = ROWS * 64, INPUTS = TOKENS * 128, METADATA = GROUPS * 1024;  // bytes of a stage
constexpr int STAGE = VALUES + INPUTS + METADATA;
constexpr int SHARE = TOKENS / CR;
constexpr int CHUNK = 64;                     // tokens that a warpgroup stores at a time
constexpr int STORED = CHUNK * 128;           // bytes of these
constexpr int BUFFERS = 3;                    // of these that a warpgroup has
constexpr int STORES = STAGES * STAGE;
constexpr int SCALES = STORES + GROUPS * BUFFERS * STORED;
constexpr int BARRIERS = SCALES + GROUPS * TOKENS * 4;
constexpr int TOKENS_AT_ONCE = 2;             // that a warp rounds
constexpr int HELD = 16;                      // pieces of eight inputs that a lane keeps in registers while it rounds
static_assert(TOKENS % TOKENS_AT_ONCE == 0, "tokens that are claimed belong to one tile");

// MULTIPLY

extern __shared__ __align__(1024) char memory[];

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}

// Store the transposes of four matrices of eight rows by eight tokens; lane 8 i + t names the row of token t of matrix i.
__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

struct Tile {
  int row, token;  // the first ones of this block
};

__device__ __forceinline__ Tile tile_at(int at, int row_tiles, int token_tiles) {
  const int panel = at / (PANEL * row_tiles), within = at - panel * PANEL * row_tiles;
  const int width = min(PANEL, token_tiles - panel * PANEL);
  return {(within / width * CR + (int)blockIdx.x % CR) * ROWS, (panel * PANEL + within % width) * TOKENS};
}

// Round a token with a warp; its inputs are a multiple of eight.
__device__ __forceinline__ void round_token(const u16* token, u8* values, float* scale, float given, int inputs, int columns,
                                            int lane) {
  constexpr int BATCH = HELD * 32;
  uint4 held[HELD];
  auto load = [&](int batch) {
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const int piece = batch + k * 32 + lane;
      held[k] = piece < inputs / 8 ? load_eight(token + piece * 8) : make_uint4(0, 0, 0, 0);
    }
  };
  u32 most = 0;
  for (int batch = (columns / 8 - 1) / BATCH * BATCH; batch >= 0; batch -= BATCH) {  // the first one stays in registers
    load(batch);
#pragma unroll
    for (int k = 0; k < HELD; k++) most = larger(most, magnitude(held[k]));
  }
  const float found = token_scale(largest_in_warp(most), given), inverse = 1 / found;
  if (lane == 0) *scale = found;
  for (int batch = 0; batch < columns / 8; batch += BATCH) {
    if (batch > 0) load(batch);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const int piece = batch + k * 32 + lane;
      if (piece < columns / 8) ((uint2*)values)[piece] = round_eight(held[k], inverse);
    }
  }
}

// Wait until the other blocks have rounded a tile's tokens.
__device__ __forceinline__ void wait_for_tokens(const u32* done, u32 count) {
  for (;;) {
    u32 found;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(done) : "memory");
    if (found >= count) break;
    __nanosleep(100);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CR, 1, 1)
many_tokens(const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap inputs,
            const __grid_constant__ TensorMap metadata, const __grid_constant__ TensorMap results,
            const float* __restrict__ row_scales, const u16* __restrict__ bias, const u16* x, const float* given, u8* rounded,
            float* token_scales, u32* counters, int tokens, int rows, int columns, int outputs, int width, int ready) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int pieces = columns / 128;
  const int row_tiles = (rows + ROWS * CR - 1) / (ROWS * CR), token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const int tiles = row_tiles * token_tiles, first = blockIdx.x / CR, step = gridDim.x / CR;
  u32 *claims = counters, *done = counters + 1;  // of all blocks, and tokens of each tile
  const u32 stages = shared_address(memory), full = stages + BARRIERS, empty = full + STAGES * 8;
  if (threadIdx.x == 32) prefetch_map(&values), prefetch_map(&metadata), prefetch_map(&inputs), prefetch_map(&results);
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
  asm volatile("griddepcontrol.launch_dependents;");
  if (warp == LOADER) {
    const int rank = blockIdx.x % CR;
    auto load_weight = [&](int n, const Tile& tile, int piece) {
      const int s = n % STAGES;
      if (n >= STAGES) wait(empty + s * 8, (n / STAGES - 1) & 1);
      const u32 to = stages + s * STAGE, barrier = full + s * 8;
      if (elected()) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "n"(STAGE) : "memory");
        copy_box(to, &values, piece * 32, tile.row, barrier);
        copy_box(to + VALUES + INPUTS, &metadata, piece * 128, tile.row / 64, barrier);
      }
    };
    auto load_inputs = [&](int n, const Tile& tile, int piece) {
      const u32 to = stages + n % STAGES * STAGE + VALUES + rank * (SHARE * 128), barrier = full + n % STAGES * 8;
      if (elected()) {
#if CR > 1
        copy_box_to((1 << CR) - 1, to, &inputs, piece * 64, tile.token + rank * SHARE, barrier);
#else
        copy_box(to, &inputs, piece * 64, tile.token, barrier);
#endif
      }
    };
    const int early = first < tiles ? min(STAGES, pieces) : 0;
    if (early) {
      const Tile tile = tile_at(first, row_tiles, token_tiles);
      for (int i = 0; i < early; i++) load_weight(i, tile, i);
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int n = 0;
    for (int at = first; at < tiles; at += step) {
      const Tile tile = tile_at(at, row_tiles, token_tiles);
      for (int i = 0; i < pieces; i++, n++) {
        if (n >= early) load_weight(n, tile, i);
#if BESIDE
        if (i == 0 && tile.token >= ready) wait_for_tokens(done + tile.token / TOKENS, min(TOKENS, tokens - tile.token));
#endif
        load_inputs(n, tile, i);
      }
    }
    __syncwarp();
  } else if (warp > LOADER) {
    const float fixed = load_given(given);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    while (ready < tokens) {
      u32 claim;
      if (lane == 0) claim = atomicAdd(claims, 1);
      claim = __shfl_sync(~0u, claim, 0);
      const int begin = ready + claim * TOKENS_AT_ONCE, end = min(begin + TOKENS_AT_ONCE, tokens);
      if (begin >= tokens) break;
      for (int t = begin; t < end; t++)
        round_token(x + (size_t)t * width, rounded + (size_t)t * columns, token_scales + t, fixed, width, columns, lane);
      // The copy engine of any block reads what this lane has written.
      asm volatile("fence.proxy.async.global;" ::: "memory");
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      __syncwarp();
      if (lane == 0)
        asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(done + begin / TOKENS), "r"(end - begin) : "memory");
    }
  } else {
    const char* mine = memory + VALUES + INPUTS + group * 1024 + warp % 4 * 128;
    float* scales = (float*)(memory + SCALES) + group * TOKENS;
    const u32 stores = stages + STORES + group * (BUFFERS * STORED);
    // Of the tokens and rows of a chunk, this lane addresses one token and half of its warp's 16 rows: 16 bytes.
    const int token_in_chunk = lane / 16 * 8 + lane % 8;
    const u32 place = token_in_chunk * 128 + ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
    int n = 0;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int at = first; at < tiles; at += step) {
      const Tile tile = tile_at(at, row_tiles, token_tiles);
      const bool inside = tile.row + group * 64 < rows;
#if BESIDE
      wait(full + n % STAGES * 8, n / STAGES & 1);  // from here on the tile's tokens are rounded
#endif
      // The scales are on their way while the tile is multiplied.
      for (int t = threadIdx.x % 128; t < TOKENS; t += 128)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                     :: "r"(shared_address(scales + t)), "l"(token_scales + min(tile.token + t, tokens - 1)) : "memory");
      float of_row[2] = {};
      u16 added[2] = {};
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int row = tile.row + warp * 16 + lane / 4 + k * 8;
        if (inside) of_row[k] = row_scales[row];
        if (bias && row < outputs) added[k] = bias[row];
      }
      Sum acc[TOKENS / 2];
#pragma unroll
      for (int k = 0; k < TOKENS / 2; k++) acc[k] = 0;
      u32 even[2], odd[2] = {ANY, ANY};
      auto release = [&](int n) {
        if (lane == 0) {
#pragma unroll
          for (int k = 0; k < CR; k++)
            asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(in_block(empty + n % STAGES * 8, k)) : "memory");
        }
      };
      // The products read their metadata while they run: those of the next piece need registers of their own.
      auto piece = [&](int i, u32 (&where)[2], u32 (&before)[2]) {
        const int s = n % STAGES;
        wait(full + s * 8, n / STAGES & 1);
#pragma unroll
        for (int k = 0; k < 2; k++) where[k] = inside ? lane_metadata(mine + s * STAGE + k * 512, lane) : ANY;
        const u64 a = descriptor<64>(stages + s * STAGE + group * 4096), b = descriptor<128>(stages + s * STAGE + VALUES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply<0>(acc, a, b, where[0]);
        multiply<0>(acc, a + 2, b + 4, where[1]);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        asm volatile("" : "+r"(before[0]), "+r"(before[1]));
        if (i > 0) release(n - 1);
        n++;
      };
      int i = 0;
      for (; i + 1 < pieces; i += 2) {
        piece(i, even, odd);
        piece(i + 1, odd, even);
      }
      if (i < pieces) piece(i, even, odd);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      asm volatile("" : "+r"(even[0]), "+r"(even[1]), "+r"(odd[0]), "+r"(odd[1]));
#pragma unroll
      for (int k = 0; k < TOKENS / 2; k++) asm volatile("" : ACCUMULATOR(acc[k]));
      release(n - 1);
      asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
      for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
        const u32 buffer = stores + chunk % BUFFERS * STORED;
        // The buffers of the tile before were read long ago; within a tile the first one is needed again.
        if (warp % 4 == 0 && elected()) {
          if (chunk == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
          if (chunk >= BUFFERS) asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(BUFFERS - 1) : "memory");
        }
        if (chunk == 0 || chunk >= BUFFERS) group_barrier(group);
#pragma unroll
        for (int half = 0; half < CHUNK / 16; half++) {
          u32 pairs[4];
#pragma unroll
          for (int k = 0; k < 4; k++) {  // of eight tokens (k / 2) and eight rows (k % 2)
            const int eight = chunk * (CHUNK / 8) + half * 2 + k / 2;
            const float2 of_token = *(const float2*)(scales + eight * 8 + lane % 4 * 2);
            const Sum* sum = acc + eight * 4 + k % 2 * 2;
            const float scale = of_row[k % 2], more = to_float(added[k % 2]);
            pairs[k] = to_halves((float)sum[0] * (of_token.x * scale) + more, (float)sum[1] * (of_token.y * scale) + more);
          }
          store_transposed(buffer + half * (16 * 128) + place, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        group_barrier(group);
        if (warp % 4 == 0 && elected()) {
          store_box(&results, buffer, tile.row + group * 64, tile.token + chunk * CHUNK);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    }
    if (warp % 4 == 0 && elected()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
#if CR > 1
  cluster_barrier_relaxed();  // a block's memory must live until all others have written to it
#endif
}
