// What compute capability 9.0 adds, as NVIDIA's "PTX ISA" and driver API describe it: tensor maps and copies of tiles of
// tensors, mbarriers, wgmma on descriptors of swizzled shared memory, named barriers, setmaxnreg.
//
// Written from those documents and not from the kernels. Copies of tiles land when they are issued, or only when no
// thread can go on; to device memory when they are issued, or only when their thread waits for its groups. Each warp's part of a wgmma is done when it is issued, or only when the warp waits for its group.
#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "driver.h"
#include "tensor_map.h"

namespace {

// -- mbarriers: 64 bits in shared memory, opaque to the kernel --------------------------------------------------------
struct Barrier {
  uint64_t pending : 20, expected : 20, phase : 1, valid : 2;
  int64_t bytes : 21;
};
static_assert(sizeof(Barrier) == 8);
constexpr uint64_t kValid = 2;  // neither poison nor zeros

struct TileCopy {
  TensorMap map;
  int coordinates[5];
  unsigned to, mbarrier;
};

struct TileStore {
  TensorMap map;
  int coordinates[5];
  unsigned from;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  unsigned generation = 0;
};

struct Product {  // a warp's part of a wgmma
  EmulatedProduct lanes[32];
};

struct Warp {
  bool fenced = false;
  int registers = 0;
  std::deque<std::vector<Product>> groups;  // the last one open
  uint64_t issued = 0;                      // a hash of every wgmma so far, for comparison with its warpgroup's
};

std::vector<TileCopy> in_flight;
std::map<size_t, std::deque<std::vector<TileStore>>> stores;  // by thread, in groups, the last one open
std::vector<bool> proxy_fenced;                               // by thread, since the last tile that was stored
std::map<unsigned, size_t> unfenced;  // mbarriers that only the thread which initialised them may know of
NamedBarrier named[16];
std::vector<Warp> warps;

Warp& warp() { return warps[thread_index() / 32]; }

Barrier* barrier_at(unsigned address) {
  if (address % 8) fail("an mbarrier at a misaligned address");
  auto* b = static_cast<Barrier*>(shared_at(address, 8, "an mbarrier"));
  return b;
}

Barrier* valid_barrier(unsigned address) {
  Barrier* b = barrier_at(address);
  if (b->valid != kValid) fail("an mbarrier that was not initialised, or was overwritten");
  auto found = unfenced.find(address);
  if (found != unfenced.end()) fail("an mbarrier is used before a fence after its initialisation");
  return b;
}

void complete_phase_if_done(Barrier* b) {
  if (b->pending == 0 && b->bytes == 0) {
    b->pending = b->expected;
    b->phase ^= 1;
  }
}

void perform(const TileStore& store) {
  size_t bytes = store.map.element_bytes;
  each_element(store.map, store.coordinates, store.from, "a tile is stored from",
               [bytes](void* global, void* local, bool inside) { inside ? memcpy(global, local, bytes) : nullptr; });
}

void land(const TileCopy& copy) {
  size_t bytes = copy.map.element_bytes;
  unsigned offset = each_element(
      copy.map, copy.coordinates, copy.to, "a tile is copied to",
      [bytes](void* global, void* local, bool inside) { inside ? memcpy(local, global, bytes) : memset(local, 0, bytes); });
  Barrier* b = valid_barrier(copy.mbarrier);
  if (b->bytes - int64_t(offset) < -((1 << 20) - 1)) fail("an mbarrier's count of bytes overflows");
  b->bytes -= offset;
  complete_phase_if_done(b);
}

// -- wgmma ------------------------------------------------------------------------------------------------------------
float widened(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  __half value;
  memcpy(&value, &bits, 2);
  return __half2float(value);
}

// Element (row of M or N, k) of a matrix in shared memory: "Matrix Descriptor Format", "Strides" and the canonical
// layouts of CUTLASS's documentation, for elements of 16 bits.
uint16_t element(uint64_t descriptor, bool transposed, int row, int k) {
  unsigned start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  unsigned stride = (descriptor >> 32 & 0x3FFF) << 4, mode = descriptor >> 62;
  int bits = mode == 0 ? 0 : 4 - int(mode);  // 1: 128 bytes, 2: 64, 3: 32
  unsigned chunks = 1u << bits, offset;      // of 16 bytes, in a row of the pattern
  if (!transposed) {
    offset = row % 8 * (16 * chunks) + row / 8 * stride + k % 8 * 2 + k / 8 * (bits ? 16 : leading);
  } else if (bits) {
    offset = row % 8 * 2 + row / 8 % chunks * 16 + row / 8 / chunks * leading + k % 8 * (16 * chunks) + k / 8 * stride;
  } else {
    offset = row % 8 * 2 + row / 8 * stride + k % 8 * 16 + k / 8 * leading;
  }
  uint16_t value;
  memcpy(&value, shared_at(swizzled(start + offset, bits), 2, "wgmma reads"), 2);
  return value;
}

void multiply(const Product& product, int warp_in_group) {
  const EmulatedProduct& first = product.lanes[0];
  float a[16][16];
  static float b[256][16];
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4 && first.a_in_registers; ++r)
      for (int e = 0; e < 2; ++e)
        a[lane / 4 + r % 2 * 8][lane % 4 * 2 + e + r / 2 * 8] =
            widened(uint16_t(*product.lanes[lane].a[r] >> (16 * e)), first.bfloat16);
  for (int row = 0; row < 16 && !first.a_in_registers; ++row)
    for (int k = 0; k < 16; ++k)
      a[row][k] = widened(element(first.a_descriptor, first.a_transposed, warp_in_group * 16 + row, k), first.bfloat16);
  for (int column = 0; column < first.n; ++column)
    for (int k = 0; k < 16; ++k)
      b[column][k] = widened(element(first.b_descriptor, first.b_transposed, column, k), first.bfloat16);
  float scale = float(first.a_scale * first.b_scale);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < first.n / 2; ++i) {
      int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      float* d = product.lanes[lane].d[i];
      *d = (first.accumulate ? *d : 0.0f) + scale * sum;
    }
}

struct Issue {  // what a lane hands to its warp's operation
  EmulatedProduct* product;
  size_t warp;
};

void issue(void* lanes[32]) {
  if (lanes[0] == nullptr) fail("wgmma without all lanes of a warp");
  size_t current = static_cast<Issue*>(lanes[0])->warp;
  Warp& w = warps[current];
  if (!w.fenced) fail("wgmma without wgmma.fence since its registers may have been touched");
  Product product;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) fail("wgmma without all lanes of a warp");
    product.lanes[lane] = *static_cast<Issue*>(lanes[lane])->product;
    const EmulatedProduct &mine = product.lanes[lane], &first = product.lanes[0];
    if (mine.n != first.n || mine.accumulate != first.accumulate || mine.b_descriptor != first.b_descriptor ||
        (!mine.a_in_registers && mine.a_descriptor != first.a_descriptor))
      fail("lanes of a warp disagree on a wgmma");
  }
  const EmulatedProduct& p = product.lanes[0];
  if (p.n < 8 || p.n > 256 || p.n % 8) fail("wgmma of a shape there is not");
  for (uint64_t descriptor : {p.a_in_registers ? p.b_descriptor : p.a_descriptor, p.b_descriptor})
    if (descriptor >> 49 & 7) fail("a descriptor with a base offset: not emulated");
  uint64_t facts[] = {uint64_t(p.n), p.accumulate, p.a_in_registers ? 0 : p.a_descriptor, p.b_descriptor};
  for (uint64_t fact : facts) w.issued = (w.issued ^ fact) * 0x9E3779B97F4A7C15u + 1;
  late() ? w.groups.back().push_back(product) : multiply(product, current % 4);
}

void together(void*[32]) {}

}  // namespace

void hopper_begin() {
  in_flight.clear();
  unfenced.clear();
  stores.clear();
  proxy_fenced.assign(thread_count(), false);
  for (NamedBarrier& b : named) b = NamedBarrier();
  size_t n = thread_count();
  warps.assign((n + 31) / 32, Warp());
  for (Warp& w : warps) w.groups.emplace_back(), w.registers = 65536 / ((n + 31) / 32 * 32) / 8 * 8;
}

bool hopper_progress() {
  if (in_flight.empty()) return false;
  size_t i = drawn(unsigned(in_flight.size()));
  TileCopy copy = in_flight[i];
  in_flight.erase(in_flight.begin() + i);
  land(copy);
  return true;
}

void hopper_end() {
  if (!in_flight.empty()) fail("a block ended before the tiles it asked for had come");
  for (const auto& [thread, groups] : stores)
    for (const auto& group : groups)
      if (!group.empty()) fail("a block ended before the tiles that it stores were read");
  for (const NamedBarrier& b : named)
    if (b.arrived) fail("a block ended with threads arrived at a named barrier");
  for (size_t i = 0; i < warps.size(); ++i) {
    for (const auto& group : warps[i].groups)
      if (!group.empty()) fail("a warp ended before its wgmmas");
    if (i % 4 && warps[i].issued != warps[i / 4 * 4].issued) fail("warps of a warpgroup issued different wgmmas");
  }
}

extern "C" {

void emulated_named_barrier(int barrier, int threads, bool waits) {
  if (barrier < 0 || barrier > 15 || threads % 32 || threads <= 0) fail("a named barrier that there is not");
  NamedBarrier& b = named[barrier];
  if (b.arrived && b.threads != threads) fail("threads expect different numbers at a named barrier");
  b.threads = threads;
  unsigned generation = b.generation;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
  if (waits) block_until([&b, generation] { return b.generation != generation; });
}

void emulated_mbarrier_init(unsigned address, unsigned count) {
  if (count < 1 || count >= 1u << 20) fail("an mbarrier with a count out of range");
  Barrier* b = barrier_at(address);
  b->pending = b->expected = count;
  b->bytes = 0, b->phase = 0, b->valid = kValid;
  unfenced[address] = thread_index();
}

void emulated_fence_mbarrier_init() {
  for (auto i = unfenced.begin(); i != unfenced.end();) i = i->second == thread_index() ? unfenced.erase(i) : std::next(i);
}

void emulated_mbarrier_arrive(unsigned address, unsigned expected_bytes) {
  Barrier* b = valid_barrier(address);
  if (b->pending == 0) fail("more arrivals at an mbarrier than it expects");
  if (b->bytes + int64_t(expected_bytes) >= 1 << 20) fail("an mbarrier's count of bytes overflows");
  b->bytes += expected_bytes;
  b->pending -= 1;
  complete_phase_if_done(b);
}

void emulated_mbarrier_wait(unsigned address, unsigned parity) {
  block_until([=] { return valid_barrier(address)->phase != (parity & 1); });
}

void emulated_tensor_copy(unsigned to, unsigned long long map, int rank, const int* coordinates, unsigned mbarrier) {
  TileCopy copy;
  memcpy(&copy.map, reinterpret_cast<const void*>(map), sizeof(TensorMap));
  if (map % 64 || copy.map.valid != kEncoded) fail("a copy through what is no tensor map");
  if (copy.map.rank != rank) fail("a copy of another rank than its tensor map's");
  if (to % (copy.map.swizzle ? 128u << copy.map.swizzle : 128u))
    fail("a tile is copied to where its swizzle's pattern does not begin");
  memcpy(copy.coordinates, coordinates, sizeof(int) * rank);
  copy.to = to, copy.mbarrier = mbarrier;
  valid_barrier(mbarrier);
  late() ? in_flight.push_back(copy) : land(copy);
}

void emulated_fence_proxy() { proxy_fenced[thread_index()] = true; }

void emulated_store_shared(unsigned to, unsigned value) {
  if (to % 4) fail("st.shared to a misaligned address");
  memcpy(shared_at(to, 4, "st.shared"), &value, 4);
}

void emulated_tensor_store(unsigned long long map, int rank, const int* coordinates, unsigned from) {
  TileStore store;
  memcpy(&store.map, reinterpret_cast<const void*>(map), sizeof(TensorMap));
  if (map % 64 || store.map.valid != kEncoded) fail("a store through what is no tensor map");
  if (store.map.rank != rank) fail("a store of another rank than its tensor map's");
  if (from % (store.map.swizzle ? 128u << store.map.swizzle : 128u))
    fail("a tile is stored from where its swizzle's pattern does not begin");
  size_t first = thread_index() / 128 * 128;  // of the warpgroup, whose threads are taken to have written the tile
  for (size_t i = first; i < first + 128 && i < proxy_fenced.size(); ++i)
    if (!proxy_fenced[i]) fail("a tile is stored before a fence after it was written");
  memcpy(store.coordinates, coordinates, sizeof(int) * rank);
  store.from = from;
  auto& groups = stores[thread_index()];
  if (groups.empty()) groups.emplace_back();
  late() ? groups.back().push_back(store) : perform(store);
}

void emulated_bulk_commit() {
  auto& groups = stores[thread_index()];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
  // What is written from here on takes another fence.
  size_t first = thread_index() / 128 * 128;
  for (size_t i = first; i < first + 128 && i < proxy_fenced.size(); ++i) proxy_fenced[i] = false;
}

void emulated_bulk_wait(int pending) {
  auto& groups = stores[thread_index()];
  while (int(groups.size()) - 1 > pending) {
    for (const TileStore& store : groups.front()) perform(store);
    groups.pop_front();
  }
}

void emulated_registers(int count, bool more) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg of a number out of range");
  size_t i = thread_index() / 32;
  emulated_warp(together, nullptr);
  if ((count > warps[i].registers) != more && count != warps[i].registers) fail("setmaxnreg in the wrong direction");
  size_t pool = 65536 / (warps.size() * 32) / 8 * 8 * warps.size();
  block_until([i, count, pool] {
    size_t used = count;
    for (size_t j = 0; j < warps.size(); ++j) used += j == i ? 0 : warps[j].registers;
    return used <= pool;
  });
  warps[i].registers = count;
}

void emulated_wgmma(EmulatedProduct* product) {
  Issue mine{product, thread_index() / 32};
  emulated_warp(issue, &mine);
}

void emulated_wgmma_fence() {
  emulated_warp(together, nullptr);
  warp().fenced = true;
}

void emulated_wgmma_commit() {
  emulated_warp(together, nullptr);
  if (thread_index() % 32 == 0) warp().groups.emplace_back();
  emulated_warp(together, nullptr);
}

void emulated_wgmma_wait(int pending) {
  emulated_warp(together, nullptr);
  if (thread_index() % 32 == 0) {
    Warp& w = warp();
    while (int(w.groups.size()) - 1 > pending) {
      for (const Product& product : w.groups.front()) multiply(product, int(thread_index() / 32 % 4));
      w.groups.pop_front();
    }
    w.fenced = false;
  }
  emulated_warp(together, nullptr);
}
}
