// Tokens in 16 bits -> tokens in 8 bits with a scale each: x ~ values * scale.
//
// Compiled at run time with these macros: BF16 (0: float16, 1: bfloat16 of the inputs), FORM (1: float8_e4m3, 2: int8),
// HELD (pieces of eight inputs that a thread keeps in registers; if a token has more, they are read twice).
//
// A block takes one token. The scale is its largest magnitude over the form's largest value, or a given one; a token with
// NaN or inf gets a scale of NaN or inf, so that its products are NaN. Padding up to `columns` becomes zeros.
// Where the GPU can, the kernel starts while the one before it ends, and the product behind it starts while this one
// runs: that one may load its weight at once, because this kernel lets it start only after all earlier work has ended.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr int THREADS = 256;
#if FORM == 1
constexpr float LARGEST = 448.f;
#else
constexpr float LARGEST = 127.f;
#endif
constexpr float SMALLEST_SCALE = 0x1p-100f;

__device__ __forceinline__ u32 larger(u32 a, u32 b) {  // of two pairs of magnitudes; NaN stays
  u32 v;
#if BF16
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#else
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#endif
  return v;
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

// The kernel before may write the inputs while this one starts: as loads of what nobody writes, which plain ones of a
// "const __restrict__" become, they could be moved before the wait for it.
__device__ __forceinline__ uint4 load_eight(const u16* address) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

__device__ __forceinline__ u16 load_one(const u16* address) {
  u16 v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(address));
  return v;
}

__device__ __forceinline__ u32 magnitude(const uint4& v) {
  constexpr u32 MASK = 0x7fff7fffu;
  return larger(larger(v.x & MASK, v.y & MASK), larger(v.z & MASK, v.w & MASK));
}

__device__ __forceinline__ u16 round_pair(u32 pair, float inverse) {
  const float low = to_float((u16)pair) * inverse, high = to_float((u16)(pair >> 16)) * inverse;
#if FORM == 1
  u16 v;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
  return v;
#else
  const int a = __float2int_rn(fminf(fmaxf(low, -LARGEST), LARGEST));
  const int b = __float2int_rn(fminf(fmaxf(high, -LARGEST), LARGEST));
  return (u16)(a & 255 | b << 8);
#endif
}

__device__ __forceinline__ uint2 round_eight(const uint4& v, float inverse) {
  return make_uint2(round_pair(v.x, inverse) | (u32)round_pair(v.y, inverse) << 16,
                    round_pair(v.z, inverse) | (u32)round_pair(v.w, inverse) << 16);
}

extern "C" __global__ void __launch_bounds__(THREADS)
round_tokens(const u16* __restrict__ x, const float* __restrict__ given, u8* __restrict__ values,
             float* __restrict__ scales, int inputs, int columns) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
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
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) most = larger(most, __shfl_xor_sync(~0u, most, lane));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) most = larger(most, largest[warp]);
  most = larger(most, most >> 16);
  float scale = to_float((u16)most) * (1 / LARGEST);
  const float wanted = *given;
  if (wanted > 0 && scale * 0 == 0) scale = wanted;
  if (scale < SMALLEST_SCALE) scale = SMALLEST_SCALE;
  const float inverse = 1 / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
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
