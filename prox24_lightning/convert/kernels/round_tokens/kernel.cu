// Tokens in 16 bits -> tokens in 8 bits with a scale each: x ~ values * scale.
//
// Compiled at run time behind rounding.cu, with its macros and HELD (pieces of eight inputs that a thread keeps in registers;
// if a token has more, they are read twice).
//
// A block takes one token. The scale is its largest magnitude over the form's largest value, or a given one; a token with
// NaN or inf gets a scale of NaN or inf, so that its products are NaN. Padding up to `columns` becomes zeros.
// Where the GPU can, the kernel starts while the one before it ends, and the product behind it starts at once and loads its
// weight: before this kernel has ended, and even before earlier ones have that let others start early, such as products.
// None of these writes a weight. What the product does with inputs and outputs waits for this kernel, and so for all before.
// Where that one rounds the later tokens itself, it finds its counters cleared here.

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
round_tokens(const u16* __restrict__ x, const float* __restrict__ given, u8* __restrict__ values,
             float* __restrict__ scales, u32* __restrict__ counters, int inputs, int columns, int cleared) {
  const float fixed = load_given(given);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __shared__ u32 largest[THREADS / 32];
  const u16* token = x + (size_t)blockIdx.x * inputs;
  uint2* to = (uint2*)(values + (size_t)blockIdx.x * columns);
  const bool aligned = inputs % 8 == 0;
  auto load = [&](int piece) {
    if (aligned && piece < inputs / 8) return load_eight(token + piece * 8);
    u32 words[4] = {};
    if (!aligned)
      for (int i = 0; i < 8; i++)
        if (piece * 8 + i < inputs) words[i / 2] |= (u32)load_one(token + piece * 8 + i) << i % 2 * 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
  };
  uint4 held[HELD];
  u32 most = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++) held[k] = load(threadIdx.x + k * THREADS);
#pragma unroll
  for (int k = 0; k < HELD; k++) most = larger(most, magnitude(held[k]));
#pragma unroll 4
  for (int piece = threadIdx.x + HELD * THREADS; piece < columns / 8; piece += THREADS) most = larger(most, magnitude(load(piece)));
  most = largest_in_warp(most);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) most = larger(most, largest[warp]);
  const float scale = token_scale(most, fixed);
  const float inverse = 1 / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < cleared; i += THREADS) counters[i] = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int piece = threadIdx.x + k * THREADS;
    if (piece < columns / 8) to[piece] = round_eight(held[k], inverse);
  }
#pragma unroll 4
  for (int piece = threadIdx.x + HELD * THREADS; piece < columns / 8; piece += THREADS) to[piece] = round_eight(load(piece), inverse);
}

// y = sums * unit * (scale of the token) * (scale of the row) + bias, from the 16-bit sums of a library's product.
// A thread takes eight neighbouring outputs of a token; `stride` is the number of sums that a token has in memory.
extern "C" __global__ void __launch_bounds__(THREADS)
scale_tokens(const u16* __restrict__ sums, const float* __restrict__ token_scales, const float* __restrict__ row_scales,
             const u16* __restrict__ bias, u16* __restrict__ y, int outputs, int stride, float unit) {
  const int first = (blockIdx.y * THREADS + threadIdx.x) * 8;
  const float scale = token_scales[blockIdx.x] * unit;
  const u16* from = sums + (size_t)blockIdx.x * stride;
  u16* to = y + (size_t)blockIdx.x * outputs;
  if (first >= outputs) return;
  u32 words[4] = {};
  const uint4 eight = *(const uint4*)(from + first);  // the stride is a multiple of eight
  const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (first + i >= outputs) break;
    float v = to_float((u16)(pairs[i / 2] >> i % 2 * 16)) * scale * row_scales[first + i];
    if (bias) v += to_float(bias[first + i]);
    u16 half;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
#endif
    words[i / 2] |= (u32)half << i % 2 * 16;
  }
  if (outputs % 8 == 0) {
    *(uint4*)(to + first) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    for (int i = 0; i < 8 && first + i < outputs; i++) to[first + i] = (u16)(words[i / 2] >> i % 2 * 16);
  }
}
