#include "tests/benchmarks/server_group.h"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/embedding.h"
#include "common/config/job.h"
#include "common/config/shard_map.h"
#include "google/protobuf/text_format.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

constexpr absl::Duration kStartLimit = absl::Seconds(60);
constexpr char kServerBinary[] = "server/parameter_server";  // from the root of the runfiles

JobConfig JobOf(const ServerGroup::Options& options) {
  JobConfig job;
  job.set_name(options.name);
  job.set_run_id(absl::StrCat(options.name, "-", getpid()));
  job.mutable_model()->set_archive_dir(options.directory);
  job.mutable_model()->set_num_outputs(2);
  ModelInput* const input = job.mutable_model()->add_inputs();
  input->set_name("x");
  input->add_shape(4);
  for (const bool train : {true, false}) {
    SyntheticConfig* const data =
        (train ? job.mutable_data()->mutable_train() : job.mutable_data()->mutable_validation())
            ->mutable_synthetic();
    data->set_inputs(4);
    data->set_classes(2);
    data->set_stream(train ? 0 : 1);
  }
  for (const EmbeddingTableConfig& table : options.tables) {
    *job.mutable_model()->add_embedding_tables() = table;
    ModelInput* const rows = job.mutable_model()->add_inputs();
    rows->set_name(absl::StrCat("rows_", table.name()));
    rows->set_dtype(DT_INT64);
    rows->add_shape(1);
    rows->set_field("hashed");
    rows->set_embedding_table(table.name());
  }
  if (!options.tables.empty()) {
    CsvConfig csv;
    csv.add_files("keys.csv");
    for (int i = 0; i < 6; ++i) {
      CsvColumn* const column = csv.add_columns();
      column->set_name(absl::StrCat("c", i));
      column->set_kind(i < 4 ? CsvColumn::NUMERIC : i == 4 ? CsvColumn::HASHED : CsvColumn::LABEL);
    }
    for (const char* label : {"0", "1"}) {
      csv.mutable_columns(5)->add_label_values()->add_text(label);
    }
    *job.mutable_data()->mutable_train()->mutable_csv() = csv;
    *job.mutable_data()->mutable_validation()->mutable_csv() = csv;
    job.mutable_model()->mutable_inputs(0)->set_field("numeric");
  }
  GroupConfig* const group = job.add_groups();
  group->set_name("alpha");
  group->set_num_shards(options.num_shards);
  group->set_num_workers(options.num_workers);
  for (int s = 0; s < options.num_shards; ++s) group->add_shards();
  *job.mutable_training() = options.training;
  job.mutable_training()->set_batch_size(4);
  job.mutable_training()->set_rejoin_timeout_s(3600);
  job.mutable_codistillation()->set_enabled(false);
  job.mutable_stop()->set_steps(1000000000);
  job.mutable_evaluator()->set_enabled(false);
  return job;
}

}  // namespace

absl::Status ServerGroup::WriteModel(const std::vector<int64_t>& sizes,
                                     const std::string& directory) {
  TensorList list;
  std::vector<std::string> entries;
  int64_t elements = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    TensorSpec* const spec = list.add_tensors();
    spec->set_name(absl::StrCat("p", i));
    spec->add_shape(sizes[i]);
    spec->set_dtype(DT_FLOAT);
    spec->set_role(TensorSpec::PARAMETER);
    entries.push_back(absl::StrCat("\"p", i, R"(":{"dtype":"F32","shape":[)", sizes[i],
                                   R"(],"data_offsets":[)", elements * 4, ",",
                                   (elements + sizes[i]) * 4, "]}"));
    elements += sizes[i];
  }
  const std::string header = absl::StrCat("{", absl::StrJoin(entries, ","), "}");
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
  bytes += header;
  const size_t start = bytes.size();
  bytes.resize(start + elements * sizeof(float));
  for (int64_t i = 0; i < elements; ++i) {
    const float value = InitialWeight(i);
    std::memcpy(&bytes[start + i * sizeof(float)], &value, sizeof(float));
  }
  std::string text;
  google::protobuf::TextFormat::PrintToString(list, &text);
  CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(directory));
  CODISTILL_RETURN_IF_ERROR(
      WriteFileAtomically(JoinPath(directory, "alpha.tensors.textproto"), text));
  return WriteFileAtomically(JoinPath(directory, "alpha.safetensors"), bytes);
}

absl::StatusOr<std::unique_ptr<ServerGroup>> ServerGroup::Start(Options options) {
  JobConfig job = JobOf(options);
  const std::string base = JoinPath(options.directory, options.name);
  std::unique_ptr<ServerGroup> group(new ServerGroup(std::move(options)));
  for (int t = 0; t < job.model().embedding_tables_size(); ++t) {
    group->table_seeds_.push_back(EmbeddingSeed(job, 0, t));
  }
  group->ref_.set_run_id(RunId(job));
  group->ref_.set_group(job.groups(0).name());
  const int shards = group->options_.num_shards;
  group->shards_.resize(shards);
  group->addresses_.resize(shards);
  for (int s = shards - 1; s >= 0; --s) {  // the leader knows the others' addresses
    const std::string path = absl::StrCat(base, ".job.textproto");
    CODISTILL_RETURN_IF_ERROR(SaveJob(job, path));
    const std::string ready = absl::StrCat(base, ".shard", s, ".ready");
    std::vector<std::string> argv = {kServerBinary, absl::StrCat("--job=", path),
                                     absl::StrCat("--shard=", s), absl::StrCat("--port=", 0),
                                     absl::StrCat("--ready_file=", ready)};
    for (const std::string& flag : group->options_.flags) argv.push_back(flag);
    CODISTILL_ASSIGN_OR_RETURN(
        group->shards_[s],
        StartPinned(argv, ready, group->options_.server_core, group->options_.client_core));
    CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(ready, 1 << 16));
    group->addresses_[s] = nlohmann::json::parse(text).value("address", "");
    job.mutable_groups(0)->mutable_shards(s)->set_address(group->addresses_[s]);
  }
  group->leader_ = LeaderClient::Create(group->addresses_[0], group->ref_);
  return group;
}

ServerGroup::~ServerGroup() {
  for (ChildProcess& shard : shards_) shard.Signal(SIGKILL);
  for (ChildProcess& shard : shards_) {
    while (shard.running() && !shard.Poll()) absl::SleepFor(absl::Milliseconds(5));
  }
}

absl::StatusOr<GroupWorker> ServerGroup::Join(int rank) {
  CODISTILL_ASSIGN_OR_RETURN(
      const TensorList list,
      LoadTensorList(JoinPath(options_.directory, "alpha.tensors.textproto")));
  GroupWorker worker;
  worker.rank = rank;
  RegisterRequest request;
  *request.mutable_group() = ref_;
  request.set_rank(rank);
  request.set_process_nonce(static_cast<uint64_t>(getpid()) * 4096 + rank + 1);
  *request.mutable_tensors() = list.tensors();
  for (const absl::Time end = absl::Now() + kStartLimit;;) {
    absl::StatusOr<RegisterReply> reply =
        leader_->Register(request, absl::Now() + absl::Seconds(10));
    if (reply.ok()) {
      worker.registered = *std::move(reply);
      break;
    }
    if (!absl::IsUnavailable(reply.status()) || absl::Now() > end) return reply.status();
    absl::SleepFor(absl::Milliseconds(20));
  }
  TensorClient::Options options;
  options.group = ref_;
  options.shard_map = worker.registered.shard_map();
  options.shard_addresses = addresses_;
  CODISTILL_ASSIGN_OR_RETURN(worker.tensors, TensorClient::Create(std::move(options)));
  return worker;
}

std::vector<TensorView> ViewsOf(const ShardMap& map, absl::Span<float> values) {
  std::vector<TensorView> views;
  float* at = values.data();
  for (const TensorSpec& spec : map.tensors()) {
    TensorView view;
    view.name = spec.name();
    view.dtype = spec.dtype();
    view.shape.assign(spec.shape().begin(), spec.shape().end());
    view.data = at;
    at += view.elements();
    views.push_back(view);
  }
  return views;
}

}  // namespace codistill
