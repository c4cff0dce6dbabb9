// How kernels are begun, on a GPU or on the host: `launch` has one begin when all before it are done, `follow` while the
// one before it still runs, where a card can (since compute capability 9.0).
//
// A kernel that follows may ask for weights at once. Then each of its threads takes its turn, whether or not there is
// something left for it to do: what kernels before have written is there from then on, and only from then on may it
// read that, or write anything. As each waits for the one before, each comes after all of them, and none writes what
// another still reads. The first of those that follow each other is launched: nobody knows what ran before it.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// blocks that a multiprocessor has beside each other at least, for which the compiler leaves registers; 0 leaves it to it
template <class Kernel, class = void>
constexpr int least_beside = 0;
template <class Kernel>
constexpr int least_beside<Kernel, std::void_t<decltype(Kernel::BESIDE)>> = Kernel::BESIDE;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, least_beside<Kernel>) run(const Kernel kernel) {
    extern __shared__ __align__(16) float shared[];
    typename Kernel::Threads block;
    kernel.work(static_cast<int64_t>(blockIdx.x), block, shared);
}

#endif

// Waits until the kernels before this one are done; then the next one that follows may come. Nothing where it was launched.
ON_GPU void take_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

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


#if defined(__CUDACC__) && CUDART_VERSION >= 12030
// whether the card can have kernels follow, and its driver record that
inline bool following() {
    int device = 0, capability = 0, driver = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDriverGetVersion(&driver) == cudaSuccess && capability >= 9 && driver >= 12030;
}
#endif

// The same of a kernel that takes its turn.
template <class Kernel>
int follow(const Kernel &kernel, int64_t blocks, int64_t stream) {
#if defined(__CUDACC__) && CUDART_VERSION >= 12030
    constexpr int bytes = Kernel::FLOATS * 4;
    static_assert(bytes <= 48 * 1024, "more shared memory is asked for before");
    if (blocks > 0 && blocks <= 0x7fffffff && following()) {
        cudaLaunchAttribute early = {};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t how = {};
        how.gridDim = dim3(static_cast<unsigned>(blocks)), how.blockDim = dim3(Kernel::THREADS);
        how.dynamicSmemBytes = bytes, how.stream = reinterpret_cast<cudaStream_t>(stream);
        how.attrs = &early, how.numAttrs = 1;
        cudaLaunchKernelEx(&how, run<Kernel>, kernel);
        return static_cast<int>(cudaGetLastError());
    }
#endif
    return launch(kernel, blocks, stream);
}
