#include "worker/teacher_list.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/config/teachers.h"
#include "common/model/inputs.h"
#include "common/rpc/channel.h"

namespace codistill {
namespace {

// For names, shapes and parameters; a server keeps as much free.
constexpr double kRoom = 1 << 20;

// Of the predictions for `rows` rows. Doubles: the product may be beyond any integer.
double PredictionBytes(const AnswerFormat& format, double rows, double classes) {
  const auto element = static_cast<double>(ElementSize(format.dtype));
  if (format.top_k > 0) {  // indices, values, tail
    const auto k = static_cast<double>(format.top_k);
    return rows * (k * (sizeof(int32_t) + element) + sizeof(float));
  }
  const double scale = format.dtype == DT_INT8 ? sizeof(float) : 0;
  return rows * (classes * element + scale);
}

}  // namespace

absl::Status CheckAnswerSizes(const JobConfig& job, int group, int64_t labels_per_example) {
  const int64_t examples = job.training().batch_size();
  const int64_t outputs = job.model().num_outputs();
  double states = 0;
  for (const RecurrentState& state : job.model().states()) {
    states += static_cast<double>(ElementCount(StateShape(state, examples))) * sizeof(float);
  }
  for (const TeacherServers& teacher : TeacherServersOf(job, group)) {
    const bool external = teacher.dialect.external();
    const AnswerFormat format = external ? AnswerFormat() : AnswerFormatOf(job.codistillation());
    const double rows = static_cast<double>(examples) * static_cast<double>(labels_per_example);
    const double bytes = PredictionBytes(format, rows, static_cast<double>(outputs)) + states;
    if (bytes + kRoom <= kMaxPredictionBytes) continue;
    const std::string form = format.top_k > 0
                                 ? absl::StrCat("the top ", format.top_k, " of ", outputs)
                                 : absl::StrCat(outputs);
    return absl::InvalidArgumentError(absl::StrCat(
        "training.batch_size: ", examples, " examples of ", labels_per_example, " labels and ",
        form, " outputs as ", DataTypeName(format.dtype), " make answers of teacher ", teacher.name,
        " of ", static_cast<int64_t>(bytes / (1 << 20)), " MiB; one message takes at most ",
        kMaxPredictionBytes >> 20, " MiB. Fewer examples a worker would be right",
        external ? ""
                 : ", or codistillation.teacher_output: TOP_K, or a smaller "
                   "codistillation.teacher_dtype",
        ", or codistillation.enabled=false"));
  }
  return absl::OkStatus();
}

TeacherDialect DialectOf(const ModelConfig& model, const TeacherConfig& teacher) {
  TeacherDialect dialect;
  dialect.model = teacher.name();
  if (!teacher.has_external()) return dialect;
  const ExternalTeacher& external = teacher.external();
  if (!external.model().empty()) dialect.model = external.model();
  dialect.version = external.version();
  dialect.output = external.output();
  dialect.probabilities = external.kind() == ExternalTeacher::PROBABILITIES;
  dialect.codistill_server = external.codistill_server();
  for (const ModelInput& input : model.inputs()) {
    std::string name = input.name();
    for (const ExternalTeacher::InputName& mapped : external.inputs()) {
      if (mapped.input() == input.name()) name = mapped.server();
    }
    dialect.inputs.push_back(std::move(name));
  }
  return dialect;
}

std::vector<TeacherServers> TeacherServersOf(const JobConfig& job, int group) {
  std::vector<TeacherServers> teachers;
  for (const TeacherRef& ref : TeachersOf(job, group)) {
    TeacherServers teacher;
    teacher.name = ref.name;
    teacher.dialect.model = ref.name;
    if (ref.kind == TeacherRef::kExternal) {
      teacher.dialect = DialectOf(job.model(), job.teachers(ref.index));
    }
    for (const Endpoint& endpoint : PredictionServersOf(job, ref)) {
      teacher.addresses.push_back(endpoint.address());
    }
    teachers.push_back(std::move(teacher));
  }
  return teachers;
}

}  // namespace codistill
