#include "cuda/attention_instances.h"

namespace pagewire {
PAGEWIRE_ATTENTION_INSTANCES(BFloat16, 256)
}
