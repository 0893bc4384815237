#include "cuda/attention/decode_instances.h"

namespace pagewire {
template DecodeKernel decode_kernel_for<Float8E5M2, 64>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E5M2, 128>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E5M2, 256>(bool, bool);
}  // namespace pagewire
