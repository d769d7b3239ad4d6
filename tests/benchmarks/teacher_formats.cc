// What a teacher's answer loses by travelling in fewer bytes, on a language model that has been
// trained: deploy/jobs/wikitext2.textproto, its two groups side by side without teachers, so that
// they have come to different models of the same text. Then alpha teaches beta, on test.txt: every
// question and every answer is encoded and decoded as on the wire.
//
//   teacher_formats [--quick]
//
// Bytes of a response; of psi alone the gradient by the student's logits, against that of fp32
// logits: cosine over the whole batch, and the mean of the rows'; and the divergence of what was
// decoded from what was computed. CODISTILL_DATA names the folder of WikiText-2's valid.txt and
// test.txt. The last line of the output is a JSON object.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "common/model/model.h"
#include "cuda/loss.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/harness.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/teacher_answers.h"
#include "worker/data/dataset.h"
#include "worker/dataset_batches.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kWordPieces = 24000;  // of the figures for bytes

// What is gathered of one format over all batches.
struct Tally {
  int64_t bytes = 0;
  double divergence = 0;
  double worst_whole = 1, sum_whole = 0, sum_row_mean = 0;
};

class Measurement {
 public:
  Measurement(JobConfig job, std::string data_dir, int batches)
      : job_(std::move(job)), data_dir_(std::move(data_dir)), batches_(batches) {}

  absl::Status Train() {
    JobHarness harness(job_);
    harness.set_data_dir(data_dir_);
    const absl::Time start = absl::Now();
    CODISTILL_RETURN_IF_ERROR(harness.Start());
    // Harnesses do not wait for long; a busy machine may take a minute for so many steps.
    for (int64_t step = 100; step <= job_.stop().steps(); step += 100) {
      for (int group = 0; group < 2; ++group) {
        CODISTILL_RETURN_IF_ERROR(harness.WaitForStep(group, step));
      }
    }
    CODISTILL_RETURN_IF_ERROR(harness.WaitUntilDone());
    training_seconds_ = absl::ToDoubleSeconds(absl::Now() - start);
    job_ = harness.job();
    for (int group = 0; group < 2; ++group) {
      Model::Options options;
      options.archive = ArchivePath(job_, group);
      options.config = job_.model();
      options.threads = 2;
      CODISTILL_ASSIGN_OR_RETURN(models_[group], Model::Load(std::move(options)));
      CODISTILL_ASSIGN_OR_RETURN(const Weights weights, harness.NewestCut(group));
      if (weights.version.step() != job_.stop().steps()) {
        return absl::InternalError(absl::StrCat("group ", group, " ended at step ",
                                                weights.version.step(), " of ",
                                                job_.stop().steps()));
      }
      CODISTILL_RETURN_IF_ERROR(CopyInto(weights, models_[group]->storage()));
    }
    return harness.Drain();
  }

  absl::Status Measure() {
    DatasetOptions options;
    options.job = &job_;
    options.training = false;
    options.data_dir = data_dir_;
    CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> data, CreateDataset(options));
    tallies_.resize(AllAnswerFormats().size());
    Model::States states[2];
    for (int i = 0; i < batches_; ++i) {
      const int64_t lanes = data->lanes();
      Batch batch;
      CODISTILL_RETURN_IF_ERROR(
          data->Fill(EvaluationExamples(*data, data->size(), i * lanes, (i + 1) * lanes), &batch));
      CODISTILL_ASSIGN_OR_RETURN(const StudentBatch student,
                                 ToStudentBatch(job_.model(), std::move(batch)));
      Tensor logits[2];
      for (int group = 0; group < 2; ++group) {
        CODISTILL_ASSIGN_OR_RETURN(Model::Logits predicted,
                                   models_[group]->Predict(student.inputs, &states[group]));
        logits[group] = std::move(predicted.values);
      }
      CODISTILL_RETURN_IF_ERROR(MeasureBatch(student, logits[0], logits[1], states[0]));
    }
    return absl::OkStatus();
  }

  // Bytes of a row at 24,000 classes, without states.
  absl::StatusOr<std::vector<double>> BytesOfWordPieces() const {
    auto config = std::make_shared<ModelConfig>();
    config->set_num_outputs(kWordPieces);
    auto* input = config->add_inputs();
    input->set_name("tokens");
    input->set_dtype(DT_INT64);
    auto batch = std::make_shared<TeacherBatch>();
    batch->examples = batch->rows = 256;
    batch->inputs = {Tensor::Zeros(DT_INT64, {256})};
    Tensor logits = Tensor::Allocate(DT_FLOAT, {256, kWordPieces});
    RandomStream random(1);
    for (float& z : logits.As<float>()) z = static_cast<float>(random.Uniform());
    std::vector<double> bytes;
    for (const NamedFormat& format : AllAnswerFormats()) {
      CODISTILL_ASSIGN_OR_RETURN(const TeacherExchange exchange,
                                 AskAndAnswer(config, batch, format.format, logits, {}));
      bytes.push_back(static_cast<double>(exchange.response_bytes));
    }
    return bytes;
  }

  absl::StatusOr<Json> Report(bool quick) const {
    Json report = NewReport("teacher_formats", batches_, "none");
    report["quick"] = quick;
    report["model"] = "lstm_lm of deploy/jobs/wikitext2.textproto, trained without teachers";
    report["shapes"] = "batches of 32 lanes of 32 words";
    report["threads"] = "1 a training worker, 2 here";
    report["vocabulary"] = job_.model().num_outputs();
    report["steps"] = job_.stop().steps();
    report["training_seconds"] = training_seconds_;
    report["rows"] = rows_;
    const double rows = static_cast<double>(rows_);
    report["teacher_loss_untrained"] = std::log(static_cast<double>(job_.model().num_outputs()));
    report["teacher_loss"] = loss_[0] / rows;
    report["student_loss"] = loss_[1] / rows;
    report["teacher_student_divergence"] = divergence_ / rows;
    report["teacher_tail_mass_topk64"] = tail_ / rows;
    report["largest_logit_magnitude"] = magnitude_;
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<double> word_pieces, BytesOfWordPieces());
    const std::vector<NamedFormat> formats = AllAnswerFormats();
    for (size_t f = 0; f < formats.size(); ++f) {
      const Tally& tally = tallies_[f];
      Json& of = report["formats"][formats[f].name];
      of["bytes_per_row"] = static_cast<double>(tally.bytes) / rows;
      of["bytes_ratio"] = static_cast<double>(tally.bytes) / static_cast<double>(tallies_[0].bytes);
      of["bytes_ratio_24000"] = word_pieces[f] / word_pieces[0];
      of["cosine_whole_batch"] = tally.sum_whole / batches_;
      of["cosine_whole_batch_worst"] = tally.worst_whole;
      of["cosine_row_mean"] = tally.sum_row_mean / batches_;
      if (formats[f].format.top_k == 0) of["mean_kl"] = tally.divergence / rows;
    }
    report["topk64_bytes_ratio"] = report["formats"]["topk64"]["bytes_ratio_24000"];
    report["topk64_cosine"] = report["formats"]["topk64"]["cosine_whole_batch_worst"];
    report["topk64_cosine_row_mean"] = report["formats"]["topk64"]["cosine_row_mean"];
    for (const char* name : {"fp16", "bf16", "int8"}) {
      report[absl::StrCat(name, "_mean_kl")] = report["formats"][name]["mean_kl"];
    }
    return report;
  }

 private:
  absl::Status MeasureBatch(const StudentBatch& batch, const Tensor& teacher, const Tensor& student,
                            const Model::States& states) {
    const auto config = std::make_shared<ModelConfig>(job_.model());
    auto question = std::make_shared<TeacherBatch>();
    question->inputs = batch.inputs;
    question->examples = batch.examples;
    question->rows = batch.rows;
    const int64_t classes = config->num_outputs();
    rows_ += batch.rows;
    const float* const teacher_logits = teacher.As<float>().data();
    const float* const student_logits = student.As<float>().data();
    divergence_ += SumOfDivergences(teacher_logits, student_logits, batch.rows, classes);
    for (float z : teacher.As<float>()) magnitude_ = std::max(magnitude_, std::abs(z));

    LossInputs inputs;
    inputs.rows = batch.rows;
    inputs.classes = classes;
    inputs.labels = batch.labels.As<int64_t>().data();
    for (int group = 0; group < 2; ++group) {
      inputs.logits = group == 0 ? teacher_logits : student_logits;
      LossOutputs outputs;
      CODISTILL_RETURN_IF_ERROR(ComputeLossCpu(LossOptions(), inputs, &outputs, 2));
      loss_[group] += outputs.sums.label_loss_sum;
    }

    std::vector<double> dense;
    const std::vector<NamedFormat> formats = AllAnswerFormats();
    for (size_t f = 0; f < formats.size(); ++f) {
      CODISTILL_ASSIGN_OR_RETURN(
          const TeacherExchange exchange,
          AskAndAnswer(config, question, formats[f].format, teacher, states));
      CODISTILL_ASSIGN_OR_RETURN(std::vector<double> gradient,
                                 PsiGradient(LossOptions(), inputs, exchange.answer));
      Tally& tally = tallies_[f];
      tally.bytes += static_cast<int64_t>(exchange.response_bytes);
      if (f == 0) {
        if (std::memcmp(exchange.answer.logits.data(), teacher.data(), teacher.bytes()) != 0) {
          return absl::InternalError("fp32 logits did not come as they were sent");
        }
        dense = gradient;
      }
      const Cosines cosines = CosinesOf(gradient, dense, batch.rows);
      tally.worst_whole = std::min(tally.worst_whole, cosines.whole);
      tally.sum_whole += cosines.whole;
      tally.sum_row_mean += cosines.row_mean;
      if (formats[f].format.top_k == 0) {
        tally.divergence +=
            SumOfDivergences(teacher_logits, Widened(exchange.answer.logits).As<float>().data(),
                             batch.rows, classes);
      } else if (formats[f].name == "topk64") {
        for (float tail : exchange.answer.top_k.tail.As<float>()) tail_ += tail;
      }
    }
    return absl::OkStatus();
  }

  JobConfig job_;
  const std::string data_dir_;
  const int batches_;
  double training_seconds_ = 0;
  std::unique_ptr<Model> models_[2];  // alpha teaches beta
  std::vector<Tally> tallies_;        // by format
  int64_t rows_ = 0;
  // Sums over rows.
  double loss_[2] = {0, 0};
  double divergence_ = 0, tail_ = 0;
  float magnitude_ = 0;
};

absl::Status Run(bool quick) {
  const char* data = std::getenv("CODISTILL_DATA");
  if (data == nullptr) {
    return absl::NotFoundError(
        "CODISTILL_DATA names no folder; the one that has wikitext2/valid.txt and test.txt is "
        "wanted");
  }
  CODISTILL_ASSIGN_OR_RETURN(JobConfig job,
                             LoadJob(RunfilesPath("deploy/jobs/wikitext2.textproto"),
                                     {"codistillation.enabled=false", "evaluator.enabled=false",
                                      "evaluation.every_steps=0", "checkpoint.every_steps=0"}));
  if (quick) job.mutable_stop()->set_steps(400);
  Measurement measurement(std::move(job), absl::StrCat(data, "/wikitext2"), quick ? 2 : 10);
  CODISTILL_RETURN_IF_ERROR(measurement.Train());
  CODISTILL_RETURN_IF_ERROR(measurement.Measure());
  CODISTILL_ASSIGN_OR_RETURN(const Json report, measurement.Report(quick));
  PrintReport(report);
  return absl::OkStatus();
}

int Main(bool quick) {
  const absl::Status status = Run(quick);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
}
