// What kernels that round tokens to 8 bits share; it stands before each of them. Macros: BF16 (0: float16, 1: bfloat16 of the
// inputs), FORM (1: float8_e4m3, 2: int8).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

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

// The fixed scale belongs to the weight, which no kernel just before writes: it is read before the wait for that one.
__device__ __forceinline__ float load_given(const float* address) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(address));
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

__device__ __forceinline__ u32 largest_in_warp(u32 most) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) most = larger(most, __shfl_xor_sync(~0u, most, lane));
  return most;
}

// The scale of a token: from its largest magnitude, of which `most` is a pair, or `given` if that is one and the token is finite.
__device__ __forceinline__ float token_scale(u32 most, float given) {
  most = larger(most, most >> 16);
  float scale = to_float((u16)most) * (1 / LARGEST);
  if (given > 0 && scale * 0 == 0) scale = given;
  if (scale < SMALLEST_SCALE) scale = SMALLEST_SCALE;
  return scale;
}
