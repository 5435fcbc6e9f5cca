// A CPU allocator that counts. It wraps torch's own, so every tensor of every thread passes through it.
//
// The data pointer stays the context pointer, which raw_allocate and raw_deallocate (oneDNN) rely on;
// sizes are therefore kept in a table. One mutex guards table, counters and log together: their order
// is one order, so the peak and the log are exact with any number of threads. The pointer leaves the
// table before the memory is freed, because another thread may be given the same address at once.
//
// Large blocks that are freed are kept for the next of their size, as the allocator that a user trains
// with keeps them: mapping and unmapping each took half of a step's time. What is kept never makes the
// process larger than its live bytes once were, and all of it goes before an allocation fails.
#include <c10/core/CPUAllocator.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kAlign = 64;  // torch aligns CPU storages to 64 bytes
constexpr size_t kMapped = 65536;  // from here on malloc maps (MALLOC_MMAP_THRESHOLD_ of the child)

struct Event {
  int64_t delta_bytes, time_ns, thread;
};

struct Block {
  void* ptr;
  int64_t size;
};
using Blocks = std::list<Block>;

struct Counter {
  std::mutex mutex;
  Blocks kept;  // free, the oldest first
  std::unordered_map<int64_t, std::deque<Blocks::iterator>> kept_of;  // size -> the oldest first
  int64_t kept_bytes = 0, highest = 0, ceiling = 0;  // ceiling: live and kept bytes under a cap; 0: no cap
  std::unordered_map<void*, int64_t> sizes;
  std::vector<Event> log;
  int64_t live = 0, peak = 0, allocs = 0, frees = 0;
  bool logging = false, log_lost = false;
  int statm = -1;  // /proc/self/statm while the data segment is watched
  int64_t data_peak = 0;
};

// Never destroyed: storages may be freed while the process exits.
Counter& counter() {
  static Counter* c = new Counter;
  return *c;
}

int64_t thread_id() {
#ifdef __linux__
  static thread_local int64_t id = syscall(SYS_gettid);
  return id;
#else
  return 0;
#endif
}

int64_t now_ns() {
  auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// A free may not throw: a log that finds no memory under the cap ends, and says so when it is read.
void keep(Counter& c, int64_t delta) noexcept {
  try {
    c.log.push_back({delta, now_ns(), thread_id()});
  } catch (const std::bad_alloc&) {
    c.logging = false;
    c.log_lost = true;
  }
}

void change(Counter& c, int64_t delta) {  // the mutex is held
  c.live += delta;
  if (c.live > c.peak) c.peak = c.live;
  if (c.live > c.highest) c.highest = c.live;
  ++(delta > 0 ? c.allocs : c.frees);
  if (c.logging) keep(c, delta);
}

// The kernel keeps no peak of VmData, which is what RLIMIT_DATA limits, so it is read where it grows.
void watch_data(Counter& c) {
#ifdef __linux__
  char text[256];
  ssize_t got = pread(c.statm, text, sizeof text - 1, 0);
  if (got <= 0) return;
  text[got] = 0;
  char* at = text;  // size resident shared text lib data dt, in pages
  int64_t pages = 0;
  for (int field = 0; field < 6; ++field) pages = std::strtoll(at, &at, 10);
  static const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  if (pages * page_bytes > c.data_peak) c.data_peak = pages * page_bytes;
#endif
}

c10::Allocator* inner = nullptr;

// A kept block of the size, the youngest, as it may still be in the processor's cache; the mutex is held.
void* take(Counter& c, int64_t size) {
  auto found = c.kept_of.find(size);
  if (found == c.kept_of.end() || found->second.empty()) return nullptr;
  Blocks::iterator block = found->second.back();
  found->second.pop_back();
  void* ptr = block->ptr;
  c.kept.erase(block);
  c.kept_bytes -= size;
  return ptr;
}

// Moves the oldest kept blocks to `gone` until there is room beside `live` bytes; the mutex is held.
void make_room(Counter& c, int64_t live, Blocks& gone) {
  int64_t most = live > c.highest ? live : c.highest;
  if (c.ceiling > 0 && c.ceiling < most) most = c.ceiling;
  while (!c.kept.empty() && live + c.kept_bytes > most) {
    c.kept_of[c.kept.front().size].pop_front();
    c.kept_bytes -= c.kept.front().size;
    gone.splice(gone.end(), c.kept, c.kept.begin());
  }
}

void give_back(Blocks& gone) {
  for (Block& block : gone) inner->raw_deleter()(block.ptr);
  gone.clear();
}

void free_counted(void* ptr) {
  Blocks gone;
  {
    Counter& c = counter();
    std::lock_guard<std::mutex> hold(c.mutex);
    auto found = c.sizes.find(ptr);
    int64_t size = 0;  // made before the install, passes uncounted
    if (found != c.sizes.end()) {
      size = found->second;
      change(c, -size);
      c.sizes.erase(found);
    }
    if (size >= static_cast<int64_t>(kMapped)) {
      c.kept.push_back({ptr, size});
      c.kept_of[size].push_back(std::prev(c.kept.end()));
      c.kept_bytes += size;
      make_room(c, c.live, gone);
      ptr = nullptr;
    }
  }
  if (ptr != nullptr) inner->raw_deleter()(ptr);
  give_back(gone);
}

// All that is kept goes back to the system.
void release() {
  Blocks gone;
  {
    Counter& c = counter();
    std::lock_guard<std::mutex> hold(c.mutex);
    gone.swap(c.kept);
    c.kept_of.clear();
    c.kept_bytes = 0;
  }
  give_back(gone);
}

c10::DataPtr fresh(size_t n) {
  try {
    return inner->allocate(n);
  } catch (const c10::Error&) {
    release();
    return inner->allocate(n);
  }
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    int64_t rounded = (static_cast<int64_t>(n) + kAlign - 1) / kAlign * kAlign;
    bool large = rounded >= static_cast<int64_t>(kMapped);
    Counter& c = counter();
    if (large) {
      Blocks gone;
      {
        std::lock_guard<std::mutex> hold(c.mutex);
        if (void* ptr = take(c, rounded)) {
          c.sizes[ptr] = rounded;
          change(c, rounded);
          return {ptr, ptr, &free_counted, c10::Device(c10::DeviceType::CPU)};
        }
        make_room(c, c.live + rounded, gone);
      }
      give_back(gone);
    }
    c10::DataPtr data = fresh(large ? rounded : n);
    void* ptr = data.get();
    if (ptr == nullptr) return data;
    data.release_context();
    c10::DataPtr counted(ptr, ptr, &free_counted, data.device());
    std::lock_guard<std::mutex> hold(c.mutex);
    c.sizes[ptr] = rounded;
    change(c, rounded);
    if (c.statm >= 0 && large) watch_data(c);
    return counted;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_counted; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

}  // namespace

extern "C" {

// 1: counting. 0: the allocator in place cannot be wrapped (its context is not its data pointer).
int memfit_install() {
  if (inner != nullptr) return 1;
  c10::Allocator* current = c10::GetCPUAllocator();
  if (current->raw_deleter() == nullptr) return 0;
  inner = current;
  c10::SetCPUAllocator(new CountingAllocator, /*priority=*/255);
  return 1;
}

// Nothing is kept any more, and from now on only as much as leaves room in `cap` above what is live (0: no
// cap): an eighth, for what does not come from this allocator.
void memfit_release(int64_t cap) {
  release();
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  c.ceiling = cap > 0 ? c.live + cap - cap / 8 : 0;
}

int64_t memfit_live() {
  std::lock_guard<std::mutex> hold(counter().mutex);
  return counter().live;
}

int64_t memfit_peak() {
  std::lock_guard<std::mutex> hold(counter().mutex);
  return counter().peak;
}

void memfit_reset_peak() {
  std::lock_guard<std::mutex> hold(counter().mutex);
  counter().peak = counter().live;
}

// allocations, frees, still alive
void memfit_counts(int64_t* out) {
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  out[0] = c.allocs;
  out[1] = c.frees;
  out[2] = static_cast<int64_t>(c.sizes.size());
}

// Returns the live bytes at which the log begins.
int64_t memfit_start_log() {
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  c.log.clear();
  c.logging = true;
  c.log_lost = false;
  return c.live;
}

// Returns the number of events kept, or -1 when there was no memory to keep them all.
int64_t memfit_stop_log() {
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  c.logging = false;
  return c.log_lost ? -1 : static_cast<int64_t>(c.log.size());
}

// Copies up to n events as (delta_bytes, time_ns, thread) triples, then forgets them.
void memfit_read_log(int64_t* out, int64_t n) {
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  for (int64_t i = 0; i < n && i < static_cast<int64_t>(c.log.size()); ++i) {
    out[3 * i] = c.log[i].delta_bytes;
    out[3 * i + 1] = c.log[i].time_ns;
    out[3 * i + 2] = c.log[i].thread;
  }
  std::vector<Event>().swap(c.log);
}

// Starts (on = 1) or ends keeping the highest VmData seen after a large allocation; with the stack, as
// statm counts it.
void memfit_watch_data(int on) {
#ifdef __linux__
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  if (c.statm >= 0) close(c.statm);
  c.statm = on ? open("/proc/self/statm", O_RDONLY | O_CLOEXEC) : -1;
  if (c.statm < 0) return;
  c.data_peak = 0;
  watch_data(c);
#endif
}

// Bytes; 0 when it was never watched.
int64_t memfit_data_peak() {
  std::lock_guard<std::mutex> hold(counter().mutex);
  return counter().data_peak;
}

}  // extern "C"
