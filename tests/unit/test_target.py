"""Targets: what parses, what a preset says, what `native` reads from the machine."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from attntune import target as target_module
from attntune.errors import TargetError
from attntune.host import available_cpus, host_features, physical_cores
from attntune.target import PRESETS, Target, dtype_bits, native, vector_shape

ZEN4_FLAGS = "flags\t\t: fpu avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_vnni sse4_2"


def serve_files(monkeypatch, contents):
    """Let host.py read `contents` by path, and no other file below /proc and /sys."""

    def read_text(path, *args, **kwargs):
        if str(path) in contents:
            return contents[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)


class TestParse:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_preset(self, name):
        assert Target.parse(name) is PRESETS[name]

    def test_target_passes_through(self):
        assert Target.parse(PRESETS["znver4"]) is PRESETS["znver4"]

    def test_native_is_this_machine(self):
        assert Target.parse("native") is native()

    def test_cores_option(self):
        limited = Target.parse("znver4,cores=3")
        assert limited.cores == 3
        assert limited.key() == "cpu/znver4/3"
        assert limited.features == PRESETS["znver4"].features

    @pytest.mark.parametrize("option", ["cores=0", "cores=-1", "cores=x", "cores", "threads=2"])
    def test_bad_option_names_what_was_expected(self, option):
        with pytest.raises(TargetError, match=r"cores=<positive number>"):
            Target.parse(f"znver4,{option}")

    @pytest.mark.parametrize(
        "text",
        [
            '{"kind": "llvm", "mcpu": "znver4", "num-cores": 4}',
            {"kind": "llvm", "mcpu": "znver4", "num-cores": 4},
            "llvm -mcpu=znver4 -num-cores=4",
        ],
    )
    def test_tvm_forms_agree(self, text):
        parsed = Target.parse(text)
        assert (parsed.arch, parsed.cores, parsed.vector_bits) == ("znver4", 4, 512)

    def test_mtriple_is_kept(self):
        triple = "x86_64-pc-linux-musl"
        assert Target.parse({"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": triple}).triple == triple

    def test_cuda(self):
        assert Target.parse("cuda -arch=sm_90a") is PRESETS["sm_90a"]
        assert Target.parse('{"kind": "cuda"}') is PRESETS["sm_80"]

    def test_a_preset_with_its_kind(self):
        assert Target.parse("cuda:sm_90a") is PRESETS["sm_90a"]
        assert Target.parse("cpu:znver4") is PRESETS["znver4"]
        for name in ("cpu:sm_90a", "cuda:znver4", "cuda:sm_75", "cuda:native"):
            with pytest.raises(TargetError, match=f"unknown target '{name}'"):
                Target.parse(name)

    def test_sms_option(self):
        limited = Target.parse("cuda:sm_86,sms=72")
        assert limited.key() == "cuda/sm_86/72"
        assert limited.shared_memory_bytes == PRESETS["sm_86"].shared_memory_bytes
        with pytest.raises(TargetError, match=r"sms=<positive number>"):
            Target.parse("sm_86,cores=2")

    def test_unknown_name_lists_the_presets(self):
        with pytest.raises(TargetError, match=r"unknown target 'znver9'.*native.*sapphirerapids.*znver4"):
            Target.parse("znver9")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"kind": "llvm"', "malformed target JSON"),
            ('{"kind": "vulkan"}', "kind 'llvm' or 'cuda', got kind 'vulkan'"),
            ({}, "got kind None"),
            ("llvm mcpu=znver4", "expected '-option=value', got 'mcpu=znver4'"),
            ("llvm -mcpu", "expected '-option=value', got '-mcpu'"),
            ("cuda -arch=sm_10", "unknown CUDA arch 'sm_10'"),
        ],
    )
    def test_malformed(self, text, message):
        with pytest.raises(TargetError, match=message):
            Target.parse(text)


class TestTarget:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_json_round_trip(self, name):
        assert Target.from_json(PRESETS[name].to_json()) == PRESETS[name]

    def test_from_json_names_unknown_and_missing_fields(self):
        with pytest.raises(TargetError, match=r"unknown target fields \['sockets'\]"):
            Target.from_json({**PRESETS["znver4"].to_json(), "sockets": 2})
        fields = PRESETS["znver4"].to_json()
        del fields["arch"]
        with pytest.raises(TargetError, match="arch"):
            Target.from_json(fields)

    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_limits_are_plausible(self, name):
        preset = PRESETS[name]
        if preset.kind == "cpu":
            assert 0 < preset.l1d_bytes < preset.l2_bytes < preset.l3_bytes
            assert (preset.vector_bits, preset.vector_registers) == vector_shape(preset.features)
            assert preset.key() == f"cpu/{preset.arch}/{preset.cores}"
        else:
            assert preset.shared_memory_bytes > 48 * 1024
            assert preset.shared_memory_per_sm_bytes == preset.shared_memory_bytes + 1024
            assert preset.registers_per_block == preset.registers_per_sm == 65536
            assert preset.registers_per_thread == 255
            assert preset.threads_per_block <= 32 * preset.warps_per_sm
            assert preset.blocks_per_sm <= preset.warps_per_sm
            assert preset.sm_count > 0
            assert preset.has("mma.sync", "cp.async", "bf16")
            assert preset.has("wgmma") == (preset.name == "sm_90a")
        assert list(preset.features) == sorted(preset.features)

    def test_frozen_and_hashable(self):
        assert len({PRESETS["znver4"], PRESETS["znver4"].with_cores(8)}) == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            PRESETS["znver4"].cores = 1

    def test_lanes(self):
        assert PRESETS["znver4"].lanes() == 16
        assert PRESETS["znver4"].lanes("bfloat16") == 32
        assert PRESETS["x86-64-v3"].lanes("float32") == 8
        assert PRESETS["aarch64-neon"].lanes("int8") == 16

    def test_has(self):
        assert PRESETS["znver4"].has("avx2", "avx512bf16")
        assert not PRESETS["znver4"].has("avx2", "amx-bf16")

    def test_with_cores(self):
        assert PRESETS["x86-64-v3"].with_cores(64).logical_cores == 64
        with pytest.raises(TargetError, match="at least 1 core, got 0"):
            PRESETS["x86-64-v3"].with_cores(0)

    def test_dtype_bits(self):
        assert [dtype_bits(d) for d in ("float32", "bfloat16", "int8", "int64")] == [32, 16, 8, 64]
        with pytest.raises(TargetError, match="sized dtype"):
            dtype_bits("float")


class TestDetection:
    def test_features_of_a_zen4_cpuinfo(self, monkeypatch):
        serve_files(monkeypatch, {"/proc/cpuinfo": f"processor\t: 0\nmodel name\t: AMD EPYC 9R14\n{ZEN4_FLAGS}\n\n"})
        assert set(host_features()) == set(PRESETS["znver4"].features)
        assert vector_shape(host_features()) == (512, 32)

    def test_features_of_an_arm_cpuinfo(self, monkeypatch):
        serve_files(monkeypatch, {"/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 sve\n"})
        assert host_features() == ("bf16", "dotprod", "neon", "sve")
        assert vector_shape(host_features()) == (128, 32)

    def test_no_cpuinfo_means_no_features(self, monkeypatch):
        serve_files(monkeypatch, {})
        assert host_features() == ()
        assert vector_shape(()) == (128, 16)

    def test_hyperthreads_are_not_cores(self, monkeypatch):
        topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        serve_files(monkeypatch, {topology.format(cpu): f"{cpu % 2},{cpu % 2 + 2}\n" for cpu in range(4)})
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
        assert available_cpus() == (0, 1, 2, 3)
        assert physical_cores() == 2

    def test_affinity_limits_cores(self, monkeypatch):
        serve_files(monkeypatch, {})
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
        assert available_cpus() == (5,)
        assert physical_cores() == 1

    @pytest.mark.parametrize(
        ("features", "expected"),
        [
            (PRESETS["x86-64-v4"].features, "x86-64-v4"),
            (PRESETS["x86-64-v3"].features, "x86-64-v3"),
            (("neon",), "generic"),
            ((), "x86-64"),
        ],
    )
    def test_level_where_llvm_knows_no_name(self, monkeypatch, features, expected):
        monkeypatch.setitem(sys.modules, "tvm", None)
        assert target_module._native_mcpu(features) == expected

    def test_native_describes_this_machine(self):
        machine = native()
        assert machine.kind == "cpu"
        assert machine.cores == physical_cores()
        assert machine.features == host_features()
        assert machine.vector_bits in (128, 256, 512)
        assert machine.l1d_bytes < machine.l2_bytes
