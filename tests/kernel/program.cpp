// Every native function once over small tensors; with an argument it writes all their numbers to its output.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

extern "C" {
int64_t wkv7_kept(int64_t, int64_t, int64_t, int64_t);
void wkv7_forward(const int64_t *, int, const float *, const float *, const float *, const float *, const float *,
                  const float *, const float *, float *, float *, float *, float *);
void wkv7_backward(const int64_t *, int, const float *, const float *, const float *, const float *, const float *,
                   const float *, const float *, const float *, const float *, const float *, float *, float *,
                   float *, float *, float *, float *, float *);
int64_t wkv6_kept(int64_t, int64_t, int64_t, int64_t);
void wkv6_forward(const int64_t *, int, const float *, const float *, const float *, const float *, const float *,
                  const float *, float *, float *, float *);
void wkv6_backward(const int64_t *, int, const float *, const float *, const float *, const float *, const float *,
                   const float *, const float *, const float *, float *, float *, float *, float *, float *, float *,
                   float *);
void multiply(const int64_t *, int, const float *, const float *, float *);
void twelve_count(const int64_t *, int, const float *, float *, int64_t *);
void twelve_pack(const int64_t *, int, const float *, int32_t *);
void panels_times(const int64_t *, int, const void *const *, const float *, float *, float *);
void decode7(const int64_t *, int, const float *const *, const float *const *, const void *const *,
             const float *const *, const int64_t *, float *const *, float *const *, float *const *, const int64_t *,
             float *);
void decode6(const int64_t *, int, const float *const *, const float *const *, const void *const *,
             const float *const *, const int64_t *, float *const *, float *const *, float *const *, const int64_t *,
             float *);
void read7(const int64_t *, int, const int64_t *, const float *const *, const void *const *, const float *const *,
           const int64_t *, float *const *, float *const *, float *const *, float *);
void read6(const int64_t *, int, const int64_t *, const float *const *, const void *const *, const float *const *,
           const int64_t *, float *const *, float *const *, float *const *, float *);
void loss_rows(const int64_t *, int, float *, const int64_t *, const int64_t *, float, float, float *);
void sample_rows(const int64_t *, int, const float *, const float *, const float *, const uint8_t *, const int64_t *,
                 const float *, const double *, const double *, int64_t *, float *, int64_t *);
void norm_forward(const int64_t *, int, const float *, const float *, const float *, float, float *);
void norm_backward(const int64_t *, int, const float *, const float *, const float *, float, const float *, float *,
                   float *, float *);
void gate_backward(const int64_t *, int, const float *, const float *, const float *, const float *, float,
                   const float *, float *, float *, float *, float *);
void finish_backward(const int64_t *, int, const float *, const float *, const float *, const float *, const float *,
                     const float *, const float *, const float *, float, const float *, float *, float *, float *,
                     float *, float *, float *, float *);
}

// of exactly their length, so that a step beyond it is seen
std::vector<std::pair<int64_t, std::unique_ptr<float[]>>> all;

float *made(int64_t n) {
    float *numbers = new float[n];
    for (int64_t i = 0; i < n; i++) numbers[i] = 0.01f * static_cast<float>((i * 37) % 101 - 50);
    all.emplace_back(n, numbers);
    return numbers;
}

// arguments in braces are computed from left to right by every compiler
void operators(int64_t B, int64_t T, int64_t H, int64_t N) {
    const int64_t s[] = {B, T, H, N}, n = B * T * H * N, m = B * H * N * N, D = H * N;
    auto x = [&] { return made(n); };
    float *r = x(), *w = x(), *k = x(), *v = x(), *a = x(), *b = x(), *y = x(), *u = x(), *S = made(m), *end = made(m);
    for (int64_t i = 0; i < n; i++) a[i] *= 0.1f;  // else states would grow to 1e13, and cancel
    float *kept = made(wkv7_kept(B, T, H, N));
    wkv7_forward(s, 2, r, w, k, v, a, b, S, y, end, nullptr, nullptr);
    wkv7_forward(s, 2, r, w, k, v, a, b, S, y, end, kept, u);
    std::apply(wkv7_backward,
               std::tuple{s, 2, r, w, k, v, a, b, kept, u, y, end, x(), x(), x(), x(), x(), x(), made(m)});
    for (int64_t shared = 0; shared < 2; shared++) {
        const int64_t s6[] = {B, T, H, N, shared};
        float *own = shared ? made(D) : w, *bonus = made(D), *kept6 = made(wkv6_kept(B, T, H, N));
        wkv6_forward(s6, 2, r, own, k, v, bonus, S, y, end, nullptr);
        wkv6_forward(s6, 2, r, own, k, v, bonus, S, y, end, kept6);
        std::apply(wkv6_backward, std::tuple{s6, 2, r, own, k, v, bonus, kept6, y, end, x(), made(shared ? D : n), x(),
                                             x(), made(D), made(m), made(2 * B * D)});
    }
    const int64_t tokens[] = {B * T, H, N}, tasks = (B * T + 63) / 64;
    const int64_t stream[] = {B * T, D};
    norm_forward(stream, 2, r, made(D), made(D), 0.01f, y);
    std::apply(norm_backward, std::tuple{stream, 2, r, made(D), made(D), 0.01f, k, x(), made(tasks * 2 * D), made(2 * D)});
    std::apply(gate_backward, std::tuple{tokens, 2, y, r, made(D), made(D), 0.01f, k, x(), x(), made(tasks * 2 * D),
                                         made(2 * D)});
    std::apply(finish_backward, std::tuple{tokens, 2, y, r, k, v, a, made(D), made(D), made(D), 0.01f, b, x(), x(), x(),
                                           x(), x(), made(tasks * 3 * D), made(3 * D)});
    std::vector<int64_t> chosen(B * T, N - 1), real(B * T, 1);
    const int64_t rows[] = {B * T, D};
    std::apply(loss_rows, std::tuple{rows, 2, r, chosen.data(), real.data(), 0.5f, 0.1f, made(B * T)});
}

// zeros as they are kept in a kind: rows, or panels of 16 of them, in pairs with a scale for each row of int8
template <class Number>
struct Matrices {
    int64_t kind;
    std::vector<std::unique_ptr<Number[]>> numbers;
    std::vector<const void *> places;
    std::vector<const float *> scales;
    std::vector<int64_t> lies;

    void operator()(int64_t out, int64_t in) {
        numbers.emplace_back(new Number[(kind ? (out + 15) / 16 * 16 : out) * (kind == 3 ? (in + 1) / 2 * 2 : in)]());
        plain(numbers.back().get(), kind == 3 ? made(out) : nullptr, kind);
    }
    void plain(const void *place, const float *scale = nullptr, int64_t how = 0) {
        places.push_back(place), scales.push_back(scale), lies.push_back(how);
    }
};

#if defined(__AVX512F__)
// a matrix in twelve bits, with numbers that have no code
void twelve(int64_t out, int64_t in) {
    const int64_t panels = (out + 15) / 16, each = 16 + (in + 7) / 8 * 48;
    float *matrix = made(out * in), *powers = made(panels * 16);
    for (int64_t i = 0; i < out * in; i++) {
        uint32_t number;
        std::memcpy(&number, matrix + i, sizeof number);
        number &= 0xffff0000;
        if (i % 7 == 0) number = static_cast<uint32_t>(i % 220) << 23;
        std::memcpy(matrix + i, &number, sizeof number);
    }
    std::vector<int64_t> others(panels);
    const int64_t sizes[] = {out, in, panels};
    twelve_count(sizes, 2, matrix, powers, others.data());
    std::vector<int32_t> starts(1);
    for (int64_t n : others) starts.push_back(starts.back() + static_cast<int32_t>(n));
    const int64_t size = panels * each + panels + 1 + 2 * starts.back(), given[] = {out, in, panels, size};
    const std::unique_ptr<int32_t[]> data(new int32_t[size]());
    for (int64_t n = 0; n < panels; n++) std::memcpy(data.get() + n * each, powers + n * 16, 64);
    std::copy(starts.begin(), starts.end(), data.get() + panels * each);
    twelve_pack(given, 2, matrix, data.get());
    const void *place = data.get();
    for (int64_t rows : {1, 2, 5, 9, 13, 15, 16, 61}) {
        const int64_t asked[] = {rows, out, in, 4};
        float *x = made(rows * in), *y = made(rows * out);
        panels_times(asked, 2, &place, nullptr, x, y);
        for (int64_t i = 0; i < rows * out; i++) {
            double sum = 0, most = 0;
            for (int64_t k = 0; k < in; k++) {
                const double product = double(x[i / out * in + k]) * matrix[i % out * in + k];
                sum += product, most += std::abs(product);
            }
            if (!(std::abs(y[i] - sum) <= 1e-6 * most + 1e-30)) std::abort();
        }
    }
}
#endif

// texts through layers that lie in panels, also longer ones than go at once, with and without an end of each row
template <class Number>
void texts(decltype(read7) reading, const std::vector<const float *> &vectors, const Matrices<Number> &matrices,
           const std::vector<int64_t> &sizes) {
    const int64_t L = sizes[0], D = sizes[1], H = sizes[2];
    for (const auto &[rows, T] : {std::pair<int64_t, int64_t>{1, 1}, {3, 35}, {1, 515}, {171, 3}}) {
        std::vector<int64_t> s = {rows, T}, lengths(rows, T);
        s.insert(s.end(), sizes.begin(), sizes.end());
        if (rows > 1) lengths[0] = 0, lengths[1] = T / 2;
        for (bool all_of_each : {false, true}) {
            std::vector<float *> att, memory, ffn;
            for (int64_t l = 0; l < L; l++)
                att.push_back(made(rows * D)), memory.push_back(made(rows * D * D / H)), ffn.push_back(made(rows * D));
            reading(s.data(), 2, all_of_each ? nullptr : lengths.data(), vectors.data(), matrices.places.data(),
                    matrices.scales.data(), matrices.lies.data(), att.data(), memory.data(), ffn.data(),
                    made(rows * T * D));
        }
    }
}

template <class Number>
void older(int64_t rows, int64_t kind, int64_t mixed, int64_t low) {
    const int64_t L = 2, D = 20, H = 2, F = 23, V = 19, s[] = {rows, L, D, H, F, V, mixed, low};
    const float *fixed[] = {made(V * D), nullptr, nullptr, made(D), made(D)};
    std::vector<const float *> vectors;
    for (int64_t i = 0; i < 16 * L; i++) vectors.push_back(made(D));
    Matrices<Number> matrices{kind};
    for (int64_t l = 0; l < L; l++) {
        for (int i = 0; i < 5; i++) matrices(D, D);
        matrices(F, D), matrices(D, F), matrices(D, D), matrices(low, D), matrices(D, low);
        for (int i = 0; i < 6; i++) matrices.plain(made(5 * mixed * D));
    }
    matrices(V, D);
    float *att[] = {made(rows * D), made(rows * D)}, *ffn[] = {made(rows * D), made(rows * D)};
    float *memory[] = {made(rows * D * D / H), made(rows * D * D / H)};
    std::vector<int64_t> ids(rows, V - 1);
    std::apply(decode6, std::tuple{s, 2, fixed, vectors.data(), matrices.places.data(), matrices.scales.data(),
                                   matrices.lies.data(), att, memory, ffn, ids.data(), made(rows * V)});
    if (!kind) return;
    Matrices<Number> panels{kind};
    for (int64_t l = 0; l < L; l++) {
        for (int i = 0; i < 5; i++) panels(D, D);
        panels(F, D), panels(D, F), panels(D, D), panels(low, D), panels(D, low);
        vectors.insert(vectors.begin() + 18 * l + 16, {made(5 * mixed * D), made(5 * mixed * D)});
    }
    texts(read6, vectors, panels, {L, D, H, F, mixed, low});
}

template <class Number>
void decode(int64_t rows, int64_t kind) {
    const int64_t L = 2, D = 20, H = 2, F = 23, V = 19, s[] = {rows, L, D, H, F, V, 5, 17, 3, 9};
    const float *fixed[] = {made(V * D), made(D), made(D), made(D), made(D)};
    std::vector<const float *> vectors;
    for (int64_t i = 0; i < 19 * L; i++) vectors.push_back(made(D));
    Matrices<Number> matrices{kind};
    for (int64_t l = 0; l < L; l++) {
        for (int i = 0; i < 4; i++) matrices(D, D);
        for (int i = 0; i < 4; i++) matrices(s[6 + i], D), matrices(D, s[6 + i]);
        matrices(F, D), matrices(D, F);
    }
    matrices(V, D);
    float *att[] = {made(rows * D), made(rows * D)}, *ffn[] = {made(rows * D), made(rows * D)};
    float *memory[] = {made(rows * D * D / H), made(rows * D * D / H)};
    std::vector<int64_t> ids(rows, V - 1);
    std::apply(decode7, std::tuple{s, 2, fixed, vectors.data(), matrices.places.data(), matrices.scales.data(),
                                   matrices.lies.data(), att, memory, ffn, ids.data(), made(rows * V)});
    older<Number>(rows, kind, 0, 0), older<Number>(rows, kind, 3, 17);
    if (!kind) return;
    texts(read7, vectors, matrices, {L, D, H, F, 5, 17, 3, 9});
    for (int64_t count : {rows, 5 * rows, 41 * rows}) {
        const int64_t sizes[] = {count, V, D, kind};
        std::apply(panels_times,
                   std::tuple{sizes, 2, &matrices.places.back(), matrices.scales.back(), made(count * D),
                              made(count * V)});
    }
}

void products(int64_t n, int64_t k, int64_t m) {
    for (int64_t form = 0; form < 24; form++) {
        const int64_t s[] = {n, k, m, form & 1, form >> 1 & 1, form >> 2 & 1, form >> 3};
        std::apply(multiply, std::tuple{s, 2, made(n * k), made(k * m), made(n * m)});
    }
}

void samples(int64_t V, int64_t top_k, double top_p) {
    const std::vector<int64_t> listed = {V - 1, 0, V - 1};
    const std::vector<double> set = {1.3, top_p, 1.2, 0.3, 0.1}, draws = {0.0, 0.99};
    std::unique_ptr<uint8_t[]> seen(new uint8_t[2 * V]());
    std::unique_ptr<int64_t[]> told(new int64_t[2 * V]), ids(new int64_t[2]);
    seen[V - 1] = seen[2 * V - 1] = 1;
    for (int64_t form = 0; form < 3; form++) {
        const int64_t s[] = {2, V, top_k, form == 1, form == 2, 1, 1, V > 1};
        float *x = made(2 * V);
        std::apply(sample_rows, std::tuple{s, 2, x, x, made(2 * V), form ? seen.get() : nullptr, listed.data(), made(1),
                                           set.data(), draws.data(), ids.get(), made(2), told.get()});
    }
}

int main(int count, char **) {
    for (int64_t V : {1, 5, 64, 200}) samples(V, 0, 1.0), samples(V, 3, 0.7), samples(V, 0, 0.9), samples(V, 100, 1.0);
    products(1, 1, 1), products(5, 781, 17), products(29, 7, 50);
    operators(2, 1, 1, 20), operators(1, 35, 3, 7), operators(1, 33, 1, 33), operators(1, 40, 70, 2);
    for (int64_t rows : {1, 7}) {
        decode<float>(rows, 0), decode<float>(rows, 1), decode<uint16_t>(rows, 2), decode<int8_t>(rows, 3);
    }
#if defined(__AVX512F__)
    twelve(1, 1), twelve(19, 23), twelve(50, 70), twelve(150, 401);
#endif
    if (count == 1) return std::puts("all"), 0;
    for (const auto &[n, numbers] : all) std::fwrite(numbers.get(), sizeof(float), n, stdout);
}
