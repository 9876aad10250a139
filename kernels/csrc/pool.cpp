#include "pool.h"

#include <pthread.h>

#include <system_error>

namespace dape {

namespace {
// Never destroyed: its threads may sleep in it while the process ends. A forked child has no threads, so it
// starts with a new pool.
std::atomic<Pool*> current{nullptr};
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
    }
    for (int64_t i = 1; i < threads && i < task.items; ++i) wake_.notify_one();
    take_items(task);
    std::unique_lock lock(mutex_);
    task_ = nullptr;
    left_.wait(lock, [&] { return task.running == 0; });
}

void Pool::serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return task_ && task_->free_seats > 0; });
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
