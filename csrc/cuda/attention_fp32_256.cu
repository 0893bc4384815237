#include "cuda/attention_instances.h"

// fp32 queries run by FMA and are not tuned: one width serves all
namespace pagewire {
PAGEWIRE_ATTENTION_INSTANCES(float, 256)
}
