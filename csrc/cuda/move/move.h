// append_kv, pack_kv and unpack_kv are one movement: rows of heads, between rows and slots,
// converted on the way.
#pragma once

#include "cuda/call.h"
#include "pagewire/params.h"

namespace pagewire {

void move(const MoveParams& p, const Call& call);

}  // namespace pagewire
