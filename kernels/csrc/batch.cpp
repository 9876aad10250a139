#include "batch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "dispatch.h"

namespace dape {

namespace {

// One thread's scratch memory, kept between calls.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    void* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 63) / 64 * 64;
            memory_ = std::aligned_alloc(64, size_);
            if (memory_) std::memset(memory_, 0, 8);
            else size_ = 0;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

thread_local Scratch scratch;

std::atomic<uint64_t> calls{0};

}  // namespace

void attend(const Attention& attention, const Plan& plan) {
    const Kernel& used = kernel();
    const int64_t bytes = used.scratch_bytes(attention);
    const uint64_t call = ++calls;
    std::atomic<bool> failed{false};
    share(attention.threads, int64_t(plan.items.size()), [&](int64_t item) {
        void* memory = scratch.get(bytes);
        if (memory) used.walk(attention, plan.items[item], call, memory);
        else failed = true;
    });
    if (failed) throw std::bad_alloc();
    for (const auto& split : plan.splits) merge(attention, plan, split);
}

void write(const Cache& cache, const Source& key, const Source& value, int32_t type, const int64_t* slots,
           int64_t rows, int threads) {
    constexpr int64_t kRows = 64;  // of an item
    share(threads, (rows + kRows - 1) / kRows, [&](int64_t item) {
        write_slots(cache, key, value, type, slots, item * kRows, std::min(rows, (item + 1) * kRows));
    });
}

}  // namespace dape
