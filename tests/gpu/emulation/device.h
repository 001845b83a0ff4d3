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
