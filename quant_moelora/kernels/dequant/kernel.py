"""Dequantisation in registers: tiles of ``frag64.v1`` words to the matrix unit's left operand.

A code is not converted, but read as a subnormal number: in a 16-bit float whose other bits are zero, a code q at bit 0
is q * 2**-133 (bfloat16) or q * 2**-24 (float16), and one at bit 4 is 16 times that. Then, with s and z the scale and
the zero point of its group,

    one step (bfloat16, symmetric):  w = fma(q, s * 2**133, -z * s)
    two steps:                       w = fma(q, 2**a, -z * 2**b) * (s * 2**-b), whose first step is exact

where -z * s is exact, so that the first form rounds once, as the second does, which needs no z * s: both give
(q - z) * s, rounded to the nearest. The exponents are in `prepare.recipe`, with which scales and zero points are
prepared.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl


@triton.jit
def _fma2(a, b, c, FP16: tl.constexpr):
    """a * b + c on the two 16-bit floats of each int32."""
    if FP16:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)


@triton.jit
def _low_high(pairs):
    """The low and the high 16 bits of each int32, both twice."""
    asm: tl.constexpr = "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;"
    return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [pairs], (tl.int32, tl.int32), True, 1)


@triton.jit
def _halves(word, FP16: tl.constexpr):
    """The two 16-bit floats of an int32."""
    if FP16:
        return tl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], (tl.float16,) * 2, True, 1)
    else:
        return tl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], (tl.bfloat16,) * 2, True, 1)


@triton.jit
def _weights(codes, scale, addend, HIGH: tl.constexpr, ONE_STEP: tl.constexpr, FP16: tl.constexpr):
    """Two weights from two codes at bit 0 (or 4: HIGH) of the halves of an int32."""
    if ONE_STEP:
        return _halves(_fma2(codes, scale, addend, FP16), FP16)
    else:
        # 2**127 and 2**123 (bfloat16), 2**15 and 2**11 (float16), in both halves
        if FP16:
            power: tl.constexpr = 0x68006800 if HIGH else 0x78007800
        else:
            power: tl.constexpr = 0x7D007D00 if HIGH else 0x7F007F00
        return _halves(_fma2(_fma2(codes, power, addend, FP16), scale, -0x7FFF8000, FP16), FP16)  # + -0


@triton.jit
def _expand(q, s0, s1, c0, c1, BITS: tl.constexpr, ONE_STEP: tl.constexpr, FP16: tl.constexpr):
    """The weights of each word, on new axes: (e, rh, kh) for int4, (e, rh) for int8."""
    if BITS == 8:
        v0, v1 = _weights(q & 0x00FF00FF, s0, c0, False, ONE_STEP, FP16)
        v2, v3 = _weights((q >> 8) & 0x00FF00FF, s1, c1, False, ONE_STEP, FP16)
        return tl.join(tl.join(v0, v2), tl.join(v1, v3))
    else:
        v0, v1 = _weights(q & 0x000F000F, s0, c0, False, ONE_STEP, FP16)
        v2, v3 = _weights(q & 0x00F000F0, s1, c1, True, ONE_STEP, FP16)
        v4, v5 = _weights((q >> 8) & 0x000F000F, s0, c0, False, ONE_STEP, FP16)
        v6, v7 = _weights((q >> 8) & 0x00F000F0, s1, c1, True, ONE_STEP, FP16)
        return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def _factors(s, z, SPEC: tl.constexpr):
    """What the low and the high row's codes are multiplied with (two), and what is added to them (two).

    ``s`` and ``z`` are prepared pairs; without zero points ``z`` is an int32 with every code's addend in both halves.
    """
    s0, s1 = _low_high(s)
    if SPEC.zeros:
        c0, c1 = _low_high(z)
    elif SPEC.one_step:
        # -8 s (or -128 s) from s * 2**133 (times 2**-130 or 2**-126), and from s * 2**129 (times 2**-126)
        low: tl.constexpr = -0x7FF77FF8 if SPEC.bits == 4 else -0x7F7F7F80
        c0, c1 = _fma2(s0, low, -0x7FFF8000, False), _fma2(s1, -0x7F7F7F80, -0x7FFF8000, False)
    else:
        c0, c1 = z, z
    return s0, s1, c0, c1


@triton.jit
def expanded(words, s, z, SPEC: tl.constexpr):
    """The weights of each word, on new axes: (kh, rh, e) for int4, (rh, e) for int8.

    ``s`` and ``z`` are the pairs of `_factors`, of as many dimensions as ``words``.
    """
    s0, s1, c0, c1 = _factors(s, z, SPEC)
    return _expand(words, s0, s1, c0, c1, SPEC.bits, SPEC.one_step, SPEC.fp16)


@triton.jit
def _plain_weights(codes, scale, zero, FP16: tl.constexpr):
    """The definition, for the interpreter: scale and zero are float32."""
    return ((codes.to(tl.float32) - zero) * scale).to(tl.float16 if FP16 else tl.bfloat16)


@triton.jit
def _plain_expand(q, s0, s1, z0, z1, BITS: tl.constexpr, FP16: tl.constexpr):
    """As `_expand`, with float32 scales and zero points."""
    if BITS == 8:
        v0 = _plain_weights(q & 255, s0, z0, FP16)
        v1 = _plain_weights((q >> 16) & 255, s0, z0, FP16)
        v2 = _plain_weights((q >> 8) & 255, s1, z1, FP16)
        v3 = _plain_weights((q >> 24) & 255, s1, z1, FP16)
        return tl.join(tl.join(v0, v2), tl.join(v1, v3))
    else:
        v0 = _plain_weights(q & 15, s0, z0, FP16)
        v1 = _plain_weights((q >> 16) & 15, s0, z0, FP16)
        v2 = _plain_weights((q >> 4) & 15, s1, z1, FP16)
        v3 = _plain_weights((q >> 20) & 15, s1, z1, FP16)
        v4 = _plain_weights((q >> 8) & 15, s0, z0, FP16)
        v5 = _plain_weights((q >> 24) & 15, s0, z0, FP16)
        v6 = _plain_weights((q >> 12) & 15, s1, z1, FP16)
        v7 = _plain_weights((q >> 28) & 15, s1, z1, FP16)
        return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def _plain_low_high(pairs, SCALES: tl.constexpr, FP16: tl.constexpr):
    """Low and high value of each pair as float32: 16-bit floats, or integer zero points."""
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    if not SCALES:
        return low.to(tl.float32), high.to(tl.float32)
    if FP16:
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (low.to(tl.int32) << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _plain_expanded(words, s, z, SPEC: tl.constexpr):
    """As `expanded`."""
    s0, s1 = _plain_low_high(s, True, SPEC.fp16)
    if SPEC.zeros:
        z0, z1 = _plain_low_high(z, False, SPEC.fp16)
    else:
        z0, z1 = 1 << (SPEC.bits - 1), 1 << (SPEC.bits - 1)
    return _plain_expand(words, s0, s1, z0, z1, SPEC.bits, SPEC.fp16)


@triton.jit
def _by_word(pairs, NT: tl.constexpr, KG: tl.constexpr, HQ: tl.constexpr, HR: tl.constexpr, BITS: tl.constexpr):
    """Pairs [NT, KG * HQ * HR * 32] where the words of their groups are, with 1 where they are the same for all."""
    by_group = pairs.reshape(NT, KG, HQ, HR, 4, 8)
    if BITS == 4:  # words [tile, warp, g, t, kq, kr]
        return by_group.permute(0, 1, 4, 5, 2, 3).reshape(NT, KG, 1, 4, 8, 1, HQ, 1, HR, 1)
    else:  # words [tile, kq, warp, g, t, kr, kh]
        return by_group.permute(0, 1, 2, 4, 5, 3).reshape(NT, KG, 1, HQ, 1, 4, 8, 1, HR, 1, 1)


@triton.jit
def _first(a, b):
    return a


@triton.jit
def _opaque(f):
    """f, by a reduction of one element, which costs nothing and through which Triton does not look.

    Where x comes from registers, Triton 3.6 and 3.7 make four columns, and not two, neighbours in a lane if they see a
    join before the product (``computeOrigBitWidth``), and then move all weights between lanes. See benchmarks/NOTES.md.
    """
    return tl.reduce(f.reshape(f.shape[0], f.shape[1], 1), 2, _first)


@triton.jit
def dequantize(q, scales, zeros, NT: tl.constexpr, KT: tl.constexpr, SPEC: tl.constexpr):
    """Words [NT, KT * 128 * BITS] of NT x KT tiles to weights [64 * NT, 64 * KT].

    ``scales`` and ``zeros`` are pairs [NT, groups * 32], prepared by `prepare.prepare`, where a step of 64 * KT columns
    has 1, 2, 4 or 8 groups. Without zero points ``zeros`` is an int32 with the addend of every code in both halves.
    """
    BITS: tl.constexpr = SPEC.bits
    NG: tl.constexpr = 64 * KT // SPEC.group if SPEC.group < 64 * KT else 1  # groups in a step
    H: tl.constexpr = 64 // SPEC.group if SPEC.group < 64 else 1  # groups in a tile, if they are smaller
    KG: tl.constexpr = NG // H
    HQ: tl.constexpr = 2 if H > 1 else 1  # of them, along kq and along kr
    HR: tl.constexpr = H // HQ
    s = _by_word(scales, NT, KG, HQ, HR, BITS)
    z = _by_word(zeros, NT, KG, HQ, HR, BITS) if SPEC.zeros else zeros
    if BITS == 4:
        words = q.reshape(NT, KG, KT // KG, 4, 8, 4, HQ, 2 // HQ, HR, 2 // HR)
    else:
        words = q.reshape(NT, KG, KT // KG, HQ, 2 // HQ, 4, 8, 4, HR, 2 // HR, 2)
    f = _plain_expanded(words, s, z, SPEC) if SPEC.plain else expanded(words, s, z, SPEC)
    if BITS == 4:  # nt, kt, warp, g, t, kq, kr, rh | (e, rh, kh) joined as e last: see _expand
        f = f.reshape(NT, KT, 4, 8, 4, 4, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    else:
        f = f.reshape(NT, KT, 2, 4, 8, 4, 2, 2, 2, 2).permute(0, 3, 8, 4, 1, 2, 6, 7, 5, 9)
    f = f.reshape(NT * 64, KT * 64)
    return _opaque(f) if SPEC.mma_sync else f
