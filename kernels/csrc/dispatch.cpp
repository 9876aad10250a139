#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool has_narrow_products() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

bool has_matrix() { return __builtin_cpu_supports("amx-bf16"); }
#endif

bool always() { return true; }

struct Choice {
    const char* set;
    const char* build;
    const Kernel& kernel;
    bool (*runs)();
    bool (*pays)();  // whether it is chosen where nobody asks for it
};

// The best first.
const Choice choices[] = {
#if defined(DAPE_HAVE_X86)
    {"avx512", "avx512+amx", kernel_avx512amx,
     [] { return has_narrow_products() && has_matrix() && may_use_matrix(); }, always},
    // Processors with matrix units multiply bfloat16 vectors at half the speed of floats.
    {"avx512", "avx512+bf16", kernel_avx512bf16, has_narrow_products, [] { return !has_matrix(); }},
    {"avx512", "avx512+fp32", kernel_avx512, has_avx512, always},
    {"avx2", "avx2", kernel_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     always},
#endif
    {"portable", "portable", kernel_portable, always, always},
};

const Choice* find(const char* name) {
    const bool any = !std::strcmp(name, "auto");
    for (const Choice& choice : choices) {
        const bool wanted = (any || !std::strcmp(name, choice.set)) && choice.pays();
        if ((wanted || !std::strcmp(name, choice.build)) && choice.runs()) return &choice;
    }
    return nullptr;
}

std::atomic<const Choice*> chosen{nullptr};

const Choice& choice() {
    if (!chosen) chosen = find("auto");
    return *chosen;
}

}  // namespace

const Kernel& kernel() { return choice().kernel; }

const char* build_name() { return choice().build; }

bool choose_isa(const char* name) {
    const Choice* found = find(name);
    if (found) chosen = found;
    return found != nullptr;
}

}  // namespace dape
