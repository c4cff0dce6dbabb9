#include "threads.h"

#include <csignal>
#include <cstdlib>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace {

struct Pool {
    std::mutex one_job;  // held by the caller whose job it is
    std::mutex guard;    // of all below but `next`
    std::condition_variable begun, done;
    const std::function<void(int64_t)> *work = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
    int wanted = 0;   // helpers that the job may still take
    int busy = 0;     // helpers at work
    int helpers = 0;  // helpers there are
    pid_t process = getpid();

    void take() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*work)(i);
    }

    void help() {
        sigset_t signals;
        sigfillset(&signals);
        pthread_sigmask(SIG_BLOCK, &signals, nullptr);
        std::unique_lock<std::mutex> hold(guard);
        for (;;) {
            begun.wait(hold, [this] { return work && wanted > 0; });
            wanted--, busy++;
            hold.unlock();
            take();
            hold.lock();
            if (--busy == 0) done.notify_one();
        }
    }

    void run(int64_t n, int threads, const std::function<void(int64_t)> &what) {
        std::unique_lock<std::mutex> hold(guard);
        for (; helpers < threads - 1; helpers++) std::thread([this] { help(); }).detach();
        work = &what, count = n, next = 0, wanted = threads - 1;
        hold.unlock();
        threads == 2 ? begun.notify_one() : begun.notify_all();
        take();
        for (int i = 0; i < 2000; i++) {  // a helper that is at work is nearly done: do not sleep at once
            hold.lock();
            if (busy == 0) break;
            hold.unlock();
            std::atomic_signal_fence(std::memory_order_seq_cst);
        }
        if (!hold.owns_lock()) hold.lock();
        wanted = 0;  // who has not come yet need not come
        done.wait(hold, [this] { return busy == 0; });
        work = nullptr;  // not before: a helper that was stopped between its turn and its work still looks here
    }
};

Pool &pool() {
    // never destroyed: helpers sleep in it until the process ends. A forked child has the pool, but not its threads
    static std::atomic<Pool *> now{new Pool};
    Pool *mine = now.load();
    if (mine->process != getpid()) now = mine = new Pool;
    return *mine;
}

struct Room {
    float *start = nullptr;
    int64_t size = 0;
    ~Room() { std::free(start); }
};

}  // namespace

void share(int64_t count, int threads, const std::function<void(int64_t)> &work) {
    if (threads > count) threads = static_cast<int>(count);
    Pool *found = threads > 1 ? &pool() : nullptr;
    if (!found || !found->one_job.try_lock()) {  // another thread of the program has the helpers
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
    found->run(count, threads, work);
    found->one_job.unlock();
}

float *scratch(int64_t n, Purpose what) {
    static thread_local Room rooms[READING + 1];
    Room &room = rooms[what];
    if (room.size < n) {
        std::free(room.start);
        room.size = 0;
        void *start = nullptr;
        if (posix_memalign(&start, 64, sizeof(float) * static_cast<size_t>(n))) throw std::bad_alloc();
        room.start = static_cast<float *>(start);
        room.size = n;
    }
    return room.start;
}
