// What a device guard found; the numbers of kernels/error_codes.py.
#pragma once

namespace pagewire {

enum class ErrorKind : int {
    kDecodePage = 1,
    kPrefillPage = 2,
    kDecodeSeqLen = 3,
    kPrefillSeqLen = 4,
    kPrefillCuSeqlensQ = 5,
    kPrefillMaxQLen = 6,
    kAppendSlot = 7,
    kPackSlot = 8,
    kUnpackSlot = 9,
    kDecodeCounter = 10,
    kPrefillCounter = 11,
};

}  // namespace pagewire
