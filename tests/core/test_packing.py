"""The packed layout against a scalar statement of its formula, and exact round trips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_moelora.core import packing
from tests.builders import same_bits

BITS = pytest.mark.parametrize("bits", [4, 8])
PAIR_DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16], ids=str)


def code_place(n: int, k: int, bits: int) -> tuple[int, int]:
    """Word of a tile and its lowest bit that hold the code of row n and column k of that tile (both 0..63).

    The only place of these tests that knows the order: the definition in `core.packing`, by hand.
    """
    warp, rh, g = n // 16, n // 8 % 2, n % 8
    kq, kr, kh, t, e = k // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
    lane = ((warp * 8 + g) * 4 + t) * 4
    if bits == 4:
        return lane + 2 * kq + kr, 16 * e + 8 * kh + 4 * rh
    return 512 * kq + lane + 2 * kr + kh, 16 * e + 8 * rh


def pair_place(n: int) -> tuple[int, int]:
    """Pair of a tile and its lowest bit that hold the 16-bit value of row n (0..63)."""
    return 8 * (n // 16) + n % 8, 16 * (n // 8 % 2)


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned word."""
    return word - (1 << 32) if word >> 31 else word


def words_by_formula(codes: list[list[int]], bits: int) -> Tensor:
    """Words of codes [N][K], placed one by one."""
    rows, columns = len(codes) // 64, len(codes[0]) // 64
    words = [[[0] * (128 * bits) for _ in range(columns)] for _ in range(rows)]
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            word, low = code_place(n % 64, k % 64, bits)
            words[n // 64][k // 64][word] |= code << low
    return torch.tensor([[[signed(w) for w in tile] for tile in line] for line in words], dtype=torch.int32)


@BITS
def test_every_bit_of_a_tile_belongs_to_one_code(bits: int) -> None:
    """Of the statement above: no two codes overlap and no bit is left over."""
    places = {code_place(n, k, bits) for n in range(64) for k in range(64)}
    assert len(places) == 64 * 64
    assert {word for word, _ in places} == set(range(128 * bits))
    assert {low for _, low in places} == set(range(0, 32, bits))
    assert len({pair_place(n) for n in range(64)}) == 64


@BITS
def test_codes_stand_where_the_formula_says(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (128, 192), dtype=torch.uint8)
    words = packing.pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 128 * bits)
    assert torch.equal(words, words_by_formula(codes.tolist(), bits))


@BITS
def test_unpacking_reads_where_the_formula_says(bits: int) -> None:
    """From words of all 32 bits, so that the sign bit is met; and what pack writes of it is the same words."""
    words = torch.randint(-(2**31), 2**31, (2, 1, 128 * bits), dtype=torch.int32)
    codes = packing.unpack_codes(words, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (128, 64)
    assert torch.equal(words_by_formula(codes.tolist(), bits), words)
    assert torch.equal(packing.pack_codes(codes, bits), words)


@BITS
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_leading_dims_are_packed_one_by_one(bits: int, lead: tuple[int, ...]) -> None:
    codes = torch.randint(0, 1 << bits, (*lead, 64, 128), dtype=torch.uint8)
    words = packing.pack_codes(codes, bits)
    assert words.shape == (*lead, 1, 2, 128 * bits)
    assert torch.equal(packing.unpack_codes(words, bits), codes)
    for flat, one in zip(words.reshape(-1, 1, 2, 128 * bits), codes.reshape(-1, 64, 128), strict=True):
        assert torch.equal(flat, packing.pack_codes(one, bits))


@BITS
@pytest.mark.parametrize("shape", [(0, 64, 128), (2, 0, 64, 128), (0, 64), (64, 0)], ids=str)
def test_nothing_is_packed_to_nothing(bits: int, shape: tuple[int, ...]) -> None:
    words = packing.pack_codes(torch.empty(shape, dtype=torch.uint8), bits)
    assert words.shape == (*shape[:-2], shape[-2] // 64, shape[-1] // 64, 128 * bits)
    assert packing.unpack_codes(words, bits).shape == shape


@BITS
def test_strided_codes_and_words(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (128, 64), dtype=torch.uint8).T
    words = packing.pack_codes(codes, bits)
    assert torch.equal(words, packing.pack_codes(codes.contiguous(), bits))
    wide = torch.stack((words, words + 1), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(packing.unpack_codes(wide, bits), codes)


@pytest.mark.parametrize(("bits", "run"), [(4, 64), (4, 32), (4, 16), (8, 32), (8, 16)])
def test_runs_are_the_codes_with_columns_in_another_order(bits: int, run: int) -> None:
    codes = torch.randint(0, 1 << bits, (128, 192), dtype=torch.uint8)
    unpack, columns = packing.RunUnpacker(bits, run, 2, 3), packing.run_columns(192, bits, run)
    for held in (codes.flip(0), codes):
        found = unpack(packing.pack_codes(held, bits))
        found = found.view(torch.uint8) if bits == 4 else found
        assert torch.equal(found.to(torch.int64), held[:, columns].to(torch.int64))
    assert torch.equal(columns // run, torch.arange(192) // run)
    assert torch.equal(columns.sort().values, torch.arange(192))


def test_runs_divide_groups() -> None:
    assert [packing.run_length(4, group) for group in (128, 192, 96, 48, 16, 24)] == [64, 64, 32, 16, 16, None]
    assert [packing.run_length(8, group) for group in (128, 192, 96, 48, 16, 24)] == [32, 32, 32, 16, 16, None]


@PAIR_DTYPES
def test_pairs_stand_where_the_formula_says(dtype: torch.dtype) -> None:
    raw = torch.randint(-(2**15), 2**15, (128, 3), dtype=torch.int16)
    pairs = packing.pack_pairs(raw.view(dtype))
    assert pairs.dtype == torch.int32 and pairs.shape == (2, 3, 32)
    words = [[[0] * 32 for _ in range(3)] for _ in range(2)]
    for n, row in enumerate(raw.tolist()):
        for group, value in enumerate(row):
            index, low = pair_place(n % 64)
            words[n // 64][group][index] |= (value & 0xFFFF) << low
    expected = [[[signed(word) for word in groups] for groups in tile] for tile in words]
    assert torch.equal(pairs, torch.tensor(expected, dtype=torch.int32))


@PAIR_DTYPES
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    """All 2^16 patterns: negative scales, -0.0, subnormals, infinities and every NaN, in both halves of a pair."""
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1024, 64)
    for values in (raw.T.contiguous(), raw.flip(1).T):  # each pattern once in the low half and once in the high one
        packed = packing.pack_pairs(values.contiguous().view(dtype))
        unpacked = packing.unpack_pairs(packed, dtype)
        assert unpacked.dtype == dtype
        assert torch.equal(unpacked.view(torch.int16), values)
        assert same_bits(packing.pack_pairs(unpacked), packed)


@PAIR_DTYPES
def test_strided_pairs(dtype: torch.dtype) -> None:
    values = torch.randint(-(2**15), 2**15, (2, 5, 64), dtype=torch.int16).view(dtype).transpose(1, 2)
    pairs = packing.pack_pairs(values)
    assert torch.equal(packing.unpack_pairs(pairs, dtype).view(torch.int16), values.contiguous().view(torch.int16))
    strided = pairs.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(packing.unpack_pairs(strided, dtype), values.contiguous())


@BITS
def test_meta_device(bits: int) -> None:
    codes = torch.empty(5, 128, 192, dtype=torch.uint8, device="meta")
    words = packing.pack_codes(codes, bits)
    assert words.is_meta and words.dtype == torch.int32
    assert tuple(words.shape) == packing.qweight_shape(5, 128, 192, bits)
    assert packing.unpack_codes(words, bits).shape == codes.shape
    scales = torch.empty(5, 128, 6, dtype=torch.float16, device="meta")
    pairs = packing.pack_pairs(scales)
    assert pairs.is_meta and tuple(pairs.shape) == packing.pairs_shape(5, 128, 6)
    back = packing.unpack_pairs(pairs, torch.float16)
    assert back.is_meta and back.shape == scales.shape and back.dtype == torch.float16


@pytest.mark.parametrize(
    ("k", "group", "padded"),
    [
        (1, None, 64),
        (64, None, 64),
        (65, None, 128),
        (64, 16, 64),
        (72, 16, 128),
        (96, 32, 128),
        (64, 128, 128),
        (704, 128, 768),
        (48, 48, 192),
        (200, 48, 384),
        (96, 96, 192),
        (192, 96, 192),
        (100, 100, 1600),
    ],
)
def test_padded_columns(k: int, group: int | None, padded: int) -> None:
    assert packing.padded_columns(k, group) == padded
    assert padded % 64 == 0 and padded % (group or 1) == 0
    assert padded - math.lcm(64, group or 1) < k <= padded  # the least such number


@pytest.mark.parametrize(("n", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128), (11008, 11008), (1407, 1408)])
def test_padded_rows(n: int, padded: int) -> None:
    assert packing.padded_rows(n) == padded


def test_round_up() -> None:
    assert [packing.round_up(value, 8) for value in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_a_packed_weight_has_as_many_bits_as_its_codes() -> None:
    assert math.prod(packing.qweight_shape(3, 128, 320, 4)) * 32 == 3 * 128 * 320 * 4
    assert math.prod(packing.qweight_shape(3, 128, 320, 8)) * 32 == 3 * 128 * 320 * 8
    assert math.prod(packing.pairs_shape(3, 128, 10)) * 2 == 3 * 128 * 10


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    experts=st.integers(1, 3),
    n=st.integers(1, 150),
    k=st.integers(1, 200),
    group=st.sampled_from([None, 16, 32, 48, 64, 96, 128]),
    seed=st.integers(0, 2**31),
)
def test_ragged_shapes_round_trip(bits: int, experts: int, n: int, k: int, group: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = packing.padded_rows(n), packing.padded_columns(k, group)
    groups = columns // (group or columns)
    codes = torch.zeros(experts, rows, columns, dtype=torch.uint8)
    shape = (experts, n, k)
    codes[:, :n, :k] = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    words = packing.pack_codes(codes, bits)
    assert tuple(words.shape) == packing.qweight_shape(experts, rows, columns, bits)
    assert torch.equal(packing.unpack_codes(words, bits), codes)
    # One code alone, at a random place: it is found there and nowhere else.
    n0, k0 = seed % n, seed % k
    one = torch.zeros(rows, columns, dtype=torch.uint8)
    one[n0, k0] = (1 << bits) - 1
    word, low = code_place(n0 % 64, k0 % 64, bits)
    spot = packing.pack_codes(one, bits)
    assert int(spot.count_nonzero()) == 1
    assert int(spot[n0 // 64, k0 // 64, word]) == signed(((1 << bits) - 1) << low)
    scales = torch.randint(-(2**15), 2**15, (experts, rows, groups), dtype=torch.int16, generator=generator)
    pairs = packing.pack_pairs(scales)
    assert tuple(pairs.shape) == packing.pairs_shape(experts, rows, groups)
    assert torch.equal(packing.unpack_pairs(pairs, torch.int16), scales)
