// What compute capability 9.0 adds, as NVIDIA's "PTX ISA" and driver API describe it: tensor maps and copies of tiles of
// tensors, mbarriers, wgmma on descriptors of swizzled shared memory, named barriers, setmaxnreg.
//
// Written from those documents and not from the kernels. Copies of tiles land when they are issued, or only when no
// thread can go on. Each warp's part of a wgmma is done when it is issued, or only when the warp waits for its group.
#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "driver.h"

namespace {

// -- mbarriers: 64 bits in shared memory, opaque to the kernel --------------------------------------------------------
struct Barrier {
  uint64_t pending : 20, expected : 20, phase : 1, valid : 2;
  int64_t bytes : 21;
};
static_assert(sizeof(Barrier) == 8);
constexpr uint64_t kValid = 2;  // neither poison nor zeros

struct TensorMap {  // what cuTensorMapEncodeTiled writes into the 128 bytes of a CUtensorMap
  char* address;
  uint64_t dimensions[5], strides[5];  // strides in bytes; the first is the element's size
  uint32_t box[5];
  uint8_t rank, element_bytes, swizzle, valid;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint8_t kEncoded = 0xA5;

struct TileCopy {
  TensorMap map;
  int coordinates[5];
  unsigned to, mbarrier;
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

// The address that a swizzle mode stores at: bits from 4 on are exclusive-or'ed with those from 7 on.
unsigned swizzled(unsigned address, int bits) {
  unsigned mask = (1u << bits) - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

int swizzle_bits(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B: return 1;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 2;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 3;
    default: return -1;
  }
}

void land(const TileCopy& copy) {
  const TensorMap& map = copy.map;
  unsigned offset = 0;
  uint32_t at[5] = {};
  for (bool more = true; more;) {
    bool inside = true;
    const char* from = map.address;
    for (int i = 0; i < map.rank; ++i) {
      int64_t coordinate = int64_t(copy.coordinates[i]) + at[i];
      inside &= coordinate >= 0 && uint64_t(coordinate) < map.dimensions[i];
      from += coordinate * int64_t(map.strides[i]);
    }
    void* to = shared_at(swizzled(copy.to + offset, map.swizzle), map.element_bytes, "a tile is copied to");
    inside ? memcpy(to, from, map.element_bytes) : memset(to, 0, map.element_bytes);
    offset += map.element_bytes;
    more = false;
    for (int i = 0; i < map.rank && !more; ++i) {
      more = ++at[i] < map.box[i];
      if (!more) at[i] = 0;
    }
  }
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

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dimensions, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  int bits = swizzle_bits(swizzle);
  bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  bool legal = reinterpret_cast<uintptr_t>(out) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  legal &= rank >= 1 && rank <= 5 && half && bits >= 0;
  legal &= interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;  // all that is emulated
  TensorMap map = {static_cast<char*>(address), {}, {2}, {}, uint8_t(rank), 2, uint8_t(bits), kEncoded};
  for (cuuint32_t i = 0; legal && i < rank; ++i) {
    map.dimensions[i] = dimensions[i], map.box[i] = box[i];
    legal &= dimensions[i] >= 1 && dimensions[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256;
    legal &= element_strides[i] == 1;
    if (i == 0) continue;
    map.strides[i] = strides[i - 1];
    legal &= strides[i - 1] % 16 == 0 && strides[i - 1] < 1ull << 40;
  }
  legal = legal && box[0] * 2 % 16 == 0 && (bits == 0 || box[0] * 2 <= 16u << bits);
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  memset(out, 0, sizeof(*out));
  memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}
}
