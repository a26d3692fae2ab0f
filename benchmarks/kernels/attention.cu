// Checks and times the attention kernel on its own, without ggml's libraries.
//
//   nvcc -std=c++17 -arch=sm_90 -O3 -I ggml_ext -I ggml_ext/attention -I GGML/include benchmarks/kernels/attention.cu -o attention
//
// Every case is compared with a float64 computation over the same cached bytes, and bit for bit with itself: row by
// row, under other splits over the device, and over longer caches. Slots that no row sees hold NaN and infinities.
// Prints one line per case, then the timings; exits with the number of failed cases.
#include <attention_launch.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#define CUDA(call)                                                                                  \
    do {                                                                                            \
        const cudaError_t error = (call);                                                           \
        if (error != cudaSuccess) {                                                                 \
            std::printf("FAIL %s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(error));          \
            std::exit(255);                                                                         \
        }                                                                                           \
    } while (0)

using namespace pydflash_attention;

struct cache_type { ggml_type type; const char * name; };

static const cache_type TYPES[] = {
    { GGML_TYPE_F16, "f16" }, { GGML_TYPE_BF16, "bf16" }, { GGML_TYPE_Q8_0, "q8_0" }, { GGML_TYPE_Q4_0, "q4_0" },
};

static const char * name_of(ggml_type type) {
    return std::find_if(std::begin(TYPES), std::end(TYPES), [=](const cache_type & t) { return t.type == type; })->name;
}

__host__ __device__ static int block_bytes(ggml_type type) {
    return of_format(type, [](auto f) { return decltype(f)::BLOCK; });
}

// ---- the cache on the host: 32 values at a time ----

static void store_block(ggml_type type, const float * x, uint8_t * block) {
    if (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
        for (int i = 0; i < 32; i++) {
            uint32_t word;
            std::memcpy(&word, &x[i], 4);
            const half     h    = __float2half(x[i]);
            const uint16_t bf16 = (uint16_t) ((word + 0x7fff + ((word >> 16) & 1)) >> 16);
            std::memcpy(block + 2 * i, type == GGML_TYPE_F16 ? (const void *) &h : (const void *) &bf16, 2);
        }
        return;
    }
    float largest = 0;
    for (int i = 0; i < 32; i++) {
        largest = std::fabs(x[i]) > std::fabs(largest) ? x[i] : largest;
    }
    const half  d       = __float2half(type == GGML_TYPE_Q8_0 ? std::fabs(largest) / 127 : largest / -8);
    const float inverse = __half2float(d) != 0 ? 1 / __half2float(d) : 0;
    std::memcpy(block, &d, 2);
    for (int i = 0; i < 32; i++) {
        const int q = (int) std::lround(x[i] * inverse);
        if (type == GGML_TYPE_Q8_0) {
            block[2 + i] = (uint8_t) (int8_t) std::clamp(q, -127, 127);
        } else {
            const int nibble = std::clamp(q + 8, 0, 15);
            block[2 + i % 16] = (uint8_t) (i < 16 ? nibble : block[2 + i % 16] | nibble << 4);
        }
    }
}

static void load_block(ggml_type type, const uint8_t * block, float * x) {
    half d;
    std::memcpy(&d, block, 2);
    for (int i = 0; i < 32; i++) {
        if (type == GGML_TYPE_F16) {
            half h;
            std::memcpy(&h, block + 2 * i, 2);
            x[i] = __half2float(h);
        } else if (type == GGML_TYPE_BF16) {
            const uint32_t word = (uint32_t) (block[2 * i] | block[2 * i + 1] << 8) << 16;
            std::memcpy(&x[i], &word, 4);
        } else if (type == GGML_TYPE_Q8_0) {
            x[i] = __half2float(d) * (int8_t) block[2 + i];
        } else {
            x[i] = __half2float(d) * ((i < 16 ? block[2 + i] & 15 : block[2 + i - 16] >> 4) - 8);
        }
    }
}

struct cache {
    ggml_type            type;
    int64_t              stride;
    std::vector<uint8_t> bytes;
    std::vector<float>   values;
};

static cache make_cache(ggml_type type, int slots, int columns, std::mt19937 & random) {
    cache c = { type, (int64_t) columns / 32 * block_bytes(type), {}, {} };
    c.bytes.resize(slots * c.stride);
    c.values.resize((size_t) slots * columns);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < c.values.size(); i += 32) {
        float x[32];
        for (float & v : x) {
            v = normal(random);
        }
        uint8_t * block = c.bytes.data() + i / 32 * block_bytes(type);
        store_block(type, x, block);
        load_block(type, block, &c.values[i]);
    }
    return c;
}

// ---- one case ----

struct setup {
    int       rows, heads, kv_heads, head_size, slots;
    int       length;  // positions in the sequence; more than slots in a ring
    bool      causal;
    int       window;
    bool      ring;
    ggml_type k, v;
};

template <typename T>
struct device_array {
    T * data = nullptr;
    explicit device_array(const std::vector<T> & host) {
        CUDA(cudaMalloc(&data, std::max<size_t>(1, host.size()) * sizeof(T)));
        CUDA(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~device_array() { cudaFree(data); }
    device_array(const device_array &) = delete;
};

struct machine {
    int  sm_count, shared_limit;
    bool early_launch;
};

static pydflash_cuda handle(const machine & m, cudaStream_t stream) {
    pydflash_cuda cuda = {};
    cuda.stream       = stream;
    cuda.sm_count     = m.sm_count;
    cuda.early_launch = m.early_launch;
    return cuda;
}

static job make_job(const setup & s, const float * q, const uint8_t * k, const uint8_t * v, const int * positions,
                    const int * slot_positions, float * out) {
    job j = {};
    j.q = q, j.k = (const char *) k, j.v = (const char *) v;
    j.positions = positions, j.slot_positions = slot_positions, j.out = out;
    j.k_stride = (int64_t) s.kv_heads * s.head_size / 32 * block_bytes(s.k);
    j.v_stride = (int64_t) s.kv_heads * s.head_size / 32 * block_bytes(s.v);
    j.k_type = s.k, j.v_type = s.v;
    j.rows = s.rows, j.heads = s.heads, j.kv_heads = s.kv_heads, j.slots = s.slots, j.chunks = chunk_count(s.slots);
    j.causal = s.causal, j.window = s.window;
    j.scale_log2 = LOG2_E / std::sqrt((float) s.head_size);
    return j;
}

static std::vector<float> run(const job & j, int head_size, const machine & m) {
    std::vector<float>   out((size_t) j.rows * j.heads * head_size);
    std::vector<uint8_t> scratch(scratch_bytes(j.rows * j.heads, j.chunks, head_size), 0xff);
    device_array<uint8_t> device_scratch(scratch);
    CUDA(cudaMemset(j.out, 0xff, out.size() * sizeof(float)));
    const pydflash_cuda cuda = handle(m, 0);
    if (!launch_job(&cuda, j, head_size, device_scratch.data, m.shared_limit)) {
        std::printf("FAIL not launched\n");
        std::exit(254);
    }
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(out.data(), j.out, out.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return out;
}

static bool same(const float * a, const float * b, size_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

// The formula of attention.h for one head of one row, in float64.
static void expect(const setup & s, const float * q, const cache & k, const cache & v, const std::vector<int> & kpos,
                   int qpos, int head, double * out) {
    const int           kv_head = head / (s.heads / s.kv_heads), columns = s.kv_heads * s.head_size;
    const pydflash_span span = pydflash_attention_span(qpos, s.causal, s.window);
    std::vector<double> score(s.slots, -INFINITY);
    double largest = -INFINITY, sum = 0;
    for (int slot = 0; slot < s.slots; slot++) {
        if (kpos[slot] < span.first || kpos[slot] > span.last) {
            continue;
        }
        double dot = 0;
        for (int d = 0; d < s.head_size; d++) {
            dot += (double) q[d] * k.values[(size_t) slot * columns + kv_head * s.head_size + d];
        }
        score[slot] = dot / std::sqrt((double) s.head_size);
        largest     = std::max(largest, score[slot]);
    }
    std::fill(out, out + s.head_size, 0.0);
    for (int slot = 0; slot < s.slots; slot++) {
        if (score[slot] == -INFINITY) {
            continue;
        }
        const double p = std::exp(score[slot] - largest);
        sum += p;
        for (int d = 0; d < s.head_size; d++) {
            out[d] += p * v.values[(size_t) slot * columns + kv_head * s.head_size + d];
        }
    }
    for (int d = 0; d < s.head_size && sum > 0; d++) {
        out[d] /= sum;
    }
}

static double relative_error(const setup & s, const std::vector<float> & q, const cache & k, const cache & v,
                             const std::vector<int> & kpos, const std::vector<int> & positions,
                             const std::vector<float> & out) {
    const int           items = s.rows * s.heads, n_threads = 16;
    std::vector<double> differ(n_threads), total(n_threads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < n_threads; thread++) {
        threads.emplace_back([&, thread] {
            std::vector<double> want(s.head_size);
            for (int item = thread; item < items; item += n_threads) {
                const int row = item / s.heads, head = item % s.heads;
                expect(s, &q[(size_t) item * s.head_size], k, v, kpos, positions[row], head, want.data());
                for (int d = 0; d < s.head_size; d++) {
                    const double e = out[(size_t) item * s.head_size + d] - want[d];
                    differ[thread] += e * e, total[thread] += want[d] * want[d];
                }
            }
        });
    }
    double d = 0, t = 0;
    for (int i = 0; i < n_threads; i++) {
        threads[i].join();
        d += differ[i], t += total[i];
    }
    return t > 0 ? std::sqrt(d / t) : std::sqrt(d);
}

// The kernel rounds q, p and the dequantised K and V to 11 bits; with scores of standard deviation 3, as here, that
// is 3e-4 to 7e-4 over the cases. A misplaced fragment gives about 1.
constexpr double TOLERANCE = 1.5e-3;

static bool check(const setup & s, const machine & m, std::mt19937 & random) {
    constexpr int BEYOND = 2048;  // slots of the cache after the P that are given to the kernel
    const int     columns = s.kv_heads * s.head_size, row_size = s.heads * s.head_size;
    cache k = make_cache(s.k, s.slots + BEYOND, columns, random);
    cache v = make_cache(s.v, s.slots + BEYOND, columns, random);
    std::vector<float> q((size_t) s.rows * row_size);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (size_t i = 0; i < q.size(); i++) {
        q[i] = normal(random);
    }
    std::vector<int> positions(s.rows), kpos(s.slots + BEYOND, -1);
    for (int row = 0; row < s.rows; row++) {
        positions[row] = s.rows > 2 && row == s.rows - 2 ? -1 : s.length - s.rows + row;
    }
    for (int slot = 0; slot < s.slots; slot++) {  // a ring's slot holds the latest position it was written for
        const int turn = s.ring && s.length > slot ? (s.length - 1 - slot) / s.slots : 0;
        kpos[slot] = s.ring && (slot % 37 == 5 || slot >= s.length) ? -1 : slot + turn * s.slots;
    }
    for (int slot = 0; slot < s.slots + BEYOND; slot++) {
        bool seen = false;
        for (int row = 0; row < s.rows; row++) {
            const pydflash_span span = pydflash_attention_span(positions[row], s.causal, s.window);
            seen |= kpos[slot] >= span.first && kpos[slot] <= span.last;
        }
        if (!seen) {  // 0xff: NaN; 0x7c: 0x7c7c is NaN too, as a scale; both as bytes of f16 and bf16
            std::memset(&k.bytes[slot * k.stride], slot % 2 ? 0xff : 0x7c, k.stride);
            std::memset(&v.bytes[slot * v.stride], slot % 2 ? 0x7c : 0xff, v.stride);
        }
    }

    device_array<float>   d_q(q), d_out(q);
    device_array<uint8_t> d_k(k.bytes), d_v(v.bytes);
    device_array<int>     d_positions(positions), d_kpos(kpos);
    const job j = make_job(s, d_q.data, d_k.data, d_v.data, d_positions.data, s.ring ? d_kpos.data : nullptr,
                           d_out.data);

    const std::vector<float> out = run(j, s.head_size, m);
    const double error = relative_error(s, q, k, v, kpos, positions, out);
    bool rows = true, splits = true, longer = true;
    for (int width = 1; width <= 3; width += 2) {
        for (int row = 0; row + width <= s.rows; row += width) {
            job one = j;
            one.q += (size_t) row * row_size, one.positions += row, one.rows = width;
            rows &= same(run(one, s.head_size, m).data(), &out[(size_t) row * row_size], (size_t) width * row_size);
        }
    }
    for (int sm_count : { 1, 20, 60, 100000 }) {  // the launcher divides the columns differently
        splits &= same(run(j, s.head_size, { sm_count, m.shared_limit, m.early_launch }).data(), out.data(), out.size());
    }
    if (s.ring || s.causal) {
        for (int more : { 32, 160, BEYOND }) {
            job wide = j;
            wide.slots += more, wide.chunks = chunk_count(wide.slots);
            longer &= same(run(wide, s.head_size, m).data(), out.data(), out.size());
        }
    }
    const bool pass = error <= TOLERANCE && rows && splits && longer;
    std::printf("%s T %2d H %2d/%d D %3d P %5d length %5d %s window %4d %s k %-4s v %-4s  error %.1e  "
                "rows %s splits %s P %s\n",
                pass ? "PASS" : "FAIL", s.rows, s.heads, s.kv_heads, s.head_size, s.slots, s.length,
                s.causal ? "causal" : "full  ", s.window, s.ring ? "ring" : "line", name_of(s.k), name_of(s.v),
                error,
                rows ? "=" : "DIFFER", splits ? "=" : "DIFFER", longer ? "=" : "DIFFER");
    return pass;
}

static int check_all(const machine & m) {
    std::mt19937 random(1);
    std::vector<setup> cases;
    for (const cache_type & k : TYPES) {
        for (const cache_type & v : TYPES) {
            cases.push_back({ 5, 6, 1, 64, 288, 250, true, 0, false, k.type, v.type });
            cases.push_back({ 8, 8, 2, 128, 256, 700, false, 100, true, k.type, v.type });
            cases.push_back({ 16, 12, 2, 256, 320, 300, true, 0, false, k.type, v.type });
        }
    }
    const ggml_type F = GGML_TYPE_F16, Q8 = GGML_TYPE_Q8_0, Q4 = GGML_TYPE_Q4_0, B = GGML_TYPE_BF16;
    for (int rows : { 1, 3, 8, 16 }) {
        cases.push_back({ rows, 24, 4, 256, 1024, 900, true, 0, false, Q4, Q8 });    // the target
        cases.push_back({ rows, 32, 8, 128, 512, 2000, false, 256, true, F, F });    // the draft
        cases.push_back({ rows, 32, 8, 128, 512, 400, false, 0, true, Q8, Q8 });     // a ring not yet full
        cases.push_back({ rows, 6, 1, 64, 256, 200, true, 50, false, F, Q4 });       // the tiny model, windowed
        cases.push_back({ rows, 4, 4, 128, 128, 20, true, 0, false, B, B });         // no sharing of heads
        cases.push_back({ rows, 32, 2, 128, 384, 300, false, 33, false, Q4, F });    // more columns than a block takes
        cases.push_back({ rows, 6, 1, 256, 5120, 5000, true, 0, false, Q8, Q4 });    // second tier of chunks
    }
    cases.push_back({ 3, 6, 1, 256, 37888, 37500, true, 0, false, Q4, Q8 });         // third tier
    cases.push_back({ 16, 6, 1, 128, 37888, 37500, true, 3000, false, F, F });
    int failed = 0;
    for (const setup & s : cases) {
        failed += !check(s, m, random);
    }
    std::printf("%d of %zu cases failed\n", failed, cases.size());
    return failed;
}

// ---- timing ----

constexpr double BANDWIDTH = 4.3e12;  // bytes per second of a device-to-device copy on an H200

// Microseconds per call (both kernels), from replays of a CUDA graph that goes through several caches, so that the
// second-level cache holds none of them.
static void time_case(setup s, int bucket, const machine & m) {
    const int length = s.length;
    s.slots = bucket;
    const int64_t k_bytes = (int64_t) s.kv_heads * s.head_size / 32 * block_bytes(s.k);
    const int64_t v_bytes = (int64_t) s.kv_heads * s.head_size / 32 * block_bytes(s.v);
    const int     caches  = (int) std::clamp<int64_t>((int64_t) 400e6 / (bucket * (k_bytes + v_bytes)) + 1, 3, 64);
    constexpr int CALLS = 64, REPLAYS = 7;

    std::mt19937 random(2);
    std::vector<float> q((size_t) s.rows * s.heads * s.head_size);
    std::normal_distribution<float> normal;
    for (float & x : q) {
        x = normal(random);
    }
    std::vector<int> positions(s.rows), kpos(bucket);
    for (int row = 0; row < s.rows; row++) {
        positions[row] = length - s.rows + row;
    }
    for (int slot = 0; slot < bucket; slot++) {
        kpos[slot] = slot < length ? slot : -1;
    }
    const int pattern = 64;  // distinct slots; repeated to fill the caches
    const cache k = make_cache(s.k, pattern, s.kv_heads * s.head_size, random);
    const cache v = make_cache(s.v, pattern, s.kv_heads * s.head_size, random);
    uint8_t * d_k, * d_v, * scratch;
    CUDA(cudaMalloc(&d_k, caches * bucket * k_bytes));
    CUDA(cudaMalloc(&d_v, caches * bucket * v_bytes));
    for (int64_t slot = 0; slot < (int64_t) caches * bucket; slot += pattern) {
        const int64_t n = std::min<int64_t>(pattern, (int64_t) caches * bucket - slot);
        CUDA(cudaMemcpyAsync(d_k + slot * k_bytes, k.bytes.data(), n * k_bytes, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpyAsync(d_v + slot * v_bytes, v.bytes.data(), n * v_bytes, cudaMemcpyHostToDevice));
    }
    CUDA(cudaMalloc(&scratch, scratch_bytes(s.rows * s.heads, chunk_count(bucket), s.head_size)));
    device_array<float> d_q(q), d_out(q);
    device_array<int>   d_positions(positions), d_kpos(kpos);

    cudaStream_t stream;
    cudaGraph_t  graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA(cudaDeviceSynchronize());
    const pydflash_cuda cuda = handle(m, stream);
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int call = 0; call < CALLS; call++) {
        const int64_t slot = (int64_t) (call % caches) * bucket;
        launch_job(&cuda, make_job(s, d_q.data, d_k + slot * k_bytes, d_v + slot * v_bytes, d_positions.data,
                                   s.ring ? d_kpos.data : nullptr, d_out.data),
                   s.head_size, scratch, m.shared_limit);
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < REPLAYS + 1; i++) {
        float milliseconds;
        CUDA(cudaEventRecord(start, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(stop, stream));
        CUDA(cudaEventSynchronize(stop));
        CUDA(cudaEventElapsedTime(&milliseconds, start, stop));
        if (i > 0) {
            times.push_back(milliseconds * 1e3f / CALLS);
        }
    }
    std::sort(times.begin(), times.end());
    const double floor = 1e6 * length * (k_bytes + v_bytes) / BANDWIDTH;
    const double flops = 4.0 * s.rows * s.heads * s.head_size * length;
    std::printf("T %2d H %2d/%d D %3d length %6d bucket %6d k %-4s v %-4s %8.1f us  (%.1f .. %.1f)  "
                "bytes floor %6.1f us  %4.0f TFLOP/s\n",
                s.rows, s.heads, s.kv_heads, s.head_size, length, bucket, name_of(s.k), name_of(s.v),
                times[times.size() / 2], times.front(), times.back(), floor, flops / times[times.size() / 2] * 1e-6);
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(stop));
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(d_k));
    CUDA(cudaFree(d_v));
    CUDA(cudaFree(scratch));
}

static void time_all(const machine & m) {
    const ggml_type F = GGML_TYPE_F16, Q8 = GGML_TYPE_Q8_0, Q4 = GGML_TYPE_Q4_0;
    const auto target = [](int rows, int length, ggml_type k, ggml_type v) {
        return setup{ rows, 24, 4, 256, 0, length, true, 0, false, k, v };
    };
    for (int rows : { 1, 16 }) {
        for (int length : { 512, 4096, 32768 }) {
            time_case(target(rows, length, F, F), length, m);
            time_case(target(rows, length, Q8, Q8), length, m);
            time_case(target(rows, length, Q4, Q8), length, m);
            time_case(target(rows, length, Q4, Q4), length, m);
        }
        time_case(target(rows, 512, Q4, Q8), 32768, m);    // a large bucket, a short sequence
        time_case(target(rows, 131072, Q4, Q8), 131072, m);
        time_case({ rows, 32, 8, 128, 0, 2048, false, 0, true, F, F }, 2048, m);     // the draft
        time_case({ rows, 32, 8, 128, 0, 4096, false, 0, true, Q8, Q8 }, 4096, m);
    }
    time_case(target(8, 32768, Q4, Q8), 32768, m);
}

int main() {
    int device = 0;
    machine m;
    cudaDeviceProp properties;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaGetDeviceProperties(&properties, device));
    CUDA(cudaDeviceGetAttribute(&m.sm_count, cudaDevAttrMultiProcessorCount, device));
    CUDA(cudaDeviceGetAttribute(&m.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    m.early_launch = properties.major >= 9;  // this program is compiled for the device it runs on
    std::printf("%s, %d SMs, %d bytes of shared memory a block\n", properties.name, m.sm_count, m.shared_limit);
    const int failed = check_all(m);
    time_all(m);
    return failed;
}
