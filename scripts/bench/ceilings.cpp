// What this machine can do at most: bandwidth and arithmetic peaks on a number of threads. Compiled by
// cpu_kernels.py at run time. Every function returns units per second; 0 means that the processor lacks it.

#include <cpuid.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define AVX2 __attribute__((target("avx2,fma")))

namespace {

// Twelve independent sums, more than latency times units. They are separate variables because gcc keeps an array whose
// elements an assembly names in memory, and that halves the peak.
#define EACH(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)
#define KEEP_512(sum) asm volatile("" : "+v"(sum));
#define KEEP_256(sum) asm volatile("" : "+x"(sum));
constexpr int CHAINS = 12;
constexpr size_t AHEAD = 2048, FURTHER = 8192;
volatile int64_t sink;

bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }

template <typename Work>
double seconds(int threads, Work work) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Four places at once, fetched into the first-level cache, or one, fetched from further ahead into the second: which is faster depends on the
// prefetchers of the processor (18 against 27 GB/s on Zen 4, 16 against 11 on Granite Rapids).
template <int STREAMS> AVX512 int64_t read_512(const char* from, size_t bytes) {
    __m512i sum = _mm512_setzero_si512();
    const size_t part = bytes / STREAMS;
    for (size_t i = 0; i + 64 <= part; i += 64) {
        for (int stream = 0; stream < STREAMS; ++stream) {
            const char* place = from + stream * part + i;
            if (STREAMS == 1) _mm_prefetch(place + FURTHER, _MM_HINT_T1);
            else _mm_prefetch(place + AHEAD, _MM_HINT_T0);
            sum = _mm512_xor_si512(sum, _mm512_loadu_si512(place));
        }
    }
    int64_t sums[8], total = 0;
    _mm512_storeu_si512(sums, sum);
    for (int64_t one : sums) total += one;
    return total;
}

AVX2 int64_t read_256(const char* from, size_t bytes) {
    __m256i sum = _mm256_setzero_si256();
    const size_t part = bytes / 4;
    for (size_t i = 0; i + 64 <= part; i += 64) {
        for (int stream = 0; stream < 4; ++stream) {
            const char* place = from + stream * part + i;
            _mm_prefetch(place + AHEAD, _MM_HINT_T0);
            sum = _mm256_xor_si256(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
            sum = _mm256_xor_si256(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place + 32)));
        }
    }
    int64_t sums[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    return sums[0] + sums[1] + sums[2] + sums[3];
}

// The empty assembly names every sum, so that no chain is joined with another or left out.
VNNI void int8_512(int64_t rounds) {
    const __m512i u = _mm512_set1_epi8(3), v = _mm512_set1_epi8(-2);
#define START(sum) __m512i sum = _mm512_setzero_si512();
#define STEP(sum) sum = _mm512_dpbusd_epi32(sum, u, v); KEEP_512(sum)
    EACH(START)
    for (int64_t r = 0; r < rounds; ++r) { EACH(STEP) }
#undef START
#undef STEP
}

// Two instructions and an add stand for vpdpbusd where it doesn't exist.
AVX2 void int8_256(int64_t rounds) {
    const __m256i u = _mm256_set1_epi8(3), v = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
    __m256i pairs;
#define START(sum) __m256i sum = _mm256_setzero_si256();
#define STEP(sum) \
    pairs = _mm256_maddubs_epi16(u, v);  \
    KEEP_256(pairs)                      \
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones)); KEEP_256(sum)
    EACH(START)
    for (int64_t r = 0; r < rounds; ++r) { EACH(STEP) }
#undef START
#undef STEP
}

AVX512 void float_512(int64_t rounds) {
    const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#define START(sum) __m512 sum = _mm512_set1_ps(1);
#define STEP(sum) sum = _mm512_fmadd_ps(a, b, sum); KEEP_512(sum)
    EACH(START)
    for (int64_t r = 0; r < rounds; ++r) { EACH(STEP) }
#undef START
#undef STEP
}

AVX2 void float_256(int64_t rounds) {
    const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
#define START(sum) __m256 sum = _mm256_set1_ps(1);
#define STEP(sum) sum = _mm256_fmadd_ps(a, b, sum); KEEP_256(sum)
    EACH(START)
    for (int64_t r = 0; r < rounds; ++r) { EACH(STEP) }
#undef START
#undef STEP
}

BF16 void bf16_512(int64_t rounds) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512bh a = _mm512_cvtne2ps_pbh(one, one);
#define START(sum) __m512 sum = one;
#define STEP(sum) sum = _mm512_dpbf16_ps(sum, a, a); KEEP_512(sum)
    EACH(START)
    for (int64_t r = 0; r < rounds; ++r) { EACH(STEP) }
#undef START
#undef STEP
}

#if defined(__linux__) && defined(SYS_arch_prctl)
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
bool has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 3) != 3) return false;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // Linux gives the tiles to those who ask
}
// Twelve products as everywhere, on four tiles of sums.
#define TILES(name, instruction)                                                                        \
    void name(int64_t rounds) {                                                                         \
        static const Shapes shapes;                                                                     \
        asm volatile("ldtilecfg %0" ::"m"(shapes));                                                     \
        for (int64_t r = 0; r < rounds; ++r)                                                            \
            for (int i = 0; i < CHAINS / 4; ++i)                                                        \
                asm volatile(instruction " %tmm6, %tmm4, %tmm0\n" instruction " %tmm7, %tmm4, %tmm1\n"  \
                             instruction " %tmm6, %tmm5, %tmm2\n" instruction " %tmm7, %tmm5, %tmm3\n"); \
        asm volatile("tilerelease");                                                                    \
    }
TILES(int8_tiles, "tdpbssd")
TILES(bf16_tiles, "tdpbf16ps")
#undef TILES
#else
bool has_amx() { return false; }
void int8_tiles(int64_t) {}
void bf16_tiles(int64_t) {}
#endif

double peak(int threads, int64_t rounds, double operations, void (*work)(int64_t)) {
    return operations * CHAINS * rounds * threads / seconds(threads, [=](int) { work(rounds); });
}

}  // namespace

extern "C" {

int has_required() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Memory that wasn't touched yet: large pages, as packed weights have.
void use_large_pages(char* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t first = (uintptr_t(memory) + LARGE - 1) & ~(LARGE - 1), last = (uintptr_t(memory) + bytes) & ~(LARGE - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// streams: 1 or 4
double read_bandwidth(const char* from, size_t bytes, int threads, int streams) {
    const size_t part = bytes / threads / 256 * 256;
    const bool wide = has_avx512();
    const double spent = seconds(threads, [=](int t) {
        const int64_t sum = !wide ? read_256(from + t * part, part) : streams == 1 ? read_512<1>(from + t * part, part) : read_512<4>(from + t * part, part);
        if (t == 0) sink = sum;
        else asm volatile("" ::"r"(sum));
    });
    return part * threads / spent;
}

// bytes read and written together
double copy_bandwidth(const char* from, char* to, size_t bytes, int threads) {
    const size_t part = bytes / threads / 64 * 64;
    return 2.0 * part * threads / seconds(threads, [=](int t) { std::memcpy(to + t * part, from + t * part, part); });
}

// STREAM's triad, a = b + s c; bytes as STREAM counts them, three arrays, though writing a reads it first
double triad_bandwidth(float* a, const float* b, const float* c, size_t count, int threads) {
    const size_t part = count / threads / 16 * 16;
    const double spent = seconds(threads, [=](int t) {
        float* to = a + t * part;
        const float *one = b + t * part, *other = c + t * part;
        for (size_t i = 0; i < part; ++i) to[i] = one[i] + 3.0f * other[i];
    });
    return 12.0 * part * threads / spent;
}

double int8_peak(int threads, int64_t rounds) {
    if (has_avx512() && __builtin_cpu_supports("avx512vnni")) return peak(threads, rounds, 128, int8_512);
    return peak(threads, rounds, 64, int8_256);
}

// of tiles of 16 x 16 x 64 bytes
double int8_tiles_peak(int threads, int64_t rounds) { return has_amx() ? peak(threads, rounds, 32768, int8_tiles) : 0; }
double bf16_tiles_peak(int threads, int64_t rounds) { return has_amx() ? peak(threads, rounds, 16384, bf16_tiles) : 0; }

double float_peak(int threads, int64_t rounds) {
    return has_avx512() ? peak(threads, rounds, 32, float_512) : peak(threads, rounds, 16, float_256);
}

double bf16_peak(int threads, int64_t rounds) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") ? peak(threads, rounds, 64, bf16_512) : 0;
}
}
