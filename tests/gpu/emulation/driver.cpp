// A CUDA driver and runtime without a GPU: kernels compiled by the host's compiler run thread by thread on the CPU.
//
// Every thread of a block is a fiber. It runs until it meets the others: at __syncthreads, at an operation of its whole
// warp (a shuffle, ldmatrix, mma), or where it waits for others' doing (block_until). Blocks run one after another, their threads in an order drawn from a seed, so
// a missing barrier shows in some order. Shared memory starts as NaN and ends in guard bytes. Asynchronous copies land
// as late as cp.async.wait_group allows, or as early as they are issued: the one shows a missing wait, the other a
// buffer that is overwritten while it is still read. Shared memory begins where its declared alignment allows, drawn
// from the seed. What Hopper adds is in hopper.cpp.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "driver.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr unsigned kSharedAlignment = 64;  // of dynamic shared memory, as TVM declares it

enum State { kReady, kAtBarrier, kAtWarp, kBlocked, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes, from_bytes;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  State state;
  EmulatedIndex thread;
  EmulatedWarpOperation operation;
  void* argument;
  std::function<bool()> may_go;          // what a blocked thread waits for
  std::deque<std::vector<Copy>> groups;  // of cp.async, the last one open
};

std::vector<Fiber> fibers;
Fiber* running;
ucontext_t scheduler;
EmulatedIndex grid_index, grid_size, block_size;
char* shared = nullptr;
size_t shared_bytes;
unsigned window;  // where it lies in the address space of shared memory
void (*kernel)(void**);
void** arguments;
bool late_copies = true;
std::mt19937 order(0);

void copy(const Copy& c) {
  memcpy(c.to, c.from, c.from_bytes);
  memset(static_cast<char*>(c.to) + c.from_bytes, 0, c.bytes - c.from_bytes);
}

void wait(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

void run_thread() {
  kernel(arguments);
  running->state = kDone;
  swapcontext(&running->context, &scheduler);
}

}  // namespace

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "CUDA emulation: %s (block %u,%u,%u)\n", what.c_str(), grid_index.x, grid_index.y, grid_index.z);
  abort();
}
bool late() { return late_copies; }
unsigned drawn(unsigned below) { return order() % below; }
size_t thread_index() { return running - fibers.data(); }
size_t thread_count() { return fibers.size(); }
void block_until(std::function<bool()> may_go) {
  if (may_go()) return;
  running->may_go = std::move(may_go);
  wait(kBlocked);
}
void* shared_at(unsigned address, size_t bytes, const char* what) {
  if (address < window || address + bytes > window + shared_bytes) fail(std::string(what) + " outside of shared memory");
  return shared + (address - window);
}

namespace {

// Runs the operation of each warp whose threads have all arrived at it.
bool run_warps() {
  bool ran = false;
  for (size_t first = 0; first < fibers.size(); first += 32) {
    size_t last = std::min(first + 32, fibers.size());
    void* lanes[32] = {};
    EmulatedWarpOperation operation = nullptr;
    size_t waiting = 0, live = 0;
    for (size_t i = first; i < last; ++i) {
      live += fibers[i].state != kDone;
      if (fibers[i].state != kAtWarp) continue;
      if (operation != nullptr && fibers[i].operation != operation) fail("threads of a warp are at different operations");
      operation = fibers[i].operation;
      lanes[i - first] = fibers[i].argument;
      ++waiting;
    }
    if (waiting == 0 || waiting != live) continue;
    operation(lanes);
    for (size_t i = first; i < last; ++i)
      if (fibers[i].state == kAtWarp) fibers[i].state = kReady;
    ran = true;
  }
  return ran;
}

void run_block() {
  memset(shared, 0xFF, shared_bytes);
  memset(shared + shared_bytes, 0x5A, kGuard);
  size_t n = fibers.size();
  hopper_begin();
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = fibers[i];
    f.state = kReady;
    f.thread = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y), unsigned(i / block_size.x / block_size.y)};
    f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_thread, 0);
  }
  std::vector<size_t> turn(n);
  for (size_t i = 0; i < n; ++i) turn[i] = i;
  for (size_t i = n; i > 1; --i) std::swap(turn[i - 1], turn[order() % i]);
  for (;;) {
    bool ran = false;
    for (size_t i : turn) {
      if (fibers[i].state == kBlocked && fibers[i].may_go()) fibers[i].state = kReady;
      if (fibers[i].state != kReady) continue;
      running = &fibers[i];
      swapcontext(&scheduler, &running->context);
      ran = true;
    }
    ran |= run_warps();
    if (ran) continue;
    size_t at_barrier = 0, done = 0;
    for (Fiber& f : fibers) at_barrier += f.state == kAtBarrier, done += f.state == kDone;
    if (done == n) break;
    if (at_barrier + done == n) {
      for (Fiber& f : fibers)
        if (f.state == kAtBarrier) f.state = kReady;
      continue;
    }
    if (hopper_progress()) continue;
    for (Fiber& f : fibers)
      if (f.state == kBlocked) fail("deadlock: a thread waits for what never comes");
    fail("deadlock: some threads wait for a warp, others at a barrier");
  }
  for (Fiber& f : fibers)
    for (auto& group : f.groups)
      if (late_copies && !group.empty()) fail("a thread ended before its asynchronous copies");
  hopper_end();
  for (size_t i = 0; i < kGuard; ++i)
    if (shared[shared_bytes + i] != 0x5A) fail("wrote past the end of shared memory");
}

void launch(void (*function)(void**), void** parameters, EmulatedIndex grid, EmulatedIndex block, size_t bytes) {
  kernel = function;
  arguments = parameters;
  grid_size = grid;
  block_size = block;
  shared_bytes = bytes;
  char* memory = static_cast<char*>(aligned_alloc(4096, (bytes + 3 * kGuard) / 4096 * 4096));
  window = 1024 + kSharedAlignment * drawn(1024 / kSharedAlignment);
  shared = memory + window;
  size_t n = size_t(block.x) * block.y * block.z;
  if (n > 1024) fail("more than 1024 threads in a block");
  if (fibers.size() < n) fibers.reserve(1024);
  fibers.resize(n);
  for (Fiber& f : fibers)
    if (f.stack == nullptr)
      f.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (grid_index.z = 0; grid_index.z < grid.z; ++grid_index.z)
    for (grid_index.y = 0; grid_index.y < grid.y; ++grid_index.y)
      for (grid_index.x = 0; grid_index.x < grid.x; ++grid_index.x) run_block();
  for (Fiber& f : fibers) munmap(f.stack, kStack), f.stack = nullptr;
  free(memory);
}

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

}  // namespace

extern "C" {

// -- what emulated kernels call ---------------------------------------------------------------------------------------
EmulatedIndex emulated_thread_index() { return running->thread; }
EmulatedIndex emulated_block_index() { return grid_index; }
EmulatedIndex emulated_block_size() { return block_size; }
EmulatedIndex emulated_grid_size() { return grid_size; }
char* emulated_shared() { return shared; }
unsigned emulated_shared_address(const void* pointer) {
  return window + unsigned(static_cast<const char*>(pointer) - shared);
}
void emulated_barrier() { wait(kAtBarrier); }

void emulated_warp(EmulatedWarpOperation operation, void* argument) {
  running->operation = operation;
  running->argument = argument;
  wait(kAtWarp);
}

void emulated_async_copy(void* to, const void* from, int bytes, int from_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (from_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async of a misaligned address");
  if (static_cast<char*>(to) < shared || static_cast<char*>(to) + bytes > shared + shared_bytes)
    fail("cp.async to outside of shared memory");
  Copy c{to, from, bytes, from_bytes};
  late_copies ? running->groups.back().push_back(c) : copy(c);
}

void emulated_async_commit() { running->groups.emplace_back(); }

void emulated_async_wait(int pending) {
  auto& groups = running->groups;
  while (int(groups.size()) - 1 > pending) {
    for (const Copy& c : groups.front()) copy(c);
    groups.pop_front();
  }
}

void emulation_mode(int late, unsigned seed) {
  late_copies = late;
  order.seed(seed);
}

// -- libcuda ----------------------------------------------------------------------------------------------------------
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  if (*module == nullptr) fprintf(stderr, "CUDA emulation: %s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, (std::string(name) + "_emulated").c_str());
  return *function ? 0 : 500;
}
int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void**) {
  launch(reinterpret_cast<void (*)(void**)>(function), parameters, {c->grid_x, c->grid_y, c->grid_z},
         {c->block_x, c->block_y, c->block_z}, c->shared_bytes);
  return 0;
}
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, length, "emulated"), 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuGetErrorName(int, const char** text) { return *text = "emulated", 0; }
int cuGetErrorString(int, const char** text) { return *text = "an error of the emulated device", 0; }

// -- libcudart --------------------------------------------------------------------------------------------------------
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; break;     // threads per block
    case 8: *value = 49152; break;    // shared memory per block
    case 10: *value = 32; break;      // warp size
    case 16: *value = 4; break;       // multiprocessors
    case 75: *value = 9; break;       // compute capability
    case 97: *value = 232448; break;  // shared memory per block, opt-in
    default: *value = 0;
  }
  return 0;
}
int cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(256, (bytes + 511) / 256 * 256);
  memset(*memory, 0xFF, bytes);
  return 0;
}
int cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaFree(void* memory) { return free(memory), 0; }
int cudaFreeHost(void* memory) { return free(memory), 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) { return memmove(to, from, bytes), 0; }
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void*) { return memmove(to, from, bytes), 0; }
int cudaMemGetInfo(size_t* free_bytes, size_t* total) { return *free_bytes = *total = size_t(1) << 34, 0; }
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(void*, int) { return 0; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorName(int) { return "emulated"; }
const char* cudaGetErrorString(int) { return "an error of the emulated device"; }
int cudaEventCreate(void** event) { return *event = new Clock::time_point(), 0; }
int cudaEventDestroy(void* event) { return delete static_cast<Clock::time_point*>(event), 0; }
int cudaEventRecord(void* event, void*) { return *static_cast<Clock::time_point*>(event) = Clock::now(), 0; }
int cudaEventElapsedTime(float* ms, void* start, void* end) {
  auto passed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
  return *ms = std::chrono::duration<float, std::milli>(passed).count(), 0;
}
int cudaEventSynchronize(void*) { return 0; }
int cudaStreamCreate(void** stream) { return *stream = nullptr, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void*, int) { return 801; }
int cudaStreamEndCapture(void*, void**) { return 801; }
int cudaGraphInstantiate(void*, void*, unsigned long long) { return 801; }
int cudaGraphLaunch(void*, void*) { return 801; }
int cudaGraphDestroy(void*) { return 0; }
int cudaGraphExecDestroy(void*) { return 0; }
}
