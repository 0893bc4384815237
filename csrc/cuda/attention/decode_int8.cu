#include "cuda/attention/decode_instances.h"

namespace pagewire {
template DecodeKernel decode_kernel_for<int8_t, 64>(bool, bool);
template DecodeKernel decode_kernel_for<int8_t, 128>(bool, bool);
template DecodeKernel decode_kernel_for<int8_t, 256>(bool, bool);
}  // namespace pagewire
