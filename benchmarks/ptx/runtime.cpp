// A CUDA runtime without a card, for a library that nvcc made: what it launches is told to whoever set `told`. It refuses
// what a card refuses: more shared memory than was asked for, blocks or threads that there cannot be.

#include <cstddef>
#include <map>
#include <string>

namespace {

struct Three {
    unsigned x, y, z;
};

// how a kernel is begun, with what else is asked for
struct Attribute {
    int id;
    alignas(8) int value[16];
};
struct How {
    Three grid, block;
    size_t shared;
    void *stream;
    const Attribute *attributes;
    unsigned count;
};

constexpr int WRONG_VALUE = 1, WRONG_CONFIGURATION = 9, NOT_SUPPORTED = 801;
constexpr int FOLLOWS = 6, CACHE = 38, CAPABILITY = 75, DRIVER = 13000;  // CUDA's numbers of these; a version
constexpr size_t PLAIN = 48 * 1024;

std::map<const void *, std::string> &names() {  // kernels are named before globals are made
    static std::map<const void *, std::string> found;
    return found;
}

std::map<const void *, size_t> allowed;
Three grid, block;
size_t shared;
void *stream;
int last = 0;
size_t most = 0;     // bytes of shared memory that a block of the card may have
int capability = 0;  // of the card
using Told = int (*)(const char *, unsigned, unsigned, size_t, int, void **);
Told told = nullptr;

int say(int status) {
    if (status) last = status;
    return status;
}

int begin(const void *function, Three g, Three b, void **words, size_t bytes, int follows) {
    const auto found = allowed.find(function);
    if (bytes > PLAIN && (found == allowed.end() || found->second < bytes)) return say(WRONG_VALUE);
    if (!g.x || g.x > 0x7fffffffu || g.y != 1 || g.z != 1 || !b.x || b.x > 1024 || b.y != 1 || b.z != 1)
        return say(WRONG_CONFIGURATION);
    return say(told(names()[function].c_str(), g.x, b.x, bytes, follows, words));
}

}  // namespace

extern "C" {

void runtime_tell(Told to, size_t bytes, int card) { told = to, most = bytes, capability = card; }

void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *, void *, int *) {
    names()[host] = name;
}

unsigned __cudaPushCallConfiguration(Three g, Three b, size_t bytes, void *s) {
    grid = g, block = b, shared = bytes, stream = s;
    return 0;
}
int __cudaPopCallConfiguration(Three *g, Three *b, size_t *bytes, void **s) {
    *g = grid, *b = block, *bytes = shared, *s = stream;
    return 0;
}

int cudaGetDevice(int *device) { return *device = 0; }
int cudaDeviceGetAttribute(int *value, int which, int) {
    if (which != CACHE && which != CAPABILITY) return say(WRONG_VALUE);
    *value = which == CACHE ? 50 << 20 : capability;  // an H100's cache
    return 0;
}
int cudaDriverGetVersion(int *version) {
    *version = DRIVER;
    return 0;
}

int __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return 0;
}

int cudaFuncSetAttribute(const void *function, int attribute, int value) {
    if (attribute == 8 && (value < 0 || static_cast<size_t>(value) > most)) return say(WRONG_VALUE);
    if (attribute == 8) allowed[function] = value;
    return 0;
}

int __cudaLaunchKernel(const void *function, Three g, Three b, void **words, size_t bytes, void *) {
    return begin(function, g, b, words, bytes, 0);
}

int cudaLaunchKernelExC(const How *how, const void *function, void **words) {
    int follows = 0;
    for (unsigned n = 0; n < how->count; n++) {
        if (how->attributes[n].id != FOLLOWS || capability < 9) return say(NOT_SUPPORTED);
        follows = how->attributes[n].value[0] != 0;
    }
    return begin(function, how->grid, how->block, words, how->shared, follows);
}

int cudaGetLastError() {
    const int found = last;
    last = 0;
    return found;
}

}  // extern "C"
