"""Spike that freezes the order of the packed int4 and int8 weights: packings, kernels, checks, timings.

A tile is 64 rows (n = 16 w + 8 r + g) by 64 columns (k = 32 p + 16 i + 8 h + 2 t + e). Order "pair" keeps the
rows g and g + 8 in a word, "row" one row, "study" is a kernel's whose storage is tied to its K step.
`python -m benchmarks.layout_spike --out DIR` needs a GPU and writes a CSV, `--compile-only` needs none.
"""

# fmt: off
# pyright: reportFunctionMemberAccess=false, reportIndexIssue=false
# pyright: reportUntypedFunctionDecorator=false, reportUntypedNamedTuple=false
import argparse
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.record import provenance, write_rows

AXES = "Enwrgkjpihte"  # E expert, n tile of rows, k step of a kernel, j tile of columns in it; rest above
ORDERS = {  # the axes of the words, outermost first, and the axes within a word with their shifts
    ("pair", 4): ("Enkjwgtpi", {"e": 16, "h": 8, "r": 4}),
    ("pair", 8): ("Enkjpwgtih", {"e": 16, "r": 8}),
    ("row", 4): ("Enkjwrgtp", {"e": 16, "i": 8, "h": 4}),
    ("row", 8): ("Enkjwrgtpi", {"e": 16, "h": 8}),
    ("study", 4): ("Eknwrgtjp", {"e": 16, "i": 8, "h": 4}),
}
BANDWIDTH, COMPUTE = 4.3e6, 790e6  # bytes and FLOPs in a microsecond: what an H200 reaches
Tensors = tuple[torch.Tensor, ...]


def locate(n: int, k: int, bits: int) -> tuple[int, int]:
    """Word and lowest bit of weight (n, k) of a 64 x 64 tile in the order "pair", the frozen formula."""
    lane = n // 16 * 128 + n % 8 * 16 + k % 8 // 2 * 4
    if bits == 4:
        return lane + k // 16, 16 * (k % 2) + 8 * (k // 8 % 2) + 4 * (n // 8 % 2)
    return k // 32 * 512 + lane + k // 16 % 2 * 2 + k // 8 % 2, 16 * (k % 2) + 8 * (n // 8 % 2)


def pack(codes: torch.Tensor, bits: int, order: str, step: int = 64) -> torch.Tensor:
    """Pack uint8 codes [E, N, K] to int32 [E, N/64, K/64, 128*bits]; only "study" depends on `step`."""
    e, n, k = codes.shape
    view = codes.view(e, n // 64, 4, 2, 8, k // step, step // 64, 2, 2, 2, 4, 2)
    words, shifts = ORDERS[order, bits]
    kept = [a for a in AXES if a not in shifts]
    out = torch.zeros(e * n * k * bits // 32, dtype=torch.int32, device=codes.device)
    for values in itertools.product((0, 1), repeat=len(shifts)):
        at = dict(zip(shifts, values, strict=True))
        part = view[tuple(at.get(a, slice(None)) for a in AXES)].permute([kept.index(a) for a in words])
        out |= part.flatten().to(torch.int32) << sum(shifts[a] * v for a, v in at.items())
    return out.view(e, n // 64, k // 64, 128 * bits)


def pack_pairs(v: torch.Tensor) -> torch.Tensor:
    """Pack 16-bit scales or zeros [E, N, groups] to int32 [E, N/64, groups, 32]: row g low, g + 8 high."""
    e, n, groups = v.shape
    bits = v.contiguous().view(torch.int16).view(e, n // 64, 4, 2, 8, groups).permute(0, 1, 5, 2, 4, 3)
    return bits.contiguous().view(torch.int32).view(e, n // 64, groups, 32)


def prepare(pairs: torch.Tensor, order: str, bits: int, kind: str) -> torch.Tensor:
    """Fold the dequantisation's powers of two into the pairs ("sym", "scale" or "zero"), once, at load."""
    raw = pairs.view(torch.int16).unflatten(-1, (32, 2))
    v = (raw if kind == "zero" else raw.view(torch.bfloat16)).float()
    high = 2.0**9 if (order, bits) == ("pair", 4) else 2.0**13
    factor = {"zero": (-2.0**-6,) * 2, "scale": (64.0,) * 2, "sym": (2.0**13, high)}[kind]
    v = v * (2.0**120 if kind == "sym" else 1) * torch.tensor(factor, device=pairs.device)
    return v.bfloat16().view(torch.int16).flatten(-2).view(torch.int32)


@triton.jit
def fma2(a, b, c=0x80008000):
    """a b + c on two bf16; with c = -0, the default, a product (mul.bf16x2 needs sm_90)."""
    asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], tl.int32, True, 1)


@triton.jit
def low_high(p):
    asm: tl.constexpr = "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;"
    return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [p], (tl.int32, tl.int32), True, 1)


@triton.jit
def dequant(q, s, c, SHIFT: tl.constexpr, ZP: tl.constexpr):
    """Two weights: q s + c, or (q 2^SHIFT + c) s, q being subnormal bf16."""
    a = fma2(fma2(q, (SHIFT + 127) * 0x00800080, c), s) if ZP else fma2(q, s, c)
    return tl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [a], (tl.bfloat16,) * 2, True, 1)


@triton.jit
def expand(q, s0, s1, c0, c1, BITS: tl.constexpr, ZP: tl.constexpr):
    """The weights of a word, on new axes; a code at bit 0 of a bf16 is q 2^-133, one at bit 4 q 2^-129."""
    if BITS == 8:
        v0, v1 = dequant(q & 0x00FF00FF, s0, c0, 127, ZP)
        v2, v3 = dequant((q >> 8) & 0x00FF00FF, s1, c1, 127, ZP)
        return tl.join(tl.join(v0, v2), tl.join(v1, v3))
    else:
        v0, v1 = dequant(q & 0x000F000F, s0, c0, 127, ZP)
        v2, v3 = dequant(q & 0x00F000F0, s1, c1, 123, ZP)
        v4, v5 = dequant((q >> 8) & 0x000F000F, s0, c0, 127, ZP)
        v6, v7 = dequant((q >> 8) & 0x00F000F0, s1, c1, 123, ZP)
        return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def factors(sc, zc, PAIR: tl.constexpr, BITS: tl.constexpr, ZP: tl.constexpr, PREP: tl.constexpr):
    """Pairs (row, row + 8) of multiplier, multiplier of the high nibbles, addend; 0x42804280 is 2^6 twice."""
    if ZP:
        if PREP:
            return sc, sc, zc
        return fma2(sc, 0x42804280), sc, fma2(zc, 0xFF00FF00)  # z 2^-133 -> -z 2^-6
    if not PREP:
        sc = fma2(sc, 0x7B807B80)
        sc = fma2(sc, 0x44004600 if PAIR and BITS == 4 else 0x46004600)
    if BITS == 8:
        return sc, sc, fma2(sc, 0x80808080)  # -2^-126
    low = fma2(sc, 0x80808008 if PAIR else 0x80088008)  # -2^-130; high nibbles -2^-126
    return sc, fma2(sc, 0x3D803D80), low


@triton.jit
def pair_tile(q, sc, zc, NT: tl.constexpr, KT: tl.constexpr, KG: tl.constexpr, H: tl.constexpr,
              BITS: tl.constexpr, ZP: tl.constexpr, PREP: tl.constexpr):
    """NT x KT tiles in order "pair" to bf16 [64 NT, 64 KT]; KG x H groups along K."""
    s, _, c = factors(sc, zc, True, BITS, ZP, PREP)
    if BITS == 4:
        s0, s1 = low_high(s.reshape(NT, KG, H, 4, 8).permute(0, 1, 3, 4, 2).reshape(NT, KG, 1, 4, 8, 1, H, 1))
        c0, c1 = low_high(c.reshape(NT, KG, H, 4, 8).permute(0, 1, 3, 4, 2).reshape(NT, KG, 1, 4, 8, 1, H, 1))
        f = expand(q.reshape(NT, KG, KT // KG, 4, 8, 4, H, 4 // H), s0, s1, c0, c1, BITS, ZP)
        f = f.reshape(NT, KT, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    else:
        s0, s1 = low_high(s.reshape(NT, KG, 1, H, 1, 4, 8, 1, 1))
        c0, c1 = low_high(c.reshape(NT, KG, 1, H, 1, 4, 8, 1, 1))
        f = expand(q.reshape(NT, KG, KT // KG, H, 2 // H, 4, 8, 4, 4), s0, s1, c0, c1, BITS, ZP)
        f = f.reshape(NT, KT, 2, 4, 8, 4, 2, 2, 2, 2).permute(0, 3, 8, 4, 1, 2, 6, 7, 5, 9)
    return f.reshape(NT * 64, KT * 64)


@triton.jit
def rows_of(p, NT: tl.constexpr, KG: tl.constexpr, H: tl.constexpr):
    low, high = low_high(p)
    v = tl.join(low, high).reshape(NT, KG, H, 4, 8, 2).permute(0, 1, 3, 5, 4, 2)
    return v.reshape(NT, KG, 1, 64, 1, H, 1)


@triton.jit
def row_tile(q, sc, zc, NT: tl.constexpr, KT: tl.constexpr, KG: tl.constexpr, H: tl.constexpr,
             BITS: tl.constexpr, ZP: tl.constexpr, PREP: tl.constexpr):
    """The same for order "row"."""
    s, s_high, c = factors(sc, zc, False, BITS, ZP, PREP)
    s0, c0 = rows_of(s, NT, KG, H), rows_of(c, NT, KG, H)
    if BITS == 4:
        s1 = s0 if ZP else rows_of(s_high, NT, KG, H)
        f = expand(q.reshape(NT, KG, KT // KG, 64, 4, H, 2 // H), s0, s1, c0, c0, BITS, ZP)
        f = f.reshape(NT, KT, 64, 4, 2, 2, 2, 2).permute(0, 2, 1, 4, 5, 6, 3, 7)
    else:
        f = expand(q.reshape(NT, KG, KT // KG, 64, 4, H, 4 // H), s0, s0, c0, c0, BITS, ZP)
        f = f.reshape(NT, KT, 64, 4, 4, 2, 2).permute(0, 2, 1, 4, 5, 3, 6)
    return f.reshape(NT * 64, KT * 64)


@triton.jit
def study_tile(q, sc, BN: tl.constexpr, BK: tl.constexpr):
    """The same for order "study": the scale, twice in a word, comes per row."""
    wide = fma2(sc, 0x7B807B80)
    s0, s1 = fma2(wide, 0x46004600), fma2(wide, 0x44004400)
    c0 = fma2(sc, 0xC100C100)[:, None]
    f = expand(q, s0[:, None], s1[:, None], c0, c0, 4, False)
    return f.reshape(BN, 4, BK // 32, 2, 2, 2).permute(0, 2, 3, 4, 1, 5).reshape(BN, BK)


@triton.jit
def silu_mul(gate, up):
    gate = gate.to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def moe_gemm(x, w, s, z, out, sorted_ids, expert_ids, n_sorted, top_k, numel, N: tl.constexpr,
             K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
             BITS: tl.constexpr, ZP: tl.constexpr, PREP: tl.constexpr, ORDER: tl.constexpr,
             GATE_UP: tl.constexpr, FENCE: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr):
    """out[pair] = W[expert of pair] x[token of pair]; SwiGLU in registers if GATE_UP is "tiles" or "rows"."""
    NT: tl.constexpr = BN // 64
    KT: tl.constexpr = BK // 64
    TILE: tl.constexpr = 128 * BITS
    NG: tl.constexpr = BK // GROUP if GROUP < BK else 1
    KG: tl.constexpr = NG // 2 if GROUP == 32 else NG
    H: tl.constexpr = NG // KG
    nn: tl.constexpr = N // BN
    pid = tl.program_id(0)
    nm = tl.cdiv(tl.load(n_sorted), BM)
    if pid >= nm * nn:
        return
    first = pid // (8 * nn) * 8
    gm = tl.minimum(nm - first, 8)
    pm = first + (pid % (8 * nn)) % gm
    pn = (pid % (8 * nn)) // gm
    e = tl.load(expert_ids + pm).to(tl.int64)
    pair = tl.load(sorted_ids + pm * BM + tl.arange(0, BM))
    pmask = pair < numel
    xp = x + tl.where(pmask, pair // top_k, 0)[:, None] * K + tl.arange(0, BK)[None, :]
    if ORDER == "study":
        rn = pn * BN + tl.arange(0, BN)
        wp = w + e * (N * K // 8) + rn[:, None] * (BK // 8) + tl.arange(0, BK // 8)[None, :]
        sp = s + e * (N * K // 128) + rn
        zp = sp
    else:
        nt = pn * NT + tl.arange(0, NT)
        if GATE_UP == "tiles":
            nt = pn + tl.arange(0, 2) * (N // 128)
        wp = w + e * (N * K * BITS // 32) + nt[:, None] * (K // 64 * TILE) + tl.arange(0, KT * TILE)[None, :]
        so = nt[:, None] * (K // GROUP * 32) + tl.arange(0, NG * 32)[None, :]
        sp = s + e * (N * K // GROUP // 2) + so
        zp = z + e * (N * K // GROUP // 2) + so
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(0, K // BK, num_stages=STAGES):
        q = tl.load(wp, eviction_policy="evict_first")
        xt = tl.load(xp, mask=pmask[:, None], other=0.0) if MASK else tl.load(xp)
        group = k * BK // GROUP
        if ORDER == "study":
            f = study_tile(q, tl.load(sp + group * N), BN, BK)
            wp += N * (BK // 8)
        else:
            sc = tl.load(sp + group * 32)
            zc = tl.load(zp + group * 32) if ZP else sc
            if ORDER == "pair":
                f = pair_tile(q, sc, zc, NT, KT, KG, H, BITS, ZP, PREP)
            else:
                f = row_tile(q, sc, zc, NT, KT, KG, H, BITS, ZP, PREP)
            wp += KT * TILE
        acc = tl.dot(f, xt.T, acc)
        if FENCE:  # an opaque identity: nothing of the next step is moved above the wait for the wgmmas
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, False, 1)
        xp += BK
    y = acc.to(tl.bfloat16)
    ROWS: tl.constexpr = BN if GATE_UP == "" else BN // 2
    if GATE_UP == "tiles":
        gate, up = tl.split(y.reshape(2, 64, BM).permute(1, 2, 0))
        y = silu_mul(gate, up)
    elif GATE_UP == "rows":
        gate, up = tl.split(y.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1))
        y = silu_mul(gate, up).reshape(ROWS, BM)
    to = out + pair[None, :].to(tl.int64) * (N * ROWS // BN) + (pn * ROWS + tl.arange(0, ROWS))[:, None]
    tl.store(to, y, mask=pmask[None, :])


@triton.jit
def swiglu(gate_up, h, INTER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * INTER + col
    tl.store(h + row * INTER + col, silu_mul(tl.load(at), tl.load(at + INTER)))


# a w13-like grouped GEMM; bm: rows of a tile of tokens
Case = namedtuple("Case", "name e n k tokens top_k bm")
# what is compiled; gate_up: "" (plain), "act" (plain and an activation kernel), "tiles" or "rows" (fused)
Variant = namedtuple("Variant", "order bits zp group bn bk warps stages prep gate_up fence",
                     defaults=("pair", 4, False, 128, 128, 128, 4, 4, False, "", True))
CASES = (Case("decode qwen3 w13 M=64", 128, 1536, 2048, 64, 8, 16),
         Case("prefill mixtral w13 M=1024", 8, 28672, 4096, 1024, 2, 128),
         Case("prefill mixtral w13 M=1024", 8, 28672, 4096, 1024, 2, 64),
         Case("prefill qwen3 w13 M=4096", 128, 1536, 2048, 4096, 8, 128))


def label(v: Variant) -> str:
    end = {"": "", "act": " halves+activation", "tiles": " fused paired-tiles", "rows": " fused rows-of-8"}
    tile = f" bn{v.bn} bk{v.bk} w{v.warps} st{v.stages}{'' if v.fence else ' nofence'}"
    return v.order + (" prepared" if v.prep else "") + end[v.gate_up] + tile


def constants(v: Variant, c: Case) -> dict[str, object]:
    return {"N": c.n, "K": c.k, "BM": c.bm, "BN": v.bn, "BK": v.bk, "GROUP": v.group, "BITS": v.bits,
            "ZP": v.zp, "PREP": v.prep, "ORDER": v.order, "FENCE": v.fence, "MASK": c.bm <= 32,
            "GATE_UP": "" if v.gate_up == "act" else v.gate_up, "STAGES": v.stages}


def plans(case: Case) -> list[list[Variant]]:
    """Variants of a case, one list for each set of codes and scales that they share."""
    out = []
    for bits, zp, group in itertools.product((4, 8), (False, True), (32, 64, 128)):
        full, big = (bits, zp, group) == (4, False, 128), case.bm > 32
        if (case in CASES[2:] and not full) or (bits == 8 and zp and group < 128):
            continue
        v = Variant(bits=bits, zp=zp, group=group, bk=64 if big else 128)
        some = [v, v._replace(prep=True), v._replace(order="row")]
        if big and bits == 4:
            some += [v._replace(order=o, bk=128, stages=3) for o in ("pair", "row")]
        if full:
            fused = [v._replace(gate_up=g) for g in ("act", "tiles", "rows")]
            some += [v._replace(order="study"), *fused]
            if big:
                some += [v._replace(order=o, fence=False) for o in ("pair", "study")] + [v._replace(warps=8)]
                some += [s._replace(bk=128, stages=3) for s in (v._replace(order="study"), *fused)]
            else:
                some += [v._replace(order=o, bk=64, stages=6) for o in ("pair", "row", "study")]
                some += [v._replace(bn=64), v._replace(stages=3)]
        out.append(some)
    return out


def compile_static(job: tuple[Variant, Case, int]) -> str:
    """Compile without a GPU, or with 0 as the launch will, and count in the machine code of the K loop."""
    v, case, cap = job
    types = ["*bf16", "*i32", "*i32", "*i32", "*bf16", "*i32", "*i32", "*i32", "i32", "i32"]
    fixed, names = constants(v, case), moe_gemm.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(fixed, "constexpr")
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(8)}
    source = ASTSource(moe_gemm, signature, {(names.index(c),): value for c, value in fixed.items()}, attrs)
    if cap:
        made = triton.compile(source, target=GPUTarget("cuda", cap, 32), options={"num_warps": v.warps})
    else:
        like, pairs = [torch.bfloat16, *[torch.int32] * 3] * 2, case.tokens * case.top_k
        made = moe_gemm.warmup(*like, case.top_k, pairs, **fixed, num_warps=v.warps, grid=(1,))
    tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        sass, use = (subprocess.check_output([f"{tools}/{a}", b, f.name], text=True, stderr=subprocess.STDOUT)
                     for a, b in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    starts: dict[str, int] = {}
    body: list[str] = []
    items = re.findall(r"(?m)^(\.L_x_\d+):|^\s*/\*[0-9a-f]+\*/\s+((?:@!?U?P\w+ )?[A-Z][^;]*);", sass)
    for i, (mark, text) in enumerate(items):
        starts |= {mark: i} if mark else {}
        back = re.search(r"BRA\S* .*?(\.L_x_\d+)", text)
        loop = [t for _, t in items[starts[back[1]]:i] if t] if back and back[1] in starts else []
        body = loop if any("MMA" in t for t in loop) else body
    patterns = {"rs": r"HGMMA\S+ R\d+, R\d", "mma": "MMA", "waits": "WARPGROUP.DEPBAR", "sts": r"\bSTS",
                "lds128": r"LDS\S*\.128", "lds64": r"LDS\S*\.64", "lds32": r"\bLDS(\.U)? ", "ldg": "LDG[.]",
                "shfl": "SHFL"}
    counts = {name: sum(bool(re.search(p, t)) for t in body) for name, p in patterns.items()}
    counts |= {"loop": len(body), "spills": sass.count(" LDL"), "smem": made.metadata.shared}
    return " ".join(f"{name}={n}" for name, n in counts.items()) + " " + re.findall(r"REG:\d+", use)[0]


def route(case: Case, seed: int) -> Tensors:
    """Route at random: pairs sorted by expert and padded to tiles, expert of a tile, padded count, ids."""
    ids = torch.rand(case.tokens, case.e, generator=torch.Generator().manual_seed(seed))
    ids = ids.topk(case.top_k).indices.flatten()
    counts = torch.bincount(ids, minlength=case.e)
    tiles = (counts + case.bm - 1) // case.bm
    total = min(ids.numel(), case.e) + ids.numel() // case.bm
    rows = torch.full((total * case.bm,), ids.numel(), dtype=torch.int32)
    order = ids.argsort(stable=True)
    start = ((tiles.cumsum(0) - tiles) * case.bm)[ids[order]] - (counts.cumsum(0) - counts)[ids[order]]
    rows[start + torch.arange(ids.numel())] = order.int()
    experts = torch.arange(case.e).repeat_interleave(tiles).int()
    experts = torch.nn.functional.pad(experts, (0, total - experts.numel()))
    return rows.cuda(), experts.cuda(), (tiles.sum() * case.bm).int().view(1).cuda(), ids.cuda()


def measure(sets: list[list[Callable[[], None]]], repeats: int) -> list[list[float]]:
    """Microseconds a launch (p20, p50, p80); a set is a CUDA graph over the routings; the sets take turns."""
    graphs = [torch.cuda.CUDAGraph() for _ in sets]
    for graph, launches in zip(graphs, sets, strict=True):
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
    us: list[list[float]] = [[] for _ in sets]
    for _, (i, graph) in itertools.product(range(repeats), enumerate(graphs)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the graph is queued by the time the clock starts
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        us[i].append(begin.elapsed_time(end) * 1e3 / len(sets[i]))
    return [torch.tensor(t[2:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for t in us]


def by_eights(v: torch.Tensor, interleave: bool) -> torch.Tensor:
    return v.unflatten(1, (2, -1, 8)).transpose(1, 2).flatten(1, 3) if interleave else v


def make(case: Case, v: Variant) -> Tensors:
    """Random codes, scales, zero points and x, x W^T in float64 for the first routing, and SwiGLU of it."""
    torch.manual_seed(v.group + v.bits)
    small = (case.e, case.n, case.k // v.group)
    codes = torch.randint(0, 1 << v.bits, (case.e, case.n, case.k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(small, device="cuda") * 0.028 + 1e-3
    scales = (scales * (torch.randint(0, 2, small, device="cuda") * 2 - 1) * 2.0 ** (4 - v.bits)).bfloat16()
    zeros = torch.randint(0, (1 << v.bits) + 1, small, dtype=torch.int16, device="cuda")
    zeros = zeros if v.zp else torch.full_like(zeros, 1 << (v.bits - 1))
    x = torch.randn(case.tokens, case.k, device="cuda").bfloat16()
    ids = route(case, 0)[3]
    want = torch.zeros(ids.numel(), case.n, dtype=torch.float64, device="cuda")
    for e in ids.unique().tolist():
        w = codes[e].double() - zeros[e].double().repeat_interleave(v.group, 1)
        w *= scales[e].double().repeat_interleave(v.group, 1)
        want[ids == e] = x[(ids == e).nonzero().flatten() // case.top_k].double() @ w.T
    gate, up = want.chunk(2, 1)
    return codes, scales, zeros, x, want, torch.nn.functional.silu(gate) * up


def launcher(case: Case, v: Variant, data: Tensors) -> tuple[Callable[[Tensors], None], torch.Tensor]:
    """A launch for a routing, and the tensor that it fills."""
    rows = v.gate_up == "rows"
    w = pack(by_eights(data[0], rows), v.bits, v.order, v.bk if v.order == "study" else 64)
    s, z = (pack_pairs(by_eights(t, rows)) for t in data[1:3])
    if v.order == "study":
        s = data[1].transpose(1, 2).contiguous().view(torch.int16).int() & 0xFFFF
        s |= s << 16
    elif v.prep:
        s, z = prepare(s, v.order, v.bits, "scale" if v.zp else "sym"), prepare(z, v.order, v.bits, "zero")
    pairs, inter = case.tokens * case.top_k, case.n // 2
    out, h = (torch.empty(pairs, n, dtype=torch.bfloat16, device="cuda") for n in (case.n, inter))

    def launch(r: Tensors) -> None:
        to = out if v.gate_up in ("", "act") else h
        grid = (r[1].numel() * (case.n // v.bn),)
        moe_gemm[grid](data[3], w, s, z, to, r[0], r[1], r[2], case.top_k, pairs, **constants(v, case),
                       num_warps=v.warps)
        if v.gate_up == "act":
            swiglu[(pairs, inter // 256)](out, h, INTER=inter, BLOCK=256)

    return launch, h if v.gate_up else out


def run_set(case: Case, variants: list[Variant], repeats: int) -> list[dict[str, object]]:
    """Check and time the variants that share codes, scales and zero points."""
    data = make(case, variants[0])
    routings = [route(case, seed) for seed in range(8 if case.bm <= 32 else 4)]
    active, flops = sum(r[3].unique().numel() for r in routings) / len(routings), 2 * case.tokens * case.top_k
    sets: list[list[Callable[[], None]]] = []
    rows: list[dict[str, object]] = []
    unfused: torch.Tensor | None = None
    for v in variants:
        launch, result = launcher(case, v, data)
        ref = data[5] if v.gate_up else data[4]
        runs: list[torch.Tensor] = []
        for _ in range(20):
            result.fill_(math.nan)
            launch(routings[0])
            runs.append(result.clone())
        errors = torch.stack([(y.double() - ref).norm() / ref.norm() for y in runs])
        error = errors.nan_to_num(math.inf, math.inf).max().item()
        same = all(torch.equal(runs[0], y) for y in runs)
        unfused = runs[0] if v.gate_up == "act" else unfused
        equal = v.gate_up == "" or (unfused is not None and torch.equal(unfused, runs[0]))
        good = same and equal and error <= (6e-3 if v.gate_up else 3e-3)
        size = active * (v.bits / 8 + 2 * (1 + v.zp) / v.group)
        print(f"{'ok ' if good else 'BAD'} {case} {v.bits} bits zp={v.zp} g{v.group} {label(v)}: "
              f"error {error:.2e}, 20 runs equal: {same}, fused equals unfused: {equal}", flush=True)
        sets.append([partial(launch, r) for r in routings])
        rows.append({"case": case.name, "variant": label(v), "bits": v.bits, "zero_points": int(v.zp),
                     "group": v.group, "row_tile": case.bm, "rel_err": f"{error:.2e}",
                     "floor_us": f"{case.n * case.k * max(size / BANDWIDTH, flops / COMPUTE):.1f}"})
    for row, found in zip(rows, measure(sets, repeats), strict=True):
        row |= {f"us_p{p}": f"{us:.1f}" for p, us in zip((20, 50, 80), found, strict=True)}
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    for bits, n, k in itertools.product((4, 8), (5, 27, 63), (3, 46, 57)):  # pack agrees with locate
        codes = torch.zeros(1, 64, 64, dtype=torch.uint8)
        codes[0, n, k] = 1
        word, bit = locate(n, k, bits)
        assert int(pack(codes, bits, "pair").flatten()[word]) == 1 << bit
    jobs = [(v, case, cap) for cap in ((90, 80) if args.compile_only else (0,))
            for case in CASES for some in plans(case) for v in some]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as workers:
        for (v, c, cap), found in zip(jobs, workers.map(compile_static, jobs, chunksize=2), strict=True):
            print(f"sm_{cap} bm{c.bm} {v.bits} bits zp={v.zp} g{v.group} {label(v)}: {found}", flush=True)
    if args.compile_only:
        return
    fixed = provenance("cuda", args.commit, triton=triton.__version__)
    columns = "case variant bits zero_points group row_tile us_p20 us_p50 us_p80 floor_us rel_err".split()
    rows = (row for case in CASES for some in plans(case) for row in run_set(case, some, args.repeats))
    write_rows(Path(args.out, "layout_spike.csv"), fixed, columns, rows)


if __name__ == "__main__":
    main()
