#include "server/embedding/row_optimizer.h"

#include <cmath>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "server/embedding/row_kernels.h"

namespace codistill {
namespace {

int NumSlots(RowOptimizer::Kind kind) {
  switch (kind) {
    case RowOptimizer::Kind::kSgd:
      return 0;
    case RowOptimizer::Kind::kMomentum:
    case RowOptimizer::Kind::kAdagrad:
      return 1;
    case RowOptimizer::Kind::kAdam:
    case RowOptimizer::Kind::kFtrl:
      return 2;
  }
  return 0;
}

}  // namespace

RowOptimizer::RowOptimizer(const Options& options, int dim)
    : options_(options), dim_(dim), num_slots_(NumSlots(options.kind)) {}

absl::Status RowOptimizer::Check(const Options& options) {
  const auto check = [](bool good, const char* field, float value, const char* right) {
    if (good && std::isfinite(value)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(field, ": ", value, "; ", right));
  };
  const struct {
    bool good;
    const char* field;
    float value;
    const char* right;
  } rules[] = {
      {options.weight_decay >= 0, "weight_decay", options.weight_decay, "0 or more is right"},
      {options.momentum >= 0 && options.momentum < 1, "momentum", options.momentum,
       "a value in [0, 1) is right"},
      {options.beta1 >= 0 && options.beta1 < 1, "beta1", options.beta1,
       "a value in [0, 1) is right"},
      {options.beta2 >= 0 && options.beta2 < 1, "beta2", options.beta2,
       "a value in [0, 1) is right"},
      {options.epsilon >= 0, "epsilon", options.epsilon, "0 or more is right"},
      {options.initial_accumulator >= 0, "initial_accumulator", options.initial_accumulator,
       "0 or more is right"},
      {options.ftrl_beta >= 0, "ftrl_beta", options.ftrl_beta, "0 or more is right"},
      {options.l1 >= 0, "l1", options.l1, "0 or more is right"},
      {options.l2 >= 0, "l2", options.l2, "0 or more is right"},
  };
  for (const auto& rule : rules) {
    if (absl::Status s = check(rule.good, rule.field, rule.value, rule.right); !s.ok()) return s;
  }
  if (options.kind == Kind::kFtrl && options.weight_decay != 0) {
    return absl::InvalidArgumentError("weight_decay: FTRL takes none; l2 is right");
  }
  // The first gradient of a row divides by it.
  if (options.kind == Kind::kAdagrad && options.epsilon == 0 && options.initial_accumulator == 0) {
    return absl::InvalidArgumentError(
        "epsilon: 0 with initial_accumulator 0; one of them must be positive for ADAGRAD");
  }
  if (options.kind == Kind::kAdam && options.epsilon == 0) {
    return absl::InvalidArgumentError("epsilon: 0; a positive value is right for ADAM");
  }
  if (options.kind == Kind::kFtrl && options.ftrl_beta == 0 && options.initial_accumulator == 0 &&
      options.l2 == 0) {
    return absl::InvalidArgumentError(
        "ftrl_beta: 0 with initial_accumulator and l2 0; one of them must be positive for FTRL");
  }
  return absl::OkStatus();
}

std::vector<std::string> RowOptimizer::SlotNames() const {
  switch (options_.kind) {
    case Kind::kSgd:
      return {};
    case Kind::kMomentum:
      return {"momentum"};
    case Kind::kAdagrad:
      return {"accumulator"};
    case Kind::kAdam:
      return {"m", "v"};
    case Kind::kFtrl:
      return {"z", "n"};
  }
  return {};
}

RowOptimizer::Step RowOptimizer::MakeStep(double learning_rate, int64_t step) const {
  Step made;
  made.learning_rate = static_cast<float>(learning_rate);
  if (options_.kind == Kind::kAdam) {
    const double t = static_cast<double>(step);
    made.adam_rate = static_cast<float>(learning_rate / (1.0 - std::pow(options_.beta1, t)));
    made.adam_correction2 = static_cast<float>(1.0 / (1.0 - std::pow(options_.beta2, t)));
  }
  return made;
}

void RowOptimizer::InitSlots(const Step& step, float* row) const {
  float* const slots = row + dim_;
  switch (options_.kind) {
    case Kind::kSgd:
      return;
    case Kind::kMomentum:
    case Kind::kAdagrad:
      for (int i = 0; i < dim_; ++i) {
        slots[i] = options_.kind == Kind::kAdagrad ? options_.initial_accumulator : 0;
      }
      return;
    case Kind::kAdam:
      for (int i = 0; i < 2 * dim_; ++i) slots[i] = 0;
      return;
    case Kind::kFtrl: {
      // Solved for z, the formula for w gives the z that a weight stands for; from there on the
      // sums are as if they had begun at that weight. At a learning rate of 0 there is no such z.
      const float n = options_.initial_accumulator;
      const float rate =
          step.learning_rate > 0
              ? (options_.ftrl_beta + std::sqrt(n)) / step.learning_rate + options_.l2
              : 0;
      for (int i = 0; i < dim_; ++i) {
        slots[i] = row[i] == 0 ? 0 : -row[i] * rate - std::copysign(options_.l1, row[i]);
        slots[dim_ + i] = n;
      }
      return;
    }
  }
}

void RowOptimizer::Apply(const Step& step, absl::Span<float* const> rows,
                         absl::Span<const float* const> gradients) const {
  // FTRL's rate is its divisor; with none nothing is learned.
  if (options_.kind == Kind::kFtrl && !(step.learning_rate > 0)) return;
  internal::ApplyToRows({this, &step, rows.data(), gradients.data(), rows.size()});
}

bool AllFinite(const float* x, int64_t n) { return internal::AllFinite(x, n); }

}  // namespace codistill
