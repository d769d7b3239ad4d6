// The CUDA loss against its definition in double precision and, for what is wrong with inputs,
// against the CPU's. On a device, or on the emulated one (cuda/testing), of which there are three:
// with clusters, without them, and with little shared memory, so that rows are read twice.

#include "cuda/loss_cuda.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor/bfloat16.h"
#include "cuda/loss.h"
#include "cuda/loss_combinations.h"
#include "cuda/loss_reference.h"
#include "cuda/testing/device_array.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A loss's inputs on the device, in memory that ends where they do. Arrays with the classes in them
// begin `offset` elements behind an address that suits every vector.
class DeviceInputs {
 public:
  DeviceInputs(const LossInputs& host, int64_t offset) : inputs_(host) {
    const int64_t elements = host.rows * host.classes;
    const int64_t size = static_cast<int64_t>(BytesOf(host.logits_format));
    inputs_.logits = Copy(host.logits, elements * size, offset * size);
    inputs_.labels = Copy(host.labels, host.rows, 0);
    inputs_.targets = Copy(host.targets, elements, offset);
    inputs_.label_prior = Copy(host.label_prior, host.classes, 0);
    inputs_.row_weights = Copy(host.row_weights, host.rows, 0);
    for (DenseTeacher teacher : host.teachers) {
      const int64_t bytes = static_cast<int64_t>(BytesOf(teacher.format));
      teacher.values = Copy(teacher.values, elements * bytes, offset * bytes);
      teacher.scale = Copy(teacher.scale, host.rows, 0);
      dense_.push_back(teacher);
    }
    for (TopKTeacher teacher : host.topk_teachers) {
      teacher.index = Copy(teacher.index, host.rows * teacher.k, 0);
      teacher.value = Copy(teacher.value, host.rows * teacher.k, 0);
      teacher.tail = Copy(teacher.tail, host.rows, 0);
      top_k_.push_back(teacher);
    }
    inputs_.teachers = dense_;
    inputs_.topk_teachers = top_k_;
  }
  ~DeviceInputs() {
    for (void* memory : memory_) cudaFree(memory);
  }
  DeviceInputs(const DeviceInputs&) = delete;

  const LossInputs& inputs() const { return inputs_; }

 private:
  template <typename T>
  const T* Copy(const T* from, int64_t count, int64_t offset) {
    if (from == nullptr) return nullptr;
    return static_cast<const T*>(Copy(static_cast<const void*>(from),
                                      count * static_cast<int64_t>(sizeof(T)),
                                      offset * static_cast<int64_t>(sizeof(T))));
  }
  const void* Copy(const void* from, int64_t bytes, int64_t offset) {
    if (from == nullptr) return nullptr;
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes + offset), cudaSuccess);
    memory_.push_back(memory);
    void* const at = static_cast<char*>(memory) + offset;
    EXPECT_EQ(cudaMemcpy(at, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return at;
  }

  LossInputs inputs_;
  std::vector<DenseTeacher> dense_;
  std::vector<TopKTeacher> top_k_;
  std::vector<void*> memory_;
};

struct Result {
  absl::Status status;
  LossOutputs outputs;
  std::vector<unsigned char> gradient;

  double at(const LossInputs& inputs, int64_t i) const {
    if (inputs.logits_format == NumberFormat::kFloat32) {
      return reinterpret_cast<const float*>(gradient.data())[i];
    }
    return FromBfloat16(reinterpret_cast<const uint16_t*>(gradient.data())[i]);
  }
};

enum class Gradient { kOwn, kInPlace, kNone };

Result OnDevice(const LossOptions& options, const LossInputs& host, int64_t offset = 0,
                Gradient kind = Gradient::kOwn) {
  const DeviceInputs device(host, offset);
  const LossInputs& inputs = device.inputs();
  const size_t size = BytesOf(host.logits_format);
  const size_t bytes = static_cast<size_t>(host.rows * host.classes) * size;
  const DeviceArray<unsigned char> own(bytes, offset * size);
  const Workspace workspace(CudaLossWorkspaceBytes(host));
  void* const gradient = kind == Gradient::kOwn       ? own.get()
                         : kind == Gradient::kInPlace ? const_cast<void*>(inputs.logits)
                                                      : nullptr;
  Result result;
  result.status = LaunchLoss(options, inputs, gradient, workspace.get(), nullptr);
  if (result.status.ok()) {
    result.status = FinishLoss(options, inputs, workspace.get(), nullptr, &result.outputs);
  }
  result.gradient.resize(bytes);
  if (gradient != nullptr) {
    EXPECT_EQ(cudaMemcpy(result.gradient.data(), gradient, bytes, cudaMemcpyDeviceToHost),
              cudaSuccess);
  }
  EXPECT_TRUE(own.NothingBehind());
  return result;
}

void ExpectIsReference(const LossOptions& options, const LossInputs& inputs,
                       const ReferenceLoss& expected, const Result& actual) {
  ASSERT_TRUE(actual.status.ok()) << actual.status;
  EXPECT_TRUE(actual.outputs.finite);
  const LossSums& sums = actual.outputs.sums;
  const double rows = static_cast<double>(inputs.rows);
  const double t = options.temperature;
  auto near = [&](double a, double b) {
    return 1e-5 * std::abs(b) + 2e-6 * rows * (1 + t * t) - std::abs(a - b);
  };
  EXPECT_GE(near(sums.label_loss_sum, expected.sums.label_loss_sum), 0)
      << sums.label_loss_sum << " instead of " << expected.sums.label_loss_sum;
  EXPECT_GE(near(sums.teacher_loss_sum, expected.sums.teacher_loss_sum), 0)
      << sums.teacher_loss_sum << " instead of " << expected.sums.teacher_loss_sum;
  EXPECT_NEAR(sums.weight_sum, expected.sums.weight_sum, 1e-9);
  EXPECT_EQ(sums.counted_rows, expected.sums.counted_rows);
  EXPECT_EQ(sums.correct, expected.sums.correct);
  const bool half = inputs.logits_format == NumberFormat::kBfloat16;
  // Relative to the terms of which elements are differences, about 1 / (sum of weights).
  const double floor = (options.teacher_loss == LossOptions::kKlStudentTeacher ? 6e-6 : 1e-6) *
                       (1 + t) / std::max(expected.sums.weight_sum, 1e-9);
  for (size_t i = 0; i < expected.gradient.size(); ++i) {
    const double value = actual.at(inputs, static_cast<int64_t>(i)), want = expected.gradient[i];
    const double tolerance = (half ? 4.5e-3 : 1e-5) * std::abs(want) + floor;
    ASSERT_LE(std::abs(value - want), tolerance)
        << "element " << i << ": " << value << " instead of " << want;
  }
}

// All combinations, or every `stride`-th.
std::vector<LossCombination> Combinations(size_t stride, size_t first = 0) {
  const std::vector<LossCombination> all = AllLossCombinations();
  std::vector<LossCombination> some;
  for (size_t i = first; i < all.size(); i += stride) some.push_back(all[i]);
  return some;
}

// As most steps are: one teacher, all rows alike.
LossCombination Plain(NumberFormat format, float temperature, DenseTeacher::Kind kind) {
  LossCombination combination;
  combination.name = "plain";
  combination.logits_format = format;
  combination.options.temperature = temperature;
  combination.teachers = {{kind, format}};
  return combination;
}

class LossCudaTest : public DeviceTest, public ::testing::WithParamInterface<int> {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
#ifdef CODISTILL_EMULATED_CUDA
    emulated::Device device;
    if (GetParam() > 0) {
      device.major = 8;
      device.shared_per_multiprocessor = 167936;
      device.shared_per_block = 166912;
    }
    if (GetParam() > 1) {
      // Hardly more than the kernels declare.
      device.shared_per_multiprocessor = 65536;
      device.shared_per_block = 24 << 10;
    }
    emulated::SetDevice(device);
    emulated::ClearProblem();
    emulated::ClearLaunches();
#endif
  }
  void TearDown() override {
#ifdef CODISTILL_EMULATED_CUDA
    EXPECT_EQ(emulated::Problem(), "");
    emulated::SetDevice({});
#endif
  }
};

#ifdef CODISTILL_EMULATED_CUDA
std::string NameOf(const ::testing::TestParamInfo<int>& info) {
  const char* const names[] = {"Sm90", "Sm80", "Small"};
  return names[info.param];
}
INSTANTIATE_TEST_SUITE_P(Devices, LossCudaTest, ::testing::Values(0, 1, 2), NameOf);
#else
INSTANTIATE_TEST_SUITE_P(Devices, LossCudaTest, ::testing::Values(0));
#endif

TEST_P(LossCudaTest, IsTheReferenceInEveryCombination) {
  uint64_t seed = 0;
  for (const LossCombination& combination : Combinations(1)) {
    SCOPED_TRACE(combination.name);
    const CombinationBatch batch(combination, 5, 37, 2.0, ++seed);
    const ReferenceLoss expected = ComputeLossReference(combination.options, batch.inputs());
    ExpectIsReference(combination.options, batch.inputs(), expected,
                      OnDevice(combination.options, batch.inputs()));
    if (HasFatalFailure()) return;
  }
}

TEST_P(LossCudaTest, TakesAnyNumberOfClassesAtAnyAddress) {
  size_t turn = 0;
  for (int64_t classes : {1, 2, 3, 4, 5, 31, 33, 1000, 4099}) {
    for (const LossCombination& combination : Combinations(9, turn % 9)) {
      const int64_t offset = static_cast<int64_t>(turn % 4);
      SCOPED_TRACE(::testing::Message()
                   << combination.name << ", " << classes << " classes, offset " << offset);
      const CombinationBatch batch(combination, 4, classes, 2.0, ++turn);
      ExpectIsReference(combination.options, batch.inputs(),
                        ComputeLossReference(combination.options, batch.inputs()),
                        OnDevice(combination.options, batch.inputs(), offset));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LossCudaTest, TakesLongRows) {
  size_t turn = 0;
  for (int64_t classes : {24000, 24001, 50257, 128000}) {
    std::vector<LossCombination> list;
    for (const LossCombination& combination : Combinations(31, turn)) {
      // Others have no long rows to share among threads; and the smallest device has no room for
      // the bitmaps of long rows.
      if (combination.options.label_loss == LossOptions::kSoftmaxCrossEntropy &&
          (combination.topk_teachers.empty() || GetParam() < 2)) {
        list.push_back(combination);
      }
    }
    for (NumberFormat format : {NumberFormat::kFloat32, NumberFormat::kBfloat16}) {
      const auto kind = turn % 2 == 0 ? DenseTeacher::kLogits : DenseTeacher::kProbabilities;
      list.push_back(Plain(format, turn % 3 == 0 ? 1.0f : 2.0f, kind));
      ++turn;
    }
    for (const LossCombination& combination : list) {
      const int64_t offset = static_cast<int64_t>(turn % 2);
      SCOPED_TRACE(::testing::Message()
                   << combination.name << ", " << classes << " classes, offset " << offset);
      const CombinationBatch batch(combination, 2, classes, 3.0, ++turn);
      ExpectIsReference(combination.options, batch.inputs(),
                        ComputeLossReference(combination.options, batch.inputs()),
                        OnDevice(combination.options, batch.inputs(), offset));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LossCudaTest, TakesTheLargestVocabularyWithTopK) {
  LossCombination combination = Plain(NumberFormat::kBfloat16, 2, DenseTeacher::kLogits);
  combination.teachers.clear();
  combination.topk_teachers = {64, 5};
  const CombinationBatch batch(combination, 1, 262144, 3.0, 1);
  const Result result = OnDevice(combination.options, batch.inputs());
  if (GetParam() == 2) {
    EXPECT_THAT(std::string(result.status.message()), HasSubstr("has room for at most"));
    return;
  }
  ExpectIsReference(combination.options, batch.inputs(),
                    ComputeLossReference(combination.options, batch.inputs()), result);
}

TEST_P(LossCudaTest, RepeatsBitForBitAndMayReplaceTheLogits) {
  uint64_t seed = 100;
  std::vector<LossCombination> list = Combinations(13);
  list.push_back(Plain(NumberFormat::kFloat32, 1, DenseTeacher::kLogits));
  list.push_back(Plain(NumberFormat::kBfloat16, 2, DenseTeacher::kProbabilities));
  for (const LossCombination& combination : list) {
    SCOPED_TRACE(combination.name);
    for (int64_t classes : {203, 24000}) {
      if (classes > 203 && combination.name != "plain") continue;
      const CombinationBatch batch(combination, 3, classes, 2.0, ++seed);
      const Result first = OnDevice(combination.options, batch.inputs());
      ASSERT_TRUE(first.status.ok()) << first.status;
      for (Gradient kind : {Gradient::kOwn, Gradient::kInPlace, Gradient::kNone}) {
        InEveryOrder([&] {
          const Result again = OnDevice(combination.options, batch.inputs(), 0, kind);
          ASSERT_TRUE(again.status.ok()) << again.status;
          EXPECT_EQ(again.outputs.sums.label_loss_sum, first.outputs.sums.label_loss_sum);
          EXPECT_EQ(again.outputs.sums.teacher_loss_sum, first.outputs.sums.teacher_loss_sum);
          if (kind != Gradient::kNone) {
            EXPECT_EQ(again.gradient, first.gradient);
          }
        });
      }
    }
  }
}

TEST_P(LossCudaTest, LargeLogitsKeepTheirPrecision) {
  LossCombination combination = Plain(NumberFormat::kFloat32, 1, DenseTeacher::kLogits);
  for (double spread : {30.0, 300.0}) {
    for (float temperature : {0.5f, 1.0f, 4.0f, 5.0f}) {
      combination.options.temperature = temperature;
      for (auto psi : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent}) {
        combination.options.teacher_loss = psi;
        const CombinationBatch batch(combination, 4, 1003, spread, 7);
        ExpectIsReference(combination.options, batch.inputs(),
                          ComputeLossReference(combination.options, batch.inputs()),
                          OnDevice(combination.options, batch.inputs()));
      }
    }
  }
}

TEST_P(LossCudaTest, ATeacherLikeTheStudentGivesNoDivergence) {
  for (auto psi : {LossOptions::kKlTeacherStudent, LossOptions::kKlStudentTeacher}) {
    LossCombination combination = Plain(NumberFormat::kFloat32, 3, DenseTeacher::kLogits);
    combination.options.teacher_loss = psi;
    const CombinationBatch batch(combination, 3, 5001, 4.0, 8);
    LossInputs inputs = batch.inputs();
    const Result alone = [&] {
      LossInputs without = inputs;
      without.teacher_weight = 0;
      return OnDevice(combination.options, without);
    }();
    DenseTeacher same = inputs.teachers[0];
    same.values = inputs.logits;
    inputs.teachers = absl::MakeConstSpan(&same, 1);
    const Result result = OnDevice(combination.options, inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    EXPECT_NEAR(result.outputs.sums.teacher_loss_sum, 0, 1e-7);
    for (int64_t i = 0; i < inputs.rows * inputs.classes; ++i) {
      ASSERT_NEAR(result.at(inputs, i), alone.at(inputs, i),
                  1e-7 + 1e-5 * std::abs(alone.at(inputs, i)));
    }
  }
}

// Top-k teachers whose tails the student finds next to impossible, where ratios overflow.
TEST_P(LossCudaTest, TopKTailsMayBeNextToImpossible) {
  constexpr int64_t kClasses = 70;
  for (float gap : {5.0f, 40.0f, 90.0f}) {
    std::vector<float> logits(2 * kClasses);
    for (int64_t i = 0; i < 2 * kClasses; ++i) logits[i] = static_cast<float>(i % 7) - gap;
    for (int64_t r = 0; r < 2; ++r) {
      for (int c : {3, 40, 69}) logits[r * kClasses + c] = static_cast<float>(c % 5);
    }
    const std::vector<int64_t> labels = {3, 10};
    const std::vector<int32_t> first = {69, 3, 40, 40, 69, 3}, second = {3, 5, 3, 40};
    const std::vector<float> q1 = {0.5f, 0.2f, 0.1f, 0.6f, 0.1f, 0.1f}, t1 = {0.2f, 0.2f};
    const std::vector<float> q2 = {0.5f, 0.4f, 0.3f, 0.3f}, t2 = {0.1f, 0.4f};
    for (size_t teachers : {1, 2}) {
      for (auto psi : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent}) {
        const TopKTeacher top_k[2] = {{first.data(), q1.data(), t1.data(), 3},
                                      {second.data(), q2.data(), t2.data(), 2}};
        LossInputs inputs;
        inputs.rows = 2;
        inputs.classes = kClasses;
        inputs.logits = logits.data();
        inputs.labels = labels.data();
        inputs.topk_teachers = absl::MakeConstSpan(top_k, teachers);
        inputs.teacher_weight = 1;
        LossOptions options;
        options.teacher_loss = psi;
        SCOPED_TRACE(gap);
        ExpectIsReference(options, inputs, ComputeLossReference(options, inputs),
                          OnDevice(options, inputs));
      }
    }
  }
}

// ---- What is wrong with inputs. ----

// The CPU's status and the device's, which must be alike.
void ExpectSameFault(const LossOptions& options, const LossInputs& inputs) {
  std::vector<unsigned char> gradient(inputs.rows * inputs.classes * BytesOf(inputs.logits_format));
  LossOutputs cpu;
  cpu.gradient = gradient.data();
  const absl::Status expected = ComputeLossCpu(options, inputs, &cpu, 1);
  ASSERT_FALSE(expected.ok());
  for (Gradient kind : {Gradient::kOwn, Gradient::kInPlace, Gradient::kNone}) {
    const Result result = OnDevice(options, inputs, 0, kind);
    EXPECT_EQ(result.status.code(), expected.code());
    EXPECT_EQ(result.status.message(), expected.message());
    EXPECT_EQ(result.outputs.finite, cpu.finite);
  }
}

// A batch to be spoilt: softmax, 6 rows of 300 classes.
struct Batch {
  static constexpr int64_t kRows = 6, kClasses = 300, kNamed = 3;
  LossOptions options;
  std::vector<float> logits, teacher, given, prior, weights;
  std::vector<int64_t> labels;
  std::vector<int32_t> index;
  std::vector<float> value, tail;
  std::vector<int8_t> small;
  std::vector<float> scale;
  std::vector<DenseTeacher> dense;
  std::vector<TopKTeacher> top_k;

  Batch()
      : logits(kRows * kClasses),
        teacher(kRows * kClasses),
        given(kRows * kClasses, 1.0f / kClasses),
        prior(kClasses, 1.0f / kClasses),
        weights(kRows, 1),
        labels(kRows, 7),
        value(kRows * kNamed, 0.25f),
        tail(kRows, 0.25f),
        small(kRows * kClasses, 3),
        scale(kRows, 0.1f) {
    for (int64_t i = 0; i < kRows * kClasses; ++i) {
      logits[i] = static_cast<float>(i % 13) / 4;
      teacher[i] = static_cast<float>(i % 11) / 4;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int c : {1, 290, 17}) index.push_back(c);
    }
  }

  void AddDense(const void* values, DenseTeacher::Kind kind,
                NumberFormat format = NumberFormat::kFloat32) {
    DenseTeacher view;
    view.values = values;
    view.kind = kind;
    view.format = format;
    if (format == NumberFormat::kInt8) view.scale = scale.data();
    dense.push_back(view);
  }

  LossInputs Inputs() {
    LossInputs inputs;
    inputs.rows = kRows;
    inputs.classes = kClasses;
    inputs.logits = logits.data();
    inputs.labels = labels.data();
    inputs.teachers = dense;
    inputs.topk_teachers = top_k;
    inputs.teacher_weight = dense.empty() && top_k.empty() ? 0 : 0.5f;
    return inputs;
  }
};

TEST_P(LossCudaTest, NamesLabelsWeightsAndPriorsAsTheCpuDoes) {
  for (int64_t label : {int64_t{-1}, Batch::kClasses, int64_t{1} << 40}) {
    Batch batch;
    batch.AddDense(batch.teacher.data(), DenseTeacher::kLogits);
    batch.labels[3] = label;
    batch.labels[4] = -7;
    ExpectSameFault(batch.options, batch.Inputs());
    // Where that is the ignored one, the other is at fault.
    batch.options.ignored_label = label;
    ExpectSameFault(batch.options, batch.Inputs());
  }
  for (float weight : {-1.0f, kNan, kInf}) {
    Batch batch;
    batch.weights[2] = weight;
    LossInputs inputs = batch.Inputs();
    inputs.row_weights = batch.weights.data();
    ExpectSameFault(batch.options, inputs);
  }
  for (float value : {-0.1f, kNan, 0.5f}) {
    Batch batch;
    batch.options.label_smoothing = 0.1f;
    batch.prior[250] = value;
    LossInputs inputs = batch.Inputs();
    inputs.label_prior = batch.prior.data();
    ExpectSameFault(batch.options, inputs);
  }
}

TEST_P(LossCudaTest, NamesTopKTeachersAsTheCpuDoes) {
  const std::vector<std::function<void(Batch*)>> spoilers = {
      [](Batch* batch) { batch->index[7] = 300; },  [](Batch* batch) { batch->index[7] = -1; },
      [](Batch* batch) { batch->index[8] = 290; },  [](Batch* batch) { batch->value[7] = -0.25f; },
      [](Batch* batch) { batch->value[7] = kNan; }, [](Batch* batch) { batch->tail[5] = kInf; },
      [](Batch* batch) { batch->tail[5] = -0.1f; }, [](Batch* batch) { batch->tail[5] = 0.27f; },
  };
  for (const auto& spoil : spoilers) {
    Batch batch;
    spoil(&batch);
    const std::vector<int32_t> fine = {0, 5, 9, 12, 200, 299};
    const std::vector<float> ones(6, 1), zeros(6, 0);
    batch.top_k.push_back({fine.data(), ones.data(), zeros.data(), 1});
    batch.top_k.push_back({batch.index.data(), batch.value.data(), batch.tail.data(), 3});
    ExpectSameFault(batch.options, batch.Inputs());
  }
}

TEST_P(LossCudaTest, NamesWhatIsNotFiniteAsTheCpuDoes) {
  for (int teachers : {0, 1, 2}) {
    for (float bad : {kNan, kInf, -kInf}) {
      SCOPED_TRACE(::testing::Message() << teachers << " teachers, " << bad);
      const auto make = [&](Batch* batch) {
        if (teachers > 0) batch->AddDense(batch->teacher.data(), DenseTeacher::kLogits);
        if (teachers > 1) batch->AddDense(batch->given.data(), DenseTeacher::kProbabilities);
      };
      {
        Batch batch;
        make(&batch);
        batch.logits[4 * Batch::kClasses + 7] = bad;  // the label's
        batch.logits[4 * Batch::kClasses + 222] = kNan;
        ExpectSameFault(batch.options, batch.Inputs());
      }
      if (teachers > 0 && bad != -kInf) {
        Batch batch;
        make(&batch);
        batch.teacher[2 * Batch::kClasses + 299] = bad;
        batch.teacher[5 * Batch::kClasses] = bad;
        ExpectSameFault(batch.options, batch.Inputs());
      }
      if (teachers > 1 && bad != -kInf) {
        Batch batch;
        make(&batch);
        batch.given[3 * Batch::kClasses + 4] = bad;
        ExpectSameFault(batch.options, batch.Inputs());
      }
    }
  }
  for (float bad : {kNan, kInf}) {
    Batch batch;
    batch.AddDense(batch.small.data(), DenseTeacher::kLogits, NumberFormat::kInt8);
    batch.scale[1] = bad;
    ExpectSameFault(batch.options, batch.Inputs());
  }
}

TEST_P(LossCudaTest, NamesProbabilitiesAsTheCpuDoes) {
  for (int others : {0, 1}) {
    for (float bad : {0.5f, -0.001f}) {
      Batch batch;
      batch.AddDense(batch.given.data(), DenseTeacher::kProbabilities);
      if (others > 0) batch.AddDense(batch.teacher.data(), DenseTeacher::kLogits);
      batch.given[Batch::kClasses + 100] = bad;
      batch.given[4 * Batch::kClasses + 100] = 0.9f;
      ExpectSameFault(batch.options, batch.Inputs());
    }
  }
}

TEST_P(LossCudaTest, ElementwiseLossesNameFaultsAsTheCpuDoes) {
  for (auto label_loss : {LossOptions::kSigmoidCrossEntropy, LossOptions::kSquaredError}) {
    for (int which : {0, 1, 2, 3}) {
      for (float bad : {kNan, kInf}) {
        Batch batch;
        batch.options.label_loss = label_loss;
        const bool sigmoid = label_loss == LossOptions::kSigmoidCrossEntropy;
        if (!sigmoid) batch.options.teacher_loss = LossOptions::kSquaredErrorLogits;
        std::vector<float> targets(Batch::kRows * Batch::kClasses, 0.5f);
        batch.AddDense(batch.teacher.data(), DenseTeacher::kLogits);
        if (which == 0) batch.logits[4 * Batch::kClasses + 9] = bad;
        if (which == 1) targets[3 * Batch::kClasses] = bad;
        if (which == 2) batch.teacher[2 * Batch::kClasses + 299] = bad;
        // The sigmoid of infinity is 1.
        if (which == 2 && sigmoid && std::isinf(bad)) continue;
        if (which == 3) {
          if (!sigmoid) continue;
          batch.AddDense(batch.given.data(), DenseTeacher::kProbabilities);
          batch.given[Batch::kClasses + 100] = std::isnan(bad) ? -0.5f : 1.5f;
        }
        LossInputs inputs = batch.Inputs();
        inputs.labels = nullptr;
        inputs.targets = targets.data();
        SCOPED_TRACE(::testing::Message() << label_loss << " " << which << " " << bad);
        ExpectSameFault(batch.options, inputs);
      }
    }
  }
}

TEST_P(LossCudaTest, AClassMayBeRuledOut) {
  // By a logit of -inf, student and teacher alike: not an error while the label is another.
  for (auto psi : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent}) {
    Batch batch;
    batch.options.teacher_loss = psi;
    batch.AddDense(batch.teacher.data(), DenseTeacher::kLogits);
    for (int64_t c : {0, 64, 250, 299}) {
      batch.logits[2 * Batch::kClasses + c] = batch.teacher[2 * Batch::kClasses + c] = -kInf;
    }
    LossInputs inputs = batch.Inputs();
    const Result result = OnDevice(batch.options, inputs);
    ASSERT_TRUE(result.status.ok()) << result.status;
    EXPECT_TRUE(result.outputs.finite);
    EXPECT_EQ(result.at(inputs, 2 * Batch::kClasses + 64), 0);
    EXPECT_TRUE(std::isfinite(result.outputs.sums.teacher_loss_sum));
  }
}

#ifdef CODISTILL_EMULATED_CUDA
TEST_P(LossCudaTest, KeepsRowsInSharedMemoryAsFarAsTheyFit) {
  const auto shape = [](NumberFormat format, int64_t classes) {
    const LossCombination combination = Plain(format, 1, DenseTeacher::kLogits);
    const CombinationBatch batch(combination, 1, classes, 1.0, 1);
    emulated::ClearLaunches();
    EXPECT_TRUE(OnDevice(combination.options, batch.inputs()).status.ok());
    EXPECT_EQ(emulated::Launches().size(), 2u);
    return emulated::Launches()[0];
  };
  const emulated::LaunchShape f32 = shape(NumberFormat::kFloat32, 24000),
                              bf16 = shape(NumberFormat::kBfloat16, 24000),
                              long_f32 = shape(NumberFormat::kFloat32, 128000),
                              long_bf16 = shape(NumberFormat::kBfloat16, 128000);
  const std::vector<unsigned> clusters = {f32.cluster, bf16.cluster, long_f32.cluster,
                                          long_bf16.cluster};
  switch (GetParam()) {
    case 0:
      // Four blocks a multiprocessor; 128,000 float32 and as many of a teacher take one.
      EXPECT_EQ(clusters, (std::vector<unsigned>{4, 2, 8, 8}));
      EXPECT_LT(f32.shared_bytes, 56u << 10);
      EXPECT_EQ(f32.block.x, 256u);
      EXPECT_EQ(long_f32.block.x, 1024u);
      EXPECT_GT(long_f32.shared_bytes, 8u * 128000 / 8);
      break;
    case 1:
      EXPECT_EQ(clusters, (std::vector<unsigned>{1, 1, 1, 1}));
      EXPECT_GT(bf16.shared_bytes, 4u * 24000);  // the teacher, too
      EXPECT_GT(f32.shared_bytes, 4u * 24000);   // the logits
      EXPECT_LT(f32.shared_bytes, 8u * 24000);
      EXPECT_EQ(long_f32.shared_bytes, 0u);
      break;
    default:
      EXPECT_EQ(f32.shared_bytes, 0u);
  }
}
#endif

TEST(LossCudaValidationTest, RefusesWhatItCannotDo) {
  // Refused before anything touches a device.
  float value = 0;
  int64_t label = 0;
  std::vector<DenseTeacher> teachers(9);
  for (DenseTeacher& teacher : teachers) teacher.values = &value;
  LossInputs inputs;
  inputs.rows = 1;
  inputs.classes = 1;
  inputs.logits = &value;
  inputs.labels = &label;
  inputs.teachers = teachers;
  inputs.teacher_weight = 1;
  EXPECT_THAT(std::string(LaunchLoss(LossOptions(), inputs, &value, &value, nullptr).message()),
              HasSubstr("teachers are 9; at most 8"));
  inputs.teachers = {};
  EXPECT_EQ(LaunchLoss(LossOptions(), inputs, &value, &value, nullptr).code(),
            absl::StatusCode::kInvalidArgument);
  inputs.teacher_weight = 0;
  EXPECT_THAT(std::string(LaunchLoss(LossOptions(), inputs, &value, nullptr, nullptr).message()),
              HasSubstr("workspace is null"));
  inputs.rows = 0;
  EXPECT_THAT(std::string(LaunchLoss(LossOptions(), inputs, &value, &value, nullptr).message()),
              HasSubstr("rows is 0"));
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
