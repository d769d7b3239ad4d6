#include "cuda/loss_cuda.h"

#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "cuda/loss.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// An array on the device.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n) : n_(n) {
    EXPECT_EQ(cudaMalloc(&data_, n * sizeof(T)), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    EXPECT_EQ(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> Fetch() const {
    std::vector<T> host(n_);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return host;
  }

 private:
  size_t n_;
  void* data_ = nullptr;
};

class LossCudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

struct Batch {
  int64_t rows, classes;
  std::vector<float> logits;
  std::vector<int64_t> labels;
  std::vector<std::vector<float>> teachers;

  Batch(int64_t rows, int64_t classes, int num_teachers, double spread)
      : rows(rows), classes(classes), teachers(num_teachers) {
    RandomStream random(static_cast<uint64_t>(rows * 1000 + classes));
    auto fill = [&](std::vector<float>* values) {
      values->resize(rows * classes);
      for (float& value : *values) value = static_cast<float>(spread * random.Normal());
    };
    fill(&logits);
    for (std::vector<float>& teacher : teachers) fill(&teacher);
    for (int64_t r = 0; r < rows; ++r) {
      labels.push_back(static_cast<int64_t>(random.Below(classes)));
      if (r % 2 == 0) logits[r * classes + labels[r]] += static_cast<float>(5 * spread);
    }
  }

  LossInputs Inputs() const {
    LossInputs inputs;
    inputs.rows = rows;
    inputs.classes = classes;
    inputs.teacher_weight = teachers.empty() ? 0 : 0.7f;
    return inputs;
  }
};

struct Result {
  absl::Status status;
  std::vector<float> gradient;
  LossOutputs outputs;
};

Result OnCpu(const LossOptions& options, const Batch& batch) {
  Result result;
  LossInputs inputs = batch.Inputs();
  inputs.logits = batch.logits.data();
  inputs.labels = batch.labels.data();
  std::vector<DenseTeacher> teachers(batch.teachers.size());
  for (size_t k = 0; k < teachers.size(); ++k) teachers[k].values = batch.teachers[k].data();
  inputs.teachers = teachers;
  result.gradient.resize(batch.logits.size());
  result.outputs.gradient = result.gradient.data();
  result.status = ComputeLossCpu(options, inputs, &result.outputs, 2);
  return result;
}

Result OnDevice(const LossOptions& options, const Batch& batch, bool in_place = false) {
  Result result;
  LossInputs inputs = batch.Inputs();
  const DeviceArray<float> logits(batch.logits), gradient(batch.logits.size());
  const DeviceArray<int64_t> labels(batch.labels);
  std::vector<std::unique_ptr<DeviceArray<float>>> arrays;
  std::vector<DenseTeacher> teachers(batch.teachers.size());
  for (size_t k = 0; k < teachers.size(); ++k) {
    arrays.push_back(std::make_unique<DeviceArray<float>>(batch.teachers[k]));
    teachers[k].values = arrays.back()->get();
  }
  inputs.logits = logits.get();
  inputs.labels = labels.get();
  inputs.teachers = teachers;
  const DeviceArray<char> workspace(CudaLossWorkspaceBytes(batch.rows));
  const DeviceArray<float>& target = in_place ? logits : gradient;
  result.status = LaunchLoss(options, inputs, target.get(), workspace.get(), nullptr);
  if (result.status.ok()) {
    result.status = FinishLoss(inputs, workspace.get(), nullptr, &result.outputs);
  }
  result.gradient = target.Fetch();
  return result;
}

void ExpectEqual(const LossOptions& options, const Batch& batch) {
  const Result cpu = OnCpu(options, batch), device = OnDevice(options, batch);
  ASSERT_TRUE(cpu.status.ok()) << cpu.status;
  ASSERT_TRUE(device.status.ok()) << device.status;
  const double rows = static_cast<double>(batch.rows);
  auto tolerance = [](double value, double floor) { return floor + 1e-5 * std::abs(value); };
  const LossSums& expected = cpu.outputs.sums;
  const LossSums& actual = device.outputs.sums;
  EXPECT_NEAR(actual.label_loss_sum, expected.label_loss_sum,
              tolerance(expected.label_loss_sum, 1e-5 * rows));
  EXPECT_NEAR(actual.teacher_loss_sum, expected.teacher_loss_sum,
              tolerance(expected.teacher_loss_sum, 1e-4 * rows));
  EXPECT_EQ(actual.correct, expected.correct);
  EXPECT_TRUE(device.outputs.finite);
  const double floor = (options.teacher_loss == LossOptions::kKlStudentTeacher ? 3e-5 : 3e-6) *
                       options.temperature / rows;
  for (size_t i = 0; i < cpu.gradient.size(); ++i) {
    ASSERT_NEAR(device.gradient[i], cpu.gradient[i], tolerance(cpu.gradient[i], floor))
        << "element " << i;
  }
}

const LossOptions::TeacherLoss kTeacherLosses[] = {
    LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent, LossOptions::kKlStudentTeacher,
    LossOptions::kSquaredErrorLogits};

TEST_F(LossCudaTest, EqualsTheCpuOverAllOptions) {
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    for (int teachers : {0, 1, 2, 8}) {
      for (auto average : {LossOptions::kProbabilities, LossOptions::kLogits}) {
        for (float temperature : {1.0f, 2.0f}) {
          for (float smoothing : {0.0f, 0.1f}) {
            for (int64_t classes : {1, 2, 17, 1000, 13777}) {
              LossOptions options;
              options.teacher_loss = teacher_loss;
              options.teacher_average = average;
              options.temperature = temperature;
              options.label_smoothing = smoothing;
              SCOPED_TRACE(::testing::Message()
                           << "teacher " << teacher_loss << " x " << teachers << " average "
                           << average << " T " << temperature << " smoothing " << smoothing
                           << " classes " << classes);
              ExpectEqual(options, Batch(5, classes, teachers, 2.0));
              if (HasFatalFailure()) return;
            }
          }
        }
      }
    }
  }
}

TEST_F(LossCudaTest, RepeatsBitForBit) {
  LossOptions options;
  const Batch batch(300, 5003, 1, 3.0);
  const Result first = OnDevice(options, batch), second = OnDevice(options, batch);
  EXPECT_EQ(first.gradient, second.gradient);
  EXPECT_EQ(first.outputs.sums.label_loss_sum, second.outputs.sums.label_loss_sum);
  EXPECT_EQ(first.outputs.sums.teacher_loss_sum, second.outputs.sums.teacher_loss_sum);
}

TEST_F(LossCudaTest, GradientMayReplaceTheLogits) {
  for (LossOptions::TeacherLoss teacher_loss : kTeacherLosses) {
    LossOptions options;
    options.teacher_loss = teacher_loss;
    const Batch batch(20, 3001, 1, 2.0);
    EXPECT_EQ(OnDevice(options, batch, true).gradient, OnDevice(options, batch).gradient);
  }
}

TEST_F(LossCudaTest, NamesABadLabel) {
  Batch batch(5, 10, 1, 1.0);
  batch.labels[3] = 10;
  batch.labels[4] = -7;
  const absl::Status status = OnDevice(LossOptions(), batch).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("holds 10 in row 3; want 0 to 9"));
}

TEST_F(LossCudaTest, SaysWhenSomethingIsNotFinite) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Batch batch(5, 700, 1, 1.0);
    batch.logits[1000] = bad;
    const Result result = OnDevice(LossOptions(), batch);
    EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_FALSE(result.outputs.finite);
  }
}

TEST(LossCudaValidationTest, RefusesWhatItCannotDo) {
  // Refused before anything touches a device.
  float value = 0;
  int64_t label = 0;
  DenseTeacher teachers[9];
  for (DenseTeacher& teacher : teachers) teacher.values = &value;
  LossInputs inputs;
  inputs.rows = 1;
  inputs.classes = 1;
  inputs.logits = &value;
  inputs.targets = &value;
  inputs.labels = &label;
  LossOptions options;
  options.label_loss = LossOptions::kSigmoidCrossEntropy;
  EXPECT_EQ(LaunchLoss(options, inputs, &value, &value, nullptr).code(),
            absl::StatusCode::kUnimplemented);
  inputs.teachers = teachers;
  inputs.teacher_weight = 1;
  EXPECT_THAT(std::string(LaunchLoss(LossOptions(), inputs, &value, &value, nullptr).message()),
              HasSubstr("at most 8"));
  inputs.teachers = {};
  EXPECT_EQ(LaunchLoss(LossOptions(), inputs, &value, &value, nullptr).code(),
            absl::StatusCode::kInvalidArgument);
  const int32_t index = 0;
  const TopKTeacher top_k = {&index, &value, &value, 1};
  inputs.topk_teachers = absl::MakeConstSpan(&top_k, 1);
  const absl::Status status = LaunchLoss(LossOptions(), inputs, &value, &value, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("topk_teachers"));
}

TEST(LossCudaLaunchTest, NamesTheErrorWhereThereIsNoDevice) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) {
    GTEST_SKIP() << "there is a CUDA device";
  }
  cudaGetLastError();  // forget the error of the question
  float value = 0;
  int64_t label = 0;
  LossInputs inputs;
  inputs.rows = 1;
  inputs.classes = 1;
  inputs.logits = &value;
  inputs.labels = &label;
  const absl::Status status = LaunchLoss(LossOptions(), inputs, &value, &value, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cudaError"));
}

}  // namespace
}  // namespace codistill
