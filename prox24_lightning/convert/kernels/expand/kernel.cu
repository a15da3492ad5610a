// The dense weight of a packed buffer: a thread writes the four inputs of a group, 8 bytes.
//
// Compiled at run time with these macros: FORM (of the weight: 0 for 16 bits, see packed_buffer.py; 1 for float8_e4m3, 2
// for int8, see rounded_buffer.py), BF16 (0: float16, 1: bfloat16, which a weight of 8 bits is expanded to).

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// The bits of value * scale in 16 bits; the product is exact in float32.
__device__ __forceinline__ u32 scaled(u32 value, float scale) {
#if FORM == 1
  const u32 exponent = value >> 3 & 15, fraction = value & 7;
  float f = exponent ? __uint_as_float((exponent + 120) << 23 | fraction << 20) : fraction * 0x1p-9f;
  if ((value & 127) == 127) f = __uint_as_float(0x7fc00000u);
  f = value & 128 ? -f : f;
#else
  const float f = (float)(signed char)value;
#endif
  u16 v;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f * scale));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f * scale));
#endif
  return v;
}

extern "C" __global__ void __launch_bounds__(256)
expand(const u8* __restrict__ packed, u64* __restrict__ dense, int rows, int columns) {
  const int groups = columns / 4, group = blockIdx.y * 256 + threadIdx.x, row = blockIdx.x;
  if (group >= groups) return;
#if FORM
  const u16 values = ((const u16*)packed)[(size_t)row * groups + group];
  const u8* tile = packed + (size_t)rows * (columns / 2) + ((size_t)(row / 64) * (columns / 64) + group / 16) * 512;
  const u32 byte = tile[row % 64 / 16 * 128 + row % 8 * 16 + group % 8 / 2 * 4 + group % 16 / 8 * 2 + row % 16 / 8];
  const u32 indices = byte >> group % 2 * 4;
  const float scale = ((const float*)(packed + (size_t)rows * (columns / 8 * 5)))[row];
  const u32 first = scaled(values & 255, scale), second = scaled(values >> 8, scale);
#else
  const u32 pair = ((const u32*)packed)[(size_t)row * groups + group];
  const u16* words = (const u16*)packed + (size_t)rows * (columns / 2);
  const u32 word = words[((size_t)(row / 64) * (columns / 32) + group / 8) * 128 + row % 64 / 16 * 32 + row % 8 * 4 + group % 4];
  const u32 indices = word >> (group % 8 / 4 * 8 + row % 16 / 8 * 4);
  const u32 first = pair & 0xffff, second = pair >> 16;
#endif
  dense[(size_t)row * groups + group] = (u64)first << (indices & 3) * 16 | (u64)second << (indices >> 2 & 3) * 16;
}
