// Does the linear kernel compute the right thing, does a row's result depend on T, and how near is it to memory speed?
//
//   nvcc -std=c++17 -arch=sm_90 -O3 -I ggml_ext -I ggml_ext/linear -I GGML/include benchmarks/kernels/linear.cu -o linear && ./linear
//
// (GGML is a source tree of ggml; only its headers are used.) Checks: every weight format, several shapes and widths,
// against a float64 product with the weights dequantised here. Times: the products of a 27B step at T = 1 and 16, each
// in a CUDA graph that rotates among copies of the weights so that no cache holds them; the unit is GB/s of weight
// bytes, and the share of what a large device-to-device copy moves (bytes read and written). Exits 1 on any FAIL.
#include "../../ggml_ext/linear/linear.cu"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define CHECK(call)                                                                                     \
    do {                                                                                                \
        const cudaError_t status = (call);                                                              \
        if (status != cudaSuccess) {                                                                    \
            printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status));                      \
            exit(2);                                                                                    \
        }                                                                                               \
    } while (0)

// ---- weight formats on the host

struct format {
    const char * name;
    int          type, block, bytes;  // weights and bytes of a block
    int          half_at[2];          // offsets of the block's f16 scales, -1 for none
};

static const format FORMATS[] = {
    { "Q4_K", GGML_TYPE_Q4_K, 256, 144, { 0, 2 } },   { "Q5_K", GGML_TYPE_Q5_K, 256, 176, { 0, 2 } },
    { "Q6_K", GGML_TYPE_Q6_K, 256, 210, { 208, -1 } }, { "Q8_0", GGML_TYPE_Q8_0, 32, 34, { 0, -1 } },
    { "Q4_0", GGML_TYPE_Q4_0, 32, 18, { 0, -1 } },     { "F16", GGML_TYPE_F16, 32, 64, { -1, -1 } },
    { "BF16", GGML_TYPE_BF16, 32, 64, { -1, -1 } },    { "F32", GGML_TYPE_F32, 32, 128, { -1, -1 } },
};

static const format & format_of(int type) {
    for (const format & f : FORMATS) {
        if (f.type == type) {
            return f;
        }
    }
    abort();
}

static int64_t row_bytes(const format & f, int64_t K) { return K / f.block * f.bytes; }

static double half_value(const uint8_t * p) {
    __half h;
    memcpy(&h, p, 2);
    return (double) __half2float(h);
}

// The 6-bit scale and minimum of block j of a Q4_K or Q5_K super-block, from its 12 packed bytes.
static void k_scale(const uint8_t * s, int j, int & scale, int & minimum) {
    if (j < 4) {
        scale = s[j] & 63, minimum = s[j + 4] & 63;
    } else {
        scale   = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        minimum = s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
}

// Weight e of a block.
static double weight_at(int type, const uint8_t * b, int e) {
    switch (type) {
        case GGML_TYPE_Q4_K: {
            int scale, minimum;
            k_scale(b + 4, e / 32, scale, minimum);
            const int q = b[16 + e / 64 * 32 + e % 32] >> (e / 32 % 2 * 4) & 15;
            return half_value(b) * scale * q - half_value(b + 2) * minimum;
        }
        case GGML_TYPE_Q5_K: {
            int scale, minimum;
            k_scale(b + 4, e / 32, scale, minimum);
            const int low = b[48 + e / 64 * 32 + e % 32] >> (e / 32 % 2 * 4) & 15;
            const int q   = low | (b[16 + e % 32] >> (e / 32) & 1) << 4;
            return half_value(b) * scale * q - half_value(b + 2) * minimum;
        }
        case GGML_TYPE_Q6_K: {
            const int half = e / 128, quarter = e % 128 / 32, l = e % 32;
            const int low  = b[64 * half + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
            const int high = b[128 + 32 * half + l] >> (2 * quarter) & 3;
            return half_value(b + 208) * (int8_t) b[192 + e / 16] * ((low | high << 4) - 32);
        }
        case GGML_TYPE_Q8_0: return half_value(b) * (int8_t) b[2 + e];
        case GGML_TYPE_Q4_0: return half_value(b) * ((b[2 + e % 16] >> (e / 16 * 4) & 15) - 8);
        case GGML_TYPE_F16:  return half_value(b + 2 * e);
        case GGML_TYPE_BF16: {
            const uint32_t bits = (uint32_t) (b[2 * e] | b[2 * e + 1] << 8) << 16;
            float value;
            memcpy(&value, &bits, 4);
            return value;
        }
        default: {
            float value;
            memcpy(&value, b + 4 * e, 4);
            return value;
        }
    }
}

// ---- random data, made on the device

__host__ __device__ inline uint32_t mix(uint64_t v) {
    v = (v ^ (v >> 31)) * 0x9e3779b97f4a7c15ull;
    v = (v ^ (v >> 29)) * 0xbf58476d1ce4e5b9ull;
    return (uint32_t) (v >> 32);
}

__global__ void fill_random(uint8_t * data, int64_t blocks, format f, uint64_t seed) {
    const int64_t block = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= blocks) {
        return;
    }
    uint8_t * b = data + block * f.bytes;
    for (int i = 0; i < f.bytes; i++) {
        b[i] = (uint8_t) mix(seed + (uint64_t) (block * f.bytes + i));
    }
    for (int i = 0; i < 32 && f.half_at[0] < 0; i++) {  // plain floats in [-0.1, 0.1)
        const float value = ((float) mix(seed + 77 * (uint64_t) (block * 32 + i)) / 4294967296.0f - 0.5f) * 0.2f;
        const uint32_t bits = __float_as_uint(value);
        const __half half   = __float2half(value);
        switch (f.type) {
            case GGML_TYPE_F16:  memcpy(b + 2 * i, &half, 2); break;
            case GGML_TYPE_BF16: memcpy(b + 2 * i, (const char *) &bits + 2, 2); break;
            default:             memcpy(b + 4 * i, &bits, 4);
        }
    }
    for (int i = 0; i < 2; i++) {
        if (f.half_at[i] >= 0) {
            const uint32_t thousandths = mix(seed ^ (uint64_t) (block * 2 + i)) % 1000;
            const __half   scale       = __float2half(1e-3f + 1e-6f * (float) thousandths);
            memcpy(b + f.half_at[i], &scale, 2);
        }
    }
}

static uint8_t * random_weight(const format & f, int64_t M, int64_t K, uint64_t seed) {
    uint8_t *     data   = nullptr;
    const int64_t blocks = M * (K / f.block);
    CHECK(cudaMalloc(&data, (size_t) (blocks * f.bytes)));
    fill_random<<<(unsigned) ((blocks + 127) / 128), 128>>>(data, blocks, f, seed);
    CHECK(cudaGetLastError());
    return data;
}

static std::vector<float> random_rows(int64_t T, int64_t K, uint64_t seed) {
    std::vector<float> x((size_t) (T * K));
    for (size_t i = 0; i < x.size(); i++) {  // rows of very different magnitude, with outliers
        const float u = (float) mix(seed + i) / 4294967296.0f - 0.5f;
        x[i] = u * std::exp2((float) (i / (size_t) K % 5) * 3.0f) * (mix(seed * 3 + i) % 997 == 0 ? 50.0f : 1.0f);
    }
    return x;
}

// ---- checks

static std::vector<void *> temporary;

static void * allocate(pydflash_cuda *, size_t size) {
    void * p = nullptr;
    CHECK(cudaMalloc(&p, size));
    temporary.push_back(p);
    return p;
}

static void free_temporary() {
    CHECK(cudaDeviceSynchronize());
    for (void * p : temporary) {
        CHECK(cudaFree(p));
    }
    temporary.clear();
}

template <typename Value>
static Value * to_device(const std::vector<Value> & host) {
    void * p = allocate(nullptr, host.size() * sizeof(Value));
    CHECK(cudaMemcpy(p, host.data(), host.size() * sizeof(Value), cudaMemcpyHostToDevice));
    return (Value *) p;
}

static std::vector<float> to_host(const float * device, size_t count) {
    std::vector<float> host(count);
    CHECK(cudaMemcpy(host.data(), device, count * sizeof(float), cudaMemcpyDeviceToHost));
    return host;
}

// The largest relative error of a row: |out - reference| / |reference|, over the rows t of the given weight rows.
static double row_error(const std::vector<float> & out, int64_t M, const std::vector<double> & reference,
                        const std::vector<int64_t> & weight_rows, int64_t T) {
    double worst = 0;
    for (int64_t t = 0; t < T; t++) {
        double difference = 0, norm = 0;
        for (size_t i = 0; i < weight_rows.size(); i++) {
            const double r = reference[(size_t) t * weight_rows.size() + i];
            const double d = out[(size_t) (t * M + weight_rows[i])] - r;
            difference += d * d, norm += r * r;
        }
        const double error = std::sqrt(difference / norm);
        worst = error <= worst ? worst : error;  // a NaN becomes the worst
    }
    return worst;
}

// reference[t][i] = sum_k x[t][k] W[weight_rows[i]][k] in float64.
static std::vector<double> reference_product(const format & f, const uint8_t * device,
                                             const std::vector<int64_t> & weight_rows, const std::vector<float> & x,
                                             int64_t T, int64_t K) {
    std::vector<double>  result((size_t) T * weight_rows.size());
    std::vector<uint8_t> row((size_t) row_bytes(f, K));
    std::vector<double>  w((size_t) K);
    for (size_t i = 0; i < weight_rows.size(); i++) {
        CHECK(cudaMemcpy(row.data(), device + weight_rows[i] * row_bytes(f, K), row.size(), cudaMemcpyDeviceToHost));
        for (int64_t k = 0; k < K; k++) {
            w[(size_t) k] = weight_at(f.type, row.data() + k / f.block * f.bytes, (int) (k % f.block));
        }
        for (int64_t t = 0; t < T; t++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) {
                sum += w[(size_t) k] * (double) x[(size_t) (t * K + k)];
            }
            result[(size_t) t * weight_rows.size() + i] = sum;
        }
    }
    return result;
}

// Activations are rounded to 11 bits, and so are the weights of some formats: 2^-11 of each value at most.
static constexpr double TOLERANCE = 2.0 / 2048.0;
static int failures = 0;

static void report(bool pass, const std::string & what, const std::string & detail) {
    printf("%s  %-46s %s\n", pass ? "PASS" : "FAIL", what.c_str(), detail.c_str());
    failures += !pass;
}

static std::string text(const char * pattern, double value) {
    char buffer[64];
    snprintf(buffer, sizeof(buffer), pattern, value);
    return buffer;
}

static void report_widths(const std::string & what, const std::string & differing) {
    report(differing.empty(), what, differing.empty() ? "bit-equal at every T" : "differs at T" + differing);
}

// About `most` of M rows, the first and the last among them.
static std::vector<int64_t> every(int64_t M, int64_t most) {
    std::vector<int64_t> rows;
    const int64_t        step = M > most ? M / most : 1;
    for (int64_t m = 0; m < M; m += step) {
        rows.push_back(m);
    }
    if (rows.back() != M - 1) {
        rows.push_back(M - 1);
    }
    return rows;
}

// Small products: the tiny model's, odd row counts, and (for formats with blocks of 32) rows that end inside a chunk.
static const struct { int64_t M, K; } SMALL[] = {
    { 48, 256 },    { 3072, 256 }, { 17, 512 }, { 48, 5120 },  { 515, 5120 },
    { 1000, 2560 }, { 100, 96 },   { 77, 288 }, { 129, 1056 },
};

// The widths that are compared bit for bit with T = 16.
static const int WIDTHS[] = { 1, 2, 7, 8, 9, 15 };

// One node through the op itself, at T = 16 and at the other widths.
static void check_op(pydflash_cuda * cuda, const format & f, int64_t M, int64_t K, int64_t most_rows) {
    const uint64_t seed = (uint64_t) (M * 7919 + K * 31 + f.type);
    uint8_t *      w    = random_weight(f, M, K, seed);
    temporary.push_back(w);
    const std::vector<float> x = random_rows(16, K, seed + 1);
    float * const dx = to_device(x);

    ggml_tensor xt = {}, wt = {}, node = {};
    xt.type = GGML_TYPE_F32, xt.data = dx, wt.type = (ggml_type) f.type, wt.data = w, node.type = GGML_TYPE_F32;
    node.src[0] = &xt, node.src[1] = &wt;
    auto run = [&](int64_t T) {
        node.data = allocate(nullptr, (size_t) (T * M) * sizeof(float));
        CHECK(cudaMemset(node.data, 0xff, (size_t) (T * M) * sizeof(float)));
        CHECK(cudaDeviceSynchronize());  // the memset runs in another stream
        const int64_t ne[3][2] = { { K, T }, { K, M }, { M, T } };
        ggml_tensor * tensors[3] = { &xt, &wt, &node };
        for (int i = 0; i < 3; i++) {
            tensors[i]->ne[0] = ne[i][0], tensors[i]->ne[1] = ne[i][1], tensors[i]->ne[2] = tensors[i]->ne[3] = 1;
            tensors[i]->nb[0] = sizeof(float), tensors[i]->nb[1] = (size_t) ne[i][0] * sizeof(float);
        }
        wt.nb[1] = (size_t) row_bytes(f, K);
        if (!pydflash_cuda_linear.supports(&node) || !pydflash_cuda_linear.launch(cuda, &node)) {
            return std::vector<float>();
        }
        CHECK(cudaStreamSynchronize(cuda->stream));
        CHECK(cudaGetLastError());
        return to_host((const float *) node.data, (size_t) (T * M));
    };
    const std::string        what = std::string(f.name) + "  M " + std::to_string(M) + "  K " + std::to_string(K);
    const std::vector<float> wide = run(16);
    if (wide.empty()) {
        report(false, what, "not supported");
        free_temporary();
        return;
    }
    const std::vector<int64_t> rows  = every(M, most_rows);
    const double               error = row_error(wide, M, reference_product(f, w, rows, x, 16, K), rows, 16);
    report(error < TOLERANCE, what, text("error %.2e", error));

    std::string differing;
    for (int T : WIDTHS) {
        const std::vector<float> narrow = run(T);
        if (narrow.empty() || memcmp(narrow.data(), wide.data(), narrow.size() * sizeof(float)) != 0) {
            differing += " " + std::to_string(T);
        }
    }
    if (run(16) != wide) {
        differing += " 16, from run to run";
    }
    report_widths(what, differing);
    free_temporary();
}

// Three weights of different types in one multiply, one with a residual that aliases its output, then the first once
// more on the same packed activations.
static void check_several(pydflash_cuda * cuda) {
    const int64_t K = 5120, rows[3] = { 700, 96, 1100 };
    const int     types[3] = { GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_Q4_K };
    const std::vector<float> x = random_rows(16, K, 5), residual = random_rows(16, rows[1], 9);
    const float * const      dx = to_device(x);
    uint8_t *                w[3];
    for (int i = 0; i < 3; i++) {
        temporary.push_back(w[i] = random_weight(format_of(types[i]), rows[i], K, 100 + (uint64_t) i));
    }
    auto run = [&](int64_t T, std::vector<float> (&out)[3]) {
        pydflash_linear_weight weights[3] = {};
        for (int i = 0; i < 3; i++) {
            const size_t size = (size_t) (16 * rows[i]) * sizeof(float);
            float *      out  = i == 1 ? to_device(residual) : (float *) allocate(nullptr, size);
            weights[i] = { w[i], types[i], rows[i], row_bytes(format_of(types[i]), K), out, rows[i], nullptr, rows[i] };
        }
        weights[1].residual = weights[1].out;
        void * packed  = allocate(nullptr, pydflash_linear_packed_size(T, K));
        void * scratch = allocate(nullptr, pydflash_linear_scratch_size(cuda));
        const bool ok  = pydflash_linear_pack(cuda, dx, K, T, K, packed) &&
                         pydflash_linear_multiply(cuda, packed, T, K, weights, 3, scratch) &&
                         pydflash_linear_multiply(cuda, packed, T, K, weights, 1, scratch);
        CHECK(cudaStreamSynchronize(cuda->stream));
        for (int i = 0; i < 3; i++) {
            out[i] = to_host(weights[i].out, (size_t) (T * rows[i]));
        }
        return ok;
    };
    std::vector<float> wide[3];
    report(run(16, wide), "several weights", "launched");
    for (int i = 0; i < 3; i++) {
        const std::vector<int64_t> sample = every(rows[i], 100);
        std::vector<double> reference = reference_product(format_of(types[i]), w[i], sample, x, 16, K);
        for (size_t r = 0; i == 1 && r < reference.size(); r++) {
            reference[r] += residual[r / sample.size() * (size_t) rows[i] + (size_t) sample[r % sample.size()]];
        }
        const double error = row_error(wide[i], rows[i], reference, sample, 16);
        const std::string what = std::string("several weights, ") + format_of(types[i]).name;
        report(error < TOLERANCE, what, text("error %.2e", error));
    }
    std::string differing;
    for (int T : WIDTHS) {
        std::vector<float> narrow[3];
        const bool ok = run(T, narrow);
        for (int i = 0; i < 3; i++) {
            if (!ok || memcmp(narrow[i].data(), wide[i].data(), narrow[i].size() * sizeof(float)) != 0) {
                differing += " " + std::to_string(T);
            }
        }
    }
    report_widths("several weights", differing);
    free_temporary();
}

// The fused packs, seen through a product with f32 weights.
static void check_packs(pydflash_cuda * cuda) {
    const int64_t K = 1056, M = 64;
    const float   eps = 1e-6f;
    const format & f = format_of(GGML_TYPE_F32);
    const std::vector<float> a = random_rows(16, K, 21), b = random_rows(16, K, 22);
    const float * const      da = to_device(a), * const db = to_device(b);
    uint8_t *                w = random_weight(f, M, K, 23);
    temporary.push_back(w);

    std::vector<float> normed(a.size()), gated(a.size());
    for (size_t t = 0; t < 16; t++) {
        double squares = 0;
        for (size_t k = 0; k < (size_t) K; k++) {
            squares += (double) a[t * (size_t) K + k] * a[t * (size_t) K + k];
        }
        for (size_t k = 0; k < (size_t) K; k++) {
            const size_t i = t * (size_t) K + k;
            normed[i] = (float) (a[i] / std::sqrt(squares / (double) K + eps) * b[k]);
            gated[i]  = (float) (a[i] / (1.0 + std::exp(-(double) a[i])) * b[i]);
        }
    }
    for (int gate = 0; gate < 2; gate++) {
        std::vector<float> wide;
        std::string        differing;
        for (int64_t T : { 16, 1, 8, 9 }) {
            void *  packed  = allocate(nullptr, pydflash_linear_packed_size(T, K));
            void *  scratch = allocate(nullptr, pydflash_linear_scratch_size(cuda));
            float * out     = (float *) allocate(nullptr, (size_t) (T * M) * sizeof(float));
            pydflash_linear_weight weight = { w, f.type, M, row_bytes(f, K), out, M, nullptr, 0 };
            const bool ok = (gate ? pydflash_linear_pack_swiglu(cuda, da, K, db, K, T, K, packed)
                                  : pydflash_linear_pack_rms_norm(cuda, da, K, db, eps, T, K, packed)) &&
                            pydflash_linear_multiply(cuda, packed, T, K, &weight, 1, scratch);
            CHECK(cudaStreamSynchronize(cuda->stream));
            const std::vector<float> result = to_host(out, (size_t) (T * M));
            if (wide.empty()) {
                wide = result;
            }
            if (!ok || memcmp(result.data(), wide.data(), result.size() * sizeof(float)) != 0) {
                differing += " " + std::to_string(T);
            }
        }
        const std::vector<int64_t> rows = every(M, M);
        const std::vector<double> reference = reference_product(f, w, rows, gate ? gated : normed, 16, K);
        const double error = row_error(wide, M, reference, rows, 16);
        const char * what  = gate ? "pack swiglu" : "pack rms_norm";
        report(error < TOLERANCE, what, text("error %.2e", error));
        report_widths(what, differing);
    }
    free_temporary();
}

// ---- times

struct shape {
    const char * name;
    int64_t      K;
    struct { int type; int64_t rows; } weights[3];
};

static const shape SHAPES[] = {
    { "gate + up     Q4_K", 5120, { { GGML_TYPE_Q4_K, 17408 }, { GGML_TYPE_Q4_K, 17408 } } },
    { "qkv + z       Q5_K, Q4_K", 5120, { { GGML_TYPE_Q5_K, 10240 }, { GGML_TYPE_Q4_K, 6144 } } },
    { "q + k + v     Q4_K, Q6_K", 5120,
      { { GGML_TYPE_Q4_K, 12288 }, { GGML_TYPE_Q4_K, 1024 }, { GGML_TYPE_Q6_K, 1024 } } },
    { "out           Q4_K", 6144, { { GGML_TYPE_Q4_K, 5120 } } },
    { "out           Q5_K", 6144, { { GGML_TYPE_Q5_K, 5120 } } },
    { "down          Q4_K", 17408, { { GGML_TYPE_Q4_K, 5120 } } },
    { "down          Q6_K", 17408, { { GGML_TYPE_Q6_K, 5120 } } },
    { "head          Q6_K", 5120, { { GGML_TYPE_Q6_K, 248320 } } },
    { "alpha, beta   F32", 5120, { { GGML_TYPE_F32, 48 }, { GGML_TYPE_F32, 48 } } },
    { "draft gate+up Q8_0", 5120, { { GGML_TYPE_Q8_0, 17408 }, { GGML_TYPE_Q8_0, 17408 } } },
    { "draft down    Q8_0", 17408, { { GGML_TYPE_Q8_0, 5120 } } },
    { "draft fc      Q8_0", 25600, { { GGML_TYPE_Q8_0, 5120 } } },
    { "gate + up     F16", 5120, { { GGML_TYPE_F16, 17408 }, { GGML_TYPE_F16, 17408 } } },
};

// The median of a few replays of what `enqueue` captures, in microseconds.
template <typename Enqueue>
static double replay_time(cudaStream_t stream, Enqueue && enqueue) {
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    cudaEvent_t     start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    enqueue();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));

    std::vector<float> times;
    for (int repeat = 0; repeat < 12; repeat++) {
        CHECK(cudaEventRecord(start, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(stop, stream));
        CHECK(cudaStreamSynchronize(stream));
        float milliseconds = 0;
        CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
        if (repeat >= 2) {
            times.push_back(milliseconds);
        }
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return (double) times[times.size() / 2] * 1e3;
}

static double copy_bandwidth(cudaStream_t stream) {
    const size_t size = (size_t) 2 << 30;
    char * from, * to;
    CHECK(cudaMalloc(&from, size));
    CHECK(cudaMalloc(&to, size));
    CHECK(cudaMemset(from, 1, size));
    const double time = replay_time(
        stream, [&] { CHECK(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream)); });
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
    return 2.0 * (double) size / time * 1e-3;  // GB/s
}

static void time_shape(pydflash_cuda * cuda, const shape & s, double bandwidth) {
    constexpr int64_t ROTATE = 600 << 20;  // bytes of weights that pass before one is read again: far above any cache
    constexpr int     MOST   = 64;

    int     count = 0;
    int64_t bytes = 0, widest = 0;
    for (; count < 3 && s.weights[count].rows; count++) {
        bytes += s.weights[count].rows * row_bytes(format_of(s.weights[count].type), s.K);
        widest = std::max(widest, s.weights[count].rows);
    }
    const int copies = (int) std::min<int64_t>(MOST, ROTATE / bytes + 1);

    std::vector<std::vector<pydflash_linear_weight>> sets((size_t) copies);
    float * out = (float *) allocate(nullptr, (size_t) (16 * widest) * sizeof(float));
    for (int c = 0; c < copies; c++) {
        for (int i = 0; i < count; i++) {
            const format & f = format_of(s.weights[i].type);
            uint8_t * w = random_weight(f, s.weights[i].rows, s.K, (uint64_t) (c * 3 + i));
            temporary.push_back(w);
            const int64_t rows = s.weights[i].rows;
            sets[(size_t) c].push_back({ w, f.type, rows, row_bytes(f, s.K), out, rows, nullptr, 0 });
        }
    }
    const std::vector<float> x = random_rows(16, s.K, 3);
    const float * const dx      = to_device(x);
    void * const        packed  = allocate(nullptr, pydflash_linear_packed_size(16, s.K));
    void * const        scratch = allocate(nullptr, pydflash_linear_scratch_size(cuda));
    CHECK(cudaDeviceSynchronize());

    printf("%-28s %8.1f MB", s.name, (double) bytes * 1e-6);
    for (int64_t T : { 1, 8, 16 }) {
        for (int pack_each = 0; pack_each < 2; pack_each++) {
            const double time = replay_time(cuda->stream, [&] {
                for (size_t c = 0; c < sets.size(); c++) {
                    if (pack_each || c == 0) {
                        pydflash_linear_pack(cuda, dx, s.K, T, s.K, packed);
                    }
                    pydflash_linear_multiply(cuda, packed, T, s.K, sets[c].data(), count, scratch);
                }
            }) / copies;
            const double rate = (double) bytes / time * 1e-3;
            if (pack_each) {
                printf(" | %7.1f us %5.0f %3.0f %%", time, rate, 100.0 * rate / bandwidth);
            } else {
                printf(" | T %2d: %7.1f us", (int) T, time);
            }
        }
    }
    printf("\n");
    fflush(stdout);
    free_temporary();
}

int main(int argc, char ** argv) {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    pydflash_cuda cuda = {};
    CHECK(cudaStreamCreateWithFlags(&cuda.stream, cudaStreamNonBlocking));
    cuda.sm_count = device.multiProcessorCount;
    cuda.alloc    = allocate;
    cuda.early_launch = device.major >= 9;  // this program is compiled for the device it runs on
    printf("%s, %d multiprocessors\n", device.name, cuda.sm_count);

    const auto start = std::chrono::steady_clock::now();
    for (const format & f : FORMATS) {
        for (const auto & size : SMALL) {
            if (size.K % f.block == 0) {
                check_op(&cuda, f, size.M, size.K, 256);
            }
        }
    }
    for (const shape & s : SHAPES) {
        check_op(&cuda, format_of(s.weights[0].type), s.weights[0].rows, s.K, 48);
    }
    check_several(&cuda);
    check_packs(&cuda);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    printf("checks: %d failures, %.1f s\n", failures, elapsed.count());

    if (argc < 2 || strcmp(argv[1], "--check") != 0) {
        const double bandwidth = copy_bandwidth(cuda.stream);
        printf("copy: %.0f GB/s; for each T: multiply alone | with the pack, GB/s of weights, share of the copy\n",
               bandwidth);
        for (const shape & s : SHAPES) {
            time_shape(&cuda, s, bandwidth);
        }
    }
    return failures ? 1 : 0;
}
