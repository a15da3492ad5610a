// The dense weight of a packed buffer (see packed_buffer.py): a thread writes the four inputs of a group, 8 bytes.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

extern "C" __global__ void __launch_bounds__(256)
expand(const u16* __restrict__ packed, u64* __restrict__ dense, int rows, int columns) {
  const int groups = columns / 4, group = blockIdx.y * 256 + threadIdx.x, row = blockIdx.x;
  if (group >= groups) return;
  const u32 pair = ((const u32*)packed)[(size_t)row * groups + group];
  const u16* words = packed + (size_t)rows * (columns / 2);
  const u32 word = words[((size_t)(row / 64) * (columns / 32) + group / 8) * 128 + row % 64 / 16 * 32 + row % 8 * 4 + group % 4];
  const u32 indices = word >> (group % 8 / 4 * 8 + row % 16 / 8 * 4);
  dense[(size_t)row * groups + group] =
      (u64)(pair & 0xffff) << (indices & 3) * 16 | (u64)(pair >> 16) << (indices >> 2 & 3) * 16;
}
