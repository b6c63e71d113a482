// Runs a CUDA kernel on the CPU: blocks one after another, one fiber per thread, a random legal interleaving per seed.
//
//   shared memory      starts as 0xff, which is NaN in every float type, before each block
//   cp.async           each copy happens at once or as late as the matching wait allows, by the toss of a coin
//   ldmatrix, mma      32 lanes meet and leave their operands; the last one computes all results after the documented
//   and shuffles       layout, sums in double. Lanes of a warp that meet in different operations end the process
//   __syncthreads      a barrier that not all threads reach, finished ones included, ends the process
//
// So a missing wait or barrier is a wrong number under some seed. What isn't modelled: weak memory order, banks, time.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define SHARED(type, name, count) type* const name = (type*)emulate::shared_array(#name, sizeof(type) * (count))

namespace emulate {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t STATIC_SHARED_BYTES = 48 << 10;  // what a kernel may declare without asking the driver for more

struct Dim {
  unsigned x, y, z;
  Dim(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Copy {
  void* target;
  const void* source;
  bool inside;
  void run() const { inside ? memcpy(target, source, 16) : memset(target, 0, 16); }
};

struct Fiber {
  ucontext_t context;  // for its first time; then longjmp enters it, which doesn't call the system as swapcontext does
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool begun = false;
  unsigned index = 0;
  Dim thread;
  const unsigned* waits_for = nullptr;  // runnable again when this counter isn't `seen` any more
  unsigned seen = 0;
  std::vector<std::vector<Copy>> groups;  // of copies under way, oldest first; the last one is open
};

struct Warp {
  unsigned generation = 0;
  int arrived = 0;
  const char* operation = nullptr;
  char given[32][64], result[32][64];
};

struct Array {
  const char* name;
  char* start;
};

struct Block {
  std::vector<Fiber*> live;
  std::vector<Warp> warps;
  std::vector<Array> arrays;
  unsigned generation = 0, arrived = 0;
  size_t used = 0;
};

inline Block* block;
inline jmp_buf scheduler;
inline Fiber* me;
inline Dim block_index, grid_size, block_size;
inline u32 random_state = 1;
inline std::vector<std::unique_ptr<Fiber>> fibers;
alignas(128) inline char shared_memory[STATIC_SHARED_BYTES];

[[noreturn]] inline void die(const char* why) {
  fprintf(stderr, "emulate: %s (block %u %u %u, thread %u)\n", why, block_index.x, block_index.y, block_index.z, me ? me->index : 0);
  abort();
}

inline void seed(u32 number) { random_state = number * 2654435761u + 1; }

inline u32 random_bits() {  // xorshift32 (Marsaglia 2003); never 0
  if (random_state == 0) random_state = 1;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state >> 7;
}

inline void leave() {  // the fiber, until the scheduler enters it again
  if (!_setjmp(me->place)) _longjmp(scheduler, 1);
}

inline void pause(const unsigned* counter) {
  me->waits_for = counter;
  me->seen = *counter;
  leave();
}

inline void sync_threads() {
  if (++block->arrived < block_size.x) {
    pause(&block->generation);
  } else {
    block->arrived = 0;
    block->generation++;
  }
}

// All 32 lanes bring `mine`; `compute` gets the 32 operands and fills 32 results.
template <class Result, class Given, class Compute>
Result collective(const char* operation, const Given& mine, Compute compute) {
  static_assert(sizeof(Given) <= 64 && sizeof(Result) <= 64, "operands of a lane fit 64 bytes");
  Warp& warp = block->warps[me->index / 32];
  const int lane = me->index % 32;
  if (warp.arrived && strcmp(warp.operation, operation)) die("lanes of one warp meet in different operations");
  warp.operation = operation;
  memcpy(warp.given[lane], &mine, sizeof mine);
  if (++warp.arrived == 32) {
    Given given[32];
    Result result[32];
    for (int l = 0; l < 32; l++) memcpy(&given[l], warp.given[l], sizeof(Given));
    compute(given, result);
    for (int l = 0; l < 32; l++) memcpy(warp.result[l], &result[l], sizeof(Result));
    warp.arrived = 0;
    warp.generation++;
  } else {
    pause(&warp.generation);
  }
  Result r;
  memcpy(&r, warp.result[lane], sizeof r);
  return r;
}

inline void* shared_array(const char* name, size_t bytes) {  // every thread of a block gets the same one
  for (const Array& array : block->arrays)
    if (!strcmp(array.name, name)) return array.start;
  char* start = shared_memory + block->used;
  block->used += (bytes + 127) / 128 * 128;
  if (block->used > STATIC_SHARED_BYTES) die("more than 48 KiB of shared memory");
  block->arrays.push_back({name, start});
  return start;
}

inline void (*run_body)(const void*);
inline const void* body;

inline void fiber_main() {
  for (;;) {  // a fiber is the same thread of each block in turn
    run_body(body);
    std::vector<Fiber*>& live = block->live;
    for (size_t i = 0; i < live.size(); i++)
      if (live[i] == me) {
        live[i] = live.back();
        live.pop_back();
        break;
      }
    leave();
  }
}

inline void enter(Fiber& fiber) {
  me = &fiber;
  if (_setjmp(scheduler)) return;
  if (me->begun) _longjmp(me->place, 1);
  me->begun = true;
  getcontext(&me->context);
  me->context.uc_stack.ss_sp = me->stack.get();
  me->context.uc_stack.ss_size = STACK_BYTES;
  me->context.uc_link = nullptr;
  makecontext(&me->context, fiber_main, 0);
  setcontext(&me->context);
}

inline void run_block() {
  Block b;
  block = &b;
  b.warps.resize(block_size.x / 32);
  memset(shared_memory, 0xff, sizeof shared_memory);
  while (fibers.size() < block_size.x) fibers.emplace_back(new Fiber);
  for (unsigned t = 0; t < block_size.x; t++) {
    Fiber& f = *fibers[t];
    f.index = t;
    f.thread = Dim(t, 0, 0);
    f.waits_for = nullptr;
    f.groups.assign(1, {});
    b.live.push_back(&f);
  }
  while (!b.live.empty()) {
    const size_t count = b.live.size(), first = random_bits() % count;
    Fiber* next = nullptr;
    for (size_t i = 0; i < count && !next; i++) {  // the first runnable one from a random place on
      Fiber* f = b.live[(first + i) % count];
      if (!f->waits_for || *f->waits_for != f->seen) next = f;
    }
    me = nullptr;
    if (!next) die("a barrier or a collective operation that not all threads reach");
    next->waits_for = nullptr;
    enter(*next);
  }
  block = nullptr;
}

// A kernel that a library offers, and its only argument.
struct Kernel {
  const char* name;
  void (*run)(const void* argument);
  size_t argument_bytes;
  const Kernel* before;
  static inline const Kernel* last = nullptr;

  Kernel(const char* name, void (*run)(const void*), size_t argument_bytes)
      : name(name), run(run), argument_bytes(argument_bytes), before(last) {
    last = this;
  }
};

inline void launch(const Kernel& kernel, Dim grid, Dim threads, const void* argument) {
  const std::vector<std::max_align_t> copied = [&] {  // as the driver does
    std::vector<std::max_align_t> target((kernel.argument_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
    memcpy(target.data(), argument, kernel.argument_bytes);
    return target;
  }();
  body = copied.data();
  run_body = kernel.run;
  grid_size = grid;
  block_size = threads;
  if (threads.x % 32 || threads.x == 0 || threads.x > 1024 || threads.y * threads.z != 1) die("bad size of a block");
  if (!grid.x || !grid.y || !grid.z || grid.x >> 31 || grid.y > 65535 || grid.z > 65535) die("bad size of the grid");
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block_index = Dim(x, y, z);
        run_block();
      }
}

// A lane reads from lane `source(lane)` of its warp. Only whole warps, as all our kernels use them.
template <class T, class Source>
T shuffle(const char* operation, u32 mask, T value, int width, Source source) {
  if (mask != 0xffffffffu || width != 32) die("a shuffle of a part of a warp");
  return collective<T>(operation, value, [=](const T* given, T* result) {
    for (int lane = 0; lane < 32; lane++) {
      const int from = source(lane);
      result[lane] = given[from < 0 || from > 31 ? lane : from];
    }
  });
}

struct Four {
  u32 r[4];
};
struct MatrixOperands {
  u32 a[4], b[2];
  float c[4];
};
struct MatrixResult {
  float c[4];
};

template <class ToFloat>
void mma(const char* operation, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, ToFloat to_float) {
  const MatrixOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const auto result = collective<MatrixResult>(operation, mine, [=](const MatrixOperands* lane, MatrixResult* out) {
    double left[16][16], right[8][16];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
          const int k = l % 4 * 2 + half + 8 * (i / 2);
          left[l / 4 + 8 * (i % 2)][k] = to_float(u16(lane[l].a[i] >> (16 * half)));
          if (i % 2 == 0) right[l / 4][k] = to_float(u16(lane[l].b[i / 2] >> (16 * half)));
        }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        double sum = lane[l].c[i];
        for (int k = 0; k < 16; k++) sum += left[l / 4 + 8 * (i / 2)][k] * right[l % 4 * 2 + i % 2][k];
        out[l].c[i] = (float)sum;
      }
  });
  memcpy(c, result.c, sizeof c);
}

}  // namespace emulate

typedef emulate::Dim dim3;
#define threadIdx (emulate::me->thread)
#define blockIdx emulate::block_index
#define gridDim emulate::grid_size
#define blockDim emulate::block_size
#define __syncthreads emulate::sync_threads

DEVICE void __syncwarp() {
  emulate::collective<int>("syncwarp", 0, [](const int*, int* out) { memset(out, 0, 32 * sizeof(int)); });
}
template <class T>
static T __shfl_sync(u32 mask, T value, int source, int width = 32) {
  // each lane names its own source, so both travel
  struct Pair {
    T value;
    int source;
  };
  if (mask != 0xffffffffu || width != 32) emulate::die("a shuffle of a part of a warp");
  return emulate::collective<T>("shfl", Pair{value, source}, [](const Pair* given, T* result) {
    for (int lane = 0; lane < 32; lane++) result[lane] = given[given[lane].source & 31].value;
  });
}
template <class T>
static T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32) {
  return emulate::shuffle("shfl.xor", mask, value, width, [=](int lane) { return lane ^ bits; });
}
template <class T>
static T __shfl_up_sync(u32 mask, T value, int by, int width = 32) {
  return emulate::shuffle("shfl.up", mask, value, width, [=](int lane) { return lane - by; });
}
template <class T>
static T __shfl_down_sync(u32 mask, T value, int by, int width = 32) {
  return emulate::shuffle("shfl.down", mask, value, width, [=](int lane) { return lane + by; });
}

DEVICE u32 __float_as_uint(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
DEVICE float __uint_as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

DEVICE float f16_to_float(u16 bits) {
  const u32 exponent = bits >> 10 & 31, fraction = bits & 1023, sign = u32(bits & 0x8000) << 16;
  if (exponent == 0) {  // zero and subnormals: units of 2^-24
    const float size = float(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}

DEVICE u16 float_to_f16(float f) {  // to the nearest, ties to even
  const u32 bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return u16(0x7fff);  // NaN, as cvt.rn.f16.f32 writes it
  if (size >= 0x477ff000) return u16(sign | 0x7c00);
  if (size < 0x38800000)  // below 2^-14: the sum's last bit is 2^-24, so the addition rounds
    return u16(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000));
  return u16(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

DEVICE u16 float_to_bf16(float f) {
  const u32 bits = __float_as_uint(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return u16(0x7fff);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEVICE u32 subtract_f16x2(u32 a, u32 b) {
  u32 r = 0;
  for (int shift = 0; shift < 32; shift += 16)
    r |= u32(float_to_f16(f16_to_float(u16(a >> shift)) - f16_to_float(u16(b >> shift)))) << shift;
  return r;
}

DEVICE u32 subtract_bf16x2(u32 a, u32 b) {
  u32 r = 0;
  for (int shift = 0; shift < 32; shift += 16)
    r |= u32(float_to_bf16(bf16_to_float(u16(a >> shift)) - bf16_to_float(u16(b >> shift)))) << shift;
  return r;
}

DEVICE float round_half_even(float f) { return std::nearbyint(f); }

DEVICE Words4 load16(const void* source) {
  if ((u64)source & 15) emulate::die("a misaligned load of 16 bytes");
  return *(const Words4*)source;
}
DEVICE void store16(void* target, const Words4& words) {
  if ((u64)target & 15) emulate::die("a misaligned store of 16 bytes");
  *(Words4*)target = words;
}

DEVICE void cp_async16(void* target, const void* source, bool inside) {
  if (((u64)target & 15) || (inside && ((u64)source & 15))) emulate::die("a misaligned cp.async of 16 bytes");
  const emulate::Copy copy{target, source, inside};
  if (emulate::random_bits() & 1)
    copy.run();
  else
    emulate::me->groups.back().push_back(copy);
}

DEVICE u64 evict_first_policy() { return 0; }
DEVICE void cp_async16_once(void* target, const void* source, u64) { cp_async16(target, source, true); }

DEVICE void cp_async_commit() { emulate::me->groups.emplace_back(); }

template <int pending>
static void cp_async_wait() {
  auto& groups = emulate::me->groups;
  while ((int)groups.size() - 1 > pending) {
    for (const auto& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  if ((u64)row & 15) emulate::die("a misaligned row of ldmatrix");
  const auto result = emulate::collective<emulate::Four>("ldmatrix.x4", row, [](const void* const* rows, emulate::Four* out) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) memcpy(&out[l].r[m], (const char*)rows[m * 8 + l / 4] + l % 4 * 4, 4);
  });
  memcpy(r, result.r, sizeof r);
}

DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulate::mma("mma.f16", c, a, b0, b1, f16_to_float);
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulate::mma("mma.bf16", c, a, b0, b1, bf16_to_float);
}
