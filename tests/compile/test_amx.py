"""AMX: which kernels use its tiles, seen in the code compiled for a CPU that has them."""

import pytest

from attntune import host
from attntune.ops.attention import Attention
from attntune.ops.linear import Linear
from attntune.target import PRESETS
from attntune.templates import template_for
from attntune.templates.cpu import amx
from attntune.templates.lowering import build

TARGET = PRESETS["sapphirerapids"].with_cores(2)


def assembly(workload, target=TARGET, **knobs):
    template = template_for(workload, target)
    config = template.default(workload, target).replace(**knobs)
    return build(template.schedule(workload, target, config), target).mod.inspect_source("asm")


@pytest.mark.parametrize(
    "workload", [Linear(33, 64, 64, dtype="bfloat16"), Attention(1, 1, 32, 32, 64, dtype="bfloat16")], ids=str
)
def test_products_are_of_tiles(workload):
    text = assembly(workload)
    # The registers are asked for and described before they are used, and given back after.
    assert text.index("syscall") < text.index("ldtilecfg") < text.index("tdpbf16ps") < text.rindex("tilerelease")
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize("turn_values", [False, True])
def test_attention_multiplies_and_adds_by_tiles_whatever_is_transposed(turn_values):
    text = assembly(Attention(1, 1, 32, 64, 64, dtype="bfloat16"), turn_values=turn_values)
    # Steps of scores, four vectors of the results, and the sum of the weights.
    assert text.count("tdpbf16ps") >= 2 + 4 + 1
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize(
    "workload",
    [
        Linear(64, 34, 64, dtype="bfloat16"),
        Linear(1, 64, 64, dtype="bfloat16"),
        Linear(64, 64, 64),
        Attention(1, 1, 32, 32, 80, dtype="bfloat16"),
        Attention(1, 1, 1, 256, 64, dtype="bfloat16"),
    ],
    ids=str,
)
def test_what_is_no_whole_tile_has_none(workload):
    assert "tdpbf16ps" not in assembly(workload)


@pytest.mark.parametrize("workload", [Linear(64, 64, 64), Attention(1, 1, 32, 32, 64)], ids=str)
def test_a_cpu_without_is_not_offered_tiles(workload):
    workload, target = workload.replace(dtype="bfloat16"), PRESETS["znver4"]
    assert all("amx" not in config for config in template_for(workload, target).space(workload, target))


def test_blocks_that_have_no_registers_are_refused():
    assert amx.fits(32, 2)
    assert amx.fits(16, 6)
    assert not amx.fits(16, 7)
    assert not amx.fits(32, 3)
    for tiles in (amx.Tiles(32, 2), amx.Tiles(48, 1), amx.Tiles(5, 6)):
        names = {tiles.sums(i, v) for i in range(len(tiles.heights)) for v in range(tiles.panels)}
        names |= {tiles.left(i) for i in range(len(tiles.heights))}
        assert {tiles.right(v) for v in range(tiles.panels)}.isdisjoint(names)
        assert max(tiles.right(v) for v in range(tiles.panels)) < 8


@pytest.mark.parametrize("tiles", [amx.Tiles(16, 4, "rows"), amx.Tiles(16, 4, "panels"), amx.Tiles(64, 1, "panels")])
def test_sums_ones_and_what_is_multiplied_have_registers_of_their_own(tiles):
    sums = [tiles.sums(i, v) for i in range(len(tiles.heights)) for v in range(tiles.panels)]
    left = {tiles.left(i) for i in range(len(tiles.heights))}
    right = {tiles.right(v) for v in range(tiles.panels)}
    assert sorted([*sums, *left, *right, tiles.ones, tiles.total]) == list(range(8))
    shapes = tiles.shapes()
    assert len(shapes) == 64
    row_bytes, rows = shapes[16:32:2], shapes[48:56]
    small = (1, 64) if tiles.totals == "panels" else (16, 4)
    for register in range(8):
        expected = small if register in (tiles.ones, tiles.total) else (16, 64)
        assert (rows[register], row_bytes[register]) == expected


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_are_a_feature_where_the_system_grants_them(monkeypatch, granted):
    text = "flags\t\t: avx2 avx512f amx_tile amx_bf16 amx_int8\n"
    monkeypatch.setattr(host.Path, "read_text", lambda path, *args, **kwargs: text)
    monkeypatch.setattr(host, "_tiles_granted", lambda: granted)
    tiles = ("amx-bf16", "amx-int8", "amx-tile") if granted else ()
    assert host.host_features() == (*tiles, "avx2", "avx512f")
