// One product of llama.cpp's: ggml_mul_mat of a quantized weight (in the kind of buffer that llama.cpp would choose)
// and float32 activations, through ggml's public interface, against the library that llama-cpp-python ships.
//
//     llama_cpp TYPE OUT IN ROWS COPIES THREADS         TYPE: q4_0 | q8_0
//
// Writes `ready BUFFER ERROR ROUNDING BYTES` once: the kind of buffer, the relative error against float64 of the given
// and of the rounded weight, and the bytes of one weight. Then for every line with the number of a copy it writes the
// nanoseconds of one product. cpu_kernels.py compiles and drives it.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "llama.cpp driver: %s\n", what);
    std::exit(1);
}

void log_problems(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

ggml_context* context(size_t tensors, size_t graphs) {
    return ggml_init({tensors * ggml_tensor_overhead() + graphs * ggml_graph_overhead() + 4096, nullptr, true});
}

// as llama.cpp asks: the operation with its weight in an empty buffer of that kind
bool supports(ggml_backend_dev_t device, ggml_backend_buffer_type_t kind, ggml_type type, int64_t out, int64_t in,
              int64_t rows) {
    ggml_context* trial = context(4, 0);
    ggml_tensor* weight = ggml_new_tensor_2d(trial, type, in, out);
    ggml_tensor* product = ggml_mul_mat(trial, weight, ggml_new_tensor_2d(trial, GGML_TYPE_F32, in, rows));
    weight->buffer = ggml_backend_buft_alloc_buffer(kind, 0);
    const bool holds = ggml_backend_dev_supports_op(device, product);
    ggml_backend_buffer_free(weight->buffer);
    ggml_free(trial);
    return holds;
}

// The first kind of buffer that takes such a product, as llama.cpp chooses: tiles of AMX where ggml was built for them, repacked weights, or plain.
ggml_backend_buffer_type_t buffers(ggml_backend_dev_t device, ggml_type type, int64_t out, int64_t in, int64_t rows) {
    auto* extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto* kind = extra ? extra(device) : nullptr; kind && *kind; ++kind)
        if (supports(device, *kind, type, out, in, rows)) return *kind;
    return ggml_backend_cpu_buffer_type();
}

}  // namespace

int main(int count, char** arguments) {
    check(count == 7, "usage: llama_cpp TYPE OUT IN ROWS COPIES THREADS");
    const ggml_type type = std::strcmp(arguments[1], "q4_0") == 0 ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0;
    check(type == GGML_TYPE_Q4_0 || std::strcmp(arguments[1], "q8_0") == 0, "TYPE is q4_0 or q8_0");
    const int64_t out = std::atoll(arguments[2]), in = std::atoll(arguments[3]), rows = std::atoll(arguments[4]);
    const int copies = std::atoi(arguments[5]), threads = std::atoi(arguments[6]);
    check(out > 0 && in > 0 && in % 32 == 0 && rows > 0 && copies > 0 && threads > 0, "numbers out of range");

    ggml_log_set(log_problems, nullptr);
    ggml_backend_t backend = ggml_backend_cpu_init();
    check(backend, "no CPU backend");
    ggml_backend_cpu_set_n_threads(backend, threads);
    ggml_backend_dev_t device = ggml_backend_get_device(backend);

    std::mt19937 generator(0);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> weight(out * in), x(rows * in), rounded(out * in), y(out * rows);
    for (float& value : weight) value = uniform(generator);
    for (float& value : x) value = uniform(generator);
    std::vector<char> codes(ggml_row_size(type, in) * out);
    ggml_quantize_chunk(type, weight.data(), codes.data(), 0, out, in, nullptr);
    ggml_get_type_traits(type)->to_float(codes.data(), rounded.data(), out * in);

    ggml_backend_buffer_type_t kind = buffers(device, type, out, in, rows);
    ggml_context *weights = context(copies, 0), *products = context(copies + 1, copies);
    std::vector<ggml_tensor*> packed(copies), results(copies);
    for (auto& tensor : packed) tensor = ggml_new_tensor_2d(weights, type, in, out);
    check(ggml_backend_alloc_ctx_tensors_from_buft(weights, kind), "no memory for the weights");
    for (auto* tensor : packed) ggml_backend_tensor_set(tensor, codes.data(), 0, codes.size());

    ggml_tensor* input = ggml_new_tensor_2d(products, GGML_TYPE_F32, in, rows);
    std::vector<ggml_cgraph*> graphs(copies);
    for (int c = 0; c < copies; ++c) {
        results[c] = ggml_mul_mat(products, packed[c], input);
        graphs[c] = ggml_new_graph(products);
        ggml_build_forward_expand(graphs[c], results[c]);
    }
    check(ggml_backend_alloc_ctx_tensors(products, backend), "no memory for the results");
    ggml_backend_tensor_set(input, x.data(), 0, x.size() * sizeof(float));

    check(ggml_backend_graph_compute(backend, graphs[0]) == GGML_STATUS_SUCCESS, "the product failed");
    ggml_backend_tensor_get(results[0], y.data(), 0, y.size() * sizeof(float));
    double norm = 0, error = 0, norm_rounded = 0, rounding = 0;
    for (int64_t m = 0; m < rows; m += (rows + 3) / 4)  // up to four rows: float64 sums are slow
        for (int64_t n = 0; n < out; ++n) {
            double wanted = 0, near = 0;
            for (int64_t k = 0; k < in; ++k) {
                wanted += double(x[m * in + k]) * weight[n * in + k];
                near += double(x[m * in + k]) * rounded[n * in + k];
            }
            const double found = y[m * out + n];
            norm += wanted * wanted, error += (found - wanted) * (found - wanted);
            norm_rounded += near * near, rounding += (found - near) * (found - near);
        }
    std::printf("ready %s %g %g %zu\n", ggml_backend_buft_name(kind), std::sqrt(error / norm),
                std::sqrt(rounding / norm_rounded), codes.size());
    std::fflush(stdout);

    int copy = 0;
    while (std::scanf("%d", &copy) == 1) {
        check(copy >= 0 && copy < copies, "no such copy");
        const auto start = std::chrono::steady_clock::now();
        const bool done = ggml_backend_graph_compute(backend, graphs[copy]) == GGML_STATUS_SUCCESS;
        const auto end = std::chrono::steady_clock::now();
        check(done, "the product failed");
        std::printf("%lld\n",
                    static_cast<long long>(std::chrono::duration_cast<std::chrono::nanoseconds>(end - start).count()));
        std::fflush(stdout);
    }
    return 0;
}
