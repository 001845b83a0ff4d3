// What an emulated kernel and the emulated driver know of each other.
#pragma once

struct EmulatedIndex {
  unsigned x = 1, y = 1, z = 1;
};
using EmulatedWarpOperation = void (*)(void* lanes[32]);  // a lane that does not exist, or has ended, is null

extern "C" {
EmulatedIndex emulated_thread_index();
EmulatedIndex emulated_block_index();
EmulatedIndex emulated_block_size();
EmulatedIndex emulated_grid_size();
char* emulated_shared();
void emulated_barrier();
void emulated_warp(EmulatedWarpOperation operation, void* argument);
void emulated_async_copy(void* to, const void* from, int bytes, int from_bytes);
void emulated_async_commit();
void emulated_async_wait(int pending);
void emulation_mode(int late, unsigned seed);
}
