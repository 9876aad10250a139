// What the machine itself can do, measured beside the kernels: floating-point peak and reading speed.
// Compiled for the baseline; each function names the instruction set it needs and runs only where the
// processor has it.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Chains that do not wait for each other: more than latency times throughput of any processor, few enough
// that accumulators and operands stay in registers.
constexpr int kChains = 12, kChains512 = 24;
constexpr int64_t kRounds = 4096;
// Bytes that a reading thread takes at a time, so that one that is held up leaves the rest to the others.
constexpr int64_t kChunk = 256 << 10;

// Ties a value to a register at this place, so that the compiler neither drops nor reorders the chains.
#if defined(__x86_64__)
#define PIN(x) asm volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define PIN(x) asm volatile("" : "+w"(x))
#else
#define PIN(x) asm volatile("" : "+m"(x))
#endif

// Every loop returns the floating-point operations it has done. Chains go to 1, which is exact and no
// subnormal number.
using Four = float __attribute__((vector_size(16)));

int64_t chains_portable() {
    Four sum[kChains], half = {.5f, .5f, .5f, .5f};
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = half * float(c);
    for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 24
        for (int c = 0; c < kChains; ++c) {
            sum[c] = sum[c] * half + half;
            PIN(sum[c]);
        }
    return kRounds * kChains * 4 * 2;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) int64_t chains_avx2() {
    const __m256 half = _mm256_set1_ps(.5f);
    __m256 sum[kChains];
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = _mm256_set1_ps(float(c));
    for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 24
        for (int c = 0; c < kChains; ++c) {
            sum[c] = _mm256_fmadd_ps(sum[c], half, half);
            PIN(sum[c]);
        }
    return kRounds * kChains * 8 * 2;
}

__attribute__((target("avx512f"))) int64_t chains_avx512() {
    const __m512 half = _mm512_set1_ps(.5f);
    __m512 sum[kChains512];
#pragma GCC unroll 24
    for (int c = 0; c < kChains512; ++c) sum[c] = _mm512_set1_ps(float(c));
    for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 24
        for (int c = 0; c < kChains512; ++c) {
            sum[c] = _mm512_fmadd_ps(sum[c], half, half);
            PIN(sum[c]);
        }
    return kRounds * kChains512 * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t chains_bf16() {
    // The accumulators grow by 0.5 a round: a product of two pairs of bfloat16.
    const __m512bh half = _mm512_cvtne2ps_pbh(_mm512_set1_ps(.5f), _mm512_set1_ps(.5f));
    __m512 sum[kChains512];
#pragma GCC unroll 24
    for (int c = 0; c < kChains512; ++c) sum[c] = _mm512_set1_ps(float(c));
    for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 24
        for (int c = 0; c < kChains512; ++c) {
            sum[c] = _mm512_dpbf16_ps(sum[c], half, half);
            PIN(sum[c]);
        }
    return kRounds * kChains512 * 32 * 2;
}
#endif

using Chains = int64_t (*)();

Chains choose_chains(int32_t isa, bool bf16) {
    if (isa == kPortable && !bf16) return chains_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == kAvx2 && !bf16 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return chains_avx2;
    if (isa == kAvx512 && !bf16 && __builtin_cpu_supports("avx512f")) return chains_avx512;
    if (isa == kAvx512 && bf16 && __builtin_cpu_supports("avx512bf16")) return chains_bf16;
#endif
    return nullptr;
}

// Seconds of processor time of this thread: others on the machine do not count.
double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// Folds `bytes` (a multiple of 64) at `from` into one word.
uint64_t fold_portable(const char* from, int64_t bytes) {
    using Two = uint64_t __attribute__((vector_size(16)));
    const Two* words = reinterpret_cast<const Two*>(from);
    Two a{}, b{}, c{}, d{};
    for (int64_t i = 0; i < bytes / 16; i += 4) {
        a |= words[i];
        b |= words[i + 1];
        c |= words[i + 2];
        d |= words[i + 3];
    }
    a |= b | c | d;
    return a[0] | a[1];
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t fold_avx2(const char* from, int64_t bytes) {
    const __m256i* words = reinterpret_cast<const __m256i*>(from);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int64_t i = 0; i < bytes / 32; i += 2) {
        a = _mm256_or_si256(a, _mm256_load_si256(words + i));
        b = _mm256_or_si256(b, _mm256_load_si256(words + i + 1));
    }
    a = _mm256_or_si256(a, b);
    uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), a);
    return std::accumulate(lanes, lanes + 4, uint64_t{0}, std::bit_or<>());
}

__attribute__((target("avx512f"))) uint64_t fold_avx512(const char* from, int64_t bytes) {
    __m512i a = _mm512_setzero_si512();
    for (int64_t i = 0; i < bytes; i += 64) a = _mm512_or_si512(a, _mm512_load_si512(from + i));
    uint64_t lanes[8];
    _mm512_storeu_si512(lanes, a);
    return std::accumulate(lanes, lanes + 8, uint64_t{0}, std::bit_or<>());
}
#endif

using Fold = uint64_t (*)(const char*, int64_t);

Fold choose_fold() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return fold_avx512;
    if (__builtin_cpu_supports("avx2")) return fold_avx2;
#endif
    return fold_portable;
}

}  // namespace

// Floating-point operations per second of one thread at the peak of instruction set `isa` (Isa), by its own
// processor time: multiply-add in float32, or products of bfloat16 pairs. Runs for about `seconds` of
// processor time. 0: this processor or build lacks the instructions.
EXPORT double dape_probe_fma(int32_t isa, int32_t bf16, double seconds) {
    const Chains chains = choose_chains(isa, bf16 != 0);
    if (!chains) return 0;
    chains();  // wakes the wide units up
    const double start = thread_seconds();
    double done = 0, taken = 0;
    do {
        done += double(chains());
        taken = thread_seconds() - start;
    } while (taken < seconds);
    return done / taken;
}

// Bytes per second at which `threads` threads together read `bytes` of `buffer` (both multiples of 64) once,
// by wall time from the first thread's first load to the last thread's last one.
EXPORT double dape_probe_read(const void* buffer, int64_t bytes, int32_t threads) {
    using Clock = std::chrono::steady_clock;
    const Fold fold = choose_fold();
    const char* const from = static_cast<const char*>(buffer);
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> arrived{0};
    std::atomic<uint64_t> sink{0};
    std::vector<Clock::time_point> begun(threads), ended(threads);
    auto read = [&](int32_t self) {
        arrived.fetch_add(1);
        while (arrived.load() < threads) std::this_thread::yield();
        begun[self] = Clock::now();
        uint64_t seen = 0;
        for (int64_t at; (at = next.fetch_add(kChunk)) < bytes;) seen |= fold(from + at, std::min(kChunk, bytes - at));
        ended[self] = Clock::now();
        sink.fetch_or(seen);
    };
    std::vector<std::thread> others;
    for (int32_t t = 1; t < threads; ++t) others.emplace_back(read, t);
    read(0);
    for (auto& other : others) other.join();
    const auto first = *std::min_element(begun.begin(), begun.end());
    const auto last = *std::max_element(ended.begin(), ended.end());
    return double(bytes) / std::chrono::duration<double>(last - first).count();
}
