"""Attention of a few queries over many keys, as in decoding with a cache, on CPUs.

Bound by memory: each key and value is read once, for all the query heads that share it and all their queries ("rows").
A sequence's keys may be split between cores; each split keeps its own maximum, sum and weighted sum, combined last
(Dao et al., "Flash-Decoding", 2023).

    scores[r, j…j+lanes] = sums of key[j] · query[r]     lanes run over the head, then one shuffle tree sums a tile
    out[r, :] += scores[r, j] · value[j, :]              value read as it lies, one scalar broadcast a multiply-add

Lengths are operands: keys past a sequence's length are neither visited nor read. A split may read its keys from several
places in turns (``streams``), which memory answers faster than one.

Ladder (one query, 32 heads on 8 of 64, 2,048 keys, float32, operands from memory at 35 GB/s; 2 cores of Zen 4):

    one row at a time, blocks of 128 keys      20 GB/s
    + each key read once for four rows         28
    + blocks of 16 keys                        35
    prefetch of values while keys are scored   18  (of the next keys too: 22)

The same on 2 cores of Emerald Rapids, GB/s of the 25 it reads, keys and values from memory, 2,048 and 4,096 keys:

                                                     float32          bfloat16
    heads                                          12/12   32/8     12/12   32/8
    as above                                         20    14         16    13
    + 16 keys and values asked for ahead, into the
      second-level cache, one at a time between the
      weighted sums (all of a block at once: 16-20)  22    21         21    17
    + pairs widened once for four rows, all of a head
      in one pass over the values                    23    21         22    18
    + scores of 16 keys and four rows by AMX: 22 to 28 % faster from caches, 8 % slower from memory, left out

The same on 2 cores of Zen 3 (AVX2: the sums of four rows do not fit its 16 registers), float32, GB/s of about 25 from
memory, in PyTorch's layout, 2,048 keys:

    heads                                            12/12   9/3   32/8   32/8 of 128
    as above, blocks of 8 keys                          25    12     14     10
    + blocks of 64 keys, asked for 16 ahead; sums
      between blocks in memory, for LLVM would carry
      all of them through every loop, most of them on
      the stack; three rows together where there are
      three                                             23    17     21     13
    the same, asked for a whole block ahead             22    15     18     13

and with heads side by side, where a head's keys are 4 · head_dim · heads bytes apart, µs at 900 of 1,024 keys:

    heads                                            12/12   9/3   32/8   32/4    6/6
    as above, blocks of 8 keys                         461   215    481    320    225
    + blocks of 64 keys, asked for 16 ahead, and so on       133    415    269
    + all heads of some keys on a core, nothing asked
      for ahead                                        308   123    405    258    166
    + each row by itself, 8 sums of a row at a time    308   114    315    190    166
    + scores of 8 keys of every head in turn           250   118    290    192    147

Most of what is left between the two layouts (9/3: 18 and 12 GB/s) is how memory is met: values of a head in one piece
or in pieces of 256 bytes. (Heads in turn for those too, after 16 keys: 12/12 7 % less time, 9/3 5 % more.) So caches
have their heads apart; µs from memory at 500 of 512 keys, in two minutes of the host for 12/12:

    heads                                            12/12      9/3   32/8    6/6
    side by side, as above                           103, 130    62    154     75
    apart, one row with blocks of 8 keys             133, 125           -      77
    + blocks of 64 keys                              123, 113    41    109     64
    blocks of 256 keys                                    114    43    100     60

Beside linear layers, which read 33 to 42 GB/s in four to six streams a core, one stream is slow. GB/s at 500 of 512 and
2,036 of 2,048 keys of a cache, two runs each (2 streams: half of what 4 bring; 8: nothing):

    heads                                            12/12               9/3              32/8
    as above                                     26, 29, 27, 30    17, 21, 20, 20    22, 22, 22, 20
    keys from four places in turns               28, 31, 30, 34    17, 22, 22, 22    25, 26, 25, 21

Grouped heads then still wait for memory while values are summed and leave it idle while keys are scored. GB/s of the 40
that memory gave, a cache among 160 MB of others, 500 and 2,036 keys:

    heads                                                              12/12      9/3       32/8
    as above                                                          39, 42    24, 30    27, 30
    values asked for as their keys are scored, the next block's keys
      as values are summed, each pass some lines of them              39, 40    26, 30    32, 34
    + blocks of 32 keys (12/12: as above)                             39, 42    27, 33    33, 37
    the same with blocks of 32 keys, all asked for 16 ahead                     23, 28    24, 25
    keys 16 ahead and whole in the first pass, values as they come: 0 to 5 % slower than by passes

The same on Emerald Rapids, GB/s of the 23 to 24 it read then (12/12, 32/8: 2,036 of 2,048 keys; 9/3: 768 of 1,024):

                                                     float32              bfloat16
    heads                                        12/12   9/3   32/8    12/12   9/3   32/8
    from one place                                25.6  17.7   17.5     17.8  12.4   14.4
    from two                                      26.1  17.7   17.9     18.7  13.9   15.6
    from four                                     26.1  18.5   19.7     19.9  13.9   16.6
    + 32 keys ahead instead of 16: 2 to 4 % slower; blocks of 32 and 64 keys, from the caches up to 1.3 times as fast:
      0 to 6 % slower (with keys asked for while others are scored: 1 % faster)
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import Attention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.attention_decode_kernel import DecodeKernel
from attntune.templates.cpu.vectors import asks_ahead
from attntune.templates.template import ScheduleTemplate

#: Queries of one sequence that still count as few, and rows that share a key.
MAX_QUERIES, MAX_ROWS = 4, 32
#: Keys and values that are asked for before they are multiplied.
_AHEAD = 16


class AttentionDecodeCPU(ScheduleTemplate):
    """Few queries, many keys: split over keys, every key and value read once."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cpu"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Up to four queries a sequence; keys and values of their own, with or without lengths; float32 or bfloat16."""
        w = _attention(workload)
        plain = w.dtype in ("float32", "bfloat16") and not (w.packed or w.ragged or w.weights) and w.lengths != "qkv"
        return plain and w.q_len <= MAX_QUERIES and w.q_len * (w.heads // w.kv_heads) <= MAX_ROWS

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Splits of the keys, keys a block, and rows that scores and weighted sums keep in registers."""
        w = _attention(workload)
        lanes = target.lanes("float32")
        rows = w.q_len * (w.heads // w.kv_heads)
        most = math.ceil(w.kv_len / (4 * lanes))
        splits = sorted({1, 2, 4, target.cores, 2 * target.cores, 4 * target.cores})
        blocks = tuple(b for b in (1, 2, 4, 8, 16) if b == 1 or (b - 1) * lanes < w.kv_len)
        knobs = [
            Knob("splits", tuple(s for s in splits if s == 1 or s <= most)),
            Knob("key_vectors", blocks),
            Knob("score_rows", tuple(r for r in (1, 2, 4) if r == 1 or r <= rows)),
            Knob("out_rows", tuple(r for r in (1, 2, 3, 4) if r <= rows)),
            Knob("prefetch", (0, _AHEAD)),
            # Whether a core reads some keys of all heads, which lie side by side, rather than all keys of some heads.
            Knob("heads_inside", (False, True) if w.kv_heads > 1 and not w.heads_apart("key") else (False,)),
            # Places from which a core reads its keys in turns.
            Knob("streams", (1, 2, 4)),
        ]
        if target.vector_registers < 32:
            # Whether values are asked for while their keys are scored, and the next block's keys while values are
            # summed; not known to help elsewhere.
            knobs.append(Knob("prefetch_in_turn", (False, True)))

        def fits(config: Config) -> bool:
            if config.get("prefetch_in_turn", False):
                return not config["prefetch"] and not config["heads_inside"]
            return config["streams"] == 1 or not config["heads_inside"]

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The fewest splits that keep every core busy; small blocks, and keys read once for as many rows as fit.

        Keys and values take turns in small pieces, so that all streams stay with the prefetchers; heads that lie apart
        are read from four places at a time (measured on Zen 3 and Emerald Rapids). With few registers a block's own
        cost counts for more than that, grouped heads ask for values while they score keys and for keys while they sum
        values, and heads that lie side by side are read as they lie.
        """
        w = _attention(workload)
        rows = w.q_len * (w.heads // w.kv_heads)
        few = target.vector_registers < 32
        inside = few and not w.heads_apart("key")
        # What is masked at the end of a cache is a block's own cost too. (Without: 3 % faster with small ones.)
        in_turn = few and rows > 1 and not inside
        wanted = 4 if in_turn else 8 if inside or (few and w.lengths) else 1
        asks = not few and asks_ahead(target)

        def cost(config: Config) -> tuple[float, str]:
            tasks = _tasks(w, config)
            imbalance = math.ceil(tasks / target.cores) * target.cores / tasks
            block = 1.0 + 0.02 * abs(math.log2(config.integer("key_vectors") / wanted))
            scored, summed = config.integer("score_rows"), config.integer("out_rows")
            # Rows that are summed for nothing, to fill the last tile, come on top.
            held = 1.0 + 0.02 / scored + 0.02 / summed + 0.02 * (math.ceil(rows / summed) * summed / rows - 1)
            if config["heads_inside"] and few:
                # Such a block is in the first-level cache, where each row may read it by itself.
                held = 1.0 + 0.01 * scored + 0.01 * summed
            asked = 1.0 if bool(config["prefetch"]) == asks else 1.01
            asked *= 1.0 if config.get("prefetch_in_turn", in_turn) == in_turn else 1.01
            order = 1.0 if config["heads_inside"] == inside else 1.05
            order *= 1.0 if config["streams"] == (1 if config["heads_inside"] else 4) else 1.02
            return imbalance * block * held * asked * order * (1.0 + 0.01 * config.integer("splits")), config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": DecodeKernel(_attention(workload), target, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, balance, and a block of keys and values against the first-level cache."""
        w = _attention(workload)
        tasks = _tasks(w, config)
        keys = config.integer("key_vectors") * target.lanes("float32")
        return {
            **super().features(workload, target, config),
            "imbalance": math.ceil(tasks / target.cores) * target.cores / tasks,
            "block_in_l1": 8.0 * keys * w.head_dim / target.l1d_bytes,
            "keys_per_split": w.kv_len / config.integer("splits"),
            "rows": float(w.q_len * (w.heads // w.kv_heads)),
        }


def _tasks(w: Attention, config: Config) -> int:
    return w.batch * config.integer("splits") * (1 if config["heads_inside"] else w.kv_heads)


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
