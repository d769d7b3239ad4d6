#include "cuda/loss_combinations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "common/tensor/int8_rows.h"

namespace codistill {
namespace {

constexpr auto kLogits = DenseTeacher::kLogits;
constexpr auto kProbabilities = DenseTeacher::kProbabilities;

enum Smoothing { kNone, kUniform, kUnigram };

const char* NameOf(LossOptions::LabelLoss loss) {
  return loss == LossOptions::kSoftmaxCrossEntropy   ? "softmax"
         : loss == LossOptions::kSigmoidCrossEntropy ? "sigmoid"
                                                     : "square";
}

const char* NameOf(LossOptions::TeacherLoss loss) {
  switch (loss) {
    case LossOptions::kSoftCrossEntropy:
      return "soft";
    case LossOptions::kKlTeacherStudent:
      return "kl_teacher_student";
    case LossOptions::kKlStudentTeacher:
      return "kl_student_teacher";
    case LossOptions::kSquaredErrorLogits:
      break;
  }
  return "squared_logits";
}

struct Teachers {
  const char* name;
  std::vector<LossCombination::Dense> dense;
  std::vector<int64_t> top_k;
  LossOptions::TeacherAverage average;
};

// What teachers there can be, one after the other.
std::vector<Teachers> AllTeachers() {
  const auto f32 = NumberFormat::kFloat32, f16 = NumberFormat::kFloat16,
             bf16 = NumberFormat::kBfloat16, int8 = NumberFormat::kInt8;
  const auto probabilities = LossOptions::kProbabilities, logits = LossOptions::kLogits;
  return {
      {"logits_f32", {{kLogits, f32}}, {}, probabilities},
      {"given_f32", {{kProbabilities, f32}}, {}, probabilities},
      {"logits_f16", {{kLogits, f16}}, {}, probabilities},
      {"given_bf16", {{kProbabilities, bf16}}, {}, probabilities},
      {"logits_int8", {{kLogits, int8}}, {}, probabilities},
      {"top3", {}, {3}, probabilities},
      {"logits_bf16_f32", {{kLogits, bf16}, {kLogits, f32}}, {}, logits},
      {"given_f16", {{kProbabilities, f16}}, {}, probabilities},
      {"logits_bf16", {{kLogits, bf16}}, {}, probabilities},
      {"given_f32_f32", {{kProbabilities, f32}, {kProbabilities, f32}}, {}, probabilities},
      {"logits_f32_f32_f32", {{kLogits, f32}, {kLogits, f32}, {kLogits, f32}}, {}, probabilities},
      {"logits_int8_given_f16_f32",
       {{kLogits, int8}, {kProbabilities, f16}, {kLogits, f32}},
       {},
       probabilities},
      {"top2_all", {}, {2, 0}, probabilities},
      {"top1_logits_f16_given_f32", {{kLogits, f16}, {kProbabilities, f32}}, {1}, probabilities},
      {"logits_f16_int8", {{kLogits, f16}, {kLogits, int8}}, {}, logits},
  };
}

bool Fit(const Teachers& teachers, const LossOptions& options) {
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  const bool matches = options.teacher_loss == LossOptions::kSoftCrossEntropy ||
                       options.teacher_loss == LossOptions::kKlTeacherStudent;
  if (!teachers.top_k.empty() && !(softmax && matches)) return false;
  for (const LossCombination::Dense& dense : teachers.dense) {
    if (dense.kind == kProbabilities && options.teacher_loss == LossOptions::kSquaredErrorLogits) {
      return false;
    }
  }
  return true;
}

}  // namespace

std::vector<LossCombination> AllLossCombinations() {
  const std::vector<Teachers> all_teachers = AllTeachers();
  std::vector<LossCombination> list;
  size_t turn = 0;
  for (auto label_loss : {LossOptions::kSoftmaxCrossEntropy, LossOptions::kSigmoidCrossEntropy,
                          LossOptions::kSquaredError}) {
    const bool softmax = label_loss == LossOptions::kSoftmaxCrossEntropy;
    const bool square = label_loss == LossOptions::kSquaredError;
    for (auto teacher_loss : {LossOptions::kSoftCrossEntropy, LossOptions::kKlTeacherStudent,
                              LossOptions::kKlStudentTeacher, LossOptions::kSquaredErrorLogits}) {
      if (square && teacher_loss != LossOptions::kSquaredErrorLogits) continue;
      for (float temperature : {1.0f, 2.0f, 3.5f}) {
        for (Smoothing smoothing : {kNone, kUniform, kUnigram}) {
          if ((smoothing == kUnigram && !softmax) || (smoothing == kUniform && square)) continue;
          LossCombination combination;
          combination.options.label_loss = label_loss;
          combination.options.teacher_loss = teacher_loss;
          combination.options.temperature = temperature;
          combination.options.label_smoothing = smoothing == kNone ? 0 : 0.1f;
          combination.prior = smoothing == kUnigram;
          // More of the softmax, which has more to it.
          for (int i = 0; i < (softmax ? 4 : 2); ++i) {
            ++turn;
            while (!Fit(all_teachers[turn % all_teachers.size()], combination.options)) ++turn;
            const Teachers& teachers = all_teachers[turn % all_teachers.size()];
            combination.teachers = teachers.dense;
            combination.topk_teachers = teachers.top_k;
            combination.options.teacher_average = teachers.average;
            combination.weights = list.size() % 3 == 1;
            combination.options.ignored_label.reset();
            if (softmax && list.size() % 5 == 2) combination.options.ignored_label = 1;
            if (softmax && list.size() % 5 == 4) combination.options.ignored_label = -100;
            combination.logits_format =
                list.size() % 4 == 3 ? NumberFormat::kBfloat16 : NumberFormat::kFloat32;
            combination.name =
                absl::StrCat(NameOf(label_loss), " + ", NameOf(teacher_loss), ", T ", temperature,
                             smoothing == kNone      ? ""
                             : smoothing == kUniform ? ", uniform smoothing"
                                                     : ", unigram smoothing",
                             ", teachers ", teachers.name, combination.weights ? ", weights" : "",
                             combination.options.ignored_label.has_value() ? ", ignored label" : "",
                             ", ", NameOf(combination.logits_format));
            list.push_back(combination);
          }
        }
      }
    }
  }
  return list;
}

std::vector<char> Encode(const std::vector<float>& values, NumberFormat format) {
  std::vector<char> bytes(values.size() * BytesOf(format));
  switch (format) {
    case NumberFormat::kFloat16:
      ToFloat16(values.data(), values.size(), reinterpret_cast<uint16_t*>(bytes.data()));
      break;
    case NumberFormat::kBfloat16:
      ToBfloat16(values.data(), values.size(), reinterpret_cast<uint16_t*>(bytes.data()));
      break;
    default:
      std::memcpy(bytes.data(), values.data(), bytes.size());
  }
  return bytes;
}

EncodedTeacher::EncodedTeacher(const std::vector<float>& values, int64_t rows, int64_t classes,
                               DenseTeacher::Kind kind, NumberFormat format) {
  view.kind = kind;
  view.format = format;
  if (format == NumberFormat::kInt8) {
    bytes.resize(values.size());
    scale.resize(rows);
    QuantizeInt8Rows(values.data(), rows, classes, reinterpret_cast<int8_t*>(bytes.data()),
                     scale.data());
    view.scale = scale.data();
  } else {
    bytes = Encode(values, format);
  }
  view.values = bytes.data();
}

std::vector<float> ProbabilitiesOf(const std::vector<float>& logits, int64_t rows, int64_t classes,
                                   double temperature, bool binary) {
  std::vector<float> probabilities(logits.size());
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = &logits[r * classes];
    const double max = *std::max_element(x, x + classes);
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp((x[c] - max) / temperature);
    for (int64_t c = 0; c < classes; ++c) {
      probabilities[r * classes + c] =
          static_cast<float>(binary ? 1 / (1 + std::exp(-x[c] / temperature))
                                    : std::exp((x[c] - max) / temperature) / sum);
    }
  }
  return probabilities;
}

CombinationBatch::CombinationBatch(const LossCombination& combination, int64_t rows,
                                   int64_t classes, double spread, uint64_t seed) {
  RandomStream random(seed);
  const auto draw = [&] {
    std::vector<float> values(rows * classes);
    for (float& value : values) value = static_cast<float>(spread * random.Normal());
    return values;
  };
  const LossOptions& options = combination.options;
  const bool binary = options.label_loss == LossOptions::kSigmoidCrossEntropy;
  inputs_.rows = rows;
  inputs_.classes = classes;
  inputs_.logits_format = combination.logits_format;
  logits_ = Encode(draw(), combination.logits_format);
  inputs_.logits = logits_.data();
  for (int64_t r = 0; r < rows; ++r) {
    labels_.push_back(static_cast<int64_t>(random.Below(classes)));
    if (options.ignored_label.has_value() && r % 3 == 1) labels_.back() = *options.ignored_label;
  }
  if (options.label_loss == LossOptions::kSoftmaxCrossEntropy) {
    inputs_.labels = labels_.data();
  } else {
    for (int64_t i = 0; i < rows * classes; ++i) {
      targets_.push_back(binary ? static_cast<float>(random.Below(5)) / 4
                                : static_cast<float>(random.Normal()));
    }
    inputs_.targets = targets_.data();
  }
  if (combination.prior) {
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += 1.0 / (static_cast<double>(c) + 1.5);
    for (int64_t c = 0; c < classes; ++c) {
      prior_.push_back(static_cast<float>(1 / (static_cast<double>(c) + 1.5) / sum));
    }
    inputs_.label_prior = prior_.data();
  }
  if (combination.weights) {
    for (int64_t r = 0; r < rows; ++r) weights_.push_back(r % 4 == 3 ? 0 : 0.5f + r % 4);
    inputs_.row_weights = weights_.data();
  }
  for (const LossCombination::Dense& dense : combination.teachers) {
    std::vector<float> values = draw();
    if (dense.kind == DenseTeacher::kProbabilities) {
      values = ProbabilitiesOf(values, rows, classes, options.temperature, binary);
    }
    teachers_.push_back(
        std::make_unique<EncodedTeacher>(values, rows, classes, dense.kind, dense.format));
    dense_views_.push_back(teachers_.back()->view);
  }
  for (int64_t k : combination.topk_teachers) {
    AddTopK(ProbabilitiesOf(draw(), rows, classes, options.temperature, false),
            k == 0 ? classes : std::min(k, classes));
  }
  inputs_.teachers = dense_views_;
  inputs_.topk_teachers = topk_views_;
  inputs_.teacher_weight = 0.7f;
}

void CombinationBatch::AddTopK(const std::vector<float>& probabilities, int64_t k) {
  auto top_k = std::make_unique<TopK>();
  const int64_t classes = inputs_.classes;
  for (int64_t r = 0; r < inputs_.rows; ++r) {
    const float* p = &probabilities[r * classes];
    std::vector<int32_t> order(classes);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [p](int a, int b) { return p[a] > p[b]; });
    double rest = 0;
    for (int64_t i = classes - 1; i >= k; --i) rest += p[order[i]];
    for (int64_t i = 0; i < k; ++i) {
      top_k->index.push_back(order[i]);
      top_k->value.push_back(p[order[i]]);
    }
    top_k->tail.push_back(static_cast<float>(rest));
  }
  TopKTeacher view;
  view.index = top_k->index.data();
  view.value = top_k->value.data();
  view.tail = top_k->tail.data();
  view.k = k;
  topk_views_.push_back(view);
  top_k_.push_back(std::move(top_k));
}

}  // namespace codistill
