#include "cuda/attention/instances.h"

namespace pagewire {
template DecodeKernel decode_kernel_for<Float8E5M2, 64>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E5M2, 128>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E5M2, 256>(bool, bool);
template DecodeSm90Kernel decode_sm90_kernel_for<Float8E5M2, 64>(int);
template DecodeSm90Kernel decode_sm90_kernel_for<Float8E5M2, 128>(int);
template DecodeSm90Kernel decode_sm90_kernel_for<Float8E5M2, 256>(int);
}  // namespace pagewire
