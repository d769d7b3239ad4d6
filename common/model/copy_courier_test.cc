#include "common/model/copy_courier.h"

#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;

constexpr absl::Duration kLong = absl::Seconds(30);

// A device whose copies end when the test says so.
struct FakeCopy {
  absl::Notification ended;
  absl::Status status;
};

class CopyCourierTest : public testing::Test {
 protected:
  void Add(int i, FakeCopy* copy) {
    courier_.Add({[copy] {
                    copy->ended.WaitForNotification();
                    return copy->status;
                  },
                  [this, i] {
                    MutexLock lock(&mu_);
                    delivered_.push_back(i);
                  }});
  }
  bool AwaitDelivered(size_t count) {
    struct Wanted {
      const std::vector<int>* delivered;
      size_t count;
      bool Holds() const { return delivered->size() >= count; }
    } wanted{&delivered_, count};
    MutexLock lock(&mu_);
    return mu_.AwaitWithTimeout(absl::Condition(&wanted, &Wanted::Holds), kLong);
  }
  std::vector<int> Delivered() {
    MutexLock lock(&mu_);
    return delivered_;
  }

  Mutex mu_;
  std::vector<int> delivered_;
  CopyCourier courier_;
};

TEST_F(CopyCourierTest, HandsEachOverAsSoonAsItsCopyHasEndedWhileOthersAreUnderWay) {
  FakeCopy copies[3];
  for (int i = 0; i < 3; ++i) Add(i, &copies[i]);
  copies[0].ended.Notify();
  ASSERT_TRUE(AwaitDelivered(1));
  EXPECT_THAT(Delivered(), ElementsAre(0));
  // One behind does not overtake.
  copies[2].ended.Notify();
  EXPECT_THAT(Delivered(), ElementsAre(0));
  copies[1].ended.Notify();
  ASSERT_TRUE(courier_.Drain().ok());
  EXPECT_THAT(Delivered(), ElementsAre(0, 1, 2));
  // And again.
  FakeCopy more;
  Add(3, &more);
  more.ended.Notify();
  ASSERT_TRUE(courier_.Drain().ok());
  EXPECT_THAT(Delivered(), ElementsAre(0, 1, 2, 3));
}

TEST_F(CopyCourierTest, DrainOfNothingReturns) { EXPECT_TRUE(courier_.Drain().ok()); }

TEST_F(CopyCourierTest, AnErrorIsToldOnceAndWhatIsBehindItIsAwaitedButNotDelivered) {
  FakeCopy copies[3];
  copies[1].status = absl::UnavailableError("lost");
  for (int i = 0; i < 3; ++i) Add(i, &copies[i]);
  copies[0].ended.Notify();
  copies[1].ended.Notify();
  std::atomic<bool> drained = false;
  absl::Status status;
  std::thread drain([&] {
    status = courier_.Drain();
    drained = true;
  });
  ASSERT_TRUE(AwaitDelivered(1));
  EXPECT_FALSE(drained);  // the third still writes into its memory
  copies[2].ended.Notify();
  drain.join();
  EXPECT_EQ(status, absl::UnavailableError("lost"));
  EXPECT_THAT(Delivered(), ElementsAre(0));

  FakeCopy next;
  Add(3, &next);
  next.ended.Notify();
  EXPECT_TRUE(courier_.Drain().ok());
  EXPECT_THAT(Delivered(), ElementsAre(0, 3));
}

TEST(CopyCourier, EndsOnlyWhenAllCopiesHave) {
  FakeCopy copy;
  std::atomic<bool> ended = false;
  auto courier = std::make_unique<CopyCourier>();
  courier->Add({[&] {
                  copy.ended.WaitForNotification();
                  ended = true;
                  return absl::OkStatus();
                },
                [] {}});
  std::thread end([&] { copy.ended.Notify(); });
  courier.reset();
  EXPECT_TRUE(ended);
  end.join();
}

TEST(HeldBytesTest, WaitsForWhoeverHoldsThem) {
  HeldBytes bytes;
  EXPECT_TRUE(bytes.AwaitAtMost(0, absl::Now()));
  auto first = bytes.Hold(100);
  auto second = bytes.Hold(50);
  EXPECT_EQ(bytes.held(), 150);
  EXPECT_FALSE(bytes.AwaitAtMost(149, absl::Now() + absl::Milliseconds(1)));
  EXPECT_TRUE(bytes.AwaitAtMost(150, absl::Now()));
  std::thread lets_go([&] { first.reset(); });
  EXPECT_TRUE(bytes.AwaitAtMost(50, absl::Now() + kLong));
  lets_go.join();
  EXPECT_EQ(bytes.held(), 50);
}

TEST(HeldBytesTest, TokensMayOutliveIt) {
  std::shared_ptr<const void> token;
  {
    HeldBytes bytes;
    token = bytes.Hold(1);
  }
  token.reset();
}

}  // namespace
}  // namespace codistill
