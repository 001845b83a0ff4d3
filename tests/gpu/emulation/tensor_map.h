// Tensor maps of the emulated device: how the driver writes them, and the elements of a box.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <cstring>

#include "driver.h"

struct TensorMap {  // what cuTensorMapEncodeTiled writes into the 128 bytes of a CUtensorMap
  char* address;
  uint64_t dimensions[5], strides[5];  // strides in bytes; the first is the element's size
  uint32_t box[5];
  uint8_t rank, element_bytes, swizzle, valid;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint8_t kEncoded = 0xA5;

// The address that a swizzle mode stores at: bits from 4 on are exclusive-or'ed with those from 7 on.
inline unsigned swizzled(unsigned address, int bits) {
  unsigned mask = (1u << bits) - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

inline int swizzle_bits(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B: return 1;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 2;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 3;
    default: return -1;
  }
}

// Calls `element(in device memory, in shared memory, whether inside)` for each element of a box; its size in bytes.
template <typename Element>
unsigned each_element(const TensorMap& map, const int* coordinates, unsigned shared_address, const char* what,
                      Element element) {
  unsigned offset = 0;
  uint32_t at[5] = {};
  for (bool more = true; more;) {
    bool inside = true;
    char* global = map.address;
    for (int i = 0; i < map.rank; ++i) {
      int64_t coordinate = int64_t(coordinates[i]) + at[i];
      inside &= coordinate >= 0 && uint64_t(coordinate) < map.dimensions[i];
      global += coordinate * int64_t(map.strides[i]);
    }
    element(global, shared_at(swizzled(shared_address + offset, map.swizzle), map.element_bytes, what), inside);
    offset += map.element_bytes;
    more = false;
    for (int i = 0; i < map.rank && !more; ++i) {
      more = ++at[i] < map.box[i];
      if (!more) at[i] = 0;
    }
  }
  return offset;
}

extern "C" inline __attribute__((used)) CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
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
