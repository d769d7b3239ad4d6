#include "tests/integration/teacher_answers.h"

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr int64_t kRows = 64, kClasses = 8000;

// Logits as a language model has them: few likely words in every place, a long tail after
// Zipf's law. `context` decides which are likely; two models of the same text agree on that and
// differ in the rest.
Tensor LanguageModelLogits(uint64_t context, uint64_t model) {
  Tensor logits = Tensor::Allocate(DT_FLOAT, {kRows, kClasses});
  RandomStream shared(context), own(model);
  for (int64_t r = 0; r < kRows; ++r) {
    float* z = logits.As<float>().data() + r * kClasses;
    for (int64_t c = 0; c < kClasses; ++c) {
      const double frequency = -std::log(static_cast<double>(c) + 2.7);
      z[c] = static_cast<float>(frequency + 1.5 * shared.Normal() + 0.5 * own.Normal());
    }
    for (int i = 0; i < 20; ++i) z[shared.Below(kClasses)] += 7;
  }
  return logits;
}

// The promises of each format, on models that were made up; tests/benchmarks/teacher_formats has
// them of a model that was trained.
TEST(TeacherAnswersTest, FewerBytesTeachNearlyTheSame) {
  auto config = std::make_shared<ModelConfig>();
  config->set_num_outputs(kClasses);
  auto* input = config->add_inputs();
  input->set_name("tokens");
  input->set_dtype(DT_INT64);
  auto batch = std::make_shared<TeacherBatch>();
  batch->examples = batch->rows = kRows;
  batch->inputs = {Tensor::Zeros(DT_INT64, {kRows})};
  const Tensor teacher = LanguageModelLogits(1, 2), student = LanguageModelLogits(1, 3);
  const std::vector<int64_t> labels(kRows, 5);
  LossInputs inputs;
  inputs.rows = kRows;
  inputs.classes = kClasses;
  inputs.logits = student.As<float>().data();
  inputs.labels = labels.data();

  struct Seen {
    double bytes, divergence;
    Cosines cosines;
  };
  std::map<std::string, Seen> seen;
  std::vector<double> dense;
  for (const NamedFormat& format : AllAnswerFormats()) {
    const auto exchange = AskAndAnswer(config, batch, format.format, teacher, {});
    ASSERT_TRUE(exchange.ok()) << format.name << ": " << exchange.status();
    const InferenceAnswer& answer = exchange->answer;
    const auto gradient = PsiGradient(LossOptions(), inputs, answer);
    ASSERT_TRUE(gradient.ok()) << format.name << ": " << gradient.status();
    if (dense.empty()) {
      dense = *gradient;
      ASSERT_EQ(std::memcmp(answer.logits.data(), teacher.data(), teacher.bytes()), 0);
    }
    Seen& of = seen[format.name];
    of.bytes = static_cast<double>(exchange->response_bytes) / static_cast<double>(teacher.bytes());
    of.cosines = CosinesOf(*gradient, dense, kRows);
    of.divergence =
        answer.top_k.empty()
            ? SumOfDivergences(teacher.As<float>().data(),
                               Widened(answer.logits).As<float>().data(), kRows, kClasses) /
                  kRows
            : -1;
  }
  EXPECT_EQ(seen["fp32"].divergence, 0);
  EXPECT_NEAR(seen["fp16"].bytes, 0.5, 1e-3);
  EXPECT_NEAR(seen["int8"].bytes, 0.25, 1e-3);
  EXPECT_NEAR(seen["topk64"].bytes, (64.0 * 8 + 4) / (4 * kClasses), 1e-3);
  EXPECT_NEAR(seen["topk64_fp16"].bytes, (64.0 * 6 + 4) / (4 * kClasses), 1e-3);
  EXPECT_GT(seen["fp16"].divergence, 0);
  EXPECT_LT(seen["fp16"].divergence, 1e-5);
  EXPECT_LT(seen["bf16"].divergence, 1e-3);
  EXPECT_LT(seen["int8"].divergence, 1e-2);
  EXPECT_GT(seen["int8"].cosines.whole, 0.99);
  for (const char* name : {"topk64", "topk64_fp16", "topk64_bf16", "topk256_fp16"}) {
    EXPECT_GT(seen[name].cosines.whole, 0.99) << name;
    EXPECT_GT(seen[name].cosines.row_mean, 0.9) << name;
  }
  // What is left out does cost something.
  EXPECT_LT(seen["topk64"].cosines.whole, 1 - 1e-7);
  EXPECT_GT(seen["topk256_fp16"].cosines.row_mean, seen["topk64_fp16"].cosines.row_mean);
  EXPECT_GT(seen["topk64"].cosines.row_mean, seen["topk16"].cosines.row_mean);
}

}  // namespace
}  // namespace codistill
