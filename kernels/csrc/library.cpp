// The functions of abi.h.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cache.h"
#include "plan.h"
#include "pool.h"

#define DAPE_EXPORT __attribute__((visibility("default")))

namespace dape {

#if defined(DAPE_HAVE_X86)
extern const Kernel kernel_avx512amx, kernel_avx512bf16, kernel_avx512, kernel_avx2;
#endif
extern const Kernel kernel_portable;

namespace {

#if defined(DAPE_HAVE_X86)
bool has_avx512() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

// Whether the system lets this process use matrix units, which it must ask for.
bool may_use_matrix() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// Processors with matrix units multiply bfloat16 vectors at half the speed of floats.
bool has_fast_bfloat16() { return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16"); }
#endif

struct Choice {
    const char* name;
    const char* label;
    const Kernel& kernel;
    bool (*runs)();
};

// The best first. A name may stand for several builds.
const Choice choices[] = {
#if defined(DAPE_HAVE_X86)
    {"avx512", "avx512+amx", kernel_avx512amx,
     [] {
         return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") &&
                may_use_matrix();
     }},
    {"avx512", "avx512+bf16", kernel_avx512bf16, [] { return has_avx512() && has_fast_bfloat16(); }},
    {"avx512", "avx512", kernel_avx512, has_avx512},
    {"avx2", "avx2", kernel_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", "portable", kernel_portable, [] { return true; }},
};

const Choice* find(const char* name) {
    for (const Choice& choice : choices)
        if ((!std::strcmp(name, "auto") || !std::strcmp(name, choice.name)) && choice.runs()) return &choice;
    return nullptr;
}

std::atomic<const Choice*> chosen{nullptr};

const Choice& choice() {
    if (!chosen) chosen = find("auto");
    return *chosen;
}

// One thread's scratch memory, kept between calls.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    void* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 63) / 64 * 64;
            memory_ = std::aligned_alloc(64, size_);
            if (!memory_) size_ = 0;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

thread_local Scratch scratch;

struct Job {
    const Attention& attention;
    const Kernel& kernel;
    const Plan plan;
    const int64_t scratch_bytes;
    std::atomic<bool> failed{false};
};

void compute(void* context, int64_t index) {
    auto& job = *static_cast<Job*>(context);
    void* memory = scratch.get(job.scratch_bytes);
    if (memory) job.kernel.walk(job.attention, job.plan.items[index], memory);
    else job.failed = true;
}

}  // namespace
}  // namespace dape

extern "C" {

DAPE_EXPORT const char* dape_isa() { return dape::choice().label; }

DAPE_EXPORT int32_t dape_set_isa(const char* name) {
    const dape::Choice* found = dape::find(name);
    if (found) dape::chosen = found;
    return found ? 0 : 1;
}

DAPE_EXPORT int32_t dape_attend(const dape::Attention* attention) try {
    const dape::Kernel& kernel = dape::choice().kernel;
    dape::Job job{*attention, kernel, dape::make_plan(*attention, attention->threads),
                  kernel.scratch_bytes(*attention)};
    dape::Pool::run(attention->threads, int64_t(job.plan.items.size()), dape::compute, &job);
    if (job.failed) return 1;
    for (const auto& split : job.plan.splits) dape::merge(*attention, job.plan, split);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

DAPE_EXPORT void dape_write(const dape::Cache* cache, const void* key, const void* value, int32_t source_type,
                            int64_t key_row_stride, int64_t key_head_stride, int64_t value_row_stride,
                            int64_t value_head_stride, const int64_t* slots, int64_t rows, int32_t threads) {
    constexpr int64_t kRows = 64;  // of an item
    const dape::Source keys{key, key_row_stride, key_head_stride}, values{value, value_row_stride, value_head_stride};
    const auto write = [&](int64_t item) {
        dape::write_slots(*cache, keys, values, source_type, slots, item * kRows, std::min(rows, (item + 1) * kRows));
    };
    dape::Pool::run(
        threads, (rows + kRows - 1) / kRows,
        [](void* context, int64_t item) { (*static_cast<decltype(write)*>(context))(item); },
        const_cast<void*>(static_cast<const void*>(&write)));
}

DAPE_EXPORT void dape_read(const dape::Cache* cache, const int64_t* slots, int64_t count, float* key, float* value) {
    dape::read_slots(*cache, slots, count, key, value);
}
}
