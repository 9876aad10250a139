#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <system_error>

namespace dape {

namespace {
// Never destroyed: its threads may sleep in it while the process ends. A forked child has no threads, so it
// starts with a new pool.
std::atomic<Pool*> current{nullptr};

// Waking a sleeping thread takes as long as a small task, so threads look out for this long before they sleep:
// within a step of a model they stay awake, between steps they leave the core to others.
constexpr std::chrono::microseconds kLookout{100};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Wait a moment for something to come true. Returns whether it has.
template <class Condition>
bool look_out(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + kLookout;
    do {
        for (int i = 0; i < 8; ++i) {
            if (condition()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}
}  // namespace

Pool& Pool::instance() {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current = nullptr; }); });
    Pool* pool = current;
    if (!pool) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(pool, fresh)) pool = fresh;
        else delete fresh;
    }
    return *pool;
}

void Pool::take_items(Task& task) {
    for (int64_t item; (item = task.next.fetch_add(1, std::memory_order_relaxed)) < task.items;)
        task.action(task.context, item);
}

void Pool::run(int threads, int64_t items, Action action, void* context) {
    Task task{.action = action, .context = context, .items = items, .free_seats = threads - 1};
    if (threads > 1 && items > 1) {
        Pool& pool = instance();
        // Two callers at once: the second works alone, which is no slower than sharing the same cores.
        if (std::unique_lock owner(pool.busy_, std::try_to_lock); owner) return pool.share(threads, task);
    }
    take_items(task);
}

void Pool::share(int threads, Task& task) {
    {
        std::lock_guard lock(mutex_);
        task_ = &task;
        try {
            while (int(threads_.size()) < threads - 1) threads_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            // No more threads to be had: those there are do the work.
        }
        ++tasks_;
        for (int64_t i = 0; i < asleep_ && i < threads - 1 && i < task.items - 1; ++i) wake_.notify_one();
    }
    take_items(task);
    {
        std::lock_guard lock(mutex_);
        task_ = nullptr;
    }
    const auto done = [&] { return task.running.load(std::memory_order_acquire) == 0; };
    if (look_out(done)) return;
    std::unique_lock lock(mutex_);
    left_.wait(lock, done);
}

void Pool::serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
        while (!has_seat()) {
            const uint64_t seen = tasks_;
            lock.unlock();
            const bool more = look_out([&] { return tasks_.load(std::memory_order_acquire) != seen; });
            lock.lock();
            if (more || has_seat()) continue;
            ++asleep_;
            wake_.wait(lock);
            --asleep_;
        }
        Task& task = *task_;
        --task.free_seats;
        ++task.running;
        lock.unlock();
        take_items(task);
        lock.lock();
        if (--task.running == 0) left_.notify_one();
    }
}

}  // namespace dape
