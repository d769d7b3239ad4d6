#include "server/leader_harness.h"

#include <utility>

#include "common/base/file.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"
#include "common/config/shard_map.h"
#include "server/test_model.h"

namespace codistill {

void PuppetShard::Probe(const ProbeRequest&, absl::Duration, Done<ProbeReply> done) {
  if (!reachable) return done(absl::UnavailableError("connection refused"));
  ProbeReply reply;
  reply.set_shard(index_);
  reply.set_process_nonce(nonce);
  reply.set_generation(generation);
  reply.set_step(step);
  for (const auto& item : pushes) *reply.add_pushes() = item.second;
  done(reply);
}

void PuppetShard::Restore(const RestoreRequest& request, absl::Duration, Done<RestoreReply> done) {
  restores.push_back(request);
  if (!reachable) return done(absl::UnavailableError("connection refused"));
  if (!restore_error.ok()) {
    const absl::Status error = restore_error;
    if (restore_errors > 0 && --restore_errors == 0) restore_error = absl::OkStatus();
    return done(error);
  }
  RestoreReply reply;
  if (request.keep()) {
    if (generation != request.generation()) return done(absl::FailedPreconditionError("lost"));
    reply.set_end_example(end_example);
    reply.set_furthest_step(furthest_step);
  } else {
    generation = request.generation();
    Version version;
    ParseManifestName(request.manifest(), &version);
    step = std::max(request.manifest().empty() ? 0 : version.step(), request.min_step());
    incarnation = request.shard_incarnation();
  }
  reply.set_step(step);
  reply.set_process_nonce(nonce);
  reply.set_shard_incarnation(incarnation);
  done(reply);
}

void PuppetShard::Prepare(const PrepareRequest& request, absl::Duration, Done<PrepareReply> done) {
  prepares.push_back(request);
  if (hold_prepares) {
    held.push_back([this, done] { done(prepared); });
    return;
  }
  done(prepared);
}

void PuppetShard::Commit(const CommitRequest& request, absl::Duration, Done<CommitReply> done) {
  commits.push_back(request);
  if (hold_commits) {
    held.push_back([this, request, done] { AnswerCommit(request, done); });
    return;
  }
  AnswerCommit(request, done);
}

void PuppetShard::WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration,
                                  Done<WriteCheckpointReply> done) {
  writes.push_back(request);
  if (hold_writes) {
    held.push_back([this, request, done] { AnswerWrite(request, done); });
    return;
  }
  AnswerWrite(request, done);
}

void PuppetShard::Release() {
  std::vector<std::function<void()>> answers;
  answers.swap(held);
  for (auto& answer : answers) answer();
}

void PuppetShard::AnswerCommit(const CommitRequest& request, const Done<CommitReply>& done) {
  if (!commit_error.ok()) return done(commit_error);
  if (request.contributors_size() > 0 || request.rejected_size() > 0) step = request.step();
  CommitReply reply;
  reply.set_step(step);
  done(reply);
}

void PuppetShard::AnswerWrite(const WriteCheckpointRequest& request,
                              const Done<WriteCheckpointReply>& done) {
  if (!write_error.ok()) return done(write_error);
  CheckpointShardHeader identity;
  identity.set_shard(index_);
  identity.mutable_version()->set_generation(request.generation());
  identity.mutable_version()->set_step(request.step());
  const auto file =
      WriteShardFile(request.directory(),
                     ShardFileName(index_, 2, identity.version(), request.attempt()), identity, {});
  if (!file.ok()) return done(file.status());
  WriteCheckpointReply reply;
  reply.set_file_name(file->name());
  reply.set_bytes(file->bytes());
  reply.set_crc32c(file->crc32c());
  done(reply);
}

void LeaderTest::SetUp() {
  directory_ = JoinPath(testing::TempDir(), "leader",
                        testing::UnitTest::GetInstance()->current_test_info()->name());
  ASSERT_TRUE(RemoveAll(directory_).ok());
  map_ = BuildShardMap(TestTensors(), kShards).value();
  job_ = TestJob("unused", kShards, 2);
  for (int s = 0; s < kShards; ++s) shards_.push_back(std::make_unique<PuppetShard>(s));
}

void LeaderTest::UseCheckpoints(int64_t every) {
  job_.mutable_checkpoint()->set_directory(directory_);
  job_.mutable_checkpoint()->set_every_steps(every);
}

void LeaderTest::Make() {
  leader_.reset();  // lets go of the directory
  GroupLeader::Options options;
  options.job = job_;
  options.map = map_;
  options.map_digest = ShardMapDigest(map_);
  options.nonce = ++nonce_;
  for (auto& shard : shards_) options.links.push_back(shard.get());
  options.clock = &clock_;
  options.file_system = &disk_;
  options.run_io = [](std::function<void()> task) { task(); };
  options.on_superseded = [this](absl::Status status) { superseded_ = std::move(status); };
  auto leader = GroupLeader::Create(options);
  ASSERT_TRUE(leader.ok()) << leader.status();
  leader_ = *std::move(leader);
  leader_->SetAddresses("leader:1", {"shard:0", "shard:1"});
}

void LeaderTest::Start() {
  Make();
  Pass(absl::Milliseconds(600));
  for (int rank = 0; rank < job_.groups(0).num_workers(); ++rank) {
    ASSERT_TRUE(Register(rank).ok());
  }
}

void LeaderTest::Pass(absl::Duration time) {
  for (absl::Duration done; done < time; done += absl::Milliseconds(100)) {
    clock_.Advance(absl::Milliseconds(100));
    leader_->Tick();
  }
}

absl::Status LeaderTest::Register(int rank, uint64_t process) {
  RegisterRequest request;
  request.set_rank(rank);
  request.set_process_nonce(process == 0 ? 1000 + rank : process);
  *request.mutable_tensors() = TestTensors().tensors();
  const auto reply = leader_->Register(request);
  if (reply.ok()) replies_[rank] = *reply;
  return reply.status();
}

std::shared_ptr<LeaderTest::Asked> LeaderTest::Ask(int rank, int64_t first, int count) {
  GetAssignmentsRequest request;
  request.set_generation(replies_[rank].generation());
  request.set_rank(rank);
  request.set_incarnation(replies_[rank].incarnation());
  request.set_first_step(first);
  request.set_max_assignments(count);
  auto asked = std::make_shared<Asked>();
  leader_->GetAssignments(request, clock_.Now() + absl::Seconds(5),
                          [asked](absl::StatusOr<GetAssignmentsReply> reply) {
                            asked->answered = true;
                            asked->reply = std::move(reply);
                          });
  return asked;
}

absl::Status LeaderTest::End(int rank, int shard, int64_t step, bool finite,
                             const std::string& state) {
  ReportEndRequest request;
  request.set_generation(replies_[rank].generation());
  request.set_step(step);
  request.set_rank(rank);
  request.set_incarnation(replies_[rank].incarnation());
  request.set_shard(shard);
  request.mutable_end()->set_num_examples(4);
  request.mutable_end()->set_num_labels(4);
  request.mutable_end()->set_label_loss_sum(8);
  request.mutable_end()->set_finite(finite);
  if (!finite) request.mutable_end()->set_not_finite_tensor("w");
  request.set_worker_state(state);
  if (job_.training().update_mode() != TrainingConfig::SYNC) {
    request.set_own_step(step);
    request.set_outcome(finite ? APPLIED : REJECTED);
    request.set_shard_incarnation(shards_[shard]->incarnation);
  }
  return leader_->ReportEnd(request);
}

void LeaderTest::MustEnd(int rank, int shard, int64_t step, bool finite, const std::string& state) {
  const absl::Status status = End(rank, shard, step, finite, state);
  ASSERT_TRUE(status.ok()) << status;
}

void LeaderTest::EndAll(int64_t step) {
  for (int rank = 0; rank < job_.groups(0).num_workers(); ++rank) {
    for (int shard = 0; shard < kShards; ++shard) MustEnd(rank, shard, step);
  }
}

void LeaderTest::Run(int64_t from, int64_t to) {
  for (int64_t step = from; step <= to; ++step) {
    Ask(0);
    Ask(1);
    EndAll(step);
  }
}

std::vector<std::string> LeaderTest::Files() {
  return FileSystem::Real()->ListDir(JoinPath(directory_, "alpha")).value();
}

absl::Status LeaderTest::HeartbeatStatus(int rank, const std::string& fatal, bool leaving) {
  HeartbeatRequest request;
  request.set_rank(rank);
  request.set_incarnation(replies_[rank].incarnation());
  request.set_fatal_error(fatal);
  request.set_leaving(leaving);
  return leader_->Heartbeat(request).status();
}

}  // namespace codistill
