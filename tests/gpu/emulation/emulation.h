// What an emulated kernel and the emulated driver know of each other.
#pragma once

struct EmulatedIndex {
  unsigned x = 1, y = 1, z = 1;
};
using EmulatedWarpOperation = void (*)(void* lanes[32]);  // a lane that does not exist, or has ended, is null

// wgmma.mma_async as one lane issues it; registers are pointed to, for they are read and written later.
struct EmulatedProduct {
  int n;
  bool bfloat16, accumulate, a_in_registers;
  int a_transposed, b_transposed, a_scale, b_scale;
  unsigned long long a_descriptor, b_descriptor;
  const unsigned* a[4];
  float* d[128];
};

extern "C" {
EmulatedIndex emulated_thread_index();
EmulatedIndex emulated_block_index();
EmulatedIndex emulated_block_size();
EmulatedIndex emulated_grid_size();
char* emulated_shared();
unsigned emulated_shared_address(const void* pointer);
void emulated_barrier();
void emulated_warp(EmulatedWarpOperation operation, void* argument);
void emulated_async_copy(void* to, const void* from, int bytes, int from_bytes);
void emulated_async_commit();
void emulated_async_wait(int pending);
void emulation_mode(int late, unsigned seed);

// hopper.cpp
void emulated_named_barrier(int barrier, int threads, bool waits);
void emulated_tensor_store(unsigned long long map, int rank, const int* coordinates, unsigned from);
void emulated_bulk_commit();
void emulated_bulk_wait(int pending);
void emulated_fence_proxy();
void emulated_store_shared(unsigned to, unsigned value);
void emulated_mbarrier_init(unsigned address, unsigned count);
void emulated_mbarrier_arrive(unsigned address, unsigned expected_bytes);
void emulated_mbarrier_wait(unsigned address, unsigned parity);
void emulated_fence_mbarrier_init();
void emulated_tensor_copy(unsigned to, unsigned long long map, int rank, const int* coordinates, unsigned mbarrier);
void emulated_registers(int count, bool more);
void emulated_wgmma(EmulatedProduct* product);
void emulated_wgmma_fence();
void emulated_wgmma_commit();
void emulated_wgmma_wait(int pending);
}
