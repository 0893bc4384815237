#include "cuda/attention/decode_instances.h"

namespace pagewire {
template DecodeKernel decode_kernel_for<Float8E4M3, 64>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E4M3, 128>(bool, bool);
template DecodeKernel decode_kernel_for<Float8E4M3, 256>(bool, bool);
}  // namespace pagewire
