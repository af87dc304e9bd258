// Host twins of what sm_90 adds to port.cuh: TMA, mbarriers, proxy fences, wgmma, barriers of some warps, register budgets. Part of host_cuda.h.
//
// TMA arrives as late as possible (when no thread can move), in random orders at any time before. wgmma reads and computes when a warpgroup waits
// for it; until then its accumulators are NaN. Loads and stores of shared memory go through port.cuh, so that for each byte is known who wrote it
// and whether a fence has made it visible to the asynchronous proxy, through which TMA and wgmma see memory. Found here:
//   reads, by loads or wgmma, of bytes that TMA has not delivered yet
//   bytes written by stores that TMA or wgmma meets although the writer has executed no proxy fence since; stores that port.cuh didn't see
//   operands that change between wgmma and the wait for it
//   mbarriers without initialisation, with more arrivals or bytes than expected; waits for a phase that never ends (threads wait forever)
//   descriptors with another swizzle, stride or alignment, outside of shared memory, or different among the threads of a warpgroup
//   wgmma without wgmma.fence, with accumulators of two shapes in flight, or never waited for; transfers that outlive the block
#pragma once

namespace host_cuda {

constexpr uint32_t kSharedBase = 1024;  // address of the first byte in the shared window, as on sm_90: an address is not an offset

struct Mbarrier {
  int expected = 0, pending = 0;
  long bytes = 0;  // of transfers, still to come in this phase
  unsigned phase = 0;
};

struct Transfer {
  char* to;
  std::vector<const void*> rows;  // of 128 bytes; null: zeros
  Mbarrier* barrier;
};

struct GroupProduct {  // one wgmma of one thread
  int line, n;
  uint64_t a_descriptor, b_descriptor;
  uint32_t a[4];
  float* d;
  bool a_in_registers, a_transposed, b_transposed, accumulate;
  long number;
  bool same_as(const GroupProduct& x) const {
    return line == x.line && n == x.n && b_descriptor == x.b_descriptor && a_in_registers == x.a_in_registers &&
           (a_in_registers || a_descriptor == x.a_descriptor) && a_transposed == x.a_transposed && b_transposed == x.b_transposed &&
           accumulate == x.accumulate;
  }
};

struct InFlight {  // an accumulator of a thread
  std::vector<float> values;
  int products;
};

struct AsyncThread {
  std::vector<std::pair<size_t, size_t>> unfenced;  // ranges of shared memory written since the last proxy fence
  std::deque<std::vector<GroupProduct>> groups;
  std::vector<GroupProduct> open;
  std::map<float*, InFlight> sums;
  long issued = 0;
  bool fenced = false;
  const void* waits_for = nullptr;
};

struct Issued {  // one wgmma of a warpgroup
  GroupProduct first;
  std::vector<uint16_t> a, b;  // operands in shared memory when it was issued
};

struct AsyncBlock {
  std::vector<AsyncThread> threads;
  std::vector<uint16_t> writer;    // of each byte: 1 + the thread that stored it without a fence since, or 0
  std::vector<char> arriving;      // whether TMA still has to deliver a byte
  std::vector<char> known;         // what port.cuh's stores and TMA have written
  std::map<const void*, Mbarrier> barriers;
  std::vector<Transfer> transfers;
  std::map<int, std::vector<Thread*>> meeting;   // barriers of some warps: who waits there
  std::map<std::pair<int, long>, Issued> issued;  // by warpgroup and number
};

inline void begin_async(Block& block) {
  block.async = new AsyncBlock;
  block.async->threads.resize(block.threads.size());
  block.async->writer.assign(block.shared_bytes, 0);
  block.async->arriving.assign(block.shared_bytes, 0);
  block.async->known.assign(block.shared_bytes, char(0xff));
}
inline void end_async(Block& block) {
  if (block.fault.empty() && !block.async->transfers.empty()) block.fail(block.threads[0], "has ended, with its block, before TMA has delivered everything");
  delete block.async;
  block.async = nullptr;
}

inline AsyncBlock& async_now() { return *block_now->async; }
inline AsyncThread& async_thread() { return async_now().threads[thread_now->index.x]; }
[[noreturn]] inline void mistake(const std::string& message) {
  block_now->fail(*thread_now, message);
  block_now->leave();
  std::abort();  // a faulty block's threads never continue
}
inline std::string at_line(int line) { return " (line " + std::to_string(line) + ")"; }

inline void Block::end_of_thread(Thread& thread) {
  if (!async) return;
  const AsyncThread& t = async->threads[thread.index.x];
  if (!t.groups.empty() || !t.open.empty()) fail(thread, "ends with a wgmma that it never waited for");
}

// Where `at` lies in shared memory; false for other memory.
inline bool in_shared(const void* at, size_t bytes, size_t& offset) {
  const char *const begin = block_now->shared.get(), *const p = static_cast<const char*>(at);
  if (p < begin || p >= begin + block_now->shared_bytes) return false;
  offset = size_t(p - begin);
  if (offset + bytes > block_now->shared_bytes) mistake("accesses memory beyond its shared memory");
  return true;
}

inline void note_load(const void* from, size_t bytes) {
  size_t offset = 0;
  if (!block_now->async || !in_shared(from, bytes, offset)) return;
  for (size_t i = 0; i < bytes; i++)
    if (async_now().arriving[offset + i]) mistake("loads shared memory that TMA has not delivered yet");
}
inline void note_store(const void* to, size_t bytes) {  // after the store
  size_t offset = 0;
  if (!block_now->async || !in_shared(to, bytes, offset)) return;
  AsyncBlock& block = async_now();
  for (size_t i = offset; i < offset + bytes; i++) {
    if (block.arriving[i]) mistake("stores to shared memory that TMA is about to fill");
    block.writer[i] = uint16_t(thread_now->index.x + 1);
    block.known[i] = block_now->shared.get()[i];
  }
  auto& ranges = async_thread().unfenced;
  if (!ranges.empty() && ranges.back().second == offset)
    ranges.back().second = offset + bytes;
  else
    ranges.push_back({offset, offset + bytes});
}
inline void fence_async_proxy() {
  AsyncThread& t = async_thread();
  for (const auto& [first, end] : t.unfenced)
    for (size_t i = first; i < end; i++)
      if (async_now().writer[i] == thread_now->index.x + 1) async_now().writer[i] = 0;
  t.unfenced.clear();
}
// What the asynchronous proxy may read or overwrite.
inline void check_proxy(size_t offset, size_t bytes, const std::string& what) {
  const AsyncBlock& block = async_now();
  for (size_t i = offset; i < offset + bytes; i++) {
    if (block.arriving[i]) mistake(what + " meets shared memory that TMA has not delivered yet");
    if (block.writer[i])
      mistake(what + " meets bytes of shared memory (at " + std::to_string(i) + ") that " + Block::name(block_now->threads[block.writer[i] - 1u]) +
              " has stored without a proxy fence since");
    if (block.known[i] != block_now->shared.get()[i]) mistake(what + " meets bytes of shared memory that no store of port.cuh wrote");
  }
}

// --- mbarriers and barriers of some warps ---------------------------------------------------------------------------------

inline void wake(const void* barrier) {
  for (Thread& t : block_now->threads)
    if (t.wait == kAtBarrier && block_now->async->threads[t.index.x].waits_for == barrier) t.wait = kReady;
}
inline void wait_at(const void* barrier, const char* what, int line) {
  async_thread().waits_for = barrier;
  thread_now->what = what, thread_now->line = line, thread_now->wait = kAtBarrier;
  block_now->leave();
}
inline Mbarrier& mbarrier(const void* at) {
  const auto found = async_now().barriers.find(at);
  if (found == async_now().barriers.end()) mistake("uses an mbarrier that has not been initialised");
  return found->second;
}
inline void end_phase_if_complete(const void* at, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.expected, b.phase++;
  wake(at);
}
inline void mbarrier_init(void* at, int count) {
  size_t offset = 0;
  if (!in_shared(at, 8, offset) || offset % 8) mistake("initialises an mbarrier that is not 8 aligned bytes of shared memory");
  async_now().barriers[at] = {count, count, 0, 0};
  note_store(at, 8);
}
inline void mbarrier_arrive(const void* at, long bytes) {
  Mbarrier& b = mbarrier(at);
  if (b.pending == 0) mistake("arrives at an mbarrier at which all have arrived");
  b.bytes += bytes, b.pending--;
  end_phase_if_complete(at, b);
}
inline void mbarrier_wait(const void* at, unsigned parity, int line) {
  while ((mbarrier(at).phase & 1) == parity) wait_at(at, "an mbarrier", line);
}
inline void group_barrier(int number, int threads, int line) {
  if (number < 1 || number > 15 || threads % kWarp) mistake("meets a barrier of some warps with a wrong number or count");
  auto& waiting = async_now().meeting[number];
  waiting.push_back(thread_now);
  if (int(waiting.size()) < threads) return wait_at(&waiting, "a barrier of some warps", line);
  waiting.clear();
  counts().block_barriers++;
  wake(&waiting);
}

// --- TMA: a tile of rows of 128 bytes, its pieces of 16 bytes permuted by the row ------------------------------------------

inline void tma_load(void* to, std::vector<const void*> rows, const void* barrier) {
  size_t offset = 0, at_barrier = 0;
  const size_t bytes = rows.size() * 128;
  if (!in_shared(to, bytes, offset) || offset % 1024) mistake("loads a tile by TMA to an address that is not a multiple of 1024");
  check_proxy(offset, bytes, "TMA");
  Mbarrier& b = mbarrier(barrier);
  in_shared(barrier, 8, at_barrier);
  if (async_now().writer[at_barrier]) mistake("names an mbarrier to TMA whose initialisation no proxy fence has followed");
  std::memset(to, 0xff, bytes);
  for (size_t i = 0; i < bytes; i++) async_now().arriving[offset + i] = 1;
  async_now().transfers.push_back({static_cast<char*>(to), std::move(rows), &b});
}
inline bool Block::transfer(bool in_any_order, unsigned roll) {
  auto& transfers = async->transfers;
  if (transfers.empty()) return false;
  const size_t pick = in_any_order ? roll % transfers.size() : 0;
  const Transfer t = transfers[pick];
  transfers.erase(transfers.begin() + long(pick));
  const size_t offset = size_t(t.to - shared.get()), bytes = t.rows.size() * 128;
  for (size_t row = 0; row < t.rows.size(); row++)
    for (size_t piece = 0; piece < 8; piece++) {
      char* const to = t.to + row * 128 + (piece ^ row % 8) * 16;
      if (t.rows[row])
        std::memcpy(to, static_cast<const char*>(t.rows[row]) + piece * 16, 16);
      else
        std::memset(to, 0, 16);
    }
  for (size_t i = offset; i < offset + bytes; i++) async->arriving[i] = 0, async->known[i] = shared.get()[i];
  t.barrier->bytes -= long(bytes);
  for (const auto& [at, b] : async->barriers)
    if (&b == t.barrier) {
      if (b.bytes < 0) fail(threads[0], "waits for TMA on an mbarrier that expects fewer bytes than arrive");
      end_phase_if_complete(at, *t.barrier);
    }
  return true;
}

// --- wgmma -----------------------------------------------------------------------------------------------------------------

// The offsets in shared memory of an operand's elements: `rows` of M or N, 16 of K, bf16.
inline std::vector<size_t> operand_offsets(uint64_t descriptor, bool transposed, int rows, int line) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const std::string what = "gives wgmma" + at_line(line) + " a descriptor ";
  if (descriptor >> 62 != 1) mistake(what + "without the 128-byte swizzle");
  if (descriptor >> 49 & 7 || (start >> 7 & 7)) mistake(what + "of a matrix that doesn't begin with the first of eight rows");
  if (stride != 1024) mistake(what + "with a stride of " + std::to_string(stride) + " bytes, expected 1024");
  if (transposed && rows != 64) mistake(what + "of a transposed matrix with other than 64 rows: sm_90's behaviour is not known");
  if ((start & 127) + (transposed ? 128 : 32) > 128) mistake(what + "of rows that leave their 128 bytes");
  std::vector<size_t> offsets;
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < 16; k++) {
      const int strided = transposed ? k : row, inner = transposed ? row : k;
      uint32_t address = start + uint32_t(strided / 8) * stride + uint32_t(strided % 8) * 128 + uint32_t(inner) * 2;
      address ^= (address >> 7 & 7) << 4;
      if (address < kSharedBase || address + 2 > kSharedBase + block_now->shared_bytes) mistake(what + "outside of the shared memory");
      offsets.push_back(address - kSharedBase);
    }
  return offsets;
}
inline std::vector<uint16_t> read_operand(const std::vector<size_t>& offsets) {
  std::vector<uint16_t> values(offsets.size());
  for (size_t i = 0; i < offsets.size(); i++) std::memcpy(&values[i], block_now->shared.get() + offsets[i], 2);
  return values;
}

inline void group_product(GroupProduct it) {
  AsyncThread& t = async_thread();
  if (!t.fenced) mistake("issues wgmma" + at_line(it.line) + " without wgmma.fence after its registers were in use");
  it.number = t.issued++;
  for (const auto& [d, sums] : t.sums)
    if (d != it.d ? d < it.d + it.n / 2 && it.d < d + sums.values.size() : int(sums.values.size()) != it.n / 2)
      mistake("issues wgmma" + at_line(it.line) + " on accumulators that another shape has in flight");
  if (!t.sums.count(it.d)) {
    t.sums[it.d] = {std::vector<float>(it.d, it.d + it.n / 2), 0};
    for (int i = 0; i < it.n / 2; i++) it.d[i] = std::nanf("");
  }
  t.sums[it.d].products++;
  const std::pair<int, long> key{int(thread_now->index.x) / kGroup, it.number};
  const auto [found, is_first] = async_now().issued.insert({key, Issued{it, {}, {}}});
  Issued& issued = found->second;
  if (!it.same_as(issued.first))
    mistake("issues wgmma" + at_line(it.line) + " with other operands than another thread of its warpgroup" + at_line(issued.first.line));
  (void)is_first;
  if (thread_now->lane == 0) {
    const std::string what = "wgmma" + at_line(it.line);
    const auto take = [&](uint64_t descriptor, bool transposed, int rows, std::vector<uint16_t>& to) {
      const auto offsets = operand_offsets(descriptor, transposed, rows, it.line);
      for (const size_t offset : offsets) check_proxy(offset, 2, what);
      if (to.empty()) to = read_operand(offsets);
    };
    if (!it.a_in_registers) take(it.a_descriptor, it.a_transposed, 64, issued.a);
    take(it.b_descriptor, it.b_transposed, it.n, issued.b);
  }
  t.open.push_back(it);
}
inline void group_fence() { async_thread().fenced = true; }
inline void group_commit() {
  AsyncThread& t = async_thread();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

inline float bf16_value(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// The product of one wgmma, given the 128 threads' own records of it.
inline void execute(GroupProduct* const (&its)[kGroup], AsyncThread* const (&threads)[kGroup]) {
  const GroupProduct& it = *its[0];
  const std::pair<int, long> key{int(thread_now->index.x) / kGroup, it.number};
  const Issued& issued = async_now().issued.at(key);
  const auto load = [&](uint64_t descriptor, bool transposed, int rows, const std::vector<uint16_t>& before) {
    const auto now = read_operand(operand_offsets(descriptor, transposed, rows, it.line));
    if (now != before) mistake("waits for wgmma" + at_line(it.line) + ", whose operands in shared memory have changed since it was issued");
    std::vector<float> values(now.size());
    for (size_t i = 0; i < now.size(); i++) values[i] = bf16_value(now[i]);
    return values;
  };
  std::vector<float> a(64 * 16), b = load(it.b_descriptor, it.b_transposed, it.n, issued.b);
  if (it.a_in_registers) {
    for (int thread = 0; thread < kGroup; thread++)
      for (int part = 0; part < 4; part++) {
        const int lane = thread % kWarp, row = thread / kWarp * 16 + lane / 4 + 8 * (part % 2), k = lane % 4 * 2 + 8 * (part / 2);
        a[row * 16 + k] = bf16_value(its[thread]->a[part] & 0xffffu), a[row * 16 + k + 1] = bf16_value(its[thread]->a[part] >> 16);
      }
  } else {
    a = load(it.a_descriptor, it.a_transposed, 64, issued.a);
  }
  for (int thread = 0; thread < kGroup; thread++) {
    const int lane = thread % kWarp;
    InFlight& sums = threads[thread]->sums.at(its[thread]->d);
    for (int i = 0; i < it.n / 2; i++) {
      const int row = thread / kWarp * 16 + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; k++) sum += a[row * 16 + k] * b[column * 16 + k];
      sums.values[i] = it.accumulate ? sums.values[i] + sum : sum;
    }
    if (--sums.products == 0) {
      std::memcpy(its[thread]->d, sums.values.data(), sums.values.size() * 4);
      threads[thread]->sums.erase(its[thread]->d);
    }
  }
  async_now().issued.erase(key);
  counts().group_products++;
}
inline void group_wait(size_t left, int line) {
  AsyncThread* self = &async_thread();
  collective<kGroup>("wgmma's wait", line, self, [left](AsyncThread*** lanes) {
    AsyncThread* threads[kGroup];
    for (int i = 0; i < kGroup; i++) threads[i] = *lanes[i];
    while (threads[0]->groups.size() > left) {
      for (size_t number = 0; number < threads[0]->groups.front().size(); number++) {
        GroupProduct* its[kGroup];
        for (int i = 0; i < kGroup; i++) {
          if (threads[i]->groups.empty() || number >= threads[i]->groups.front().size())
            mistake("waits for wgmma that not all threads of its warpgroup have issued");
          its[i] = &threads[i]->groups.front()[number];
        }
        execute(its, threads);
      }
      for (AsyncThread* t : threads) t->groups.pop_front();
    }
    for (AsyncThread* t : threads) t->fenced = false;
  });
}

inline void set_registers(int count, int line) {
  if (count % 8 || count < 24 || count > 256) mistake("asks for " + std::to_string(count) + " registers: expected a multiple of 8 from 24 to 256");
  int nothing = 0;
  collective<kGroup>("setmaxnreg", line, nothing, [](int**) {});
}

}  // namespace host_cuda
