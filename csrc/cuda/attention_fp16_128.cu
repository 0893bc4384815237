#include "cuda/attention_instances.h"

namespace pagewire {
PAGEWIRE_ATTENTION_INSTANCES(Float16, 128)
}
