#include "common/base/device.h"

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

TEST(DeviceTest, ReadsNames) {
  EXPECT_EQ(*ParseDevice("cpu"), kHostDevice);
  EXPECT_EQ(*ParseDevice("cuda:0"), 0);
  EXPECT_EQ(*ParseDevice("cuda:17"), 17);
  for (const int device : {kHostDevice, 0, 7, 1023}) {
    EXPECT_EQ(*ParseDevice(DeviceName(device)), device);
  }
}

TEST(DeviceTest, RefusesOtherNames) {
  for (const char* name : {"", "gpu", "CPU", "cpu:0", "cuda", "cuda:", "cuda:-1", "cuda:+1",
                           "cuda: 1", "cuda:1 ", "cuda:01", "cuda:1024", "cuda:99999999999"}) {
    const auto device = ParseDevice(name);
    ASSERT_TRUE(absl::IsInvalidArgument(device.status())) << name;
    EXPECT_THAT(std::string(device.status().message()), HasSubstr("cpu or cuda:N would be right"));
    EXPECT_THAT(std::string(device.status().message()), HasSubstr(name));
  }
}

}  // namespace
}  // namespace codistill
