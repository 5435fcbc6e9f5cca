// A simulated accelerator: a PyTorch backend on the PrivateUse1 key whose device memory lies in host memory.
//
// Every tensor of the device has its memory from the one allocator below, which has a hard capacity. An
// operator without a kernel here runs the CPU's kernel on CPU tensors that share the memory of the device's
// tensors (HostCall). The numbers are therefore those of the CPU, while memory, streams, events, random
// numbers, autocast and collectives behave as those of an accelerator do.
//
// Kernels run at once, so streams are never late. The exception is a mode for tests of offloading: copies to
// pinned memory arrive only where the program has synchronized (Order).
//
// Not simulated: speed, overlap, fragmentation, workspaces of a GPU's kernels, the reuse of memory that another
// stream still reads (record_stream does nothing), late copies to the device, sparse tensors, networks that run
// as one kernel (LSTM and GRU run cell by cell, as on devices without cuDNN), and random operators on DTensors, which count offsets in the state of CUDA's generator.
//
// Nothing is registered when this library is loaded but kernels of PrivateUse1; `start` makes it the process's
// accelerator. What `start` makes is never destroyed, because tensors may be freed while the process exits.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr c10::DeviceType kDevice = c10::DeviceType::PrivateUse1;
constexpr DispatchKeySet kDeviceKeys(DispatchKey::PrivateUse1);
constexpr DispatchKeySet kHostKeys(DispatchKey::CPU);
constexpr int kMostDevices = 8;

int device_count = 1;
thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kMostDevices> current_streams{};  // 0: the default stream

void check_index(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count, "there is no device sim:", int(index), "; the number of devices is ",
              device_count);
}

DeviceIndex exchange_device(DeviceIndex index) {
  if (index >= 0) check_index(index);
  return std::exchange(current_device, index >= 0 ? index : current_device);
}

// -- device memory ---------------------------------------------------------------------------------------

// Sizes are rounded as CUDA's caching allocator rounds them. Nothing fragments: reserved memory is the highest
// that was allocated since the cache was emptied, and a request fails only where it and the live blocks exceed
// the limit (the capacity, or the fraction of it that the process may use).
struct DeviceMemory final : c10::DeviceAllocator {
  static constexpr size_t kRound = 512;
  static constexpr size_t kLargestSmall = size_t{1} << 20;

  struct Device {
    size_t capacity = 0, limit = 0;
    c10::CachingDeviceAllocator::DeviceStats stats;
  };
  struct Block {
    DeviceIndex device;
    size_t bytes, requested;
  };

  std::mutex mutex;
  std::array<Device, kMostDevices> devices;
  std::unordered_map<void*, Block> blocks;

  using Stats = c10::CachingDeviceAllocator::DeviceStats;
  using Array = c10::CachingDeviceAllocator::StatArray;
  static constexpr size_t kAll = 0, kSmall = 1, kLarge = 2;

  template <class Change>
  static void for_every_statistic(Stats& stats, Change change) {
    for (Array* array : {&stats.allocation, &stats.segment, &stats.active, &stats.inactive_split,
                         &stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                         &stats.inactive_split_bytes, &stats.requested_bytes}) {
      for (auto& statistic : *array) change(statistic);
    }
  }

  // Counts a block that comes (sign 1) or goes (sign -1). The mutex is held.
  void count(const Block& block, int sign) {
    Stats& stats = devices[block.device].stats;
    auto add = [sign](Array& array, size_t pool, size_t amount) {
      for (size_t i : {kAll, pool}) sign > 0 ? array[i].increase(amount) : array[i].decrease(amount);
    };
    size_t pool = block.bytes <= kLargestSmall ? kSmall : kLarge;
    add(stats.allocation, pool, 1);
    add(stats.active, pool, 1);
    add(stats.allocated_bytes, pool, block.bytes);
    add(stats.active_bytes, pool, block.bytes);
    add(stats.requested_bytes, pool, block.requested);
    int64_t more = stats.allocated_bytes[kAll].current - stats.reserved_bytes[kAll].current;
    if (more > 0) {
      stats.reserved_bytes[kAll].increase(more);
      stats.segment[kAll].increase(1);
      ++stats.num_device_alloc;
    }
  }

  [[noreturn]] static void out_of_memory(Device& device, const Block& block) {
    using c10::CachingAllocator::format_size;
    size_t live = device.stats.allocated_bytes[kAll].current;
    ++device.stats.num_ooms;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory. Tried to allocate ", format_size(block.requested),
                     ". Device ", int(block.device), " has a total capacity of ", format_size(device.capacity),
                     " of which ", format_size(device.limit - std::min(live, device.limit)), " is free",
                     device.limit < device.capacity ? " within this process's limit of " : "",
                     device.limit < device.capacity ? format_size(device.limit) : "", ". ", format_size(live),
                     " is allocated by PyTorch.");
    std::abort();  // not reached
  }

  c10::DataPtr allocate(size_t requested) override {
    c10::Device at(kDevice, current_device);
    if (requested == 0) return {nullptr, nullptr, &free_block, at};
    TORCH_CHECK_WITH(OutOfMemoryError, requested < (size_t{1} << 60), "sim out of memory. Tried to allocate more ",
                     "than 1EB memory.");
    Block block{current_device, (requested + kRound - 1) / kRound * kRound, requested};
    std::lock_guard<std::mutex> hold(mutex);
    Device& device = devices[block.device];
    if (device.stats.allocated_bytes[kAll].current + block.bytes > device.limit) out_of_memory(device, block);
    void* data = std::aligned_alloc(kRound, block.bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "the host has no memory left for the simulated device");
    blocks[data] = block;
    count(block, 1);
    return {data, data, &free_block, at};
  }

  static void free_block(void* data);

  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    std::lock_guard<std::mutex> hold(mutex);
    for (Device& device : devices) {
      auto& stats = device.stats;
      int64_t kept = stats.reserved_bytes[kAll].current - stats.allocated_bytes[kAll].current;
      if (kept > 0) stats.reserved_bytes[kAll].decrease(kept);
    }
  }
  Stats getDeviceStats(DeviceIndex index) override {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    return devices[index].stats;
  }
  void resetAccumulatedStats(DeviceIndex index) override {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    for_every_statistic(devices[index].stats, [](auto& statistic) { statistic.reset_accumulated(); });
    devices[index].stats.num_alloc_retries = devices[index].stats.num_ooms = 0;
  }
  void resetPeakStats(DeviceIndex index) override {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    for_every_statistic(devices[index].stats, [](auto& statistic) { statistic.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    const Device& device = devices[index];
    size_t reserved = device.stats.reserved_bytes[kAll].current;
    return {device.capacity - std::min(reserved, device.capacity), device.capacity};
  }
  void set_capacity(DeviceIndex index, size_t bytes) {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    devices[index].capacity = devices[index].limit = bytes;
  }
  double fraction(DeviceIndex index) {
    check_index(index);
    std::lock_guard<std::mutex> hold(mutex);
    return static_cast<double>(devices[index].limit) / static_cast<double>(devices[index].capacity);
  }
  void set_fraction(DeviceIndex index, double fraction) {
    check_index(index);
    TORCH_CHECK_VALUE(fraction >= 0 && fraction <= 1, "the fraction of memory must be from 0 to 1, not ", fraction);
    std::lock_guard<std::mutex> hold(mutex);
    devices[index].limit = static_cast<size_t>(fraction * static_cast<double>(devices[index].capacity));
  }
};

DeviceMemory& memory() {
  static auto* one = new DeviceMemory;
  return *one;
}

void DeviceMemory::free_block(void* data) {
  if (data == nullptr) return;
  DeviceMemory& m = memory();
  {
    std::lock_guard<std::mutex> hold(m.mutex);
    auto found = m.blocks.find(data);
    m.count(found->second, -1);
    m.blocks.erase(found);  // before the memory is freed: another thread may be given this address at once
  }
  std::free(data);
}

// Gives a storage of the device so many bytes, with what it held. Its device stays its device.
void resize_storage(c10::StorageImpl& storage, size_t bytes) {
  c10::DeviceGuard on(storage.device());
  c10::DataPtr data = memory().allocate(bytes);
  size_t kept = std::min(bytes, storage.nbytes());
  if (kept > 0) std::memcpy(data.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}

// -- pinned host memory ----------------------------------------------------------------------------------

// CUDA's allocator of pinned memory rounds to powers of two; so do these statistics.
struct PinnedMemory final : at::HostAllocator {
  std::mutex mutex;
  std::map<const char*, size_t> blocks;  // by address, for pointers into a block
  at::HostStats stats;

  static size_t rounded(size_t bytes) {
    size_t power = 1;
    while (power < bytes) power *= 2;
    return power;
  }
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device at(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &free_block, at};
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    TORCH_CHECK(data != nullptr, "no host memory is left for ", bytes, " pinned bytes");
    std::lock_guard<std::mutex> hold(mutex);
    blocks[static_cast<char*>(data)] = bytes;
    stats.active_requests.increase(1);
    stats.allocations.increase(1);
    stats.active_bytes.increase(rounded(bytes));
    stats.allocated_bytes.increase(rounded(bytes));
    ++stats.num_host_alloc;
    return {data, data, &free_block, at};
  }
  static void free_block(void* data);

  bool contains(const void* data) {
    std::lock_guard<std::mutex> hold(mutex);
    auto after = blocks.upper_bound(static_cast<const char*>(data));
    if (after == blocks.begin()) return false;
    --after;
    return static_cast<const char*>(data) < after->first + after->second;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override {
    std::lock_guard<std::mutex> hold(mutex);
    return stats;
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {
    std::lock_guard<std::mutex> hold(mutex);
    for (auto* statistic : {&stats.active_requests, &stats.active_bytes, &stats.allocations, &stats.allocated_bytes}) {
      statistic->reset_peak();
    }
  }
};

PinnedMemory& pinned_memory() {
  static auto* one = new PinnedMemory;
  return *one;
}

void PinnedMemory::free_block(void* data) {
  if (data == nullptr) return;
  PinnedMemory& m = pinned_memory();
  {
    std::lock_guard<std::mutex> hold(m.mutex);
    auto found = m.blocks.find(static_cast<char*>(data));
    m.stats.active_requests.decrease(1);
    m.stats.allocations.decrease(1);
    m.stats.active_bytes.decrease(rounded(found->second));
    m.stats.allocated_bytes.decrease(rounded(found->second));
    m.blocks.erase(found);
  }
  std::free(data);
}

// While it lives, what this thread calls runs below autograd and autocast, and is hidden from dispatch modes.
struct HostOnly {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_modes{
      c10::autocast_dispatch_keyset | DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot})};
};

// -- the order of work: streams, events and late copies ----------------------------------------------------

using StreamKey = std::pair<DeviceIndex, c10::StreamId>;

// For each stream, how many of its late copies are known to have ended.
using Clock = std::map<StreamKey, int64_t>;

StreamKey key_of(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }

StreamKey current_stream_of(DeviceIndex device) { return {device, current_streams[device]}; }

void merge(Clock& into, const Clock& from) {
  for (const auto& [stream, copies] : from) into[stream] = std::max(into[stream], copies);
}

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point time;
};

// A copy from the device to pinned memory that has been enqueued and has not arrived.
struct LateCopy {
  StreamKey stream;
  int64_t number;  // on its stream, from 1
  at::Tensor target, values;

  void arrive() const { target.copy_(values); }
};

// With late copies, a non-blocking copy to pinned memory writes NaN at first. Its values arrive when the host
// synchronizes with the copy's stream, or with an event or device that includes it; or when a stream that runs
// after the copy (the same one, or one that waited for an event after it) copies from that memory to a device.
// Who reads earlier, or reloads on a stream that did not wait, computes with NaN.
struct Order {
  std::mutex mutex;
  bool late = false;
  c10::StreamId last_stream = 0;
  Clock enqueued;
  std::map<StreamKey, Clock> waited;  // what each stream has waited for
  std::vector<LateCopy> pending;

  // What has ended before the next work on this stream begins. The mutex is held.
  Clock clock(StreamKey stream) {
    Clock now = waited[stream];
    now[stream] = enqueued[stream];
    return now;
  }

  template <class Chosen>
  void arrive_if(Chosen chosen) {
    std::vector<LateCopy> arriving, rest;
    {
      std::lock_guard<std::mutex> hold(mutex);
      for (auto& copy : pending) (chosen(copy) ? arriving : rest).push_back(std::move(copy));
      pending = std::move(rest);
    }
    HostOnly host_only;
    for (const auto& copy : arriving) copy.arrive();
  }
  void arrive_by(const Clock& end) {
    arrive_if([&](const LateCopy& copy) {
      auto found = end.find(copy.stream);
      return found != end.end() && copy.number <= found->second;
    });
  }

  void enqueue_copy(StreamKey stream, const at::Tensor& from, const at::Tensor& to) {
    at::Tensor values = at::empty_like(to).copy_(from);
    if (to.is_floating_point() || to.is_complex()) {
      to.fill_(std::numeric_limits<double>::quiet_NaN());
    } else {
      to.fill_(1);
    }
    std::lock_guard<std::mutex> hold(mutex);
    pending.push_back({stream, ++enqueued[stream], to, values});
  }
  // Before work on this stream reads host memory.
  void before_read(StreamKey stream, const at::Tensor& host) {
    Clock now;
    {
      std::lock_guard<std::mutex> hold(mutex);
      if (pending.empty()) return;
      now = clock(stream);
    }
    arrive_if([&](const LateCopy& copy) {
      auto found = now.find(copy.stream);
      return copy.target.is_alias_of(host) && found != now.end() && copy.number <= found->second;
    });
  }

  void synchronize_stream(StreamKey stream) {
    Clock now;
    {
      std::lock_guard<std::mutex> hold(mutex);
      if (pending.empty()) return;
      now = clock(stream);
    }
    arrive_by(now);
  }
  void synchronize_device(DeviceIndex device) {
    arrive_if([&](const LateCopy& copy) { return copy.stream.first == device; });
  }
  void record(Event& event, StreamKey stream) {
    std::lock_guard<std::mutex> hold(mutex);
    event.clock = clock(stream);
    event.time = std::chrono::steady_clock::now();
  }
  void wait(const Event& event, StreamKey stream) {
    std::lock_guard<std::mutex> hold(mutex);
    merge(waited[stream], event.clock);
  }
  void set_late(bool on) {
    arrive_if([](const LateCopy&) { return true; });
    std::lock_guard<std::mutex> hold(mutex);
    late = on;
  }
};

Order& order() {
  static auto* one = new Order;
  return *one;
}

// What asks whether work has ended is told that it has, and so it has.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(DeviceIndex index, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, index), id);
  }
  static DeviceIndex index_of(c10::Device device) { return device.has_index() ? device.index() : current_device; }

  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override { return {kDevice, exchange_device(device.index())}; }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count); }

  c10::Stream getStream(c10::Device device) const override {
    return stream(index_of(device), current_streams[index_of(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(index_of(device), 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard<std::mutex> hold(order().mutex);
    return stream(index_of(device), ++order().last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    DeviceIndex device = next.device_index();
    return stream(device, std::exchange(current_streams[device], next.id()));
  }
  bool queryStream(const c10::Stream& stream) const override {
    order().synchronize_stream(key_of(stream));
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override { order().synchronize_stream(key_of(stream)); }
  void synchronizeDevice(DeviceIndex device) const override { order().synchronize_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    order().record(*static_cast<Event*>(*event), key_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) order().wait(*static_cast<Event*>(event), key_of(stream));
  }
  bool queryEvent(void* event) const override {
    synchronizeEvent(event);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) order().arrive_by(static_cast<Event*>(event)->clock);
  }
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    TORCH_CHECK(from != nullptr && to != nullptr, "both events must be recorded before the time between them is known");
    std::chrono::duration<double, std::milli> time = static_cast<Event*>(to)->time - static_cast<Event*>(from)->time;
    return time.count();
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};

// -- random numbers ----------------------------------------------------------------------------------------

struct RandomState {
  at::mt19937 engine;
  std::optional<float> next_float;
  std::optional<double> next_double;

  static RandomState of(at::CPUGeneratorImpl& from) {
    return {from.engine(), from.next_float_normal_sample(), from.next_double_normal_sample()};
  }
  void give(at::CPUGeneratorImpl& to) const {
    to.set_engine(engine);
    to.set_next_float_normal_sample(next_float);
    to.set_next_double_normal_sample(next_double);
  }
};

// The device's generator is the CPU's algorithm with a state of its own: the same seed gives the same numbers.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex device, uint64_t seed = c10::default_rng_seed_val) : CPUGeneratorImpl(seed) {
    device_ = c10::Device(kDevice, device);
    key_set_ = kDeviceKeys;
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    RandomState::of(const_cast<Generator&>(*this)).give(*copy);
    return copy;
  }
};

const at::Generator& default_generator(DeviceIndex index) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int i = 0; i < kMostDevices; ++i) {
      made->push_back(at::make_generator<Generator>(static_cast<DeviceIndex>(i)));
    }
    return made;
  }();
  index = index < 0 ? current_device : index;
  check_index(index);
  return (*all)[index];
}

// While it lives, the CPU's default generator has the state of a device's generator, for kernels that look for no
// other. A thread that draws on the CPU at that time takes numbers of the device.
class Lend {
 public:
  explicit Lend(const at::Generator& generator)
      : device_(*generator.get<at::CPUGeneratorImpl>()),
        host_(*at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>()) {
    std::lock_guard<std::mutex> hold(host_.mutex_);
    saved_ = RandomState::of(host_);
    RandomState::of(device_).give(host_);
  }
  ~Lend() {
    std::lock_guard<std::mutex> hold(host_.mutex_);
    RandomState::of(host_).give(device_);
    saved_.give(host_);
  }
  Lend(const Lend&) = delete;
  Lend& operator=(const Lend&) = delete;

 private:
  at::CPUGeneratorImpl &device_, &host_;
  RandomState saved_;
};

// -- kernels of the CPU on memory of the device --------------------------------------------------------------

// A tensor with the sizes of another one, on a storage that lies elsewhere.
at::Tensor alias(const at::Tensor& like, c10::Storage storage, DispatchKeySet keys) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}

// One call of an operator on CPU tensors that share the memory of the device tensors among its arguments.
//
// Each device storage is shared once, so that the kernel sees which tensors overlap. What the kernel returns is
// mapped back: a tensor of the arguments to that argument, a view of one to a view of the device storage, and new
// memory is copied into memory of the device, which charges it. Sizes and storages that the kernel changed
// (`out=`, `resize_`, `set_`) are written back.
class HostCall {
 public:
  template <class Kernel>
  void run(const c10::OperatorHandle& op, torch::jit::Stack* stack, Kernel kernel) {
    HostOnly host_only;
    const auto& schema = op.schema();
    size_t first = stack->size() - schema.arguments().size();
    for (size_t i = first; i < stack->size(); ++i) (*stack)[i] = to_host((*stack)[i]);
    check_devices(op);
    {
      std::optional<Lend> lend;
      if (op.hasTag(at::Tag::nondeterministic_seeded)) {
        lend.emplace(generator_.defined() ? generator_ : default_generator(device().index()));
      }
      kernel();
    }
    write_back();
    for (size_t i = first; i < stack->size(); ++i) (*stack)[i] = to_device((*stack)[i]);
  }

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      has_host_tensor_ |= tensor.is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, "the simulated accelerator has strided tensors only");
    note(tensor.device());
    for (const auto& shared : tensors_) {
      if (shared.device.is_same(tensor)) return shared.host;
    }
    at::Tensor host = alias(tensor, host_storage(tensor.storage()), kHostKeys);
    tensors_.push_back({tensor, host});
    return host;
  }

 private:
  struct SharedStorage {
    c10::Storage device, host;
  };
  struct SharedTensor {
    at::Tensor device, host;
  };
  std::vector<SharedStorage> storages_;
  std::vector<SharedTensor> tensors_;
  std::optional<c10::Device> device_;
  at::Generator generator_;
  bool has_host_tensor_ = false, mixes_devices_ = false;

  void note(c10::Device device) {
    mixes_devices_ |= device_.has_value() && *device_ != device;
    if (!device_.has_value()) device_ = device;
  }
  c10::Device device() const { return device_.value_or(c10::Device(kDevice, current_device)); }

  // As on CUDA: indices may lie on the host, and so may tensors without dimensions.
  void check_devices(const c10::OperatorHandle& op) const {
    if (!device_.has_value() || !(has_host_tensor_ || mixes_devices_)) return;
    const std::string& name = op.schema().name();
    if (!mixes_devices_ && (name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
                            name == "aten::_index_put_impl_")) {
      return;
    }
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                has_host_tensor_ ? " and cpu" : " and another one", "! (", name, ")");
  }

  static void* data_of(const c10::Storage& storage) {
    return storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
  }

  // The host storage keeps the device storage: a collective may still write when the call has returned.
  c10::Storage host_storage(const c10::Storage& device) {
    for (const auto& shared : storages_) {
      if (shared.device.unsafeGetStorageImpl() == device.unsafeGetStorageImpl()) return shared.host;
    }
    auto* keeps = new c10::Storage(device);
    c10::DataPtr data(
        data_of(device), keeps, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
        c10::Device(c10::DeviceType::CPU));
    c10::Storage host(c10::Storage::use_byte_size_t(), device.nbytes(), std::move(data), c10::GetCPUAllocator(),
                      /*resizable=*/true);
    storages_.push_back({device, host});
    return host;
  }

  // The device storage of a host storage; new memory of a kernel is copied to the device.
  c10::Storage device_storage(const c10::Storage& host) {
    for (const auto& shared : storages_) {
      if (shared.host.unsafeGetStorageImpl() == host.unsafeGetStorageImpl()) return shared.device;
    }
    c10::DeviceGuard on(device());
    c10::Storage made(c10::Storage::use_byte_size_t(), host.nbytes(), memory().allocate(host.nbytes()), &memory(),
                      /*resizable=*/true);
    if (host.nbytes() > 0) std::memcpy(data_of(made), data_of(host), host.nbytes());
    storages_.push_back({made, host});
    return made;
  }

  static bool may_hold_tensors(const c10::TypePtr& element) {
    auto kind = element->kind();
    return kind == c10::TypeKind::TensorType || kind == c10::TypeKind::OptionalType || kind == c10::TypeKind::ListType;
  }

  template <class Map>
  static c10::IValue mapped_list(const c10::IValue& value, Map map) {
    auto list = value.toList();
    if (!may_hold_tensors(list.elementType())) return value;
    c10::impl::GenericList mapped(list.elementType());
    mapped.reserve(list.size());
    for (const c10::IValue& element : value.toListRef()) mapped.push_back(map(element));
    return mapped;
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isList()) return mapped_list(value, [this](const c10::IValue& element) { return to_host(element); });
    if (value.isDevice() && value.toDevice().is_privateuseone()) {
      note({kDevice, Guard::index_of(value.toDevice())});
      return c10::Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator()) {
      generator_ = value.toGenerator();
      TORCH_CHECK(generator_.device().type() == kDevice, "Expected a 'sim' device type for generator but found '",
                  generator_.device().type(), "'");
      return {};
    }
    return value;
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isList()) return mapped_list(value, [this](const c10::IValue& element) { return to_device(element); });
    return value;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (const auto& shared : tensors_) {
      if (shared.host.is_same(tensor)) return shared.device;
    }
    return alias(tensor, device_storage(tensor.storage()), kDeviceKeys);
  }

  void write_back() {
    size_t shared_before = storages_.size();
    for (size_t i = 0; i < shared_before; ++i) {
      auto& [device, host] = storages_[i];
      if (data_of(host) == data_of(device) && host.nbytes() == device.nbytes()) continue;
      resize_storage(*device.unsafeGetStorageImpl(), host.nbytes());
      if (host.nbytes() > 0) std::memcpy(data_of(device), data_of(host), host.nbytes());
    }
    for (const auto& [device, host] : tensors_) {
      auto* impl = device.unsafeGetTensorImpl();
      c10::Storage storage = device_storage(host.storage());
      if (storage.unsafeGetStorageImpl() != device.storage().unsafeGetStorageImpl()) {
        impl->set_storage_keep_dtype(std::move(storage));
      }
      if (device.sizes() != host.sizes() || device.strides() != host.strides() ||
          device.storage_offset() != host.storage_offset()) {
        impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall().run(op, stack, [&] { op.redispatchBoxed(kHostKeys, stack); });
}

// -- kernels of the device's own -----------------------------------------------------------------------------

c10::Device device_or_current(std::optional<c10::Device> device) {
  return {kDevice, device.has_value() ? Guard::index_of(*device) : current_device};
}

void check_layout(std::optional<c10::Layout> layout, std::optional<bool> pinned) {
  TORCH_CHECK_NOT_IMPLEMENTED(c10::layout_or_default(layout) == c10::Layout::Strided,
                              "the simulated accelerator has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout> layout,
                 std::optional<c10::Device> device, std::optional<bool> pinned,
                 std::optional<c10::MemoryFormat> format) {
  check_layout(layout, pinned);
  c10::DeviceGuard on(device_or_current(device));
  return at::detail::empty_generic(size, &memory(), kDeviceKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                         std::optional<bool> pinned) {
  check_layout(layout, pinned);
  c10::DeviceGuard on(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, &memory(), kDeviceKeys, c10::dtype_or_default(dtype));
}

// Zeros without memory, which autograd makes for tangents. PyTorch materializes them before a kernel sees them.
struct NoMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t) override { return {nullptr, c10::Device(kDevice, current_device)}; }
  void copy_data(void*, const void*, size_t) const override {}
};

at::Tensor efficient_zeros(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
                           std::optional<c10::Device> device, std::optional<bool>) {
  static auto* none = new NoMemory;
  c10::DeviceGuard on(device_or_current(device));
  auto keys = kDeviceKeys | DispatchKeySet(DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, none, keys, c10::dtype_or_default(dtype), std::nullopt);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard on(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  c10::DeviceGuard on(self.device());
  bool contiguous = stride.empty() && !size.empty();  // torch.load leaves the strides out
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, contiguous ? c10::IntArrayRef() : stride);
}

at::Tensor& set_nothing(at::Tensor& self) {
  c10::DeviceGuard on(self.device());
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, memory().allocate(0), &memory(), /*resizable=*/true);
  return set_storage(self, none, 0, {0}, {});
}

// Copies between devices, and between a device and the host. A blocking copy to the host waits for its stream.
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  HostOnly host_only;
  StreamKey stream = current_stream_of(self.is_privateuseone() ? self.device().index() : target.device().index());
  HostCall call;
  at::Tensor from = call.to_host(self), to = call.to_host(target);
  if (target.is_cpu()) {
    bool pinned = target.has_storage() && pinned_memory().contains(target.storage().data());
    if (non_blocking && pinned && order().late) {
      order().enqueue_copy(stream, from, to.detach());
      return target;
    }
    if (!non_blocking || !pinned) order().synchronize_stream(stream);
  } else if (self.is_cpu()) {
    order().before_read(stream, self);
    if (!non_blocking) order().synchronize_stream(stream);
  }
  to.copy_(from);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  order().synchronize_stream(current_stream_of(self.device().index()));
  HostCall call;
  return at::native::_local_scalar_dense_cpu(call.to_host(self));
}

// `Module.to` then changes the data of parameters, which optimizers hold, and replaces none.
bool has_compatible_type(const at::Tensor&, const at::Tensor&) { return true; }

void record_stream(at::Tensor&, c10::Stream) {}

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  static const auto op = find("aten::convolution");
  run_on_host(op, stack);
}

// The general operator also takes the sizes of the bias: after the gradient, the input and the weight.
void convolution_backward(const c10::OperatorHandle& own, torch::jit::Stack* stack) {
  static const auto op = find("aten::convolution_backward");
  auto first = stack->end() - static_cast<std::ptrdiff_t>(own.schema().arguments().size());
  at::Tensor weight = first[2].toTensor();
  bool transposed = first[6].toBool();
  int64_t groups = first[8].toInt();
  c10::List<int64_t> bias({transposed ? weight.size(1) * groups : weight.size(0)});
  stack->insert(first + 3, c10::IValue(bias));
  run_on_host(op, stack);
}

// The CPU's choice among its own kernels of attention, which depends on sizes, not on values: fake tensors have one
// too. Other subclasses of tensors, as those of tensor parallelism, take the formula, whose operators they know.
int64_t attention_kernel(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& mask, double dropout_p, bool is_causal,
                         std::optional<double> scale, bool enable_gqa) {
  constexpr int64_t kFormula = 0;
  bool is_subclass = query.key_set().has(DispatchKey::Python);
  bool is_fake = is_subclass && query.has_storage() && query.storage().device_type() == c10::DeviceType::Meta;
  if (is_subclass && (!is_fake || query.unsafeGetTensorImpl()->has_symbolic_sizes_strides())) return kFormula;
  HostOnly host_only;
  auto on_host = [](const at::Tensor& tensor) {
    c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::DataPtr());
    return alias(tensor, none, kHostKeys).set_requires_grad(tensor.requires_grad());
  };
  std::optional<at::Tensor> host_mask;
  if (mask.has_value() && mask->defined()) host_mask = on_host(*mask);
  return at::_fused_sdp_choice(on_host(query), on_host(key), on_host(value), host_mask, dropout_p, is_causal, scale,
                               enable_gqa);
}

// Cells of recurrent networks. Torch calls them on devices other than the CPU, which has no such kernels.
using OptionalTensor = std::optional<at::Tensor>;

bool is_given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

at::Tensor with_bias(const at::Tensor& gates, const OptionalTensor& bias) {
  return is_given(bias) ? gates + *bias : gates;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& from_input, const at::Tensor& from_hidden,
                                                         const at::Tensor& cell, const OptionalTensor& input_bias,
                                                         const OptionalTensor& hidden_bias) {
  auto parts = (with_bias(from_input, input_bias) + with_bias(from_hidden, hidden_bias)).chunk(4, 1);
  at::Tensor in = parts[0].sigmoid(), forget = parts[1].sigmoid(), next = parts[2].tanh(), out = parts[3].sigmoid();
  at::Tensor next_cell = forget * cell + in * next;
  return {out * next_cell.tanh(), next_cell, at::cat({in, forget, next, out}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(const OptionalTensor& of_hidden,
                                                                  const OptionalTensor& of_cell,
                                                                  const at::Tensor& cell, const at::Tensor& next_cell,
                                                                  const at::Tensor& workspace, bool has_bias) {
  if (!is_given(of_hidden) && !is_given(of_cell)) return {};
  auto parts = workspace.chunk(4, 1);
  const at::Tensor &in = parts[0], &forget = parts[1], &next = parts[2], &out = parts[3];
  at::Tensor grad = is_given(of_hidden) ? *of_hidden : at::zeros_like(cell), tanh = next_cell.tanh();
  at::Tensor grad_cell = grad * out * (1 - tanh * tanh);
  if (is_given(of_cell)) grad_cell = grad_cell + *of_cell;
  at::Tensor gates = at::cat({grad_cell * next * in * (1 - in), grad_cell * cell * forget * (1 - forget),
                              grad_cell * in * (1 - next * next), grad * tanh * out * (1 - out)},
                             1);
  return {gates, grad_cell * forget, has_bias ? gates.sum(0) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& from_input, const at::Tensor& from_hidden,
                                            const at::Tensor& hidden, const OptionalTensor& input_bias,
                                            const OptionalTensor& hidden_bias) {
  auto inputs = with_bias(from_input, input_bias).chunk(3, 1), hiddens = with_bias(from_hidden, hidden_bias).chunk(3, 1);
  at::Tensor reset = (inputs[0] + hiddens[0]).sigmoid(), update = (inputs[1] + hiddens[1]).sigmoid();
  at::Tensor next = (inputs[2] + reset * hiddens[2]).tanh();
  return {next + update * (hidden - next), at::cat({reset, update, next, hidden, hiddens[2]}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(const at::Tensor& grad,
                                                                                         const at::Tensor& workspace,
                                                                                         bool has_bias) {
  auto parts = workspace.chunk(5, 1);
  const at::Tensor &reset = parts[0], &update = parts[1], &next = parts[2], &hidden = parts[3];
  at::Tensor of_update = grad * (hidden - next) * update * (1 - update);
  at::Tensor of_next = grad * (1 - update) * (1 - next * next);
  at::Tensor of_reset = of_next * parts[4] * reset * (1 - reset);
  at::Tensor inputs = at::cat({of_reset, of_update, of_next}, 1);
  at::Tensor hiddens = at::cat({of_reset, of_update, of_next * reset}, 1);
  return {inputs, hiddens, grad * update, has_bias ? inputs.sum(0) : at::Tensor(),
          has_bias ? hiddens.sum(0) : at::Tensor()};
}

// The operator with this kernel for host tensors.
template <class Kernel>
torch::CppFunction on_host(Kernel kernel) {
  struct OnHost final : c10::OperatorKernel {
    c10::KernelFunction kernel;
    explicit OnHost(c10::KernelFunction own) : kernel(std::move(own)) {}
    void operator()(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
      HostCall().run(op, stack, [&] { kernel.callBoxed(op, kHostKeys, stack); });
    }
  };
  return torch::CppFunction::makeFromBoxedFunctor(
      std::make_unique<OnHost>(c10::KernelFunction::makeFromUnboxedRuntimeFunction(kernel)));
}

// As CUDA under autocast: in fp16 the gradient of a probability near 0 overflows.
at::Tensor refuse_binary_cross_entropy(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                       int64_t) {
  TORCH_CHECK(false, "binary_cross_entropy is unsafe to autocast; use binary_cross_entropy_with_logits");
}

// -- registration ------------------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { exchange_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange_device(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchange_device(device); }
  bool isPinnedPtr(const void* data) const override { return pinned_memory().contains(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  c10::Device getDeviceFromPtr(void* data) const override {
    std::lock_guard<std::mutex> hold(memory().mutex);
    auto found = memory().blocks.find(data);
    TORCH_CHECK(found != memory().blocks.end(), "the pointer is not the start of a block of the device");
    return {kDevice, found->second.device};
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current_device : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(*storage.unsafeGetStorageImpl(), bytes);
  }
};

// Makes the simulated accelerator the accelerator of this process.
void start(int devices, size_t capacity_bytes) {
  TORCH_CHECK(devices >= 1 && devices <= kMostDevices, "from 1 to ", kMostDevices, " devices, not ", devices);
  device_count = devices;
  for (int i = 0; i < devices; ++i) memory().set_capacity(static_cast<DeviceIndex>(i), capacity_bytes);
  c10::SetAllocator(kDevice, &memory());
  at::setHostAllocator(kDevice, &pinned_memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  static c10::impl::DeviceGuardImplRegistrar registrar(kDevice, new Guard);
  at::globalContext().lazyInitDevice(kDevice);
}

struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// PyTorch's collective for this key, which asks the process group for its backend of the device. The backend is
// gloo, which takes host tensors only.
struct Collective final : c10::OperatorKernel {
  c10::SafeKernelFunction kernel;

  explicit Collective(c10::SafeKernelFunction own) : kernel(std::move(own)) {}
  void operator()(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
    HostCall().run(op, stack, [&] { kernel.callBoxed(op, kDeviceKeys, stack); });
  }
};

// Lets gloo work on memory of the device. The kernels replace PyTorch's, of which PyTorch would warn.
void share_collectives() {
  auto& dispatcher = c10::Dispatcher::singleton();
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard quiet(&silence);
  static auto* library =
      new torch::Library(torch::Library::IMPL, "c10d", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::PrivateUse1)) {
    if (name.getNamespace() != std::string_view("c10d")) continue;
    auto kernel = dispatcher.findOp(name)->getComputedKernelForDispatchKey(DispatchKey::PrivateUse1);
    std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library->impl(full.c_str(),
                  torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Collective>(std::move(kernel))));
  }
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)
}  // namespace at::native

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &efficient_zeros);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, c10::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_type);
  m.impl("record_stream", &record_stream);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  m.impl("_thnn_fused_lstm_cell", on_host(&lstm_cell));
  m.impl("_thnn_fused_lstm_cell_backward_impl", on_host(&lstm_cell_backward));
  m.impl("_thnn_fused_gru_cell", on_host(&gru_cell));
  m.impl("_thnn_fused_gru_cell_backward", on_host(&gru_cell_backward));
  // Beside the CPU's kernel these have a composite one, which would win over the fallback and takes more memory.
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward", "addr",
                           "linalg__powsum", "native_channel_shuffle"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

// The kernel of these keys would resolve conjugates by a copy, and so call itself; the CPU's copy reads both bits.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// Autocast, with the lists that CUDA's autocast uses.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using at::Scalar;
  using at::ScalarType;
  using at::Tensor;
  using c10::IntArrayRef;
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
  m.impl("binary_cross_entropy", &refuse_binary_cross_entropy);
#undef LOWER_PRECISION
#undef FLOAT32
#undef FLOAT32_DTYPE
#undef WIDEST
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", &start);
  m.def("share_collectives", &share_collectives);
  m.def("device_count", [] { return device_count; });
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int index) { exchange_device(static_cast<DeviceIndex>(index)); });
  m.def("set_capacity", [](int index, size_t bytes) { memory().set_capacity(static_cast<DeviceIndex>(index), bytes); });
  m.def("set_fraction",
        [](int index, double fraction) { memory().set_fraction(static_cast<DeviceIndex>(index), fraction); });
  m.def("fraction", [](int index) { return memory().fraction(static_cast<DeviceIndex>(index)); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<DeviceIndex>(index)); });
  m.def("set_late_copies", [](bool on) { order().set_late(on); });
  m.def("pinned_bytes", [] {
    auto stats = pinned_memory().get_stats();
    return std::make_pair(stats.active_bytes.current, stats.active_bytes.peak);
  });
  m.def("reset_pinned_peak", [] { pinned_memory().reset_peak_stats(); });
}
