#include "cuda/loss_reference.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"

namespace codistill {
namespace {

using Row = std::vector<double>;

double LogSumExp(const Row& x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double value : x) sum += std::exp(value - max);
  return max + std::log(sum);
}

Row LogSoftmax(Row x) {
  const double lse = LogSumExp(x);
  for (double& value : x) value -= lse;
  return x;
}

// log of the mean of exp, for averages of probabilities held as logarithms.
Row LogMeanExp(const std::vector<Row>& rows) {
  Row result(rows[0].size());
  for (size_t c = 0; c < result.size(); ++c) {
    Row column;
    for (const Row& row : rows) column.push_back(row[c]);
    result[c] = LogSumExp(column) - std::log(rows.size());
  }
  return result;
}

Row Mean(const std::vector<Row>& rows) {
  Row result(rows[0].size());
  for (const Row& row : rows) {
    for (size_t c = 0; c < row.size(); ++c) result[c] += row[c] / rows.size();
  }
  return result;
}

Row Divided(Row x, double by) {
  for (double& value : x) value /= by;
  return x;
}

Row Load(const void* data, NumberFormat format, int64_t row, int64_t classes) {
  Row values;
  for (int64_t i = row * classes; i < (row + 1) * classes; ++i) {
    values.push_back(
        format == NumberFormat::kFloat32    ? static_cast<const float*>(data)[i]
        : format == NumberFormat::kFloat16  ? FromFloat16(static_cast<const uint16_t*>(data)[i])
        : format == NumberFormat::kBfloat16 ? FromBfloat16(static_cast<const uint16_t*>(data)[i])
                                            : static_cast<const int8_t*>(data)[i]);
  }
  return values;
}

Row Load(const DenseTeacher& teacher, int64_t row, int64_t classes) {
  Row values = Load(teacher.values, teacher.format, row, classes);
  if (teacher.format == NumberFormat::kInt8) {
    for (double& value : values) value = static_cast<float>(value) * teacher.scale[row];
  }
  return values;
}

// Logarithms of probabilities, which may be 0.
Row LogProbabilities(Row q) {
  double sum = 0;
  for (double value : q) sum += value;
  for (double& value : q) value = std::log(std::max(value / sum, std::ldexp(1.0, -126)));
  return q;
}

// psi over one set of alternatives, given log p of the student and log q of the teachers at
// temperature; adds the derivatives by z to `gradient`.
double Distill(LossOptions::TeacherLoss kind, double temperature, const Row& log_p,
               const Row& log_q, Row* gradient) {
  const double t2 = temperature * temperature;
  double loss = 0;
  for (size_t c = 0; c < log_p.size(); ++c) {
    const double p = std::exp(log_p[c]), q = std::exp(log_q[c]);
    if (kind == LossOptions::kKlStudentTeacher) {
      if (p > 0) loss += p * (log_p[c] - log_q[c]);
    } else {
      loss -= q * log_p[c];
      if (kind == LossOptions::kKlTeacherStudent && q > 0) loss += q * log_q[c];
    }
  }
  for (size_t c = 0; c < log_p.size(); ++c) {
    const double p = std::exp(log_p[c]), q = std::exp(log_q[c]);
    (*gradient)[c] = temperature * (kind == LossOptions::kKlStudentTeacher
                                        ? (p > 0 ? p * (log_p[c] - log_q[c] - loss) : 0)
                                        : p - q);
  }
  return t2 * loss;
}

// psi of a teacher that names k classes, row r, as a loss over those and one bucket more; adds its
// derivatives by z to `gradient`.
double DistillTopK(LossOptions::TeacherLoss kind, double temperature, const Row& log_p,
                   const TopKTeacher& teacher, int64_t r, Row* gradient) {
  Row q(log_p.size(), -1);  // -1: not named
  double mass = 0;
  for (int64_t i = r * teacher.k; i < (r + 1) * teacher.k; ++i) {
    q[teacher.index[i]] = teacher.value[i];
    mass += teacher.value[i];
  }
  const bool has_tail = teacher.k < static_cast<int64_t>(log_p.size());
  double tail = has_tail ? teacher.tail[r] : 0;
  mass += tail;
  tail /= mass;
  Row log_others;
  for (size_t c = 0; c < log_p.size(); ++c) {
    if (q[c] < 0) log_others.push_back(log_p[c]);
    if (q[c] > 0) q[c] /= mass;
  }
  const double log_tail = has_tail ? LogSumExp(log_others) : 0;
  double loss = -tail * log_tail;
  const bool divergence = kind == LossOptions::kKlTeacherStudent;
  if (divergence && tail > 0) loss += tail * std::log(tail);
  for (size_t c = 0; c < log_p.size(); ++c) {
    const double p = std::exp(log_p[c]);
    if (q[c] < 0) {
      (*gradient)[c] += temperature * (p - tail * std::exp(log_p[c] - log_tail));
      continue;
    }
    (*gradient)[c] += temperature * (p - q[c]);
    loss -= q[c] * log_p[c];
    if (divergence && q[c] > 0) loss += q[c] * std::log(q[c]);
  }
  return temperature * temperature * loss;
}

double SquaredError(const Row& z, const Row& target, Row* gradient) {
  double loss = 0;
  for (size_t c = 0; c < z.size(); ++c) {
    const double difference = z[c] - target[c];
    loss += difference * difference / 2 / z.size();
    (*gradient)[c] = difference / z.size();
  }
  return loss;
}

// The two log probabilities of a binary decision with logit x: of yes and of no.
Row LogBinary(double x) { return LogSoftmax({x, 0}); }

// What a label is smoothed towards.
Row PriorOf(const LossInputs& inputs) {
  if (inputs.label_prior == nullptr) {
    return Row(inputs.classes, 1 / static_cast<double>(inputs.classes));
  }
  Row prior(inputs.label_prior, inputs.label_prior + inputs.classes);
  double sum = 0;
  for (double value : prior) sum += value;
  return Divided(std::move(prior), sum);
}

}  // namespace

ReferenceLoss ComputeLossReference(const LossOptions& options, const LossInputs& inputs,
                                   absl::Span<const double> logits) {
  const int64_t classes = inputs.classes;
  const double smoothing = options.label_smoothing, T = options.temperature;
  ReferenceLoss result;
  result.gradient.assign(inputs.rows * classes, 0);
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  const Row prior = PriorOf(inputs);
  const double weight_sum = WeightOf(options, inputs);
  result.sums.weight_sum = weight_sum;
  for (int64_t r = 0; r < inputs.rows; ++r) {
    const double weight = inputs.row_weights == nullptr ? 1 : inputs.row_weights[r];
    if (weight == 0) continue;
    if (softmax && options.ignored_label.has_value() && inputs.labels[r] == *options.ignored_label)
      continue;
    const Row z = logits.empty() ? Load(inputs.logits, inputs.logits_format, r, classes)
                                 : Row(&logits[r * classes], &logits[r * classes] + classes);
    Row label_gradient(classes), teacher_gradient(classes);
    double label_loss = 0, teacher_loss = 0;
    bool correct = false;

    if (softmax) {
      const Row log_p = LogSoftmax(z);
      for (int64_t c = 0; c < classes; ++c) {
        const double y = (c == inputs.labels[r] ? 1 - smoothing : 0) + smoothing * prior[c];
        label_loss -= y * log_p[c];
        label_gradient[c] = std::exp(log_p[c]) - y;
      }
      correct = std::max_element(z.begin(), z.end()) - z.begin() == inputs.labels[r];
    } else if (options.label_loss == LossOptions::kSigmoidCrossEntropy) {
      const Row y = Load(inputs.targets, NumberFormat::kFloat32, r, classes);
      correct = true;
      for (int64_t c = 0; c < classes; ++c) {
        const double smooth = (1 - smoothing) * y[c] + smoothing / 2;
        const Row log_p = LogBinary(z[c]);
        label_loss -= (smooth * log_p[0] + (1 - smooth) * log_p[1]) / classes;
        label_gradient[c] = (std::exp(log_p[0]) - smooth) / classes;
        if ((z[c] > 0) != (y[c] > 0.5)) correct = false;
      }
    } else {
      label_loss = SquaredError(z, Load(inputs.targets, NumberFormat::kFloat32, r, classes),
                                &label_gradient);
    }

    if (inputs.teacher_weight > 0) {
      std::vector<Row> teachers;
      for (const DenseTeacher& teacher : inputs.teachers) {
        teachers.push_back(Load(teacher, r, classes));
      }
      const bool of_logits = options.teacher_average == LossOptions::kLogits;
      if (options.teacher_loss == LossOptions::kSquaredErrorLogits) {
        teacher_loss = SquaredError(z, Mean(teachers), &teacher_gradient);
      } else if (softmax) {
        std::vector<Row> log_q;
        if (of_logits) {
          log_q.push_back(LogSoftmax(Divided(Mean(teachers), T)));
        } else {
          for (size_t k = 0; k < teachers.size(); ++k) {
            log_q.push_back(inputs.teachers[k].kind == DenseTeacher::kLogits
                                ? LogSoftmax(Divided(teachers[k], T))
                                : LogProbabilities(teachers[k]));
          }
        }
        const Row log_p = LogSoftmax(Divided(z, T));
        const double dense = static_cast<double>(teachers.size());
        const double all = dense + static_cast<double>(inputs.topk_teachers.size());
        if (!teachers.empty()) {
          teacher_loss =
              dense / all *
              Distill(options.teacher_loss, T, log_p, LogMeanExp(log_q), &teacher_gradient);
        }
        for (double& value : teacher_gradient) value *= dense;
        for (const TopKTeacher& teacher : inputs.topk_teachers) {
          teacher_loss +=
              DistillTopK(options.teacher_loss, T, log_p, teacher, r, &teacher_gradient) / all;
        }
        for (double& value : teacher_gradient) value /= all;
      } else {
        const Row mean = Mean(teachers);
        for (int64_t c = 0; c < classes; ++c) {
          std::vector<Row> log_q;
          if (of_logits) {
            log_q.push_back(LogBinary(mean[c] / T));
          } else {
            for (size_t k = 0; k < teachers.size(); ++k) {
              const double value = teachers[k][c];
              log_q.push_back(inputs.teachers[k].kind == DenseTeacher::kLogits
                                  ? LogBinary(value / T)
                                  : LogProbabilities({value, 1 - value}));
            }
          }
          Row gradient(2);
          teacher_loss +=
              Distill(options.teacher_loss, T, LogBinary(z[c] / T), LogMeanExp(log_q), &gradient) /
              classes;
          teacher_gradient[c] = gradient[0] / classes;  // the second alternative's logit is fixed
        }
      }
    }

    for (int64_t c = 0; c < classes; ++c) {
      result.gradient[r * classes + c] =
          (label_gradient[c] + inputs.teacher_weight * teacher_gradient[c]) *
          inputs.gradient_scale * weight / weight_sum;
    }
    result.sums.label_loss_sum += weight * label_loss;
    result.sums.teacher_loss_sum += weight * teacher_loss;
    ++result.sums.counted_rows;
    result.sums.correct += correct;
  }
  return result;
}

}  // namespace codistill
