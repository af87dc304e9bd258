// Runs a CUDA grid on a CPU: what cuda/port.cuh includes when the compiler is not nvcc.
//
// One OS thread executes one block at a time. A block's threads are fibers: each runs until it meets a barrier, a warp
// collective or its end, then the scheduler picks the next one in the order that the test asked for (forward, reverse,
// random, one warp as far as it can go before any other moves, or warpgroups of 128 threads that take turns at random). A kernel without races
// gives the same bits in every order. The lane that arrives last at a collective computes it for the whole warp.
//
// Found here: threads that wait for each other forever, lanes that meet in different collectives, reads of memory that
// no thread wrote (shared memory starts as NaN; so does the target of an asynchronous copy until it has been waited for),
// misaligned vector accesses and, in a build with AddressSanitizer, accesses outside of any buffer.
// Of launches with launch_warpgroups also what host_warpgroups.h lists: mistakes with TMA, mbarriers, proxy fences and wgmma.
// Not seen here: bank conflicts, coalescing, occupancy, errors of the fast mathematical functions.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace host_cuda {

constexpr int kWarp = 32;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr size_t kStackBytes = 256 * 1024;

// kAhead: the warp `seed` from the end; kGroupAhead: the warpgroup `seed`; kGroups: warpgroups take turns at random.
enum Order { kForward = 0, kReverse = 1, kRandom = 2, kAhead = 3, kGroups = 4, kGroupAhead = 5 };

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a launch did, summed over its blocks: pinned by tests, so that a change that costs more is seen.
struct Counts {
  std::atomic<long> block_barriers{0};  // per block, not per thread
  std::atomic<long> warp_barriers{0};   // per warp; a shuffle or a matrix instruction is not a barrier
  std::atomic<long> shuffles{0};
  std::atomic<long> matrix_loads{0};
  std::atomic<long> matrix_products{0};
  std::atomic<long> group_products{0};  // wgmma instructions, of a warpgroup
  void clear() { block_barriers = warp_barriers = shuffles = matrix_loads = matrix_products = group_products = 0; }
};
inline Counts& counts() {
  static Counts all;
  return all;
}

struct Settings {
  int order = kForward;
  unsigned seed = 0;
};
inline Settings& settings() {
  static Settings chosen;
  return chosen;
}
inline std::string& last_fault() {
  static std::string message;
  return message;
}

// --- Fibers: a stack and a saved stack pointer -----------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack and goes on where `to` was left.
extern "C" void host_cuda_switch(void** from, void* to);
__asm__(R"(
  .weak host_cuda_switch
  .type host_cuda_switch,@function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size host_cuda_switch,.-host_cuda_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void make(char* stack, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(15);
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // the entry's return address, never used; keeps the stack aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--slot = nullptr;
    stack_pointer = slot;
  }
  static void go(Context& from, Context& to) { host_cuda_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t saved;
  void make(char* stack, void (*entry)()) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = kStackBytes;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
};
#endif

class Stacks {  // of one OS thread, kept between launches; a guard page below each stops a stack that grew too large
 public:
  char* at(size_t i) {
    while (stacks_.size() <= i) {
      auto* base = static_cast<char*>(mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (base == MAP_FAILED) throw Fault("no memory for the stack of a thread");
      mprotect(base, kGuard, PROT_NONE);
      stacks_.push_back(base + kGuard);
    }
    return stacks_[i];
  }
  ~Stacks() {
    for (char* stack : stacks_) munmap(stack - kGuard, kStackBytes + kGuard);
  }

 private:
  static constexpr size_t kGuard = 4096;
  std::vector<char*> stacks_;
};

// --- Threads, warps, blocks ------------------------------------------------------------------------------------------

enum Wait { kReady, kAtCollective, kAtBlockBarrier, kAtBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int size, bytes;  // of `size` bytes the first `bytes` are copied, the others become zeros
};

struct Thread {
  Context context;
  void* asan_stack = nullptr;
  Dim3 index;
  int warp = 0, lane = 0;
  Wait wait = kReady;
  const char* what = "";
  int line = 0;
  int meets = 0;                           // how many lanes the collective that it waits in has
  void* arguments = nullptr;               // of the collective that it waits in
  std::vector<std::vector<Copy>> copies;   // committed groups of asynchronous copies, oldest first
  std::vector<Copy> uncommitted;
};

struct Block;
inline thread_local Block* block_now = nullptr;
inline thread_local Thread* thread_now = nullptr;

struct Block {
  Dim3 grid, size, index;
  std::vector<Thread> threads;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* kernel = nullptr;
  Context scheduler;
  void* scheduler_asan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string fault;
  struct AsyncBlock* async = nullptr;  // of a launch with launch_warpgroups: host_warpgroups.h

  static void entry() {
    Block* block = block_now;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
    block->body(block->kernel);
    Thread* thread = thread_now;
    if (!thread->copies.empty() || !thread->uncommitted.empty())
      block->fail(*thread, "ends with an asynchronous copy that it never waited for");
    block->end_of_thread(*thread);
    thread->wait = kDone;
    block->leave(true);
  }

  // From a thread back to the scheduler.
  void leave(bool for_good = false) {
    Thread* thread = thread_now;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &thread->asan_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    (void)for_good;
    Context::go(thread->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(thread->asan_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

  void enter(Thread& thread, char* stack) {
    thread_now = &thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_asan, stack, kStackBytes);
#endif
    (void)stack;
    Context::go(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
#endif
  }

  static std::string name(const Thread& t) { return "warp " + std::to_string(t.warp) + " lane " + std::to_string(t.lane); }

  void fail(const Thread& t, const std::string& message) {
    if (!fault.empty()) return;
    fault = "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ") " + name(t) + " " + message;
  }

  void end_of_thread(Thread& thread);
  bool transfer(bool in_any_order, unsigned roll);  // completes one transfer of TMA; false when there is none

  void run(Stacks& stacks) {
    for (size_t i = 0; i < threads.size(); i++) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stacks.at(i), kStackBytes);  // of frames that a fault abandoned there earlier
#endif
      threads[i].context.make(stacks.at(i), &Block::entry);
    }
    const int n = static_cast<int>(threads.size());
    std::mt19937 dice(settings().seed * 7919u + index.x * 104729u + index.y);
    const int order = settings().order;
    std::vector<int> ready;
    while (fault.empty()) {
      ready.clear();
      for (int i = 0; i < n; i++) {
        const int at = order == kReverse ? n - 1 - i : i;
        if (threads[at].wait == kReady) ready.push_back(at);
      }
      // TMA is as late as it can be: it moves when no thread can. In random orders now and then before.
      const bool random = order == kRandom || order == kGroups;
      if (async && random && dice() % 16 == 0 && transfer(true, dice())) continue;  // others may be ready now
      if (ready.empty()) {
        bool ended = true;
        for (const Thread& t : threads) ended &= t.wait == kDone;
        if (async && !ended && transfer(random, random ? dice() : 0)) continue;
        break;
      }
      // In random order a thread may run far ahead of the others: pick one, not a permutation of all.
      if (order == kRandom) {
        for (int left = static_cast<int>(ready.size()); left > 0 && fault.empty(); left--) {
          const int pick = static_cast<int>(dice() % ready.size());
          Thread& t = threads[ready[pick]];
          enter(t, stacks.at(ready[pick]));
          if (t.wait != kReady) {
            ready[pick] = ready.back();
            ready.pop_back();
          }
          if (ready.empty() || dice() % 64 == 0) break;  // now and then see who else has become ready
        }
      } else if (order == kAhead) {
        // While a lane of it is ready, only its lanes run: it ends, or waits in a block barrier for the others, which
        // have not begun. Then the others do the same, one after another.
        const int warps = n / kWarp, ahead = warps - 1 - static_cast<int>(settings().seed) % warps;
        int warp = threads[ready.front()].warp;
        for (int at : ready)
          if (threads[at].warp == ahead) warp = ahead;
        for (int at : ready) {
          if (!fault.empty()) break;
          if (threads[at].warp == warp) enter(threads[at], stacks.at(at));
        }
      } else {
        int only = -1;  // the warpgroup whose lanes run now
        if (order == kGroups) only = ready[dice() % ready.size()] / kGroup;
        if (order == kGroupAhead) {
          only = threads[ready.front()].warp * kWarp / kGroup;
          for (int at : ready)
            if (at / kGroup == static_cast<int>(settings().seed)) only = at / kGroup;
        }
        for (int at : ready) {
          if (!fault.empty()) break;
          if (only < 0 || at / kGroup == only) enter(threads[at], stacks.at(at));
        }
      }
    }
    if (!fault.empty()) return;
    for (Thread& t : threads)
      if (t.wait != kDone) {
        std::string others;
        for (Thread& u : threads)
          if (others.empty() && (u.wait == kDone || u.what != t.what || u.line != t.line))
            others = "; " + name(u) + (u.wait == kDone ? " has ended" : std::string(" waits in ") + u.what + " (line " + std::to_string(u.line) + ")");
        fail(t, std::string("waits forever in ") + t.what + " (line " + std::to_string(t.line) + ")" + others);
        return;
      }
  }
};

inline void block_barrier(int line) {
  Block* block = block_now;
  Thread* self = thread_now;
  self->wait = kAtBlockBarrier;
  self->what = "a block barrier";
  self->line = line;
  size_t waiting = 0;
  for (Thread& t : block->threads) {
    if (t.wait != kAtBlockBarrier) continue;
    waiting++;
    if (t.line != line) {
      block->fail(*self, "meets the block barrier of line " + std::to_string(line) + " while others wait in that of line " + std::to_string(t.line));
      block->leave();
    }
  }
  if (waiting == block->threads.size()) {
    counts().block_barriers++;
    for (Thread& t : block->threads) t.wait = kReady;
  }
  block->leave();
}

// All 32 lanes meet; the last one computes, given every lane's arguments. With kLanes = 128: all of a warpgroup.
template <int kLanes = kWarp, class Arguments, class Compute>
void collective(const char* what, int line, Arguments& arguments, Compute compute) {
  Block* block = block_now;
  Thread* self = thread_now;
  self->what = what;
  self->line = line;
  self->meets = kLanes;
  self->arguments = &arguments;
  self->wait = kAtCollective;
  Thread* warp = &block->threads[self->warp * kWarp / kLanes * kLanes];
  Arguments* lanes[kLanes];
  for (int i = 0; i < kLanes; i++) {
    Thread& t = warp[i];
    const bool here = t.wait == kAtCollective && (t.meets == kLanes || t.warp == self->warp);  // others are in one of their own warp
    if (here && (t.what != what || t.line != line)) {
      block->fail(*self, std::string("is in ") + what + " (line " + std::to_string(line) + ") while lane " + std::to_string(i) + " is in " + t.what +
                             " (line " + std::to_string(t.line) + ")");
      block->leave();
    }
    lanes[i] = static_cast<Arguments*>(t.arguments);
  }
  for (int i = 0; i < kLanes; i++)
    if (warp[i].wait != kAtCollective || warp[i].meets != kLanes) return block->leave();  // a lane has not arrived yet
  compute(lanes);
  for (int i = 0; i < kLanes; i++) warp[i].wait = kReady;
  block->leave();  // lanes go on in the scheduler's order, not the last one first
}

void begin_async(Block& block);
void end_async(Block& block);

template <class Kernel>
int launch(Dim3 grid, Dim3 size, size_t shared_bytes, Kernel kernel, bool warpgroups = false) {
  last_fault().clear();
  if (warpgroups && size.x % kGroup) {
    last_fault() = "a block of " + std::to_string(size.x) + " threads: expected a multiple of 128";
    return 1;
  }
  if (size.x % kWarp || size.y != 1 || size.z != 1 || size.x == 0 || size.x > 1024) {
    last_fault() = "a block of " + std::to_string(size.x) + " threads: expected one dimension, a multiple of 32, at most 1024";
    return 1;
  }
  const long blocks = long(grid.x) * grid.y * grid.z;
  std::atomic<long> next{0};
  std::atomic<bool> stop{false};
  std::mutex guard;
  auto work = [&] {
    Stacks stacks;
    for (long at; !stop && (at = next++) < blocks;) {
      Block block;
      block.grid = grid;
      block.size = size;
      block.index = Dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
      block.threads.resize(size.x);
      for (unsigned i = 0; i < size.x; i++) {
        block.threads[i].index = Dim3(i, 0, 0);
        block.threads[i].warp = int(i) / kWarp;
        block.threads[i].lane = int(i) % kWarp;
      }
      block.shared_bytes = shared_bytes;
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, shared_bytes ? shared_bytes : 1)) std::abort();
      block.shared.reset(static_cast<char*>(memory));
      std::memset(memory, 0xff, shared_bytes);  // NaN in fp32, bf16 and fp16
      block.kernel = &kernel;
      block.body = [](void* k) { (*static_cast<Kernel*>(k))(); };
      block_now = &block;
      if (warpgroups) begin_async(block);
      block.run(stacks);
      if (warpgroups) end_async(block);
      block_now = nullptr;
      if (!block.fault.empty()) {
        std::lock_guard<std::mutex> hold(guard);
        if (!stop.exchange(true)) last_fault() = block.fault;
      }
    }
  };
  const unsigned cores = std::thread::hardware_concurrency();
  const long workers = std::min<long>(blocks, cores > 2 ? 2 : (cores ? cores : 1));
  std::vector<std::thread> team;
  for (long i = 1; i < workers; i++) team.emplace_back(work);
  work();
  for (std::thread& member : team) member.join();
  return stop ? 1 : 0;
}

// --- Asynchronous copies: nothing arrives before it is waited for ---------------------------------------------------------

inline void check_aligned(const void* at, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % bytes == 0) return;
  block_now->fail(*thread_now, std::string(what) + " at an address that is not a multiple of " + std::to_string(bytes));
  block_now->leave();
}

inline void copy_async(void* to, const void* from, int size, int bytes) {
  check_aligned(to, size, "copies asynchronously to shared memory");
  check_aligned(from, size, "copies asynchronously from memory");
  std::memset(to, 0xff, size);
  thread_now->uncommitted.push_back({to, from, size, bytes});
}
inline void copy_async_commit() {
  thread_now->copies.push_back(std::move(thread_now->uncommitted));
  thread_now->uncommitted.clear();
}
inline void copy_async_wait(size_t groups_left) {
  auto& copies = thread_now->copies;
  while (copies.size() > groups_left) {
    for (const Copy& c : copies.front()) {
      std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.size - c.bytes);
    }
    copies.erase(copies.begin());
  }
}

// A prefetch reads nothing, but one from outside of any buffer is a mistake that AddressSanitizer should see.
inline void touch(const void* from) { (void)*static_cast<const volatile char*>(from); }

// A check in a kernel failed: the block ends here.
inline void stop(const char* message) {
  block_now->fail(*thread_now, message);
  block_now->leave();
}

}  // namespace host_cuda

#include "host_warpgroups.h"

// --- CUDA's keywords -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (host_cuda::thread_now->index)
#define blockIdx (host_cuda::block_now->index)
#define blockDim (host_cuda::block_now->size)
#define gridDim (host_cuda::block_now->grid)

// What tests call: order of the lanes, the last fault's message, what the launches since the last call have done.
extern "C" {
__attribute__((weak, visibility("default"))) void host_cuda_order(int order, unsigned seed) { host_cuda::settings() = {order, seed}; }
__attribute__((weak, visibility("default"))) const char* host_cuda_last_fault() { return host_cuda::last_fault().c_str(); }
__attribute__((weak, visibility("default"))) void host_cuda_take_counts(long* six) {
  host_cuda::Counts& c = host_cuda::counts();
  const long all[6] = {c.block_barriers, c.warp_barriers, c.shuffles, c.matrix_loads, c.matrix_products, c.group_products};
  std::memcpy(six, all, sizeof all);
  c.clear();
}
}
