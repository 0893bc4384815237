// One bug of each kind the emulation promises to report. `planted NAME` runs it and prints the
// report; `planted ok` is the same kernel without a bug.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device/copy_async.h"
#include "cuda/device/mma.h"
#include "cuda/launch.h"

using namespace pagewire;

constexpr int kThreads = 64;
enum Bug : int {
    kOk,
    kSharedOutOfBounds,
    kSharedOutOfBoundsByPointer,  // past the checked functions: AddressSanitizer's
    kGlobalOutOfBounds,           // AddressSanitizer's
    kMisalignedShared,
    kMisalignedGlobal,
    kMisalignedCopy,
    kDivergentBlock,
    kDivergentWarp,
    kReturnsBeforeBarrier,
    kDifferentBarriers,
    kCopyNotWaited,
    kCopyNotCommitted,
    kCopyWithoutBarrier,
    kOverwritesCopy,
    kUninitialised,
    kReadRace,
    kWriteRace,
    kMatrixRace,
    // what the runtime refuses before a thread runs
    kSharedOverLimit,
    kSharedOverDevice,
    kNoBlocks,
    kTooManyBlocks,
    kTooManyThreads,
    kTooManyParameters,
    kNumBugs
};
constexpr const char* kNames[kNumBugs] = {
    "ok",
    "shared_out_of_bounds",
    "shared_out_of_bounds_by_pointer",
    "global_out_of_bounds",
    "misaligned_shared",
    "misaligned_global",
    "misaligned_copy",
    "divergent_block",
    "divergent_warp",
    "returns_before_barrier",
    "different_barriers",
    "copy_not_waited",
    "copy_not_committed",
    "copy_without_barrier",
    "overwrites_copy",
    "uninitialised",
    "read_race",
    "write_race",
    "matrix_race",
    "shared_over_limit",
    "shared_over_device",
    "no_blocks",
    "too_many_blocks",
    "too_many_threads",
    "too_many_parameters",
};

// Every thread copies 16 bytes to shared memory, all wait, every thread adds its neighbour's to its own.
PW_KERNEL(kThreads, 1)
void planted_kernel(const Vec16* in, uint32_t* out, Bug bug) {
    const int t = thread_index(), neighbour = (t + 1) % kThreads;
    Vec16* shared = reinterpret_cast<Vec16*>(shared_memory());
    if (bug == kReturnsBeforeBarrier && t == 3) return;
    const Vec16* source = in + t;
    if (bug == kMisalignedCopy) source = reinterpret_cast<const Vec16*>(reinterpret_cast<const char*>(source) + 4);
    if (bug == kUninitialised && t == 5) {
        commit_copies();
    } else {
        copy_async_16(shared + t, source, 16, 0);
        if (bug != kCopyNotCommitted) commit_copies();
    }
    if (bug == kOverwritesCopy) store_shared(shared + t, Vec16{});
    if (bug == kCopyNotWaited) {
        wait_copies<1>();
    } else {
        wait_copies<0>();
    }
    if (bug == kDivergentWarp) {
        if (t % 2) sync_warp();
        sync_block();
    } else if (bug == kDifferentBarriers) {
        if (t < 32) {
            sync_block();
        } else {
            sync_block();
        }
    } else if (bug == kMatrixRace) {
        uint32_t r[4];
        load_matrices(r, shared + t);  // reads the rows that the warp's other lanes copied
    } else if (bug != kCopyWithoutBarrier) {
        sync_block();
    }
    const Vec16 a = load_shared(shared + t), b = load_shared(shared + neighbour);
    uint32_t sum = a.x[0] + b.x[0];
    if (bug == kSharedOutOfBounds && t == 7) sum += load_shared(shared + kThreads).x[0];
    if (bug == kSharedOutOfBoundsByPointer && t == 7) sum += *reinterpret_cast<volatile uint32_t*>(shared + kThreads);
    if (bug == kGlobalOutOfBounds && t == 7) sum += load_global(in + kThreads).x[0];
    if (bug == kMisalignedShared) sum += load_shared(reinterpret_cast<const Vec8*>(shared_memory() + 4)).x[0];
    if (bug == kMisalignedGlobal)
        sum += load_global(reinterpret_cast<const Vec8*>(reinterpret_cast<const char*>(in) + 4)).x[0];
    if (bug != kWriteRace) sync_block();
    if (bug == kWriteRace) store_shared(shared + t, Vec16{{sum, 0, 0, 0}});
    if (bug == kReadRace) {
        store_shared(shared + t, Vec16{{sum, 0, 0, 0}});
        sum = load_shared(shared + neighbour).x[0];
    }
    if (bug == kDivergentBlock && t < 32) sync_block();
    store_global(out + t, sum);
}

struct Large {
    char bytes[32765];
};
PW_KERNEL(kThreads, 1)
void large_kernel(const Large) {}

void launch_planted(Bug bug, const Vec16* in, uint32_t* out) {
    LaunchConfig c{"planted_kernel", 2, 1, kThreads, kThreads * 16, 0};
    if (bug == kSharedOverLimit) c.shared_bytes = (48 << 10) + 16;
    if (bug == kSharedOverDevice) {
        c.shared_bytes = (227 << 10) + 16;
        allow_shared_memory(planted_kernel);
    }
    if (bug == kNoBlocks) c.grid_x = 0;
    if (bug == kTooManyBlocks) c.grid_y = 65536;
    if (bug == kTooManyThreads) c.num_threads = 1056;
    if (bug == kTooManyParameters) return launch(large_kernel, c, Large{});
    launch(planted_kernel, c, in, out, bug);
}

int main(int argc, char** argv) {
    for (int bug = 0; bug < kNumBugs; ++bug) {
        if (argc != 2 || std::strcmp(argv[1], kNames[bug])) continue;
        std::vector<Vec16> in(kThreads);
        for (uint32_t i = 0; i < kThreads; ++i) in[i] = {{i, i, i, i}};
        std::vector<uint32_t> out(kThreads);
        try {
            launch_planted(static_cast<Bug>(bug), in.data(), out.data());
        } catch (const std::exception& e) {
            std::printf("%s\n", e.what());
            return 1;
        }
        for (uint32_t i = 0; i < kThreads; ++i) {
            if (out[i] != i + (i + 1) % kThreads) return std::printf("wrong at %u\n", i), 2;
        }
        std::printf("no fault\n");
        return 0;
    }
    for (const char* name : kNames) std::printf("%s\n", name);
    return 3;
}
