#include "tests/benchmarks/worker_overhead_jobs.h"

#include <png.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/file_system.h"
#include "common/base/random.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr int kClasses = 10;
constexpr int kImagesOfAClass = 256;
constexpr int kSide = 32;
constexpr int kWords = 13776;  // besides <eos>
constexpr int kLanes = 32;
constexpr int kUnroll = 32;

JobConfig OneWorker(const std::string& name, int64_t batch, double learning_rate) {
  JobConfig job;
  job.set_name(name);
  GroupConfig* group = job.add_groups();
  group->set_name("alpha");
  job.mutable_codistillation()->set_enabled(false);
  job.mutable_evaluator()->set_enabled(false);
  TrainingConfig* training = job.mutable_training();
  training->set_batch_size(batch);
  training->set_log_every_steps(1);
  training->set_publish_every_steps(1000000);  // nobody follows
  training->mutable_optimizer()->set_learning_rate(learning_rate);
  job.mutable_stop()->set_steps(1000000);
  return job;
}

void AddOption(const std::string& key, const std::string& value, JobConfig* job) {
  ModelExport::Option* option = job->mutable_model()->mutable_export_()->add_options();
  option->set_key(key);
  option->set_value(value);
}

// A colour and a stripe direction of its class, under noise.
absl::Status WriteImage(const std::string& path, int label, int side, RandomStream* random) {
  std::vector<uint8_t> pixels(static_cast<size_t>(side) * side * 3);
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x) {
      const double angle = label * M_PI / kClasses;
      const double wave = std::sin((x * std::cos(angle) + y * std::sin(angle)) * 0.7);
      for (int c = 0; c < 3; ++c) {
        const double base = 128 + 30 * wave + 20 * std::cos(label * (c + 1));
        const double value = base + 40 * random->Normal();
        pixels[(static_cast<size_t>(y) * side + x) * 3 + c] =
            static_cast<uint8_t>(std::min(255.0, std::max(0.0, value)));
      }
    }
  }
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  image.width = side;
  image.height = side;
  image.format = PNG_FORMAT_RGB;
  image.flags = PNG_IMAGE_FLAG_FAST;  // to be read fast, too
  if (png_image_write_to_file(&image, path.c_str(), 0, pixels.data(), 0, nullptr) == 0) {
    return absl::InternalError(absl::StrCat(path, ": ", image.message));
  }
  return absl::OkStatus();
}

absl::Status WriteImages(const std::string& data_dir, int images_of_a_class, int side) {
  RandomStream random(20);
  for (int label = 0; label < kClasses; ++label) {
    const std::string folder = absl::StrCat(data_dir, "/images/class", label);
    CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(folder));
    for (int i = 0; i < images_of_a_class; ++i) {
      CODISTILL_RETURN_IF_ERROR(
          WriteImage(absl::StrCat(folder, "/", 1000 + i, ".png"), label, side, &random));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<JobConfig> ResNet20Job(const std::string& data_dir) {
  CODISTILL_RETURN_IF_ERROR(WriteImages(data_dir, kImagesOfAClass, kSide));
  JobConfig job = OneWorker("resnet20", 64, 0.01);
  job.mutable_model()->mutable_export_()->set_module("resnet");
  AddOption("depth", "20", &job);
  AddOption("num_classes", absl::StrCat(kClasses), &job);
  ModelInput* input = job.mutable_model()->add_inputs();
  input->set_name("image");
  for (const int d : {3, kSide, kSide}) input->add_shape(d);
  job.mutable_model()->set_num_outputs(kClasses);
  job.mutable_data()->mutable_train()->mutable_image()->add_files("images");
  return job;
}

absl::StatusOr<JobConfig> ResNet50Job(const std::string& data_dir, int side, int batch,
                                      const std::string& device) {
  // Two batches of the usual size, which the page cache keeps.
  CODISTILL_RETURN_IF_ERROR(WriteImages(data_dir, std::max(2 * batch / kClasses, 2), side));
  JobConfig job = OneWorker("resnet50", batch, 0.01);
  job.mutable_groups(0)->add_devices(device);
  job.mutable_training()->set_precision(BF16);
  // Images are decoded beside the GPU's work.
  job.mutable_training()->set_worker_threads(
      std::max(1, static_cast<int>(std::thread::hardware_concurrency()) - 3));
  job.mutable_training()->set_server_threads(2);
  job.mutable_model()->mutable_export_()->set_module("resnet");
  AddOption("layout", "large", &job);
  AddOption("depth", "50", &job);
  AddOption("num_classes", absl::StrCat(kClasses), &job);
  ModelInput* input = job.mutable_model()->add_inputs();
  input->set_name("image");
  for (const int d : {3, side, side}) input->add_shape(d);
  job.mutable_model()->set_num_outputs(kClasses);
  ImageConfig* images = job.mutable_data()->mutable_train()->mutable_image();
  images->add_files("images");
  images->set_height(side);
  images->set_width(side);
  return job;
}

absl::StatusOr<JobConfig> LstmJob(const std::string& data_dir, int steps) {
  const int tokens = std::max((steps + 2) * kLanes * kUnroll, 2 * kWords);
  RandomStream random(13777);
  std::string text;
  for (int i = 0; i < tokens; ++i) {
    // Every word once; from then on few words are frequent, as in any text.
    const double u = random.Uniform();
    const int word = i < kWords ? i : static_cast<int>(kWords * u * u * u);
    absl::StrAppend(&text, "w", word, i % 24 == 23 ? "\n" : " ");
  }
  text.back() = '\n';
  CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(JoinPath(data_dir, "text.txt"), text));

  // At a rate of 2 the 40th step or so blows what BLAS kernels round differently up to percents of
  // the loss, and nothing could be compared with anything.
  JobConfig job = OneWorker("lstm", kLanes, 0.5);
  job.mutable_model()->mutable_export_()->set_module("lstm_lm");
  AddOption("vocabulary", absl::StrCat(kWords + 1), &job);
  AddOption("embedding", "256", &job);
  AddOption("hidden", "256", &job);
  AddOption("layers", "2", &job);
  ModelInput* input = job.mutable_model()->add_inputs();
  input->set_name("tokens");
  input->set_dtype(DT_INT64);
  input->add_shape(kUnroll);
  for (const char* name : {"h", "c"}) {
    RecurrentState* state = job.mutable_model()->add_states();
    state->set_name(name);
    for (const int d : {2, -1, 256}) state->add_shape(d);
  }
  job.mutable_model()->set_num_outputs(kWords + 1);
  TextConfig* config = job.mutable_data()->mutable_train()->mutable_text();
  config->add_files("text.txt");
  config->set_unroll(kUnroll);
  return job;
}

}  // namespace codistill
