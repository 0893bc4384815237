// A pipeline of TMA loads, as decode_sm90 has one, and one bug of each kind that the emulation promises to report of it.
// `planted_async NAME` runs it and prints the report; `planted_async ok` is the same kernel without a bug, and checks
// that boxes land where ldmatrix expects them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/device/copy_async.h"
#include "cuda/device/mma.h"
#include "cuda/device/tma.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

using namespace pagewire;

enum Bug : int {
    kOk,
    kEveryLaneArrives,  // other ways to do it right
    kOneLaneFences,
    kOneLaneWaitsForAll,
    kNoExpectTx,
    kWrongParity,
    kReadsWithoutWaiting,
    kOneLaneWaits,
    kNoProxyFenceAfterWrite,
    kNoProxyFenceAfterRead,
    kStageNotWaitedFor,
    kArrivesBeforeItsWarp,
    kOneWarpArrives,
    kReadsAfterArriving,
    kReadsAfterFencing,
    kNotInitialised,
    kNoBarrierAfterInit,
    kNoFenceAfterInit,
    kInitialisedTwice,
    kNoArrivals,
    kTooManyArrivals,
    kPhaseMissed,
    kConsumerNeverArrives,
    kBytesNeverCome,
    kBytesNobodyWaitsFor,
    kLoadNobodyWaitsFor,
    kMisalignedBox,
    kMisalignedMbarrier,
    kBoxOutOfBounds,
    kBoxOverBox,
    kBoxOverMbarrier,
    kMbarrierAsData,
    kMapNotEncoded,
    kOldDevice,
    // what encoding a map refuses
    kMapBase,
    kMapDimension,
    kMapStride,
    kMapBox,
    kMapRow,
    kMapOldDevice,
    kNumBugs
};
constexpr const char* kNames[kNumBugs] = {
    "ok",
    "ok_every_lane_arrives",
    "ok_one_lane_fences",
    "ok_one_lane_waits_for_all",
    "no_expect_tx",
    "wrong_parity",
    "reads_without_waiting",
    "one_lane_waits",
    "no_proxy_fence_after_write",
    "no_proxy_fence_after_read",
    "stage_not_waited_for",
    "arrives_before_its_warp",
    "one_warp_arrives",
    "reads_after_arriving",
    "reads_after_fencing",
    "not_initialised",
    "no_barrier_after_init",
    "no_fence_after_init",
    "initialised_twice",
    "no_arrivals",
    "too_many_arrivals",
    "phase_missed",
    "consumer_never_arrives",
    "bytes_never_come",
    "bytes_nobody_waits_for",
    "load_nobody_waits_for",
    "misaligned_box",
    "misaligned_mbarrier",
    "box_out_of_bounds",
    "box_over_box",
    "box_over_mbarrier",
    "mbarrier_as_data",
    "map_not_encoded",
    "old_device",
    "map_base",
    "map_dimension",
    "map_stride",
    "map_box",
    "map_row",
    "map_old_device",
};

// [page][token][head][dim] of 16-bit values; a tile is one head's tokens of two pages, a stage its two halves by dim.
constexpr int kDim = 128, kTokens = 16, kHeads = 3, kPages = 5, kHead = 1;
constexpr int kConsumers = 2, kThreads = 32 * (kConsumers + 1), kStages = 2, kRows = kConsumers * kTokens;
constexpr int kTiles = 5, kHalf = kRows * 128, kBox = kTokens * 128;

struct alignas(1024) Shared {
    char stage[kStages][2][kHalf];
    Mbarrier full[kStages], empty[kStages];
};

PW_DEVICE void load_tile(const TensorMap* map, Shared& shared, int stage, int page, Bug bug) {
    char* to = shared.stage[stage][0] + thread_index() % 32 * kBox;
    if (bug == kMisalignedBox) to += 64;
    if (bug == kBoxOutOfBounds) to = shared_memory() + sizeof(Shared) - kBox / 2;
    if (bug == kBoxOverMbarrier) to = reinterpret_cast<char*>(shared.full) - kBox / 2;
    const uint64_t policy = evict_first_policy();
    Mbarrier* full = &shared.full[stage];
    load_box(to, map, 0, 0, kHead, page, full, policy);
    load_box(bug == kBoxOverBox ? to : to + kHalf, map, 64, 0, kHead, page, full, policy);
}

PW_DEVICE void produce(const TensorMap* map, const int* pages, Shared& shared, Bug bug) {
    const int lane = thread_index() % 32;
    if (bug == kPhaseMissed) {  // two are over before a waiting consumer looks again
        for (int i = 0; i < 2 && lane == 0; ++i) shared.full[0].arrive();
        return;
    }
    for (int i = 0; i < kTiles; ++i) {
        const int stage = i % kStages, parity = i / kStages % 2;
        const bool waits = bug != kStageNotWaitedFor && (bug != kOneLaneWaitsForAll || lane == 0);
        if (waits) shared.empty[stage].wait(parity ^ 1);
        if (lane == 0 && bug != kNoExpectTx) shared.full[stage].arrive_expect_tx(2 * kHalf);
        if (lane == 0 && bug == kTooManyArrivals) shared.full[stage].arrive();
        sync_warp();
        if (lane < kConsumers && bug != kBytesNeverCome) {
            load_tile(map, shared, stage, load_global(pages + i * kConsumers + lane), bug);
        }
        if (bug == kNoExpectTx) sync_warp();
        if (lane == 0 && bug == kNoExpectTx) shared.full[stage].arrive();
    }
    if (bug == kBytesNobodyWaitsFor || bug == kLoadNobodyWaitsFor) {
        shared.empty[1].wait(kTiles / kStages % 2 ^ 1);
        if (lane == 0 && bug == kBytesNobodyWaitsFor) shared.full[1].expect_tx(16);
        if (lane == 0 && bug == kLoadNobodyWaitsFor) load_tile(map, shared, 1, 0, bug);
    }
}

// What ldmatrix gives a lane is written where it belongs, if its transpose says the same; the tile's first word is read
// by everyone.
PW_DEVICE void consume(Shared& shared, uint32_t* out, Bug bug) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, row = warp * 16 + lane % 16;
    for (int i = 0; i < kTiles; ++i) {
        const int stage = i % kStages, parity = i / kStages % 2;
        const bool waits = bug != kReadsWithoutWaiting;
        const bool waits_for_all = bug != kOneLaneWaits && bug != kOneLaneWaitsForAll;
        if (waits && (waits_for_all || lane == 0)) {
            shared.full[stage].wait(bug == kWrongParity ? parity ^ 1 : parity);
        }
        if (bug == kOneLaneWaits) shuffle(0, 0);  // meets lane 0, and learns nothing of what it knows
        if (bug == kOneLaneWaitsForAll) sync_warp();
        const auto* word = reinterpret_cast<const uint32_t*>(shared.stage[stage][0]);
        const uint32_t first = load_shared(word);
        for (int step = 0; step < 8; ++step) {
            uint32_t r[4], transposed[4];
            const char* line = shared.stage[stage][step / 4] + row * 128;
            const char* at = line + swizzled_byte(row, step % 4 * 2 + lane / 16);
            load_matrices(r, at);
            load_matrices_transposed(transposed, at);
            for (int m = 0; m < 4; ++m) {
                const int token = i * kRows + warp * 16 + lane / 4 + m % 2 * 8;
                const int column = step * 8 + m / 2 * 4 + lane % 4;
                const bool is_first = token == i * kRows && column == 0;
                const bool same = transpose_matrix(transposed[m]) == r[m] && (!is_first || first == r[m]);
                store_global(out + token * (kDim / 2) + column, same ? r[m] : 0xffffffff);
            }
        }
        if (bug != kNoProxyFenceAfterRead && bug != kOneLaneFences) fence_proxy_async();
        if (bug == kReadsAfterFencing && warp == 1) load_shared(word);
        if (bug != kArrivesBeforeItsWarp && bug != kEveryLaneArrives) sync_warp();
        if (bug == kOneLaneFences && lane == 0) fence_proxy_async();
        const bool arrives = bug != kConsumerNeverArrives && (bug != kOneWarpArrives || warp == 0);
        if ((lane == 0 || bug == kEveryLaneArrives) && arrives) shared.empty[stage].arrive();
        if (bug == kReadsAfterArriving && warp == 1) load_shared(word);
    }
}

PW_KERNEL(kThreads, 1)
void planted_kernel(const PW_GRID_CONSTANT TensorMap map, const int* pages, uint32_t* out, Bug bug) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    for (int i = thread_index(); i < kStages * 2 * kHalf / 16; i += kThreads) {
        store_shared(reinterpret_cast<Vec16*>(shared.stage[0][0]) + i, Vec16{});
    }
    if (bug != kNoProxyFenceAfterWrite) fence_proxy_async();
    if (thread_index() == 0) {
        prefetch_map(&map);
        for (int i = 0; i < kStages; ++i) {
            if (bug != kNotInitialised) shared.full[i].init(bug == kNoArrivals ? 0 : 1);
            shared.empty[i].init(bug == kOneWarpArrives ? 1 : bug == kEveryLaneArrives ? 32 * kConsumers : kConsumers);
        }
        if (bug == kInitialisedTwice) shared.full[1].init(1);
        if (bug == kMisalignedMbarrier) reinterpret_cast<Mbarrier*>(shared.stage[0][0] + 4)->init(1);
        if (bug == kMbarrierAsData) store_shared(&shared.full[0].bits, uint64_t(1));
        if (bug != kNoFenceAfterInit) fence_mbarrier_init();
    }
    if (bug != kNoBarrierAfterInit) sync_block();
    if (thread_index() / 32 == kConsumers) {
        produce(&map, pages, shared, bug);
    } else {
        consume(shared, out, bug);
    }
}

TensorTiling tiling_of(const uint16_t* kv, Bug bug) {
    TensorTiling t{kv, 2, {kDim, kTokens, kHeads, kPages}, {}, {64, kTokens, 1, 1}};
    t.strides = {kHeads * kDim * 2, kDim * 2, kTokens * kHeads * kDim * 2};
    if (bug == kMapBase) t.base = kv + 1;
    if (bug == kMapDimension) t.dims[2] = 0;
    if (bug == kMapStride) t.strides[0] += 8;
    if (bug == kMapBox) t.box[1] = 257;
    if (bug == kMapRow) t.box[0] = 72;
    return t;
}

uint16_t value_of(int page, int token, int dim) { return static_cast<uint16_t>((page * kTokens + token) * kDim + dim); }

std::vector<uint16_t> make_cache() {
    std::vector<uint16_t> kv(kPages * kTokens * kHeads * kDim, 0xffff);
    for (int page = 0; page < kPages; ++page) {
        for (int token = 0; token < kTokens; ++token) {
            for (int dim = 0; dim < kDim; ++dim) {
                kv[((page * kTokens + token) * kHeads + kHead) * kDim + dim] = value_of(page, token, dim);
            }
        }
    }
    return kv;
}

int main(int argc, char** argv) {
    int bug = 0;
    while (bug < kNumBugs && (argc != 2 || std::strcmp(argv[1], kNames[bug]))) ++bug;
    if (bug == kNumBugs) {
        for (const char* name : kNames) std::printf("%s\n", name);
        return 3;
    }
    const std::vector<uint16_t> kv = make_cache();
    const std::vector<int> pages = {3, 0, 4, kPages, -1, 1, 2, 2, 0, 3};  // two of them are none: zeros
    std::vector<uint32_t> out(kTiles * kRows * kDim / 2);
    try {
        if (bug == kMapOldDevice) setenv("PAGEWIRE_EMULATION_ARCH", "80", 1);
        TensorMap map = encode_tensor_map(tiling_of(kv.data(), static_cast<Bug>(bug)));
        if (bug == kMapNotEncoded) map = {};
        if (bug == kOldDevice) setenv("PAGEWIRE_EMULATION_ARCH", "80", 1);
        const LaunchConfig c{"planted_kernel", 2, 1, kThreads, sizeof(Shared), 0};
        launch(planted_kernel, c, map, pages.data(), out.data(), static_cast<Bug>(bug));
    } catch (const std::exception& e) {
        std::printf("%s\n", e.what());
        return 1;
    }
    for (int i = 0; i < kTiles * kRows * kDim; ++i) {
        const int dim = i % kDim, token = i / kDim % kTokens, page = pages[i / kDim / kTokens];
        const int got = out[i / 2] >> (16 * (i % 2)) & 0xffff;
        if (got != (page < 0 || page >= kPages ? 0 : value_of(page, token, dim)))
            return std::printf("wrong at %d\n", i), 2;
    }
    std::printf("no fault\n");
    return 0;
}
