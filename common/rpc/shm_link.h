#ifndef CODISTILL_COMMON_RPC_SHM_LINK_H_
#define CODISTILL_COMMON_RPC_SHM_LINK_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace codistill {

// One end of a connection between two processes of one host and one user: slots of memory that both
// have mapped, and a Unix socket. A frame is copied once into a slot by its sender and read there
// by its receiver, who gives the slot back when done.
//
// Each direction has its own slots and two queues of slot numbers with one writer and one reader
// each: filled ones go forth, empty ones come back, in any order. A slow reader therefore stops the
// writer after so many slots, and nothing else grows. Who finds nothing to do spins for some tens
// of microseconds and then sleeps in poll() on the socket, through which the other rings; the
// kernel closes the socket when a process dies, so that its death is seen at once.
//
// The other process is not trusted. Every word it writes is read once, and checked against bounds
// and against what this end itself has recorded about its slots; a violation breaks the connection.
// What it may do is change the bytes of a frame while they are read: readers parse each byte once,
// or copy it. The memory cannot be cut short under us (F_SEAL_SHRINK).
//
// Threads: Acquire, Send, HasFreeSlot, Take, HasFrame, SetEnded and Wait by one thread at a time;
// Release and Shutdown by any.
class ShmLink {
 public:
  // Both directions together: 7.1 MiB. Half of a bulk frame is a slot, so that the reader begins
  // while the writer is at the second half; more slots do not stay in a core's caches.
  struct Geometry {
    uint32_t slots = 7;                        // in each direction; 3..16
    uint32_t slot_bytes = (512 << 10) + 4096;  // 4 KiB..4 MiB, in pages
  };

  enum class Kind : uint8_t {
    kCallStart = 1,
    kMessage = 2,     // a message goes on in the next frame; fills its slot to the end
    kMessageEnd = 3,  // last frame of a message
    kHalfClose = 4,
    kCallEnd = 5,
  };

  struct Frame {
    Kind kind = Kind::kMessage;
    uint32_t slot = 0;
    const uint8_t* data = nullptr;
    uint32_t bytes = 0;
  };
  struct Slot {
    uint32_t index = 0;
    uint8_t* data = nullptr;
  };
  // A frame begins at less than this from the start of its slot, where its writer likes it best.
  static constexpr uint32_t kMaxOffset = 4096;

  // The server's end, of an accepted socket; it makes the memory. PERMISSION_DENIED if the other
  // process has another user.
  static absl::StatusOr<std::shared_ptr<ShmLink>> Offer(int socket, const Geometry& geometry);
  // The client's end. `name`: of an abstract Unix socket.
  static absl::StatusOr<std::shared_ptr<ShmLink>> Connect(const std::string& name,
                                                          absl::Time deadline);
  ~ShmLink();
  ShmLink(const ShmLink&) = delete;
  ShmLink& operator=(const ShmLink&) = delete;

  const Geometry& geometry() const { return geometry_; }
  int peer_pid() const { return peer_pid_; }

  // ------------------------------------------------------------------------------------- sending

  bool HasFreeSlot();
  // False: none is free.
  bool Acquire(Slot* slot);
  // Hands over `bytes` at `offset` of an acquired slot.
  void Send(const Slot& slot, Kind kind, uint32_t offset, uint32_t bytes);

  // ----------------------------------------------------------------------------------- receiving

  bool HasFrame() const;
  // False: nothing has come. The frame's slot is the caller's until Release.
  bool Take(Frame* frame);
  void Release(uint32_t slot);
  // Slots taken and not released.
  uint32_t held() const;

  // Number of the newest call whose end the server has announced, so that a client that sends
  // learns of it although nobody takes its frames. A hint: the end itself is a frame.
  void SetEnded(uint64_t call);
  uint64_t ended() const;

  // ------------------------------------------------------------------------------------- waiting

  enum class Wake { kReady, kHangUp, kDeadline };
  // Until `ready()`, which is asked again whenever the other end has done something, or `other_fd`
  // (an eventfd; -1: none) was written to. kHangUp: the other end is gone, or this one was shut
  // down; what it sent before can still be taken.
  Wake Wait(absl::Time deadline, absl::FunctionRef<bool()> ready, int other_fd = -1);

  // Ends the connection for both ends.
  void Shutdown();
  // Whether the connection still stands, as far as the socket says; no system call but one.
  bool Alive() const;
  // Not OK once the other end has broken the rules; the connection is shut down then.
  absl::Status error() const;

  // How long Wait spins before it sleeps.
  static constexpr absl::Duration kSpin = absl::Microseconds(40);

 private:
  struct Queue;
  struct Control;

  ShmLink(int socket, const Geometry& geometry, bool server);
  static size_t MappedBytes(const Geometry& geometry);
  static absl::Status CheckGeometry(const Geometry& geometry);
  absl::Status CheckPeer();
  absl::Status Map(int memory);
  absl::Status SendMemory(int memory);
  void RefillFree();
  void Ring();
  void Break(const char* what);
  void DrainBells();

  const int socket_;
  const Geometry geometry_;
  const bool server_;
  int peer_pid_ = 0;
  uint8_t* mapping_ = nullptr;
  Control* control_ = nullptr;
  uint8_t* outgoing_slots_ = nullptr;
  uint8_t* incoming_slots_ = nullptr;

  // The sender's: slots in hand, and those handed over (true) and not yet back.
  std::vector<uint32_t> free_;
  std::vector<bool> out_;
  uint32_t sent_ = 0;      // own copy of the position in the filled queue
  uint32_t returned_ = 0;  // ... in the queue of empty ones
  uint32_t taken_ = 0;     // the receiver's
  bool broken_ = false;    // by the other end

  mutable Mutex mu_;
  std::vector<bool> held_ ABSL_GUARDED_BY(mu_);
  uint32_t num_held_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t released_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status error_ ABSL_GUARDED_BY(mu_);
};

// Listens on an abstract Unix socket of a random name. Thread-safe.
class ShmListener {
 public:
  static absl::StatusOr<std::unique_ptr<ShmListener>> Create();
  ~ShmListener();
  const std::string& name() const { return name_; }
  // Waits for the next connection; -1 once Stop was called. The caller owns what is returned.
  int Accept();
  void Stop();

 private:
  ShmListener(int socket, int stop, std::string name)
      : socket_(socket), stop_(stop), name_(std::move(name)) {}
  const int socket_;
  const int stop_;
  const std::string name_;
};

// This boot of this machine; empty if the system does not say.
std::string BootId();

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_SHM_LINK_H_
