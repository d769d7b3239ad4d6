#include "cuda/row_topk_cuda.h"

#include <cmath>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "cuda/testing/device_array.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

class RowTopKCudaTest : public DeviceTest {
 protected:
  struct Answer {
    absl::Status status;
    std::vector<int32_t> index;
    std::vector<float> value, tail;
    int64_t bad_row = -1;
  };

  static RowTopKInputs Inputs(const std::vector<float>& logits, int64_t rows, int64_t k,
                              double temperature = 1) {
    RowTopKInputs inputs;
    inputs.logits = logits.data();
    inputs.rows = rows;
    inputs.classes = static_cast<int64_t>(logits.size()) / rows;
    inputs.k = k;
    inputs.temperature = temperature;
    return inputs;
  }

  static Answer OnDevice(const std::vector<float>& logits, RowTopKInputs inputs,
                         size_t offset = 0) {
    const DeviceArray<float> device_logits(logits, offset);
    const DeviceArray<int32_t> index(inputs.rows * inputs.k);
    const DeviceArray<float> value(inputs.rows * inputs.k), tail(inputs.rows);
    const Workspace workspace(kRowTopKWorkspaceBytes);
    inputs.logits = device_logits.get();
    RowTopKOutputs outputs;
    outputs.index = index.get();
    outputs.value = value.get();
    outputs.tail = tail.get();
    Answer answer;
    answer.status = LaunchRowTopK(inputs, outputs, workspace.get(), nullptr);
    EXPECT_TRUE(answer.status.ok()) << answer.status;
    answer.status = FinishRowTopK(workspace.get(), nullptr, &answer.bad_row);
    answer.index = index.Fetch();
    answer.value = value.Fetch();
    answer.tail = tail.Fetch();
    EXPECT_TRUE(index.NothingBehind() && value.NothingBehind() && tail.NothingBehind());
    return answer;
  }

  static Answer OnCpu(const RowTopKInputs& inputs) {
    Answer answer;
    answer.index.resize(inputs.rows * inputs.k);
    answer.value.resize(inputs.rows * inputs.k);
    answer.tail.resize(inputs.rows);
    RowTopKOutputs outputs;
    outputs.index = answer.index.data();
    outputs.value = answer.value.data();
    outputs.tail = answer.tail.data();
    answer.status = RowTopKCpu(inputs, outputs, 1);
    return answer;
  }

  static void ExpectAgree(const std::vector<float>& logits, const RowTopKInputs& inputs,
                          size_t offset = 0) {
    const Answer want = OnCpu(inputs), got = OnDevice(logits, inputs, offset);
    ASSERT_TRUE(want.status.ok() && got.status.ok()) << want.status << got.status;
    ASSERT_EQ(got.index, want.index);
    for (size_t i = 0; i < want.value.size(); ++i) {
      ASSERT_NEAR(got.value[i], want.value[i], 1e-5 * want.value[i] + 1e-36) << i;
    }
    for (size_t r = 0; r < want.tail.size(); ++r) {
      ASSERT_NEAR(got.tail[r], want.tail[r], 1e-5 * want.tail[r] + 1e-36) << r;
    }
  }
};

std::vector<float> Normal(int64_t n, double spread, uint64_t seed) {
  RandomStream random(seed);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(spread * random.Normal());
  return values;
}

TEST_F(RowTopKCudaTest, AgreesWithTheCpu) {
  for (const int64_t classes : {1, 2, 3, 17, 1000, 1023, 5003, 20000}) {
    for (const int64_t k : {1, 2, 64, 256, 257, 1000, 1024}) {
      if (k > classes) continue;
      const int64_t rows = 3;
      std::vector<float> logits = Normal(rows * classes, 3, 10);
      // Some equal ones, so that the order among them matters.
      for (size_t i = 0; i < logits.size(); i += 3) logits[i] = std::round(logits[i]);
      for (const size_t offset : {0, 1}) {
        SCOPED_TRACE(::testing::Message() << classes << " classes, k " << k << " at " << offset);
        ExpectAgree(logits, Inputs(logits, rows, k, k % 2 == 0 ? 1.0 : 2.5), offset);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(RowTopKCudaTest, TakesTheLargestVocabularies) {
  const std::vector<float> logits = Normal(262144, 3, 11);
  ExpectAgree(logits, Inputs(logits, 1, 64));
  ExpectAgree(logits, Inputs(logits, 1, 1024));
}

TEST_F(RowTopKCudaTest, TakesTheFirstOfMoreEqualOnesThanThereIsRoomFor) {
  // All equal; a few larger; a few larger and most of the others smaller; zeros of either sign.
  const int64_t classes = 12000;
  std::vector<float> equal(classes, -1.5f), mixed = equal, zeros(classes, -0.0f);
  for (int64_t i = 5; i < classes; i += 1200) mixed[i] = 1e-3f * static_cast<float>(i);
  for (int64_t i = 6; i < classes; i += 2) mixed[i] = -3;
  for (int64_t i = 0; i < classes; i += 7) zeros[i] = 0;
  for (const int64_t k : {1, 10, 11, 600, 1024}) {
    for (const std::vector<float>& logits : {equal, mixed, zeros}) {
      SCOPED_TRACE(k);
      InEveryOrder([&, &values = logits] { ExpectAgree(values, Inputs(values, 1, k)); });
    }
  }
}

TEST_F(RowTopKCudaTest, FindsLargeOnesThatAreCrowdedIntoFewGroups) {
  // Groups are neighbouring vectors of four a thread has: all large ones in those of 50 threads, so
  // that the bound is low and everything of theirs, and more, reaches it.
  const int64_t classes = 200000;
  std::vector<float> logits = Normal(classes, 1e-3, 12);
  for (int64_t i = 0; i < classes; ++i) {
    if (i / 4 % 512 < 50) logits[i] += 10;
  }
  ExpectAgree(logits, Inputs(logits, 1, 60));
  ExpectAgree(logits, Inputs(logits, 1, 1000));
  // Equal ones among them, and exactly as many large ones as wanted.
  for (int64_t i = 0; i < classes; ++i) {
    if (i / 4 % 512 < 50) logits[i] = 10 + static_cast<float>(i % 5);
  }
  ExpectAgree(logits, Inputs(logits, 1, 100));
}

TEST_F(RowTopKCudaTest, RepeatsBitForBit) {
  const std::vector<float> logits = Normal(20 * 3001, 3, 13);
  const RowTopKInputs inputs = Inputs(logits, 20, 50);
  const Answer first = OnDevice(logits, inputs);
  InEveryOrder([&] {
    const Answer again = OnDevice(logits, inputs);
    EXPECT_EQ(again.index, first.index);
    EXPECT_EQ(again.value, first.value);
    EXPECT_EQ(again.tail, first.tail);
  });
}

TEST_F(RowTopKCudaTest, WritesWhatIsWantedInTheFormatWanted) {
  const std::vector<float> logits = Normal(2 * 300, 3, 14);
  const RowTopKInputs on_cpu = Inputs(logits, 2, 7);
  const DeviceArray<float> device_logits(logits);
  RowTopKInputs inputs = on_cpu;
  inputs.logits = device_logits.get();
  const Workspace workspace(kRowTopKWorkspaceBytes);
  for (const NumberFormat format : {NumberFormat::kFloat16, NumberFormat::kBfloat16}) {
    std::vector<uint16_t> want(14);
    const DeviceArray<uint16_t> value(14);
    RowTopKOutputs outputs;
    outputs.value_format = format;
    outputs.value = want.data();
    ASSERT_TRUE(RowTopKCpu(on_cpu, outputs, 1).ok());
    outputs.value = value.get();
    ASSERT_TRUE(LaunchRowTopK(inputs, outputs, workspace.get(), nullptr).ok());
    ASSERT_TRUE(FinishRowTopK(workspace.get(), nullptr).ok());
    const std::vector<uint16_t> got = value.Fetch();
    // Where the two differ before rounding, they may afterwards by one step.
    for (int i = 0; i < 14; ++i) EXPECT_NEAR(got[i], want[i], 1) << NameOf(format) << " " << i;
    EXPECT_TRUE(value.NothingBehind());
  }
  ASSERT_TRUE(LaunchRowTopK(inputs, RowTopKOutputs(), workspace.get(), nullptr).ok());
  ASSERT_TRUE(FinishRowTopK(workspace.get(), nullptr).ok());
}

TEST_F(RowTopKCudaTest, NamesTheFirstRowThatIsNotFinite) {
  const int64_t rows = 20, classes = 700;
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> logits(rows * classes, 1);
    logits[19 * classes] = bad;
    logits[7 * classes + 699] = bad;
    InEveryOrder([&] {
      const Answer answer = OnDevice(logits, Inputs(logits, rows, 3));
      EXPECT_EQ(answer.status.message(),
                "row top-k: logits of row 7 has a number that is not finite");
      EXPECT_EQ(answer.bad_row, 7);
      // The other rows are right.
      EXPECT_EQ(answer.index[3], 0);
      EXPECT_EQ(answer.index[4], 1);
      EXPECT_EQ(answer.index[5], 2);
    });
  }
}

TEST(RowTopKCudaValidationTest, NamesTheArgumentAtFault) {
  // Refused before anything touches a device.
  const float x = 0;
  alignas(16) char workspace[16];
  RowTopKInputs inputs;
  inputs.logits = &x;
  inputs.rows = 1;
  inputs.classes = 2000;
  inputs.k = 1025;
  auto message = [&](void* space) {
    const absl::Status status = LaunchRowTopK(inputs, RowTopKOutputs(), space, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message(workspace), HasSubstr("k is 1025; at most 1024"));
  inputs.k = 2001;
  EXPECT_THAT(message(workspace), HasSubstr("k is 2001; want 1 to the number of classes, 2000"));
  inputs.k = 1;
  EXPECT_THAT(message(nullptr), HasSubstr("workspace is null"));
  inputs.rows = int64_t{1} << 40;
  EXPECT_THAT(message(workspace), HasSubstr("rows is too large"));
  inputs.rows = 1;
  inputs.classes = int64_t{1} << 31;
  EXPECT_THAT(message(workspace), HasSubstr("at most 1073741824 on CUDA"));
}

}  // namespace
}  // namespace codistill
