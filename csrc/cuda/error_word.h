// How a kernel reports a bad index: it goes on, and leaves one int64 word,
// `kind << 56 | request << 32 | entry`. The largest word wins, so the report does not depend on the
// order of blocks.
#pragma once

#include "cuda/device/thread.h"
#include "cuda/error_kind.h"

namespace pagewire {

PW_DEVICE void record_error(int64_t* word, ErrorKind kind, int64_t request, int64_t entry) {
    if (request > 0xffffff) request = 0xffffff;
    if (entry > 0xffffffffll) entry = 0xffffffffll;
    atomic_max(word, static_cast<int64_t>(kind) << 56 | request << 32 | entry);
}

}  // namespace pagewire
