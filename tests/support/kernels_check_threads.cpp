// How tasks are shared out among the threads of a team, which here is one of std::thread: each is done once, what a task throws
// arrives, a call from within a task ends. Part of the program of kernels_check.cpp; with ALONE a program of its own.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../compressor/kernels/cpu/common.h"
#include "../../compressor/kernels/cpu/ops.h"

using namespace compressor;

namespace {
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
thread_local bool is_inside = false;

// As torch_parallel_for: a part for each thread, the caller among them; a call from within runs in the caller.
int32_t run_on_threads(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  if (is_inside) return f(begin, end, context), 0;
  const auto part = [&](int64_t i) {
    is_inside = true;
    f(i, i + 1, context);
    is_inside = false;
  };
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; i++) others.emplace_back(part, i);
  part(begin);
  for (auto& other : others) other.join();
  return 0;
}
int32_t refuse(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) { return 1; }

ParallelFor team = nullptr;  // given again before each call, so that no call works alone since the one before came late

bool each_once(int64_t threads, int64_t tasks) {
  use_parallel_for(reinterpret_cast<void*>(team));
  std::vector<int> plain(size_t(tasks), 0);  // not atomic: a task that two threads do is a race
  parallel(threads, tasks, [&](int64_t i) { plain[size_t(i)]++; });
  for (const int n : plain)
    if (n != 1) return false;
  return true;
}

template <class Exception> bool arrives(int64_t threads, int64_t which) {
  use_parallel_for(reinterpret_cast<void*>(team));
  try {
    parallel(threads, 50, [&](int64_t i) { if (i == which) throw Exception(); });
  } catch (const Exception&) {
    return true;
  }
  return false;
}

// A team whose second thread is late: the next calls leave it out, one after a pause doesn't.
int calls = 0;
int32_t run_late(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    f(end - 1, end, context);
  });
  f(begin, begin + 1, context);
  other.join();
  calls++;
  return 0;
}
int check_late_team() {
  use_parallel_for(reinterpret_cast<void*>(run_late));
  for (int i = 0; i < 3; i++) parallel(2, 100, [](int64_t) {});
  if (calls != 1) return 36;  // the second and the third worked alone
  for (int i = 0; i < 25 && calls == 1; i++) {  // until 8 times what was lost, which is more on a busy machine
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    parallel(2, 100, [](int64_t) {});
  }
  return calls == 2 ? 0 : 37;
}
}  // namespace

int check_threads() {
  if (!each_once(4, 100) || !arrives<std::bad_alloc>(4, 7)) return 30;
  use_parallel_for(reinterpret_cast<void*>(refuse));
  try {
    parallel(2, 2, [](int64_t) {});
    return 31;
  } catch (const std::runtime_error&) {
  }
  team = run_on_threads;
  for (const int64_t threads : {1, 2, 3, 7})
    for (const int64_t tasks : {0, 1, 2, 5, 64, 1001})
      if (!each_once(threads, tasks)) return 32;
  for (const int64_t which : {0, 25, 49})
    for (const int64_t threads : {1, 2, 7})
      if (!arrives<std::bad_alloc>(threads, which)) return 33;
  std::atomic<int64_t> done{0};
  parallel(3, 9, [&](int64_t) { parallel(3, 9, [&](int64_t) { done++; }); });
  if (done != 81) return 34;
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; i++) callers.emplace_back([&] { if (each_once(2, 300)) done++; });
  for (auto& caller : callers) caller.join();
  if (done != 89) return 35;
  const int error = check_late_team();
  use_parallel_for(reinterpret_cast<void*>(team));  // and so for the checks that follow
  return error;
}

#ifdef ALONE
int main() { return check_threads(); }
#endif
