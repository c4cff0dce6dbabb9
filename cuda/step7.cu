// A token of a few texts through a whole RWKV-7 on a GPU, five kernels a layer: what the normalised stream is projected
// to; what low ranks say, each head's memory and norm; the way out of these; and the two of the channel mix. Where rows
// are long there is one more before each that normalises. Of many texts the heads alone. rwkvpipe/model/rwkv7.py has
// the same in PyTorch.
//
// Matrices are (out, in) in fp32, bf16 or int8, the second ones of low ranks (rank, D); whole numbers of an output are
// times its scale. Of few texts all else is fp32. Heads are of 64 channels. A state is read by one kernel and written
// by a later one, or by the threads that have read it. All kernels but the first follow each other (launch.cuh).

#include "few.cuh"

#include <algorithm>

namespace {

constexpr int N = 64, LOW = 4;
constexpr float HALF_ROOT = 0.60653066f;  // e^{-1/2}

enum Low { DECAY, RATE, LEAN, GATE };

// Memory that kernels to come read: a card's cache takes some of it while heads wait for one another.
struct Ahead {
    const void *from;
    int64_t bytes;
};
constexpr int64_t BESIDE = 96;  // blocks that ask

// bytes that are asked for: what memory gives meanwhile, but no more than a quarter of the cache
inline int64_t cached() {
    int64_t bytes = 12 << 20;
#ifdef __CUDACC__
    int device = 0, all = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&all, cudaDevAttrL2CacheSize, device) == cudaSuccess && all / 4 < bytes)
        bytes = all / 4;
#endif
    return bytes;
}

// A matrix of low rank (rank, D), and what it is multiplied with, (rows, rank)
struct Second {
    const void *matrix;  // or null
    const float *scale;  // of whole numbers, (D,)
    const void *x;
    int64_t rank;
};

// One head of a row. Thread t has 16 numbers of row t / 4 of its memory: four in every 16, from t % 4 * 4 on.
// Numbers of matrices have so many bytes; what other kernels have made and `out` are in bf16 if NARROW says so.
template <int BYTES, bool NARROW>
struct Recall {
    static constexpr int THREADS = WIDTH, SLICES = WIDTH / (N / 4);
    enum { R, FADE, KEY, KK, B, V, Y, VECTORS };
    static constexpr int FLOATS = (SLICES * LOW + LOW + VECTORS) * N + 4;
    struct Own {
        float S[16], low[LOW][4], sums[2];
    };
    using Threads = Block<Own, THREADS>;
    int64_t H;
    Second seconds[LOW];
    const void *r, *k, *v, *first;  // (rows, D); `first` are layer 0's values
    const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *weight, *bias;
    float *memory;  // (rows, H, N, N), which becomes that after the token
    void *out;      // (rows, D)
    Ahead ahead[2];
    int64_t heads;  // of all rows; what blocks there are beyond them ask for what is read next

    // shared memory: what low ranks say, what the recurrence takes and gives, sums of half a head
    struct Shared {
        float *said, *vectors, *few;
        ON_GPU float *vector(int which) const { return vectors + which * N; }
    };

    ON_GPU static int column(int thread, int n) { return (thread % 4 + 4 * n) * 4; }

    // of what low ranks say for four channels a slice of the sums
    ON_GPU void multiply(int thread, float (*found)[4], int64_t row, int64_t channel) const {
        const int64_t at = channel + thread % (N / 4) * 4;
#pragma unroll
        for (int n = 0; n < LOW; n++) {
            const Second &second = seconds[n];
#pragma unroll
            for (int c = 0; c < 4; c++) found[n][c] = 0.0f;
#pragma unroll 4
            for (int64_t i = thread / (N / 4); second.matrix && i < second.rank; i += SLICES) {
                Quad<BYTES> quad;
                float w[4];
                quad.read(static_cast<const char *>(second.matrix) + (i * H * N + at) * BYTES);
                quad.open(w);
                const float x = get(second.x, row * second.rank + i, NARROW);
#pragma unroll
                for (int c = 0; c < 4; c++) found[n][c] += x * w[c];
            }
            if (BYTES > 1 || !second.matrix) continue;
            float by[4];
            fetch<4>(by, second.scale, at, false);
#pragma unroll
            for (int c = 0; c < 4; c++) found[n][c] *= by[c];
        }
    }

    // what the recurrence takes of channel c of the head, the `channel` of a row, and its part of the sums over these
    ON_GPU void prepare(Own &own, const Shared &to, int c, int64_t row, int64_t channel, bool write) const {
        const int64_t at = row + channel;
        const float x = get(k, at, NARROW), with = get(r, at, NARROW), kk = x * k_k[channel];
        const float rate = sigmoid(a0[channel] + to.said[RATE * N + c]);
        const float key = x + x * (rate - 1.0f) * k_a[channel];
        float value = get(v, at, NARROW);
        if (seconds[LEAN].matrix)
            value += (get(first, at, NARROW) - value) * sigmoid(v0[channel] + to.said[LEAN * N + c]);
        own.sums[0] = kk * kk, own.sums[1] = with * key * r_k[channel];
        if (!write) return;
        to.vector(R)[c] = with, to.vector(KEY)[c] = key, to.vector(KK)[c] = kk;
        to.vector(FADE)[c] = expf(-HALF_ROOT * sigmoid(w0[channel] + to.said[DECAY * N + c]));
        to.vector(B)[c] = kk * rate, to.vector(V)[c] = value;
    }

    ON_GPU void look_ahead(int64_t number) const {
#pragma unroll
        for (int n = 0; n < 2; n++)
            for (int64_t at = number * LINE; at < ahead[n].bytes; at += BESIDE * THREADS * LINE)
                soon(static_cast<const char *>(ahead[n].from) + at);
    }

    // of what the head's own channels need, asks for all that no kernel of this token writes before
    ON_GPU void look_for(int thread, int64_t head, int64_t channel) const {
#pragma unroll
        for (int n = 0; n < LOW; n++)
#pragma unroll 1
            for (int64_t i = thread; seconds[n].matrix && i < seconds[n].rank; i += THREADS)
                for (int at = 0; at < N * BYTES; at += LINE)
                    soon(static_cast<const char *>(seconds[n].matrix) + (i * H * N + channel) * BYTES + at);
        if (thread < N * N * 4 / LINE) soon(memory + head * N * N + thread * LINE / 4);
        if (thread >= N * 4 / LINE) return;
        const int64_t at = channel + thread * LINE / 4;
        soon(w0 + at), soon(a0 + at), soon(k_k + at), soon(k_a + at), soon(r_k + at), soon(weight + at), soon(bias + at);
        if (seconds[LEAN].matrix) soon(v0 + at);
    }

    // what low ranks say of the head's channels, and what the recurrence takes
    ON_GPU void begin(int64_t head, Threads &threads, float *slices, const Shared &at) const {
        const int64_t row = head / H, channel = head % H * N;
        threads.alone([&](int thread, Own &) { look_for(thread, head, channel); });
        take_turn();
        threads.each([&](int thread, Own &own) {
#pragma unroll
            for (int n = 0; n < 4; n++)
                fetch<4>(own.S + 4 * n, memory + head * N * N, thread / 4 * N + column(thread, n), false);
            multiply(thread, own.low, row, channel);
#pragma unroll
            for (int n = 0; n < LOW; n++)
                share<4>(slices + (thread / (N / 4) * LOW + n) * N + thread % (N / 4) * 4, own.low[n]);
        });
        threads.each([&](int thread, Own &) {
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < SLICES; n++) total += slices[n * LOW * N + thread];
            at.said[thread] = total;
        });
        threads.alone([&](int thread, Own &own) {
            prepare(own, at, thread % N, row * H * N, channel + thread % N, thread < N);
        });
        threads.add_up(WARP, 2, [](Own &own) { return own.sums; });
        threads.each([&](int thread, Own &own) {
            if (thread % WARP || thread > WARP) return;
            at.few[thread / WARP * 2] = own.sums[0], at.few[thread / WARP * 2 + 1] = own.sums[1];
        });
    }

    // the memory takes the token in, and is read
    ON_GPU void remember(int64_t head, Threads &threads, const Shared &at) const {
        const auto each_column = [](int thread, auto f) {
#pragma unroll
            for (int n = 0; n < 16; n++) f(n, column(thread, n / 4) + n % 4);
        };
        threads.alone([&](int thread, Own &own) {
            own.sums[0] = 0.0f;
            each_column(thread, [&](int n, int c) { own.sums[0] -= own.S[n] * at.vector(KK)[c]; });
        });
        threads.add_up(4, 1, [](Own &own) { return own.sums; });
        threads.alone([&](int thread, Own &own) {
            const float root = sqrtf(at.few[0] + at.few[2]), by = 1.0f / (root < LEAST ? LEAST : root);
            const float u = own.sums[0] * by * by, value = at.vector(V)[thread / 4];
            own.sums[0] = 0.0f;
            each_column(thread, [&](int n, int c) {
                own.S[n] = own.S[n] * at.vector(FADE)[c] + u * at.vector(B)[c] + value * at.vector(KEY)[c];
                own.sums[0] += own.S[n] * at.vector(R)[c];
            });
#pragma unroll
            for (int n = 0; n < 4; n++)
                lay_down<4>(memory + head * N * N, thread / 4 * N + column(thread, n), false, own.S + 4 * n);
        });
        threads.add_up(4, 1, [](Own &own) { return own.sums; });
        threads.each([&](int thread, Own &own) {
            if (thread % 4 == 0) at.vector(Y)[thread / 4] = own.sums[0];
        });
    }

    // what was read normalised, its bonus added, times the gate
    ON_GPU void finish(int64_t head, Threads &threads, const Shared &at) const {
        const auto y = [&at](int c) { return at.vector(Y)[c]; };
        threads.alone([&](int thread, Own &own) { own.sums[0] = y(thread % WARP) + y(thread % WARP + WARP); });
        threads.add_up(WARP, 1, [](Own &own) { return own.sums; });
        threads.alone([&](int thread, Own &own) {
            const float mean = own.sums[0] / N, one = y(thread % WARP) - mean, other = y(thread % WARP + WARP) - mean;
            own.sums[0] = mean, own.sums[1] = one * one + other * other;
        });
        threads.add_up(WARP, 1, [](Own &own) { return own.sums + 1; });
        threads.alone([&](int thread, Own &own) {
            if (thread >= N) return;
            const int64_t channel = head % H * N + thread;
            const float normed = (y(thread) - own.sums[0]) / sqrtf(own.sums[1] / N + 64e-5f);
            const float bonus = (at.few[1] + at.few[3]) * at.vector(V)[thread];
            const float found = (normed * weight[channel] + bias[channel] + bonus) * at.said[GATE * N + thread];
            put(out, head * N + thread, NARROW, found);
        });
    }

    ON_GPU void work(int64_t head, Threads &threads, float *shared) const {
        if (head >= heads) {
            threads.alone([&](int thread, Own &) { look_ahead((head - heads) * THREADS + thread); });
            return take_turn();
        }
        float *said = shared + SLICES * LOW * N, *vectors = said + LOW * N;
        const Shared at = {said, vectors, vectors + VECTORS * N};
        begin(head, threads, shared, at);
        remember(head, threads, at);
        finish(head, threads, at);
    }
};

struct Step {
    int64_t R, L, D, H, F, V, ranks[LOW];
    const int64_t *ids;
    float *logits;
    float *const *att_x, *const *memory, *const *ffn_x;
    const float *const *fixed, *const *vectors;
    const void *const *matrices;
    const float *const *scales;  // of matrices in int8, else null
    float *room;

    enum Fixed { EMB, LN0, LN0_BIAS, LN_OUT, LN_OUT_BIAS };
    enum Vectors { LN1, LN1_BIAS, LN2, LN2_BIAS, X_R, X_W, X_K, X_V, X_A, X_G, W0, A0, V0, K_K, K_A, R_K, LN_X,
                   LN_X_BIAS, FFN_X_K, VECTORS };
    enum Matrices { RECEPTANCE, KEY, VALUE, OUTPUT, W1, W2, A1, A2, V1, V2, G1, G2, FFN_KEY, FFN_VALUE, MATRICES };
    enum Rooms { X, NORMED, OUT, OF_R, OF_K, OF_V, FIRST, MADE, ROOMS = MADE + Given::MOST };

    const void *matrix(int64_t layer, int which) const { return matrices[layer * MATRICES + which]; }
    const float *vector(int64_t layer, int which) const { return vectors[layer * VECTORS + which]; }
    Norm norm(int64_t layer, int which) const { return {vector(layer, which), vector(layer, which + 1)}; }
    float *at(int which) const { return room + which * R * D; }
    float *wide() const { return at(ROOMS); }
    float *low(int which) const {
        float *found = wide() + R * F;
        for (int n = 0; n < which; n++) found += R * ranks[n];
        return found;
    }
    int width() const { return static_cast<int>(D); }
    bool fits() const { return R <= MOST_ROWS && D == H * N && F % 4 == 0; }
    const float *scale(int64_t layer, int which) const { return scales ? scales[layer * MATRICES + which] : nullptr; }
    Part one(int64_t layer, int which, const float *share, float *to, int64_t outs, Becomes how) const {
        const int many = static_cast<int>(outs);
        return {matrix(layer, which), scale(layer, which), share, to, many, many, how};
    }
    Copy state(float *to) const { return {at(NORMED), to, R * D}; }

    template <int BYTES>
    int time_mix(int64_t layer, int64_t stream) const {
        const auto part = [&](int which, int share, float *to, int64_t outs, Becomes how) {
            return one(layer, which, vector(layer, share), to, outs, how);
        };
        float *values = at(layer ? OF_V : FIRST);
        Given in = {{part(RECEPTANCE, X_R, at(OF_R), D, ITSELF), part(KEY, X_K, at(OF_K), D, ITSELF),
                     part(VALUE, X_V, values, D, ITSELF), part(W1, X_W, low(DECAY), ranks[DECAY], TANGENT),
                     part(A1, X_A, low(RATE), ranks[RATE], ITSELF), part(G1, X_G, low(GATE), ranks[GATE], SIGMOID),
                     part(V1, X_V, low(LEAN), ranks[LEAN], ITSELF)},
                    layer ? 7 : 6, width(), at(X), norm(layer, LN1), att_x[layer], at(NORMED), {}, at(MADE)};
        if (const int status = times<BYTES>(in, R, stream)) return status;
        const int64_t most = cached(), first = std::min(D * D * BYTES, most);
        const auto second = [&](int which, Low of) {
            return Second{matrix(layer, which), scale(layer, which), low(of), ranks[of]};
        };
        const Recall<BYTES, false> heads = {
            H, {second(W2, DECAY), second(A2, RATE), layer ? second(V2, LEAN) : Second{}, second(G2, GATE)},
            at(OF_R), at(OF_K), values, at(FIRST), vector(layer, W0), vector(layer, A0), vector(layer, V0),
            vector(layer, K_K), vector(layer, K_A), vector(layer, R_K), vector(layer, LN_X), vector(layer, LN_X_BIAS),
            memory[layer], at(OUT),
            {{matrix(layer, OUTPUT), first}, {matrix(layer, FFN_KEY), std::min(F * D * BYTES, most - first)}}, R * H};
        if (const int status = follow(heads, R * H + BESIDE, stream)) return status;
        const Given out = {{one(layer, OUTPUT, nullptr, at(X), D, ADDED)}, 1, width(), at(OUT), {}, nullptr,
                           nullptr, state(att_x[layer])};
        return times<BYTES>(out, R, stream);
    }

    template <int BYTES>
    int channel_mix(int64_t layer, int64_t stream) const {
        const Given key = {{one(layer, FFN_KEY, vector(layer, FFN_X_K), wide(), F, SQUARED)}, 1, width(), at(X),
                           norm(layer, LN2), ffn_x[layer], at(NORMED), {}, at(MADE)};
        if (const int status = times<BYTES>(key, R, stream)) return status;
        const Given value = {{one(layer, FFN_VALUE, nullptr, at(X), D, ADDED)}, 1, static_cast<int>(F), wide(),
                             {}, nullptr, nullptr, state(ffn_x[layer])};
        return times<BYTES>(value, R, stream);
    }

    template <int BYTES>
    int work(int64_t stream) const {
        const Embed begin = {D, V, ids, fixed[EMB], {fixed[LN0], fixed[LN0_BIAS]}, at(X)};
        int status = launch(begin, R, stream);
        for (int64_t layer = 0; layer < L && !status; layer++) {
            status = time_mix<BYTES>(layer, stream);
            if (!status) status = channel_mix<BYTES>(layer, stream);
        }
        if (status) return status;
        const Given head = {{one(L, RECEPTANCE, nullptr, logits, V, ITSELF)}, 1, width(), at(X),
                            {fixed[LN_OUT], fixed[LN_OUT_BIAS]}, nullptr, nullptr, {}, at(MADE)};
        return times<BYTES>(head, R, stream);
    }
};

}  // namespace

extern "C" {

// The heads of one layer alone, of any number of rows: of what is projected, and bent, to what goes the way out. All of
// one kind but vectors and memory; xs: (rows, rank) of w a v g, whose matrices are (rank, D), v's null in layer 0. The
// memory becomes that after the token. vectors: w0 a0 v0 (or null) k_k k_a r_k, the norm's weight and bias. Given back
// are 0, the GPU's error, or -1 for other kinds.
// takes R H dw da dv dg /r/k/v/first/out/xs/matrices: r k v first R*H*64, xs 4 of any, matrices 4 of any, vectors 8 of
// any, memory R*H*4096, out R*H*64
int recall7(const int64_t *z, int64_t stream, const void *r, const void *k, const void *v, const void *first,
            const void *const *xs, const void *const *matrices, const float *const *vectors, float *memory,
            void *out) {
    const auto started = [&](auto kernel) {
        kernel = {z[1], {}, r, k, v, first, vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5],
                  vectors[6], vectors[7], memory, out, {}, z[0] * z[1]};
        for (int n = 0; n < LOW; n++) kernel.seconds[n] = {matrices[n], nullptr, xs[n], z[2 + n]};
        return launch(kernel, z[0] * z[1], stream);
    };
    return z[6] == 127 ? started(Recall<2, true>()) : z[6] == 0 ? started(Recall<4, false>()) : -1;
}

// floats of `room`
int64_t step7_room(const int64_t *z) { return z[0] * (Step::ROOMS * z[2] + z[4] + z[6] + z[7] + z[8] + z[9]); }

// sizes: rows L D H F V, the ranks of w a v g, and a bit, of matrices in bf16. States become those after the ids; the
// logits of an id that there is not are no numbers. fixed: embedding, first norm (or null), last one; vectors and
// matrices of each layer, and the head. Given back are 0, the GPU's error, or -1 for sizes that it is not made for.
// takes R L D H F V dw da dv dg /matrices: ids R, logits R*V, att_x L of R*D, memory L of R*D*D//H, ffn_x L of R*D,
// fixed 5 of any, vectors 19*L of any, matrices 14*L+1 of any, room any
int step7(const int64_t *z, int64_t stream, const int64_t *ids, float *logits, float *const *att_x,
          float *const *memory, float *const *ffn_x, const float *const *fixed, const float *const *vectors,
          const void *const *matrices, float *room) {
    const Step step = {z[0], z[1], z[2], z[3], z[4], z[5], {z[6], z[7], z[8], z[9]}, ids, logits, att_x, memory,
                       ffn_x, fixed, vectors, matrices, nullptr, room};
    if (!step.fits()) return -1;
    return z[10] ? step.work<2>(stream) : step.work<4>(stream);
}

// The same with matrices in int8, and the scale of each of their outputs.
// takes R L D H F V dw da dv dg: ids R, logits R*V, att_x L of R*D, memory L of R*D*D//H, ffn_x L of R*D, fixed 5 of
// any, vectors 19*L of any, matrices scales 14*L+1 of any, room any
int step7_bytes(const int64_t *z, int64_t stream, const int64_t *ids, float *logits, float *const *att_x,
                float *const *memory, float *const *ffn_x, const float *const *fixed, const float *const *vectors,
                const int8_t *const *matrices, const float *const *scales, float *room) {
    const auto any = reinterpret_cast<const void *const *>(matrices);
    const Step step = {z[0], z[1], z[2], z[3], z[4], z[5], {z[6], z[7], z[8], z[9]}, ids, logits, att_x, memory,
                       ffn_x, fixed, vectors, any, scales, room};
    return step.fits() ? step.work<1>(stream) : -1;
}

}  // extern "C"
