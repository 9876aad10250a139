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

// Two, since a walk finds the first bytes of its own as its last item left them.
thread_local Scratch scratch, adapter_scratch;

std::atomic<uint64_t> calls{0};

// Call `action` with every item below `items` and with scratch memory of the adapter.
template <class Action>
void share_adapter(const Adapter& adapter, int64_t items, Action&& action) {
    const int64_t bytes = kernel().adapter_bytes(adapter);
    std::atomic<bool> failed{false};
    share(adapter.threads, items, [&](int64_t item) {
        void* memory = adapter_scratch.get(bytes);
        if (memory) action(item, memory);
        else failed = true;
    });
    if (failed) throw std::bad_alloc();
}

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

void adapt(const Adapter& adapter, void* adapted) {
    const int64_t tiles = (adapter.pairs + kAdapterPairs - 1) / kAdapterPairs;
    share_adapter(adapter, tiles, [&](int64_t tile, void* memory) { kernel().adapt(adapter, tile, adapted, memory); });
}

void adapt_backward(const Adapter& adapter, const AdapterGradients& gradients) {
    share_adapter(adapter, gradients.parts,
                  [&](int64_t part, void* memory) { kernel().adapt_backward(adapter, part, gradients, memory); });
}

}  // namespace dape
