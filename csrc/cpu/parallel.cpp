#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace hotgraft::cpu {
namespace {

using Body = std::function<void(std::int64_t, std::int64_t, int)>;

struct Job {
    std::int64_t n, grain;
    int workers;
    const Body* body;
    Body hint = {};  // what `body` points to where nobody waits for the job
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> done{0};  // items finished
    std::atomic<int> joined{1};         // workers that took part; the caller is worker 0
    std::mutex mutex;
    std::exception_ptr error;  // the first one thrown in a piece

    void work(int worker) {
        for (;;) {
            const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= n) return;
            const std::int64_t end = std::min(n, begin + grain);
            try {
                (*body)(begin, end, worker);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex);
                if (!error) error = std::current_exception();
            }
            done.fetch_add(end - begin, std::memory_order_release);
        }
    }

    void drop() { next.store(n, std::memory_order_relaxed); }
};

// Waking a sleeping thread takes longer than many a job. So a thread that has just worked stays
// awake this long for the next job.
constexpr std::chrono::microseconds patience{100};

// Threads sleep until a job is posted, help until it is out of pieces, and sleep again. The caller
// never waits for a thread to wake: whoever comes late finds less to do.
class Pool {
  public:
    void hint(const std::shared_ptr<Job>& job) { post(job, job->workers); }

    void drop_hints() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (job_ && job_->hint) job_->drop();
        }
        while (hints_running_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }

    void run(const std::shared_ptr<Job>& job) {
        post(job, job->workers);
        job->work(0);
        // What is left is at most one piece in each other thread.
        while (job->done.load(std::memory_order_acquire) < job->n) std::this_thread::yield();
        if (job->error) std::rethrow_exception(job->error);
    }

  private:
    void post(const std::shared_ptr<Job>& job, int workers) {
        bool anyone_sleeps;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(workers - 1);
            if (job_ && job_->hint) job_->drop();
            job_ = job;
            generation_.fetch_add(1, std::memory_order_release);
            anyone_sleeps = sleepers_ > 0;
        }
        if (anyone_sleeps) wake_.notify_all();
    }

    // A thread that cannot be had is no failure: the caller then does more of the work itself.
    void grow(int wanted) {
        try {
            for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void serve() {
        std::uint64_t seen = 0;
        for (;;) {
            std::shared_ptr<Job> job;
            stay_awake(seen);
            {
                std::unique_lock<std::mutex> lock(mutex_);
                ++sleepers_;
                wake_.wait(lock, [&] { return generation_ != seen; });
                --sleepers_;
                seen = generation_;
                job = job_;
                if (job->hint) ++hints_running_;
            }
            const int worker = job->joined.fetch_add(1, std::memory_order_relaxed);
            if (worker < job->workers) job->work(worker);
            if (job->hint) hints_running_.fetch_sub(1, std::memory_order_release);
        }
    }

    void stay_awake(std::uint64_t seen) const {
        const auto until = std::chrono::steady_clock::now() + patience;
        while (generation_.load(std::memory_order_acquire) == seen) {
            if (std::chrono::steady_clock::now() > until) return;
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::shared_ptr<Job> job_;
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<int> hints_running_{0};
    int threads_ = 0;
    int sleepers_ = 0;
};

// Never destroyed: its threads are detached and may outlive static destructors. A forked child has
// none of them, so it starts a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    static const bool registered = [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
        return true;
    }();
    (void)registered;
    return *pool.load();
}

}  // namespace

int max_workers() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
    return std::max(1, CPU_COUNT(&set));
}

void hint(std::int64_t n, std::int64_t grain, int workers, Body body) {
    if (n <= 0 || workers <= 1) return;
    auto job = std::make_shared<Job>();
    job->n = n;
    job->grain = grain;
    job->workers = workers;
    job->hint = std::move(body);
    job->body = &job->hint;
    the_pool().hint(job);
}

void drop_hints() { the_pool().drop_hints(); }

void parallel_for(std::int64_t n, std::int64_t grain, int workers,
                  const std::function<void(std::int64_t, std::int64_t, int)>& body) {
    if (n <= 0) return;
    grain = std::max<std::int64_t>(grain, 1);
    const std::int64_t pieces = (n - 1) / grain + 1;
    workers = static_cast<int>(std::min<std::int64_t>(pieces, std::max(workers, 1)));
    if (workers == 1) {
        for (std::int64_t begin = 0; begin < n; begin += grain) {
            body(begin, std::min(n, begin + grain), 0);
        }
        return;
    }
    auto job = std::make_shared<Job>();
    job->n = n;
    job->grain = grain;
    job->workers = workers;
    job->body = &body;
    the_pool().run(job);
}

}  // namespace hotgraft::cpu
