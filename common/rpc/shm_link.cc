#include "common/rpc/shm_link.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <new>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr uint64_t kMagic = 0x636f64692e73686d;  // "codi.shm"
constexpr uint32_t kLayoutVersion = 1;
constexpr uint32_t kQueueEntries = 16;  // at least as many as slots: a queue is never full
constexpr size_t kPage = 4096;

// What the server says when it hands over the memory.
struct Welcome {
  uint64_t magic = kMagic;
  uint32_t version = kLayoutVersion;
  uint32_t slots = 0;
  uint32_t slot_bytes = 0;
  uint32_t reserved = 0;
};

// A frame in a queue: kind, slot, offset, bytes, in one word that is read at once.
uint64_t Pack(ShmLink::Kind kind, uint32_t slot, uint32_t offset, uint32_t bytes) {
  return uint64_t{static_cast<uint8_t>(kind)} << 56 | uint64_t{slot} << 48 |
         uint64_t{offset} << 32 | bytes;
}

void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

absl::Status SystemError(const char* what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

int Milliseconds(absl::Time deadline) {
  if (deadline == absl::InfiniteFuture()) return -1;
  const absl::Duration left = std::max(deadline - absl::Now(), absl::ZeroDuration());
  return static_cast<int>(std::min<int64_t>(
      absl::ToInt64Milliseconds(left + absl::Milliseconds(1) - absl::Nanoseconds(1)), 1 << 30));
}

sockaddr_un AbstractAddress(const std::string& name, socklen_t* size) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

// Closes it unless it was released.
class OwnedFd {
 public:
  explicit OwnedFd(int fd) : fd_(fd) {}
  ~OwnedFd() {
    if (fd_ >= 0) close(fd_);
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

}  // namespace

// One writer, one reader. Positions count up and wrap; an entry is at position % kQueueEntries.
struct ShmLink::Queue {
  alignas(64) std::atomic<uint32_t> written;
  alignas(64) std::atomic<uint64_t> entries[kQueueEntries];
};

// First pages of the memory. Each word has one process that writes it, `sleeping` excepted.
struct ShmLink::Control {
  Queue filled[2];  // by direction: 0 = from client to server
  Queue empty[2];   // of that direction's slots, on their way back
  struct alignas(64) Flag {
    std::atomic<uint32_t> set;
  };
  Flag sleeping[2];  // 0 = the client
  alignas(64) std::atomic<uint64_t> ended;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free, "words are shared between processes");

size_t ShmLink::MappedBytes(const Geometry& geometry) {
  const size_t control = (sizeof(Control) + kPage - 1) / kPage * kPage;
  return control + size_t{2} * geometry.slots * geometry.slot_bytes;
}

absl::Status ShmLink::CheckGeometry(const Geometry& geometry) {
  if (geometry.slots < 3 || geometry.slots > kQueueEntries || geometry.slot_bytes < kPage ||
      geometry.slot_bytes > (4u << 20) || geometry.slot_bytes % kPage != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("shared memory of ", geometry.slots, " slots of ", geometry.slot_bytes,
                     " bytes; 3 to 16 slots of whole pages up to 4 MiB are possible"));
  }
  return absl::OkStatus();
}

ShmLink::ShmLink(int socket, const Geometry& geometry, bool server)
    : socket_(socket),
      geometry_(geometry),
      server_(server),
      out_(geometry.slots, false),
      held_(geometry.slots, false) {
  for (uint32_t i = 0; i < geometry.slots; ++i) free_.push_back(geometry.slots - 1 - i);
}

ShmLink::~ShmLink() {
  if (mapping_ != nullptr) munmap(mapping_, MappedBytes(geometry_));
  close(socket_);
}

absl::Status ShmLink::CheckPeer() {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (getsockopt(socket_, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return SystemError("getsockopt(SO_PEERCRED)");
  }
  peer_pid_ = peer.pid;
  if (peer.uid != geteuid()) {
    return absl::PermissionDeniedError(
        absl::StrCat("shared memory with user ", peer.uid, "; only with our own, ", geteuid()));
  }
  return absl::OkStatus();
}

absl::Status ShmLink::Map(int memory) {
  const size_t bytes = MappedBytes(geometry_);
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (mapped == MAP_FAILED) return SystemError("mmap of shared memory");
  mapping_ = static_cast<uint8_t*>(mapped);
  // The memory begins as zeros, which is what all words begin as.
  control_ = reinterpret_cast<Control*>(mapping_);
  uint8_t* const from_client = mapping_ + (sizeof(Control) + kPage - 1) / kPage * kPage;
  uint8_t* const from_server = from_client + size_t{geometry_.slots} * geometry_.slot_bytes;
  outgoing_slots_ = server_ ? from_server : from_client;
  incoming_slots_ = server_ ? from_client : from_server;
  return absl::OkStatus();
}

absl::Status ShmLink::SendMemory(int memory) {
  Welcome welcome;
  welcome.slots = geometry_.slots;
  welcome.slot_bytes = geometry_.slot_bytes;
  iovec data = {&welcome, sizeof(welcome)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &memory, sizeof(memory));
  if (sendmsg(socket_, &message, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof(welcome)) {
    return SystemError("handing over shared memory");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<ShmLink>> ShmLink::Offer(int socket, const Geometry& geometry) {
  std::shared_ptr<ShmLink> link(new ShmLink(socket, geometry, /*server=*/true));
  CODISTILL_RETURN_IF_ERROR(CheckGeometry(geometry));
  CODISTILL_RETURN_IF_ERROR(link->CheckPeer());
  const OwnedFd memory(memfd_create("codistill-link", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (memory.get() < 0) return SystemError("memfd_create");
  if (ftruncate(memory.get(), static_cast<off_t>(MappedBytes(geometry))) != 0) {
    return SystemError("size of shared memory");
  }
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return SystemError("sealing shared memory");
  }
  CODISTILL_RETURN_IF_ERROR(link->Map(memory.get()));
  CODISTILL_RETURN_IF_ERROR(link->SendMemory(memory.get()));
  return link;
}

absl::StatusOr<std::shared_ptr<ShmLink>> ShmLink::Connect(const std::string& name,
                                                          absl::Time deadline) {
  if (name.empty() || name.size() > sizeof(sockaddr_un::sun_path) - 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a socket name of ", name.size(), " bytes; 1 to ",
                     sizeof(sockaddr_un::sun_path) - 1, " are possible"));
  }
  OwnedFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket.get() < 0) return SystemError("socket");
  socklen_t size = 0;
  const sockaddr_un address = AbstractAddress(name, &size);
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    return SystemError("connect");
  }
  pollfd wait = {socket.get(), POLLIN, 0};
  if (poll(&wait, 1, Milliseconds(deadline)) != 1) {
    return absl::DeadlineExceededError("no shared memory was offered in time");
  }
  Welcome welcome;
  iovec data = {&welcome, sizeof(welcome)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t received = recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  const cmsghdr* const header = received < 0 ? nullptr : CMSG_FIRSTHDR(&message);
  int fd = -1;
  if (header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
      header->cmsg_len == CMSG_LEN(sizeof(int))) {
    std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
  }
  const OwnedFd memory(fd);
  if (received != sizeof(welcome) || fd < 0 || welcome.magic != kMagic ||
      welcome.version != kLayoutVersion) {
    return absl::UnavailableError("the other end offers no shared memory of our layout");
  }
  Geometry geometry;
  geometry.slots = welcome.slots;
  geometry.slot_bytes = welcome.slot_bytes;
  CODISTILL_RETURN_IF_ERROR(CheckGeometry(geometry));
  // Memory that could become smaller would kill whoever reads beyond its end.
  struct stat file = {};
  if (fstat(memory.get(), &file) != 0) return SystemError("fstat of shared memory");
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 ||
      static_cast<size_t>(file.st_size) != MappedBytes(geometry)) {
    return absl::UnavailableError("the shared memory offered is not sealed, or not of its size");
  }
  std::shared_ptr<ShmLink> link(new ShmLink(socket.release(), geometry, /*server=*/false));
  CODISTILL_RETURN_IF_ERROR(link->CheckPeer());
  CODISTILL_RETURN_IF_ERROR(link->Map(memory.get()));
  return link;
}

void ShmLink::Break(const char* what) {
  broken_ = true;
  {
    MutexLock lock(&mu_);
    if (error_.ok()) {
      error_ = absl::UnavailableError(
          absl::StrCat("process ", peer_pid_, " broke the rules of shared memory: ", what));
    }
  }
  Shutdown();
}

absl::Status ShmLink::error() const {
  MutexLock lock(&mu_);
  return error_;
}

void ShmLink::RefillFree() {
  Queue& empty = control_->empty[server_ ? 1 : 0];
  const uint32_t written = empty.written.load(std::memory_order_acquire);
  if (written - returned_ > geometry_.slots) return Break("more slots came back than there are");
  while (returned_ != written) {
    const uint64_t slot = empty.entries[returned_ % kQueueEntries].load(std::memory_order_relaxed);
    ++returned_;
    if (slot >= geometry_.slots || !out_[slot]) return Break("a slot came back that was not out");
    out_[slot] = false;
    free_.push_back(static_cast<uint32_t>(slot));
  }
}

bool ShmLink::HasFreeSlot() {
  if (free_.empty() && !broken_) RefillFree();
  return !free_.empty();
}

bool ShmLink::Acquire(Slot* slot) {
  if (!HasFreeSlot()) return false;
  // The one that came back last is the likeliest to be in a cache.
  slot->index = free_.back();
  slot->data = outgoing_slots_ + size_t{slot->index} * geometry_.slot_bytes;
  free_.pop_back();
  return true;
}

void ShmLink::Send(const Slot& slot, Kind kind, uint32_t offset, uint32_t bytes) {
  out_[slot.index] = true;
  Queue& filled = control_->filled[server_ ? 1 : 0];
  filled.entries[sent_ % kQueueEntries].store(Pack(kind, slot.index, offset, bytes),
                                              std::memory_order_relaxed);
  filled.written.store(++sent_, std::memory_order_seq_cst);
  Ring();
}

bool ShmLink::HasFrame() const {
  return !broken_ &&
         control_->filled[server_ ? 0 : 1].written.load(std::memory_order_seq_cst) != taken_;
}

bool ShmLink::Take(Frame* frame) {
  if (broken_) return false;
  Queue& filled = control_->filled[server_ ? 0 : 1];
  const uint32_t written = filled.written.load(std::memory_order_acquire);
  if (written == taken_) return false;
  if (written - taken_ > geometry_.slots) {
    Break("more frames than slots");
    return false;
  }
  const uint64_t entry = filled.entries[taken_ % kQueueEntries].load(std::memory_order_relaxed);
  const auto kind = static_cast<uint8_t>(entry >> 56);
  const auto slot = static_cast<uint8_t>(entry >> 48);
  const auto offset = static_cast<uint16_t>(entry >> 32);
  const auto bytes = static_cast<uint32_t>(entry);
  if (kind < static_cast<uint8_t>(Kind::kCallStart) ||
      kind > static_cast<uint8_t>(Kind::kCallEnd) || slot >= geometry_.slots ||
      offset >= kMaxOffset || bytes > geometry_.slot_bytes - offset) {
    Break("a frame outside its slot");
    return false;
  }
  // Else a message could be made of millions of frames, each of which costs us memory.
  if (kind == static_cast<uint8_t>(Kind::kMessage) && offset + bytes != geometry_.slot_bytes) {
    Break("a frame that is not the last of its message and does not fill its slot");
    return false;
  }
  bool already_held;
  {
    MutexLock lock(&mu_);
    already_held = held_[slot];
    if (!already_held) {
      held_[slot] = true;
      ++num_held_;
    }
  }
  if (already_held) {
    Break("a slot was sent that had not been given back");
    return false;
  }
  ++taken_;
  frame->kind = static_cast<Kind>(kind);
  frame->slot = slot;
  frame->data = incoming_slots_ + size_t{slot} * geometry_.slot_bytes + offset;
  frame->bytes = bytes;
  return true;
}

void ShmLink::Release(uint32_t slot) {
  {
    MutexLock lock(&mu_);
    held_[slot] = false;
    --num_held_;
    Queue& empty = control_->empty[server_ ? 0 : 1];
    empty.entries[released_ % kQueueEntries].store(slot, std::memory_order_relaxed);
    empty.written.store(++released_, std::memory_order_seq_cst);
  }
  Ring();
}

uint32_t ShmLink::held() const {
  MutexLock lock(&mu_);
  return num_held_;
}

void ShmLink::SetEnded(uint64_t call) {
  control_->ended.store(call, std::memory_order_seq_cst);
  Ring();
}

uint64_t ShmLink::ended() const { return control_->ended.load(std::memory_order_seq_cst); }

// Whoever goes to sleep says so, then looks once more; whoever has done something looks whether the
// other sleeps. All four in one order (seq_cst), so that one of them sees the other.
void ShmLink::Ring() {
  std::atomic<uint32_t>& sleeping = control_->sleeping[server_ ? 0 : 1].set;
  if (sleeping.load(std::memory_order_seq_cst) == 0) return;
  if (sleeping.exchange(0, std::memory_order_seq_cst) == 0) return;
  const char bell = 1;
  // A full socket means that bells enough are waiting there.
  if (send(socket_, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) return;
}

void ShmLink::DrainBells() {
  char bells[64];
  // A packet a bell; a peer that floods us gets no more than this at a time.
  for (int i = 0; i < 64 && recv(socket_, bells, sizeof(bells), MSG_DONTWAIT) > 0; ++i) {
  }
}

ShmLink::Wake ShmLink::Wait(absl::Time deadline, absl::FunctionRef<bool()> ready, int other_fd) {
  static const bool spins = std::thread::hardware_concurrency() > 1;
  if (ready()) return Wake::kReady;
  if (spins) {
    const auto until = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(kSpin);
    do {
      for (int i = 0; i < 8; ++i) {
        Relax();
        if (ready()) return Wake::kReady;
      }
    } while (std::chrono::steady_clock::now() < until);
  }
  std::atomic<uint32_t>& sleeping = control_->sleeping[server_ ? 1 : 0].set;
  while (true) {
    sleeping.store(1, std::memory_order_seq_cst);
    if (ready()) {
      sleeping.store(0, std::memory_order_seq_cst);
      return Wake::kReady;
    }
    pollfd fds[2] = {{socket_, POLLIN | POLLRDHUP, 0}, {other_fd, POLLIN, 0}};
    const int events = poll(fds, other_fd < 0 ? 1 : 2, Milliseconds(deadline));
    sleeping.store(0, std::memory_order_seq_cst);
    if (ready()) return Wake::kReady;
    if (events > 0 && (fds[0].revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL)) != 0) {
      return Wake::kHangUp;
    }
    if (events > 0 && (fds[0].revents & POLLIN) != 0) DrainBells();
    if (other_fd >= 0 && events > 0 && (fds[1].revents & POLLIN) != 0) {
      uint64_t count;
      if (read(other_fd, &count, sizeof(count)) < 0 && errno != EAGAIN) return Wake::kHangUp;
      if (ready()) return Wake::kReady;
    }
    if (absl::Now() >= deadline) return Wake::kDeadline;
  }
}

void ShmLink::Shutdown() { shutdown(socket_, SHUT_RDWR); }

bool ShmLink::Alive() const {
  pollfd fd = {socket_, POLLRDHUP, 0};
  return poll(&fd, 1, 0) == 0;
}

absl::StatusOr<std::unique_ptr<ShmListener>> ShmListener::Create() {
  std::random_device random;
  const std::string name =
      absl::StrFormat("codistill-%08x%08x%08x%08x", random(), random(), random(), random());
  OwnedFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket.get() < 0) return SystemError("socket");
  socklen_t size = 0;
  const sockaddr_un address = AbstractAddress(name, &size);
  if (bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    return SystemError("bind");
  }
  if (listen(socket.get(), 64) != 0) return SystemError("listen");
  OwnedFd stop(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (stop.get() < 0) return SystemError("eventfd");
  return std::unique_ptr<ShmListener>(new ShmListener(socket.release(), stop.release(), name));
}

ShmListener::~ShmListener() {
  close(socket_);
  close(stop_);
}

int ShmListener::Accept() {
  while (true) {
    pollfd fds[2] = {{socket_, POLLIN, 0}, {stop_, POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) return -1;
    if (fds[1].revents != 0) return -1;
    if (fds[0].revents == 0) continue;
    const int accepted = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (accepted >= 0) return accepted;
    // Out of descriptors, say: it will be asked again, but not at once.
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      pollfd stop = {stop_, POLLIN, 0};
      poll(&stop, 1, 100);
    }
  }
}

void ShmListener::Stop() {
  const uint64_t one = 1;
  if (write(stop_, &one, sizeof(one)) < 0) return;
}

std::string BootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

}  // namespace codistill
