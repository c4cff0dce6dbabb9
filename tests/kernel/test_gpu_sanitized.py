"""The GPU's kernels, built for the host, under the address and undefined-behaviour sanitizers: shared memory, too."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rwkvpipe.kernel import gpu

PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

extern "C" {
#define SEVEN const void *, const void *, const void *, const void *, const void *, const void *
#define SIX const void *, const void *, const void *, const void *, const void *
int64_t wkv7_kept(const int64_t *), wkv7_room(const int64_t *), wkv6_kept(const int64_t *), wkv6_room(const int64_t *);
int64_t wkv7_chunks_kept(const int64_t *), wkv7_chunks_room(const int64_t *);
#define DECLARE(name)                                                                              \
    int name##_forward(const int64_t *, int64_t, SEVEN, const float *, void *, float *, float *);  \
    int name##_backward(const int64_t *, int64_t, SEVEN, const float *, const void *, const float *, void *, void *, \
                        void *, void *, void *, void *, float *, float *);
DECLARE(wkv7)
DECLARE(wkv7_chunks)
int64_t mix_sums(const int64_t *);
int mix_forward(const int64_t *, int64_t, const void *, const void *, const void *const *, void *const *);
int mix_backward(const int64_t *, int64_t, const void *, const void *, const void *const *, const void *const *, void *,
                 void *, float *);
int square(const int64_t *, int64_t, const void *, const void *, void *);
int64_t lean_sums(const int64_t *), heads_sums(const int64_t *);
#define FOUR const void *, const void *, const void *, const void *
int lean_forward(const int64_t *, int64_t, FOUR, void *);
int lean_backward(const int64_t *, int64_t, FOUR, const void *, void *, void *, void *, float *);
int prepare_forward(const int64_t *, int64_t, FOUR, const void *, const void *, const void *, void *, void *, void *,
                    void *, float *);
int prepare_backward(const int64_t *, int64_t, FOUR, const void *, const void *, const void *, const float *, FOUR,
                     void *, void *, void *, float *);
int finish_forward(const int64_t *, int64_t, FOUR, FOUR, float, void *, float *);
int finish_backward(const int64_t *, int64_t, FOUR, FOUR, float, const float *, const void *, void *, void *, void *,
                    void *, void *, float *);
int loss_rows(const int64_t *, int64_t, void *, const int64_t *, const int64_t *, float, float, float *);
int64_t wkv6_chunks_kept(const int64_t *), wkv6_chunks_room(const int64_t *);
#define DECLARE_6(name)                                                                           \
    int name##_forward(const int64_t *, int64_t, SIX, const float *, void *, float *, float *);   \
    int name##_backward(const int64_t *, int64_t, SIX, const float *, const void *, const float *, void *, void *, \
                        void *, void *, float *, float *, float *);
DECLARE_6(wkv6)
DECLARE_6(wkv6_chunks)
}

std::vector<std::unique_ptr<float[]>> all;  // of exactly their length, so that a step beyond it is seen

float *made(int64_t n) {
    all.emplace_back(new float[n]);
    for (int64_t i = 0; i < n; i++) all.back()[i] = 0.01f * static_cast<float>((i * 37) % 101 - 50);
    return all.back().get();
}

int wrong = 0;

#define SEVENTH(name, parts)                                                                            \
    {                                                                                                   \
        float *kept = made(name##_kept(s));                                                             \
        wrong |= name##_forward(s, 0, r, w, k, v, a, b, S, y, end, nullptr);                            \
        wrong |= name##_forward(s, 0, r, w, k, v, a, b, S, y, end, kept);                               \
        wrong |= name##_backward(s, 0, r, w, k, v, a, b, kept, y, end, made(parts * n), made(parts * n), \
                                 made(parts * n), x(), made(parts * n), made(parts * n), made(m),        \
                                 made(name##_room(s)));                                                 \
    }

#define SIXTH(name, parts)                                                                              \
    {                                                                                                   \
        float *u = made(H * N), *kept = made(name##_kept(s));                                           \
        wrong |= name##_forward(s, 0, r, w, k, v, u, S, y, end, nullptr);                               \
        wrong |= name##_forward(s, 0, r, w, k, v, u, S, y, end, kept);                                  \
        wrong |= name##_backward(s, 0, r, w, k, v, u, kept, y, end, made(parts * n),                    \
                                 made(s[5] ? parts * B * H * N : parts * n), made(parts * n), x(),      \
                                 made(parts * B * H * N), made(m), made(name##_room(s)));               \
    }

void operators(int64_t B, int64_t T, int64_t H, int64_t N) {
    const int64_t n = B * T * H * N, m = B * H * N * N;
    int64_t s[] = {B, T, H, N, 0, 0, 0};
    auto x = [&] { return made(n); };
    float *r = x(), *w = x(), *k = x(), *v = x(), *a = x(), *b = x(), *y = x(), *S = made(m), *end = made(m);
    for (int64_t i = 0; i < n; i++) w[i] -= i % 13 ? 1.0f : -3.0f;
    SEVENTH(wkv7, 1)
    for (s[5] = 1; N == 64 && s[5] <= 4; s[5] *= 2) SEVENTH(wkv7_chunks, s[5])
    for (s[5] = 0; s[5] < 2; s[5]++) {
        SIXTH(wkv6, 1)
        for (s[6] = 1; N == 64 && s[6] <= 4; s[6] *= 2) SIXTH(wkv6_chunks, s[6])
    }
}

void passes(int64_t B, int64_t T, int64_t D) {
    const int64_t s[] = {B, T, D, 2, 0, 0}, numbers[] = {B * T * D, 0};
    auto x = [&] { return made(B * T * D); };
    const void *m[] = {made(D), made(D)}, *dy[] = {x(), x()};
    void *out[] = {x(), x()};
    float *in = x(), *last = made(B * D);
    wrong |= mix_forward(s, 0, in, last, m, out);
    wrong |= mix_backward(s, 0, in, last, m, dy, x(), made(B * D), made(mix_sums(s)));
    wrong |= square(numbers, 0, in, nullptr, x());
    wrong |= square(numbers, 0, in, dy[0], x());
}

void by_head(int64_t tokens, int64_t H, int64_t N) {
    const int64_t s[] = {tokens, H, N, 0, 4}, channels[] = {tokens, H * N, 0};
    auto x = [&] { return made(tokens * H * N); };
    auto row = [&] { return made(H * N); };
    const void *a = x(), *b = x(), *c = x(), *d = x(), *e = x();
    const void *one = row(), *two = row(), *three = row(), *four = row();
    wrong |= lean_forward(channels, 0, a, b, c, one, x());
    wrong |= lean_backward(channels, 0, a, b, c, one, d, x(), x(), x(), made(lean_sums(channels)));
    float *norms = made(tokens * H), *found = made(tokens * H * 3);
    wrong |= prepare_forward(s, 0, a, b, c, one, two, three, four, x(), x(), x(), x(), norms);
    wrong |= prepare_backward(s, 0, a, b, c, one, two, three, four, norms, a, b, d, e, x(), x(), x(),
                              made(heads_sums(s)));
    wrong |= finish_forward(s, 0, a, nullptr, nullptr, nullptr, e, nullptr, two, three, 0.1f, x(), nullptr);
    wrong |= finish_forward(s, 0, a, b, c, d, e, one, two, three, 0.1f, x(), found);
    wrong |= finish_backward(s, 0, a, b, c, d, e, one, two, three, 0.1f, found, b, x(), x(), x(), x(), x(),
                             made(heads_sums(s)));
}

void losses(int64_t rows, int64_t V) {
    const int64_t s[] = {rows, V, 0};
    std::vector<int64_t> chosen(rows, V - 1), real(rows, 1);
    wrong |= loss_rows(s, 0, made(rows * V), chosen.data(), real.data(), 0.5f, 0.1f, made(rows));
}

int main() {
    by_head(1, 1, 1), by_head(35, 5, 20), by_head(9, 3, 128), by_head(33, 9, 64);
    losses(1, 1), losses(3, 513), losses(2, 9000);
    passes(1, 1, 1), passes(2, 35, 20), passes(3, 32, 300);
    operators(1, 1, 1, 5), operators(1, 67, 2, 20), operators(1, 9, 1, 100), operators(1, 67, 1, 64);
    std::puts(wrong ? "wrong" : "all");
}
"""


@pytest.mark.large
def test_the_gpu_s_kernels_keep_inside_their_tensors_and_shared_memory(tmp_path: Path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-x", "c++"]
    parts = [str(source), *map(str, gpu.sources())]
    made = subprocess.run([*command, "-Wno-unknown-pragmas", *parts, "-o", str(program)], capture_output=True)
    if made.returncode and (b"sanitize" in made.stderr or b"asan" in made.stderr):
        pytest.skip("this compiler has no address sanitizer")
    assert made.returncode == 0, made.stderr.decode()[:3000]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr[:3000]
