"""Names of kernels, as c++filt prints them."""

import pytest

from machine_code.kernels import read

NAMES = {
    "void pagewire::decode_kernel<pagewire::Float8E4M3, 128, true, false>(pagewire::AttentionPlan)": (
        "decode_kernel", ("float8_e4m3fn",), (128,), (True, False), "decode_kernel float8_e4m3fn-128-wide-general"
    ),
    "void pagewire::decode_kernel<signed char, 64, false, true>(pagewire::AttentionPlan)": (
        "decode_kernel", ("int8",), (64,), (False, True), "decode_kernel int8-64"
    ),
    "void pagewire::decode_sm90_kernel<pagewire::BFloat16, 128, 8>(CUtensorMap_st, CUtensorMap_st)": (
        "decode_sm90_kernel", ("bfloat16",), (128, 8), (), "decode_sm90_kernel bfloat16-128-8"
    ),
    "void pagewire::merging::merge_kernel<pagewire::Float16, float, false>(pagewire::merging::Plan)": (
        "merge_kernel", ("float16", "float32"), (), (False,), "merge_kernel float16-float32-general"
    ),
    "void pagewire::moving::convert_kernel<48, 16>(pagewire::moving::Plan<48>)": (
        "convert_kernel", (), (48, 16), (), "convert_kernel 48-16"
    ),
    "pagewire::fill(int)": ("fill", (), (), (), "fill"),
}  # fmt: skip


@pytest.mark.parametrize("readable", NAMES)
def test_names(readable):
    kernel = read("sm_80", "_Z", readable)
    assert (kernel.function, kernel.types, kernel.numbers, kernel.flags, kernel.case) == NAMES[readable]
