// What the GPU kernels are written with, so that one source makes them for a GPU (nvcc) and for the host (any C++
// compiler, where tests compare them with the reference): a block of threads that walks through phases.
//
// A kernel is a struct with THREADS, FLOATS (of shared memory), a type Threads, which is Block<what a thread keeps in
// registers, THREADS>, and work(block number, its threads, shared memory). What threads do between two barriers is a
// phase, block.each(f) with f(thread, what it keeps). On the host a phase is a loop over the threads, in any order: `grid_order` changes it, and a
// result that changes with it tells of a missing barrier.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ON_GPU __device__ __forceinline__
#define EITHER __host__ __device__ __forceinline__
#else
#include <cmath>
#include <limits>
#include <vector>
#define ON_GPU inline
#define EITHER inline
#endif

#ifdef __CUDACC__

template <class Own, int COUNT>
struct Block {
    Own own;

    template <class Phase>
    ON_GPU void each(Phase phase) {
        phase(static_cast<int>(threadIdx.x), own);
        __syncthreads();
    }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS) run(const Kernel kernel) {
    extern __shared__ __align__(16) float shared[];
    typename Kernel::Threads block;
    kernel.work(static_cast<int64_t>(blockIdx.x), block, shared);
}

#else

inline int grid_way = 0;  // 0: threads in order; 1: from the last to the first; 2: the odd ones first

template <class Own, int COUNT>
struct Block {
    std::vector<Own> own = std::vector<Own>(COUNT);

    Block() { std::memset(static_cast<void *>(own.data()), 0xff, sizeof(Own) * COUNT); }  // nothing is there before

    template <class Phase>
    void each(Phase phase) {
        for (int n = 0; n < COUNT; n++) {
            const int odd = COUNT / 2, mixed = n < odd ? 2 * n + 1 : 2 * (n - odd);
            const int thread = grid_way == 0 ? n : grid_way == 1 ? COUNT - 1 - n : mixed;
            phase(thread, own[thread]);
        }
    }
};

#endif

// One kernel over so many blocks; 0, or the number of the GPU's error.
template <class Kernel>
int launch(const Kernel &kernel, int64_t blocks, int64_t stream) {
    if (blocks == 0) return 0;
#ifdef __CUDACC__
    constexpr int bytes = Kernel::FLOATS * 4;
    if (blocks > 0x7fffffff) return static_cast<int>(cudaErrorInvalidConfiguration);
    if (bytes > 48 * 1024) {
        const cudaError_t told = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (told != cudaSuccess) return static_cast<int>(cudaGetLastError());  // or the next kernel would tell of it
    }
    run<Kernel><<<static_cast<unsigned>(blocks), Kernel::THREADS, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(kernel);
    return static_cast<int>(cudaGetLastError());
#else
    (void)stream;
    for (int64_t n = 0; n < blocks; n++) {
        std::vector<float> shared(Kernel::FLOATS, std::numeric_limits<float>::quiet_NaN());
        typename Kernel::Threads block;
        kernel.work(n, block, shared.data());
    }
    return 0;
#endif
}

// Numbers in memory: fp32, or bf16, whichever a bit of `Sizes::halves` says of a tensor.
ON_GPU float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// to the nearest, of two equally near ones the even one
ON_GPU uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);  // no number
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

ON_GPU float get(const void *from, int64_t at, bool half) {
    return half ? from_bf16(static_cast<const uint16_t *>(from)[at]) : static_cast<const float *>(from)[at];
}

ON_GPU void put(void *to, int64_t at, bool half, float x) {
    if (half)
        static_cast<uint16_t *>(to)[at] = to_bf16(x);
    else
        static_cast<float *>(to)[at] = x;
}

// Asks for a line of 128 bytes that is to be read soon.
ON_GPU void soon(const void *line) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#else
    (void)line;
#endif
}

// Where the tokens of a head lie: channel 0 of token t. A division takes as long as 30 additions, so a head is looked
// for once and not at each of its numbers.
struct Head {
    int64_t first, step;
    ON_GPU int64_t at(int64_t t) const { return first + t * step; }
};

struct Sizes {
    int64_t B, T, H, N, halves;

    EITHER int64_t segments(int64_t tokens) const { return (T + tokens - 1) / tokens; }
    ON_GPU bool half(int tensor) const { return halves >> tensor & 1; }
    // heads of all rows are numbered through
    ON_GPU Head head(int64_t number) const { return {(number / H * T * H + number % H) * N, H * N}; }
    ON_GPU int64_t at(int64_t number, int64_t t) const { return head(number).at(t); }
};

// x, but at most `most`; what is no number stays none
ON_GPU float at_most(float x, float most) { return x > most ? most : x; }

// exp(w), but at most what leaves nothing of a state either way: its products with a decay of 0 are then 0, not NaN
ON_GPU float rate_of(float w) { return at_most(expf(w), 1e4f); }

constexpr int KEEP = 64;  // tokens for which the forward keeps one state
constexpr int SOME = 8;   // tokens that lie in shared memory together; of as many the backward writes down a state

template <int N_>
struct Shape {
    static constexpr int N = N_, EACH = N_ < 32 ? N_ : 32, PARTS = N_ / EACH, THREADS = N_ * PARTS;
};

// the least of our sizes that a head of n channels fits in, given to `f` as a type; -1 if there is none
template <class F>
int sized(int64_t n, F f) {
    if (n <= 16) return f(Shape<16>());
    if (n <= 32) return f(Shape<32>());
    if (n <= 64) return f(Shape<64>());
    if (n <= 128) return f(Shape<128>());
    return -1;
}
