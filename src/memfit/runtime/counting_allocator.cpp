// A CPU allocator that counts. It wraps torch's own, so every tensor of every thread passes through it.
//
// The data pointer stays the context pointer, which raw_allocate and raw_deallocate (oneDNN) rely on;
// sizes are therefore kept in a table. One mutex guards table, counters and log together: their order
// is one order, so the peak and the log are exact with any number of threads. The pointer leaves the
// table before the memory is freed, because another thread may be given the same address at once.
//
// Large blocks are pages of our own. Freed pages are kept for what comes next, as the allocator that a
// user trains with keeps them: mapping and touching fresh ones each time took half of a step. What is kept
// never makes the process larger than its live bytes once were, and all of it goes before an allocation
// fails.
#include <c10/core/CPUAllocator.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kAlign = 64;  // torch aligns CPU storages to 64 bytes
constexpr int64_t kMapped = 65536;  // from here on in pages of our own

struct Event {
  int64_t delta_bytes, time_ns, thread;
};

struct Size {
  int64_t bytes;  // as it counts
  int64_t mapped;  // pages of our own; 0: torch's own allocator has it
};

struct Counter {
  std::mutex mutex;
  std::map<char*, int64_t> kept;                   // free pages: address -> bytes, neighbours joined
  std::set<std::pair<int64_t, char*>> kept_sizes;  // the same by size
  int64_t kept_bytes = 0, highest = 0, ceiling = 0;  // ceiling: of live and kept bytes, under a cap
  std::unordered_map<void*, Size> sizes;
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

int64_t page_bytes() {
#ifdef __linux__
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
#else
  return 4096;
#endif
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
  if (pages * page_bytes() > c.data_peak) c.data_peak = pages * page_bytes();
#endif
}

c10::Allocator* inner = nullptr;

int64_t in_pages(int64_t size) { return (size + page_bytes() - 1) / page_bytes() * page_bytes(); }

void unmap(char* ptr, int64_t size) {
#ifdef __linux__
  munmap(ptr, static_cast<size_t>(size));
#endif
}

// The mutex is held for all of these.
void forget(Counter& c, std::map<char*, int64_t>::iterator range) {
  c.kept_bytes -= range->second;
  c.kept_sizes.erase({range->second, range->first});
  c.kept.erase(range);
}

// A free may not throw: where there is no memory to remember pages, they go.
void keep_range(Counter& c, char* ptr, int64_t size) noexcept {
  auto next = c.kept.lower_bound(ptr);
  if (next != c.kept.end() && ptr + size == next->first) {
    size += next->second;
    forget(c, next);
  }
  auto before = c.kept.lower_bound(ptr);
  if (before != c.kept.begin() && (--before)->first + before->second == ptr) {
    ptr = before->first;
    size += before->second;
    forget(c, before);
  }
  try {
    c.kept_sizes.insert({size, ptr});
    c.kept[ptr] = size;
    c.kept_bytes += size;
  } catch (const std::bad_alloc&) {
    c.kept_sizes.erase({size, ptr});
    unmap(ptr, size);
  }
}

// So many kept pages in a row, from the smallest range that has them; null where there are none.
char* take(Counter& c, int64_t size) {
  auto found = c.kept_sizes.lower_bound({size, nullptr});
  if (found == c.kept_sizes.end()) return nullptr;
  auto [whole, ptr] = *found;
  forget(c, c.kept.find(ptr));
  if (whole > size) keep_range(c, ptr + size, whole - size);
  return ptr;
}

// Gives kept pages back, the smallest ranges first, until there is room beside `live` bytes.
void make_room(Counter& c, int64_t live) {
  int64_t most = live > c.highest ? live : c.highest;
  if (c.ceiling > 0 && c.ceiling < most) most = c.ceiling;
  while (!c.kept.empty() && live + c.kept_bytes > most) {
    auto [size, ptr] = *c.kept_sizes.begin();
    int64_t over = in_pages(live + c.kept_bytes - most);
    forget(c, c.kept.find(ptr));
    if (over < size) keep_range(c, ptr, size - over);
    unmap(over < size ? ptr + size - over : ptr, over < size ? over : size);
  }
}

// All that is kept goes back to the system.
void release(Counter& c) {
  for (auto& [ptr, size] : c.kept) unmap(ptr, size);
  c.kept.clear();
  c.kept_sizes.clear();
  c.kept_bytes = 0;
}

void count(Counter& c, void* ptr, Size size) {
  c.sizes[ptr] = size;
  change(c, size.bytes);
  if (c.statm >= 0 && size.bytes >= kMapped) watch_data(c);
}

void* fresh_pages(Counter& c, int64_t size) {
#ifdef __linux__
  for (int attempt = 0; attempt < 2; ++attempt) {
    void* ptr = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ptr != MAP_FAILED) return ptr;
    release(c);
  }
#endif
  return nullptr;
}

// Pages of our own, counted; null where torch's own allocator has to say what is wrong.
void* large_block(Counter& c, int64_t bytes) {
  int64_t mapped = in_pages(bytes);
  std::lock_guard<std::mutex> hold(c.mutex);
  void* ptr = take(c, mapped);
  if (ptr == nullptr) {
    make_room(c, c.live + bytes);
    ptr = fresh_pages(c, mapped);
  }
  if (ptr == nullptr) return nullptr;
  try {
    count(c, ptr, {bytes, mapped});
  } catch (const std::bad_alloc&) {
    unmap(static_cast<char*>(ptr), mapped);
    return nullptr;
  }
  return ptr;
}

void free_counted(void* ptr) {
  {
    Counter& c = counter();
    std::lock_guard<std::mutex> hold(c.mutex);
    auto found = c.sizes.find(ptr);
    if (found != c.sizes.end()) {  // else: made before the install, passes uncounted
      Size size = found->second;
      change(c, -size.bytes);
      c.sizes.erase(found);
      if (size.mapped > 0) {
        keep_range(c, static_cast<char*>(ptr), size.mapped);
        make_room(c, c.live);
        return;
      }
    }
  }
  inner->raw_deleter()(ptr);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    int64_t rounded = (static_cast<int64_t>(n) + kAlign - 1) / kAlign * kAlign;
    Counter& c = counter();
    if (rounded >= kMapped) {
      if (void* ptr = large_block(c, rounded)) {
        return {ptr, ptr, &free_counted, c10::Device(c10::DeviceType::CPU)};
      }
    }
    c10::DataPtr data = inner->allocate(n);
    void* ptr = data.get();
    if (ptr == nullptr) return data;
    data.release_context();
    c10::DataPtr counted(ptr, ptr, &free_counted, data.device());
    std::lock_guard<std::mutex> hold(c.mutex);
    count(c, ptr, {rounded, 0});
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
  Counter& c = counter();
  std::lock_guard<std::mutex> hold(c.mutex);
  release(c);
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
