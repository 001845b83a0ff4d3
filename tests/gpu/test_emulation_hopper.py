"""The emulated Hopper device against what the documents say of it, by kernels that are not ours.

Layouts are written out here as NVIDIA's documents draw them, element by element, so that neither the emulation nor the
templates can agree on a wrong one: where a tile's elements lie, what a descriptor's fields mean, whose register holds
which element.
"""

from pathlib import Path

import numpy as np
import pytest
from gpu import needs_nvcc

from attntune.measure.worker import IsolatedProcess, RemoteError, WorkerDied

EMULATION = Path(__file__).parent / "emulation"
HEAD = """
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""
#: One thread asks for a tile; all write out what lies in shared memory.
COPY = """
extern "C" __global__ void __launch_bounds__(128) main_kernel(const __grid_constant__ CUtensorMap map, half* __restrict__ x, half* __restrict__ y) {
  extern __shared__ __align__(64) char s[];
  unsigned base = (unsigned)__cvta_generic_to_shared(s) + 1023 & ~1023, bar = base + 4096;
  char* start = s + (base - (unsigned)__cvta_generic_to_shared(s));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(1) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(BYTES) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" :: "r"(base), "l"((unsigned long long)&map), "r"(bar), "r"(C0), "r"(C1) : "memory");
  }
  WAIT
  for (int i = threadIdx.x; i < BYTES / 2; i += 128) y[i] = ((half*)start)[i];
  __syncthreads();
  AFTER
}
"""  # noqa: E501
WAIT = """
  { unsigned done; do asm volatile("{ .reg .pred ok; mbarrier.try_wait.parity.shared::cta.b64 ok, [%1], %2; "
                                   "selp.u32 %0, 1, 0, ok; }" : "=r"(done) : "r"(bar), "r"(PARITY) : "memory");
    while (!done); }
"""
#: Shared memory is filled as it is told; then one product of 64 × 16 and 16 × N.
PRODUCT = """
extern "C" __global__ void __launch_bounds__(128) main_kernel(half* __restrict__ memory, unsigned* __restrict__ a_registers, float* __restrict__ d) {
  extern __shared__ __align__(64) char s[];
  unsigned base = (unsigned)__cvta_generic_to_shared(s) + 1023 & ~1023;
  half* start = (half*)(s + (base - (unsigned)__cvta_generic_to_shared(s)));
  for (int i = threadIdx.x; i < 8192; i += 128) start[i] = memory[i];
  __syncthreads();
  float sums[N / 2];
  unsigned a[4];
  for (int i = 0; i < N / 2; ++i) sums[i] = 100.0f;
  for (int i = 0; i < 4; ++i) a[i] = a_registers[threadIdx.x * 4 + i];
  unsigned long long left = base / 16 + A_FIELDS, right = (base + 8192) / 16 + B_FIELDS;
  FENCE
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %R2, 0; wgmma.mma_async.sync.aligned.m64nNk16.f32.f16.f16 "
               "{LISTED}, OPERANDS; }"
               : SUMS : "l"(left), "l"(right), "r"(ACCUMULATE), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < N / 2; ++i) d[threadIdx.x * (N / 2) + i] = sums[i];
}
"""  # noqa: E501
FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((64, 16)).astype(np.float16), RNG.standard_normal((16, 16)).astype(np.float16)  # B: (k, n)


@pytest.fixture(scope="module")
def device(emulation_folder):
    preload = [("emulation:load_driver", emulation_folder)]
    with IsolatedProcess(threads=1, plugin_paths=[str(EMULATION)], preload=preload) as process:
        yield process


def copied(device, x, box, at, swizzle, late=True, wait=WAIT, after="", expected=None):
    code = COPY.replace("WAIT", wait).replace("AFTER", after).replace("PARITY", "0")
    size = box[0] * box[1] * 2
    for name, value in (("BYTES", expected or size), ("C0", at[0]), ("C1", at[1])):
        code = code.replace(name, str(value))
    tensor = {"dims": x.shape[::-1], "strides": [x.shape[1] * 2], "box": box, "swizzle": swizzle}
    y = np.full(size // 2, np.nan, np.float16)
    return device.call("raw:launch", HEAD + code, [x, y], 128, 8192, late, 1, tensor)[1]


def tile(x, box, at):
    """Rows and columns of ``x`` that a box begins at ``at``, zeros outside."""
    padded = np.zeros((x.shape[0] + 64, x.shape[1] + 128), x.dtype)
    padded[8 : 8 + x.shape[0], 64 : 64 + x.shape[1]] = x
    return padded[8 + at[1] : 8 + at[1] + box[1], 64 + at[0] : 64 + at[0] + box[0]]


#: Operands after the sums: two descriptors or four registers and one, scales, and what is transposed.
BOTH_SHARED, B_TRANSPOSED = "%R0, %R1, p, 1, 1, 0, 0", "%R0, %R1, p, 1, 1, 0, 1"
A_HELD = "{%R3, %R4, %R5, %R6}, %R1, p, 1, 1, 0"


def product(device, memory, a_fields=0, b_fields=0, operands=BOTH_SHARED, held=None, accumulate=0, fence=FENCE,
            late=True, n=16):  # fmt: skip
    """(64, n) of what threads hold after the product; B is described from byte 8,192 on."""
    code = PRODUCT.replace("FENCE", fence).replace("OPERANDS", operands)
    code = code.replace("LISTED", ", ".join(f"%{i}" for i in range(n // 2)))
    code = code.replace("SUMS", ", ".join(f'"+f"(sums[{i}])' for i in range(n // 2)))
    for i in range(7):
        code = code.replace(f"%R{i}", f"%{n // 2 + i}")
    for name, value in (("A_FIELDS", a_fields), ("B_FIELDS", b_fields)):
        code = code.replace(name, f"{value}ull")
    code = code.replace("ACCUMULATE", str(accumulate)).replace("m64nN", f"m64n{n}").replace("N / 2", str(n // 2))
    held = np.zeros(128 * 4, np.uint32) if held is None else held
    arrays = [memory, held, np.zeros(64 * n, np.float32)]
    sums = device.call("raw:launch", HEAD + code, arrays, 128, 20480, late, 1)[2].reshape(4, 32, n // 2)
    d = np.zeros((64, n), np.float32)
    for warp, lane, i in np.ndindex(sums.shape):
        # "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
        d[16 * warp + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + lane % 4 * 2 + i % 2] = sums[warp, lane, i]
    return d


def swizzled_rows(rows):
    """(n, 64) as 128-byte rows in which 16-byte chunk c of row r lies at c xor (r mod 8)."""
    chunks = rows.reshape(len(rows), 8, 8)
    placed = np.zeros_like(chunks)
    for row, chunk in np.ndindex(len(rows), 8):
        placed[row, chunk ^ (row % 8)] = chunks[row, chunk]
    return placed.reshape(-1)


def wide(matrix, at):
    """(rows, 16) as columns ``at`` to ``at + 16`` of (rows, 64)."""
    rows = np.full((len(matrix), 64), np.nan, np.float16)
    rows[:, at : at + 16] = matrix
    return rows


def in_memory(*parts):
    memory = np.full(8192, np.nan, np.float16)
    for start, values in parts:
        memory[start // 2 : start // 2 + values.size] = values.reshape(-1)
    return memory


def fields(leading, stride, swizzle):
    """Bits 16 to 29, 32 to 45 and 62 to 63 of a descriptor."""
    return leading // 16 << 16 | stride // 16 << 32 | swizzle << 62


SWIZZLE_128 = 1


@needs_nvcc
class TestCopies:
    x = np.arange(24 * 104, dtype=np.float32).astype(np.float16).reshape(24, 104)

    @pytest.mark.parametrize("at", [(0, 0), (64, 16), (-8, -3)])
    def test_rows_are_swizzled_and_what_is_outside_is_zero(self, device, at):
        found = copied(device, self.x, (64, 16), at, 3)
        np.testing.assert_array_equal(found, swizzled_rows(tile(self.x, (64, 16), at)))

    def test_without_a_swizzle_rows_follow_each_other(self, device):
        found = copied(device, self.x, (24, 16), (8, 4), 0, late=False)
        np.testing.assert_array_equal(found, tile(self.x, (24, 16), (8, 4)).reshape(-1))

    def test_a_missing_wait_shows(self, device):
        found = copied(device, self.x, (64, 16), (0, 0), 3, wait="", after=WAIT)
        assert np.isnan(found.astype(np.float32)).any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"expected": 2176}, "deadlock"),
            ({"wait": ""}, "ended before the tiles"),
            ({"wait": WAIT.replace('"r"(bar)', '"r"(base)')}, "an mbarrier that was not initialised"),
        ],
    )
    def test_misuse_ends_the_process(self, device, change, message):
        with pytest.raises(WorkerDied, match=message):
            copied(device, self.x, (64, 16), (0, 0), 3, **change)

    @pytest.mark.parametrize(("box", "swizzle"), [((128, 8), 3), ((20, 8), 0), ((64, 300), 3), ((64, 8), 2)])
    def test_the_driver_refuses_boxes(self, device, box, swizzle):
        with pytest.raises(RemoteError, match="cuTensorMapEncodeTiled gave 1"):
            copied(device, self.x, box, (0, 0), swizzle)


@needs_nvcc
class TestProducts:
    expected = A.astype(np.float32) @ B.astype(np.float32)

    @pytest.mark.parametrize("step", range(4))
    def test_k_major_in_the_128_byte_swizzle(self, device, step):
        """16 of K further are 32 bytes further, eight rows further 1,024."""
        memory = in_memory((0, swizzled_rows(wide(A, 16 * step))), (8192, swizzled_rows(wide(B.T, 16 * step))))
        described = fields(16, 1024, SWIZZLE_128) + 2 * step
        found = product(device, memory, described, described)
        np.testing.assert_allclose(found, self.expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("late", [True, False])
    def test_mn_major_in_the_128_byte_swizzle(self, device, late):
        """Rows are of K, 64 of N in each: eight of K further are a stride offset on, 64 of N a leading offset."""
        b = RNG.standard_normal((16, 128)).astype(np.float16)
        halves = [(8192 + 4096 * i, swizzled_rows(b[:, 64 * i : 64 * i + 64])) for i in range(2)]
        memory = in_memory((0, swizzled_rows(wide(A, 0))), *halves)
        found = product(device, memory, fields(16, 1024, SWIZZLE_128), fields(4096, 1024, SWIZZLE_128), B_TRANSPOSED,
                        late=late, n=128)  # fmt: skip
        np.testing.assert_allclose(found, A.astype(np.float32) @ b.astype(np.float32), rtol=1e-4, atol=1e-4)

    def test_mn_major_without_a_swizzle(self, device):
        """Core matrices of 8 of K by 16 bytes: the next of N a stride offset on, the next of K a leading offset."""
        placed = [
            (8192 + 1024 * n + 256 * k, B[8 * k : 8 * k + 8, 8 * n : 8 * n + 8]) for n in range(2) for k in range(2)
        ]
        memory = in_memory((0, swizzled_rows(wide(A, 0))), *placed)
        found = product(device, memory, fields(16, 1024, SWIZZLE_128), fields(256, 1024, 0), B_TRANSPOSED)
        np.testing.assert_allclose(found, self.expected, rtol=1e-5, atol=1e-5)

    def test_k_major_without_a_swizzle(self, device):
        """Core matrices of 8 rows of 16 bytes: the next of K a leading offset on, of M or N a stride offset."""
        parts = []
        for start, matrix in ((0, A), (8192, B.T)):
            cores = matrix.reshape(-1, 8, 2, 8)  # (row / 8, row % 8, k / 8, k % 8)
            parts += [(start + 512 * i + 128 * k, cores[i, :, k]) for i in range(len(cores)) for k in range(2)]
        found = product(device, in_memory(*parts), fields(128, 512, 0), fields(128, 512, 0))
        np.testing.assert_allclose(found, self.expected, rtol=1e-5, atol=1e-5)

    def test_a_from_registers_is_added_to_the_sums(self, device):
        held = np.zeros((4, 32, 4, 2), np.float16)
        for warp, lane, r, e in np.ndindex(held.shape):
            held[warp, lane, r, e] = A[16 * warp + lane // 4 + r % 2 * 8, lane % 4 * 2 + e + r // 2 * 8]
        memory = in_memory((8192, swizzled_rows(wide(B.T, 0))))
        found = product(device, memory, 0, fields(16, 1024, SWIZZLE_128), A_HELD, held.reshape(-1).view(np.uint32), 1)
        np.testing.assert_allclose(found, self.expected + 100, rtol=1e-5, atol=1e-4)

    def test_a_product_without_a_fence_ends_the_process(self, device):
        with pytest.raises(WorkerDied, match=r"wgmma without wgmma\.fence"):
            product(device, in_memory(), fence="")

    @pytest.mark.parametrize(
        "operands", [A_HELD + ", 1", BOTH_SHARED.removesuffix(", 0"), BOTH_SHARED.replace("1, 1", "2, 1")]
    )
    def test_an_instruction_that_there_is_not_is_refused(self, device, operands):
        with pytest.raises(RemoteError, match=r"wgmma\.mma_async"):
            product(device, in_memory(), operands=operands)


BARRIERS = """
extern "C" __global__ void __launch_bounds__(256) main_kernel(float* __restrict__ x) {{
  extern __shared__ __align__(64) float s[];
  int warpgroup = threadIdx.x / 128;
  {body}
}}
"""


@needs_nvcc
class TestBarriersAndRegisters:
    def run(self, device, body):
        return device.call(
            "raw:launch", HEAD + BARRIERS.format(body=body), [np.zeros(256, np.float32)], 256, 1024, True, 2
        )

    def test_threads_meet_at_a_named_barrier(self, device):
        ((x),) = self.run(
            device,
            """if (warpgroup == 0) {
                 s[threadIdx.x] = threadIdx.x; asm volatile("bar.arrive %0, %1;" :: "r"(3), "r"(256));
               } else {
                 asm volatile("bar.sync %0, %1;" :: "r"(3), "r"(256)); x[threadIdx.x] = s[threadIdx.x - 128];
               }""",
        )
        np.testing.assert_array_equal(x[128:], np.arange(128))

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ('if (warpgroup) asm volatile("bar.sync %0, %1;" :: "r"(1), "r"(256));', "deadlock"),
            ('if (warpgroup) asm volatile("bar.arrive %0, %1;" :: "r"(1), "r"(256));', "arrived at a named barrier"),
            ('asm volatile("setmaxnreg.inc.sync.aligned.u32 264;");', "out of range"),
            ('asm volatile("setmaxnreg.inc.sync.aligned.u32 248;");', "in the wrong direction"),
            (
                'asm volatile("bar.arrive %0, %1;" :: "r"(1), "r"(warpgroup ? 256 : 192));',
                "threads expect different numbers",
            ),
            (
                "".join(
                    f'asm volatile("setmaxnreg.{step}.sync.aligned.u32 {n};");'
                    for step, n in [("dec", 24), ("dec", 32)]
                ),
                "in the wrong direction",
            ),
        ],
    )
    def test_misuse_ends_the_process(self, device, body, message):
        with pytest.raises(WorkerDied, match=message):
            self.run(device, body)
