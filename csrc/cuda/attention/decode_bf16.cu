#include "cuda/attention/decode_instances.h"

namespace pagewire {
template DecodeKernel decode_kernel_for<BFloat16, 64>(bool, bool);
template DecodeKernel decode_kernel_for<BFloat16, 128>(bool, bool);
template DecodeKernel decode_kernel_for<BFloat16, 256>(bool, bool);
}  // namespace pagewire
