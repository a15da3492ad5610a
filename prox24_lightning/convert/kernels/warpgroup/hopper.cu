// What the kernels on wgmma.sp share; kernel.py puts it before each of them, behind ../round_tokens/rounding.cu. Macros: FORM
// and BF16, see kernel.cu.

typedef unsigned long long u64;

#if FORM == 2
typedef int Sum;
#define ACCUMULATOR "+r"
#else
typedef float Sum;
#define ACCUMULATOR "+f"
#endif

constexpr u32 ANY = 0x44444444;   // indices 0 and 1 in every group

struct __align__(64) TensorMap {
  char bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ u32 in_block(u32 address, int block) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

// A barrier that orders no memory accesses, for where nothing was written that other blocks read.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void wait(u32 barrier, int parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}

// Fetch a map before its first copy, which would wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_box_to(u16 blocks, u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

// Whether this lane is the one that acts for its warp. With this the compiler knows that a copy's operands are uniform.
__device__ __forceinline__ bool elected() {
  u32 yes;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(yes));
  return yes;
}

// Rows of 64 or 128 bytes that the copy engine has swizzled.
template <int BYTES>
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)(address >> 4 & 0x3fff) | (u64)1 << 16 | (u64)(8 * BYTES >> 4) << 32 | (u64)(BYTES == 128 ? 1 : 2) << 62;
}

#if FORM
// Lane c of four supplies byte c of each word.
__device__ __forceinline__ u32 lane_metadata(const char* tile, int lane) {
  const uint4 row = *(const uint4*)(tile + lane / 4 * 16);
  const u32 two = lane % 4 | (lane % 4 + 4) << 4;
  return __byte_perm(__byte_perm(row.x, row.y, two), __byte_perm(row.z, row.w, two), 0x5410);
}
#else
// The metadata that a lane supplies to the two products of 64 inputs: lanes 0 and 1 of four to the first, lanes 2 and 3
// to the second.
__device__ __forceinline__ u32 lane_metadata(const char* tiles, int lane) {
  const uint2 row = *(const uint2*)(tiles + (lane & 2) * 128 + lane / 4 * 8);
  u32 w = __byte_perm(row.x, row.y, lane & 1 ? 0x7531 : 0x6420);
  u32 t = (w ^ (w >> 4)) & 0x00f000f0u;  // even fours of bits to the lower half, odd ones to the upper
  w ^= t ^ (t << 4);
  t = (w ^ (w >> 8)) & 0x0000ff00u;
  return w ^ t ^ (t << 8);
}
#endif

__device__ __forceinline__ u32 to_halves(float low, float high) {
  u32 v;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}

