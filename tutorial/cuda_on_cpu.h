// CUDA C++ without a GPU: enough of the language's meaning to run the kernels of kernels.py on a CPU, exactly as they are.
//
// A kernel is compiled as ordinary C++ with this header in front of it. The threads of a block become coroutines on one
// operating system thread, each with a stack of its own; they take turns, and change over only where CUDA lets threads
// meet: at __syncthreads() and at the operations of a warp (shuffles, votes, matrix instructions). A warp runs until all
// of it waits at a barrier before the next one gets its turn: that warps keep in step is nothing a GPU promises. Blocks
// run one after the other. So a run is deterministic, and printf and breakpoints work as in any program.
//
// What a GPU leaves undefined is made visible where that is cheap:
//   * lanes of a warp that meet at different operations (or lines), or with a mask that is not all of them: an error
//   * a barrier that some thread of the block never reaches, or passes on another line: an error
//   * a vector load or store that is not aligned to its size, or outside of the tensors that the kernel was given: an error
//   * shared memory that is read before it is written: it starts as NaN in every block
//   * shared memory whose copy from global memory nobody has waited for: it holds NaN from when the copy was asked for
//   * a missing __syncthreads(): the order of lanes and of warps can be reversed, which must not change any result
// And vector loads and stores are counted, in bytes, for each tensor.
#pragma once
#include <cstdarg>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#ifdef __ELF__  // collected in one place, so that it can be poisoned
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));
#else
#define __shared__ static
#endif

struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }

namespace cuda {

constexpr int WARP = 32, STACK = 128 << 10, SLOT = 64;
enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Thread {
    dim3 index;
    State state;
    const char* where;                 // the operation this thread waits at
    unsigned turn = 0;                 // warp operations so far; the slots alternate, as a fast lane may be one ahead
    alignas(16) char slot[2][SLOT];    // what this lane brought to a warp operation
    struct Copy { void* to; const void* from; int bytes; };
    std::vector<Copy> copies;  // not waited for yet
    bool started;
    jmp_buf at;
    std::vector<char> stack;
};

static std::vector<Thread> threads;  // of the block that runs
static Thread* current;
static jmp_buf scheduler;
static ucontext_t main_context;
static dim3 block_index, block_dim, grid_dim;
static char error[256];
struct Tensor { const char *begin, *end; int64_t read, written; };  // the last two: bytes, by vector loads and stores
static Tensor* tensors;  // that were passed to the kernel
static size_t num_tensors;
static void (*body)(void**);
static void** arguments;

// Ends the launch: what the running thread did that it must not, as printf would say it.
[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    int n = snprintf(error, sizeof error, "block (%u, %u, %u), thread %u: ", block_index.x, block_index.y, block_index.z,
                     current->index.x);
    va_list values;
    va_start(values, format);
    vsnprintf(error + n, sizeof error - n, format, values);
    va_end(values);
    _longjmp(scheduler, 2);
}

static void wait(State state, const char* where) {
    current->state = state;
    current->where = where;
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

static void entry() {
    body(arguments);
    current->state = DONE;
    current->where = "its start or end";
    _longjmp(scheduler, 1);
}

static void resume(Thread& t) {
    current = &t;
    if (t.started) _longjmp(t.at, 1);
    t.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = t.stack.data();
    context.uc_stack.ss_size = t.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    setcontext(&context);
}

// Runs the block's threads until all are done; false if there was an error.
static bool run_block(bool reverse) {
    volatile int n = int(threads.size()), progress = 1;
    while (progress) {
        progress = 0;
        for (volatile int turn = 0; turn < n; turn += WARP) {
            volatile int w = reverse ? n - WARP - turn : turn;
            for (volatile int i = 0; i < WARP; i++) {
                Thread& t = threads[w + (reverse ? WARP - 1 - i : i)];
                if (t.state != READY) continue;
                progress = 1;
                int how = _setjmp(scheduler);
                if (how == 0) resume(t);
                if (how == 2) return false;
            }
            int at_warp = 0;
            for (int i = 0; i < WARP; i++) at_warp += threads[w + i].state == AT_WARP;
            if (at_warp == 0) continue;
            for (int i = 0; i < WARP; i++) {
                Thread& t = threads[w + i];
                if (at_warp < WARP || strcmp(t.where, threads[w].where)) {
                    snprintf(error, sizeof error, "warp %d: not all lanes meet; lane 0 is at %s, lane %d at %s", w / WARP,
                             threads[w].where, i, t.where);
                    if (t.state != AT_WARP || strcmp(t.where, threads[w].where)) return false;
                }
            }
            if (at_warp < WARP) return false;
            for (int i = 0; i < WARP; i++) threads[w + i].state = READY;
            turn -= WARP;  // the same warp again
        }
        for (Thread& t : threads) {  // each is now at a barrier, or done
            if (t.state != threads[0].state || strcmp(t.where, threads[0].where)) {
                snprintf(error, sizeof error, "not all threads meet at a barrier; thread 0 is at %s, thread %u at %s",
                         threads[0].where, t.index.x, t.where);
                return false;
            }
        }
        if (threads[0].state == AT_BLOCK) {
            progress = 1;
            for (Thread& t : threads) t.state = READY;
        }
    }
    return true;
}

static const char* launch(void (*kernel)(void**), dim3 grid, dim3 block, void** args, void* given, size_t num_given,
                          bool reverse) {
    body = kernel;
    tensors = (Tensor*)given;
    num_tensors = num_given;
    arguments = args;
    grid_dim = grid;
    block_dim = block;
    if (block.y != 1 || block.z != 1 || block.x == 0 || block.x % WARP || block.x > 1024
        || !grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        return "this launch is not one that cuda_on_cpu.h (or CUDA) can do";
    threads.resize(block.x);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
#ifdef __ELF__
                if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
#endif
                for (unsigned i = 0; i < block.x; i++) {
                    Thread& t = threads[i];
                    t.index = {i, 0, 0};
                    t.state = READY;
                    t.turn = 0;
                    t.copies.clear();
                    t.where = "its start or end";
                    t.started = false;
                    t.stack.resize(STACK);
                }
                if (!run_block(reverse)) return error;
            }
    return nullptr;
}

// All lanes of a warp meet, each brings a value and sees those of the others: lane(i) is what lane i brought.
template <class V>
struct Meeting {
    Thread* warp;
    unsigned parity;
    V lane(int i) const { V v; memcpy(&v, warp[i].slot[parity], sizeof v); return v; }
};
template <class V>
static Meeting<V> meet(const char* name, const V& mine, unsigned mask = ~0u) {
    if (mask != ~0u) fail("%s: only masks of all lanes are possible here", name);
    static_assert(sizeof(V) <= SLOT, "a lane brings at most SLOT bytes");
    Thread* t = current;
    unsigned parity = t->turn++ % 2;
    memcpy(t->slot[parity], &mine, sizeof mine);
    wait(AT_WARP, name);
    return {&threads[t->index.x / WARP * WARP], parity};
}

static int lane_id() { return current->index.x % WARP; }

template <class V>
static Tensor& accessed(const V* p) {
    Tensor* t = tensors;
    while (t < tensors + num_tensors && ((const char*)p < t->begin || (const char*)(p + 1) > t->end)) t++;
    if (t == tensors + num_tensors) fail("a vector access outside of the tensors");
    if (uintptr_t(p) % alignof(V)) fail("a vector access is not aligned to %zu bytes", alignof(V));
    return *t;
}
template <class V> static void check_access(const V* p) { accessed(p).read += sizeof(V); }
template <class V> static void check_shared(const V* p) {
#ifdef __ELF__
    if ((const char*)p < __start_cuda_shared || (const char*)(p + 1) > __stop_cuda_shared) fail("outside of shared memory");
#endif
    if (uintptr_t(p) % alignof(V)) fail("a place in shared memory is not aligned to %zu bytes", alignof(V));
}
template <class V> static void check_access(V* p) { accessed(p).written += sizeof(V); }  // who may write, is about to

// A kernel of any signature, called through an array of pointers to its arguments.
template <class... A, size_t... I>
static void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)args[I]...);
}
template <class... A>
static void apply(void (*kernel)(A...), void** args) { apply(kernel, args, std::index_sequence_for<A...>()); }

}  // namespace cuda

#define threadIdx (cuda::current->index)
#define blockIdx cuda::block_index
#define blockDim cuda::block_dim
#define gridDim cuda::grid_dim

// Where threads meet is known by name and line: two shuffles in two branches are two places.
#define CUDA_TEXT(x) #x
#define CUDA_LINE(x) CUDA_TEXT(x)
#define CUDA_HERE(name) #name ", line " CUDA_LINE(__LINE__)
#define __syncthreads() cuda::wait(cuda::AT_BLOCK, CUDA_HERE(__syncthreads))
#define __syncwarp() cuda::meet(CUDA_HERE(__syncwarp), 0)
#define __shfl_sync(...) cuda::shuffle(CUDA_HERE(__shfl_sync), __VA_ARGS__)
#define __shfl_xor_sync(...) cuda::shuffle_xor(CUDA_HERE(__shfl_xor_sync), __VA_ARGS__)
#define __shfl_up_sync(...) cuda::shuffle_up(CUDA_HERE(__shfl_up_sync), __VA_ARGS__)
#define __ballot_sync(...) cuda::ballot(CUDA_HERE(__ballot_sync), __VA_ARGS__)

namespace cuda {
template <class V> static V shuffle(const char* here, unsigned mask, V v, int lane) {
    return meet(here, v, mask).lane(lane & 31);
}
template <class V> static V shuffle_xor(const char* here, unsigned mask, V v, int bits) {
    return meet(here, v, mask).lane((lane_id() ^ bits) & 31);
}
template <class V> static V shuffle_up(const char* here, unsigned mask, V v, int delta) {
    auto all = meet(here, v, mask);
    return all.lane(lane_id() < delta ? lane_id() : lane_id() - delta);
}
static inline unsigned ballot(const char* here, unsigned mask, bool v) {
    auto all = meet(here, v, mask);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= unsigned(all.lane(i)) << i;
    return bits;
}
}  // namespace cuda

template <class V> static V atomicAdd(V* p, V v) { V old = *p; *p = old + v; return old; }  // nobody else runs meanwhile

static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline int __clz(unsigned u) { return u ? __builtin_clz(u) : 32; }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
using std::max;
using std::min;

// ---- What kernels.py's prelude does in PTX on a GPU: conversions, copies, and the instructions for matrices.

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
static inline float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
static inline void put(bf16* p, float f) {  // to nearest, ties to even; NaN stays NaN
    unsigned u = __float_as_uint(f);
    p->bits = f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline float to_float(fp16 x) {
    int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float f = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent ? __uint_as_float(unsigned(exponent + 112) << 23 | fraction << 13) : std::ldexp(float(fraction), -24);
    return x.bits >> 15 ? -f : f;
}
static inline void put(fp16* p, float f) {
    unsigned short sign = __float_as_uint(f) >> 31 << 15;
    f = std::fabs(f);
    int exponent = std::max(std::ilogb(std::max(f, 1e-30f)), -14);
    int fraction = f < 65520 ? int(std::nearbyint(std::ldexp(f, 10 - exponent))) : 0;  // 1024 .. 2048, below that subnormal
    p->bits = f != f ? 0x7fff : f >= 65520 ? sign | 0x7c00 : sign | (((exponent + 14) << 10) + fraction);
}
template <class E> unsigned make_pair(E, float x, float y) {
    E pair[2];
    put(&pair[0], x), put(&pair[1], y);
    return pair[0].bits | unsigned(pair[1].bits) << 16;
}
template <class E> float half_of(unsigned pair, int i) { return to_float(E{(unsigned short)(pair >> 16 * i)}); }
template <class E> unsigned fma2(E, unsigned a, unsigned b, unsigned c) {
    auto one = [&](int i) { return float(double(half_of<E>(a, i)) * half_of<E>(b, i) + half_of<E>(c, i)); };
    return make_pair(E(), one(0), one(1));
}
static inline float power_of_2(float x) { return std::exp2(x); }

#define DYNAMIC_SHARED(NAME) alignas(16) __shared__ char NAME[SHARED]
struct alignas(16) Chunk { unsigned words[4]; };
template <int BYTES = 16> static inline void copy_async(void* to, const void* from) {
    struct alignas(BYTES) Piece { char bytes[BYTES]; };
    cuda::check_shared((Piece*)to);
    cuda::check_access((const Piece*)from);
    memset(to, 0xff, BYTES);
    cuda::current->copies.push_back({to, from, BYTES});
}
static inline void wait_for_copies() {
    for (auto [to, from, bytes] : cuda::current->copies) memcpy(to, from, bytes);
    cuda::current->copies.clear();
}
static inline cuda::Meeting<Chunk> meet_with_row(const char* name, const void* row) {
    cuda::check_shared((const Chunk*)row);
    Chunk mine;
    memcpy(&mine, row, sizeof mine);
    return cuda::meet(name, mine);
}
static inline void load_matrices(unsigned (&x)[4], const void* row) {
    auto all = meet_with_row("ldmatrix", row);
    for (int m = 0; m < 4; m++) x[m] = all.lane(8 * m + cuda::lane_id() / 4).words[cuda::lane_id() % 4];
}
static inline void load_transposed(unsigned (&x)[4], const void* row) {
    auto all = meet_with_row("ldmatrix, transposed", row);
    int column = cuda::lane_id() / 4, first = cuda::lane_id() % 4 * 2;
    auto entry = [&](int row) { return all.lane(row).words[column / 2] >> 16 * (column % 2) & 0xffff; };
    for (int m = 0; m < 4; m++) x[m] = entry(8 * m + first) | entry(8 * m + first + 1) << 16;
}
template <class E> void mma(E, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct Both { unsigned a[4], b[2]; } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    auto all = cuda::meet("mma", mine);
    int g = cuda::lane_id() / 4, c = cuda::lane_id() % 4;
    for (int i = 0; i < 4; i++) {
        int upper = i / 2, n = 2 * c + i % 2;  // this is entry (g + 8 upper, n)
        float sum = 0;
        for (int lane = 0; lane < 4; lane++) {
            Both row = all.lane(4 * g + lane), column = all.lane(4 * n + lane);
            for (int k = 0; k < 4; k++)
                sum += half_of<E>(row.a[upper + k / 2 * 2], k % 2) * half_of<E>(column.b[k / 2], k % 2);
        }
        d[i] += sum;
    }
}
static inline unsigned and_xor(unsigned a, unsigned b, unsigned c) { return (a & b) ^ c; }
static inline unsigned transpose(unsigned pair) {
    auto all = cuda::meet("movmatrix", pair);
    int row = cuda::lane_id() / 4, column = cuda::lane_id() % 4 * 2;  // of the result
    auto entry = [&](int r, int c) { return all.lane(4 * r + c / 2) >> 16 * (c % 2) & 0xffff; };
    return entry(column, row) | entry(column + 1, row) << 16;
}
