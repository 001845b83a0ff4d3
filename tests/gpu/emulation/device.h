// Included before an emulated kernel: CUDA's built-ins, and attntune's tensor-core intrinsics by name.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation.h"

#undef __forceinline__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx emulated_thread_index()
#define blockIdx emulated_block_index()
#define blockDim emulated_block_size()
#define gridDim emulated_grid_size()
#define __syncthreads() emulated_barrier()
#define __grid_constant__
#define __cvta_generic_to_shared(pointer) emulated_shared_address(pointer)

namespace emulated {
template <typename T>
struct Shuffle {
  T value;
  int from;
  T result;
};
template <typename T>
T shuffle(T value, int from) {
  Shuffle<T> mine{value, from, value};
  emulated_warp(
      [](void* lanes[32]) {
        for (int i = 0; i < 32; ++i) {
          auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
          if (lane && lane->from >= 0 && lane->from < 32 && lanes[lane->from])
            lane->result = static_cast<Shuffle<T>*>(lanes[lane->from])->value;
        }
      },
      &mine);
  return mine.result;
}
inline int lane() {
  EmulatedIndex t = emulated_thread_index(), b = emulated_block_size();
  return (t.x + b.x * (t.y + b.y * t.z)) % 32;
}
}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned, T v, int from, int width = 32) {
  int at = emulated::lane();
  return emulated::shuffle(v, at / width * width + from % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask, int width = 32) {
  int at = emulated::lane(), to = at ^ mask;
  return emulated::shuffle(v, to / width == at / width ? to : -1);
}
template <typename T>
T __shfl_down_sync(unsigned, T v, unsigned delta, int width = 32) {
  int at = emulated::lane(), to = at + int(delta);
  return emulated::shuffle(v, to / width == at / width ? to : -1);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, unsigned delta, int width = 32) {
  int at = emulated::lane(), to = at - int(delta);
  return emulated::shuffle(v, to >= at / width * width ? to : -1);
}
inline void __syncwarp(unsigned = ~0u) { emulated::shuffle(0, 0); }
inline unsigned __activemask() { return ~0u; }
template <typename T>
T __ldg(const T* p) { return *p; }
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <typename T> inline T min(T a, T b) { return a < b ? a : b; }
template <typename T> inline T max(T a, T b) { return a > b ? a : b; }
#if __has_include(<cuda_fp16.h>)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// -- attntune's intrinsics (attntune/templates/cuda/intrinsics.py) ---------------------------------------------------
namespace emulated {
struct Matrices {
  unsigned* registers;
  const char* row;
};
template <bool transposed>
void load_matrices(void* lanes[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
        memcpy(&pair[e], static_cast<Matrices*>(lanes[m * 8 + row])->row + 2 * column, 2);
      }
      memcpy(&static_cast<Matrices*>(lanes[lane])->registers[m], pair, 4);
    }
}
struct Product {
  float* d;
  const unsigned *a, *b;
};
inline float widened(uint16_t bits, __nv_bfloat16) { return __uint_as_float(unsigned(bits) << 16); }
inline float widened(uint16_t bits, __half) {
  __half value;
  memcpy(&value, &bits, 2);
  return __half2float(value);
}
template <typename T>
float part(unsigned packed, int which) { return widened(uint16_t(packed >> (16 * which)), T()); }
template <typename T>
void multiply(void* lanes[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto* p = static_cast<Product*>(lanes[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + e + r / 2 * 8] = part<T>(p->a[r], e);
      for (int r = 0; r < 2; ++r) b[t + e + r * 8][g] = part<T>(p->b[r], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* p = static_cast<Product*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      for (int k = 0; k < 16; ++k) p->d[r] += a[row][k] * b[k][column];
    }
  }
}
template <typename T>
void mma(float* d, const unsigned* a, const unsigned* b) {
  Product mine{d, a, b};
  emulated_warp(multiply<T>, &mine);
}
template <bool transposed>
void ldmatrix(unsigned* registers, const void* shared, int at) {
  Matrices mine{registers, static_cast<const char*>(shared) + 2 * at};
  emulated_warp(load_matrices<transposed>, &mine);
}
}  // namespace emulated

inline void attntune_ldmatrix_x4(unsigned* r, const void* m, int at) { emulated::ldmatrix<false>(r, m, at); }
inline void attntune_ldmatrix_x4_trans(unsigned* r, const void* m, int at) { emulated::ldmatrix<true>(r, m, at); }
inline void attntune_mma_bfloat16(float* d, const unsigned* a, const unsigned* b) { emulated::mma<__nv_bfloat16>(d, a, b); }
inline void attntune_mma_float16(float* d, const unsigned* a, const unsigned* b) { emulated::mma<__half>(d, a, b); }
inline void attntune_cp_async_16(void* shared, int at, const void* from, bool valid) {
  emulated_async_copy(static_cast<char*>(shared) + 2 * at, from, 16, valid ? 16 : 0);
}
inline void attntune_cp_async_commit() { emulated_async_commit(); }
inline void attntune_cp_async_wait_0() { emulated_async_wait(0); }
inline void attntune_cp_async_wait_1() { emulated_async_wait(1); }
inline void attntune_cp_async_wait_2() { emulated_async_wait(2); }
inline void attntune_cp_async_wait_3() { emulated_async_wait(3); }
inline void attntune_cp_async_wait_4() { emulated_async_wait(4); }
