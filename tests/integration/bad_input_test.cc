// Bad input: a clear error that names the thing, a non-zero exit, nothing corrupted.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zlib.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

// A port of this machine that belongs to this test, listening or not.
class OwnPort {
 public:
  explicit OwnPort(bool listening) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    const bool bound = fd_ >= 0 &&
                       bind(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
                       (!listening || listen(fd_, 1) == 0) &&
                       getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0;
    EXPECT_TRUE(bound);
    address_ = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  }
  ~OwnPort() { close(fd_); }
  const std::string& address() const { return address_; }

 private:
  const int fd_;
  std::string address_;
};

// A linear model of the two columns.
constexpr char kModule[] = R"(
import torch
from torch import nn


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(2, 2)

    def forward(self, numeric: torch.Tensor) -> torch.Tensor:
        return self.output(numeric)


def build(options):
    return Linear()
)";

// A job whose examples come from a file of two columns and a label.
JobConfig CsvJob(const std::string& file) {
  JobConfig job = MlpJob("csv", 1);
  ModelConfig* model = job.mutable_model();
  model->mutable_export_()->clear_options();
  static const auto* module = new std::string(WriteText("linear.py", kModule));
  model->mutable_export_()->set_module(*module);
  model->mutable_inputs(0)->set_name("numeric");
  model->mutable_inputs(0)->set_shape(0, 2);
  model->set_num_outputs(2);
  job.clear_data();
  CsvConfig* csv = job.mutable_data()->mutable_train()->mutable_csv();
  csv->add_files(file);
  for (const char* name : {"a", "b"}) {
    CsvColumn* column = csv->add_columns();
    column->set_name(name);
    column->set_kind(CsvColumn::NUMERIC);
  }
  CsvColumn* label = csv->add_columns();
  label->set_name("label");
  label->set_kind(CsvColumn::LABEL);
  label->add_label_values()->add_text("no");
  label->add_label_values()->add_text("yes");
  return job;
}

std::string CsvText(int records) {
  std::string text;
  for (int i = 0; i < records; ++i) {
    absl::StrAppend(&text, i % 7, ",", i * 5 % 11, ".5,", i % 3 == 0 ? "yes" : "no", "\n");
  }
  return text;
}

CommandResult RunIn(const std::string& out, const JobConfig& job, const std::string& data_dir) {
  return Ctl({"run", WriteJob(job), "--out", out, "--data_dir", data_dir, "--timeout", "60"});
}

// The run fails with an error that has all of `words`, leaves no daemon and no summary.
void ExpectFailure(const JobConfig& job, const std::string& data_dir,
                   const std::vector<std::string>& words) {
  OrphanCatcher catcher;
  const std::string out = NewDirectory("bad") + "/run";
  const CommandResult result = RunIn(out, job, data_dir);
  EXPECT_EQ(result.exit.signal, 0);
  EXPECT_NE(result.exit.exit_code, 0);
  EXPECT_FALSE(absl::StrContains(result.err, "not done within --timeout")) << "an endless wait";
  for (const std::string& word : words) {
    EXPECT_TRUE(absl::StrContains(result.err, word)) << word << " is not in: " << result.err;
  }
  EXPECT_TRUE(ProcessesWith(out).empty());
  EXPECT_NE(access((out + "/summary.json").c_str(), F_OK), 0);
}

TEST(JobFileTest, FiveMistakesGiveFiveMessages) {
  JobConfig job = MlpJob("five", 2);
  job.mutable_groups(1)->set_name("alpha");                            // used twice
  job.mutable_groups(0)->set_num_shards(0);                            // none
  job.mutable_training()->set_batch_size(-3);                          // negative
  job.mutable_training()->mutable_optimizer()->set_learning_rate(-1);  // negative
  job.mutable_stop()->clear_steps();                                   // missing
  const std::string path = WriteJob(job);
  const std::vector<std::string> fields = {"groups[1].name", "groups[0].num_shards",
                                           "training.batch_size",
                                           "training.optimizer.learning_rate", "stop.steps"};
  const CommandResult text = Ctl({"validate", path});
  EXPECT_NE(text.exit.exit_code, 0);
  for (const std::string& field : fields) {
    EXPECT_TRUE(absl::StrContains(text.err, field)) << field << " is not in: " << text.err;
  }
  const CommandResult result = Ctl({"validate", path, "--json"});
  EXPECT_NE(result.exit.exit_code, 0);
  const nlohmann::json json = ParseJson(result.out);
  EXPECT_EQ(json["valid"], false);
  EXPECT_EQ(json["errors"].size(), 5u) << result.out;
  // What cannot be valid is not begun.
  const std::string out = NewDirectory("five") + "/run";
  const CommandResult run = Ctl({"run", path, "--out", out});
  EXPECT_EQ(run.exit.exit_code, 2);
  EXPECT_TRUE(absl::StrContains(run.err, "stop.steps")) << run.err;
  EXPECT_NE(access(out.c_str(), F_OK), 0);
}

TEST(JobFileTest, MistakesOfSyntaxAndNamesAreCountedToo) {
  const std::string path = WriteText("job.textproto",
                                     "name: \"names\"\n"
                                     "sede: 3\n"                       // no such field
                                     "seed: banana\n"                  // no number
                                     "training { batch_size: 1.5 }\n"  // no integer
                                     "stop { steps: 10 }\n"
                                     "data { partition: SOME }\n"     // no such value
                                     "groups { nam: \"alpha\" }\n");  // no such field
  const CommandResult result = Ctl({"validate", path, "--json"});
  EXPECT_NE(result.exit.exit_code, 0);
  const nlohmann::json json = ParseJson(result.out);
  std::string all;
  for (const auto& error : json["errors"]) all += error.get<std::string>() + "\n";
  for (const char* word : {"sede", "banana", "batch_size", "SOME", "nam"}) {
    EXPECT_TRUE(absl::StrContains(all, word)) << word << " is not in: " << all;
  }
}

TEST(JobFileTest, AValidFileIsValid) {
  const CommandResult result = Ctl({"validate", WriteJob(MlpJob("valid", 2)), "--json"});
  EXPECT_TRUE(result.exit.clean()) << result.err;
  EXPECT_EQ(ParseJson(result.out)["valid"], true);
  const CommandResult missing = Ctl({"validate", "/no/such/job.textproto"});
  EXPECT_NE(missing.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(missing.err, "/no/such/job.textproto")) << missing.err;
}

TEST(DataTest, AGoodFileTrains) {
  OrphanCatcher catcher;
  const std::string file = WriteText("train.csv", CsvText(500));
  JobConfig job = CsvJob("train.csv");
  *job.mutable_data()->mutable_validation() = job.data().train();
  job.mutable_evaluator()->set_enabled(true);
  const std::string out = NewDirectory("good") + "/run";
  const CommandResult result = RunIn(out, job, DirName(file));
  ASSERT_TRUE(result.exit.clean()) << result.exit.ToString() << result.err;
  // Two classes have an accuracy and an AUC.
  const nlohmann::json final = ReadJson(out + "/summary.json")["groups"][0]["final"];
  for (const char* name : {"validation_accuracy", "validation_auc"}) {
    ASSERT_TRUE(final.contains(name)) << name;
    EXPECT_GT(final[name].get<double>(), 0.3) << name;
    EXPECT_LE(final[name].get<double>(), 1) << name;
  }
}

TEST(DataTest, AMissingFileIsNamed) {
  const std::string directory = NewDirectory("data");
  ExpectFailure(CsvJob("absent.csv"), directory, {directory + "/absent.csv"});
}

TEST(DataTest, ABadRecordIsNamedByFileAndLine) {
  const std::string file =
      WriteText("bad.csv", absl::StrCat(CsvText(200), "3,4,maybe\n", CsvText(100)));
  ExpectFailure(CsvJob("bad.csv"), DirName(file), {file, "201", "maybe"});
}

TEST(DataTest, ATruncatedFileIsNamed) {
  // Cut in mid-record.
  const std::string text = CsvText(300);
  const std::string file = WriteText("cut.csv", text.substr(0, text.size() - 5));
  ExpectFailure(CsvJob("cut.csv"), DirName(file), {file, "300"});
}

TEST(DataTest, ATruncatedArchiveIsNamed) {
  const std::string path = NewDirectory("data") + "/cut.csv.gz";
  const std::string text = CsvText(5000);
  gzFile gz = gzopen(path.c_str(), "wb");
  ASSERT_NE(gz, nullptr);
  ASSERT_EQ(gzwrite(gz, text.data(), text.size()), static_cast<int>(text.size()));
  ASSERT_EQ(gzclose(gz), Z_OK);
  const auto whole = ReadFile(path, 1 << 20);
  ASSERT_TRUE(whole.ok());
  ASSERT_EQ(truncate(path.c_str(), whole->size() * 2 / 3), 0);
  ExpectFailure(CsvJob("cut.csv.gz"), DirName(path), {path});
}

TEST(ModelTest, AnArchiveWithOtherInputsIsRefused) {
  // Exported for 32 inputs, used with 16.
  JobConfig wide = MlpJob("inputs", 1);
  ASSERT_TRUE(ExportArchives(&wide).ok());
  JobConfig narrow = wide;
  narrow.mutable_model()->mutable_inputs(0)->set_shape(0, 16);
  narrow.mutable_data()->mutable_train()->mutable_synthetic()->set_inputs(16);
  narrow.mutable_data()->mutable_validation()->mutable_synthetic()->set_inputs(16);
  ExpectFailure(narrow, ".", {ArchivePath(wide, 0)});
  JobConfig columns = wide;
  columns.mutable_model()->set_num_outputs(5);
  columns.mutable_data()->mutable_train()->mutable_synthetic()->set_classes(5);
  columns.mutable_data()->mutable_validation()->mutable_synthetic()->set_classes(5);
  ExpectFailure(columns, ".", {ArchivePath(wide, 0), "num_outputs"});
}

TEST(ModelTest, MissingAndDamagedArchivesAreNamed) {
  JobConfig job = MlpJob("damaged", 1);
  job.set_seed(3);  // files of its own, to be damaged
  JobConfig absent = job;
  absent.mutable_model()->clear_export_();
  absent.mutable_model()->set_archive_dir(NewDirectory("nothing"));
  ExpectFailure(absent, ".", {absent.model().archive_dir() + "/alpha."});
  ASSERT_TRUE(ExportArchives(&job).ok());
  ASSERT_EQ(truncate(WeightsPath(job, 0).c_str(), 1000), 0);
  ExpectFailure(job, ".", {WeightsPath(job, 0)});
}

TEST(ModelTest, TheExportersOwnMessageIsShown) {
  JobConfig job = MlpJob("option", 1);
  ModelExport::Option* option = job.mutable_model()->mutable_export_()->add_options();
  option->set_key("depth");
  option->set_value("3");
  ExpectFailure(job, ".", {"mlp has no option 'depth'"});
}

// A job with the address of its shard given, and its one daemon started by hand.
TEST(AddressTest, APortInUseIsNamed) {
  OrphanCatcher catcher;
  const OwnPort port(/*listening=*/true);
  JobConfig job = MlpJob("port", 1);
  ASSERT_TRUE(ExportArchives(&job).ok());
  job.mutable_groups(0)->set_num_shards(1);
  job.mutable_groups(0)->add_shards()->set_address(port.address());
  Command server({RunfilesBinaries().parameter_server, "--job=" + WriteJob(job), "--group=alpha",
                  "--shard=0"});
  const CommandResult result = server.Wait();
  EXPECT_EQ(result.exit.signal, 0) << "it went on for ever";
  EXPECT_NE(result.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(result.err, port.address())) << result.err;
}

TEST(AddressTest, AnUnreachableServerIsNamed) {
  OrphanCatcher catcher;
  const OwnPort port(/*listening=*/false);
  JobConfig job = MlpJob("unreachable", 1);
  ASSERT_TRUE(ExportArchives(&job).ok());
  job.mutable_groups(0)->set_num_shards(1);
  job.mutable_groups(0)->add_shards()->set_address(port.address());
  const std::string path = WriteJob(job);
  const CommandResult status = Ctl({"status", path, "--json"});
  EXPECT_NE(status.exit.exit_code, 0);
  const nlohmann::json json = ParseJson(status.out);
  ASSERT_FALSE(json["daemons"].empty());
  EXPECT_EQ(json["daemons"][0]["reachable"], false);
  EXPECT_EQ(json["daemons"][0]["address"], port.address());
  // A worker gives up once its group has had time to come back.
  JobConfig impatient = job;
  impatient.mutable_training()->set_rejoin_timeout_s(1);
  const CommandResult worker = Command({RunfilesBinaries().worker, "--job=" + WriteJob(impatient),
                                        "--group=alpha", "--index=0"})
                                   .Wait();
  EXPECT_EQ(worker.exit.signal, 0) << "it went on for ever";
  EXPECT_NE(worker.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(worker.err, port.address())) << worker.err;
  for (const char* command : {"checkpoint", "pause"}) {
    const CommandResult result = Ctl({command, path});
    EXPECT_NE(result.exit.exit_code, 0) << command;
    EXPECT_TRUE(absl::StrContains(result.err, port.address())) << command << ": " << result.err;
  }
}

}  // namespace
}  // namespace codistill
