// Links between two threads and between two processes, whole and broken ones.

#include "common/rpc/shm_link.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using Kind = ShmLink::Kind;
using Wake = ShmLink::Wake;

absl::Time In(double seconds) { return absl::Now() + absl::Seconds(seconds); }

constexpr ShmLink::Geometry kSmall = {/*slots=*/3, /*slot_bytes=*/4096};

// Deterministic content of the `n`-th frame.
uint32_t FrameBytes(int n) { return n % 4097; }
uint8_t ByteOf(int n, uint32_t i) { return static_cast<uint8_t>(n * 131 + i * 7); }

// Sends frames [0, count); true if all went out.
bool SendFrames(ShmLink* link, int count, absl::Time deadline) {
  for (int n = 0; n < count; ++n) {
    ShmLink::Slot slot;
    while (!link->Acquire(&slot)) {
      if (link->Wait(deadline, [&] { return link->HasFreeSlot(); }) != Wake::kReady) return false;
    }
    const uint32_t bytes = FrameBytes(n);
    for (uint32_t i = 0; i < bytes; ++i) slot.data[i] = ByteOf(n, i);
    link->Send(slot, Kind::kMessageEnd, 0, bytes);
  }
  return true;
}

// Takes `count` frames and checks them; the number of good ones.
int ReceiveFrames(ShmLink* link, int count, absl::Time deadline) {
  for (int n = 0; n < count; ++n) {
    ShmLink::Frame frame;
    while (!link->Take(&frame)) {
      if (link->Wait(deadline, [&] { return link->HasFrame(); }) != Wake::kReady) return n;
    }
    bool right = frame.kind == Kind::kMessageEnd && frame.bytes == FrameBytes(n);
    for (uint32_t i = 0; right && i < frame.bytes; ++i) right = frame.data[i] == ByteOf(n, i);
    link->Release(frame.slot);
    if (!right) return n;
  }
  return count;
}

struct Pair {
  std::shared_ptr<ShmLink> server, client;
};

Pair Connect(const ShmLink::Geometry& geometry = kSmall) {
  Pair pair;
  auto listener = ShmListener::Create();
  EXPECT_TRUE(listener.ok()) << listener.status();
  std::thread accept([&] {
    auto link = ShmLink::Offer((*listener)->Accept(), geometry);
    EXPECT_TRUE(link.ok()) << link.status();
    pair.server = *std::move(link);
  });
  auto link = ShmLink::Connect((*listener)->name(), In(20));
  EXPECT_TRUE(link.ok()) << link.status();
  pair.client = *std::move(link);
  accept.join();
  return pair;
}

TEST(ShmLinkTest, FramesArriveInOrderBothWaysAndSlotsGoRound) {
  Pair pair = Connect();
  EXPECT_EQ(pair.client->peer_pid(), getpid());
  std::thread other([&] {
    EXPECT_EQ(ReceiveFrames(pair.server.get(), 20000, In(60)), 20000);
    EXPECT_TRUE(SendFrames(pair.server.get(), 20000, In(60)));
  });
  EXPECT_TRUE(SendFrames(pair.client.get(), 20000, In(60)));
  EXPECT_EQ(ReceiveFrames(pair.client.get(), 20000, In(60)), 20000);
  other.join();
  EXPECT_TRUE(pair.client->error().ok());
  EXPECT_TRUE(pair.server->error().ok());
}

TEST(ShmLinkTest, ASenderStopsAtItsSlots) {
  Pair pair = Connect();
  ShmLink::Slot slot;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(pair.client->Acquire(&slot));
    pair.client->Send(slot, Kind::kMessageEnd, 0, 1);
  }
  EXPECT_FALSE(pair.client->Acquire(&slot));
  const absl::Time begin = absl::Now();
  EXPECT_EQ(pair.client->Wait(In(0.05), [&] { return pair.client->HasFreeSlot(); }),
            Wake::kDeadline);
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(50));
  // Slots come back in any order, from any thread.
  ShmLink::Frame frames[3];
  for (ShmLink::Frame& frame : frames) ASSERT_TRUE(pair.server->Take(&frame));
  EXPECT_EQ(pair.server->held(), 3u);
  std::thread([&] { pair.server->Release(frames[1].slot); }).join();
  EXPECT_EQ(pair.client->Wait(In(20), [&] { return pair.client->HasFreeSlot(); }), Wake::kReady);
  ASSERT_TRUE(pair.client->Acquire(&slot));
  EXPECT_EQ(slot.index, frames[1].slot);
  EXPECT_FALSE(pair.client->HasFreeSlot());
}

TEST(ShmLinkTest, AnotherThreadsShutdownWakesWhoeverWaitsAndTheOtherEnd) {
  Pair pair = Connect();
  std::thread shutdown([&] { pair.client->Shutdown(); });
  EXPECT_EQ(pair.client->Wait(absl::InfiniteFuture(), [] { return false; }), Wake::kHangUp);
  EXPECT_EQ(pair.server->Wait(absl::InfiniteFuture(), [] { return false; }), Wake::kHangUp);
  EXPECT_FALSE(pair.server->Alive());
  shutdown.join();
}

TEST(ShmLinkTest, WhatWasSentBeforeAHangUpCanBeTaken) {
  Pair pair = Connect();
  ASSERT_TRUE(SendFrames(pair.client.get(), 2, In(20)));
  pair.client.reset();
  EXPECT_EQ(ReceiveFrames(pair.server.get(), 3, In(20)), 2);
}

TEST(ShmLinkTest, NamesNobodyListensAtAreRefused) {
  EXPECT_FALSE(ShmLink::Connect("codistill-nobody", In(1)).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(ShmLink::Connect("", In(1)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ShmLink::Connect(std::string(200, 'x'), In(1)).status()));
}

TEST(ShmLinkTest, AListenerThatSaysNothingIsGivenUp) {
  auto listener = ShmListener::Create();
  ASSERT_TRUE(listener.ok());
  EXPECT_TRUE(absl::IsDeadlineExceeded(ShmLink::Connect((*listener)->name(), In(0.05)).status()));
}

TEST(ShmListenerTest, StopEndsAccept) {
  auto listener = ShmListener::Create();
  ASSERT_TRUE(listener.ok());
  std::thread stop([&] { (*listener)->Stop(); });
  EXPECT_EQ((*listener)->Accept(), -1);
  stop.join();
}

// Runs `body` in a process of its own, with a client's end.
pid_t Fork(const std::string& name, const std::function<void(ShmLink*)>& body) {
  const pid_t child = fork();
  if (child != 0) return child;
  auto link = ShmLink::Connect(name, In(20));
  if (!link.ok()) _exit(1);
  body(link->get());
  _exit(0);
}

struct WithChild {
  std::shared_ptr<ShmLink> server;
  pid_t child = 0;

  explicit WithChild(const std::function<void(ShmLink*)>& body) {
    auto listener = ShmListener::Create();
    EXPECT_TRUE(listener.ok());
    child = Fork((*listener)->name(), body);
    auto link = ShmLink::Offer((*listener)->Accept(), kSmall);
    EXPECT_TRUE(link.ok()) << link.status();
    server = *std::move(link);
    EXPECT_EQ(server->peer_pid(), child);
  }
  ~WithChild() {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
};

TEST(ShmLinkProcessTest, TwoProcessesExchangeFrames) {
  WithChild two([](ShmLink* link) {
    if (ReceiveFrames(link, 5000, In(60)) != 5000) _exit(2);
    if (!SendFrames(link, 5000, In(60))) _exit(3);
    // Until the other has everything.
    link->Wait(In(60), [] { return false; });
  });
  EXPECT_TRUE(SendFrames(two.server.get(), 5000, In(60)));
  EXPECT_EQ(ReceiveFrames(two.server.get(), 5000, In(60)), 5000);
}

TEST(ShmLinkProcessTest, AReceiverHearsAtOnceOfASenderThatWasKilled) {
  WithChild two([](ShmLink* link) {
    SendFrames(link, 3, In(20));
    ShmLink::Slot slot;
    link->Wait(In(60), [&] { return link->HasFreeSlot(); });
    link->Acquire(&slot);
    std::memset(slot.data, 1, 100);  // in the middle of a frame
    link->Send(slot, Kind::kMessageEnd, 0, 100);
    pause();
  });
  EXPECT_EQ(ReceiveFrames(two.server.get(), 3, In(20)), 3);
  ShmLink::Frame frame;
  EXPECT_EQ(two.server->Wait(In(20), [&] { return two.server->Take(&frame); }), Wake::kReady);
  kill(two.child, SIGKILL);
  const absl::Time begin = absl::Now();
  EXPECT_EQ(two.server->Wait(In(60), [&] { return two.server->HasFrame(); }), Wake::kHangUp);
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
}

TEST(ShmLinkProcessTest, ASenderHearsAtOnceOfAReceiverThatWasKilled) {
  WithChild two([](ShmLink*) { pause(); });
  std::thread killer([&] { kill(two.child, SIGKILL); });
  EXPECT_FALSE(SendFrames(two.server.get(), 1000, In(60)));
  EXPECT_FALSE(two.server->HasFreeSlot());
  killer.join();
}

// ------------------------------------------------------- a client that writes what it pleases

// The client's memory, mapped once more, by the layout of shm_link.cc: queues of 64 bytes of
// position and 128 of entries; of filled frames from the client, from the server, of empty slots
// likewise.
class Evil {
 public:
  Evil() {
    int sockets[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets), 0);
    socket_ = sockets[1];
    auto link = ShmLink::Offer(sockets[0], kSmall);
    EXPECT_TRUE(link.ok()) << link.status();
    server = *std::move(link);
    char welcome[64];
    iovec data = {welcome, sizeof(welcome)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    EXPECT_GT(recvmsg(socket_, &message, 0), 0);
    std::memcpy(&memory, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(memory));
    mapped_ =
        static_cast<uint8_t*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0));
    EXPECT_NE(static_cast<void*>(mapped_), MAP_FAILED);
  }
  ~Evil() {
    munmap(mapped_, 4096);
    close(memory);
    close(socket_);
  }

  void SetFilled(uint32_t written) { std::memcpy(mapped_, &written, sizeof(written)); }
  void SetEntry(int i, uint64_t entry) { std::memcpy(mapped_ + 64 + 8 * i, &entry, 8); }
  void SetEmpty(uint32_t written) { std::memcpy(mapped_ + 3 * 192, &written, sizeof(written)); }
  void SetEmptyEntry(int i, uint64_t slot) {
    std::memcpy(mapped_ + 3 * 192 + 64 + 8 * i, &slot, 8);
  }
  void ExpectBroken(const char* why) {
    EXPECT_NE(server->error().message().find(why), absl::string_view::npos) << server->error();
    EXPECT_FALSE(server->HasFrame());
    EXPECT_EQ(server->Wait(In(20), [&] { return server->HasFrame(); }), Wake::kHangUp);
  }

  std::shared_ptr<ShmLink> server;
  int memory = -1;

 private:
  int socket_ = -1;
  uint8_t* mapped_ = nullptr;
};

constexpr uint64_t Entry(uint64_t kind, uint64_t slot, uint64_t offset, uint64_t bytes) {
  return kind << 56 | slot << 48 | offset << 32 | bytes;
}

TEST(ShmLinkEvilTest, TheMemoryCannotBeCutShort) {
  Evil evil;
  EXPECT_NE(ftruncate(evil.memory, 0), 0);
  EXPECT_NE(fcntl(evil.memory, F_ADD_SEALS, F_SEAL_WRITE), 0);
}

TEST(ShmLinkEvilTest, AHonestFrameIsTaken) {
  Evil evil;
  evil.SetEntry(0, Entry(3, 2, 64, 100));
  evil.SetFilled(1);
  ShmLink::Frame frame;
  ASSERT_TRUE(evil.server->Take(&frame));
  EXPECT_EQ(frame.slot, 2u);
  EXPECT_EQ(frame.bytes, 100u);
  EXPECT_TRUE(evil.server->error().ok());
}

TEST(ShmLinkEvilTest, FramesOutsideTheirSlotsBreakTheLink) {
  const uint64_t entries[] = {
      Entry(3, 3, 0, 1),           // slot
      Entry(3, 255, 0, 1),         //
      Entry(3, 0, 0, 4097),        // length
      Entry(3, 0, 1, 4096),        //
      Entry(3, 0, 0, 0xffffffff),  //
      Entry(3, 0, 4096, 0),        // offset
      Entry(3, 0, 65535, 1),       //
      Entry(0, 0, 0, 1),           // kind
      Entry(6, 0, 0, 1),           //
      Entry(255, 0, 0, 1),         //
      Entry(2, 0, 0, 1),           // goes on, but does not fill its slot
  };
  for (const uint64_t entry : entries) {
    SCOPED_TRACE(entry);
    Evil evil;
    evil.SetEntry(0, entry);
    evil.SetFilled(1);
    ShmLink::Frame frame;
    EXPECT_FALSE(evil.server->Take(&frame));
    evil.ExpectBroken("fr");
    EXPECT_EQ(evil.server->held(), 0u);
  }
}

TEST(ShmLinkEvilTest, PositionsOutsideTheQueueBreakTheLink) {
  for (const uint32_t written : {4u, 17u, 0x7fffffffu, 0xffffffffu}) {
    Evil evil;
    evil.SetFilled(written);
    ShmLink::Frame frame;
    EXPECT_FALSE(evil.server->Take(&frame));
    evil.ExpectBroken("more frames");
  }
}

TEST(ShmLinkEvilTest, ASlotSentTwiceBreaksTheLink) {
  Evil evil;
  evil.SetEntry(0, Entry(3, 1, 0, 10));
  evil.SetEntry(1, Entry(3, 1, 0, 10));
  evil.SetFilled(2);
  ShmLink::Frame frame;
  EXPECT_TRUE(evil.server->Take(&frame));
  EXPECT_FALSE(evil.server->Take(&frame));
  evil.ExpectBroken("not been given back");
  evil.server->Release(1);
  EXPECT_EQ(evil.server->held(), 0u);
}

TEST(ShmLinkEvilTest, SlotsThatNeverWentOutDoNotComeBack) {
  for (const uint64_t slot : {uint64_t{0}, uint64_t{3}, ~uint64_t{0}}) {
    Evil evil;
    ShmLink::Slot taken;
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(evil.server->Acquire(&taken));
    evil.SetEmptyEntry(0, slot);
    evil.SetEmpty(1);
    EXPECT_FALSE(evil.server->Acquire(&taken));
    evil.ExpectBroken("came back");
  }
  Evil evil;
  ShmLink::Slot taken;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(evil.server->Acquire(&taken));
  evil.SetEmpty(4);
  EXPECT_FALSE(evil.server->Acquire(&taken));
  evil.ExpectBroken("came back");
}

TEST(ShmLinkEvilTest, BellsWithoutNewsDoNotEndAWaitEarly) {
  Pair pair = Connect();
  std::atomic<bool> stop{false};
  std::thread flood([&] {
    // Rings although nothing has happened.
    while (!stop.load()) pair.client->SetEnded(0);
  });
  const absl::Time begin = absl::Now();
  EXPECT_EQ(pair.server->Wait(In(0.2), [&] { return pair.server->HasFrame(); }), Wake::kDeadline);
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(200));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  stop.store(true);
  flood.join();
}

}  // namespace
}  // namespace codistill
