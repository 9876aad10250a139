// Threads that share the items of one task and, but for a moment, sleep between tasks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dape {

class Pool {
  public:
    using Action = void (*)(void* context, int64_t item);

    // Call `action` with every item below `items`, on the calling thread and up to `threads` - 1 others.
    // Items are handed out one by one, so a thread that the system holds up delays no more than its own item,
    // and the caller never waits for a thread that has not begun.
    static void run(int threads, int64_t items, Action action, void* context);

  private:
    struct Task {
        Action action;
        void* context;
        int64_t items;
        std::atomic<int64_t> next{0};
        int free_seats;               // threads that may still join
        std::atomic<int> running{0};  // threads that have joined and not left
    };

    static Pool& instance();
    void share(int threads, Task& task);
    void serve();
    static void take_items(Task& task);

    bool has_seat() const { return task_ && task_->free_seats > 0; }

    std::mutex busy_;  // held by the caller whose task is shared
    std::mutex mutex_;
    std::condition_variable wake_, left_;
    std::vector<std::thread> threads_;
    Task* task_ = nullptr;
    int asleep_ = 0;
    std::atomic<uint64_t> tasks_{0};  // shared so far
};

}  // namespace dape
