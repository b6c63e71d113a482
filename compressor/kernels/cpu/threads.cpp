// Divides tasks among torch's threads, and keeps memory for each thread.
//
// The threads are those of torch's own operations: a pool of this library would compete with them for the cores, since
// each lets its threads spin while the other works. This file knows torch by the address of one function of its stable
// ABI, torch_parallel_for (torch/csrc/stable/c/shim.h), so that it is built without torch.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <stdexcept>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#include "common.h"
#include "ops.h"

namespace compressor {
namespace {

// f is called with parts of [begin, end) on some threads of a team, at least once; returns 0, or an error of torch's
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context);
std::atomic<ParallelFor> parallel_for{nullptr};

// A forked child has none of its parent's threads, but the OpenMP runtime would wait for them in the thread that called fork.
thread_local bool team_is_lost = false;
#if defined(__unix__) || defined(__APPLE__)
const int at_fork = pthread_atfork(nullptr, nullptr, [] { team_is_lost = true; });
#endif

std::atomic<void (*)(int)> set_threads{nullptr};  // omp_set_num_threads, which sets those of the calling thread's teams
thread_local int reserved = 0;                    // size of this library's teams while those of torch have one thread; 0: they are of one size

int64_t now() {  // nanoseconds
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A team ends when its last thread has come, and while other processes have the cores a thread comes some milliseconds late. So the time that a
// team loses against one thread is followed by `factor` times as much in which callers work alone; twice as long after each loss in a row.
constexpr int64_t UNNOTICED = 50000, LEAST_FACTOR = 8, MOST_FACTOR = 64;  // at worst 1 / 65 of the time is lost
std::atomic<int64_t> alone_until{0}, factor{LEAST_FACTOR};

void judge_team(int64_t lost, int64_t end) {
  if (lost < UNNOTICED) return factor.store(LEAST_FACTOR);
  const int64_t times = factor.load();
  factor.store(std::min(2 * times, MOST_FACTOR));
  alone_until.store(end + times * lost);
}

// Each thread takes half of its fair share of the remaining tasks, so that nobody waits for a thread that starts late
// because another process has its core, and the last threads end one task apart.
struct Tasks {
  const std::function<void(int64_t)>& f;
  const int64_t count, threads;
  std::atomic<int64_t> next{0};
  std::atomic_flag has_failed = ATOMIC_FLAG_INIT, has_ended = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  int64_t alone = 0;  // nanoseconds that the first thread to end would have taken for all tasks; 0 if it did none

  Tasks(const std::function<void(int64_t)>& f, int64_t count, int64_t threads) : f(f), count(count), threads(threads) {}

  void work() noexcept {  // exceptions must not leave through torch's C function
    const int64_t start = now();
    int64_t done = 0;
    try {
      for (int64_t begin = next.load(); begin < count;) {
        const int64_t end = begin + std::max<int64_t>(1, (count - begin) / (2 * threads));
        if (!next.compare_exchange_weak(begin, end)) continue;
        for (int64_t i = begin; i < end; i++) f(i);
        done += end - begin, begin = next.load();
      }
      if (done > 0 && !has_ended.test_and_set()) alone = (now() - start) * count / done;
    } catch (...) {
      if (!has_failed.test_and_set()) error = std::current_exception();
      next.store(count);
    }
  }
};

}  // namespace

void parallel(int64_t threads, int64_t tasks, const std::function<void(int64_t)>& f) {
  threads = std::min(threads, tasks);
  ParallelFor run = threads > 1 && !team_is_lost ? parallel_for.load() : nullptr;
  const int64_t begin = run ? now() : 0;
  if (begin < alone_until.load()) run = nullptr;
  if (!run) {
    for (int64_t i = 0; i < tasks; i++) f(i);
    return;
  }
  Tasks shared(f, tasks, threads);
  if (reserved) set_threads.load()(reserved);
  const int32_t error = run(0, threads, 1, [](int64_t, int64_t, void* context) { static_cast<Tasks*>(context)->work(); }, &shared);
  if (reserved) set_threads.load()(1);
  if (shared.error) std::rethrow_exception(shared.error);
  if (error) throw std::runtime_error("torch_parallel_for failed");
  if (const int64_t end = now(); shared.alone > 0) judge_team(end - begin - shared.alone, end);
}

void* scratch(int slot, size_t bytes) {
  struct Buffer { std::unique_ptr<char[]> memory; size_t size = 0; };
  static thread_local Buffer buffers[8];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    b.size = 0, b.memory.reset();
    b.memory.reset(new char[bytes + 64]), b.size = bytes;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(b.memory.get()) + 63) & ~uintptr_t(63));
}

}  // namespace compressor

extern "C" int64_t use_parallel_for(void* function) {
  compressor::parallel_for.store(reinterpret_cast<compressor::ParallelFor>(function));
  compressor::alone_until.store(0), compressor::factor.store(compressor::LEAST_FACTOR);
  return compressor::OK;
}

extern "C" int64_t use_set_threads(void* function) {
  compressor::set_threads.store(reinterpret_cast<void (*)(int)>(function));
  return compressor::OK;
}

extern "C" int64_t reserve_threads(int64_t threads, int64_t of_torch) {
  if (!compressor::set_threads.load()) return compressor::BAD_SHAPE;
  compressor::reserved = int(threads);
  compressor::set_threads.load()(int(of_torch));
  return compressor::OK;
}
