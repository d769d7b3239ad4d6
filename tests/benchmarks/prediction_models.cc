#include "tests/benchmarks/prediction_models.h"

#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "control/exporter.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

// From the root of the runfiles.
constexpr char kDirectBinary[] = "tests/benchmarks/direct_predictions";
constexpr char kServerBinary[] = "predserver/prediction_server";
constexpr char kPython[] = "/usr/bin/python3";
constexpr char kGroup[] = "alpha";
constexpr size_t kMostBytes = size_t{1} << 30;

// A job that nobody runs: settings and a description of the model.
JobConfig JobOf(const std::string& name, const ModelConfig& model,
                const PredictionConfig& settings) {
  JobConfig job;
  job.set_name(name);
  *job.mutable_model() = model;
  job.add_groups()->set_name(kGroup);
  for (const bool train : {true, false}) {
    DatasetConfig* const data =
        train ? job.mutable_data()->mutable_train() : job.mutable_data()->mutable_validation();
    if (model.inputs(0).shape_size() == 1) {
      data->mutable_synthetic()->set_inputs(model.inputs(0).shape(0));
      data->mutable_synthetic()->set_classes(model.num_outputs());
      data->mutable_synthetic()->set_stream(train ? 0 : 1);
    } else {
      data->mutable_image()->add_files(train ? "train" : "validation");
    }
  }
  job.mutable_training()->set_batch_size(64);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.1);
  job.mutable_codistillation()->set_enabled(false);
  job.mutable_evaluator()->set_enabled(false);
  job.mutable_stop()->set_steps(1);
  *job.mutable_prediction() = settings;
  return job;
}

std::vector<float> RandomExamples(int64_t elements) {
  RandomStream random(20180409);
  std::vector<float> values(elements);
  for (float& value : values) value = static_cast<float>(random.Uniform());
  return values;
}

}  // namespace

absl::StatusOr<std::unique_ptr<MeasuredModel>> MeasuredModel::Create(Options options,
                                                                     const std::string& directory) {
  std::unique_ptr<MeasuredModel> model(
      new MeasuredModel(std::move(options), JoinPath(directory, options.name)));
  const Options& o = model->options_;
  CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(model->directory_));
  ModelConfig& config = model->config_;
  ModelInput* const input = config.add_inputs();
  input->set_name(o.input);
  for (const int64_t size : o.shape) input->add_shape(size);
  config.set_num_outputs(o.classes);
  config.mutable_export_()->set_module(o.module);
  for (const auto& [key, value] : o.options) {
    ModelExport::Option* const option = config.mutable_export_()->add_options();
    option->set_key(key);
    option->set_value(value);
  }
  CODISTILL_ASSIGN_OR_RETURN(const std::string exporter, FindExporter(""));
  CODISTILL_RETURN_IF_ERROR(ExportModels(JobOf(o.name, config, {}), "", kPython, exporter,
                                         model->directory_, /*resume=*/false, nullptr));
  config.clear_export_();
  config.set_archive_dir(model->directory_);
  model->archive_ = JoinPath(model->directory_, absl::StrCat(kGroup, ".pt"));

  KnownAnswers& known = model->known_;
  known.model = o.name;
  known.input = o.input;
  known.shape = o.shape;
  known.classes = o.classes;
  int64_t width = 1;
  for (const int64_t size : o.shape) width *= size;
  known.examples = RandomExamples(o.examples * width);
  const std::string inputs = JoinPath(model->directory_, "inputs");
  const std::string outputs = JoinPath(model->directory_, "outputs");
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(
      inputs, absl::string_view(reinterpret_cast<const char*>(known.examples.data()),
                                known.examples.size() * sizeof(float))));

  // The last one's outputs are what is compared with.
  for (const int optimize : {2, 1, 0}) {
    CODISTILL_ASSIGN_OR_RETURN(
        model->direct_[optimize],
        PipedProcess::Start({kDirectBinary, model->archive_, inputs, absl::StrJoin(o.shape, ","),
                             outputs, absl::StrCat(optimize)},
                            kServerCore));
  }
  CODISTILL_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(outputs, kMostBytes));
  known.logits.resize(static_cast<size_t>(o.examples * o.classes));
  if (bytes.size() != known.logits.size() * sizeof(float)) {
    return absl::InternalError(absl::StrCat(outputs, ": ", bytes.size(), " bytes"));
  }
  std::memcpy(known.logits.data(), bytes.data(), bytes.size());
  return model;
}

absl::StatusOr<MeasuredModel::Direct> MeasuredModel::Ask(int which, int64_t rows, int passes) {
  CODISTILL_ASSIGN_OR_RETURN(const nlohmann::json json,
                             direct_[which]->Ask(absl::StrCat(rows, " ", passes)));
  return Direct{json.value("seconds", 0.0), json.value("passes", std::vector<double>())};
}

absl::Status MeasuredModel::Compare(int64_t rows) {
  if (fastest_.count(rows) > 0) return absl::OkStatus();
  std::vector<double> seconds[kLoops];
  // The first passes, from which the JIT learns, do not count.
  for (int round = 0; round < 6; ++round) {
    for (int which = 0; which < kLoops; ++which) {
      CODISTILL_ASSIGN_OR_RETURN(const Direct direct, Ask(which, rows, 3));
      if (round >= 2) seconds[which].push_back(Median(direct.passes));
    }
  }
  const double off = Median(seconds[0]), on = Median(seconds[1]), compiled = Median(seconds[2]);
  std::printf(
      "%s: libtorch, %lld rows: %.5f s a pass, with graph optimisation %.5f s, compiled for "
      "inference %.5f s\n",
      options_.name.c_str(), static_cast<long long>(rows), off, on, compiled);
  forward_[rows] = on < off ? 1 : 0;
  fastest_[rows] = compiled < std::min(on, off) ? 2 : forward_[rows];
  return absl::OkStatus();
}

absl::StatusOr<MeasuredModel::Direct> MeasuredModel::RunDirect(int64_t rows, int passes) {
  CODISTILL_RETURN_IF_ERROR(Compare(rows));
  return Ask(fastest_[rows], rows, passes);
}

absl::StatusOr<MeasuredModel::Direct> MeasuredModel::RunForward(int64_t rows, int passes) {
  CODISTILL_RETURN_IF_ERROR(Compare(rows));
  return Ask(forward_[rows], rows, passes);
}

absl::StatusOr<std::unique_ptr<MeasuredModel::Server>> MeasuredModel::Serve(
    const PredictionConfig& settings, const std::vector<std::string>& flags, int core) {
  const std::string base = JoinPath(directory_, absl::StrCat("server", servers_++));
  const std::string job = base + ".textproto";
  CODISTILL_RETURN_IF_ERROR(SaveJob(JobOf(options_.name, config_, settings), job));
  const std::string ready = base + ".ready";
  auto server = std::make_unique<Server>();
  std::vector<std::string> argv = {kServerBinary,
                                   absl::StrCat("--job=", job),
                                   absl::StrCat("--archive=", archive_),
                                   absl::StrCat("--name=", options_.name),
                                   "--port=0",
                                   absl::StrCat("--ready_file=", ready)};
  argv.insert(argv.end(), flags.begin(), flags.end());
  CODISTILL_ASSIGN_OR_RETURN(server->process_, StartPinned(argv, ready, core, kClientCore));
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(ready, 1 << 16));
  server->address_ = nlohmann::json::parse(text).value("address", "");
  return server;
}

MeasuredModel::Server::~Server() {
  process_.Signal(SIGKILL);
  while (process_.running() && !process_.Poll()) absl::SleepFor(absl::Milliseconds(5));
}

double MeasuredModel::Server::ProcessorSeconds() const {
  clockid_t clock = 0;
  timespec time = {};
  if (clock_getcpuclockid(process_.pid(), &clock) != 0) return 0;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

}  // namespace codistill
